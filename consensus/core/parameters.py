"""The parameters of a module, copied to and from flat vectors, whole or tile by tile."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from consensus.core.flat import FlatLayout, ViewsOf, local
from consensus.core.sizes import CHUNK

Piece = tuple[int, slice | None, torch.Size]
"""A parameter by its index, the rows of it (None: all), and their shape."""


@dataclass(frozen=True)
class Tile:
    """A range of the flat vector."""

    pieces: list[Piece]
    layers: dict[int, int]  # the number of pieces in each layer, in order


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
        views: The pieces of a vector in the shapes of the parameters.
    """

    def __init__(self, module: nn.Module, layout: FlatLayout) -> None:
        self.originals: list[Any] = [module.get_parameter(n) for n in layout.parameter_names]
        self._sharded = any(local(own) is not own for own in self.originals)
        self.layout = layout.of_shards(module) if self._sharded else layout
        self.dtype, self.device = self.originals[0].dtype, self.originals[0].device
        self.exact = self.dtype in (torch.float32, torch.float64)  # a vector holds the same values
        self.views = ViewsOf(lambda vector: list(self.layout.unflatten(vector).values()))
        # A GPU has no use for tiles, which keep temporaries in the cache of a CPU.
        limit = CHUNK if self.device.type == "cpu" else self.layout.size
        self._tiles = _tiles(self.layout, limit)
        self._tiled = ViewsOf(self._cut)

    @property
    def in_tiles(self) -> bool:
        """Whether `TiledParameters` take them, with the same values as a vector."""
        return self.exact and not self._sharded and self.device.type == "cpu"

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

    def add(self, vector: Tensor, factors: float | Sequence[float]) -> None:
        """Add factors times a vector to the parameters, then copy them to it; without gradients.

        `factors`: one number, or one a layer. In tiles on a CPU, so that memory is read once. For
        `exact` parameters.
        """
        own = self.tensors if len(self._tiles) == 1 else [t.detach() for t in self.tensors]
        for tile, views in zip(self._tiles, self._tiled(vector), strict=True):
            pieces = [own[i] if rows is None else own[i][rows] for i, rows, _ in tile.pieces]
            if isinstance(factors, float):
                torch._foreach_add_(pieces, views, alpha=factors)
            else:
                start = 0
                for layer, count in tile.layers.items():
                    own_pieces, steps = pieces[start : start + count], views[start : start + count]
                    torch._foreach_add_(own_pieces, steps, alpha=factors[layer])
                    start += count
            torch._foreach_copy_(views, pieces)

    def _cut(self, vector: Tensor) -> list[list[Tensor]]:
        """The pieces of a vector in each tile."""
        shapes = [shape for tile in self._tiles for *_, shape in tile.pieces]
        flats = iter(vector.split([shape.numel() for shape in shapes]))
        return [[next(flats).view(shape) for *_, shape in tile.pieces] for tile in self._tiles]


class TiledParameters:
    """The parameters of a CPU, and vectors like them, in tiles of a few pieces each.

    Vectors that are passed are kept, as views.

    Args:
        parameters: Whole ones, not shards.
        vectors: (n,) each.
        layers: (start, stop) slices of the vectors; no tile lies in two of them.
        limit: Of the coordinates in a tile, unless a row of a parameter has more.

    Attributes:
        lengths: Of the tiles, in order.
        layers: The layer of each.
        fixed: What `pieces` returns, if no parameter is divided; else None.
    """

    def __init__(
        self,
        parameters: FlatParameters,
        vectors: Sequence[Tensor],
        layers: Sequence[tuple[int, int]],
        limit: int,
    ) -> None:
        self._originals, self._vectors = parameters.originals, vectors
        self._tiles: list[list[Piece]] = []
        self.lengths: list[int] = []
        self.layers: list[int] = []
        start, layer = 0, -1
        for piece in _pieces(parameters.layout.shapes, limit):
            size, first = piece[2].numel(), layer < 0
            while layer < 0 or start >= layers[layer][1]:
                layer, first = layer + 1, True
            if first or self.lengths[-1] + size > limit:
                self._tiles.append([])
                self.lengths.append(0)
                self.layers.append(layer)
            self._tiles[-1].append(piece)
            self.lengths[-1] += size
            start += size
        whole = all(rows is None for tile in self._tiles for _, rows, _ in tile)
        self.fixed = self._make(self._originals) if whole else None
        self._places: list[int] = []
        self._made: list[list[tuple[Tensor, ...]]] = []

    def pieces(self) -> list[list[tuple[Tensor, ...]]]:
        """The pieces of each tile: of a parameter, to write without gradients, and the vectors."""
        if self.fixed is not None:
            return self.fixed
        places = [own.data_ptr() for own in self._originals]
        if places != self._places:  # the module has replaced the memory of its parameters
            self._places, self._made = places, self._make([p.detach() for p in self._originals])
        return self._made

    def _make(self, own: Sequence[Tensor]) -> list[list[tuple[Tensor, ...]]]:
        sizes = [shape.numel() for tile in self._tiles for *_, shape in tile]
        flats = zip(*(vector.split(sizes) for vector in self._vectors), strict=True)
        return [
            [
                (own[i] if rows is None else own[i][rows], *(x.view(shape) for x in next(flats)))
                for i, rows, shape in tile
            ]
            for tile in self._tiles
        ]


def _pieces(shapes: Sequence[torch.Size], limit: int) -> Iterator[Piece]:
    """Parameters, or rows of them, of `limit` coordinates at most unless a row has more."""
    for i, shape in enumerate(shapes):
        if shape.numel() > limit:
            step = max(1, limit * shape[0] // shape.numel())
            for a in range(0, shape[0], step):
                b = min(a + step, shape[0])
                yield i, slice(a, b), torch.Size([b - a, *shape[1:]])
        elif shape.numel():
            yield i, None, shape


def _tiles(layout: FlatLayout, limit: int) -> list[Tile]:
    """All coordinates in order, `limit` of them in a tile at most, unless a row has more."""
    tiles: list[Tile] = []
    layer = start = room = 0
    for i, shape in enumerate(layout.shapes):
        if shape.numel() == 0:
            continue
        while start >= layout.layers[layer][1]:
            layer += 1
        start += shape.numel()
        pieces: list[Piece] = [(i, None, shape)]
        if shape.numel() > limit:
            step = max(1, limit * shape[0] // shape.numel())
            rows = [slice(a, min(a + step, shape[0])) for a in range(0, shape[0], step)]
            pieces = [(i, own, torch.Size([own.stop - own.start, *shape[1:]])) for own in rows]
        for piece in pieces:
            size = piece[2].numel()
            if not tiles or size > room:
                tiles.append(Tile([], {}))
                room = limit
            room -= size
            tiles[-1].pieces.append(piece)
            tiles[-1].layers[layer] = tiles[-1].layers.get(layer, 0) + 1
    return tiles
