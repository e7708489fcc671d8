"""Many configurations as one block against the same configurations as separate runs."""

import math

import pytest
import torch

from consensus import POTENTIALS, Layerwise
from consensus.comm import Launch, Solo
from consensus.population import Population
from consensus.problem import Minibatches, PopulationRisk
from consensus.run.plan import make_plan
from consensus.run.trainer import build_algorithm, scheduled

SIX = ("quad", "cubic", "tan", "tan_sep", "log", "log_sep")
WORKERS = 3
SETTINGS = [  # eta, lam, sigma, tau, kappa, nu, seed
    (1.0, 0.1, 0.005, 0.005, 0.9, 1e-4, 0),
    (0.5, 0.05, 0.001, 0.005, 0.99, 1e-4, 0),
    (2.0, 0.025, 0.002, 0.001, 0.0, 0.0, 1),
    (0.4, 0.1, 0.005, 0.01, 0.9, 1e-3, 1),
]


def configs(make_config, potential, *others, settings=SETTINGS):
    found = []
    for eta, lam, sigma, tau, kappa, nu, seed in settings:
        own = [f"potential.eta={eta}", f"algorithm.lam={lam}", f"algorithm.sigma={sigma}"]
        own += [f"algorithm.tau={tau}", f"algorithm.momentum={kappa}", f"seed={seed}"]
        own += [f"algorithm.weight_decay={nu}", f"potential={potential}", *others]
        same = ("dtype=float64", "model=logistic", f"workers={WORKERS}", "device=cpu")
        found.append(make_config(*same, *own))
    return found


def population(plans):
    """Of the same starts, the same minibatches, the same numbers."""
    first, chosen = plans[0], [plan.config.algorithm for plan in plans]
    minibatches = {}
    for plan in plans:
        batch, seed = plan.config.algorithm.batch_size, plan.config.seed
        minibatches[seed] = [
            Minibatches(source.indices, batch, seed, source.worker)
            for source in plan.oracle.minibatches
        ]
    seeds = [plan.config.seed for plan in plans]
    name = first.config.potential.name
    return Population(
        torch.stack([plan.start for plan in plans]),
        WORKERS,
        PopulationRisk(first.risk, first.dataset, seeds, minibatches),
        lambda eta: Layerwise(POTENTIALS[name], first.risk.layout.layers, eta),
        eta=[plan.config.potential.eta for plan in plans],
        tau=[scheduled(a, "tau") for a in chosen],
        sigma=[scheduled(a, "sigma") for a in chosen],
        lam=[scheduled(a, "lam") for a in chosen],
        kappa=[a.momentum for a in chosen],
        nu=[a.weight_decay for a in chosen],
        order=chosen[0].order,
        u_step_on=chosen[0].u_step_on,
        momentum_on=chosen[0].momentum_on,
        period=chosen[0].period,
    )


def separately(plans, iterations):
    """The runs one after another: u, z, v and cuts of each."""
    found = []
    for plan in plans:
        algorithm = build_algorithm(plan, Solo(torch.device("cpu")))
        for t in range(iterations):
            algorithm.step(t)
        found.append((algorithm.u, algorithm.worker.z, algorithm.worker.v, algorithm.cuts))
    return [torch.stack(column) for column in zip(*found, strict=True)]


def require_equal(together, apart):
    for found, expected in zip((together.u, together.z, together.v), apart, strict=False):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert together.cuts.tolist() == apart[3].tolist()


@pytest.mark.parametrize("potential", SIX)
def test_a_population_is_its_runs(make_config, potential):
    plans = [make_plan(config, Launch()) for config in configs(make_config, potential)]
    apart = separately(plans, 100)
    together = population(plans)
    for t in range(100):
        together.step(t)
    require_equal(together, apart)
    assert not together.diverged().any()
    norms = together.u.norm(dim=1)
    assert len({round(float(norm), 6) for norm in norms}) == len(SETTINGS), "they differ"


@pytest.mark.parametrize(
    "others",
    [
        ("algorithm.order=jacobi",),
        ("algorithm.u_step_on=objective",),
        ("algorithm.momentum_on=objective",),
        ("algorithm.period=3",),
        (
            "algorithm.schedule.sigma.name=cosine",
            "+algorithm.schedule.sigma.options.final=0.1",
            "algorithm.iterations=40",
        ),
    ],
    ids=lambda others: others[0].rpartition(".")[2],
)
def test_all_ways_to_run_algorithm_1(make_config, others):
    plans = [make_plan(config, Launch()) for config in configs(make_config, "log", *others)]
    apart = separately(plans, 40)
    together = population(plans)
    for t in range(40):
        together.step(t)
    require_equal(together, apart)


def test_line_searches_that_cut(make_config):
    """Couplings so stiff that steps are cut, in some configurations and not in others."""
    stiff = [(0.3, 0.0025, 0.005, 0.01, 0.9, 1e-4, 0), SETTINGS[0]]
    plans = [make_plan(config, Launch()) for config in configs(make_config, "log", settings=stiff)]
    apart = separately(plans, 25)
    assert apart[3][0].sum() > 0
    together = population(plans)
    for t in range(25):
        together.step(t)
    assert together.cuts.tolist() == apart[3].tolist()
    torch.testing.assert_close(together.u[1], apart[0][1], rtol=1e-9, atol=1e-12)


def test_a_diverged_configuration_leaves_and_the_others_do_not_notice(make_config):
    wild = [SETTINGS[0], (1.0, 1e-20, 1e20, 1.0, 0.9, 0.0, 0), *SETTINGS[2:]]
    calm = [SETTINGS[0], *SETTINGS[2:]]
    plans = [make_plan(c, Launch()) for c in configs(make_config, "quad", settings=wild)]
    together = population(plans)
    left = []
    for t in range(30):
        together.step(t)
        left += together.freeze(together.diverged()).tolist()
    assert left == [1]
    assert together.active.tolist() == [0, 2, 3]
    again = [make_plan(c, Launch()) for c in configs(make_config, "quad", settings=calm)]
    require_equal(together, separately(again, 30))
    assert together.freeze(torch.ones(3, dtype=torch.bool)).tolist() == [0, 2, 3]
    together.step(30)  # nothing is left to do


def test_a_population_continues_to_the_same_bits(make_config):
    def new():
        plans = [make_plan(c, Launch()) for c in configs(make_config, "tan")]
        return population(plans)

    whole, begun, continued = new(), new(), new()
    for t in range(20):
        whole.step(t)
    for t in range(8):
        begun.step(t)
    continued.load_state_dict(begun.state_dict())
    continued.oracle.load_state_dict(begun.oracle.state_dict())
    for t in range(8, 20):
        continued.step(t)
    for name, value in whole.state_dict().items():
        assert torch.equal(continued.state_dict()[name], value), name
    assert math.isfinite(float(whole.u.sum()))
