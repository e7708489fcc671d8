"""What an evaluation measures, against the plain torch module, and the files it leaves."""

import errno
import json
import math
import os
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.nn.functional import cross_entropy

from consensus.atomic_files import write_whole
from consensus.comm import Launch, Solo
from consensus.run.metrics import MetricsFiles, measure, to_json
from consensus.run.plan import make_plan
from consensus.run.trainer import build_algorithm
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


def measure_at_points(group, config):
    """The row of this rank, with its share of the workers at the points above."""
    plan = make_plan(config, Launch(group.rank, group.size, group.rank, group.size))
    algorithm = build_algorithm(plan, group)
    u, z = points()
    algorithm.server.u = u
    algorithm.worker.z = z[list(plan.local_workers)]
    algorithm.server.cuts += 3  # the same on all ranks
    algorithm.worker.cuts += torch.tensor([j + 1 for j in plan.local_workers])
    row = measure(algorithm, plan, group, t=100)
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
        ("train", data.train_images, data.train_labels),
        ("test", data.test_images, data.test_labels),
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
    row["objective"] = row["train_loss"] + row["regularizer"] + row["coupling"]
    row["cuts_u"], row["cuts_z"] = 3, 1 + 2 + 3 + 4
    return row


@pytest.mark.ranks
@pytest.mark.parametrize("size", [1, 2, 4])
def test_measure_is_what_the_definitions_say_on_every_rank(ranks, config, size):
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
    row = measure(algorithm, plan, Solo(), t=5)
    lam = 0.1 * (1 - 0.5 * 4 / 10)  # iterations 0 to 4 are done
    assert row["coupling"] == pytest.approx(7850 * 1e-4 / lam, rel=1e-9)


def test_msgd_has_no_coupling(make_config):
    plan = make_plan(make_config("algorithm=msgd", "model=logistic", "device=cpu"), Launch())
    algorithm = build_algorithm(plan, Solo())
    algorithm.step(0)
    row = measure(algorithm, plan, Solo(), t=1)
    assert (row["coupling"], row["distance"], row["cuts_u"], row["cuts_z"]) == (0.0, [0.0], 0, 0)
    assert row["objective"] == row["train_loss"] + row["regularizer"]


# ---- files


def test_json_is_strict():
    inf, nan = math.inf, math.nan
    row = {"a": inf, "b": -inf, "c": nan, "d": [1.0, inf], "e": {"f": nan}, "g": 2, "h": 0.5}
    assert to_json(row) == (
        '{"a": null, "b": null, "c": null, "d": [1.0, null], "e": {"f": null}, "g": 2, "h": 0.5}'
    )
    assert to_json({"a": [inf]}, indent=2) == '{\n  "a": [\n    null\n  ]\n}'
    assert row["d"] == [1.0, inf], "the row itself is not touched"


def test_write_whole(tmp_path):
    path = tmp_path / "model.pt"
    write_whole(path, b"old")
    write_whole(path, b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["model.pt"]


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_an_interrupted_write_leaves_the_old_content(tmp_path, monkeypatch, broken):
    path = tmp_path / "summary.json"
    path.write_bytes(b"old and whole")

    def no_space(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    owner = os if broken == "fsync" else Path
    monkeypatch.setattr(owner, broken, no_space)
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old and whole"
    visible = [name for name in os.listdir(tmp_path) if not name.startswith(".")]
    assert visible == ["summary.json"]


ROW = {
    "iteration": 20,
    "epoch": 0.25,
    "objective": 3.5,
    "train_loss": 3.0,
    "train_error": 12.5,
    "test_loss": 2.0,
    "test_error": 25.0,
    "regularizer": 0.25,
    "coupling": math.inf,
    "distance": [0.5, 0.75],
    "cuts_u": 4,
    "cuts_z": 9,
    "wall_s": 1.5,
    "samples_per_s": 800.0,
}


def test_metrics_files(tmp_path):
    files = MetricsFiles(tmp_path, ("conv1", "fc"), tensorboard=True)
    files.evaluation({**ROW, "iteration": 10, "coupling": 0.125})
    on_disk = (tmp_path / "metrics.jsonl").read_text()  # before it is closed
    assert on_disk.endswith("\n")
    assert [json.loads(line)["iteration"] for line in on_disk.splitlines()] == [10]
    files.evaluation(ROW)
    files.scalars({"training/s_u": 0.5}, 20)
    files.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[1]) == {**ROW, "coupling": None}

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    read = {
        tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }
    assert read == {
        "evaluation/objective": [(10, 3.5), (20, 3.5)],
        "evaluation/train_loss": [(10, 3.0), (20, 3.0)],
        "evaluation/train_error": [(10, 12.5), (20, 12.5)],
        "evaluation/test_loss": [(10, 2.0), (20, 2.0)],
        "evaluation/test_error": [(10, 25.0), (20, 25.0)],
        "evaluation/regularizer": [(10, 0.25), (20, 0.25)],
        "evaluation/coupling": [(10, 0.125), (20, math.inf)],
        "evaluation/samples_per_s": [(10, 800.0), (20, 800.0)],
        "distance/conv1": [(10, 0.5), (20, 0.5)],
        "distance/fc": [(10, 0.75), (20, 0.75)],
        "cuts/u": [(10, 4.0), (20, 4.0)],
        "cuts/z": [(10, 9.0), (20, 9.0)],
        "training/s_u": [(20, 0.5)],
    }


def test_without_tensorboard_there_is_no_folder_of_it(tmp_path):
    files = MetricsFiles(tmp_path, ("conv1", "fc"), tensorboard=False)
    files.evaluation(ROW)
    files.scalars({"training/s_u": 0.5}, 20)
    files.close()
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_evaluations_are_appended(tmp_path):
    kept = [{"iteration": 1}]
    files = MetricsFiles(tmp_path, ("conv1", "fc"), tensorboard=False, rows=kept)
    files.evaluation(ROW)
    files.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == [1, 20]
