"""The arithmetic of the benchmark of `pull`."""

import statistics

import pytest
import torch
from torch.nn.functional import cross_entropy

from benchmarks import harness, pull
from benchmarks.pull import COLUMNS, PULLS, Result, Setting, classes

PLAIN = Setting("SGD", 0.3, "quad", 1)


def test_every_class_is_seen_by_one_worker():
    seen = [classes(worker, 4) for worker in range(4)]
    assert seen == [[0, 4, 8], [1, 5, 9], [2, 6], [3, 7]]


def test_the_table_has_mean_and_standard_deviation():
    losses = [(1.0, 2.0, 3.0), (0.5, 0.5, 0.5), (0.1, 0.2, 0.4), (1.0, 1.0, 4.0)]
    head, line = harness.table(COLUMNS, [Result(PLAIN, tuple(losses)).cells()]).splitlines()
    assert head.split()[-2 * len(PULLS) :] == [w for p in PULLS for w in ("pull", str(p))]
    means = [2.0, 0.5, 0.7 / 3, 2.0]
    deviations = [1.0, 0.0, statistics.stdev([0.1, 0.2, 0.4]), 3.0**0.5]
    cells = [f"{m:.3f} ({d:.3f})" for m, d in zip(means, deviations, strict=True)]
    assert line.split() == ["SGD", "0.3", "quad", "1", *" ".join(cells).split()]
    assert pull.summary([2.0]) == (2.0, 0.0)


def trained(group):
    return pull.train(PLAIN, 1.0, 5, pull.digits(), group, steps=6)


@pytest.mark.ranks
def test_with_sgd_and_pull_1_u_is_the_mean_of_copies(ranks):
    """A plain loop over both workers, one displacement late, has the same loss."""
    losses = ranks(2, trained)
    assert losses[0] == losses[1]
    x, y = pull.digits()
    model = pull.network(5)
    u = [p.detach().clone() for p in model.parameters()]
    copies = [u, u]
    random = [torch.Generator().manual_seed(5000 + j) for j in range(2)]
    own = [(y % 2 == j).nonzero().flatten() for j in range(2)]
    for _ in range(6):
        u = [torch.stack(pair).mean(0) for pair in zip(*copies, strict=True)]
        for j in range(2):
            for p, value in zip(model.parameters(), copies[j], strict=True):
                p.data = value
            batch = own[j][torch.randint(len(own[j]), (20,), generator=random[j])]
            loss = cross_entropy(model(x[batch]), y[batch])
            slopes = torch.autograd.grad(loss, list(model.parameters()))
            copies[j] = [a - 0.3 * g for a, g in zip(u, slopes, strict=True)]
    for p, value in zip(model.parameters(), u, strict=True):
        p.data = value
    assert losses[0] == pytest.approx(cross_entropy(model(x), y).item(), rel=1e-5)
