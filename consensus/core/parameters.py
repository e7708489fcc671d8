"""The parameters of a module, copied to and from flat vectors, whole or tile by tile."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from consensus.core.flat import FlatLayout, local
from consensus.core.sizes import CHUNK


@dataclass(frozen=True)
class Range:
    """A range of the flat vector: whole parameters, or some rows of one that is large."""

    pieces: list[tuple[int, slice | None]]  # parameters, and their rows; None: all
    shapes: list[torch.Size]  # of the pieces
    layers: dict[int, int]  # the number of coordinates in each layer

    @property
    def size(self) -> int:
        """The number of coordinates."""
        return sum(self.layers.values())


@dataclass(frozen=True)
class Tile:
    """Views of a vector in a `Range`."""

    flat: Tensor  # (m,)
    pieces: list[Tensor]  # in the shapes of the pieces of the parameters
    layers: dict[int, Tensor]  # the part in each layer

    @classmethod
    def of(cls, flat: Tensor, place: Range) -> "Tile":
        """The views of `flat` (m,)."""
        pieces = flat.split([shape.numel() for shape in place.shapes])
        views = [piece.view(shape) for piece, shape in zip(pieces, place.shapes, strict=True)]
        parts = flat.split(list(place.layers.values()))
        return cls(flat, views, dict(zip(place.layers, parts, strict=True)))


class FlatParameters:
    """The parameters of a layout, copied to and from flat vectors (n,) by foreach operations.

    Vectors are float32, or float64 as the parameters. Copies and not views: a module may replace
    the memory of its parameters. Of DTensors they hold the shard of this process. Vectors that are
    passed are kept, as views.

    Attributes:
        layout: That of the vectors.
        originals: The parameters, in the order of the layout.
        dtype: Their type.
        device: Their device.
    """

    def __init__(self, module: nn.Module, layout: FlatLayout) -> None:
        self.originals: list[Any] = [module.get_parameter(n) for n in layout.parameter_names]
        self._sharded = any(local(own) is not own for own in self.originals)
        self.layout = layout.of_shards(module) if self._sharded else layout
        self.dtype, self.device = self.originals[0].dtype, self.originals[0].device
        self.exact = self.dtype in (torch.float32, torch.float64)  # a vector holds the same values
        self._views: dict[int, list[Tensor]] = {}
        # A GPU has no use for tiles, which keep temporaries in the cache of a CPU.
        limit = CHUNK if self.device.type == "cpu" else self.layout.size
        self._ranges = _ranges(self.layout, limit)
        self._tiles: dict[tuple[int, bool], list[Tile]] = {}

    @property
    def tensors(self) -> list[Tensor]:
        """The memory of the parameters, which FSDP replaces."""
        return [local(own) for own in self.originals] if self._sharded else self.originals

    def copies(self, vector: Tensor) -> dict[int, Tensor]:
        """New tensors with the values of a vector, like the parameters, by the id of each."""
        found = {}
        for own, view in zip(self.originals, self.views(vector), strict=True):
            copy = view.to(own.dtype, copy=True)
            if self._sharded:  # with shape and stride no process asks the others for them
                place = {"shape": own.shape, "stride": own.stride(), "run_check": False}
                copy = type(own).from_local(copy, own.device_mesh, own.placements, **place)
            found[id(own)] = copy
        return found

    def vector(self) -> Tensor:
        """A new vector with the values of the parameters."""
        dtype = self.dtype if self.exact else torch.float32
        return self.read(torch.empty(self.layout.size, dtype=dtype, device=self.device))

    def views(self, vector: Tensor) -> list[Tensor]:
        """The pieces of a vector in the shapes of the parameters; kept for the next call."""
        # A view keeps its memory allocated, so no other vector can get this address.
        key = vector.data_ptr()
        if key not in self._views:
            self._views[key] = list(self.layout.unflatten(vector).values())
        return self._views[key]

    @torch.no_grad()
    def read(self, vector: Tensor) -> Tensor:
        """Copy the parameters to a vector, which is returned."""
        torch._foreach_copy_(self.views(vector), self.tensors)
        return vector

    @torch.no_grad()
    def write(self, vector: Tensor) -> None:
        """Copy a vector to the parameters, rounded to their type."""
        torch._foreach_copy_(self.tensors, self.views(vector))

    def displacement(self, z: Tensor, out: Tensor) -> Tensor:
        """The parameters less what `write(z)` has written, to `out`, which is returned."""
        return self.read(out).sub_(z if self.exact else z.to(self.dtype))

    def moves(
        self, z: Tensor, u: Tensor, memory: Tensor | None
    ) -> Iterator[tuple[Tile, Tile, Tensor | None]]:
        """Z and u tile by tile, and `displacement` there, None without `memory`; without gradients.

        After each tile, z is written to the parameters. On a CPU all of a tile stays in its cache.
        `memory` (n,) is overwritten in part.
        """
        displacements = [None] * len(self._ranges) if memory is None else self._at_start(memory)
        own = self.tensors if len(self._ranges) == 1 else [t.detach() for t in self.tensors]
        tiles = zip(self._ranges, self._along(z), self._along(u), displacements, strict=True)
        for place, z_tile, u_tile, d in tiles:
            pieces = [own[i] if rows is None else own[i][rows] for i, rows in place.pieces]
            if d is not None:
                torch._foreach_copy_(d.pieces, pieces)
                d.flat.sub_(z_tile.flat if self.exact else z_tile.flat.to(self.dtype))
            yield z_tile, u_tile, None if d is None else d.flat
            torch._foreach_copy_(pieces, z_tile.pieces)

    def _along(self, vector: Tensor) -> list[Tile]:
        """The tiles of a vector; kept for the next call."""
        key = (vector.data_ptr(), True)
        if key not in self._tiles:
            flats = vector.split([place.size for place in self._ranges])
            tiles = [Tile.of(flat, r) for flat, r in zip(flats, self._ranges, strict=True)]
            self._tiles[key] = tiles
        return self._tiles[key]

    def _at_start(self, memory: Tensor) -> list[Tile | None]:
        """Tiles that all are at the start of `memory`, so that it stays in the cache; likewise."""
        key = (memory.data_ptr(), False)
        if key not in self._tiles:
            self._tiles[key] = [Tile.of(memory[: place.size], place) for place in self._ranges]
        return list(self._tiles[key])


def _ranges(layout: FlatLayout, limit: int) -> list[Range]:
    """Ranges of `limit` coordinates at most, unless a row of a parameter has more."""
    found: list[Range] = []
    layer = start = 0
    for i, shape in enumerate(layout.shapes):
        if shape.numel() == 0:
            continue
        while start >= layout.layers[layer][1]:
            layer += 1
        pieces: list[tuple[slice | None, torch.Size]] = [(None, shape)]
        if shape.numel() > limit:
            step = max(1, limit * shape[0] // shape.numel())
            rows = [slice(a, min(a + step, shape[0])) for a in range(0, shape[0], step)]
            pieces = [(own, torch.Size([own.stop - own.start, *shape[1:]])) for own in rows]
        for own, size in pieces:
            if not found or found[-1].size + size.numel() > limit:
                found.append(Range([], [], {}))
            place = found[-1]
            place.pieces.append((i, own))
            place.shapes.append(size)
            place.layers[layer] = place.layers.get(layer, 0) + size.numel()
        start += shape.numel()
    return found
