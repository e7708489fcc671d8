"""Independent random streams, derived from the seed of a run.

A stream is a function of (seed, purpose, keys) alone. It does not depend on the number of
processes, on the device, or on other streams. Four workers in one process and four processes with
one worker each are therefore the same run.
"""

import hashlib
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def stream_seed(seed: int, purpose: str, *keys: int) -> int:
    """The 63-bit seed of a stream: a hash, so that neighbouring seeds give unrelated streams.

    The purpose is "init", "partition", "minibatch", ...; the keys distinguish streams of one
    purpose, such as worker and epoch.
    """
    # repr keeps (1, 23) and (12, 3) apart; int() because numpy integers print differently
    name = repr((int(seed), purpose, tuple(int(key) for key in keys)))
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def stream(seed: int, purpose: str, *keys: int) -> torch.Generator:
    """A CPU generator at the start of the stream (seed, purpose, keys).

    The generator is on the CPU on every device, so that every device draws the same numbers.
    torch's CPU generator uses the low 32 bits of its seed: two given streams coincide with
    probability 2^-32.
    """
    return torch.Generator().manual_seed(stream_seed(seed, purpose, *keys))


def seed_all(seed: int) -> None:
    """Seed the global generators of torch (of every device), NumPy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  (a user's model may draw from it)
    random.seed(seed)


@contextmanager
def restored_generators(device: torch.device | None = None) -> Iterator[Callable[[], bool]]:
    """Restore the global generators of torch, NumPy and Python at the end.

    Those of the CPU and of one CUDA device. Yields a function: whether one of them has advanced.
    """
    devices = [device] if device is not None and device.type == "cuda" else []

    def states() -> list[Any]:
        of_torch = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, devices)]
        of_numpy: Any = np.random.get_state()  # noqa: NPY002
        key = of_numpy[1].tobytes()  # the position alone returns after each 624 words
        return [*(x.tolist() for x in of_torch), key, *of_numpy[2:], random.getstate()]

    of_numpy, of_python = np.random.get_state(), random.getstate()  # noqa: NPY002
    with torch.random.fork_rng(devices=devices):
        before = states()
        try:
            yield lambda: states() != before
        finally:
            np.random.set_state(of_numpy)  # noqa: NPY002
            random.setstate(of_python)
