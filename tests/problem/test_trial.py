"""Models that cannot be trained are refused by a trial."""

# ruff: noqa: NPY002  (users draw from it)

import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import dropout

from consensus.problem import LOSSES, Loss, Metric, Samples, try_model


def made(forward):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(784, 3)

        def logits(self, images):
            return self.fc(images.flatten(1))

    Model.forward = forward
    return Model()


def check(model, count=2, loss="cross_entropy"):
    images, labels = torch.rand(count, 1, 28, 28), torch.arange(count) % 3
    loss = LOSSES[loss] if isinstance(loss, str) else loss
    model.train()
    before = torch.get_rng_state()
    try:
        return try_model(model, loss, Samples(images, labels), 3)
    finally:
        assert model.training
        assert torch.equal(torch.get_rng_state(), before)
        assert all(parameter.grad is None for parameter in model.parameters())


generator = np.random.default_rng()


@pytest.mark.parametrize(
    ("forward", "line"),
    [
        (
            lambda self, x: {"logits": self.logits(x), "loss": 0},
            "its outputs are {logits: float32 (2, 3), loss: int}; allowed: tensors",
        ),
        (
            lambda self, x: (self.logits(x), x) if self.training else self.logits(x),
            "it turns 2 samples into (float32 (2, 3), float32 (2, 1, 28, 28)), not (2, 3)",
        ),
        (lambda self, x: None, "its outputs are NoneType; allowed: tensors"),
        (lambda self, x: self.logits(x).T, "it turns 2 samples into (3, 2), not (2, 3)"),
        (
            lambda self, x: self.logits(x) if not self.training else self.logits(x).sum(),
            "it turns 2 samples into (), not (2, 3)",
        ),
        (lambda self, x: self.logits(x).detach(), "its loss does not depend on its parameters"),
        (
            lambda self, x: self.logits(x) * (generator.random() if self.training else 1.0),
            "it draws random numbers that no seed determines, in training mode: draw",
        ),
        (
            lambda self, x: self.logits(x.sub_(0.5)),
            "it changes its inputs in place; allowed: operations that return new tensors",
        ),
        (
            lambda self, x: self.logits(x.mul_(2.0) if self.training else x),
            "it changes its inputs in place; allowed: operations that return new tensors",
        ),
        (
            lambda self, x: self.logits(x) * generator.random(),
            "it draws random numbers that no seed determines, in evaluation mode: draw from the",
        ),
    ],
)
def test_refusals(forward, line):
    with pytest.raises(ValueError, match=re.escape(line)):
        check(made(forward))


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: self.logits(x),
        lambda self, x: self.logits(dropout(x, 0.5, self.training)),
        lambda self, x: self.logits(x * np.random.rand()),
    ],
)
@pytest.mark.parametrize("count", [1, 2])
def test_models_that_can_be_trained(forward, count):
    check(made(forward), count)


def test_a_sparse_gradient_is_refused():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(10, 3, sparse=True)

        def forward(self, images):
            return self.table((10 * images.flatten(1)).long()).mean(1)

    line = "the gradient of its parameter `table.weight` is sparse; allowed: dense gradients, as of"
    with pytest.raises(ValueError, match=re.escape(line)):
        check(Model())


def test_what_a_trial_finds_out():
    """One weight is not used; the buffers that a pass changes are as before."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.fc, self.other = nn.BatchNorm2d(1), nn.Linear(784, 3), nn.Linear(2, 2)

        def forward(self, images):
            return self.fc(self.norm(images).flatten(1))

    model = Model()
    model.fc.bias.requires_grad_(False)
    model.train()
    samples = Samples(torch.rand(2, 1, 28, 28), torch.tensor([0, 2]))
    found = try_model(model, LOSSES["cross_entropy"], samples, 3)
    assert found.unused == ("other.weight", "other.bias")
    assert found.numbers == 784
    assert found.outputs == "float32 (2, 3)"
    assert torch.equal(model.norm.running_mean, torch.zeros(1))
    assert int(model.norm.num_batches_tracked) == 0


@pytest.mark.parametrize(
    ("loss", "line"),
    [
        (Loss(lambda x, y: x.sum()), "the loss of 2 samples is float64 (); allowed: a tensor (2,)"),
        (Loss(lambda x, y: 1.0), "the loss of 2 samples is float; allowed: a tensor (2,)"),
        (
            Loss(lambda x, y: x.sum(1), {"half": Metric(lambda x, y: x[:1, 0])}),
            "the metric `half` of 2 samples is float64 (1,); allowed: a tensor (2,)",
        ),
        ("mse", "`loss` is mse with outputs float64 (2, 3), targets int64 (2,); allowed: the same"),
        (Loss(lambda x, y: x.detach().sum(1)), "its loss does not depend on its parameters"),
    ],
)
def test_losses_that_cannot_be_used(loss, line):
    with pytest.raises(ValueError, match=re.escape(line)):
        check(made(lambda self, x: self.logits(x)), loss=loss)
