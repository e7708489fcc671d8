"""`Together` by the functions of native.c: the same lines in fewer passes over memory.

Of n coordinates these vectors are read from memory or written to it:

    start   p, u -> z, message     4    radial, factors known at last: and message twice 6
    move    total, u, z, p -> u, p 6    radial, whose norms come between: and z -> z     8

Where ranks read the messages of all, those who read apply the factors of a radial potential
(adders.py), and `start` takes 4.

On a small model a method is two calls of C in place of some ten operations of torch.
"""

import ctypes
import math
from array import array
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from consensus.core.flat import ViewsOf
from consensus.core.kernels.adders import CommonWeights, ScaledSum
from consensus.core.kernels.native import Library, Plan, Run
from consensus.core.kernels.together import Sum, fractions_of, numbers_of
from consensus.core.layerwise import Layerwise
from consensus.core.parameters import FlatParameters

TILE = 1 << 14  # coordinates of a group of a separable potential: some vectors fit into a cache


class _Native:
    """The parameters, u and z as native.c takes them.

    Args:
        library: Its functions.
        parameters: p, whole, `exact`, and on a CPU.
        u: (n,), as is z. Both are kept.
        groups: (start, stop) slices of the vectors, in order; each coordinate is in one.
    """

    def __init__(
        self,
        library: Library,
        parameters: FlatParameters,
        u: Tensor,
        z: Tensor,
        groups: Sequence[tuple[int, int]],
    ) -> None:
        self._originals, self._u, self._z = parameters.originals, u, z
        self._n, self._dtype = len(u), u.dtype
        self._replace = library.function("replace", u.dtype)
        lengths = [p.numel() for p in self._originals]
        self._places: list[int] = []
        self._staged: list[tuple[Tensor, Tensor]] = []
        cuts = _cut(lengths, groups)
        self._runs = (Run * len(cuts))()
        for run, (_, _, start, count, group) in zip(self._runs, cuts, strict=True):
            run.start, run.count, run.group = start, count, group
        self._cuts = [(parameter, offset * u.element_size()) for parameter, offset, *_ in cuts]
        address = ctypes.addressof(self._runs)
        sizes = len(cuts), len(groups), len(u)
        self._table = Plan(address, *sizes, u.data_ptr(), z.data_ptr())
        self._plan = ctypes.addressof(self._table)
        numbers = ctypes.c_double * len(groups)
        self._squares: Any = numbers()
        self._factors: Any = numbers(*[1.0] * len(groups))
        self._at_squares = ctypes.addressof(self._squares)
        self._at_factors = ctypes.addressof(self._factors)

    def summed_by(self, total: Sum) -> None:
        """As in `Together`."""

    def replace(self, displaced: bool) -> None:
        """As in `Together`."""
        self._read()
        self._replace(self._plan, displaced)
        self._written()

    def _read(self) -> None:
        """Look where the parameters are, before a function reads or writes them."""
        places = [p.data_ptr() for p in self._originals]
        if places != self._places:  # the module has replaced the memory of its parameters
            self._places = places
            owners = [p if p.is_contiguous() else torch.empty(p.shape, dtype=p.dtype)
                      for p in self._originals]  # fmt: skip
            pairs = zip(self._originals, owners, strict=True)
            self._staged = [(p.detach(), own) for p, own in pairs if own is not p]
            starts = [own.data_ptr() for own in owners]
            for run, (parameter, offset) in zip(self._runs, self._cuts, strict=True):
                run.own = starts[parameter] + offset
        for p, copy in self._staged:
            copy.copy_(p)

    def _written(self) -> None:
        """Finish writing: autograd refuses a backward pass through values that have changed."""
        for p, copy in self._staged:
            p.copy_(copy)
        increment_version(self._originals)


class NativeLinear(_Native):
    """`Together` for q(w) = w; `strength` is the pull."""

    def __init__(self, library: Library, parameters: FlatParameters, u: Tensor, z: Tensor) -> None:
        super().__init__(library, parameters, u, z, [(0, len(u))])
        self._start = library.function("start", u.dtype)
        self._move = library.function("move", u.dtype)

    def start(self, message: Tensor, read: bool) -> None:
        """As in `Together`."""
        self._read()
        self._start(self._plan, message.data_ptr(), read)

    def move(self, total: Tensor | None, t_u: float, strength: float, keep: bool) -> None:
        """As in `Together`."""
        self._read()
        place = None if total is None else total.data_ptr()
        self._move(self._plan, place, -t_u, strength, keep)
        self._written()


class NativeRadial(_Native):
    """`Together` of the proximal steps of a radial potential, with c as numbers of Python.

    Args:
        library: The functions of native.c.
        parameters: p.
        u: (n,), as is z.
        phi: The potential, with one scale for all layers.
        strength: That of the forces; `math.inf` for c = 1.
    """

    def __init__(
        self,
        library: Library,
        parameters: FlatParameters,
        u: Tensor,
        z: Tensor,
        phi: Layerwise,
        strength: float,
    ) -> None:
        super().__init__(library, parameters, u, z, phi.layers)
        self._phi, self._strength = phi, strength
        self._offset = len(u) * u.element_size()
        self._start, self._scale, self._lead, self._pull = (
            library.function(name, u.dtype) for name in ("start_radial", "scale", "lead", "pull")
        )
        self._adder, self._scaled_later = ScaledSum(library, phi.layers), False
        self._weights = ViewsOf(lambda message: numbers_of(message[len(u) :]))

    def summed_by(self, total: Sum) -> None:
        """As in `Together`."""
        self._scaled_later = total.add_by(self._adder)

    def start(self, message: Tensor, read: bool) -> None:
        """As in `Together`."""
        self._read()
        self._start(self._plan, message.data_ptr(), read, self._at_squares)
        self._find_factors(self._strength)
        weights = self._weights(message)
        weights[:] = array(weights.format, self._factors)
        if not self._scaled_later and self._strength != math.inf:
            self._scale(self._plan, message.data_ptr(), self._at_factors)

    def move(self, total: Tensor | None, t_u: float, strength: float, keep: bool) -> None:
        """As in `Together`."""
        self._read()
        place = weights = None
        if total is not None:
            place = total.data_ptr()
            weights = place + self._offset
        self._lead(self._plan, place, weights, t_u, self._at_squares)
        self._find_factors(strength)
        self._pull(self._plan, self._at_factors, None, keep)
        self._written()

    def _find_factors(self, strength: float) -> None:
        """The c of each layer, from its square."""
        if strength == math.inf:
            self._factors[:] = [1.0] * len(self._factors)
        else:
            self._factors[:] = fractions_of(self._squares, self._phi, strength, self._dtype)


class NativeSeparable(_Native):
    """`Together` of a separable potential that is linear near 0; the arguments as there.

    Tiles with a coordinate farther away are left to operations of torch.
    """

    def __init__(
        self,
        library: Library,
        parameters: FlatParameters,
        u: Tensor,
        z: Tensor,
        phi: Layerwise,
        strength: float,
    ) -> None:
        n = len(u)
        tiles = [(start, min(start + TILE, n)) for start in range(0, n, TILE)]
        super().__init__(library, parameters, u, z, tiles)
        self._phi, self._strength, self._tiles = phi, strength, tiles
        self._far = (ctypes.c_uint8 * len(tiles))()
        self._at_far = ctypes.addressof(self._far)
        self._memory = u.new_empty(min(TILE, n))
        self._start, self._move, self._pull = (
            library.function(name, u.dtype) for name in ("start_near", "move_near", "pull")
        )
        self._common: dict[float, tuple[float, float]] = {}  # by the strength
        self._tiny, self._brief = torch.finfo(u.dtype).tiny, False

    def summed_by(self, total: Sum) -> None:
        """As in `Together`."""
        self._brief = total.add_by(CommonWeights(self._n))

    def start(self, message: Tensor, read: bool) -> None:
        """As in `Together`; no weight is 0, as (x^2)' may be near 0."""
        self._read()
        near, n = self._near(self._strength), self._n
        place = message.data_ptr()
        if self._start(self._plan, place, read, *near, self._brief, self._at_far):
            for start, stop in self._far_tiles():
                w = message[start:stop]
                each = self._phi.fraction(w, self._strength)
                w.mul_(each)
                torch.clamp(each, min=self._tiny, out=message[n + start : n + stop])

    def move(self, total: Tensor | None, t_u: float, strength: float, keep: bool) -> None:
        """As in `Together`."""
        self._read()
        place = None if total is None else total.data_ptr()
        near, memory = self._near(strength), self._memory.data_ptr()
        if self._move(self._plan, place, t_u, *near, keep, memory, self._at_far):
            for start, stop in self._far_tiles():
                w = self._z[start:stop]
                w.mul_(self._phi.fraction(w, strength))
            self._pull(self._plan, self._at_factors, self._at_far, keep)
        self._written()

    def _far_tiles(self) -> list[tuple[int, int]]:
        return [tile for tile, far in zip(self._tiles, self._far, strict=True) if far]

    def _near(self, strength: float) -> tuple[float, float]:
        """The reach within which c is one number, and this number; a reach below 0 if none."""
        found = self._common.get(strength)
        if found is None:
            reach, c = self._phi.common_within(self._dtype, strength)
            found = self._common[strength] = (-1.0, 0.0) if c is None else (reach, c)
        return found


def _cut(
    lengths: Sequence[int], groups: Sequence[tuple[int, int]]
) -> list[tuple[int, int, int, int, int]]:
    """Runs that lie in one parameter and one group.

    Each is the index of the parameter, the first coordinate there and in the vectors, the number of
    coordinates, and the group.
    """
    cuts = []
    group = start = 0
    for parameter, length in enumerate(lengths):
        offset = 0
        while offset < length:
            while start >= groups[group][1]:
                group += 1
            count = min(length - offset, groups[group][1] - start)
            cuts.append((parameter, offset, start, count, group))
            offset, start = offset + count, start + count
    return cuts
