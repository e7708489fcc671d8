"""Passes that take subnormal numbers for zero, since a CPU computes with them many times slower.

Numbers of float32 below 1.2e-38 are common where the data of workers are one-sided: a class that a
worker never sees gets probabilities near e^-100.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_threads_started = 1  # of torch's pool, before any pass


@contextmanager
def subnormals_as_zero() -> Iterator[None]:
    """Context in which this thread takes subnormal numbers for zero, if its processor can."""
    before = _are_zero()
    if not before:
        _start_threads()
        torch.set_flush_denormal(True)
    try:
        yield
    finally:
        if not before:
            torch.set_flush_denormal(False)


def _are_zero() -> bool:
    """Whether this thread takes subnormal numbers for zero. torch has no function that tells."""
    smallest = 5e-324
    return smallest * 1.0 == 0.0


def _start_threads() -> None:
    """Start torch's threads, which keep the mode of the thread that starts them.

    Outside of the passes they must compute as ever: u is to have the same bits on all ranks,
    whatever their numbers of threads are.
    """
    global _threads_started
    if torch.get_num_threads() > _threads_started:
        _threads_started = torch.get_num_threads()
        torch.zeros(_threads_started << 16).add_(1.0)  # more numbers than torch gives one thread
