"""Coupling against the trainer's Algorithm 1 and against plain loops over the workers.

The loss of worker j at iteration t is a noisy quadratic, so that a loop needs its gradient only.
Ranks are real processes. Loops are numpy or plain torch, in float64.
"""

import copy
import io
import math
import pickle
import re
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed import all_reduce, new_group
from torch.distributed.device_mesh import init_device_mesh

from consensus import POTENTIALS, Coupling, Layerwise
from consensus.algorithm import Consensus
from consensus.core.potentials import Potential
from consensus.core.profiles import Profile
from consensus.core.sizes import Separable
from consensus.server import Server, digest
from consensus.worker import Worker
from tests.testing.proximal import groups, removed
from tests.testing.two_layers import (
    F64,
    LAYERS,
    N,
    Part,
    backward,
    gradient,
    on_ranks,
    shift,
    start,
    trained,
    two_layers,
    vector,
)

# ---- 1. Algorithm 1


def kicked(j, t):
    """`shift`, and one large step that is cut, near the end: rounding is amplified after cuts."""
    return shift(j, t) + (KICK * (-1) ** j if t == KICKED else 0.0)


class Oracle:
    """Gradients of one worker for the trainer's algorithm."""

    def __init__(self, j, quadratic):
        self.j, self.t, self.quadratic = j, 0, quadratic

    def draw(self):
        self.t += 1
        return self.t - 1

    def gradient(self, points, batch):
        wanted = torch.from_numpy(kicked(self.j, batch))
        return points - wanted if self.quadratic else -0.2 * wanted.expand_as(points)

    def state_dict(self):
        return {}


KICK, KICKED = 12.0, 94
PAPER = {"lam": 1.0, "tau": 0.02, "sigma": 0.05}
CASES = [  # potential, period, eta, kappa; with log at eta = 0.5, 4 workers are too stiff
    *((name, period, 0.5, 0.0) for name in ("cubic", "tan", "tan_sep") for period in (1, 5)),
    *(("log", period, eta, 0.0) for period, eta in ((1, 0.5), (5, 0.7))),
    *(("quad", period, eta, 0.0) for period, eta in ((1, 0.5), (5, 1.0))),
    ("log", 5, 0.5, 0.7),
]


def beside_the_trainer(group, steps):
    """The largest difference of u and of z_j over all steps, the cuts, the digest of u; by case."""
    found = []
    for name, period, eta, kappa in CASES:
        quadratic = kappa == 0.0  # else Nesterov's look-ahead point would matter
        phi = Layerwise(POTENTIALS[name], LAYERS, eta)
        u = torch.from_numpy(start())
        worker = Worker(u[None], Oracle(group.rank, quadratic), phi, kappa=kappa)
        algorithm = Consensus(Server(u, phi, group), worker, period=period, **PAPER)
        model = two_layers()
        optimizer = torch.optim.SGD(model.parameters(), lr=PAPER["sigma"], momentum=kappa)
        coupling = Coupling.from_paper(model, optimizer, name, eta=eta, period=period, **PAPER)
        apart = 0.0
        for t in range(steps):
            algorithm.step(t)
            backward(model, group.rank, t, quadratic, kicked)
            optimizer.step()
            coupling.step()
            with coupling.consensus():
                of_u = np.abs(vector(model) - algorithm.u.numpy()).max()
            of_z = np.abs(vector(model) - algorithm.worker.z[0].numpy()).max()
            apart = max(apart, of_u, of_z)
        cuts = coupling.stats()["cuts"]
        state = coupling.state_dict()
        coupling.close()
        found.append((apart, [cuts["u"], cuts["z"]], algorithm.cuts.tolist(), digest(state["u"])))
    return found


@pytest.mark.ranks
@pytest.mark.parametrize("size", [2, 4])
def test_from_paper_is_the_algorithm_of_the_trainer(ranks, size):
    answers = ranks(size, beside_the_trainer, 100)
    total = {}
    for i, case in enumerate(CASES):
        assert len({int(answer[i][3]) for answer in answers}) == 1, f"u differs: {case}"
        for apart, cuts, wanted, _ in (answer[i] for answer in answers):
            assert apart < 1e-12, case
            assert cuts == wanted, case
            total[case] = total.get(case, 0) + sum(cuts)
    assert min(total[case] for case in CASES if case[0] in ("tan", "log", "tan_sep")) > 0


# ---- 2. Methods with names, as loops


M, LR, H, STEPS = 2, 0.1, 4, 22


def sgd(z, t):
    return z - LR * np.stack([gradient(j, t, own) for j, own in enumerate(z)])


def local_sgd(t, z, u):
    z = sgd(z, t)
    if (t + 1) % H == 0:
        z[:] = u = z.mean(0)
    return z, u


def elastic_averaging(t, z, u):
    z = sgd(z, t)
    if (t + 1) % H == 0:
        u = u + 0.6 * (z.mean(0) - u)
        z = z + 0.3 * (u - z)
    return z, u


def fedprox(t, z, u):
    z = sgd(z, t) + 0.05 * (u - z)
    if (t + 1) % H == 0:
        z[:] = u = z.mean(0)
    return z, u


NAMED = {
    local_sgd: {"pull": 1.0},
    elastic_averaging: {"pull": 0.3, "outer": 0.6},
    fedprox: {"pull": 1.0, "local_pull": 0.05},
}


@pytest.mark.ranks
@pytest.mark.parametrize("method", NAMED)
def test_named_methods_without_overlap(ranks, method):
    us, zs, stats = on_ranks(ranks, M, STEPS, LR, period=H, overlap=False, **NAMED[method])
    z, u = np.stack([start()] * M), start()
    for t in range(STEPS):
        z, u = method(t, z, u)
        np.testing.assert_allclose(zs[t], z, rtol=0, atol=1e-14)
        np.testing.assert_allclose(us[t], u, rtol=0, atol=1e-14)
    assert stats["communications"] == STEPS // H


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("pull", "outer", "period", "delay"),
    [
        *((1.0, 1.0, H, 0), (0.3, 0.6, H, 0), (0.3, 0.6, 1, 0)),
        *((1.0, 1.0, H, 1), (1.0, 0.7, H, H - 1), (0.3, 0.6, H, 2), (0.3, 0.6, H, H - 1)),
    ],
)
def test_with_overlap_the_sum_is_one_displacement_late_or_more(ranks, pull, outer, period, delay):
    options = {"pull": pull, "outer": outer, "period": period, "delay": delay}
    us, zs, _ = on_ranks(ranks, M, STEPS, LR, **options)
    z = np.stack([start()] * M)
    u, y = start(), z
    for t in range(STEPS):
        z = sgd(z, t)
        if t % period == delay:
            u = u + outer * (y.mean(0) - u)
            z = z + pull * (u - y)
        if (t + 1) % period == 0:
            y = z
        np.testing.assert_allclose(zs[t], z, rtol=0, atol=1e-14)
        np.testing.assert_allclose(us[t], u, rtol=0, atol=1e-14)


@pytest.mark.parametrize("step", [0.5, 1.0])
def test_one_process_is_lookahead(step):
    us, zs, _ = trained(0, STEPS, LR, pull=1.0, outer=step, period=H, overlap=False)
    z = slow = start()
    for t in range(STEPS):
        z = z - LR * gradient(0, t, z)
        if (t + 1) % H == 0:
            z = slow = slow + step * (z - slow)
        np.testing.assert_allclose(zs[t], z, rtol=0, atol=1e-14)
        np.testing.assert_allclose(us[t], slow, rtol=0, atol=1e-14)


def test_a_full_pull_of_quad_gives_the_bits_of_u():
    torch.manual_seed(0)
    model = nn.Linear(5, 3)
    coupling = Coupling(model, torch.optim.SGD(model.parameters(), lr=0.1), pull=1.0, outer=0.3)
    for _ in range(3):
        before = [p.detach().clone() for p in model.parameters()]
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        d = [p.detach() - old for p, old in zip(model.parameters(), before, strict=True)]
        coupling.step()
        u = coupling.consensus_state_dict().values()
        for parameter, center, moved in zip(model.parameters(), u, d, strict=True):
            assert torch.equal(parameter, center + moved)


# ---- 3. The implicit, weighted step


def weighted_loop(name, eta, pull, local_pull, outer, period, overlap, delay=0):
    """u and z by the formulas: scalar equations for each group of coordinates of each worker."""

    def strength(rate):
        return math.inf if rate == 1.0 else 0.5 * eta**2 * rate / (1.0 - rate)

    def fraction(w, rate):
        c = np.zeros(N)
        for a, b in groups(name, LAYERS) if rate else []:
            c[a:b] = removed(name, np.linalg.norm(w[a:b]), strength(rate), eta)
        return c

    def means(u, z):
        c = [fraction(u - own, pull) for own in z]
        return sum(own * (u - at) for own, at in zip(c, z, strict=True)) / sum(c)

    def pulled(z, u, rate):
        return z + np.stack([fraction(u - own, rate) * (u - own) for own in z])

    z, u = np.stack([start()] * M), start()
    late, us, zs, y = overlap, [], [], z
    for t in range(STEPS):
        d = sgd(z, t) - z
        if late and t % period == delay:
            u = u - outer * means(u, y)
            z, late = z + pulled(y, u, pull) - y + d, False
        else:
            z = (z if late else pulled(z, u, local_pull)) + d
        if (t + 1) % period == 0:
            late, y = True, z
        if late and not overlap:
            u = u - outer * means(u, z)
            z, late = pulled(z, u, pull), False
        us.append(u)
        zs.append(z)
    return np.stack(us), np.stack(zs)


IMPLICIT = {"eta": 0.4, "pull": 0.3, "local_pull": 0.05, "outer": 0.9, "period": 3, "overlap": True}


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("tan", {}),
        ("log", {"period": 1, "local_pull": 0.0}),
        ("tan", {"period": 4, "delay": 1}),
        ("log", {"period": 3, "delay": 2}),
        ("tan_sep", {"period": 4, "delay": 3, "local_pull": 0.0}),
        ("tan_sep", {"overlap": False}),
        ("cubic", {"pull": 1.0}),
        ("pseudo_huber", {"local_pull": 0.0}),
    ],
)
def test_the_implicit_step(ranks, name, changed):
    options = IMPLICIT | changed
    us, zs, stats = on_ranks(ranks, M, STEPS, LR, potential=name, **options)
    wanted_us, wanted_zs = weighted_loop(name, **options)
    np.testing.assert_allclose(zs, wanted_zs, rtol=0, atol=1e-11)
    np.testing.assert_allclose(us, wanted_us, rtol=0, atol=1e-11)
    assert stats["cuts"] == {"u": 0, "z": 0}


# ---- 4. Swaps, states, models


def network(dtype=torch.float32):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2)).to(dtype)


def sgd_of(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def adamw_of(model):
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def train(model, optimizer, coupling, first, last):
    for t in range(first, last):
        generator = torch.Generator().manual_seed(t)
        x = torch.randn(8, 6, generator=generator)
        optimizer.zero_grad()
        out = model(x.to(next(model.parameters()).dtype)).float()
        (out - x[:, :2] * 3.0).square().mean().backward()
        optimizer.step()
        coupling.step()


def bits(state):
    return {key: value.clone() for key, value in state.items()}


def assert_equal_states(a, b):
    assert a.keys() == b.keys()
    assert [key for key in a if not torch.equal(a[key], b[key])] == []


def test_consensus_swaps_u_in_and_the_copy_back():
    model = network()
    optimizer = adamw_of(model)
    coupling = Coupling(model, optimizer, pull=0.3, outer=0.5, period=3)
    train(model, optimizer, coupling, 0, 8)
    before, of_u = bits(model.state_dict()), coupling.consensus_state_dict()
    assert not torch.equal(before["0.weight"], of_u["0.weight"])
    with coupling.consensus():
        assert_equal_states(model.state_dict(), of_u)
        assert_equal_states(coupling.consensus_state_dict(), of_u)
        for name, call in {
            "step": coupling.step,
            "consensus": lambda: coupling.consensus().__enter__(),
            "state_dict": coupling.state_dict,
            "load_state_dict": lambda: coupling.load_state_dict({}),
            "restart": coupling.restart,
        }.items():
            with pytest.raises(RuntimeError, match=f"`{name}` .* inside `consensus"):
                call()
    assert_equal_states(model.state_dict(), before)
    with pytest.raises(KeyError), coupling.consensus():
        raise KeyError
    assert_equal_states(model.state_dict(), before)
    train(model, optimizer, coupling, 8, 9)
    coupling.close()
    coupling.close()
    with pytest.raises(RuntimeError, match=r"`step` .* after `close`"):
        coupling.step()


RESUMED = [
    ("quad", {"period": 3, "pull": 0.3}),
    ("quad", {"overlap": False, "local_pull": 0.1, "period": 2}),
    ("tan", {"eta": 0.05, "period": 4}),
    ("quad", {"period": 4, "delay": 3}),
    ("tan", {"eta": 0.05, "period": 4, "delay": 1}),
    ("log", {"eta": 0.3, "implicit": False, "outer": 0.2}),
]


def saved_and_loaded(*parts):
    """The state_dicts of parts, through a file."""
    file = io.BytesIO()
    torch.save([part.state_dict() for part in parts], file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("make", [sgd_of, adamw_of])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "options"), RESUMED)
def test_a_resumed_run_has_the_same_bits(make, dtype, name, options):
    model = network(dtype)
    optimizer = make(model)
    coupling = Coupling(model, optimizer, name, **options)
    saved = []
    for t in range(12):
        if t in (5, 7, 8):
            saved.append((t, saved_and_loaded(model, optimizer, coupling)))
        train(model, optimizer, coupling, t, t + 1)
    for t, states in saved:
        torch.manual_seed(2)
        fresh = network(dtype)
        again = make(fresh)
        resumed = Coupling(fresh, again, name, **options)
        train(fresh, again, resumed, 100, 102)
        for part, state in zip((fresh, again, resumed), states, strict=True):
            part.load_state_dict(state)
        train(fresh, again, resumed, t, 12)
        assert_equal_states(fresh.state_dict(), model.state_dict())
        assert_equal_states(resumed.consensus_state_dict(), coupling.consensus_state_dict())
        assert resumed.stats()["cuts"] == coupling.stats()["cuts"]


def resume_with_a_sum_on_its_way(group):
    """z_j and u without and with going back two iterations while a sum is on its way."""
    found = []
    for repeated in (False, True):
        model = two_layers()
        optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
        coupling = Coupling(model, optimizer, "tan", eta=0.4, period=2)
        at, saved = 0, None
        while at < 12:
            if at == 6:
                saved = saved or saved_and_loaded(model, optimizer, coupling)
            if at == 8 and repeated:  # both have an even number: sums are on their way
                at, repeated = 6, False
                for part, state in zip(
                    (coupling, model, optimizer), saved[2:] + saved[:2], strict=True
                ):
                    part.load_state_dict(state)
            backward(model, group.rank, at)
            optimizer.step()
            coupling.step()
            at += 1
        found.append((vector(model), coupling.state_dict()["u"].numpy()))
        coupling.close()
    return found


@pytest.mark.ranks
def test_ranks_resume_to_the_same_bits(ranks):
    for straight, resumed in ranks(2, resume_with_a_sum_on_its_way):
        np.testing.assert_array_equal(resumed[0], straight[0])
        np.testing.assert_array_equal(resumed[1], straight[1])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"u": torch.zeros(3)}, r"`u` has shape \(3,\); allowed: \(57,\)"),
        ({"z": torch.zeros(3)}, r"`z` has shape \(3,\); allowed: \(57,\)"),
        ({"cuts": torch.zeros(2, 2)}, r"`cuts` has shape \(2, 2\); allowed: \(1, 2\)"),
        ({"outer": [{}]}, "the state has 1 outer optimizers; allowed: 0"),
        ({"z": None}, "the state has no `z`; allowed: a state_dict"),
    ],
)
def test_a_state_of_another_coupling_is_refused(changed, message):
    model = network()
    coupling = Coupling(model, sgd_of(model))
    state = coupling.state_dict() | changed
    before = bits(coupling.consensus_state_dict())
    with pytest.raises(ValueError, match=message):
        coupling.load_state_dict({key: value for key, value in state.items() if value is not None})
    assert_equal_states(coupling.consensus_state_dict(), before)


REORDERED = [["3.weight", "3.bias"], ["0.weight", "0.bias"], ["1.weight", "1.bias"]]
ON_TAN = {"potential": "tan", "eta": 0.4, "period": 2}


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"potential": "log"}, "`potential` of the state is tan; allowed: log, as in this coup"),
        ({"potential": POTENTIALS["log"]}, "`potential` of the state is tan; allowed: log, as"),
        ({"potential": "power", "options": {"p": 3.0}}, "`potential` of the state is tan; allowed"),
        ({"eta": 0.5}, "`eta` of the state is 0.4; allowed: 0.5, as in this coupling"),
        ({"layers": REORDERED}, "the state has other parameters"),
        ({"fragments": 2}, r"`cuts` has shape \(1, 2\); allowed: \(2, 2\)"),
        ({"potential": POTENTIALS["tan"]}, None),
        ({"period": 3, "pull": 0.7, "implicit": False}, None),  # a decision of the user
    ],
)
def test_a_state_continues_in_a_coupling_of_the_same_domain(others, message):
    model = network()
    train(model, optimizer := sgd_of(model), first := Coupling(model, optimizer, **ON_TAN), 0, 5)
    *_, state = saved_and_loaded(first)
    coupling = Coupling(model, optimizer, **ON_TAN | others)
    before = bits(coupling.consensus_state_dict())
    if message is None:
        coupling.load_state_dict(state)
        assert torch.equal(coupling.state_dict()["u"], state["u"])
        return
    with pytest.raises(ValueError, match=message):
        coupling.load_state_dict(state)
    assert_equal_states(coupling.consensus_state_dict(), before)


def test_a_state_of_an_earlier_version_is_read():
    """It does not say which coupling it is of."""
    model = network()
    train(model, optimizer := sgd_of(model), first := Coupling(model, optimizer, **ON_TAN), 0, 5)
    state = {key: value for key, value in first.state_dict().items() if key != "coupling"}
    Coupling(model, optimizer, **ON_TAN).load_state_dict(state)


def test_a_state_says_which_options_its_potential_had():
    model = network()
    of = [Coupling(model, sgd_of(model), "power", options={"p": p}) for p in (3.0, 4.0)]
    with pytest.raises(ValueError, match=r"`options` of the state is {'p': 3.0}; allowed: {'p': 4"):
        of[1].load_state_dict(of[0].state_dict())


def load_apart(group):
    """Rank 1 loads what it saved four calls earlier, as after a kill between two saves."""
    model = network()
    optimizer = sgd_of(model)
    coupling = Coupling(model, optimizer, **ON_TAN)
    train(model, optimizer, coupling, 10 * group.rank, 10 * group.rank + 4)
    early = coupling.state_dict()
    train(model, optimizer, coupling, 10 * group.rank + 4, 10 * group.rank + 8)
    late = coupling.state_dict()
    counts = (
        r"^`state\['calls'\]` on rank 1 differs from rank 0 \(4, 8\); allowed: the same on all$"
    )
    with pytest.raises(ValueError, match=counts):
        coupling.load_state_dict(early if group.rank else late)
    torn = late | {"u": late["u"] + group.rank * 1e-3}
    with pytest.raises(ValueError, match=r"^`state\['u'\]` on rank 1 differs from rank 0; allowed"):
        coupling.load_state_dict(torn)
    unchanged = torch.equal(coupling.state_dict()["u"], late["u"])
    coupling.load_state_dict(early)
    u = coupling.state_dict()["u"]
    coupling.close()
    return unchanged, int(digest(u)), int(digest(early["u"]))


@pytest.mark.ranks
def test_states_of_different_calls_are_refused_on_all_ranks(ranks):
    answers = ranks(2, load_apart)
    assert all(unchanged for unchanged, *_ in answers)
    assert len({value for _, *values in answers for value in values}) == 1, "u differs"


def steps_until_told(group, at, change, **options):
    """`change(model, coupling)` on rank 1 at call `at`; when each rank is told of what."""
    model = two_layers()
    coupling = Coupling(model, torch.optim.SGD(model.parameters(), lr=LR), **options)
    for t in range(400):
        if t == at and group.rank == 1:
            change(model, coupling)
        try:
            coupling.step()
        except RuntimeError as error:
            return t, str(error)
    return None


def break_one(group):
    """The parameters of rank 1 become infinite."""

    def change(model, _):
        next(model.parameters()).data.fill_(math.inf)

    return steps_until_told(group, 50, change, potential="huber", period=2)


@pytest.mark.ranks
def test_u_that_is_not_finite_ends_the_loops_of_all_ranks(ranks):
    """After the 100th communication, which is finished in a call after 200."""
    answers = ranks(2, break_one)
    assert len(set(answers)) == 1
    t, message = answers[0]
    assert 198 <= t <= 200
    assert message.startswith(f"u is not finite after {t} calls of `step`, because the parameters")


def schedule_alone(group):
    """A schedule of the outer optimizer by a number of rank 1."""

    def change(_, coupling):
        coupling.outer_optimizers[0].param_groups[0]["lr"] = 0.25

    outer = {"outer": lambda u: torch.optim.SGD(u, lr=0.5), "pull": 1.0}
    return steps_until_told(group, 20, change, **outer)


def disturb_u(group):
    """One bit of u changes on rank 1."""

    def change(_, coupling):
        u = coupling._parts[0].u
        u.view(torch.int64 if u.dtype == F64 else torch.int32)[3] ^= 1

    return steps_until_told(group, 50, change, period=2)


@pytest.mark.ranks
def test_replicas_of_u_that_differ_end_the_loops_of_all_ranks(ranks):
    """After the 100th communication, not silently at the end of the training."""
    for function, least, said in (
        (schedule_alone, 98, "`outer` on rank 1 differs from rank 0 (SGD(lr=0.25, "),
        (disturb_u, 198, "`u` on rank 1 differs from rank 0; allowed: the same on all"),
    ):
        answers = ranks(2, function)
        assert len(set(answers)) == 1
        t, message = answers[0]
        assert least <= t <= least + 2
        assert message.startswith(f"after {t} calls of `step`: {said}")


def step_once_more(group):
    model = two_layers()
    coupling = Coupling(model, torch.optim.SGD(model.parameters(), lr=LR))
    for _ in range(5 + group.rank):
        coupling.step()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        coupling.close()
    return [str(warning.message) for warning in caught]


@pytest.mark.ranks
def test_processes_that_have_not_called_step_equally_often_are_warned_at_the_end(ranks):
    first, second = ranks(2, step_once_more)
    assert first == []
    (line,) = second
    assert "after 6 calls of `step` another process is gone: u differs between processes" in line


def test_copies_of_a_coupling_are_refused():
    """A copy would read the memory of the original's sum."""
    model = network()
    coupling = Coupling(model, sgd_of(model))
    for make in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="cannot be copied or pickled; allowed: its state_dict"):
            make(coupling)


def test_restart_begins_at_the_loaded_weights():
    model, loaded = network(), {k: v + 1 for k, v in network().state_dict().items()}
    optimizer = sgd_of(model)
    coupling = Coupling(model, optimizer, period=3)
    train(model, optimizer, coupling, 0, 5)
    model.load_state_dict(loaded)
    coupling.restart()
    assert_equal_states(coupling.consensus_state_dict(), loaded)
    coupling.step()
    assert_equal_states(model.state_dict(), loaded)
    assert coupling.stats()["calls"] == 1


@pytest.mark.parametrize("potential", ["quad", "tan"])
def test_z_between_communications(potential):
    """It is the parameters after a communication, also where they are u for a while."""
    model = network()
    optimizer = sgd_of(model)
    coupling = Coupling(model, optimizer, potential, period=3)
    train(model, optimizer, coupling, 0, 4)  # the communication of call 3 ends in call 4
    copy_of_z = vector(model)
    with coupling.consensus():
        distances = list(coupling.stats()["distance"].values())
    w = coupling.state_dict()["u"].numpy() - copy_of_z
    assert np.linalg.norm(w) == pytest.approx(np.linalg.norm(distances), rel=1e-5)
    np.testing.assert_array_equal(coupling.state_dict()["z"].numpy(), copy_of_z)


class Tied(nn.Module):
    """A tied output layer, a frozen layer, an empty parameter, and a transposed memory layout."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Linear(4, 6, bias=False)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.empty = nn.Parameter(torch.zeros(0))
        self.convolution = nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last)
        self.out = nn.Linear(4, 6)
        self.out.weight = self.embedding.weight


def test_tied_parameters_count_once_and_frozen_ones_are_left_alone():
    model = Tied()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    coupling = Coupling(model, optimizer, pull=1.0, outer=0.5)
    before = bits(model.state_dict())
    assert list(coupling.stats()["distance"]) == ["embedding", "convolution", "out"]
    assert coupling.state_dict()["u"].numel() == 24 + 57 + 6
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    coupling.step()
    coupling.step()  # z = u+ here, half of the way from the start to the summed copy
    state = coupling.consensus_state_dict()
    assert list(state) == list(before)
    assert state["out.weight"] is state["embedding.weight"]
    assert model.out.weight is model.embedding.weight
    assert model.convolution.weight.is_contiguous(memory_format=torch.channels_last)
    for name, old in before.items():
        moved = 1.0 if "frozen" in name else 0.5
        torch.testing.assert_close(state[name], old + moved)
        torch.testing.assert_close(model.state_dict()[name], old + moved)


def test_layers_of_the_user():
    """tan on one layer or two: the distances, and the radial fraction, differ."""
    model = two_layers()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    one = Coupling(model, optimizer, "tan", layers=[["1.weight", "0.weight"]])
    with torch.no_grad():
        model[0].weight += torch.tensor([3.0, 0.0, 0.0])
        model[1].weight += torch.tensor([0.0, 4.0, 0.0, 0.0])
    one.step()
    assert one.stats()["distance"] == {"0": pytest.approx(5.0)}
    for layers in ([["0.weight"]], [["0.weight", "1.weight", "1.weight"]], [["0.weight", "x"]]):
        with pytest.raises(ValueError, match=r"`layers` is .* once: 0\.weight, 1\.weight"):
            Coupling(model, optimizer, layers=layers)


@pytest.mark.parametrize("period", [1, 3])
def test_bfloat16_parameters_carry_a_float32_copy(period):
    """Displacements far below the rounding of bfloat16 add up in u and z."""
    model = nn.Linear(1, 1, bias=False).bfloat16()
    nn.init.constant_(model.weight, 256.0)  # the next value is 258
    options = {"potential": "quad", "pull": 0.02, "outer": 0.1, "period": period}
    coupling = Coupling(model, torch.optim.SGD(model.parameters(), lr=0.1), **options)
    z = u = late = np.float32(256.0)
    for t in range(20 * period):
        written = model.weight.item()
        with torch.no_grad():
            model.weight += 2.0 if t == 0 else 0.0
        d = np.float32(model.weight.item() - written)
        coupling.step()
        if late is not None:
            u = u + np.float32(0.1) * (late - u)
            z = z + np.float32(0.02) * (u - z)
        z = z + d
        late = z if (t + 1) % period == 0 else None
        state = coupling.state_dict()
        assert float(state["u"]) == pytest.approx(u, abs=1e-4)
        if late is not None:
            assert float(state["z"]) == pytest.approx(z, abs=1e-4)
    assert 256.5 < float(state["z"]) < 257.9
    assert state["u"].dtype == torch.float32
    assert coupling.consensus_state_dict()["weight"].dtype == torch.bfloat16


def skip_on_rank_one(group, options):
    return trained(group.rank, STEPS, LR, skipped=range(3, 9) if group.rank else (), **options)


@pytest.mark.ranks
def test_a_skipped_step_on_one_rank_leaves_the_ranks_in_step(ranks):
    """As GradScaler does: local SGD in which worker 1 pauses."""
    options = {"pull": 1.0, "period": H, "overlap": False}
    answers = ranks(M, skip_on_rank_one, options)
    z = np.stack([start()] * M)
    for t in range(STEPS):
        moved = sgd(z, t)
        z = np.stack([moved[0], z[1] if 3 <= t < 9 else moved[1]])
        if (t + 1) % H == 0:
            z[:] = z.mean(0)
        for j, (_, zs, _) in enumerate(answers):
            np.testing.assert_allclose(zs[t], z[j], rtol=0, atol=1e-14)


def average_buffers(group, buffers):
    model = network()
    model[1].running_mean.fill_(float(group.rank))
    coupling = Coupling(model, sgd_of(model), period=2, overlap=False, buffers=buffers)
    coupling.step()
    first = model[1].running_mean.tolist()
    coupling.step()
    last = model[1].running_mean.tolist()
    coupling.close()
    return set(first), set(last)


@pytest.mark.ranks
def test_buffers(ranks):
    assert ranks(2, average_buffers, "local") == [({0.0}, {0.0}), ({1.0}, {1.0})]
    assert ranks(2, average_buffers, "mean") == [({0.0}, {0.5}), ({1.0}, {0.5})]


def couple_through(group, kind):
    """u after some steps through a group of the user, whose own sums run in between."""
    handle = {
        "default": lambda: None,
        "group": lambda: new_group([0, 1]),
        "mesh": lambda: init_device_mesh("cpu", (2,), mesh_dim_names=("worker",)),
        "dimension": lambda: init_device_mesh("cpu", (1, 2), mesh_dim_names=("a", "b"))["b"],
    }[kind]()
    model = two_layers()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    coupling = Coupling(model, optimizer, group=handle)
    for t in range(5):
        backward(model, group.rank, t)
        mine = torch.ones(1)
        all_reduce(mine)
        assert mine.item() == 2.0
        optimizer.step()
        coupling.step()
    u = coupling.state_dict()["u"].numpy()
    coupling.close()
    group.barrier()  # the group of the user is still open
    return u


@pytest.mark.ranks
def test_groups_of_the_user(ranks):
    first, *others = [
        ranks(2, couple_through, kind) for kind in ("default", "group", "mesh", "dimension")
    ]
    for answer in (first, *others):
        np.testing.assert_array_equal(answer[0], first[0])
        np.testing.assert_array_equal(answer[1], first[0])


# ---- Refusals


def refused(match, model=None, make=sgd_of, **options):
    model = two_layers() if model is None else model
    with pytest.raises(ValueError, match=match) as failure:
        Coupling(model, make(model), **options)
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize(
    ("match", "options"),
    [
        ("`pull` is 1.5; allowed: a number from 0 to 1", {"pull": 1.5}),
        ("`pull` is nan; allowed", {"pull": math.nan}),
        ("`pull` is 0; allowed: above 0 if `implicit`", {"potential": "tan", "pull": 0}),
        ("`local_pull` is -0.1; allowed: a number from 0 to 1", {"local_pull": -0.1}),
        ("`outer` is inf; allowed: a finite number >= 0", {"outer": math.inf}),
        ("`period` is 0; allowed: a whole number >= 1", {"period": 0}),
        ("`period` is 1.5; allowed", {"period": 1.5}),
        ("`eta` is 0; allowed: a finite number > 0", {"eta": 0}),
        ("`buffers` is no; allowed: local, mean", {"buffers": "no"}),
        ("`implicit` is yes; allowed: True, False, None", {"implicit": "yes"}),
        ("`overlap` is 2; allowed: True, False", {"overlap": 2}),
        ("`pull` is '0.5'; allowed: a number", {"pull": "0.5"}),
        (r"`options` is \[3\]; allowed: a dict", {"potential": "power", "options": [3]}),
        ("`delay` is 1; allowed: 0 to period - 1", {"delay": 1}),
        ("`delay` is -1; allowed: 0 to period - 1", {"delay": -1, "period": 3}),
        (
            "`delay` is 1; allowed: 0 with overlap=False",
            {"delay": 1, "period": 2, "overlap": False},
        ),
        ("unknown potential `tam`; known: ", {"potential": "tam"}),
        ("potential `tan` has no option `p`", {"potential": "tan", "options": {"p": 1}}),
        ("`potential` is 3; allowed: a name or a Potential", {"potential": 3}),
        ("`options` is .*; allowed: none", {"potential": POTENTIALS["tan"], "options": {"p": 1}}),
        ("`group` is 3; allowed: None, a process group", {"group": 3}),
    ],
)
def test_arguments_out_of_range(match, options):
    refused(match, **options)


def test_models_that_cannot_be_coupled():
    other = two_layers()
    refused("`optimizer` has 2 parameters that are not the model's", make=lambda _: sgd_of(other))
    refused("no parameters to train", nn.Sequential(Part(1)).requires_grad_(False))
    refused("`weight` is of type torch.complex64", nn.Linear(2, 2, dtype=torch.complex64))
    refused("is on the meta device", nn.Linear(2, 2, device="meta"))
    refused("is not initialized", nn.LazyLinear(2))
    refused("dtypes torch.float32, torch.float64", nn.Sequential(Part(2), nn.Linear(1, 1)))
    sparse = nn.Linear(2, 2, bias=False)
    sparse.weight = nn.Parameter(torch.eye(2).to_sparse())
    refused("parameter `weight` is sparse", sparse)
    broken = nn.Linear(2, 2)
    broken.bias.data[1] = math.inf
    refused("parameter `bias` has numbers that are not finite; allowed: none", broken)
    refused("`optimizer` is a str; allowed: an optimizer of torch", make=lambda _: "adam")
    refused("`model` is a SGD; allowed: a torch.nn.Module", sgd_of(other), make=lambda _: other)


def test_potentials_with_a_mistake_are_refused():
    """As by the trainer, which has the tests of each mistake."""
    wrong_slope = Profile(torch.sin, torch.sin, torch.cos)
    refused(
        "potential .*: psi' is .* and not 1 at s = 0.0001",
        potential=Potential(wrong_slope, Separable()),
    )
    too_wide = replace(POTENTIALS["log"].profile, bound=2.0)
    refused("potential .*: psi is not finite at s = ", potential=Potential(too_wide, Separable()))


@pytest.mark.parametrize("name", ["lam", "tau", "sigma", "eta"])
def test_the_letters_of_the_paper_are_positive(name):
    model = two_layers()
    with pytest.raises(ValueError, match=f"`{name}` is 0; allowed: a finite number > 0"):
        Coupling.from_paper(model, sgd_of(model), **PAPER | {"eta": 1.0} | {name: 0})


def messages(group, makers):
    """The error of a Coupling on this rank, or None; by case."""
    said = []
    for make in makers:
        model, options = make(group.rank)
        try:
            Coupling(**{"model": model, "optimizer": sgd_of(model), **options}).close()
            said.append(None)
        except ValueError as error:
            said.append(str(error))
    return said


def of_rank(model, index, rank):
    """A parameter changed on rank 1."""
    with torch.no_grad():
        list(model.parameters())[index].view(-1)[0] += rank * 1e-7
    return model


def frozen(rank):
    model = network()
    model[0].weight.requires_grad_(False)
    return of_rank(model, 0, rank), {}


def wrapped(rank):
    return nn.parallel.DistributedDataParallel(network()), {}


def two_dimensions(rank):
    return network(), {"group": init_device_mesh("cpu", (2, 1))}


def other_shape(rank):
    return nn.Linear(2, 2 + rank), {}


def other_dtype(rank):
    return nn.Linear(2, 2).to(F64 if rank else torch.float32), {}


def less_parameters(rank):
    return nn.Sequential(nn.Linear(2, 2), *[nn.Linear(2, 1)] * (1 - rank)), {}


def other_group_pull(rank):
    model = network()
    groups = [{"params": model.parameters(), "pull": 0.5 / (1 + rank)}]
    return model, {"optimizer": torch.optim.SGD(groups, lr=0.1)}


def other_buffers(rank):
    model = network()
    model.register_buffer("mean", torch.zeros(2 + rank))
    return model, {"buffers": "mean"}


def other_weights(rank):
    return of_rank(network(), 3, rank), {}


def other_period(rank):
    return network(), {"period": 1 + rank}


def other_outer(rank):
    return network(), {"outer": lambda u: torch.optim.SGD(u, lr=0.5 + rank)}


def wrong_on_one(rank):
    return network(), {"pull": 0.5 + rank}


def nothing_wrong(rank):
    return network(), {}


@pytest.mark.ranks
def test_all_ranks_refuse_alike(ranks):
    cases = {
        wrong_on_one: "rank 1: `pull` is 1.5; allowed: a number from 0 to 1",
        other_shape: "`parameters` on rank 1 differs from rank 0 (weight (3, 2) torch.float32, "
        "weight (2, 2) torch.float32); allowed: the same on all",
        other_dtype: "`parameters` on rank 1 differs from rank 0 (weight (2, 2) torch.float64, "
        "weight (2, 2) torch.float32); allowed: the same on all",
        less_parameters: "`parameters` on rank 1 differs from rank 0 (none, 1.weight (1, 2) torch",
        other_group_pull: "`pull` on rank 1 differs from rank 0 (0.25, 0.5); allowed: the same on",
        other_weights: "`weights` on rank 1 differs from rank 0; allowed: the same on all, as",
        frozen: "`frozen weights` on rank 1 differs from rank 0 (0.weight, digest ",
        other_buffers: "`shapes of buffers` on rank 1 differs from rank 0 ((3,), (2,)); allowed",
        other_period: "`period` on rank 1 differs from rank 0 (2, 1); allowed: the same on all",
        other_outer: "`outer` on rank 1 differs from rank 0 (SGD(lr=1.5, momentum=0",
        wrapped: "rank 0: `model` is wrapped in DistributedDataParallel",
        two_dimensions: "`group` is a mesh of 2 dimensions; allowed: one of them, mesh[NAME]",
        nothing_wrong: None,
    }
    for said in ranks(2, messages, list(cases)):
        for text, wanted in zip(said, cases.values(), strict=True):
            assert text is None if wanted is None else text.startswith(wanted)


def test_a_process_of_several_without_a_group_is_refused(monkeypatch):
    """It would train by itself, and so would the others."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    model = network()
    allowed = re.escape("allowed: None after torch.distributed.init_process_group()")
    with pytest.raises(ValueError, match=f"^`group` is None, .* one of 2 processes .*; {allowed}$"):
        Coupling(model, sgd_of(model))
    monkeypatch.setenv("WORLD_SIZE", "1")
    Coupling(model, sgd_of(model)).close()


class Temperature(nn.Module):
    """A model with a parameter that is a number, or a vector of one number."""

    def __init__(self, shape):
        super().__init__()
        torch.manual_seed(1)
        self.linear, self.scale = nn.Linear(6, 2), nn.Parameter(torch.full(shape, 2.0))

    def forward(self, x):
        return self.linear(x) * self.scale


@pytest.mark.parametrize(
    "options",
    [
        {"potential": "tan", "period": 2},
        {"potential": "log_sep", "eta": 9.0, "order": "jacobi"},
        {"period": 4, "fragments": 2, "overlap": False},
        {"outer": lambda u: torch.optim.SGD(u, lr=0.7, momentum=0.5), "period": 3},
    ],
)
@pytest.mark.parametrize("make", [sgd_of, adamw_of])
def test_a_parameter_that_is_a_number_moves_as_a_vector_of_one(options, make):
    states = []
    for shape in (), (1,):
        model = Temperature(shape)
        optimizer = make(model)
        coupling = Coupling(model, optimizer, pull=0.3, **options)
        train(model, optimizer, coupling, 0, 9)
        u = coupling.consensus_state_dict()
        assert u["scale"].shape == model.scale.shape == shape
        state = coupling.state_dict()
        coupling.load_state_dict(state)
        coupling.close()
        states.append([x.flatten() for x in (*u.values(), *model.parameters())])
    for one, other in zip(*states, strict=True):
        assert torch.equal(one, other)


def restart_apart(group):
    model = network()
    coupling = Coupling(model, sgd_of(model))
    of_rank(model, 0, group.rank)
    with pytest.raises(ValueError, match="`weights` on rank 1 differs"):
        coupling.restart()
    coupling.close()


@pytest.mark.ranks
def test_restart_from_different_weights_is_refused(ranks):
    ranks(2, restart_apart)


def test_a_deep_copy_of_the_model_is_not_coupled():
    model = network()
    other = copy.deepcopy(model)
    coupling = Coupling(model, sgd_of(model))
    before = bits(other.state_dict())
    with torch.no_grad():
        model[0].weight += 1.0
    coupling.step()
    assert_equal_states(other.state_dict(), before)
