"""Independent random streams, one for each purpose, all derived from the one seed of a run.

A stream is a function of (seed, purpose, keys) alone: not of the number of processes, of the
device, or of what was drawn before from another stream. That is why four workers in one process
and four processes with one worker each are the same run.
"""

import hashlib

import torch
from torch import Tensor, nn


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


@torch.no_grad()
def draws_random_numbers(model: nn.Module, inputs: Tensor) -> bool:
    """Whether a forward pass advances one of torch's global generators.

    Found by trying and not by the class of a module: `torch.nn.functional.dropout`, stochastic
    depth or an attention with dropout draw without any dropout module. The model runs once, in the
    mode it is in. The generators of the CPU and of the device of `inputs` are restored afterwards.

    Args:
        model: On the device of `inputs`.
        inputs: A minibatch. (B, ...)
    """
    device = inputs.device
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        before = _generator_states(device)
        model(inputs)
        after = _generator_states(device)
    return any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def _generator_states(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states
