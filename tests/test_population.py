"""Many configurations as one block against the same configurations as separate runs."""

import math

import pytest
import torch

import consensus
from benchmarks.gpu_vectors import Unbranched
from consensus import POTENTIALS, Layerwise
from consensus.comm import Launch, Solo
from consensus.population import Population
from consensus.problem import Minibatches, PopulationRisk, Way
from consensus.replay import cuda_graph
from consensus.run.build import build_algorithm, scheduled
from consensus.run.plan import make_plan
from tests.testing.tape import taped

# Also in separate runs: where steps are cut, a difference in the last place grows.
pytestmark = pytest.mark.usefixtures("operations_of_torch")

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


def population(plans, kind=Layerwise, **options):
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
        lambda eta: kind(POTENTIALS[name], first.risk.layout.layers, eta),
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
        local_pull=[a.local_pull for a in chosen],
        **options,
    )


def separately(plans, iterations):
    """The runs one after another: u, z, v and cuts of each."""
    found = []
    for plan in plans:
        algorithm = build_algorithm(plan, Solo(plan.device))
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
    apart = separately(plans, 40)
    together = population(plans)
    for t in range(40):
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
        ("algorithm.local_pull=0.05", "algorithm.period=3"),
        (
            "algorithm.schedule.sigma.name=cosine",
            "+algorithm.schedule.sigma.options.final=0.1",
            "algorithm.iterations=16",
        ),
    ],
    ids=lambda others: others[0].rpartition(".")[2],
)
def test_all_ways_to_run_algorithm_1(make_config, others):
    plans = [make_plan(config, Launch()) for config in configs(make_config, "log", *others)]
    apart = separately(plans, 16)
    together = population(plans)
    for t in range(16):
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


# ---- the gradients


@pytest.fixture(scope="module")
def lenets():
    """Plans of LeNet-5, their runs apart, samples, and what each u evaluates to on them."""
    small = ("model=lenet5", "algorithm.batch_size=4")
    plans = [make_plan(c, Launch()) for c in configs(consensus.compose, "log", *small)]
    apart = separately(plans, 5)
    test = plans[0].dataset.test[:50]
    return plans, apart, test, [plans[0].risk.evaluate(u, test) for u in apart[0]]


@pytest.mark.parametrize("way", [Way("grouped", 5), Way("products", 32), Way("one_by_one", 1)])
def test_gradients_of_many_models_at_once_are_those_of_runs(lenets, way):
    """12 models: the last of three passes has two."""
    plans, apart, test, evaluated = lenets
    together = population(plans)
    together.oracle.way = way
    for t in range(5):
        together.step(t)
    require_equal(together, apart)
    each = together.oracle.evaluate(together.u, test)
    for row, expected in zip(each, evaluated, strict=True):
        torch.testing.assert_close(row, expected, rtol=1e-9, atol=0.0)


# ---- on a GPU: the kernels, and the recorded step


@pytest.mark.parametrize(
    ("potential", "others"),
    [
        ("quad", ("algorithm.order=jacobi",)),
        ("log", ("algorithm.period=2",)),
        ("tan", ("algorithm.momentum_on=objective",)),
        ("tan_sep", ("algorithm.order=jacobi",)),
        (
            "cubic",
            (
                "algorithm.schedule.sigma.name=cosine",
                "+algorithm.schedule.sigma.options.final=0.1",
                "algorithm.iterations=16",
            ),
        ),
    ],
)
def test_a_recorded_step_is_the_step_of_a_run(make_config, potential, others):
    plans = [make_plan(config, Launch()) for config in configs(make_config, potential, *others)]
    apart = separately(plans, 16)
    lines, recorded = [], []

    def record(run):
        recorded.append(run)
        return taped(together)(run)

    together = population(plans, Unbranched, record=record, refused=lines.append)
    if potential in ("quad", "cubic"):  # a coupling that cuts steps enlarges every rounding
        together.oracle.way = Way("grouped", 12)
    for t in range(16):
        together.step(t)
    assert lines == []
    assert len(recorded) == (2 if "algorithm.period=2" in others else 1)
    require_equal(together, apart)


def test_a_step_that_cannot_be_recorded_is_run(make_config):
    plans = [make_plan(config, Launch()) for config in configs(make_config, "log")]
    apart = separately(plans, 10)
    lines = []
    together = population(plans, record=lambda run: taped(together)(run), refused=lines.append)
    for t in range(10):  # on a CPU the line search compares, and branches
        together.step(t)
    require_equal(together, apart)
    together.freeze(torch.tensor([True, False, False, False]))
    for t in range(10, 16):
        together.step(t)
    (line,) = lines
    assert line.startswith("CUDA graph capture failed (")


def test_what_is_recorded_has_the_configurations_that_are_left(make_config):
    wild = [SETTINGS[0], (1.0, 1e-20, 1e20, 1.0, 0.9, 0.0, 0), *SETTINGS[2:]]
    calm = [SETTINGS[0], *SETTINGS[2:]]
    plans = [make_plan(c, Launch()) for c in configs(make_config, "quad", settings=wild)]
    recorded = []

    def record(run):
        recorded.append(len(together.active))
        return taped(together)(run)

    together = population(plans, Unbranched, record=record)
    for t in range(30):
        together.step(t)
        if t == 10:
            assert together.freeze(together.diverged()).tolist() == [1]
    assert recorded == [4, 3]
    again = [make_plan(c, Launch()) for c in configs(make_config, "quad", settings=calm)]
    require_equal(together, separately(again, 30))


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton does not interpret where it compiles")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, where a lane divides by zero
@pytest.mark.parametrize(
    ("potential", "others"),
    [
        ("quad", ()),
        ("cubic", ("algorithm.u_step_on=objective",)),
        ("log", ("algorithm.order=jacobi",)),
        ("tan", ("algorithm.momentum_on=objective",)),
        ("tan_sep", ("algorithm.period=2",)),
    ],
)
def test_the_kernels_take_the_step_of_the_formulas(make_config, monkeypatch, potential, others):
    """On a CPU by Triton's interpreter."""
    pytest.importorskip("triton")
    from consensus.core.kernels.triton import Triton
    from tests.testing.interpreter import search_once_in_a_launch

    search_once_in_a_launch(monkeypatch)
    plans = [make_plan(config, Launch()) for config in configs(make_config, potential, *others)]
    apart = separately(plans, 4)
    made = []

    def choose_kernel(phi, like, configurations):
        assert phi.scale.numel() == configurations == len(like)
        made.append(Triton(phi, like, block=16384))
        return made[-1]

    monkeypatch.setattr("consensus.population.choose_kernel", choose_kernel)
    together = population(plans)
    for t in range(3):
        together.step(t)
    together.freeze(torch.tensor([False, True, False, False]))
    together.step(3)
    assert len(made) == 2
    left = [0, 2, 3]
    require_equal(together, [column[left] for column in apart])


@pytest.mark.gpu
@pytest.mark.parametrize("way", [Way(), Way("grouped", 5), Way("products", 12)])
@pytest.mark.parametrize(
    ("potential", "others"),
    [
        ("quad", ("algorithm.order=jacobi",)),
        ("cubic", ("algorithm.period=2",)),
        ("log", ()),
        ("tan", ("algorithm.order=jacobi",)),
        ("tan_sep", ("algorithm.momentum_on=objective",)),
    ],
)
def test_a_population_on_a_gpu_is_its_runs(make_config, potential, others, way):
    """With its kernels and graphs; one leaves, and a new population goes on."""
    mild = [(1.0, 0.5, 0.001, 0.001, 0.9, 1e-4, 0), (2.0, 0.5, 0.002, 0.001, 0.5, 0.0, 1)]
    settings = [*mild, (1.5, 0.4, 0.001, 0.001, 0.9, 1e-3, 0)]
    chosen = configs(
        make_config, potential, "model=lenet5", "device=cuda", *others, settings=settings
    )
    plans = [make_plan(config, Launch()) for config in chosen]
    apart = separately(plans, 40)
    lines = []
    together = population(plans, record=cuda_graph, refused=lines.append)
    together.oracle.way = way
    for t in range(15):
        together.step(t)
    assert together.freeze(torch.tensor([False, True, False])).tolist() == [1]
    for t in range(15, 25):
        together.step(t)
    again = population(plans, record=cuda_graph, refused=lines.append)
    again.load_state_dict(together.state_dict())
    again.oracle.load_state_dict(together.oracle.state_dict())
    assert again.oracle.way == way
    for t in range(25, 40):
        again.step(t)
    assert lines == []
    for found, column in zip((again.u, again.z, again.v), apart, strict=False):
        torch.testing.assert_close(found, column[[0, 2]], rtol=1e-6, atol=1e-9)
