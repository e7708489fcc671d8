"""Flat vectors: a layer is one module with its weight and bias; what goes in comes out."""

import pytest
import torch
from torch import nn

from consensus.core.flat import FlatLayout, add_scaled, column, scaled

F32, F64 = torch.float32, torch.float64


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 3)
        self.scale = nn.Parameter(torch.randn(4))  # declared after, owned by the module itself
        self.linear2 = nn.Linear(3, 1, bias=False)


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(1, 2, 3)
        self.relu = nn.ReLU()
        self.inner = Inner()
        self.out = nn.Linear(1, 2)


def test_layers_are_modules_with_weight_and_bias():
    layout = FlatLayout.trainable(Outer())
    assert layout.layer_names == ("conv", "inner", "inner.linear", "inner.linear2", "out")
    assert layout.layers == ((0, 8), (8, 12), (12, 21), (21, 24), (24, 28))
    assert layout.size == 28
    assert layout.parameter_names == (
        "conv.weight", "conv.bias", "inner.scale", "inner.linear.weight", "inner.linear.bias",
        "inner.linear2.weight", "out.weight", "out.bias",
    )  # fmt: skip
    assert layout.shapes[:3] == ((2, 1, 3), (2,), (4,))


def test_order_is_that_of_named_parameters():
    """torch.nn.utils.parameters_to_vector goes by that order, so the two vectors are the same."""
    module = Outer()
    layout = FlatLayout.trainable(module)
    assert layout.parameter_names == tuple(name for name, _ in module.named_parameters())
    expected = nn.utils.parameters_to_vector(module.parameters()).detach()
    flat = layout.flatten(module)
    assert torch.equal(flat, expected)
    assert not flat.requires_grad
    flat += 1  # a copy
    assert torch.equal(layout.flatten(module), expected)


def test_a_module_that_is_one_layer():
    layout = FlatLayout.trainable(nn.Linear(3, 2))
    assert layout.layer_names == ("linear",)
    assert layout.layers == ((0, 8),)
    assert layout.parameter_names == ("weight", "bias")
    double = nn.Linear(3, 2, dtype=F64)
    assert FlatLayout.trainable(double).flatten(double).dtype == F64


def test_round_trips():
    module, layout = Outer(), FlatLayout.trainable(Outer())
    vector = torch.arange(28.0)
    parts = layout.unflatten(vector)
    assert parts["conv.bias"].tolist() == [6.0, 7.0]
    assert parts["inner.linear.weight"].tolist() == [[12.0, 13.0], [14.0, 15.0], [16.0, 17.0]]
    module.load_state_dict(parts)
    assert torch.equal(layout.flatten(module), vector)
    parts["out.bias"][1] = -1.0  # a view
    assert vector[27] == -1.0


def test_gradient_through_unflatten():
    """The gradient of a functional call is the flattened gradient of the parameters."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    layout, x = FlatLayout.trainable(module), torch.randn(5, 3)
    module(x).square().sum().backward()
    expected = torch.cat([parameter.grad.reshape(-1) for parameter in module.parameters()])
    vector = layout.flatten(module).requires_grad_()
    output = torch.func.functional_call(module, layout.unflatten(vector), (x,))
    (gradient,) = torch.autograd.grad(output.square().sum(), vector)
    torch.testing.assert_close(gradient, expected)


def test_unflatten_under_vmap():
    layout = FlatLayout.trainable(nn.Linear(2, 2))
    block = torch.arange(18.0).view(3, 6)
    sums = torch.func.vmap(lambda v: layout.unflatten(v)["bias"].sum())(block)
    assert sums.tolist() == [9.0, 21.0, 33.0]


@pytest.mark.parametrize("where", ["other module", "same module", "parent", "twice"])
def test_a_tied_parameter_counts_in_its_first_place(where):
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    expected = {"0.weight", "0.bias", "1.weight", "1.bias"}
    if where == "other module":
        module[1].weight = module[0].weight
        expected -= {"1.weight"}
    elif where == "same module":
        module[1].again = module[1].weight
    elif where == "twice":
        module[1] = module[0]
        expected -= {"1.weight", "1.bias"}
    else:
        module.register_parameter("shared", module[1].bias)
        expected = {"shared", "0.weight", "0.bias", "1.weight"}
    layout = FlatLayout.trainable(module)
    assert set(layout.parameter_names) == expected
    assert layout.size == sum(p.numel() for p in module.parameters())


def test_equal_values_are_not_tied():
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    module[1].load_state_dict(module[0].state_dict())
    assert len(FlatLayout.trainable(module).layers) == 2


def test_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match="Sequential has no parameters to train"):
        FlatLayout.trainable(nn.Sequential(nn.ReLU(), nn.Flatten()))


def test_column():
    assert column(0.5) == 0.5
    assert column(torch.tensor(0.5)).shape == ()
    assert column(torch.ones(3)).shape == (3, 1)
    assert column(torch.ones(2, 3)).shape == (2, 3, 1)


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize(
    "a",
    [
        0.5,
        2,
        torch.tensor(0.5),
        torch.tensor([0.5, -2.0]),
        torch.tensor([0.5, -2.0], dtype=F64),
        torch.tensor([[0.5, -2.0], [0.0, 1.0], [3.0, 0.25]]),
    ],
    ids=repr,
)
def test_scalars_broadcast_over_leading_axes(a, dtype):
    y = torch.arange(12.0, dtype=dtype).view(3, 2, 2)
    x = torch.tensor([1.0, 10.0], dtype=dtype).expand(3, 2, 2)
    table = torch.as_tensor(a, dtype=F64).expand(3, 2)
    for i in range(3):
        for j in range(2):
            factor = table[i, j].item()
            assert scaled(a, x)[i, j].tolist() == [factor, 10 * factor]
            expected = [y[i, j, 0].item() + factor, y[i, j, 1].item() + 10 * factor]
            assert add_scaled(y, a, x)[i, j].tolist() == expected
    assert scaled(a, x).dtype == add_scaled(y, a, x).dtype == dtype
    assert y[0, 0, 1] == 1  # not in place


class Scaled(nn.Module):
    """With a parameter that is a number, as a temperature is, and one that is empty."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 1, bias=False)
        self.scale = nn.Parameter(torch.tensor(3.0))
        self.none = nn.Parameter(torch.zeros(0, 2))


@pytest.mark.parametrize("leading", [(), (4,), (2, 3)])
def test_numbers_have_their_shape_again_and_empty_parameters_are_left_out(leading):
    layout = FlatLayout.trainable(Scaled())
    block = torch.arange(float(3 * torch.Size(leading).numel())).view(*leading, 3)
    found = layout.unflatten(block)
    assert {name: tuple(x.shape) for name, x in found.items()} == {
        "scale": leading,
        "linear.weight": (*leading, 1, 2),
    }
    assert torch.equal(found["scale"], block[..., 0])
