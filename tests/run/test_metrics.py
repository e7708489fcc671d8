"""The measured row against the plain torch module."""

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from consensus.comm import Launch, Solo
from consensus.problem import LOSSES, Loss, Metric
from consensus.run.build import build_algorithm
from consensus.run.metrics import better, measure
from consensus.run.plan import make_plan
from consensus.server import digest

SIZE = 784 * 5 + 5 + 5 * 10 + 10  # of the network below
LAM, NU, ETA = 0.2, 1e-2, 1.5
WORKERS = 4


@pytest.fixture
def config(make_config):
    """Small, float64, bounded potential, every number in the objective away from 0 and 1."""
    return make_config(
        "model=mlp",
        "model.options.hidden=[5]",
        "dtype=float64",
        "device=cpu",
        "potential=tan",
        f"potential.eta={ETA}",
        f"algorithm.lam={LAM}",
        f"algorithm.weight_decay={NU}",
        f"workers={WORKERS}",
    )


def points():
    """U and z_1..z_M, made here and not by a run: (n,) and (M, n)."""
    generator = torch.Generator().manual_seed(5)
    u = 0.1 * torch.randn(SIZE, dtype=torch.float64, generator=generator)
    offsets = torch.randn(WORKERS, SIZE, dtype=torch.float64, generator=generator)
    scale = torch.linspace(0.2, 0.5, WORKERS, dtype=torch.float64).unsqueeze(1)
    return u, u - scale * offsets / offsets.norm(dim=1, keepdim=True)


def state_of(algorithm):
    """The arguments of `measure` that an algorithm holds."""
    return algorithm.u, algorithm.worker.z, algorithm.phi, algorithm.lam, algorithm.cuts


def measure_at_points(group, config):
    """The row of this rank, with its share of the workers at the points above."""
    plan = make_plan(config, Launch(group.rank, group.size, group.rank, group.size))
    algorithm = build_algorithm(plan, group)
    u, z = points()
    algorithm.server.u = u
    algorithm.worker.z = z[list(plan.local_workers)]
    algorithm.server.cuts += 3  # the same on all ranks
    algorithm.worker.cuts += torch.tensor([j + 1 for j in plan.local_workers])
    row = measure(*state_of(algorithm), plan, group, t=100)
    return row, int(digest(algorithm.u)), algorithm.verify()


def network(u):
    """The module that `model=mlp model.options.hidden=[5]` stands for, in plain torch."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 5), nn.ReLU(), nn.Linear(5, 10)).double()
    torch.nn.utils.vector_to_parameters(u, model.parameters())
    return model


def expected_row(config):
    """The same numbers from the definitions."""
    u, z = points()
    data = make_plan(config, Launch()).dataset
    row = {"iteration": 100, "epoch": 100 * 20 / 1437}
    for name, images, labels in (
        ("train", data.train.inputs, data.train.targets),
        ("test", data.test.inputs, data.test.targets),
    ):
        with torch.no_grad():
            logits = network(u)(images)
        row[f"{name}_loss"] = float(cross_entropy(logits, labels, reduction="sum"))
        row[f"{name}_error"] = 100 * float((logits.argmax(1) != labels).double().mean())
    row["regularizer"] = NU / 2 * sum(x * x for x in u.tolist())
    layers = [784 * 5 + 5, 5 * 10 + 10]
    squares = [[float((w_l**2).sum()) for w_l in (u - z_j).split(layers)] for z_j in z]
    row["coupling"] = sum(math.tan(s / ETA**2) / LAM for pair in squares for s in pair) / WORKERS
    row["distance"] = [sum(math.sqrt(pair[i]) for pair in squares) / WORKERS for i in (0, 1)]
    forces = [[2 / ETA**2 / math.cos(s / ETA**2) ** 2 * math.sqrt(s) for s in p] for p in squares]
    row["influence"] = [math.hypot(*of_layers) for of_layers in forces]
    row["workers"] = WORKERS
    row["objective"] = row["train_loss"] + row["regularizer"] + row["coupling"]
    row["cuts_u"], row["cuts_z"] = 3, 1 + 2 + 3 + 4
    return row


@pytest.mark.ranks
@pytest.mark.parametrize("size", [1, 2, 4])
def test_measure_matches_the_definitions_on_every_rank(ranks, config, size):
    answers = ranks(size, measure_at_points, config)
    expected = expected_row(config)
    for row, _, _ in answers:
        assert row.keys() == expected.keys()
        for key, value in expected.items():
            assert row[key] == pytest.approx(value, rel=1e-12), key
    rows, digests, verified = zip(*answers, strict=True)
    assert all(row == rows[0] for row in rows), "bit for bit"
    assert set(digests) == set(verified) == {digests[0]}
    assert expected["train_error"] > 50, "random weights"
    assert expected["coupling"] > 0.1


def test_the_digest_sees_every_bit(config):
    u, _ = points()
    nudged = u.clone()
    nudged[7] = math.nextafter(float(u[7]), math.inf)
    swapped = u.clone()
    swapped[[0, 1]] = u[[1, 0]]
    assert int(digest(u.clone())) == int(digest(u))
    assert int(digest(nudged)) != int(digest(u))
    assert int(digest(swapped)) != int(digest(u))


def test_lam_is_that_of_the_last_iteration(make_config):
    overrides = ["model=logistic", "device=cpu", "dtype=float64", "algorithm.iterations=10"]
    overrides += ["algorithm.schedule.lam.name=linear", "+algorithm.schedule.lam.options.final=0.5"]
    plan = make_plan(make_config(*overrides), Launch())
    algorithm = build_algorithm(plan, Solo())
    algorithm.worker.z = algorithm.u + 1e-2 * torch.ones_like(algorithm.worker.z)
    row = measure(*state_of(algorithm), plan, Solo(), t=5)
    lam = 0.1 * (1 - 0.5 * 4 / 10)  # iterations 0 to 4 are done
    assert row["coupling"] == pytest.approx(7850 * 1e-4 / lam, rel=1e-9)


def test_msgd_has_no_coupling(make_config):
    plan = make_plan(make_config("algorithm=msgd", "model=logistic", "device=cpu"), Launch())
    algorithm = build_algorithm(plan, Solo())
    algorithm.step(0)
    row = measure(*state_of(algorithm), plan, Solo(), t=1)
    assert (row["coupling"], row["distance"], row["cuts_u"], row["cuts_z"]) == (0.0, [0.0], 0, 0)
    assert row["objective"] == row["train_loss"] + row["regularizer"]


@pytest.mark.parametrize(
    ("loss", "key", "values", "best"),
    [
        ("cross_entropy", "test_error", [30.0, None, 20.0, 20.0, math.nan, 25.0], (3, 20.0)),
        ("cross_entropy", "test_error", [math.nan, 30.0], (2, 30.0)),
        ("longest", "test_length", [1.0, 3.0, 2.0], (2, 3.0)),
    ],
)
def test_the_best_evaluation(make_config, monkeypatch, loss, key, values, best):
    """The first of the lowest numbers, or of the highest; one that is not finite never wins."""
    longest = Metric(lambda outputs, targets: outputs.sum(1), goal="max")
    made = Loss(LOSSES["cross_entropy"].function, {"length": longest})
    monkeypatch.setitem(LOSSES._factories, "longest", lambda: made)
    plan = make_plan(make_config("model=logistic", "device=cpu", f"loss.name={loss}"), Launch())
    found = None
    for t, value in enumerate(values, start=1):
        found = better(found, {"iteration": t, key: value}, plan)
    assert found == {"iteration": best[0], key: best[1]}
