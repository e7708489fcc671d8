"""Runs that the tests of the report make up."""

import numpy as np
from matplotlib.image import imread

from consensus.report.runs import Run, flatten


def row_at(t, **others):
    """An evaluation of a made-up run."""
    numbers = {
        "iteration": t,
        "epoch": t / 100,
        "objective": 900.0 / t,
        "train_loss": 800.0 / t,
        "train_error": 50.0 / t,
        "test_loss": 200.0 / t,
        "test_error": 60.0 / t,
    }
    return numbers | others


def row(objective, train_loss, train_error, test_loss, test_error, t=100):
    """An evaluation."""
    return {
        "iteration": t,
        "epoch": t / 100,
        "objective": objective,
        "train_loss": train_loss,
        "train_error": train_error,
        "test_loss": test_loss,
        "test_error": test_error,
    }


def evaluation(metrics, objective=10.0, t=100):
    """An evaluation of another problem: `{"test": {"loss": 1.0, "mae": 2.0}}` and so on."""
    found = {f"{s}_{name}": value for s, of in metrics.items() for name, value in of.items()}
    return {"iteration": t, "epoch": t / 100, "objective": objective, **found}


def regression(test_mse, test_mae, test_loss=1.0, train_mse=0.25, **others):
    """An evaluation of a regression without validation, whose first metric is the mse."""
    train = {"loss": 8.0, "mse": train_mse, "mae": 0.5}
    test = {"loss": test_loss, "mse": test_mse, "mae": test_mae}
    return evaluation({"train": train, "test": test}, **others)


def accuracies(validation, test, validation_loss=2.0, **others):
    """An evaluation of a loss whose metric is an accuracy, with validation: higher is better."""
    sets = {
        "train": {"loss": 8.0, "accuracy": 0.99},
        "validation": {"loss": validation_loss, "accuracy": validation},
        "test": {"loss": 3.0, "accuracy": test},
    }
    return evaluation(sets, **others)


MSE = {"column": "test_mse"}
ACCURACY = {"column": "validation_accuracy", "highest": frozenset({"accuracy"})}
"""The choice of the best configuration, as `run` takes it."""


def config(potential="quad", lam=0.1, seed=0, **others):
    """A config, nested; `algorithm__sigma=1` sets algorithm.sigma."""
    nested = {
        "workers": 4,
        "seed": seed,
        "resume": "never",
        "potential": {"name": potential, "eta": 1.0, "options": {}},
        "algorithm": {"name": "consensus", "lam": lam},
        "data": {"name": "digits", "root": "/somewhere"},
        "loss": {},
        "model": {"name": "lenet5", "options": {}},
        "output": {"run_dir": None},
    }
    for key, value in others.items():
        *folders, last = key.split("__")
        place = nested
        for folder in folders:
            place = place[folder]
        place[last] = value
    return nested


def run(nested, last, finished=True, label="r", **choice):
    """A run with one evaluation, in memory; `choice`: how its best configuration is chosen."""
    flat = flatten(nested)
    del flat["resume"], flat["data.root"], flat["output.run_dir"]
    return Run(label, flat, [] if last is None else [last], finished, **choice)


FIRST = row(9.0, 8.0, 0.3, 100.0, 0.9)
SECOND = row(7.0, 6.0, 0.5, 120.0, 0.8)


def pixels_of(path, colour):
    """How many pixels of a picture have a colour, up to the rounding of what shines through."""
    pixels = (imread(path)[..., :3] * 255).round().astype(int)
    return int((abs(pixels - np.array(colour)) <= 1).all(-1).sum())


BLUE, ORANGE, BLACK = (0x00, 0x72, 0xB2), (0xE6, 0x9F, 0x00), (0, 0, 0)
BLUE_BAND = (0xCC, 0xE3, 0xF0)  # a fifth of blue on white
