"""The stationarity of a run, against the definitions in plain torch and SciPy."""

import json
import multiprocessing
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.nn.functional import cross_entropy

from consensus.comm import Launch, Solo
from consensus.problem import MODELS, partition
from consensus.run.build import build_algorithm
from consensus.run.plan import make_plan
from consensus.run.stationarity import Stationarity
from consensus.run.trainer import Trainer
from consensus.server import digest

LAM, NU, ETA, WORKERS, BATCH = 0.02, 1e-2, 1.5, 4, 20  # lam where the run rests
LAYERS = ((0, 784 * 3 + 3), (784 * 3 + 3, 784 * 3 + 3 + 3 * 10 + 10))
SIZE = LAYERS[-1][1]


def smooth(num_classes=10, dropout=0.0):
    """Without the kinks at which a solver gets stuck, and two layers."""
    return nn.Sequential(
        OrderedDict(
            flatten=nn.Flatten(),
            fc1=nn.Linear(784, 3),
            tanh=nn.Tanh(),
            dropout=nn.Dropout(dropout),
            fc2=nn.Linear(3, num_classes),
        )
    )


if multiprocessing.parent_process() is not None:  # a rank; others look at the table as it is
    MODELS.register("smooth")(smooth)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(MODELS._factories, "smooth", smooth)


@pytest.fixture
def config(make_config):
    """Small and float64."""

    def make(*overrides):
        return make_config(
            "model.name=smooth",
            "dtype=float64",
            "device=cpu",
            "potential=tan",
            f"potential.eta={ETA}",
            "algorithm.lam=0.002",
            "algorithm.momentum=0.9",
            f"algorithm.weight_decay={NU}",
            f"workers={WORKERS}",
            "stationarity.every=1",
            "stationarity.tolerance=1e-7",
            "stationarity.budget=1000",
            *overrides,
        )

    return make


def points():
    """U and z_1..z_M: (n,) and (M, n)."""
    generator = torch.Generator().manual_seed(5)
    u = 0.1 * torch.randn(SIZE, dtype=torch.float64, generator=generator)
    offsets = torch.randn(WORKERS, SIZE, dtype=torch.float64, generator=generator)
    scale = torch.linspace(0.2, 0.5, WORKERS, dtype=torch.float64).unsqueeze(1)
    return u, u - scale * offsets / offsets.norm(dim=1, keepdim=True)


def at_points(plan, group):
    algorithm = build_algorithm(plan, group)
    u, z = points()
    algorithm.server.u.copy_(u)
    algorithm.worker.z.copy_(z[list(plan.local_workers)])
    return algorithm


def measure_on(group, config):
    plan = make_plan(config, Launch(group.rank, group.size, group.rank, group.size))
    algorithm = at_points(plan, group)
    return Stationarity(plan, group).measure(algorithm, 10), int(digest(algorithm.u))


def by_layer(x):
    return np.array([np.linalg.norm(x[start:stop]) for start, stop in LAYERS])


def slope_of_tan(w):
    """Grad of sum over layers of tan |w_l / eta|^2."""
    out = np.empty_like(w)
    for start, stop in LAYERS:
        x = w[start:stop] / ETA
        out[start:stop] = 2 * x / np.cos(x @ x) ** 2 / ETA
    return out


def value_of_tan(w):
    sizes = [np.sum((w[start:stop] / ETA) ** 2) for start, stop in LAYERS]
    return np.inf if max(sizes) >= np.pi / 2 else sum(np.tan(s) for s in sizes)


def function(images, labels, factor):
    """f_j and its gradient: factor times the mean loss over the images, plus R."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(784, 3), nn.Tanh(), nn.Linear(3, 10)).double()

    def f(z):
        nn.utils.vector_to_parameters(torch.from_numpy(z.copy()), network.parameters())
        network.zero_grad()
        loss = factor * cross_entropy(network(images), labels)
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in network.parameters()]).numpy()
        return float(loss.detach()) + NU / 2 * z @ z, gradient + NU * z

    return f


def by_scipy(f, u):
    """The phi-prox of f at u."""

    def total(z):
        value, gradient = f(z)
        return value + value_of_tan(u - z) / LAM, gradient - slope_of_tan(u - z) / LAM

    options = {"maxiter": 5000, "maxfun": 50_000, "ftol": 1e-15, "gtol": 1e-9}
    found = minimize(total, u, jac=True, method="L-BFGS-B", options=options)
    return found.x, found.fun


@pytest.mark.parametrize(
    ("kind", "size", "reduction"),
    [
        ("full", 1, "sum"),
        ("full", 4, "mean"),
        ("label_skew", 4, "sum"),
        ("label_skew", 2, "mean"),
    ],
)
def test_what_is_measured_is_what_the_definitions_say(ranks, config, kind, size, reduction):
    chosen = config(
        f"data.partition={kind}", "data.alpha=1", f"algorithm.loss_reduction={reduction}"
    )
    answers = ranks(size, measure_on, chosen)
    found = answers[0][0]
    for other, bits in answers:
        assert other | {"seconds": 0} == found | {"seconds": 0}
        assert bits == answers[0][1]

    data = make_plan(chosen, Launch()).dataset
    shards = partition(data.train.targets, kind, WORKERS, 0, 1.0)
    factor = BATCH if reduction == "sum" else 1
    u, z = (x.numpy() for x in points())
    envelope, force_sum, value_sum = np.zeros(SIZE), np.zeros(SIZE), 0.0
    for j, shard in enumerate(shards):
        if kind == "label_skew" or j == 0:
            f = function(data.train.inputs[shard], data.train.targets[shard], factor)
            p, value = by_scipy(f, u)
        force, gradient = slope_of_tan(u - z[j]) / LAM, f(z[j])[1]
        envelope += slope_of_tan(u - p) / LAM
        force_sum += force
        value_sum += value
        close = {"rtol": 1e-5}
        gap = force - slope_of_tan(u - p) / LAM
        own = np.linalg.norm(slope_of_tan(u - p) / LAM)
        assert found["envelope_gradients"][j] == pytest.approx(own, rel=1e-5)
        np.testing.assert_allclose(found["consensus_gap"][j], by_layer(u - z[j]), rtol=1e-12)
        np.testing.assert_allclose(found["force"][j], np.linalg.norm(force), rtol=1e-9)
        residual = gradient - force
        np.testing.assert_allclose(found["worker_residual"][j], np.linalg.norm(residual), **close)
        layers = found["layers"]
        np.testing.assert_allclose(layers["worker_residual"][j], by_layer(residual), **close)
        np.testing.assert_allclose(layers["translation_gap"][j], by_layer(gap), **close)
        np.testing.assert_allclose(found["translation_gap"][j], np.linalg.norm(gap), **close)
    assert found["envelope_gradient"] == pytest.approx(np.linalg.norm(envelope), rel=1e-5)
    assert found["layers"]["envelope_gradient"] == pytest.approx(by_layer(envelope), rel=1e-5)
    assert found["consensus_residual"] == pytest.approx(np.linalg.norm(force_sum), rel=1e-9)
    assert found["layers"]["consensus_residual"] == pytest.approx(by_layer(force_sum), rel=1e-9)
    assert found["envelope"] == pytest.approx(value_sum, rel=1e-8)
    assert found["u_norm"] == pytest.approx(np.linalg.norm(u), rel=1e-12)
    assert found["lam"] == pytest.approx(LAM, rel=1e-12)
    assert found["converged"]
    assert 0 <= found["accuracy"] <= 1e-7 * sum(found["envelope_gradients"])
    assert found["samples"] == [len(shard) for shard in shards]


def test_where_a_copy_is_the_prox_it_is_stationary(config):
    """z_j = P f_j(u): (5b) and the translation gap are 0, and (5a) is the envelope gradient."""
    plan = make_plan(config(), Launch())
    algorithm = at_points(plan, Solo())
    u = points()[0].numpy()
    data = plan.dataset
    p, _ = by_scipy(function(data.train.inputs, data.train.targets, BATCH), u)
    algorithm.worker.z.copy_(torch.from_numpy(p))
    found = Stationarity(plan, Solo()).measure(algorithm, 10)
    assert max(found["worker_residual"]) < 1e-5 * found["force"][0]
    assert max(found["translation_gap"]) < 1e-5 * found["force"][0]
    assert found["consensus_residual"] == pytest.approx(found["envelope_gradient"], rel=1e-5)


def test_another_lam_can_be_asked_for(config):
    plan = make_plan(config("stationarity.lam=0.005", "stationarity.samples=50"), Launch())
    found = Stationarity(plan, Solo()).measure(at_points(plan, Solo()), 10)
    u, z = (x.numpy() for x in points())
    assert found["lam"] == 0.005
    expected = [np.linalg.norm(slope_of_tan(u - z_j) / 0.005) for z_j in z]
    np.testing.assert_allclose(found["force"], expected, rtol=1e-9)


def test_what_is_not_finite_is_not_stationary(config):
    """At such a u the prox finds nothing, and no force is no answer."""
    plan = make_plan(config("stationarity.samples=50", "potential=quad"), Launch())
    algorithm = at_points(plan, Solo())
    algorithm.server.u.fill_(1e200)  # its loss overflows
    found = Stationarity(plan, Solo()).measure(algorithm, 10)
    assert np.isnan(found["envelope_gradient"])
    assert not found["converged"]


def test_a_prox_that_is_not_found_says_how_far_it_is(config):
    plan = make_plan(config("stationarity.samples=50", "stationarity.budget=2"), Launch())
    found = Stationarity(plan, Solo()).measure(at_points(plan, Solo()), 10)
    assert not found["converged"]
    assert found["evaluations"] == 2
    assert found["accuracy"] > 0.1 * found["envelope_gradient"]


@pytest.mark.parametrize("kind", ["full", "sharded"])
def test_a_sample_is_fixed_and_of_the_shard(config, kind):
    chosen = config("stationarity.samples=30", f"data.partition={kind}")
    plan = make_plan(chosen, Launch())
    samples = Stationarity(plan, Solo()).samples
    again = Stationarity(make_plan(chosen, Launch()), Solo()).samples
    for sample, same, source in zip(samples, again, plan.oracle.minibatches, strict=True):
        assert torch.equal(sample, same)
        assert len(set(sample.tolist())) == 30
        assert set(sample.tolist()) <= set(source.indices.tolist())
    assert all(torch.equal(samples[0], other) for other in samples[1:]) == (kind == "full")
    few = make_plan(config("stationarity.samples=30", f"data.partition={kind}", "seed=1"), Launch())
    assert not torch.equal(Stationarity(few, Solo()).samples[0], samples[0])
    assert Stationarity(plan, Solo()).measure(at_points(plan, Solo()), 1)["samples"] == [30] * 4


def interrupted(group, config):
    """Rank 1 alone is asked to stop, at its third evaluation of f."""
    plan = make_plan(config, Launch(group.rank, group.size, group.rank, group.size))
    asked = []

    def asked_to_stop():
        asked.append(group.rank)
        return group.rank == 1 and len(asked) == 3

    algorithm = at_points(plan, group)
    found = Stationarity(plan, group).measure(algorithm, 10, asked_to_stop)
    return found, len(asked), algorithm.verify()


@pytest.mark.parametrize("kind", ["full", "sharded"])
def test_who_is_asked_to_stop_stops_all_at_once(ranks, config, kind):
    answers = ranks(4, interrupted, config(f"data.partition={kind}"))
    assert [found for found, _, _ in answers] == [None] * 4
    assert [asked for _, asked, _ in answers] == [3] * 4
    assert len({bits for _, _, bits in answers}) == 1


def train(group, config):
    plan = make_plan(config, Launch(group.rank, group.size, group.rank, group.size))
    trainer = Trainer(plan, group)
    trainer.run()
    return str(trainer.run_dir), trainer.rows, int(digest(trainer.algorithm.u))


def stopped(group, config):
    """The process is asked to stop while the last iteration is measured."""
    plan = make_plan(config, Launch(group.rank, group.size, group.rank, group.size))
    trainer = Trainer(plan, group)
    measure = trainer.stationarity.measure
    trainer.stationarity.measure = lambda algorithm, t, asked: measure(algorithm, t, lambda: True)
    trainer.run()
    return str(trainer.run_dir), trainer.rows


def test_what_was_not_measured_is_on_resume(ranks, make_config, tmp_path):
    """Because it was asked to stop in its last measurement, or was not asked to measure."""
    common = (
        "model=logistic", "workers=2", "algorithm.iterations=6", "device=cpu",
        f"output.run_dir={tmp_path}/run", "resume=auto", "stationarity.samples=40",
    )  # fmt: skip
    folder, rows = ranks(2, stopped, make_config(*common, "stationarity.every=4"))[0]
    assert [(row["iteration"], "stationarity" in row) for row in rows] == [(4, False), (6, False)]
    for overrides, measured in (([], False), (["stationarity.every=6"], True)):
        answers = ranks(2, train, make_config(*common, *overrides))
        rows = answers[0][1]
        assert [row["iteration"] for row in rows] == [4, 6]
        written = Path(folder, "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["iteration"] for line in written] == [4, 6]
        assert ("stationarity" in rows[-1]) == measured
        assert answers[0][2] == answers[1][2]


def test_without_a_coupling_it_has_no_effect(make_config, tmp_path, capsys):
    common = ("model=logistic", "algorithm.iterations=2", "device=cpu", "stationarity.every=1")
    for i, without in enumerate(("algorithm=msgd", "algorithm.lam=inf")):
        place = f"output.run_dir={tmp_path}/{i}"
        _, rows, _ = train(Solo(), make_config(*common, without, place))
        assert not any("stationarity" in row for row in rows)
        assert capsys.readouterr().out.count("stationarity.every has no effect") == 1


def test_a_run_is_the_same_measured_or_not(ranks, make_config, tmp_path):
    """With dropout, whose random numbers the measurement must not draw, and with all its files."""
    common = (
        "model.name=smooth", "+model.options.dropout=0.5", "workers=4",
        "algorithm.iterations=12", "output.eval_every=6", "output.checkpoint_every=null",
        "algorithm.lam=0.02", "device=cpu", f"output.root={tmp_path}",
    )  # fmt: skip
    plain = ranks(2, train, make_config(*common, "output.name=plain"))
    answers = ranks(
        2,
        train,
        make_config(
            *common, "output.name=measured", "stationarity.every=5", "output.tensorboard=true"
        ),
    )
    assert len({bits for _, _, bits in [*plain, *answers]}) == 1
    folder, rows, _ = answers[0]
    assert [row["iteration"] for row in rows] == [5, 6, 10, 12]
    assert ["stationarity" in row for row in rows] == [True, False, True, True]
    assert {row["iteration"]: row["digest"] for row in rows}[6] == plain[0][1][0]["digest"]
    other = answers[1][1][-1]["stationarity"]
    assert other | {"seconds": 0} == rows[-1]["stationarity"] | {"seconds": 0}

    with open(f"{folder}/metrics.jsonl", encoding="utf-8") as file:
        written = [json.loads(line) for line in file]
    assert written[-1]["stationarity"] == rows[-1]["stationarity"]
    events = EventAccumulator(folder).Reload()
    last = rows[-1]["stationarity"]
    for tag, value in {
        "stationarity/envelope_gradient_(13)": last["envelope_gradient"],
        "stationarity/consensus_residual_(5a)": last["consensus_residual"],
        "stationarity/seconds": last["seconds"],
        "workers_and_layers/worker_residual_(5b)/worker_3": last["worker_residual"][3],
        "workers_and_layers/translation_gap_(9)/worker_2": last["translation_gap"][2],
        "workers_and_layers/consensus_gap/worker_1/fc2": last["consensus_gap"][1][1],
    }.items():
        scalars = events.Scalars(tag)
        assert [scalar.step for scalar in scalars] == [5, 10, 12]
        assert scalars[-1].value == pytest.approx(value, rel=1e-6)
