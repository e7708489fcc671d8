"""Batched gradients and evaluations, against plain torch with one model at a time."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy

from consensus.problem import BatchedRisk, build_model
from consensus.problem.batched import ConvolutionsAsProducts, convolve

K, B = 5, 3
WAYS = ("grouped", "products")


class Convolutions(nn.Module):
    """Strided, dilated, grouped and same-padded convolutions."""

    def __init__(self):
        super().__init__()
        self.strided = nn.Conv2d(1, 4, 3, stride=(2, 1), padding=(1, 2))
        self.holes = nn.Conv2d(4, 4, 3, dilation=2)
        self.groups = nn.Conv2d(4, 6, 2, groups=2, bias=False)
        self.same = nn.Conv2d(6, 2, 3, padding="same")
        self.fc = nn.LazyLinear(10)

    def forward(self, images):
        x = self.groups(self.holes(self.strided(images)).tanh())
        return self.fc(self.same(x).tanh().flatten(1))


def models():
    special = Convolutions().double()
    special(torch.zeros(1, 1, 28, 28, dtype=torch.float64))
    named = {name: build_model(name, 0, torch.float64) for name in ("lenet5", "mlp", "logistic")}
    return named | {"convolutions": special}


MODELS = models()


def block(risk, seed=0):
    random = torch.Generator().manual_seed(seed)
    points = torch.stack([risk.layout.flatten(risk.model)] * K)
    points += 0.1 * torch.randn(points.shape, generator=random, dtype=torch.float64)
    images = torch.rand(K, B, 1, 28, 28, generator=random, dtype=torch.float64)
    return points, images, torch.randint(10, (K, B), generator=random)


def alone(model, point):
    own = copy.deepcopy(model)
    torch.nn.utils.vector_to_parameters(point, own.parameters())
    return own


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_gradients_and_losses_are_those_of_each_model_alone(name, way, reduction):
    risk = BatchedRisk(MODELS[name], reduction, way)
    points, images, labels = block(risk)
    kept = points.clone()
    found = risk.gradient(points, images, labels)
    assert torch.equal(points, kept)
    for k in range(K):
        model = alone(MODELS[name], points[k])
        loss = cross_entropy(model(images[k]), labels[k], reduction=reduction)
        loss.backward()
        expected = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
        torch.testing.assert_close(found[k], expected, rtol=1e-10, atol=1e-12)
        assert float(risk.losses[k]) == pytest.approx(float(loss.detach()), rel=1e-12)
    with torch.no_grad():
        assert risk.gradient(points, images, labels, out=points) is points
    assert torch.equal(points, found)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_evaluations_are_those_of_each_model_alone(name, way, monkeypatch):
    monkeypatch.setattr("consensus.problem.batched.IMAGES_AT_ONCE", 4 * K)  # several chunks
    risk = BatchedRisk(MODELS[name], "sum", way)
    points, images, labels = block(risk, seed=1)
    images, labels = images.flatten(0, 1), labels.flatten()
    found = risk.evaluate_each(points, images, labels)
    for k in range(K):
        logits = alone(MODELS[name], points[k])(images).detach()
        assert float(found[k, 0]) == pytest.approx(
            float(cross_entropy(logits, labels, reduction="sum")), rel=1e-12
        )
        assert float(found[k, 1]) == int((logits.argmax(1) != labels).sum())


def test_dropout_is_off_in_evaluations():
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.9), nn.Linear(784, 10)).double()
    risk = BatchedRisk(model, "sum", "grouped")
    points, images, labels = block(risk)
    first, second = (risk.evaluate_each(points, images[0], labels[0]) for _ in range(2))
    assert torch.equal(first, second)
    assert model.training


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    size=st.tuples(st.integers(4, 9), st.integers(4, 9)),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.one_of(st.integers(1, 3), st.tuples(st.integers(1, 3), st.integers(1, 3))),
    padding=st.one_of(st.integers(0, 2), st.tuples(st.integers(0, 2), st.integers(0, 2))),
    channels=st.integers(1, 3),
    bias=st.booleans(),
)
def test_convolve_is_conv2d(size, kernel, stride, padding, channels, bias):
    random = torch.Generator().manual_seed(0)

    def noise(*shape):
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    image, weight = noise(2, channels, *size), noise(5, channels, *kernel)
    offset = noise(5) if bias else None
    expected = torch.conv2d(image, weight, offset, stride, padding)
    found = convolve(image, weight, offset, stride, padding)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def test_only_convolutions_of_images_are_replaced(monkeypatch):
    calls = []

    def counting(*args):
        calls.append(args)
        return convolve(*args)

    monkeypatch.setattr("consensus.problem.batched.convolve", counting)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(2 * 26 * 26, 3))
    with ConvolutionsAsProducts():
        inside = model(torch.ones(1, 1, 28, 28))
    assert len(calls) == 1
    torch.testing.assert_close(inside, model(torch.ones(1, 1, 28, 28)), rtol=1e-5, atol=1e-6)
    assert len(calls) == 1
