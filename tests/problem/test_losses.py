"""Losses and metrics by their definitions, on outputs of each shape that they take."""

import math
import re

import pytest
import torch

from consensus.problem import LOSSES, Dataset, Loss, Metric

F64 = torch.float64


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def nll(logits, label):
    """-log softmax(logits)[label], from the definition."""
    return math.log(sum(math.exp(x) for x in logits)) - logits[label]


def test_cross_entropy_of_classes():
    logits, labels = random(4, 3), torch.tensor([0, 2, 1, 1])
    loss = LOSSES["cross_entropy"]
    rows = list(zip(logits.tolist(), labels.tolist(), strict=True))
    assert loss(logits, labels).tolist() == pytest.approx([nll(x, y) for x, y in rows])
    wrong = [100.0 * (x.index(max(x)) != y) for x, y in rows]
    assert loss.metrics["error"].function(logits, labels).tolist() == wrong
    assert loss.best == ("error", "min")


@pytest.mark.parametrize("size", [(5, 3), (3, 3)])  # T = C: the name alone tells the axes apart
@pytest.mark.parametrize("name", ["cross_entropy", "token_cross_entropy"])
def test_cross_entropy_of_tokens_is_the_mean_over_the_known_positions(size, name):
    positions, classes = size
    logits = random(2, positions, classes)  # (B, T, C)
    labels = torch.arange(2 * positions).view(2, positions) % classes
    labels[1, 1:] = -100
    given = logits.mT if name == "cross_entropy" else logits
    loss = LOSSES[name]
    expected, errors = [], []
    for rows, own in zip(logits.tolist(), labels.tolist(), strict=True):
        known = [(x, y) for x, y in zip(rows, own, strict=True) if y != -100]
        expected.append(sum(nll(x, y) for x, y in known) / len(known))
        errors.append(100 * sum(x.index(max(x)) != y for x, y in known) / len(known))
    assert loss(given, labels).tolist() == pytest.approx(expected)
    assert loss.metrics["error"].function(given, labels).tolist() == pytest.approx(errors)


def test_label_smoothing():
    """(1 - s) of the weight on the label, s on all classes equally."""
    logits, s = random(1, 3), 0.3
    found = LOSSES.make("cross_entropy", label_smoothing=s)(logits, torch.tensor([1]))
    row = logits[0].tolist()
    expected = (1 - s) * nll(row, 1) + s / 3 * sum(nll(row, c) for c in range(3))
    assert float(found) == pytest.approx(expected)


def test_squared_and_absolute_errors_are_means_over_coordinates():
    outputs, targets = random(3, 2, 4), random(3, 2, 4, seed=1)
    loss, apart = LOSSES["mse"], (outputs - targets).reshape(3, 8).tolist()
    squares = [sum(d * d for d in row) / 8 for row in apart]
    assert loss(outputs, targets).tolist() == pytest.approx(squares)
    assert loss.metrics["mse"].function(outputs, targets).tolist() == pytest.approx(squares)
    distances = [sum(abs(d) for d in row) / 8 for row in apart]
    assert loss.metrics["mae"].function(outputs, targets).tolist() == pytest.approx(distances)
    scalars = loss(outputs[:, 0, 0], targets[:, 0, 0])
    assert scalars.tolist() == pytest.approx([row[0] ** 2 for row in apart])


@pytest.mark.parametrize("kind", [F64, torch.int64, torch.bool])
def test_binary_cross_entropy_of_logits(kind):
    outputs, targets = random(3, 2), torch.tensor([[0, 1], [1, 1], [0, 0]])
    expected = [
        sum(math.log1p(math.exp(-x if y else x)) for x, y in zip(xs, ys, strict=True)) / 2
        for xs, ys in zip(outputs.tolist(), targets.tolist(), strict=True)
    ]
    loss = LOSSES["bce"]
    assert loss(outputs, targets.to(kind)).tolist() == pytest.approx(expected)
    wrong = [[(x > 0) != y for x, y in zip(*pair, strict=True)]
             for pair in zip(outputs.tolist(), targets.bool().tolist(), strict=True)]  # fmt: skip
    found = loss.metrics["error"].function(outputs, targets.to(kind))
    assert found.tolist() == [100.0 * sum(row) / 2 for row in wrong]


def test_targets_outside_the_interval_of_a_loss():
    loss = Loss(lambda x, y: x, interval=(0.0, 2.0))
    assert loss.outside((torch.tensor([0, 2]), {"b": torch.tensor([[0.5]])})) is None
    assert loss.outside((torch.zeros(2), torch.tensor([1, 3]))) == "go from 1 to 3; allowed: 0 to 2"
    assert loss.outside(torch.tensor([0.0, math.nan])) == "go from nan to nan; allowed: 0 to 2"
    assert Loss(lambda x, y: x).outside(torch.tensor([-9.0])) is None


def test_numbers_of_the_best_constant_output():
    """Equal probabilities and the largest class; the mean of the targets for squared errors."""
    x, labels = torch.zeros(5, 1), torch.tensor([0, 1, 1, 2, 1])
    classes = LOSSES["cross_entropy"].guess(Dataset((x, labels), (x, labels)))
    assert classes == pytest.approx({"loss": math.log(3), "error": 40.0})
    numbers = torch.tensor([[1.0, 0.0], [3.0, 0.0]])
    of_mse = LOSSES["mse"].guess(Dataset((x[:2], numbers), (x[:2], numbers)))
    assert of_mse == pytest.approx({"loss": 0.5, "mse": 0.5})
    tokens = labels[:4].view(2, 2)
    assert LOSSES["cross_entropy"].guess(Dataset((x[:2], tokens), (x[:2], tokens))) == {}


@pytest.mark.parametrize(
    ("name", "outputs", "targets", "found"),
    [
        ("mse", (4, 1), torch.zeros(4), "outputs float64 (4, 1), targets float32 (4,); allowed:"),
        ("bce", (4, 1), torch.zeros(4), "outputs float64 (4, 1), targets float32 (4,); allowed:"),
        ("cross_entropy", (2, 4, 9), torch.zeros(2, 4).long(), "(token_cross_entropy takes"),
        ("cross_entropy", (4, 3), torch.zeros(4), "targets float32 (4,); allowed: outputs (B, C"),
        ("cross_entropy", (4,), torch.zeros(4).long(), "outputs float64 (4,)"),
        ("mse", (4, 1), (torch.zeros(4),), "targets (float32 (4,)); allowed: a tensor of outputs"),
    ],
)
def test_shapes_that_would_broadcast_or_do_not_fit_are_refused(name, outputs, targets, found):
    with pytest.raises(ValueError, match=re.escape(found)):
        LOSSES[name](random(*outputs), targets)


def test_goals_and_options_are_checked():
    with pytest.raises(ValueError, match="`goal` is 'most'; allowed: min, max"):
        Metric(lambda x, y: x, goal="most")
    with pytest.raises(ValueError, match="a metric is called `loss`; allowed: other names"):
        Loss(lambda x, y: x, {"loss": Metric(lambda x, y: x)})
    with pytest.raises(ValueError, match=r"`label_smoothing` is 1\.5; allowed"):
        LOSSES.make("cross_entropy", label_smoothing=1.5)
    assert Loss(lambda x, y: x).best == ("loss", "min")
    assert Loss(lambda x, y: x, {"accuracy": Metric(lambda x, y: x, "max")}).best == (
        "accuracy",
        "max",
    )
