"""Sums along a fixed tree over the workers, which have the same bits on several layouts.

A node with m leaves has p children with m / p leaves each, p the smallest prime factor of m; their
sums are added from left to right. P processes with K = M / P workers each form the sum over all M
workers in two parts, over their own and over the processes. These are the same additions wherever
the blocks of K workers are nodes of the tree over M: `layouts`.

    M = 4      ((0 + 1) + (2 + 3))                          1, 2 or 4 processes
    M = 12     two nodes of 6, four of 3, twelve leaves     1, 2, 4 or 12 processes
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

CHUNK = 1 << 17  # numbers that are added up at once: they stay in a core's cache


def tree_sum(parts: Sequence[Tensor], out: Tensor | None = None) -> Tensor:
    """The sum of tensors of one shape, at least one, along the tree; to `out`, which is no part."""
    if out is None:
        out = torch.empty_like(parts[0])
    if len(parts) == 1:
        return out.copy_(parts[0])
    children = _children(parts)
    if len(children[0]) == 1:  # all of them leaves
        torch.add(parts[0], parts[1], out=out)
        for leaf in parts[2:]:
            out += leaf
        return out
    tree_sum(children[0], out)
    for child in children[1:]:
        out += tree_sum(child)
    return out


def adding(summands: Tensor, out: Tensor) -> Callable[[], None]:
    """The function that adds up the rows of (P, n) to `out` (n,), always in this memory."""
    vectors = [*summands.unbind(), out]  # their views take longer than a small sum
    pieces = list(zip(*(torch.split(vector, CHUNK) for vector in vectors), strict=True))

    def add() -> None:
        for *parts, total in pieces:
            if len(parts) == 2:
                torch.add(parts[0], parts[1], out=total)
            else:
                tree_sum(parts, total)

    return add


def _children(parts: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    each = len(parts) // _smallest_factor(len(parts))
    return [parts[start : start + each] for start in range(0, len(parts), each)]


def layouts(workers: int) -> list[int]:
    """The numbers of processes whose blocks of workers are nodes of the tree."""
    found, left = [1], workers
    while left > 1:
        factor = _smallest_factor(left)
        found.append(found[-1] * factor)
        left //= factor
    return found


def _smallest_factor(m: int) -> int:
    """The smallest prime factor of m > 1."""
    return next((p for p in range(2, int(m**0.5) + 1) if m % p == 0), m)
