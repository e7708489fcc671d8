"""Lines 3 and 6 of `Coupling` together, tile by tile, for one worker on a CPU.

    start   z = p if the parameters p are to be read; w = u - z; message = c w, and the weights c
    move    u += the step of line 3; w = u - z, in place of z; p += c w; z = p if it is to be kept

pulls.py and weighted.py have the same lines, one vector after another. Here a tile is still in a
cache for its next operation. Of n coordinates these vectors are read from memory or written to it:

    start   p, u -> z, message     4    radial, for c w: and message -> message      6
    move    total, u, z, p -> u, p 6    radial, whose norms come first: and z -> z   8

Small models take less time for memory than for Python code, and for the first call of an operation
after a forward and backward pass, which finds the caches cold: the methods here are long rather
than deep.
"""

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from consensus.core.flat import ViewsOf
from consensus.core.layerwise import Layerwise
from consensus.core.parameters import FlatParameters, TiledParameters
from consensus.core.sizes import CHUNK

Tile = Sequence[tuple[Tensor, ...]]
"""Pieces of a parameter, of z and of u."""
FEW = 16  # pieces of a tile: up to here a loop, whose operations the optimizer has just called


class Sum(Protocol):
    """A repeated sum of messages, as consensus.comm has it."""

    def add_by(self, adder: Any) -> bool:
        """Leave the additions to an `Adder`; False if this sum cannot."""


class Together(Protocol):
    """Lines 3 and 6 in place, of u and z (n,) and of parameters."""

    def summed_by(self, total: Sum) -> None:
        """Use that `total` will add up the messages of `start`, if its totals come to `move`."""

    def start(self, message: Tensor, read: bool) -> None:
        """The force at z, to `message`; `read`: after z was set to the parameters."""

    def move(self, total: Tensor | None, t_u: float, strength: float, keep: bool) -> None:
        """Line 3 with a `total`, unless it is None; line 6 with a strength below a full pull.

        `keep`: whether z is set to the parameters. Otherwise its values are lost.
        """

    def replace(self, displaced: bool) -> None:
        """Line 6 with a full pull, exactly: z = u, and its displacement if it was `displaced`."""


class _Tiles:
    """Tiles of u, z and the parameters, which are `exact`, whole, and on a CPU.

    Vectors that are passed are kept, as views.

    Args:
        parameters: p.
        u: (n,), as is z.
        layers: (start, stop) slices of the vectors; no tile lies in two of them.
    """

    def __init__(
        self, parameters: FlatParameters, u: Tensor, z: Tensor, layers: Sequence[tuple[int, int]]
    ) -> None:
        self._tiles = tiles = TiledParameters(parameters, (z, u), layers, CHUNK)
        self._fixed = tiles.fixed
        self._along = ViewsOf(lambda x: x[: len(u)].split_with_sizes(tiles.lengths))
        self._center, self._own, self._u, self._z = u, z, self._along(u), self._along(z)
        self._none = [None] * len(tiles.lengths)

    def summed_by(self, total: Sum) -> None:
        """As in `Together`."""

    def replace(self, displaced: bool) -> None:
        """As in `Together`."""
        for tile in self._tiles.pieces():
            for p, z, u in tile:
                if displaced:
                    p.sub_(z).add_(u)
                else:
                    p.copy_(u)
                z.copy_(p)


class LinearTogether(_Tiles):
    """`Together` for q(w) = w; `strength` is the pull."""

    def __init__(self, parameters: FlatParameters, u: Tensor, z: Tensor) -> None:
        super().__init__(parameters, u, z, [(0, len(u))])

    def start(self, message: Tensor, read: bool) -> None:
        """As in `Together`."""
        pieces = self._fixed or self._tiles.pieces()
        for tile, u, z, w in zip(pieces, self._u, self._z, self._along(message), strict=True):
            if read:
                _read(tile)
            torch.sub(u, z, out=w)

    def move(self, total: Tensor | None, t_u: float, strength: float, keep: bool) -> None:
        """As in `Together`."""
        pieces = self._fixed or self._tiles.pieces()
        sums: Any = self._none if total is None else self._along(total)
        for tile, u, z, w in zip(pieces, self._u, self._z, sums, strict=True):
            if w is not None:
                u.add_(w, alpha=-t_u)
            torch.sub(u, z, out=z)
            _add(tile, strength, keep)


class RadialTogether(_Tiles):
    """`Together` of the proximal steps of a radial potential, with norms and c as numbers.

    Args:
        parameters: p.
        u: (n,), as is z.
        phi: The potential, with one scale for all layers.
        strength: That of the forces; `math.inf` for c = 1.
    """

    def __init__(
        self, parameters: FlatParameters, u: Tensor, z: Tensor, phi: Layerwise, strength: float
    ) -> None:
        super().__init__(parameters, u, z, phi.layers)
        self._phi, self._strength = phi, strength
        self._layers, self._small = self._tiles.layers, len(u) <= CHUNK
        squares = u.new_empty(len(self._layers))  # |w|^2 of each tile
        self._slots, self._squares = squares.unbind(), numbers_of(squares)
        self._parts = ViewsOf(lambda m: (m[: len(u)], self._along(m), numbers_of(m[len(u) :])))
        self._tiny = torch.finfo(u.dtype).tiny

    def start(self, message: Tensor, read: bool) -> None:
        """As in `Together`."""
        whole, parts, weights = self._parts(message)
        if self._small:  # fewer operations
            if read:
                for tile in self._tiles.pieces():
                    _read(tile)
            torch.sub(self._center, self._own, out=whole)
            for w, slot in zip(parts, self._slots, strict=True):
                torch.dot(w, w, out=slot)
        else:
            tiles = self._tiles.pieces(), self._u, self._z, parts, self._slots
            for tile, u, z, w, slot in zip(*tiles, strict=True):
                if read:
                    _read(tile)
                torch.sub(u, z, out=w)
                torch.dot(w, w, out=slot)
        c_of = self._fractions(self._strength)
        for layer, c in enumerate(c_of):
            weights[layer] = c
        if self._strength != math.inf:
            for layer, w in zip(self._layers, parts, strict=True):
                w.mul_(c_of[layer])

    def move(self, total: Tensor | None, t_u: float, strength: float, keep: bool) -> None:
        """As in `Together`."""
        sums: Any = self._none
        steps: Any = self._none
        if total is not None:
            _, sums, weights = self._parts(total)
            # A sum of c may be 0, as (|x|^2)' underflows near 0; then the sum of c w is 0 as well.
            steps = [-t_u / max(weights[layer], self._tiny) for layer in self._layers]
        if self._small:
            if total is not None:
                for u, w, step in zip(self._u, sums, steps, strict=True):
                    u.add_(w, alpha=step)
            torch.sub(self._center, self._own, out=self._own)
            for z, slot in zip(self._z, self._slots, strict=True):
                torch.dot(z, z, out=slot)
        else:
            tiles = self._u, self._z, sums, steps, self._slots
            for u, z, w, step, slot in zip(*tiles, strict=True):
                if w is not None:
                    u.add_(w, alpha=step)
                torch.sub(u, z, out=z)
                torch.dot(z, z, out=slot)
        c_of = self._fractions(strength)
        for tile, layer in zip(self._fixed or self._tiles.pieces(), self._layers, strict=True):
            c = c_of[layer]
            _add(tile, c, keep)

    def _fractions(self, strength: float) -> list[float]:
        """The c of each layer, from the squares of its tiles."""
        squares = [0.0] * len(self._phi.layers)
        if strength == math.inf:
            return [1.0] * len(squares)
        for layer, square in zip(self._layers, self._squares, strict=True):
            squares[layer] += square
        return fractions_of(squares, self._phi, strength, self._center.dtype)


class SeparableTogether(_Tiles):
    """`Together` of the proximal steps of a separable potential; the arguments as there."""

    def __init__(
        self, parameters: FlatParameters, u: Tensor, z: Tensor, phi: Layerwise, strength: float
    ) -> None:
        super().__init__(parameters, u, z, [(0, len(u))])
        self._phi, self._strength = phi, strength
        n = len(u)
        self._parts = ViewsOf(
            lambda m: (self._along(m), self._along(m[n : 2 * n]), numbers_of(m[2 * n :]))
        )
        self._common: dict[float, tuple[float, float | None]] = {}  # by the strength
        self._tiny = torch.finfo(u.dtype).tiny

    def start(self, message: Tensor, read: bool) -> None:
        """As in `Together`; no weight is 0, as (x^2)' may be near 0."""
        pieces, equal = self._fixed or self._tiles.pieces(), True
        parts, weights, shared = self._parts(message)
        reach, c = self._common.get(self._strength) or self._find_common(self._strength)
        for tile, u, z, w, weight in zip(pieces, self._u, self._z, parts, weights, strict=True):
            if read:
                _read(tile)
            torch.sub(u, z, out=w)
            if c is not None and (reach == math.inf or _furthest(w) <= reach):
                w.mul_(c)
                weight.fill_(max(c, self._tiny))
            else:
                each, equal = self._phi.fraction(w, self._strength), False
                w.mul_(each)
                torch.clamp(each, min=self._tiny, out=weight)
        shared[0] = max(c, self._tiny) if c is not None and equal else math.nan

    def move(self, total: Tensor | None, t_u: float, strength: float, keep: bool) -> None:
        """As in `Together`."""
        pieces = self._fixed or self._tiles.pieces()
        parts: Any = self._none
        weights: Any = self._none
        step = math.nan
        if total is not None:
            parts, weights, shared = self._parts(total)
            step = -t_u / shared[0]  # nan unless all weights are equal
        reach, c = self._common.get(strength) or self._find_common(strength)
        for tile, u, z, w, weight in zip(pieces, self._u, self._z, parts, weights, strict=True):
            if w is not None:
                if not math.isnan(step):
                    u.add_(w, alpha=step)
                else:
                    u.addcdiv_(w, weight, value=-t_u)
            torch.sub(u, z, out=z)
            factor = c
            if factor is None or (reach < math.inf and _furthest(z) > reach):
                z.mul_(self._phi.fraction(z, strength))
                factor = 1.0
            _add(tile, factor, keep)

    def _find_common(self, strength: float) -> tuple[float, float | None]:
        found = self._common[strength] = self._phi.common_within(self._center.dtype, strength)
        return found


def fractions_of(
    squares: Sequence[float], phi: Layerwise, strength: float, dtype: torch.dtype
) -> list[float]:
    """The fraction c that a proximal step removes from each radial layer, by its |w|^2.

    `phi` has one scale for all layers.
    """
    scale, profile = float(phi.scale), phi.profile
    r = [scale * math.sqrt(square) for square in squares]
    if profile.numbers is not None:
        return profile.fractions(r, strength * scale * scale, dtype)
    found: list[float] = phi.fraction_of(torch.tensor(r, dtype=dtype), strength).tolist()
    return found


def _read(tile: Tile) -> None:
    """Set z to the parameters."""
    if len(tile) > FEW:
        own, z, _ = zip(*tile, strict=True)
        torch._foreach_copy_(z, own)
        return
    for p, view, _ in tile:
        view.copy_(p)


def _add(tile: Tile, c: float, keep: bool) -> None:
    """Add c times w, which is in place of z, to the parameters; then z is set to them, if kept."""
    if len(tile) > FEW:
        own, z, _ = zip(*tile, strict=True)
        torch._foreach_add_(own, z, alpha=c)
        if keep:
            torch._foreach_copy_(z, own)
        return
    for p, view, _ in tile:
        p.add_(view, alpha=c)
        if keep:
            view.copy_(p)


def _furthest(w: Tensor) -> float:
    """The largest |w_i|."""
    low, high = torch.aminmax(w)
    return max(-low.item(), high.item())


def numbers_of(x: Tensor) -> Any:
    """A memoryview of a vector: access from Python without operations of torch."""
    array: Any = x.numpy()
    return memoryview(array)
