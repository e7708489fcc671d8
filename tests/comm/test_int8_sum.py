import time

import numpy as np
import pytest
import torch

from consensus.comm import PeerLostError, ProcessGroup
from consensus.comm.blocks import BLOCK
from consensus.comm.int8_sum import Int8Sum
from consensus.server import digest

pytestmark = pytest.mark.ranks
CPU = torch.device("cpu")
EXACT = 2


def compressed(group, numel):
    mine = ProcessGroup(group.handle, CPU, 60.0, shared_memory=False, compress="int8")
    total = mine.repeated_sum(numel + EXACT, torch.empty(0), exact=EXACT)
    assert isinstance(total, Int8Sum)
    return total


def summand(rank, t, numel):
    """Numbers whose magnitude differs between the blocks, and the exact ones."""
    random = np.random.default_rng((rank, t))
    magnitudes = 10.0 ** random.integers(-6, 6, -(-numel // BLOCK))
    numbers = random.normal(size=numel) * np.repeat(magnitudes, BLOCK)[:numel]
    return np.concatenate([numbers, [1.0 / 3.0 * (rank + 1), 1e-9]]).astype(np.float32)


def quantized(x):
    """x after NumPy has encoded and decoded it."""
    found = np.zeros_like(x)
    for start in range(0, len(x), BLOCK):
        block = x[start : start + BLOCK]
        scale = max(np.float32(abs(block).max() / np.float32(127)), np.finfo(np.float32).tiny)
        found[start : start + BLOCK] = np.rint(block / scale).astype(np.int8) * scale
    return found


def reference(size, numel, rounds):
    """The totals and the residuals of all ranks by NumPy, and the exact sums in float64."""
    residuals = np.zeros((size, numel), np.float32)
    blocks = -(-numel // BLOCK)
    ends = [min(numel, blocks * r // size * BLOCK) for r in range(size + 1)]
    found = []
    for t in range(rounds):
        rows = np.stack([summand(r, t, numel) for r in range(size)])
        x = residuals + rows[:, :numel]
        sent = np.stack([quantized(row) for row in x])
        residuals = x - sent
        total = sent[0].copy()
        for row in sent[1:]:
            total += row
        if size > 2:
            for r in range(size):
                own = slice(ends[r], ends[r + 1])
                rounded = quantized(total[own])
                residuals[r, own] += total[own] - rounded
                total[own] = rounded
        tail = rows[:, numel:].sum(0, dtype=np.float32)
        found.append((np.concatenate([total, tail]), residuals.copy(), rows.astype(float).sum(0)))
    return found


def sums(group, numel, rounds):
    total = compressed(group, numel)
    found = []
    for t in range(rounds):
        total.message.copy_(torch.from_numpy(summand(group.rank, t, numel)))
        pending = total.start()
        if t == group.rank + 2:
            time.sleep(0.05)  # the others have begun their next sum by then
        got = pending.wait()
        found.append((got.numpy().copy(), total.residual.numpy().copy(), int(digest(got))))
    return found, total.num_bytes


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("numel", [1, 3, 256, 1000, 70_003])
def test_totals_and_residuals_are_those_of_numpy(ranks, size, numel):
    rounds = 5
    answers = ranks(size, sums, numel, rounds)
    expected = reference(size, numel, rounds)
    for t, (total, residuals, _) in enumerate(expected):
        for rank, (found, num_bytes) in enumerate(answers):
            got, residual, bits = found[t]
            np.testing.assert_array_equal(got, total)
            np.testing.assert_array_equal(residual, residuals[rank])
            assert bits == answers[0][0][t][2]
            assert num_bytes <= numel + 4 * -(-numel // BLOCK) + 4 * EXACT * size


def test_over_all_sums_only_the_residuals_are_missing(ranks):
    numel, rounds, size = 1000, 40, 4
    answers = ranks(size, sums, numel, rounds)
    missing = sum(exact for *_, exact in reference(size, numel, rounds))[:numel]
    missing -= sum(total.astype(float) for total, *_ in answers[0][0])[:numel]
    left = sum(found[-1][1].astype(float) for found, _ in answers)
    largest = max(abs(summand(r, t, numel)).max() for r in range(size) for t in range(rounds))
    np.testing.assert_allclose(missing, left, atol=1e-5 * largest)
    # Of a residual the first phase leaves half a scale, and the second one that of the total.
    assert (abs(missing) <= size * largest / 127).all()


def constant_sums(group, feedback):
    total = compressed(group, 300)
    x = torch.from_numpy(summand(group.rank, 0, 300))
    mean = torch.zeros(300 + EXACT, dtype=torch.float64)
    errors = {}
    for t in range(1, 513):
        if not feedback:
            total.residual.zero_()
        total.message.copy_(x)
        mean += total.start().wait()
        if t in (1, 8, 512):
            errors[t] = (mean / t).numpy()
    return errors


def test_the_mean_of_sums_of_constant_messages_approaches_theirs_as_one_over_their_number(ranks):
    rows = np.stack([summand(r, 0, 300) for r in range(2)]).astype(float)[:, :300]
    # |e_r| <= s_r / 2 with s_r = max (|x_r| + |e_r|) / 127; over T sums e_r is all that is missing.
    blocks = [slice(0, BLOCK), slice(BLOCK, 300)]
    bound = np.zeros(300)
    for block in blocks:
        bound[block] = sum(abs(row[block]).max() / (2 * 127 - 1) for row in rows)
    for feedback in (True, False):
        answers = ranks(2, constant_sums, feedback)
        errors = {t: abs(mean[:300] - rows.sum(0)) for t, mean in answers[0].items()}
        assert (errors[1] <= bound * 1.001).all()
        if feedback:
            for t, error in errors.items():
                assert (error <= 1.001 * bound / t + 1e-6 * abs(rows).max()).all(), t
        else:
            np.testing.assert_allclose(errors[512], errors[1], rtol=1e-3, atol=1e-9)


def not_finite(group):
    total = compressed(group, 1000)
    total.message.fill_(1.0)
    if group.rank == group.size - 1:
        total.message[600] = torch.inf
    return torch.isfinite(total.start().wait()).tolist()


@pytest.mark.parametrize("size", [2, 4])
def test_a_number_that_is_not_finite_is_seen_by_all(ranks, size):
    for finite in ranks(size, not_finite):
        expected = np.ones(1000 + EXACT, bool)
        expected[2 * BLOCK : 3 * BLOCK] = False
        assert finite == expected.tolist()


def lose_a_peer(group, late):
    """The last rank leaves before its third sum; the others are one line."""
    last = group.size - 1
    total = compressed(group, 5000)
    for _ in range(2):
        total.message.fill_(1.0)
        total.start().wait()
    time.sleep(0.5 * (late == (group.rank == last)))
    if group.rank == last:
        total._group.close()
        group.close()
        return None
    try:
        total.message.fill_(1.0)
        total.start().wait()
    except PeerLostError as error:
        total._group.close()
        group.close()
        return str(error)
    return "no error"


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("late", [False, True])
def test_a_peer_that_leaves_is_one_line_of_every_rank(ranks, size, late):
    *messages, _ = ranks(size, lose_a_peer, late, timeout=60)
    for rank, message in enumerate(messages):
        assert message.startswith(f"rank {rank}: lost a peer in `sum`: ")
        assert "\n" not in message
