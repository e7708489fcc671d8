"""The gradients and the faults of the benchmark of robust methods, against torch modules."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from benchmarks import robust
from benchmarks.robust import BATCH, WIDTH, WORKERS, Perceptrons


def module(point):
    """The perceptron with these parameters (n,)."""
    model = nn.Sequential(nn.Linear(784, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10))
    sizes = [784 * WIDTH, WIDTH, WIDTH * 10, 10]
    w, b, w2, b2 = point.split(sizes)
    with torch.no_grad():
        model[0].weight.copy_(w.view(784, WIDTH).T)
        model[0].bias.copy_(b)
        model[2].weight.copy_(w2.view(WIDTH, 10).T)
        model[2].bias.copy_(b2)
    return model


def gradient(point, x, y):
    """Of the mean loss, in the order of the benchmark. (n,)."""
    model = module(point)
    w, b, w2, b2 = torch.autograd.grad(cross_entropy(model(x), y), list(model.parameters()))
    return torch.cat([w.T.flatten(), b, w2.T.flatten(), b2])


@pytest.mark.parametrize("fault", robust.FAULTS)
def test_the_gradients_and_their_faults(fault):
    oracle = Perceptrons("digits", "data", 3, fault, 2)
    random = torch.Generator().manual_seed(0)
    points = oracle.start + 0.1 * torch.randn(WORKERS, len(oracle.start), generator=random)
    batch = oracle.draw()
    assert batch.shape == (WORKERS, BATCH)
    assert all(
        set(own.tolist()) <= set(s.tolist()) for own, s in zip(batch, oracle.shards, strict=True)
    )
    found = oracle.gradient(points, batch)
    for j in range(WORKERS):
        x, y = oracle.train.inputs[batch[j]].flatten(1), oracle.train.targets[batch[j]]
        wanted = gradient(points[j], x, 9 - y if fault == "label" and j < 2 else y)
        if fault == "garbage" and j < 2:
            assert 0.9 < found[j].std() < 1.1
            assert abs(found[j].mean()) < 0.05
            continue
        torch.testing.assert_close(found[j], -wanted if fault == "sign" and j < 2 else wanted)


def test_the_error_is_that_of_the_module():
    oracle = Perceptrons("digits", "data", 3, "label", 0)
    outputs = module(oracle.start)(oracle.test.inputs.flatten(1))
    wrong = (outputs.argmax(1) != oracle.test.targets).double().mean()
    assert oracle.error(oracle.start) == pytest.approx(100 * float(wrong))
    assert sorted(oracle.shards.flatten().tolist())[-1] <= 1436
    assert oracle.shards.unique().numel() == oracle.shards.numel() == 1430


def test_the_average_of_byzfl_is_a_loop_of_sgd_over_all_workers():
    setting = next(s for s in robust.SETTINGS if s.name == "Average")
    oracle, again = (Perceptrons("digits", "data", 1, "label", 0) for _ in range(2))
    u, v = again.start, torch.zeros_like(again.start)
    for _ in range(3):  # the mean of the velocities is the velocity of the mean gradient
        velocities = v if v.ndim == 2 else v.expand(WORKERS, -1)
        delta = again.gradient(u + robust.KAPPA * velocities, again.draw())
        v = robust.KAPPA * velocities - robust.SIGMA * delta
        u = u + v.mean(0)
    torch.testing.assert_close(robust.by_aggregator(setting, oracle, 3), u)


def test_the_quick_run_has_a_line_for_each_method_and_a_plot(capsys, tmp_path):
    robust.main(["--quick", f"--plot={tmp_path / 'a.png'}", f"--json={tmp_path / 'a.json'}"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["| method | garbage 4 |", "| --- | --- |"]
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| quad", "| huber"]
    quad, huber = (float(line.split()[-3]) for line in lines[2:])
    assert huber < quad - 20
    assert (tmp_path / "a.png").stat().st_size > 10_000
    assert (tmp_path / "a.json").exists()
