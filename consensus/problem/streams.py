"""Independent random streams, derived from the seed of a run.

A stream is a function of (seed, purpose, keys) alone. It does not depend on the number of
processes, on the device, or on other streams. Four workers in one process and four processes with
one worker each are therefore the same run.
"""

import hashlib

import torch
from torch import Tensor, nn


def stream_seed(seed: int, purpose: str, *keys: int) -> int:
    """The 63-bit seed of a stream: a hash, so that neighbouring seeds give unrelated streams.

    Args:
        seed: The seed of the run.
        purpose: The use of the stream: "init", "partition", "minibatch", ...
        *keys: Numbers that distinguish streams of one purpose, such as worker and epoch.
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


@torch.no_grad()
def draws_random_numbers(model: nn.Module, inputs: Tensor) -> bool:
    """Whether a forward pass advances one of torch's global generators.

    The probe runs the model once, in its current mode, and compares generator states. The class of
    a module would not tell: `torch.nn.functional.dropout`, stochastic depth and attention with
    dropout contain no dropout module. The generators of the CPU and of the device of `inputs` are
    restored.

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
