"""Problems of users through the trainer: the plugins of examples/, on 1 and 2 processes."""

import argparse
import importlib
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from consensus.algorithm import Consensus
from consensus.comm import Launch, Solo
from consensus.run.health import HealthCheck
from consensus.run.plan import make_plan
from consensus.run.signals import RunStopped
from consensus.run.trainer import Trainer
from tests.testing import ROOT
from tests.testing.small_runs import rows_of, same_rows

ITERATIONS = 3


def load(name):
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.pop(0)


def train(group, name, config, stop_in=None):
    """Train to the end, or to the end of iteration `stop_in`; digests of u and of its buffers."""
    torch.set_num_threads(1)
    load(name)
    plan = make_plan(config, Launch(group.rank, group.size, group.rank, group.size))
    trainer = Trainer(plan, group)
    step, often = Consensus.step, HealthCheck.CHECK_EVERY_S

    def interrupted(self, t):
        step(self, t)
        if t == stop_in and group.rank == 0:
            os.kill(os.getpid(), signal.SIGTERM)

    Consensus.step, HealthCheck.CHECK_EVERY_S = interrupted, 0.0
    try:
        trainer.run()
    except RunStopped as stopped:
        expected = (
            f"stopped at iteration {-1 if stop_in is None else stop_in + 1} with a checkpoint"
        )
        if expected not in str(stopped):
            raise
    finally:
        Consensus.step, HealthCheck.CHECK_EVERY_S = step, often
    buffers = [x.double().sum().item() for x in plan.risk.buffers.values()]
    return trainer.algorithm.verify(), buffers


def images(path):
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 20)
    x = (150 * rng.random((20, 16, 16, 3)) + 50 * y[:, None, None, None]).astype(np.uint8)
    np.savez(path / "images.npz", x=x, y=y)
    return path / "images.npz"


def folder(path):
    rng = np.random.default_rng(0)
    for i in range(20):
        part = path / ("train" if i < 16 else "test") / f"class{i % 2}"
        part.mkdir(parents=True, exist_ok=True)
        pixels = 150 * rng.random((20 + i, 30, 3)) + 100 * (i % 2)
        Image.fromarray(pixels.astype(np.uint8)).save(part / f"{i}.png")
    return path


def text(path):
    with open(argparse.__file__, encoding="utf-8") as source:
        (path / "text.txt").write_text(source.read()[:8000])
    return path / "text.txt"


def numbers(path):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((80, 5))
    rows = np.column_stack([x, x @ np.arange(5.0) + 0.1 * rng.standard_normal(80)])
    np.savetxt(path / "table.csv", rows, delimiter=",", header="a,b,c,d,e,target")
    return path / "table.csv"


PROBLEMS = {
    "own_images": (
        images,
        [
            "data.name=own_images",
            "model.name=torchvision",
            "+model.options.name=shufflenet_v2_x0_5",
            "data.validation=0.2",
        ],
        ["algorithm.sigma=1e-4", "algorithm.tau=0.001"],
        ["error"],
    ),
    "own_folder": (
        folder,
        [
            "data.name=own_folder",
            "+data.options.size=16",
            "model.name=network",
            "+model.options.name=shufflenet_v2_x0_5",
        ],
        ["algorithm.sigma=0.0001", "algorithm.tau=0.0001"],
        ["error"],
    ),
    "own_text": (
        text,
        ["data.name=own_text", "model.name=char_gru", "loss=token_cross_entropy"],
        ["algorithm.sigma=0.1", "potential=tan"],
        ["error"],
    ),
    "own_regression": (
        numbers,
        ["data.name=table", "model.name=regression", "loss.name=huber"],
        ["algorithm.sigma=0.002", "algorithm.tau=0.002"],
        ["mae"],
    ),
}


@pytest.mark.ranks
@pytest.mark.parametrize("name", PROBLEMS)
def test_a_plugin_trains_and_continues_to_the_same_bits(ranks, make_config, tmp_path, name):
    make, problem, steps, metrics = PROBLEMS[name]
    load(name)
    where = f"data.root={make(tmp_path)}"
    pace = [
        f"algorithm.iterations={ITERATIONS}",
        "output.eval_every=3",
        "output.checkpoint_every=100",
    ]
    common = [where, *problem, *steps, *pace, "workers=2", "algorithm.batch_size=4", "device=cpu"]

    def config(run, *more):
        return make_config(*common, f"output.run_dir={tmp_path / run}", *more)

    whole = {size: ranks(size, train, name, config(f"{size}")) for size in (1, 2)}
    ranks(2, train, name, config("stopped"), 1)
    assert not (tmp_path / "stopped" / "summary.json").exists()
    continued = ranks(2, train, name, config("stopped", "resume=auto"))
    assert continued == whole[2]
    assert whole[2][0] == whole[2][1], "the replicas of u and its buffers"
    assert same_rows(tmp_path / "stopped", tmp_path / "2")
    for one, two in zip(rows_of(tmp_path / "1"), rows_of(tmp_path / "2"), strict=True):
        for metric in ("loss", *metrics):
            for part in ("train", "test"):
                key = f"{part}_{metric}"
                assert one[key] == pytest.approx(two[key], rel=1e-3)
    state = torch.load(tmp_path / "2" / "model.pt", weights_only=True)
    model = make_plan(config("new"), Launch()).model
    model.load_state_dict(state)
    parameters = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert parameters.isfinite().all()


def test_the_standard_library_is_a_text_to_train_on(make_config, tmp_path):
    """Windows are those of modules, the test set's of others, and the loss falls below a guess."""
    load("own_text")
    config = make_config(
        *("data.name=standard_library", "+data.options.rows=300", "data.partition=sharded"),
        *("model.name=char_gru", "+model.options.width=24", "loss=token_cross_entropy"),
        *("algorithm.optimizer={optimizer: AdamW, lr: 0.01}", "algorithm.pull=0.3"),
        *("algorithm.outer=1", "algorithm.batch_size=8", "algorithm.iterations=60"),
        *("output.eval_every=60", "output.checkpoint_every=null", "workers=2", "device=cpu"),
        f"output.run_dir={tmp_path / 'run'}",
    )
    plan = make_plan(config, Launch())
    text = [path.read_bytes() for path in sorted(Path(argparse.__file__).parent.glob("*.py"))]
    own = {"test": b"".join(text[::10]), "train": b"".join(t for i, t in enumerate(text) if i % 10)}
    for name, source in own.items():
        samples = plan.dataset.splits[name]
        assert len(samples) == pytest.approx({"train": 300, "test": 30}[name], rel=0.04)
        for inputs, targets in zip(samples.inputs[::7], samples.targets[::7], strict=True):
            window = bytes([*inputs.tolist(), targets[-1]])
            assert window in source.translate(bytes(min(i, 127) for i in range(256)))
            assert window[1:] == bytes(targets.tolist())
    row = Trainer(plan, Solo()).run()
    counts = np.bincount(np.frombuffer(own["train"], np.uint8).clip(max=127), minlength=128) + 1
    frequencies = counts / counts.sum()
    guess = -np.log(frequencies[plan.dataset.test.targets.numpy()]).mean()
    assert row["test_loss"] / len(plan.dataset.test) < guess - 0.2
