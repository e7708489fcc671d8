"""Models with buffers, frozen and tied parameters and several inputs, beside plain torch."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from consensus.problem import LOSSES, Dataset, Minibatches, MinibatchRisk, Risk, Samples
from consensus.problem.calls import RunningBuffers, call, evaluation_mode, running_buffers

F64 = torch.float64
WORKERS, BATCH = 3, 4


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


class Replacing(nn.Module):
    """Its buffer is replaced and not changed in place."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 3)
        self.register_buffer("seen", torch.zeros(6))
        self.register_buffer("constant", torch.ones(6))

    def forward(self, x):
        if self.training:
            self.seen = 0.5 * self.seen + x.detach().mean(0)
        return self.fc((x - self.seen) * self.constant)


def with_batchnorm():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)).double()


def replacing():
    torch.manual_seed(0)
    return Replacing().double()


def oracle_of(model, loss=None):
    x, labels = random(20, 6), torch.arange(20) % 3
    dataset = Dataset((x, labels), (x, labels))
    sources = [Minibatches(torch.arange(20), BATCH, 0, j) for j in range(WORKERS)]
    return MinibatchRisk(Risk(model, "sum", loss), dataset, sources)


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (with_batchnorm, ("1.running_mean", "1.running_var", "1.num_batches_tracked")),
        (replacing, ("seen",)),
    ],
)
def test_every_worker_has_running_buffers_of_its_own(make, names):
    """Each beside a copy of the module that is trained by plain torch."""
    model = make()
    oracle = oracle_of(model)
    assert tuple(oracle.running.rows) == names
    plain = [copy.deepcopy(model) for _ in range(WORKERS)]
    points = oracle.risk.layout.flatten(model).repeat(WORKERS, 1)
    points += 0.1 * random(*points.shape, seed=1)
    for _ in range(3):
        inputs, labels = oracle.draw()
        found = oracle.gradient(points.clone(), (inputs, labels))
        for j, module in enumerate(plain):
            nn.utils.vector_to_parameters(points[j], module.parameters())
            module.zero_grad()
            cross_entropy(module(inputs[j]), labels[j], reduction="sum").backward()
            expected = torch.cat([p.grad.flatten() for p in module.parameters()])
            torch.testing.assert_close(found[j], expected, rtol=1e-12, atol=1e-12)
            for name in names:
                torch.testing.assert_close(oracle.running.rows[name][j], module.get_buffer(name))
    mean = oracle.running.unflatten(oracle.running.sums() / WORKERS)
    for name in names:
        expected = torch.stack([m.get_buffer(name).double() for m in plain]).mean(0)
        torch.testing.assert_close(mean[name].double(), expected)
        assert mean[name].dtype == model.get_buffer(name).dtype
    for name, buffer in make().named_buffers():
        assert torch.equal(model.get_buffer(name), buffer), "the model itself is as before"


def test_evaluations_use_the_buffers_of_u():
    model = with_batchnorm()
    oracle = oracle_of(model)
    for _ in range(2):
        points = oracle.risk.layout.flatten(model).repeat(WORKERS, 1)
        oracle.gradient(points, oracle.draw())
    risk, point = oracle.risk, oracle.risk.layout.flatten(model)
    risk.buffers = oracle.running.unflatten(oracle.running.sums() / WORKERS)
    plain = with_batchnorm()
    plain.load_state_dict(risk.state_dict(point))
    plain.eval()
    test = oracle.dataset.test
    expected = cross_entropy(plain(test.inputs), test.targets, reduction="sum")
    torch.testing.assert_close(risk.evaluate(point, test, chunk=7)[0], expected.detach())
    value, gradient = risk.total(point, test)
    expected.backward()
    torch.testing.assert_close(value, expected.detach())
    of_plain = torch.cat([p.grad.flatten() for p in plain.parameters()])
    torch.testing.assert_close(gradient, of_plain)


def test_the_state_of_the_buffers_is_a_row_for_each_worker():
    oracle, other = oracle_of(with_batchnorm()), oracle_of(with_batchnorm())
    points = oracle.risk.layout.flatten(oracle.risk.model).repeat(WORKERS, 1)
    oracle.gradient(points, oracle.draw())
    state = {key: value.clone() for key, value in oracle.state_dict().items()}
    assert all(len(rows) == WORKERS for rows in state.values())
    assert set(oracle_of(nn.Linear(6, 3).double()).state_dict()) == {"position"}
    other.load_state_dict(state)
    assert all(torch.equal(value, state[key]) for key, value in other.state_dict().items())


def test_a_part_in_evaluation_mode_stays_there():
    """BatchNorm that the user keeps in evaluation mode has no running statistics."""
    model = with_batchnorm()
    model[1].eval()
    assert running_buffers(model, random(4, 6)) == ()
    with evaluation_mode(model):
        assert not model[0].training
    assert model[0].training
    assert not model[1].training


def test_frozen_parameters_are_constants():
    model = with_batchnorm()
    model[0].weight.requires_grad_(False)
    risk = Risk(model, "sum")
    assert risk.layout.size == sum(p.numel() for p in model.parameters()) - 30
    state = risk.state_dict(risk.layout.flatten(model) + 1.0)
    assert torch.equal(state["0.weight"], model[0].weight)
    assert torch.equal(state["0.bias"], model[0].bias + 1.0)
    sizes = [tensor.untyped_storage().nbytes() for tensor in state.values()]
    assert sizes == [tensor.nbytes for tensor in state.values()], "no views of the whole"


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.out = nn.Linear(4, 7, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, tokens):
        return self.out(self.embedding(tokens))


def test_a_tied_parameter_is_one():
    torch.manual_seed(0)
    model, tokens = Tied().double(), torch.tensor([[[0, 3, 6], [1, 1, 2]]])
    risk = Risk(model, "sum", LOSSES["token_cross_entropy"])
    assert risk.layout.size == 28
    found = risk.gradient(risk.layout.flatten(model).unsqueeze(0), tokens, tokens)
    losses = cross_entropy(model(tokens[0]).mT, tokens[0], reduction="none")
    losses.mean(1).sum().backward()
    torch.testing.assert_close(found[0], model.embedding.weight.grad.flatten())
    state = risk.state_dict(torch.arange(28.0, dtype=F64))
    assert list(state) == ["embedding.weight", "out.weight"]
    assert torch.equal(state["embedding.weight"], state["out.weight"])
    assert state["out.weight"].flatten().tolist() == list(range(28))


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(2, 3), nn.Embedding(5, 3)

    def forward(self, numbers, word):
        return {"sum": self.a(numbers) + self.b(word)}


@pytest.mark.parametrize("kind", ["tuple", "dict"])
def test_several_inputs_and_outputs(kind):
    torch.manual_seed(0)
    model, numbers, word = TwoInputs().double(), random(8, 2), torch.arange(8) % 5
    inputs = (numbers, word) if kind == "tuple" else {"word": word, "numbers": numbers}
    targets = {"goal": random(8, 3, seed=2)}
    loss = LOSSES["mse"]
    own = type(loss)(lambda outputs, given: loss(outputs["sum"], given["goal"]))
    risk, samples = Risk(model, "mean", own), Samples(inputs, targets)
    value = mse_loss(model(numbers, word)["sum"], targets["goal"])
    torch.testing.assert_close(risk.evaluate(risk.layout.flatten(model), samples, 3)[0] / 8, value)
    sources = [Minibatches(torch.arange(8), 8, 0, 0)]
    oracle = MinibatchRisk(risk, Dataset(samples, samples), sources)
    found = oracle.gradient(risk.layout.flatten(model).unsqueeze(0), oracle.draw())
    value.backward()
    torch.testing.assert_close(found[0], torch.cat([p.grad.flatten() for p in model.parameters()]))


def test_a_recurrent_network():
    """nn.LSTM keeps a list of its weights beside its parameters."""
    torch.manual_seed(0)
    model = nn.LSTM(2, 3, batch_first=True).double()
    x, y = random(1, 4, 5, 2), random(1, 4, 5, 3, seed=1)
    own = type(LOSSES["mse"])(lambda outputs, goal: (outputs[0] - goal).square().sum((1, 2)))
    risk = Risk(model, "sum", own)
    point = risk.layout.flatten(model) + 0.1
    found = risk.gradient(point.unsqueeze(0), x, y)
    nn.utils.vector_to_parameters(point, model.parameters())
    (model(x[0])[0] - y[0]).square().sum().backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(found[0], expected)


def test_bfloat16_is_that_of_autocast():
    torch.manual_seed(0)
    model, x, labels = nn.Linear(6, 3), random(1, 8, 6).float(), torch.arange(8).unsqueeze(0) % 3
    risk = Risk(model, "sum")
    risk.low_precision = True
    found = risk.gradient(risk.layout.flatten(model).unsqueeze(0), x, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(x[0])
    cross_entropy(outputs.float(), labels[0], reduction="sum").backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert torch.equal(found[0], expected)
    assert found.dtype == torch.float32
    risk.low_precision = False
    exact = risk.gradient(risk.layout.flatten(model).unsqueeze(0), x, labels)
    assert not torch.equal(found, exact)
    torch.testing.assert_close(found, exact, rtol=0.05, atol=0.05)


def test_no_buffers():
    assert not RunningBuffers(nn.Linear(2, 2), (), 3)
    assert call(nn.Linear(2, 2), {}, torch.zeros(1, 2)).shape == (1, 2)
