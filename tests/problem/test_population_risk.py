"""Gradients and evaluations of many models at once, against plain torch with one model at a time.

Then those of many configurations: minibatches, and the choice of the gradient method.
"""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy

from consensus.problem import (
    DATASETS,
    WAYS,
    BatchedRisk,
    Dataset,
    Minibatches,
    MinibatchRisk,
    PopulationRisk,
    Risk,
    Samples,
    Way,
    build_model,
)
from consensus.problem.population_risk import ConvolutionsAsProducts, convolve

SECONDS = "consensus.problem.population_risk._seconds_of"
K, B = 5, 3
CONVOLUTIONS = ("grouped", "products")


class Convolutions(nn.Module):
    """Strided, dilated, grouped and same-padded convolutions, and a parameter that is a number."""

    def __init__(self):
        super().__init__()
        self.strided = nn.Conv2d(1, 4, 3, stride=(2, 1), padding=(1, 2))
        self.holes = nn.Conv2d(4, 4, 3, dilation=2)
        self.groups = nn.Conv2d(4, 6, 2, groups=2, bias=False)
        self.same = nn.Conv2d(6, 2, 3, padding="same")
        self.fc = nn.LazyLinear(10)
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, images):
        x = self.groups(self.holes(self.strided(images)).tanh())
        return self.scale * self.fc(self.same(x).tanh().flatten(1))


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
@pytest.mark.parametrize("way", CONVOLUTIONS)
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


@pytest.mark.parametrize("way", CONVOLUTIONS)
@pytest.mark.parametrize("name", MODELS)
def test_evaluations_are_those_of_each_model_alone(name, way, monkeypatch):
    monkeypatch.setattr(
        "consensus.problem.population_risk.SAMPLES_AT_ONCE", 4 * K
    )  # several chunks
    risk = BatchedRisk(MODELS[name], "sum", way)
    points, images, labels = block(risk, seed=1)
    images, labels = images.flatten(0, 1), labels.flatten()
    found = risk.evaluate_each(points, Samples(images, labels))
    for k in range(K):
        logits = alone(MODELS[name], points[k])(images).detach()
        assert float(found[k, 0]) == pytest.approx(
            float(cross_entropy(logits, labels, reduction="sum")), rel=1e-12
        )
        assert float(found[k, 1]) == 100 * int((logits.argmax(1) != labels).sum())


def test_dropout_is_off_in_evaluations():
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.9), nn.Linear(784, 10)).double()
    risk = BatchedRisk(model, "sum", "grouped")
    points, images, labels = block(risk)
    first, second = (risk.evaluate_each(points, Samples(images[0], labels[0])) for _ in range(2))
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

    monkeypatch.setattr("consensus.problem.population_risk.convolve", counting)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(2 * 26 * 26, 3))
    with ConvolutionsAsProducts():
        inside = model(torch.ones(1, 1, 28, 28))
    assert len(calls) == 1
    torch.testing.assert_close(inside, model(torch.ones(1, 1, 28, 28)), rtol=1e-5, atol=1e-6)
    assert len(calls) == 1


# ---- many configurations


class Dropping(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(784, 3)
        self.drop = nn.Dropout(0.5)

    def forward(self, images):
        return self.fc(self.drop(images.flatten(1)))


def test_a_population_draws_like_separate_runs():
    """Seeds 7, 8, 7 with two workers each; dropout; configuration 1 is frozen after two draws."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(12, 1, 28, 28, generator=generator, dtype=torch.float64)
    labels = torch.arange(12) % 3
    dataset = Dataset((images, labels), (images, labels), 3)
    risk = Risk(Dropping().double(), "sum")
    points = torch.stack([risk.layout.flatten(risk.model) * (1 + i / 10) for i in range(6)])

    def sources(seed):
        return [Minibatches(torch.arange(12), 4, seed, worker) for worker in range(2)]

    def population():
        return PopulationRisk(risk, dataset, [7, 8, 7], {7: sources(7), 8: sources(8)})

    together = population()
    apart = [MinibatchRisk(risk, dataset, sources(seed)) for seed in (7, 8, 7)]
    for draw in range(5):
        active = [0, 1, 2] if draw < 2 else [0, 2]
        rows = [row for i in active for row in (2 * i, 2 * i + 1)]
        if draw == 3:  # from a checkpoint
            state, together = together.state_dict(), population()
            assert state["position"].tolist() == [[3, 3], [2, 2]]
            together.load_state_dict(state)
        together.select(torch.tensor(active))
        together.draw()
        found = together.gradient(points[rows])
        expected = [
            apart[i].gradient(points[2 * i : 2 * i + 2].clone(), apart[i].draw()) for i in active
        ]
        assert torch.equal(found, torch.cat(expected))


@pytest.fixture
def make_oracle():
    """Makes the risk of 4 configurations of 3 workers each: 12 logistic models."""
    dataset = DATASETS["digits"].to("cpu", torch.float64)
    risk = Risk(build_model("logistic", 0, torch.float64), "sum")
    everything = torch.arange(len(dataset.train))

    def make():
        sources = {s: [Minibatches(everything, 20, s, j) for j in range(3)] for s in (0, 1)}
        return PopulationRisk(risk, dataset, [0, 0, 1, 1], sources)

    return make


def points_of(oracle):
    return oracle.risk.layout.flatten(oracle.risk.model).repeat(12, 1)


def test_the_fastest_method_is_chosen_and_kept_by_a_checkpoint(make_oracle, monkeypatch):
    oracle = make_oracle()
    points = points_of(oracle)
    costs = {"one_by_one": 3.0, "grouped": 2.0, "products": 1.0}  # per model, in any number

    def seconds(risk, points, images, labels, limit, record):
        assert images.shape[:2] == labels.shape == (len(points), 20)
        tried.append(len(points))
        return costs[getattr(risk, "convolutions", "one_by_one")] * (len(points) + 1.0)

    tried = []
    monkeypatch.setattr(SECONDS, seconds)
    assert oracle.fastest_way(points) == Way("products", 12)
    assert tried == [8, 8, 12, 8, 12]
    assert oracle.fastest_way(points, ("one_by_one", "grouped")) == Way("grouped", 12)
    assert oracle.fastest_way(points, ("one_by_one",)) == Way()
    monkeypatch.setattr("consensus.problem.population_risk.LARGEST", 9 * points.shape[1])
    assert oracle.fastest_way(points) == Way("products", 8)
    oracle.way = Way("grouped", 7)
    other = make_oracle()
    other.load_state_dict(oracle.state_dict())
    assert other.way == oracle.way


def test_a_method_that_runs_out_of_memory_is_not_chosen(make_oracle, monkeypatch):
    def seconds(risk, points, images, labels, limit, record):
        if len(points) > 8:
            raise torch.OutOfMemoryError("no")
        return 1.0 if hasattr(risk, "convolutions") else 2.0

    monkeypatch.setattr(SECONDS, seconds)
    oracle = make_oracle()
    assert oracle.fastest_way(points_of(oracle)) == Way("grouped", 8)


class Branching(nn.Module):
    """Branches on its input, which `vmap` does not support."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(784, 10)

    def forward(self, images):
        x = images.flatten(1)
        return self.fc(x) if x.sum() > 0 else self.fc(-x)


def test_a_model_that_cannot_be_batched_is_evaluated_one_by_one():
    risk = Risk(Branching().double(), "sum")
    images, labels = torch.rand(40, 1, 28, 28, dtype=torch.float64), torch.arange(40) % 10
    dataset = Dataset((images, labels), (images, labels), 10)
    minibatches = [Minibatches(torch.arange(40), 5, 0, j) for j in range(2)]
    oracle = PopulationRisk(risk, dataset, [0] * 4, {0: minibatches})
    points = risk.layout.flatten(risk.model).repeat(8, 1)
    assert oracle.fastest_way(points) == Way()
    with pytest.raises(ValueError, match="vmap"):
        oracle.fastest_way(points, ("grouped",))


def test_the_recorded_call_is_measured(make_oracle):
    recorded = []

    def record(call):
        recorded.append(call)
        return call

    oracle = make_oracle()
    oracle.fastest_way(points_of(oracle), ("grouped",), record)
    assert len(recorded) == 2  # eight and twelve models


def test_measuring_draws_no_minibatches(make_oracle):
    oracle = make_oracle()
    before = oracle.state_dict()["position"]
    way = oracle.fastest_way(points_of(oracle))
    assert way.name in WAYS
    assert torch.equal(oracle.state_dict()["position"], before)


@pytest.mark.parametrize("wrong", [("vmap", 1), ("grouped", 0)])
def test_an_unknown_method_is_refused(wrong):
    with pytest.raises(ValueError, match="allowed: one_by_one, grouped, products, and a number"):
        Way(*wrong)
