"""Calls of a model as a function of its parameters and running statistics.

A *running* buffer is one that a forward pass in training mode changes, such as the running mean of
BatchNorm. Every worker has its own. Other buffers and frozen parameters are constants, which all
workers share in the model itself.

# K workers
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from consensus.problem.samples import Tree, leaves
from consensus.problem.streams import restored_generators
from consensus.tree_sum import tree_sum

Views = dict[str, Tensor]
"""Parameters and buffers of a model by name."""


def call(model: nn.Module, values: Views, inputs: Tree) -> Any:
    """The outputs of a model with `values` in place of its own parameters and buffers.

    A tuple of inputs is a call with several arguments, a dict one with keyword arguments. A value
    that the model replaces is replaced in `values`.
    """
    if isinstance(inputs, Mapping):
        return functional_call(model, values, (), dict(inputs))
    return functional_call(model, values, inputs if isinstance(inputs, tuple) else (inputs,))


def buffers_of(model: nn.Module) -> Views:
    """Copies of all buffers of a model by name."""
    return {name: buffer.detach().clone() for name, buffer in model.named_buffers()}


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Context in which the model is in evaluation mode; afterwards each module is in its own."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


@torch.no_grad()
def draws_random_numbers(model: nn.Module, inputs: Tree) -> bool:
    """Whether a forward pass for a minibatch (B, ...) advances a global generator.

    That of torch, NumPy or Python. The probe runs the model once, in its current mode, and restores
    the generators. The class of a module would not tell: `torch.nn.functional.dropout`, stochastic
    depth and attention with dropout contain no dropout module.
    """
    with restored_generators(next(leaves(inputs)).device) as advanced:
        call(model, buffers_of(model), inputs)
        return advanced()


@torch.no_grad()
def running_buffers(model: nn.Module, inputs: Tree) -> tuple[str, ...]:
    """The names of the buffers that a forward pass in the current mode changes."""
    after = buffers_of(model)
    with restored_generators(next(leaves(inputs)).device):
        call(model, after, inputs)
    before = dict(model.named_buffers())
    return tuple(name for name, found in after.items() if not torch.equal(found, before[name]))


class RunningBuffers:
    """The running buffers of K workers, each a block (K, ...).

    Args:
        model: It has the values at the start.
        names: Of the running buffers.
        workers: K.
    """

    def __init__(self, model: nn.Module, names: tuple[str, ...], workers: int) -> None:
        start = {name: buffer for name, buffer in model.named_buffers() if name in names}
        self.rows = {
            name: buffer.detach().expand(workers, *buffer.shape).clone()
            for name, buffer in start.items()
        }

    def __bool__(self) -> bool:
        return bool(self.rows)

    def of(self, k: int) -> Views:
        """Views of the buffers of worker k, which a forward pass may change or replace."""
        return {name: rows[k] for name, rows in self.rows.items()}

    def keep(self, k: int, values: Views) -> None:
        """Copy the values of worker k that a forward pass has replaced and not changed in place."""
        for name, rows in self.rows.items():
            if values[name].data_ptr() != rows[k].data_ptr():
                rows[k].copy_(values[name])

    def sums(self) -> Tensor:
        """The sums over the workers, concatenated. float64 (b,)."""
        rows = [rows.double().reshape(len(rows), -1) for rows in self.rows.values()]
        return tree_sum(torch.cat(rows, 1).unbind())

    def unflatten(self, vector: Tensor) -> Views:
        """The buffers with the numbers of a vector (b,), rounded for integers."""
        found: Views = {}
        pieces = vector.split([rows[0].numel() for rows in self.rows.values()])
        for (name, rows), piece in zip(self.rows.items(), pieces, strict=True):
            values = piece if rows.is_floating_point() else piece.round()
            found[name] = values.view(rows.shape[1:]).to(rows.dtype)
        return found

    def state_dict(self) -> Views:
        """The blocks, as `buffers.NAME`."""
        return {f"buffers.{name}": rows for name, rows in self.rows.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from copies of a `state_dict`."""
        for name, rows in self.rows.items():
            rows.copy_(state[f"buffers.{name}"])
