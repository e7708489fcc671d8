"""Writing checkpoints: in the background, complete or not at all, wherever a write fails."""

import errno
import io
import json
import os
import re
import resource
import shutil
import threading
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from consensus.comm import Solo
from consensus.run.checkpoint import writer as checkpoint_writer
from consensus.run.checkpoint.manifest import Manifest, Place
from consensus.run.checkpoint.reader import (
    by_worker,
    inspect,
    load,
    verify_files,
)
from consensus.run.checkpoint.writer import CheckpointWriter, Facts
from consensus.server import digest
from tests.testing.checkpoints import (
    M,
    N,
    at,
    bits,
    block,
    described,
    make_facts,
    make_state,
    names,
    no_flush,
    restore,
    save,
    signature,
    whole,
    written,
)


def test_one_worker_without_a_server(config, tmp_path):
    """The state of `Msgd`: K = M = 1, and no `server/...`."""
    state = {key: x for key, x in make_state([3], 20).items() if key.startswith("worker/")}
    writer = CheckpointWriter(tmp_path, config, Solo(), (range(1), 1), 1, no_flush)
    writer.write(state, Facts(20, 0, 0.0, None))
    writer.wait()
    assert writer.problem is None
    wanted = {key: torch.zeros_like(x) for key, x in state.items()}
    assert bits(load(at(tmp_path, 20), wanted, range(1))) == bits(state)


def test_memory_layouts_do_not_matter(config, tmp_path):
    """A state of views, transposed or expanded, is written by its values."""
    state = make_state(range(M), 5)
    laid_out = {
        **state,
        "worker/z": state["worker/z"].T.contiguous().T,
        "worker/v": state["worker/v"][:1].expand(M, N),
        "server/u": torch.stack([state["server/u"], -state["server/u"]], 1)[:, 0],
    }
    expected = bits({**state, "worker/v": state["worker/v"][:1].repeat(M, 1)})
    writer = CheckpointWriter(tmp_path, config, Solo(), (range(M), M), 1, no_flush)
    writer.write(laid_out, make_facts(5, state))
    writer.wait()
    assert writer.problem is None
    assert bits(load(at(tmp_path, 5), laid_out, range(M))) == expected


# ---- the files


def stored(checkpoint, place):
    """The tensor at a place: torch.save's bytes from offset on."""
    content = (checkpoint / place["file"]).read_bytes()
    piece = content[place["offset"] : place["offset"] + place["length"]]
    return torch.load(io.BytesIO(piece), weights_only=True)


def save_once(group, run_dir, config, facts):
    workers = block(group)
    writer = CheckpointWriter(run_dir, config, group.side(), (workers, M), 1, no_flush)
    state = make_state(workers, facts.iteration)
    writer.write(state, facts)
    writer.wait()
    return writer.problem, writer.written, group.gather(digest(state["server/u"])).tolist()


@pytest.mark.ranks
@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_files_of_a_checkpoint(ranks, config, tmp_path, size):
    best = {"iteration": 400, "test_error": 1.25}
    assert written(size, ranks(size, save_once, tmp_path, config, Facts(500, -2, 12.5, best)))
    assert names(tmp_path) == ["00000500"]
    checkpoint = at(tmp_path, 500)
    listed = {"config.yaml", *(f"__{rank}_0.distcp" for rank in range(size))}
    assert set(os.listdir(checkpoint)) == listed | {"manifest.json"}
    manifest = json.loads((checkpoint / "manifest.json").read_bytes())
    places = manifest["tensors"]
    assert manifest == {
        "format": 1,
        "iteration": 500,
        "num_workers": M,
        "digest": "fffffffffffffffe",  # -2 modulo 2^64
        "wall_s": 12.5,
        "best": best,
        "torch": str(torch.__version__),
        "files": {name: described(checkpoint / name) for name in listed},
        "tensors": places,
        "sha256": signature(manifest),
    }
    expected = by_worker(make_state(range(M), 500), range(M))
    assert bits({key: stored(checkpoint, places[key]) for key in places}) == bits(expected)
    for key, tensor in expected.items():
        assert (places[key]["dtype"], places[key]["shape"]) == (str(tensor.dtype), [*tensor.shape])
    assert OmegaConf.load(checkpoint / "config.yaml") == asdict(config)
    read, before = inspect(checkpoint)
    files = {name: tuple(what) for name, what in manifest["files"].items()}
    assert read == verify_files(checkpoint, Solo()) == Manifest.read(checkpoint)
    tensors = {
        key: Place(**place | {"shape": tuple(place["shape"])}) for key, place in places.items()
    }
    assert read == Manifest(
        500, M, "fffffffffffffffe", 12.5, best, torch.__version__, files, tensors
    )
    assert before == asdict(config)


def test_torch_writes_no_pickled_index(good):
    assert sorted(os.listdir(good)) == ["__0_0.distcp", "config.yaml", "manifest.json"]


@pytest.mark.ranks
def test_every_number_is_stored_once(ranks, config, tmp_path):
    """A row is stored without its neighbours, and u by one rank only."""
    n = 20_000
    assert written(2, ranks(2, save, tmp_path, config, [1], torch.float64, n))
    stored = sum(path.stat().st_size for path in at(tmp_path, 1).glob("*.distcp"))
    numbers = 8 * (2 * M * n + n)
    assert numbers < stored < 1.05 * numbers


@pytest.mark.ranks
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("keep", [1, 3])
def test_the_oldest_checkpoints_are_removed(ranks, config, tmp_path, size, keep):
    iterations = [7, 99_999_999, 100_000_000, 100_000_007]  # by number, not by name
    answers = ranks(size, save, tmp_path, config, iterations, torch.float32, N, keep)
    assert written(size, answers, count=4)
    assert names(tmp_path) == sorted(f"{t:08d}" for t in iterations[-keep:])
    for t in iterations[-keep:]:
        [state], _ = restore(Solo(), [at(tmp_path, t)])
        assert state == bits(make_state(range(M), t))


def test_a_checkpoint_of_the_same_iteration_is_replaced(config, tmp_path):
    writer = CheckpointWriter(tmp_path, config, Solo(), (range(M), M), 2, no_flush)
    for t in (5, 10):
        state = make_state(range(M), t)
        writer.write(state, Facts(5, t, 0.0, None))
    writer.wait()
    assert (writer.problem, writer.written, names(tmp_path)) == (None, 2, ["00000005"])
    assert Manifest.read(at(tmp_path, 5)).digest == "000000000000000a"
    assert restore(Solo(), [at(tmp_path, 5)])[0] == [bits(make_state(range(M), 10))]


def test_an_incomplete_checkpoint_is_replaced(config, tmp_path):
    assert save(Solo(), tmp_path, config, [5])[0] is None
    shutil.copytree(at(tmp_path, 5), tmp_path / "checkpoints" / ".00000010.tmp")
    (tmp_path / "checkpoints" / ".00000010.tmp" / "__7_0.distcp").touch()
    assert save(Solo(), tmp_path, config, [10])[0] is None
    assert names(tmp_path) == ["00000005", "00000010"]
    assert not (at(tmp_path, 10) / "__7_0.distcp").exists()


# ---- the background thread


def write_while_training(group, run_dir, config):
    """The second thread is held back until the state has changed; it must write the old state."""
    workers = block(group)
    side, gate = group.side(), threading.Event()
    honest = side.gather
    side.gather = lambda tensor: gate.wait(60.0) and honest(tensor)
    writer = CheckpointWriter(run_dir, config, side, (workers, M), 9, no_flush)
    state = make_state(workers, 5)
    writer.write(state, make_facts(5, state))
    seen = [(writer.written, at(run_dir, 5).exists())]
    for key, x in make_state(workers, 10).items():
        state[key].copy_(x)  # in place, `cuts` as well
    total = float(group.sum_(torch.ones(())))  # the training communicates meanwhile
    opening = threading.Timer(0.3, gate.set)
    opening.start()
    writer.write(state, make_facts(10, state))  # one copy exists at a time: waits for the first
    seen.append((writer.written >= 1, at(run_dir, 5).exists()))
    writer.wait()
    opening.join()
    seconds = writer.wait_s, writer.write_s
    digests = group.gather(digest(state["server/u"])).tolist()
    return (writer.problem, writer.written, digests), seen, seconds, total


@pytest.mark.ranks
@pytest.mark.parametrize("size", [1, 2])
def test_training_continues_while_its_copy_is_written(ranks, config, tmp_path, size):
    answers = ranks(size, write_while_training, tmp_path, config)
    assert written(size, [answer[0] for answer in answers], count=2)
    for _, seen, (wait_s, write_s), total in answers:
        assert seen == [(0, False), (True, True)]
        assert total == size
        assert 0.25 < wait_s < 60.0, "the second write waited for the first"
        assert 0.25 < write_s < 60.0
    states, _ = restore(Solo(), [at(tmp_path, 5), at(tmp_path, 10)])
    assert states == [bits(make_state(range(M), t)) for t in (5, 10)]


# ---- a write that fails


def fail_to_publish(group, run_dir, config):
    """Let the second of three writes fail on rank 0 just before its checkpoint appears."""
    seen = []

    def before_publish():
        seen.append(names(run_dir))
        if len(seen) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    workers = block(group)
    writer = CheckpointWriter(run_dir, config, group.side(), (workers, M), 9, before_publish)
    for t in (5, 10, 15):
        state = make_state(workers, t)
        writer.write(state, make_facts(t, state))
        writer.wait()
    return writer.problem, writer.written, seen, group.gather(digest(state["server/u"])).tolist()


@pytest.mark.ranks
@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_failing_flush_prevents_the_checkpoint(ranks, config, tmp_path, size):
    answers = ranks(size, fail_to_publish, tmp_path, config)
    why = f"rank 0: cannot write checkpoint {at(tmp_path, 10)}: No space left on device"
    for rank, (problem, number, seen, digests) in enumerate(answers):
        assert (problem, number) == (why, 1)
        assert digests == [answers[0][3][0]] * size
        # Called on rank 0, before the name appears, and not after a write has failed.
        assert seen == ([] if rank else [[".00000005.tmp"], [".00000010.tmp", "00000005"]])
    assert names(tmp_path) == ["00000005"]
    assert whole(at(tmp_path, 5))


def fail_to_hash(group, run_dir, config, wrong):
    """Let one rank fail to read its files back."""
    workers = block(group)
    writer = CheckpointWriter(run_dir, config, group.side(), (workers, M), 9, no_flush)
    honest = checkpoint_writer.file_digest

    def file_digest(path):
        if group.rank == wrong and path.parent.name == ".00000010.tmp":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return honest(path)

    checkpoint_writer.file_digest = file_digest
    try:
        for t in (5, 10):
            state = make_state(workers, t)
            writer.write(state, make_facts(t, state))
        writer.wait()
    finally:
        checkpoint_writer.file_digest = honest
    return writer.problem, writer.written, group.gather(digest(state["server/u"])).tolist()


@pytest.mark.ranks
@pytest.mark.parametrize(("size", "wrong"), [(1, 0), (2, 0), (2, 1), (4, 3)])
def test_a_failure_of_one_rank_is_reported_by_all(ranks, config, tmp_path, size, wrong):
    answers = ranks(size, fail_to_hash, tmp_path, config, wrong)
    why = f"rank {wrong}: cannot write checkpoint {at(tmp_path, 10)}: Input/output error"
    assert answers == [(why, 1, [answers[0][2][0]] * size)] * size
    assert names(tmp_path) == ["00000005"]
    assert whole(at(tmp_path, 5))


class Steps:
    """Counts the calls that change the disk, lists the checkpoints before each, and fails at one.

    The list is what a kill at that point would leave.
    """

    CALLS = (
        (os, "fsync"),
        (Path, "mkdir"),
        (Path, "write_bytes"),
        (Path, "rename"),
        (Path, "replace"),
    )

    def __init__(self, patch, run_dir, failing):
        self.run_dir, self.failing = run_dir, failing
        self.count = 0
        self.seen = []
        for owner, name in self.CALLS:
            patch.setattr(owner, name, self.wrapped(getattr(owner, name)))
        # It ignores errors, so it cannot fail; but a kill may come before it.
        patch.setattr(shutil, "rmtree", self.wrapped(shutil.rmtree, can_fail=False))

    def wrapped(self, honest, can_fail=True):
        def call(*args, **kwargs):
            self.look()
            if can_fail:
                self.count += 1
                if self.count == self.failing:
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
            return honest(*args, **kwargs)

        return call

    def look(self):
        found = names(self.run_dir)
        self.seen.append({name: whole(self.run_dir / "checkpoints" / name) for name in found})


def test_a_named_checkpoint_is_complete_wherever_a_write_fails_or_is_killed(
    config, tmp_path, monkeypatch
):
    published = 0
    for failing in range(1, 100):
        run_dir = tmp_path / str(failing)
        assert save(Solo(), run_dir, config, [5])[0] is None
        writer = CheckpointWriter(run_dir, config, Solo(), (range(M), M), 1, no_flush)
        state = make_state(range(M), 10)
        with monkeypatch.context() as patch:
            steps = Steps(patch, run_dir, failing)
            writer.write(state, make_facts(10, state))
            writer.wait()
        steps.look()
        for moment in steps.seen:
            named = [is_whole for name, is_whole in moment.items() if not name.startswith(".")]
            assert named, "a checkpoint always exists"
            assert all(named)
        assert not [name for name in names(run_dir) if name.startswith(".")]
        if steps.count < failing:
            break  # no call failed
        assert re.search("Input/output error", writer.problem)
        assert writer.written == 0
        published += at(run_dir, 10).exists()
    assert (writer.problem, names(run_dir)) == (None, ["00000010"])
    assert steps.count > 8
    assert published == 2, "the sync of its name and the removal of the old one come after"


def fail_to_fit(group, run_dir, config, limited, n):
    """A full disk, simulated by a limit on the size of the files of a process."""
    workers = block(group)
    writer = CheckpointWriter(run_dir, config, group.side(), (workers, M), 9, no_flush)
    state = make_state(workers, 5)
    writer.write(state, make_facts(5, state))
    writer.wait()
    assert writer.problem is None
    writer = CheckpointWriter(run_dir, config, group.side(), (workers, M), 9, no_flush)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if group.rank in limited:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))  # Python ignores the signal
    try:
        state = make_state(workers, 10, n=n)
        writer.write(state, make_facts(10, state))
        writer.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    return writer.problem, writer.written, group.gather(digest(state["server/u"])).tolist()


FULL = [(1, (0,)), (2, (1,)), (2, (0, 1)), (4, (2,))]


@pytest.mark.ranks
@pytest.mark.parametrize(("size", "limited"), FULL)
def test_a_full_disk_leaves_the_older_checkpoints(ranks, config, tmp_path, size, limited):
    answers = ranks(size, fail_to_fit, tmp_path, config, limited, 20_000)
    problem = answers[0][0]
    why = f"rank {limited[0]}: cannot write checkpoint {at(tmp_path, 10)}: File too large"
    assert problem == why
    assert answers == [(problem, 0, [answers[0][2][0]] * size)] * size
    assert names(tmp_path) == ["00000005"]
    assert restore(Solo(), [at(tmp_path, 5)])[0] == [bits(make_state(range(M), 5))]


def diverge(group, run_dir, config, wrong):
    """Flip one bit of u on some of the ranks."""
    workers = block(group)
    writer = CheckpointWriter(run_dir, config, group.side(), (workers, M), 9, no_flush)
    for t in (5, 10):
        state = make_state(workers, t)
        if t == 10 and group.rank in wrong:
            state["server/u"].view(torch.int32)[3] ^= 1
        writer.write(state, make_facts(t, state))
    writer.wait()
    return writer.problem, writer.written, group.gather(digest(state["server/u"])).tolist()


@pytest.mark.ranks
@pytest.mark.parametrize(("size", "wrong"), [(2, [1]), (4, [2]), (4, [1, 3])])
def test_diverged_replicas_are_not_saved(ranks, config, tmp_path, size, wrong):
    answers = ranks(size, diverge, tmp_path, config, wrong)
    for problem, number, digests in answers:
        assert f"u on rank {wrong} differs" in problem
        assert number == 1
        assert [rank for rank in range(size) if digests[rank] != digests[0]] == wrong
        assert digests == answers[0][2]
    assert names(tmp_path) == ["00000005"]
    assert whole(at(tmp_path, 5))
