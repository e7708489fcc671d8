"""`group.sum=gather`: the same run as by an all-reduce, unless a process is wrong."""

import math

import pytest
import torch

from consensus import POTENTIALS, Layerwise
from consensus.comm import Launch, Solo
from consensus.core.kernels import choose_kernel
from consensus.gathered import GatheringServer
from consensus.run.build import build_algorithm
from consensus.run.checks import ConfigError
from consensus.run.plan import make_plan
from consensus.server import Server

N, K, ETA, TAU = 12, 2, 0.5, 0.01
HUBER = ["model=logistic", "device=cpu", "dtype=float64", "potential=huber", "workers=4"]
HUBER += ["potential.eta=0.05", "algorithm.iterations=5", "algorithm.batch_size=4"]


def server_of(kind, group, potential):
    u = torch.linspace(-1.0, 1.0, N, dtype=torch.float64)
    phi = Layerwise(POTENTIALS[potential], [(0, 5), (5, N)], ETA)
    if kind == "reduce":
        return Server(u, phi, group)
    return GatheringServer(u, phi, group, K, choose_kernel(phi, u))


def moved(group, kind, potential, lie):
    """How far u moves, where `lie` changes what the last rank sends; the same on all ranks."""
    server = server_of(kind, group, potential)
    before = server.u.clone()
    random = torch.Generator().manual_seed(group.rank)
    z = before + torch.randn(K, N, generator=random, dtype=torch.float64)
    if lie and group.rank == group.size - 1:
        if kind == "gather":
            z[0], z[1] = {"far": (1e30, -1e200), "no number": (math.nan, math.inf)}[lie]
        else:
            inner = server.kernel.forces

            def forces(u, z, out, scratch):
                reach = inner(u, z, out, scratch)
                out.fill_({"far": 1e30, "no number": math.nan}[lie])
                return reach

            server.kernel.forces = forces
    u = server.finish(server.start(z), TAU)
    assert server.verify_replicas()
    return (u - before).tolist()


def all_moves(group):
    cases = [(kind, p, lie) for kind in ("reduce", "gather") for p in ("huber", "pseudo_huber")
             for lie in (None, "far", "no number")]  # fmt: skip
    return {case: moved(group, *case) for case in cases}


@pytest.mark.ranks
def test_a_process_that_lies_moves_u_by_the_slope_of_phi_only(ranks):
    size = 2
    found = ranks(size, all_moves)[0]
    for potential in ("huber", "pseudo_huber"):
        honest = found["reduce", potential, None]
        assert found["gather", potential, None] == pytest.approx(honest, rel=1e-12)
        # Of each worker and group of coordinates the force is at most 1 / eta.
        groups = 2 if potential == "huber" else N
        bound = TAU * size * K * math.sqrt(groups) / ETA
        for lie in ("far", "no number"):
            assert not math.hypot(*found["reduce", potential, lie]) < 1e6
            assert 0 < math.hypot(*found["gather", potential, lie]) <= bound
    # Two workers with no number have no part: u moves as by the two of rank 0.
    alone = ranks(1, all_moves)[0]["gather", "huber", None]
    assert found["gather", "huber", "no number"] == pytest.approx(alone, rel=1e-12)


def trained(group, config):
    plan = make_plan(config, Launch(group.rank, group.size, group.rank, group.size))
    algorithm = build_algorithm(plan, group)
    for t in range(5):
        algorithm.step(t)
    return algorithm.u.tolist(), algorithm.verify(), plan.remarks()


def all_runs(group, configs):
    return [trained(group, config) for config in configs]


@pytest.mark.ranks
def test_a_run_is_that_of_an_all_reduce(ranks, make_config):
    exact = ["algorithm.u_update=exact", "potential=pseudo_huber"]
    how = ("group.sum=reduce", "group.sum=gather")
    configs = [make_config(*HUBER, *own, sums) for own in ([], exact) for sums in how]
    answers = ranks(2, all_runs, configs)
    for a, b in ((0, 1), (2, 3)):
        reduced, gathered = answers[0][a], answers[0][b]
        assert gathered[0] == pytest.approx(reduced[0], rel=1e-7, abs=1e-12)
        assert answers[0][b][1] == answers[1][b][1], "the replicas differ"
    vector = 8 * 7850 / 1e6  # two vectors come from the other process
    line = f"{2 * vector:.3g} MB in each communication, in an all-reduce {vector:.3g} MB"
    assert answers[0][1][2] == [f"group.sum=gather: each process receives {line}"]
    assert answers[0][0][2] == []


def test_one_process_and_refusals(make_config):
    config = make_config(*HUBER, "group.sum=gather")
    u, _, remarks = trained(Solo(), config)
    assert remarks == ["group.sum has no effect: one process sends nothing"]
    assert u == trained(Solo(), make_config(*HUBER))[0]
    for overrides, line in (
        (
            ["potential=tan"],
            "`group.sum` is gather; allowed: reduce, or a potential of linear growth",
        ),
        (["potential=quad"], "such as huber: the force of quad has no bound"),
        (
            ["potential=huber", "group.compress=bf16"],
            "`group.compress` is bf16; allowed: null with",
        ),
        (
            ["potential=huber", "algorithm.period=2", "algorithm.delay=1"],
            "`algorithm.delay` is 1; allowed: 0 with group.sum=gather",
        ),
    ):
        with pytest.raises(ConfigError) as caught:
            make_config(*overrides, "group.sum=gather")
        assert line in str(caught.value)
        assert "\n" not in str(caught.value)
