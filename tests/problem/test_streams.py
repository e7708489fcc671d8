"""Random streams: functions of (seed, purpose, keys), pairwise independent."""

# ruff: noqa: NPY002  (users draw from it)

import hashlib
import random
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from consensus.problem import build_model, stream, stream_seed
from consensus.problem.calls import draws_random_numbers
from consensus.problem.streams import restored_generators


def test_seed_is_the_hash_of_its_name():
    digest = hashlib.blake2b(b"(7, 'minibatch', (2, 0))", digest_size=8).hexdigest()
    assert stream_seed(7, "minibatch", 2, 0) == int(digest, 16) // 2
    assert 0 <= stream_seed(7, "minibatch", 2, 0) < 2**63


def test_the_same_name_gives_the_same_stream_whatever_was_drawn_before():
    first = torch.rand(100, generator=stream(0, "minibatch", 3, 1))
    torch.rand(3)
    torch.rand(10, generator=stream(0, "minibatch", 3, 0))
    torch.testing.assert_close(
        torch.rand(100, generator=stream(0, "minibatch", 3, 1)), first, rtol=0, atol=0
    )


def test_streams_depend_on_seed_purpose_and_keys():
    names = [
        (0, "init"),
        (1, "init"),
        (0, "partition"),
        (0, "minibatch", 0),
        (0, "minibatch", 0, 0),
        (0, "minibatch", 1, 0),
        (0, "minibatch", 0, 1),
        (0, "minibatch", 1, 23),
        (0, "minibatch", 12, 3),
        (0, "minibatch", -1),
    ]
    assert len({stream_seed(*name) for name in names}) == len(names)
    draws = [torch.rand(1000, dtype=torch.float64, generator=stream(*name)) for name in names]
    for first, second in pairwise(draws):
        # independent uniforms: the mean of the product is 1/4, with a standard error near 0.007
        assert abs(float((first * second).mean()) - 0.25) < 0.035


def test_numpy_integers_name_the_same_stream():
    assert stream_seed(np.int64(3), "init", np.int32(4)) == stream_seed(3, "init", 4)


def test_the_stream_is_on_the_cpu_and_leaves_the_global_one_alone():
    before = torch.get_rng_state()
    assert stream(0, "init").device == torch.device("cpu")
    assert torch.equal(torch.get_rng_state(), before)


class FunctionalDropout(nn.Module):
    def forward(self, x):
        return functional.dropout(x, 0.5, self.training)


class StochasticDepth(nn.Module):
    """Skips its layer at random; contains no dropout."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return x + self.fc(x) if not self.training or torch.rand(()) < 0.5 else x


class AttentionWithDropout(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, dropout=0.5)

    def forward(self, x):
        return self.attention(x, x, x)[0]


class LstmWithDropout(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(4, 4, num_layers=2, dropout=0.5)

    def forward(self, x):
        return self.lstm(x)[0]


class DrawsFromNumpy(nn.Module):
    def forward(self, x):
        return x * np.random.rand() if self.training else x


class DrawsFromPython(nn.Module):
    def forward(self, x):
        return x * random.random() if self.training else x


RANDOM = [
    DrawsFromNumpy,
    DrawsFromPython,
    lambda: nn.Dropout(0.5),
    lambda: nn.Sequential(nn.Linear(4, 4), nn.RReLU()),
    FunctionalDropout,
    StochasticDepth,
    AttentionWithDropout,
    LstmWithDropout,
]


@pytest.mark.parametrize("make", RANDOM)
def test_the_probe_finds_random_models(make):
    model, before = make(), torch.get_rng_state()
    assert draws_random_numbers(model, torch.rand(3, 4))
    assert not draws_random_numbers(model.eval(), torch.rand(3, 4))
    torch.set_rng_state(before)


@pytest.mark.parametrize("count", [1, 312, 624])
def test_the_probe_finds_draws_that_fill_whole_blocks_of_numpy(count):
    """The generator makes 624 words at once, two of them for each number: its position returns."""
    np.random.seed(0)
    before = np.random.get_state()
    with restored_generators() as advanced:
        assert not advanced()
        np.random.rand(count)
        assert advanced()
    np.testing.assert_equal(np.random.get_state(), before)


def test_the_probe_leaves_the_generator_and_the_model_alone():
    model, images = StochasticDepth(), torch.rand(3, 4)
    weights, before = model.fc.weight.clone(), torch.get_rng_state()
    assert draws_random_numbers(model, images)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(model.fc.weight, weights)
    assert model.fc.weight.grad is None


@pytest.mark.parametrize("name", ["lenet5", "mlp", "logistic"])
def test_the_models_of_the_paper_are_deterministic(name):
    model = build_model(name, seed=0, dtype=torch.float32)
    assert not draws_random_numbers(model, torch.rand(2, 1, 28, 28))
