"""Sums of the messages of `Coupling` where every rank reads those of all: in shared memory.

    radial      message w, c of each layer      total = sum_j c_j w_j, sum_j c_j
    separable   message c w, c, common c        total = sum_j c_j w_j, sum_j c_j if they differ

Who writes a radial message does not know c before all of w is written. Here c is applied by those
that read it, so w is written once. Weights of a separable potential that are one number, as near 0,
need not be written nor read. The totals have the same bits as those of scaled messages: each
product is rounded, then added along the tree of tree_sum.py.
"""

import ctypes
import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from consensus.core.kernels.native import Library, Run
from consensus.tree_sum import adding


class ScaledSum:
    """Adds up radial messages w (n,), and factors of the layers, to those of c w.

    Args:
        library: The functions of native.c.
        layers: (start, stop) slices of w, in order.
    """

    def __init__(self, library: Library, layers: Sequence[tuple[int, int]]) -> None:
        self._library, self._layers = library, layers

    def adding(self, messages: Tensor, total: Tensor, rank: int) -> Callable[[], None]:
        """As in `Adder`: a part of w, and on the last rank the factors. (P, n + G), (n + G,)."""
        count, size = len(messages), self._layers[-1][1]
        first, last = _part(rank, count, size)
        inside = [
            (max(start, first), min(stop, last), layer)
            for layer, (start, stop) in enumerate(self._layers)
            if start < last and first < stop
        ]
        runs = (Run * len(inside))()
        for run, (start, stop, layer) in zip(runs, inside, strict=True):
            run.start, run.count, run.group = start, stop - start, layer
        add, places = self._library.function("add_scaled", total.dtype), _addresses(messages)
        add_factors = adding(messages[:, size:], total[size:])

        def add_part() -> None:
            add(runs, len(runs), size, places, count, total.data_ptr())
            if rank == count - 1:
                add_factors()

        return add_part


class CommonWeights:
    """Adds up separable messages, and their weights unless each message has one for all.

    Args:
        n: The number of coordinates.
    """

    def __init__(self, n: int) -> None:
        self._n = n

    def adding(self, messages: Tensor, total: Tensor, rank: int) -> Callable[[], None]:
        """As in `Adder`: parts of c w and of c, on the last rank the last. (P, 2 n + 1)."""
        n, last = self._n, rank == len(messages) - 1
        start, stop = _part(rank, len(messages), n)
        add_forces, add_weights, add_common = (
            adding(messages[:, part], total[part])
            for part in (slice(start, stop), slice(n + start, n + stop), slice(2 * n, 2 * n + 1))
        )
        common: Any = messages[:, 2 * n].numpy()

        def add_part() -> None:
            add_forces()
            if any(math.isnan(number) for number in common):
                add_weights()
            if last:
                add_common()

        return add_part


def _part(rank: int, ranks: int, n: int) -> tuple[int, int]:
    """The coordinates that a rank adds up."""
    return n * rank // ranks, n * (rank + 1) // ranks


def _addresses(messages: Tensor) -> Any:
    return (ctypes.c_void_p * len(messages))(*(row.data_ptr() for row in messages))
