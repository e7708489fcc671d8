"""Models against reference implementations, and their initialization."""

# ruff: noqa: NPY002  (users draw from it)

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import conv2d, linear, max_pool2d, relu

from consensus.core.flat import FlatLayout
from consensus.problem import MODELS, build_model
from consensus.registry import Registry


def images(count=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 1, 28, 28, dtype=torch.float64, generator=generator)


def flat(model):
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])


@pytest.fixture
def user_models(monkeypatch):
    """A table of models that a test may add to."""
    table = Registry("model")
    monkeypatch.setattr("consensus.problem.models.MODELS", table)
    return table


@pytest.mark.parametrize(
    ("name", "size", "layers"),
    [
        ("lenet5", 33_580, ((0, 520), (520, 25_570), (25_570, 33_580))),
        ("mlp", 785 * 256 + 257 * 128 + 129 * 10, None),
        ("logistic", 7_850, ((0, 7_850),)),
    ],
)
def test_size_and_layers(name, size, layers):
    model = build_model(name, seed=0, dtype=torch.float64)
    assert len(flat(model)) == size
    if layers is not None:
        assert FlatLayout.trainable(model).layers == layers
    assert model(images()).shape == (3, 10)


@pytest.mark.parametrize("name", list(MODELS))
def test_number_of_classes(name):
    model = build_model(name, seed=0, dtype=torch.float64, num_classes=7)
    assert model(images()).shape == (3, 7)


def test_lenet5_is_the_network_of_the_paper():
    """The logits and all gradients of the paper's order, ReLU before pooling, written out."""
    model = build_model("lenet5", seed=3, dtype=torch.float64)
    w1, b1, w2, b2, w3, b3 = [p.detach().clone().requires_grad_() for p in model.parameters()]
    x = images()
    x[:, :, 10:, :] = 0  # constant patches: the windows there are tied, as in MNIST's background
    hidden = max_pool2d(relu(conv2d(x, w1, b1)), 2)
    hidden = max_pool2d(relu(conv2d(hidden, w2, b2)), 2)
    expected = linear(hidden.reshape(3, 800), w3, b3)
    weights = torch.arange(30, dtype=torch.float64).view(3, 10)
    (weights * expected).sum().backward()
    (weights * model(x)).sum().backward()

    torch.testing.assert_close(model(x), expected)
    for parameter, reference in zip(model.parameters(), (w1, b1, w2, b2, w3, b3), strict=True):
        torch.testing.assert_close(parameter.grad, reference.grad)


@pytest.mark.parametrize("hidden", [(), (5,), [6, 4, 3]])
def test_mlp_is_affine_maps_with_relu_between(hidden):
    model = build_model("mlp", seed=1, dtype=torch.float64, hidden=hidden)
    values = [parameter.detach().numpy() for parameter in model.parameters()]
    assert [len(bias) for bias in values[1::2]] == [*hidden, 10]
    expected = images().numpy().reshape(3, 784)
    for i, (weight, bias) in enumerate(zip(values[::2], values[1::2], strict=True)):
        expected = expected @ weight.T + bias
        if i < len(hidden):
            expected = expected.clip(min=0)
    torch.testing.assert_close(model(images()).detach(), torch.from_numpy(expected))


def test_logistic_is_one_affine_map():
    model = build_model("logistic", seed=0, dtype=torch.float64)
    weight, bias = model.parameters()
    torch.testing.assert_close(model(images()), images().reshape(3, 784) @ weight.T + bias)


def test_the_start_depends_on_the_seed_only():
    before = torch.get_rng_state()
    start = flat(build_model("lenet5", 0, torch.float32))
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    again = flat(build_model("lenet5", 0, torch.float32))
    other = flat(build_model("lenet5", 1, torch.float32))
    assert torch.equal(start, again)
    assert not torch.equal(start, other)
    # torch's default for a convolution is uniform within 1 / sqrt(fan in); conv1 has fan in 25
    assert float(start[:520].abs().max()) <= 1 / 5
    assert float(start[:520].abs().max()) > 0.19


def test_both_precisions_start_at_the_same_point():
    single = build_model("lenet5", 0, torch.float32)
    double = build_model("lenet5", 0, torch.float64)
    for a, b in zip(single.parameters(), double.parameters(), strict=True):
        assert (a.dtype, b.dtype) == (torch.float32, torch.float64)
        assert torch.equal(a.double(), b)


@pytest.mark.parametrize("hidden", [(0,), (4, -1), (2.5,), ("wide",)])
def test_mlp_refuses_widths(hidden):
    with pytest.raises(ValueError, match=r"`model\.hidden` is .*positive integers"):
        build_model("mlp", 0, torch.float32, hidden=hidden)


def test_unknown_names_and_options():
    with pytest.raises(ValueError, match=r"lenet6.*lenet5"):
        build_model("lenet6", 0, torch.float32)
    with pytest.raises(ValueError, match=r"hiden.*hidden"):
        build_model("mlp", 0, torch.float32, hiden=(3,))


class Scaled(nn.Linear):
    def __init__(self, factor):
        super().__init__(3, 2)
        with torch.no_grad():
            self.weight.mul_(factor)


@pytest.mark.parametrize("draw", [np.random.rand, random.random, np.random.randn])
def test_the_start_is_seeded_whatever_generator_it_draws_from(user_models, draw):
    user_models.register("scaled")(lambda: Scaled(draw()))
    before = random.getstate(), str(np.random.get_state()), torch.get_rng_state()
    first, again, other = (build_model("scaled", seed, torch.float32) for seed in (3, 3, 4))
    assert torch.equal(flat(first), flat(again))
    assert not torch.equal(flat(first)[:6], flat(other)[:6])
    assert before[:2] == (random.getstate(), str(np.random.get_state()))
    assert torch.equal(before[2], torch.get_rng_state())


@pytest.mark.parametrize("draw", [np.random.default_rng().random, random.SystemRandom().random])
def test_a_start_that_no_seed_determines_is_refused(user_models, draw):
    user_models.register("scaled")(lambda: Scaled(draw()))
    with pytest.raises(ValueError, match="model `scaled` starts with another `weight` each time"):
        build_model("scaled", 0, torch.float32)


def test_buffers_and_frozen_parameters_are_kept(user_models):
    def frozen():
        model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(784, 10))
        model[2].bias.requires_grad_(False)
        return model

    user_models.register("frozen")(frozen)
    model = build_model("frozen", 0, torch.float64)
    assert not model[2].bias.requires_grad
    assert model[1].running_mean.dtype == torch.float64
    assert model[1].num_batches_tracked.dtype == torch.int64


def test_lazy_parameters_are_refused(user_models):
    user_models.register("lazy")(lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(10)))
    with pytest.raises(ValueError, match=r"`lazy` has the lazy parameter `1\.weight`; give its"):
        build_model("lazy", 0, torch.float32)


def test_a_model_without_parameters_is_refused(user_models):
    user_models.register("empty")(lambda: nn.Flatten())
    with pytest.raises(ValueError, match="`empty` has no parameters"):
        build_model("empty", 0, torch.float32)
