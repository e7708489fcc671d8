"""Models as flat vectors, and blocks of such vectors.

Everything in the framework that is not a model sees one contiguous vector of n coordinates, or a
block of shape (..., n) whose leading axes are workers (or, later, runs). A *layer* is one module
with its weight and bias together, equation (18); it is a slice of the vector.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Generic, TypeVar, overload

import torch
from torch import Tensor, nn

Scalar = float | Tensor
"""A hyperparameter: one number, or a tensor that broadcasts over the leading axes of a block."""


@overload
def column(a: Tensor) -> Tensor: ...
@overload
def column(a: Scalar) -> Scalar: ...
def column(a: Scalar) -> Scalar:
    """`a` so that it broadcasts against a block (..., n): tensors (...) become (..., 1)."""
    return a.unsqueeze(-1) if isinstance(a, Tensor) and a.ndim > 0 else a


def scaled(a: Scalar, x: Tensor, out: Tensor | None = None) -> Tensor:
    """The product a x for blocks (..., n), a number or a tensor `a` (...); in the dtype of x."""
    factor = column(a).to(x) if isinstance(a, Tensor) else a
    return torch.mul(x, factor, out=out)


def add_scaled(y: Tensor, a: Scalar, x: Tensor, out: Tensor | None = None) -> Tensor:
    """The sum y + a x for blocks (..., n), in one pass for a number or a tensor `a` (...)."""
    if isinstance(a, Tensor):
        return torch.addcmul(y, column(a).to(y), x, out=out)
    return torch.add(y, x, alpha=a, out=out)


def part_of(state: dict[str, Tensor], owner: str) -> dict[str, Tensor]:
    """The entries `owner/...` of a state, without the prefix."""
    prefix = f"{owner}/"
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


@torch.no_grad()
def local(tensor: Tensor) -> Tensor:
    """The shard of this process of a DTensor, in its memory; any other tensor itself."""
    shard: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return shard


T = TypeVar("T")


class ViewsOf(Generic[T]):
    """Views of vectors that are used again and again, made once for each vector, which is kept.

    Args:
        make: Makes the views of a vector.
    """

    def __init__(self, make: Callable[[Tensor], T]) -> None:
        self._make = make
        self._made: dict[int, T] = {}

    def __call__(self, vector: Tensor) -> T:
        """The views of `vector`."""
        # A view keeps its memory allocated, so no other vector can get this address.
        key = vector.data_ptr()
        if key not in self._made:
            self._made[key] = self._make(vector)
        return self._made[key]


@dataclass(frozen=True)
class FlatLayout:
    """The places of the parameters and layers of a module in its flat vector."""

    parameter_names: tuple[str, ...]  # qualified, in the order of `module.named_parameters()`
    shapes: tuple[torch.Size, ...]
    layer_names: tuple[str, ...]  # of the modules that own parameters, in the same order
    layers: tuple[tuple[int, int], ...]  # the slices of those modules; they partition [0, n)

    @classmethod
    def trainable(
        cls, module: nn.Module, layers: Sequence[Sequence[str]] | None = None
    ) -> "FlatLayout":
        """The layout of the parameters that require a gradient and have elements.

        A tied parameter counts once, in its first place. `layers` are lists of parameter names in
        place of the modules. A ValueError if no parameter is left, or one is not in exactly one
        layer.
        """
        layer_of: dict[str, str] = {}
        names_of = {}  # all names of a tied parameter -> the first
        first: dict[int, str] = {}
        for path, owner in module.named_modules():
            for name, parameter in owner.named_parameters(path, recurse=False):
                if not parameter.requires_grad or nn.parameter.is_lazy(parameter):
                    continue
                names_of[name] = first.setdefault(id(parameter), name)
                if names_of[name] == name and parameter.numel():
                    layer_of[name] = path or type(owner).__name__.lower()
        if layers is not None:
            given = [
                (names_of.get(name, name), i) for i, group in enumerate(layers) for name in group
            ]
            if sorted(name for name, _ in given) != sorted(layer_of):
                raise ValueError(
                    f"`layers` is {[list(group) for group in layers]}; allowed: lists that have "
                    f"each of the trainable parameters once: {', '.join(layer_of)}"
                )
            layer_of = {name: str(i) for name, i in given}
        if not layer_of:
            raise ValueError(f"{type(module).__name__} has no parameters to train")
        shapes = {name: module.get_parameter(name).shape for name in layer_of}
        lengths = dict.fromkeys(layer_of.values(), 0)
        for name, layer in layer_of.items():
            lengths[layer] += shapes[name].numel()
        ends = tuple(pairwise(accumulate(lengths.values(), initial=0)))
        return cls(tuple(layer_of), tuple(shapes.values()), tuple(lengths), ends)

    def select(self, layers: Sequence[int]) -> "FlatLayout":
        """The layout of some of the layers, by their indices, in the given order."""
        by_layer = self.names_by_layer()
        names = tuple(name for layer in layers for name in by_layer[layer])
        shape_of = dict(zip(self.parameter_names, self.shapes, strict=True))
        lengths = [self.layers[layer][1] - self.layers[layer][0] for layer in layers]
        return FlatLayout(
            names,
            tuple(shape_of[name] for name in names),
            tuple(self.layer_names[layer] for layer in layers),
            tuple(pairwise(accumulate(lengths, initial=0))),
        )

    def names_by_layer(self) -> list[list[str]]:
        """The names of the parameters of each layer."""
        names: list[list[str]] = [[] for _ in self.layers]
        layer = 0
        starts = accumulate((shape.numel() for shape in self.shapes), initial=0)
        for name, start in zip(self.parameter_names, starts, strict=False):
            while start >= self.layers[layer][1]:
                layer += 1
            names[layer].append(name)
        return names

    def of_shards(self, module: nn.Module) -> "FlatLayout":
        """The same layout of the shards of DTensors, where a layer may be empty."""
        shapes = {n: local(module.get_parameter(n)).shape for n in self.parameter_names}
        lengths = [sum(shapes[n].numel() for n in names) for names in self.names_by_layer()]
        ends = tuple(pairwise(accumulate(lengths, initial=0)))
        return replace(self, shapes=tuple(shapes.values()), layers=ends)

    @property
    def size(self) -> int:
        """n, the number of coordinates."""
        return self.layers[-1][1]

    def flatten(self, module: nn.Module) -> Tensor:
        """A new vector (n,) with the values of the module's parameters."""
        parameters = dict(module.named_parameters())
        return torch.cat([parameters[name].detach().reshape(-1) for name in self.parameter_names])

    def unflatten(self, vector: Tensor) -> dict[str, Tensor]:
        """The parameters (..., shape) as views of a vector (n,), or of a block (..., n)."""
        # One split: its backward pass is a single concatenation, and not one zero-padded n-vector
        # per parameter.
        pieces = torch.split(vector, [shape.numel() for shape in self.shapes], dim=-1)
        return {
            name: piece.view(piece.shape[:-1] + shape)
            for name, piece, shape in zip(self.parameter_names, pieces, self.shapes, strict=True)
        }
