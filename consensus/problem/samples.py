"""Samples: inputs and targets of any shape and type, as trees of tensors.

A tree is a tensor, or a tuple or dict of trees. The first axis of its tensors is that of the
samples.

# N samples
"""

from collections.abc import Callable, Iterator, Mapping, Sized
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

IGNORED = -100  # a class that the loss leaves out, as in torch
SHOWN = 8  # parts of a tree in a message

Tree = Any
"""A tensor, or a tuple or dict of trees."""


def map_tree(function: Callable[[Any], Any], tree: Tree) -> Tree:
    """The tree of the function's values at the leaves of a tree; lists become tuples."""
    if isinstance(tree, Mapping):
        return {key: map_tree(function, part) for key, part in tree.items()}
    if isinstance(tree, tuple | list):
        return tuple(map_tree(function, part) for part in tree)
    return function(tree)


def leaves(tree: Tree) -> Iterator[Any]:
    """The leaves of a tree, in order."""
    if isinstance(tree, Mapping | tuple | list):
        for part in tree.values() if isinstance(tree, Mapping) else tree:
            yield from leaves(part)
    else:
        yield tree


def described(tree: Tree) -> str:
    """The types and shapes of a tree, such as `float32 (60, 3, 32, 32)`."""
    if isinstance(tree, Mapping):
        parts = [f"{key}: {described(part)}" for key, part in islice(tree.items(), SHOWN)]
        return f"{{{', '.join(parts)}{_more(tree)}}}"
    if isinstance(tree, tuple | list):
        return f"({', '.join(map(described, tree[:SHOWN]))}{_more(tree)})"
    if isinstance(tree, Tensor):
        return f"{str(tree.dtype).removeprefix('torch.')} {tuple(tree.shape)}"
    return type(tree).__name__


def _more(tree: Sized) -> str:
    """The number of parts, if there are more than are shown: a list of samples has thousands."""
    return f", ... {len(tree)} parts" if len(tree) > SHOWN else ""


@dataclass(frozen=True)
class Samples:
    """Inputs and targets of N samples.

    Attributes:
        inputs: The arguments of the model: a tensor (N, ...), a tuple of several arguments, or a
            dict of keyword arguments. NumPy arrays become tensors.
        targets: What the loss compares the outputs of the model with.

    Raises:
        ValueError: If a leaf is no array, or their numbers of samples differ.
    """

    inputs: Tree
    targets: Tree

    def __post_init__(self) -> None:
        object.__setattr__(self, "inputs", map_tree(_tensor, self.inputs))
        object.__setattr__(self, "targets", map_tree(_tensor, self.targets))
        if len({len(x) for x in self.tensors()}) != 1:
            found = f"inputs {described(self.inputs)}, targets {described(self.targets)}"
            raise ValueError(f"{found}; allowed: as many targets as inputs")

    def tensors(self) -> Iterator[Tensor]:
        """The tensors of the inputs and of the targets."""
        yield from leaves(self.inputs)
        yield from leaves(self.targets)

    def __len__(self) -> int:
        return len(next(self.tensors()))

    def map(self, function: Callable[[Tensor], Tensor]) -> "Samples":
        """The samples with the function's value in place of each tensor."""
        return Samples(map_tree(function, self.inputs), map_tree(function, self.targets))

    def __getitem__(self, index: slice) -> "Samples":
        return self.map(lambda x: x[index])

    def select(self, index: Tensor) -> "Samples":
        """Copies of the samples at `index` (N',), int64."""
        return self.map(lambda x: x.index_select(0, index.to(x.device)))

    subset = select

    def split(self, size: int, index: Tensor | None = None) -> Iterator["Samples"]:
        """The samples, or those at `index`, in parts of `size`; the last may be smaller."""
        if index is None:
            return (self[start : start + size] for start in range(0, len(self), size))
        return (self.select(part) for part in index.split(size) if len(part))

    def share(self, rank: int, size: int) -> "Samples":
        """The share of one of `size` processes, which may be empty."""
        return self.map(lambda x: torch.tensor_split(x, size)[rank])

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "Samples":
        """A copy on a device, in types that models and losses take.

        Floating point in `dtype`, complex numbers in its precision. Inputs of uint8 are pixels and
        become numbers in [0, 1]; other integers stay integers.
        """

        def converted(x: Tensor) -> Tensor:
            if x.is_complex():
                return x.to(device, dtype.to_complex())
            return x.to(device, dtype) if x.is_floating_point() else integers(x.to(device))

        def pixels(x: Tensor) -> Tensor:
            return x.to(device, dtype) / 255 if x.dtype == torch.uint8 else converted(x)

        return Samples(map_tree(pixels, self.inputs), map_tree(converted, self.targets))

    def count_nonfinite(self) -> int:
        """The number of samples with a NaN or an infinity. Reads a number on the host."""
        finite = [
            x.reshape(len(x), -1).sum(1).isfinite()  # in less memory than one bool for each number
            for x in self.tensors()
            if x.is_floating_point() or x.is_complex()
        ]
        if not finite:
            return 0
        return len(self) - int(torch.stack(finite).all(0).sum())


def class_out_of_range(targets: Tree, num_classes: int) -> str | None:
    """The range of integer targets that are not in [0, num_classes), but for `IGNORED`, as text.

    None if all are.
    """
    for x in leaves(targets):
        if isinstance(x, Tensor) and is_whole(x):
            known = x[x != IGNORED] if x.min() == IGNORED else x
            low, high = (int(known.min()), int(known.max())) if known.numel() else (0, 0)
            if low < 0 or high >= num_classes:
                return f"go from {low} to {high}; allowed: 0 to {num_classes - 1}"
    return None


def is_whole(x: Tensor) -> bool:
    """Whether the numbers of a tensor are integers, such as classes and tokens."""
    return not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)


def integers(x: Tensor) -> Tensor:
    """int64 in place of other integers, which few operations take; bool stays."""
    return x if x.dtype == torch.bool else x.long()


def _tensor(leaf: Any) -> Tensor:
    if isinstance(leaf, np.ndarray | np.generic):
        leaf = torch.from_numpy(np.ascontiguousarray(leaf))
    if not isinstance(leaf, Tensor) or leaf.ndim == 0:
        found = "a number" if isinstance(leaf, Tensor) else f"a {type(leaf).__name__}"
        raise ValueError(f"{found} among the samples; allowed: tensors or arrays (N, ...)")
    return leaf.detach()
