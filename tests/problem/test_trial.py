"""Models that cannot be trained are refused by a trial."""

# ruff: noqa: NPY002  (users draw from it)

import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import dropout

from consensus.problem import require_logits


def made(forward):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(784, 3)

        def logits(self, images):
            return self.fc(images.flatten(1))

    Model.forward = forward
    return Model()


def check(model, count=2):
    images, labels = torch.rand(count, 1, 28, 28), torch.arange(count) % 3
    model.train()
    before = torch.get_rng_state()
    try:
        require_logits(model, images, labels, 3)
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
            "it turns 2 images into a dict with logits, loss, not logits (2, 3)",
        ),
        (
            lambda self, x: (self.logits(x), x) if self.training else self.logits(x),
            "it turns 2 images into a tuple of 2, not logits (2, 3) in training mode",
        ),
        (lambda self, x: None, "it turns 2 images into a NoneType, not logits (2, 3)"),
        (lambda self, x: self.logits(x).T, "it turns 2 images into (3, 2), not logits (2, 3)"),
        (
            lambda self, x: self.logits(x) if not self.training else self.logits(x).sum(),
            "it turns 2 images into (), not logits (2, 3) in training mode",
        ),
        (lambda self, x: self.logits(x).detach(), "its logits do not depend on its parameters"),
        (
            lambda self, x: self.logits(x) * (generator.random() if self.training else 1.0),
            "it draws random numbers that no seed determines, in a pass in training mode: draw",
        ),
        (
            lambda self, x: self.logits(x) * generator.random(),
            "it draws random numbers that no seed determines, in a pass: draw from the global",
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
