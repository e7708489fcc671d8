"""Plugin of the trainer: regression on the columns of a CSV file, with a loss of one's own.

python -m consensus.train workers=4 'plugins=[own_regression]' data=table data.root=table.csv \
    model=regression loss=huber

The last column of the file is the target.
"""

import numpy as np
from torch import nn
from torch.nn.functional import huber_loss

from consensus import DATASETS, LOSSES, MODELS, Dataset, Loss, Metric, Samples


@DATASETS.register("table")
def table(root: str) -> Dataset:
    rows = np.loadtxt(root, delimiter=",", skiprows=1)
    samples, test = Samples(rows[:, :-1], rows[:, -1:]), len(rows) // 5
    return Dataset(samples[test:], samples[:test])


@MODELS.register("regression")
def regression(inputs: int = 5, width: int = 32) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, 1))


@LOSSES.register("huber")
def huber(delta: float = 1.0) -> Loss:
    def loss(outputs, targets):
        return huber_loss(outputs, targets, reduction="none", delta=delta).mean(1)

    return Loss(loss, {"mae": Metric(lambda outputs, targets: (outputs - targets).abs().mean(1))})
