"""A replayed iteration is the iteration of a run.

There is no GPU in most places. `Tape` stands in for a CUDA graph.
"""

import pytest
import torch
from torch import nn

from benchmarks.gpu import GRADIENTS, host_syncs
from benchmarks.gpu_vectors import Unbranched
from consensus import POTENTIALS, Layerwise
from consensus.algorithm import Consensus, Msgd
from consensus.comm import Solo
from consensus.problem import Dataset, Minibatches, MinibatchRisk, Risk, build_model
from consensus.replay import WARM_UP, Replay, cuda_graph, obstacle_to_replay
from consensus.run.health import HealthCheck
from consensus.server import Server
from consensus.worker import Worker
from tests.testing.tape import taped

pytestmark = pytest.mark.usefixtures("operations_of_torch")

SIGMA = 1e-3
CPU, GPU = torch.device("cpu"), torch.device("cuda")


def recorder(device, algorithm, watch=None):
    return (
        cuda_graph
        if device.type == "cuda"
        else taped(algorithm, *([watch._first] if watch else []))
    )


def small():
    """The layers of LeNet-5, smaller: its gradients would be most of the time of these tests."""
    torch.manual_seed(0)
    features = [nn.Conv2d(1, 4, 5, stride=3), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(4, 8, 3)]
    return nn.Sequential(*features, nn.ReLU(), nn.Flatten(), nn.Linear(32, 10))


NARROW = {CPU: (0.03, 7e-3), GPU: (0.05, 5e-3)}
"""eta of radial, and of separable potentials: a few steps are cut. Many enlarge every rounding."""


def make(
    potential="quad", device=CPU, risk_type=Risk, kind=Unbranched, dtype=torch.float64, **options
):
    """4 workers that start apart, a coupling that is stable at 0, ten iterations to an epoch."""
    eta = 1.0 if potential == "quad" else NARROW[device][potential.endswith("_sep")]
    random = torch.Generator().manual_seed(0)
    bright = 4 if device == CPU else 1  # so that the steps of the small network are cut as well
    images = bright * torch.rand(50, 1, 28, 28, generator=random)
    labels = torch.randint(10, (50,), generator=random)
    dataset = Dataset((images, labels), (images[:1], labels[:1]), num_classes=10).to(device, dtype)
    minibatches = [Minibatches(torch.arange(50, device=device), 5, 0, j) for j in range(4)]
    model = small() if device == CPU else build_model("lenet5", 0, dtype, num_classes=10)
    risk = risk_type(model.to(device, dtype), "sum")
    phi = kind(POTENTIALS[potential], risk.layout.layers, eta)
    u = risk.layout.flatten(risk.model)
    noise = torch.randn(4, u.numel(), generator=torch.Generator().manual_seed(1)).to(u)
    for start, stop in risk.layout.layers:
        part = noise[:, start:stop]
        part *= 0.02 / part.norm(dim=1, keepdim=True)
    sizes = {"tau": eta**2 / 40, "sigma": SIGMA, "lam": 10 * SIGMA / eta**2}
    momentum_on = options.pop("momentum_on", "loss")
    oracle = MinibatchRisk(risk, dataset, minibatches)
    return Consensus(
        Server(u, phi, Solo(device)),
        Worker(u + noise, oracle, phi, kappa=0.9, nu=1e-4, momentum_on=momentum_on),
        **(sizes | options),
    )


def compare(plain, replayed, replay, steps, tolerance=1e-12):
    start, worst = plain.u.clone(), 0.0
    for t in range(steps):
        plain.step(t)
        replay.step(t)
        difference = plain.worker.oracle.losses - replayed.worker.oracle.losses
        worst = max(worst, float(difference.abs().max()))
    assert (plain.u - start).norm() > 0.02
    assert worst <= 1e3 * tolerance
    for key in ("server/u", "worker/z", "worker/v"):
        found, expected = replayed.state_dict()[key], plain.state_dict()[key]
        assert (found - expected).abs().max() <= tolerance
    assert torch.equal(plain.cuts, replayed.cuts)
    positions = (x.worker.oracle.state_dict()["position"] for x in (plain, replayed))
    assert torch.equal(*positions)


@pytest.mark.parametrize("potential", ["quad", "tan", "log", "tan_sep"])
def test_a_replayed_step_is_the_step_of_a_run(potential):
    plain, replayed = make(potential, kind=Layerwise), make(potential)
    compare(plain, replayed, Replay(replayed, record=taped(replayed)), steps=50)
    assert (int(plain.cuts.sum()) > 0) == (potential != "quad")  # the line search had work to do


@pytest.mark.parametrize(
    "options",
    [
        {"period": 3},
        {"period": 3, "local_pull": 0.1},
        {"order": "jacobi"},
        {"momentum_on": "objective"},
        {"u_step_on": "objective", "tau": 1e-4},
        {
            "sigma": lambda t: 1e-3 / (1 + 0.1 * t),
            "tau": lambda t: 1e-4 * (1 + t),
            "lam": lambda t: 0.5 / (1 + t),
            "period": 2,
        },
    ],
    ids=["period", "local_pull", "jacobi", "objective", "u_step", "schedules"],
)
def test_all_ways_to_run_algorithm_1_are_replayed(options):
    plain, replayed = make("tan", kind=Layerwise, **options), make("tan", **options)
    compare(plain, replayed, Replay(replayed, record=taped(replayed)), steps=24)
    for name in ("sigma", "tau", "lam"):
        assert getattr(replayed, name) == options.get(name, getattr(replayed, name))


def test_msgd_is_replayed():
    runs = []
    for _ in range(2):
        consensus = make()
        oracle = consensus.worker.oracle
        oracle.minibatches = oracle.minibatches[:1]
        worker = Worker(consensus.worker.z[:1], oracle, consensus.phi, kappa=0.9, nu=1e-4)
        runs.append(Msgd(worker, Solo(), sigma=lambda t: SIGMA / (1 + t)))
    plain, replayed = runs
    replay = Replay(replayed, record=taped(replayed))
    for t in range(20):
        plain.step(t)
        replay.step(t)
    assert (plain.u - replayed.u).abs().max() <= 1e-12


def test_a_run_that_continues_is_replayed_from_where_it_is():
    plain, first, second = make("tan", kind=Layerwise), make("tan"), make("tan")
    replay = Replay(first, record=taped(first))
    for t in range(7):
        plain.step(t)
        replay.step(t)
    second.load_state_dict({key: value.clone() for key, value in first.state_dict().items()})
    replay = Replay(second, record=taped(second))
    for t in range(7, 25):
        plain.step(t)
        replay.step(t)
    assert (plain.u - second.u).abs().max() <= 1e-12
    assert torch.equal(plain.cuts, second.cuts)


@pytest.mark.parametrize("gradients", ["grouped", "products"])
def test_batched_gradients_are_replayed(gradients):
    plain, replayed = make("tan", kind=Layerwise), make("tan", risk_type=GRADIENTS[gradients])
    compare(plain, replayed, Replay(replayed, record=taped(replayed)), steps=50)


def test_what_comes_after_a_step_sees_the_t_of_the_replay():
    algorithm = make()
    watch = HealthCheck(algorithm.server.group, range(4), log_every=100)

    def observe(t):
        watch.observe(t, algorithm.u, algorithm.worker.z)

    replay = Replay(algorithm, observe, taped(algorithm, watch._first))
    for t in range(12):
        if t == 9:
            algorithm.worker.z[2, 7] = torch.inf
        replay.step(t)
    assert int(watch._first) == 2 * 9  # the code of a z_j at t = 9


def test_the_recorder_refuses_a_step_that_asks_the_host_and_the_run_goes_on():
    # On a CPU the line search of Layerwise compares, and branches.
    plain, refused, lines = make("tan", kind=Layerwise), make("tan", kind=Layerwise), []
    replay = Replay(refused, record=taped(refused), refused=lines.append)
    compare(plain, refused, replay, steps=12, tolerance=0.0)
    (line,) = lines
    assert line.startswith("CUDA graph capture failed (aten")
    assert "_local_scalar_dense" in line


def test_a_step_that_moves_its_state_is_found():
    algorithm = make()
    step = algorithm.step

    def moves(t):
        step(t)
        algorithm.worker.v = algorithm.worker.v.clone()

    algorithm.step = moves
    replay = Replay(algorithm, record=taped(algorithm))
    for t in range(WARM_UP):
        replay.step(t)
    with pytest.raises(AssertionError, match="moved its state"):
        replay.step(WARM_UP)


def test_who_cannot_be_replayed():
    assert obstacle_to_replay(make(), 1) == "the device is no GPU"


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("gradients", ["streams", "grouped", "products"])
@pytest.mark.parametrize("potential", ["quad", "tan", "log", "tan_sep"])
def test_a_cuda_graph_is_the_step_of_a_run(potential, gradients):
    plain, replayed = make(potential, GPU), make(potential, GPU, GRADIENTS[gradients])
    # Atomics: each run sums in an order of its own.
    compare(plain, replayed, Replay(replayed), steps=50, tolerance=1e-9)


@pytest.mark.gpu
def test_branches_and_schedules_in_cuda_graphs():
    options = {"period": 2, "sigma": lambda t: 1e-3 / (1 + 0.1 * t), "lam": lambda t: 0.5 / (1 + t)}
    plain, replayed = make("tan", GPU, **options), make("tan", GPU, **options)
    compare(plain, replayed, Replay(replayed), steps=50, tolerance=1e-9)


@pytest.mark.gpu
@pytest.mark.parametrize("potential", ["quad", "tan", "tan_sep"])
def test_no_step_waits_for_the_device(potential):
    plain, replayed = make(potential, GPU), make(potential, GPU)
    replay = Replay(replayed)
    for t in range(11):  # the first of an epoch brings a permutation from the host
        plain.step(t)
        replay.step(t)
    assert host_syncs(lambda: replay.step(11), GPU) == 0
    assert host_syncs(lambda: plain.step(11), GPU) == 0
    assert host_syncs(lambda: plain.u.sum().item(), GPU) >= 1


class Reading(nn.Module):
    """Branches on a number of the device."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(784, 10)

    def forward(self, images):
        x = images.flatten(1)
        return self.fc(x) if x.sum().item() > 0 else self.fc(-x)


@pytest.mark.gpu
def test_a_model_that_asks_the_host_runs_as_it_is():
    runs, lines = [make("tan", GPU), make("tan", GPU)], []
    for algorithm in runs:
        oracle = algorithm.worker.oracle
        model = Reading().to(GPU, torch.float64)
        risk = Risk(model, "sum")
        oracle.risk = risk
        phi = Layerwise(POTENTIALS["quad"], risk.layout.layers)
        u = torch.zeros(risk.layout.size, dtype=torch.float64, device=GPU)
        algorithm.server = Server(u, phi, Solo(GPU))
        algorithm.worker = Worker(u.expand(4, -1), oracle, phi)
        algorithm.phi = phi
    replay = Replay(runs[1], refused=lines.append)
    for t in range(8):
        runs[0].step(t)
        replay.step(t)
    assert (runs[0].u - runs[1].u).abs().max() <= 1e-9
    assert runs[0].u.norm() > 0
    assert len(lines) == 1
    assert lines[0].startswith("CUDA graph capture failed (")
