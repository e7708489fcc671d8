"""Independent random streams, one for each purpose, all derived from the one seed of a run.

A stream is a function of (seed, purpose, keys) alone: not of the number of processes, of the
device, or of what was drawn before from another stream. That is why four workers in one process
and four processes with one worker each are the same run.
"""

import hashlib

import torch


def stream_seed(seed: int, purpose: str, *keys: int) -> int:
    """A 63-bit seed for one stream: a hash, so neighbouring seeds give unrelated streams.

    Args:
        seed: The seed of the run.
        purpose: What the stream is for: "init", "partition", "minibatch", ...
        *keys: What tells apart the streams of one purpose, such as worker and epoch.
    """
    # repr keeps (1, 23) and (12, 3) apart; int() because numpy integers print differently
    name = repr((int(seed), purpose, tuple(int(key) for key in keys)))
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def stream(seed: int, purpose: str, *keys: int) -> torch.Generator:
    """A CPU generator at the start of the stream (seed, purpose, keys).

    Always on the CPU, so that a run draws the same numbers on any device. torch's CPU generator
    uses the low 32 bits of its seed: two given streams coincide with probability 2^-32.
    """
    return torch.Generator().manual_seed(stream_seed(seed, purpose, *keys))
