"""Gradients and evaluations with subnormal numbers taken for zero, and nothing else so."""

import torch
from torch import nn

from consensus.problem import Dataset, Minibatches, MinibatchRisk, Risk, Samples
from consensus.problem.subnormals import subnormals_as_zero

TINY = 1e-40  # of float32, whose smallest normal number is 1.2e-38


def kept(count=1):
    """Whether this thread and torch's others keep subnormal numbers."""
    return bool((torch.full((count,), TINY) * 0.5 > 0).all())


def test_the_gradient_of_a_class_with_a_subnormal_probability_is_zero():
    """Of softmax at logits 0 and -95: e^-95 = 5.5e-42, which float32 would round to 5.5e-42."""
    model = nn.Linear(1, 2, bias=False)
    samples = Samples(torch.ones(4, 1), torch.zeros(4, dtype=torch.int64))
    data = Dataset(samples, samples, num_classes=2)
    oracle = MinibatchRisk(Risk(model, "sum"), data, [Minibatches(torch.arange(4), 4, 0, 0)])
    point = torch.tensor([[0.0, -95.0]])
    logits = point[0].clone().requires_grad_()
    loss = nn.functional.cross_entropy(logits.expand(4, 2), samples.targets, reduction="sum")
    (expected,) = torch.autograd.grad(loss, logits)
    assert 0 < expected[1] < 4e-41
    found = oracle.gradient(point.clone(), oracle.draw())
    assert found.tolist() == [[0.0, 0.0]]
    assert oracle.risk.evaluate(point[0], data.test).tolist() == [0.0, 0.0]
    assert kept()


def test_the_mode_of_the_caller_and_of_other_threads_stays():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with subnormals_as_zero():
            assert not kept()
            torch.zeros(1 << 20).add_(1.0)  # would start the others in this mode
            with subnormals_as_zero():
                pass
            assert not kept()
        assert kept(1 << 20)
    finally:
        torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    try:
        with subnormals_as_zero():
            pass
        assert not kept()
    finally:
        torch.set_flush_denormal(False)
