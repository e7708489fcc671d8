"""Numbers as int8 in blocks of 256, with a float32 scale for each block.

    s_b = max |x_i| / 127 over block b      q_i = round(x_i / s_b)      x_i is decoded as q_i s_b

The error of a number is at most s_b / 2, and about 1.02 bytes are needed for it. A block that holds
a number that is not finite is decoded as numbers that are not finite.
"""

import itertools

import torch
from torch import Tensor

BLOCK = 256  # numbers with one scale
TILE = 256  # blocks that are encoded at once: their temporaries stay in a core's cache
LARGEST = 127.0


class Packet:
    """A vector in blocks, and numbers that are not rounded, in the bytes of one message.

    Args:
        numel: Size of the vector.
        exact: How many numbers are not rounded.
        dtype: Of the vector.

    Attributes:
        bytes: uint8, with views of all else.
        exact: (exact,)
        scales: float32, a row for each block. (blocks, 1)
        quantized: int8. (numel,)
    """

    def __init__(self, numel: int, exact: int, dtype: torch.dtype) -> None:
        sizes = [exact * dtype.itemsize, 4 * -(-numel // BLOCK), numel]
        self.bytes = torch.zeros(sum(sizes), dtype=torch.uint8)
        first, scales, quantized = self.bytes.split(sizes)
        self.exact, self.quantized = first.view(dtype), quantized.view(torch.int8)
        self.scales = scales.view(torch.float32).unsqueeze(1)

    def tiles(self, *vectors: Tensor) -> list[tuple[Tensor, ...]]:
        """Scales (b, 1), quantized numbers, vectors and memory for temporaries, (b, BLOCK) each.

        Vectors are (numel,). The last tile has the rest of the numbers, (1, numel % BLOCK).
        """
        numel, found = len(self.quantized), []
        memory = torch.empty(min(numel, TILE * BLOCK), dtype=vectors[0].dtype)
        ends = [*range(0, numel // BLOCK * BLOCK, TILE * BLOCK), numel // BLOCK * BLOCK, numel]
        for start, stop in itertools.pairwise(ends):
            if stop > start:
                rows = -(-(stop - start) // BLOCK)
                own = [x[start:stop] for x in (self.quantized, *vectors)]
                own = [x.view(rows, -1) for x in (*own, memory[: stop - start])]
                first = start // BLOCK
                found.append((self.scales[first : first + rows], *own))
        return found


class Encoder:
    """Encodes x + added again and again; x becomes what the rounding has left. (numel,)."""

    def __init__(self, packet: Packet, x: Tensor, added: Tensor) -> None:
        self._tiles = packet.tiles(x, added)

    def __call__(self) -> None:
        """Encode."""
        tiny = torch.finfo(torch.float32).tiny  # for blocks of zeros and of subnormal numbers
        for scale, quantized, x, added, memory in self._tiles:
            x += added
            largest = torch.abs(x, out=memory).amax(1, keepdim=True)
            scale.copy_(largest).div_(LARGEST).clamp_(min=tiny)
            quantized.copy_(torch.div(x, scale, out=memory).round_())
            x -= memory.mul_(scale)


class Decoder:
    """Decodes a packet again and again, to `out`, or adds it to `out`. (numel,)."""

    def __init__(self, packet: Packet, out: Tensor, add: bool = False) -> None:
        self._tiles, self._add = packet.tiles(out), add

    def __call__(self) -> None:
        """Decode."""
        for scale, quantized, out, memory in self._tiles:
            if self._add:
                out += memory.copy_(quantized).mul_(scale)
            else:
                out.copy_(quantized).mul_(scale)
