"""The algorithm of a config: its class, its start and its schedules."""

import math

import pytest
import torch

from consensus.algorithm import Consensus, Msgd
from consensus.comm import Launch, Solo
from consensus.run.build import build_algorithm, scheduled
from consensus.run.metrics import measure
from consensus.run.plan import make_plan


def test_all_workers_start_at_the_weights_of_the_model(make_config):
    plan = make_plan(make_config("workers=3", "model=logistic", "device=cpu"), Launch())
    algorithm = build_algorithm(plan, Solo())
    start = torch.cat([p.detach().flatten() for p in plan.model.parameters()])
    assert isinstance(algorithm, Consensus)
    assert torch.equal(algorithm.u, start)
    assert torch.equal(algorithm.worker.z, start.expand(3, -1))
    assert (algorithm.tau, algorithm.sigma, algorithm.lam) == (0.005, 0.005, 0.1)


def test_msgd_has_one_worker_and_no_coupling(make_config):
    config = make_config("algorithm=msgd", "model=logistic", "device=cpu", "algorithm.sigma=0.02")
    algorithm = build_algorithm(make_plan(config, Launch()), Solo())
    assert isinstance(algorithm, Msgd)
    assert (algorithm.sigma, algorithm.lam, len(algorithm.worker.z)) == (0.02, math.inf, 1)


def test_a_schedule_multiplies_its_constant(make_config):
    overrides = ["algorithm.schedule.lam.name=linear", "+algorithm.schedule.lam.options.final=0.5"]
    config = make_config(*overrides, "algorithm.iterations=10", "algorithm.lam=0.2").algorithm
    lam = scheduled(config, "lam")
    assert [lam(t) for t in (0, 4, 9)] == pytest.approx([0.2, 0.2 * (1 - 0.5 * 4 / 10), 0.11])
    assert scheduled(config, "tau") == 0.005


# ---- rates for the letters of the paper: pull = 2 sigma / (lam eta^2), outer = 2 M tau / eta^2

SIGMA, ETA, WORKERS = 0.004, 0.7, 3
BOTH = [
    *("model=logistic", "device=cpu", "dtype=float64", f"workers={WORKERS}", "potential=tan"),
    *(f"potential.eta={ETA}", f"algorithm.sigma={SIGMA}", "algorithm.batch_size=4"),
    "algorithm.iterations=30",
]


def trained(make_config, *overrides):
    """The row of an evaluation after 30 iterations, and the algorithm."""
    plan = make_plan(make_config(*BOTH, *overrides), Launch())
    algorithm = build_algorithm(plan, Solo())
    for t in range(30):
        algorithm.step(t)
    state = algorithm.u, algorithm.worker.z, algorithm.phi, algorithm.lam, algorithm.cuts
    return measure(*state, plan, Solo(), 30), algorithm


def cosine(name):
    key = f"algorithm.schedule.{name}"
    return [f"{key}.name=cosine", f"+{key}.options.final=0.1"]


@pytest.mark.parametrize("others", [(), ("algorithm.order=jacobi", "algorithm.period=2")])
def test_rates_are_the_letters_of_the_paper(make_config, others):
    pull, outer = 2 * SIGMA / (0.05 * ETA**2), 2 * WORKERS * 0.006 / ETA**2
    own = ["algorithm.lam=0.05", "algorithm.tau=0.006"]
    row, letters = trained(make_config, *others, *own)
    own = [f"algorithm.pull={pull!r}", f"algorithm.outer={outer!r}"]
    found, rates = trained(make_config, *others, *own)
    torch.testing.assert_close(rates.u, letters.u, rtol=0, atol=1e-15)
    torch.testing.assert_close(rates.worker.z, letters.worker.z, rtol=0, atol=1e-15)
    for key in ("objective", "coupling", "train_loss"):
        assert found[key] == pytest.approx(row[key], rel=1e-13)
    assert row["coupling"] > 1, "the workers differ"


def test_a_pull_does_not_follow_the_schedule_of_sigma(make_config):
    """A constant pull is a lam that is proportional to sigma, in line 6 and in the objective."""
    pull, sigma = 2 * SIGMA / (0.05 * ETA**2), cosine("sigma")
    row, letters = trained(make_config, "algorithm.lam=0.05", *sigma, *cosine("lam"))
    found, rates = trained(make_config, f"algorithm.pull={pull!r}", *sigma)
    torch.testing.assert_close(rates.u, letters.u, rtol=0, atol=1e-14)
    assert found["coupling"] == pytest.approx(row["coupling"], rel=1e-12)
    of_rates, of_letters = (
        [float(a.lam_at_rest(t)) for t in (0, 15, 29)] for a in (rates, letters)
    )
    assert of_rates == pytest.approx(of_letters, rel=1e-13)
    follows, _ = trained(make_config, "algorithm.lam=0.05", *sigma)
    assert follows["coupling"] != pytest.approx(found["coupling"], rel=0.01)


def test_without_a_pull_the_coupling_is_zero(make_config):
    row, algorithm = trained(make_config, "algorithm.pull=0", "algorithm.outer=0.1")
    assert (algorithm.lam, algorithm.lam_at_rest(0)) == (math.inf, math.inf)
    assert (row["coupling"], row["objective"]) == (0.0, row["train_loss"] + row["regularizer"])
    assert not torch.equal(algorithm.worker.z[0], algorithm.worker.z[1])


def test_the_plan_shows_the_rates(make_config):
    shown = {
        ("algorithm.lam=0.05", "algorithm.tau=0.006"): "pull 0.327, outer 0.0735",
        ("algorithm.pull=0.25", "algorithm.outer=1"): "pull 0.25, outer 1",
        ("algorithm.lam=0.05", "algorithm.u_step_on=objective"): "pull 0.327, outer 1.22",
        ("algorithm.pull=0.5", "algorithm.local_pull=0.1", "algorithm.period=4"): (
            "pull 0.5, outer 0.0612, local_pull 0.1, period 4"
        ),
        ("algorithm=msgd", "potential=quad"): "",
        ("algorithm=easgd", "potential=quad", "algorithm.pull=0.1"): "pull 0.1, outer 0.3",
    }
    for overrides, rates in shown.items():
        line = make_plan(make_config(*BOTH, *overrides), Launch()).description()
        assert line.partition(" iterations")[2] == (f", {rates}" if rates else ""), overrides
