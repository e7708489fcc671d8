"""The risk against a softmax regression by hand, plain autograd, and finite differences."""

# ruff: noqa: NPY002  (users draw from it)

import math
import random as rng

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, dropout

from consensus.problem import (
    Dataset,
    Minibatches,
    MinibatchRisk,
    Risk,
    Samples,
    build_model,
)

K, B = 3, 6


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, dtype=torch.float64, generator=generator)


def problem(name, seed=0):
    """A model, K points around its start (K, n), and a minibatch for each."""
    model = build_model(name, seed=seed, dtype=torch.float64)
    start = nn.utils.parameters_to_vector(model.parameters()).detach()
    points = start + 0.1 * (random(K, len(start), seed=1) - 0.5)
    labels = (10 * random(K, B, seed=2)).long()
    return model, points, random(K, B, 1, 28, 28, seed=3), labels


def softmax_regression(point, images, labels):
    """Summed loss and its gradient for `logistic`, from the formulas p = softmax, (p - e) x^T."""
    x = images.reshape(len(images), 784)
    weight, bias = point[:7840].view(10, 784), point[7840:]
    scores = torch.exp(x @ weight.T + bias)
    p = scores / scores.sum(dim=1, keepdim=True)
    rows = torch.arange(len(labels))
    loss = -torch.log(p[rows, labels]).sum()
    p[rows, labels] -= 1
    return loss, torch.cat([(p.T @ x).reshape(-1), p.sum(dim=0)])


@pytest.mark.parametrize(("reduction", "scale"), [("sum", 1.0), ("mean", 1 / B)])
def test_gradient_of_softmax_regression_by_hand(reduction, scale):
    model, points, images, labels = problem("logistic")
    risk = Risk(model, reduction)
    gradients = risk.gradient(points, images, labels)
    assert gradients.shape == points.shape
    assert risk.losses.shape == (K,)
    assert not risk.losses.requires_grad
    assert not gradients.requires_grad
    for k in range(K):
        loss, gradient = softmax_regression(points[k], images[k], labels[k])
        torch.testing.assert_close(gradients[k], scale * gradient)
        torch.testing.assert_close(risk.losses[k], scale * loss)


@pytest.mark.parametrize("name", ["lenet5", "mlp", "logistic"])
@pytest.mark.parametrize("workers", [1, K])
def test_gradient_is_that_of_the_plain_module(name, workers):
    model, points, images, labels = problem(name)
    gradients = Risk(model, "sum").gradient(points[:workers], images[:workers], labels[:workers])
    assert gradients.shape == (workers, points.shape[1])
    for k in range(workers):
        plain = build_model(name, seed=0, dtype=torch.float64)
        nn.utils.vector_to_parameters(points[k], plain.parameters())
        cross_entropy(plain(images[k]), labels[k], reduction="sum").backward()
        expected = torch.cat([parameter.grad.reshape(-1) for parameter in plain.parameters()])
        torch.testing.assert_close(gradients[k], expected)


def test_gradient_is_a_directional_derivative():
    model, points, images, labels = problem("lenet5")
    risk = Risk(model, "sum")
    direction = random(points.shape[1], seed=5) - 0.5
    gradient = risk.gradient(points[:1], images[:1], labels[:1])[0]
    h = 1e-6

    def loss(point):
        plain = build_model("lenet5", seed=0, dtype=torch.float64)
        nn.utils.vector_to_parameters(point, plain.parameters())
        return cross_entropy(plain(images[0]), labels[0], reduction="sum").detach()

    difference = (loss(points[0] + h * direction) - loss(points[0] - h * direction)) / (2 * h)
    torch.testing.assert_close(gradient @ direction, difference, rtol=1e-6, atol=1e-6)


def test_gradient_has_no_side_effect_but_losses():
    model, points, images, labels = problem("lenet5")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    kept = points.clone()
    risk = Risk(model, "sum")
    first = risk.gradient(points, images, labels)
    second = risk.gradient(points, images, labels)
    assert torch.equal(first, second)
    assert torch.equal(points, kept)
    assert not points.requires_grad
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_gradient_works_under_no_grad():
    model, points, images, labels = problem("logistic")
    with torch.no_grad():
        gradients = Risk(model, "sum").gradient(points, images, labels)
    torch.testing.assert_close(gradients[2], softmax_regression(points[2], images[2], labels[2])[1])


def test_a_gradient_does_not_depend_on_other_workers():
    model, points, images, labels = problem("lenet5")
    risk = Risk(model, "sum")
    together = risk.gradient(points, images, labels)
    alone = [risk.gradient(points[k, None], images[k, None], labels[k, None]) for k in range(K)]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("chunk", [1, 7, 18, 1000])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_evaluate_sums_the_loss_and_counts_errors(chunk, reduction):
    model, points, images, labels = problem("logistic")
    images, labels = images.flatten(0, 1), labels.flatten()  # 18 images
    point = points[0].clone().requires_grad_()
    result = Risk(model, reduction).evaluate(point, Samples(images, labels), chunk=chunk)
    assert result.shape == (2,)
    assert result.dtype == torch.float64
    assert not result.requires_grad
    torch.testing.assert_close(result[0], softmax_regression(points[0], images, labels)[0])
    scores = images.reshape(18, 784) @ points[0, :7840].view(10, 784).T + points[0, 7840:]
    wrong = sum(scores[i].tolist().index(max(scores[i])) != labels[i] for i in range(18))
    assert 0 < wrong <= 18
    assert int(result[1]) == 100 * wrong  # the sum of percents


def test_evaluate_keeps_small_losses_in_single_precision():
    """A margin m of one logit over nine others at 0 costs log(1 + 9 exp(-m)); here 1.9e-8 each."""
    model = build_model("logistic", seed=0, dtype=torch.float32)
    point = torch.zeros(7850)
    point[7840] = 20.0
    images, labels = torch.zeros(5000, 1, 28, 28), torch.zeros(5000, dtype=torch.int64)
    loss, wrong = Risk(model, "sum").evaluate(point, Samples(images, labels)).tolist()
    assert loss == pytest.approx(5000 * math.log1p(9 * math.exp(-20)), rel=1e-6)
    assert wrong == 0


def test_evaluate_turns_dropout_off_and_back_on():
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(784, 10)).double()
    risk = Risk(model, "sum")
    point = random(7850, seed=4) / 100
    images, labels = random(8, 1, 28, 28, seed=6), torch.arange(8)
    expected, _ = softmax_regression(point, images, labels)
    torch.testing.assert_close(risk.evaluate(point, Samples(images, labels))[0], expected)
    assert model.training
    assert model[1].training


def test_reduction_is_checked():
    message = r"`algorithm\.loss_reduction` is 'max'; allowed: sum, mean"
    with pytest.raises(ValueError, match=message):
        Risk(build_model("logistic", seed=0, dtype=torch.float64), "max")


def test_minibatch_risk_gives_each_worker_its_own_samples():
    model, points, _, _ = problem("logistic")
    pool = Dataset(
        train=Samples(random(40, 1, 28, 28, seed=7), torch.arange(40) % 10),
        test=Samples(random(2, 1, 28, 28), torch.tensor([0, 1])),
        num_classes=10,
    )
    shards = [torch.arange(10), torch.arange(10, 40), torch.arange(0, 40, 2)]
    oracle = MinibatchRisk(
        Risk(model, "sum"), pool, [Minibatches(s, B, 0, j) for j, s in enumerate(shards)]
    )
    twins = [Minibatches(shard, B, 0, j) for j, shard in enumerate(shards)]
    for _ in range(4):
        images, labels = oracle.draw()
        assert images.shape == (K, B, 1, 28, 28)
        assert labels.shape == (K, B)
        gradients = oracle.gradient(points.clone(), (images, labels))  # overwritten
        for j, twin in enumerate(twins):
            chosen = twin.draw().tolist()
            expected_images = torch.stack([pool.train.inputs[i] for i in chosen])
            expected_labels = torch.tensor([i % 10 for i in chosen])
            assert torch.equal(images[j], expected_images)
            assert torch.equal(labels[j], expected_labels)
            loss, gradient = softmax_regression(points[j], expected_images, expected_labels)
            torch.testing.assert_close(gradients[j], gradient)
            torch.testing.assert_close(oracle.losses[j], loss)


def test_minibatch_risk_needs_one_batch_size():
    model, _, images, labels = problem("logistic")
    pool = Dataset((images[0], labels[0]), (images[0], labels[0]), num_classes=10)
    sources = [Minibatches(torch.arange(6), size, 0, 0) for size in (2, 3)]
    with pytest.raises(AssertionError, match="one batch size"):
        MinibatchRisk(Risk(model, "sum"), pool, sources)


class Dropping(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(784, 3)
        self.drop = nn.Dropout(0.5)

    def forward(self, images):
        return self.fc(self.drop(images.flatten(1)))


class FunctionallyDropping(Dropping):
    def forward(self, images):
        return self.fc(dropout(images.flatten(1), 0.5, self.training))


class NumpyDropping(Dropping):
    def mask(self):
        return torch.from_numpy(np.random.rand(784))

    def forward(self, images):
        return self.fc(images.flatten(1) * (self.mask() if self.training else 1.0))


class PythonDropping(Dropping):
    def forward(self, images):
        return self.fc(images.flatten(1) * (rng.random() if self.training else 1.0))


@pytest.mark.parametrize("model", [Dropping, FunctionallyDropping, NumpyDropping, PythonDropping])
def test_dropout_depends_on_seed_worker_and_draw_only(model):
    """The masks of worker 1 are the same alone, beside worker 0, and after a restart."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(12, 1, 28, 28, generator=generator, dtype=torch.float64)
    labels = torch.arange(12) % 3
    dataset = Dataset((images, labels), (images, labels), 3)
    risk = Risk(model().double(), "sum")
    point = risk.layout.flatten(risk.model)

    def gradients(workers, position, noise):
        sources = [Minibatches(torch.arange(12), 4, 7, worker) for worker in workers]
        for source in sources:
            source.position = position
        oracle = MinibatchRisk(risk, dataset, sources)
        torch.manual_seed(noise)  # the global state must not matter
        return oracle.gradient(point.repeat(len(workers), 1), oracle.draw())

    beside = gradients([0, 1], 5, noise=1)
    assert torch.equal(gradients([1], 5, noise=2)[0], beside[1])
    same_batch = [Minibatches(torch.arange(4), 4, 7, 0), Minibatches(torch.arange(4), 4, 7, 1)]
    oracle = MinibatchRisk(risk, dataset, same_batch)
    images, labels = oracle.draw()
    batch = images[:1].expand_as(images), labels[:1].expand_as(labels)
    first, second = oracle.gradient(point.repeat(2, 1), batch)
    assert not torch.equal(first, second), "workers have different masks"


class AlwaysDropping(Dropping):
    def forward(self, images):
        return self.fc(dropout(images.flatten(1), 0.5))


def test_a_model_that_is_random_in_evaluation_mode_has_one_evaluation():
    images, labels = random(12, 1, 28, 28), torch.arange(12) % 3
    dataset = Dataset((images, labels), (images, labels), 3)
    for model, random_evaluation in ((Dropping, False), (AlwaysDropping, True)):
        risk = Risk(model().double(), "sum")
        MinibatchRisk(risk, dataset, [Minibatches(torch.arange(12), 4, 7, 0)])
        assert risk.random_evaluation == random_evaluation
        point = risk.layout.flatten(risk.model)
        before = torch.get_rng_state()
        first = risk.evaluate(point, Samples(images, labels))
        assert torch.equal(torch.get_rng_state(), before)
        torch.rand(3)
        assert torch.equal(risk.evaluate(point, Samples(images, labels)), first)


class Skipping(nn.Module):
    """Uses `fc` always, `block` if `on`, and `spare` never."""

    def __init__(self):
        super().__init__()
        self.fc, self.block = nn.Linear(784, 3), nn.Linear(784, 784)
        self.spare, self.on = nn.Linear(5, 4), False

    def forward(self, images):
        x = images.flatten(1)
        return self.fc(self.block(x) if self.on else x)


@pytest.mark.parametrize("on", [False, True])
def test_parameters_that_a_pass_does_not_use_have_the_gradient_0(on):
    model = Skipping().double()
    model.on = on
    risk, images, labels = Risk(model, "sum"), random(1, 4, 1, 28, 28), torch.tensor([[0, 1, 2, 0]])
    point = risk.layout.flatten(model)
    found = risk.layout.unflatten(risk.gradient(point.unsqueeze(0), images, labels)[0])
    cross_entropy(model(images[0]), labels[0], reduction="sum").backward()
    for name, parameter in model.named_parameters():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(found[name], expected)
        assert (parameter.grad is None) == (
            name.startswith("spare") or ("block" in name and not on)
        )
