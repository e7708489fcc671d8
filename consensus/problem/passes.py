"""The passes of K workers through one model: one after another, or several at once.

A pass computes one worker's loss and gradient. One worker's operations may be too small to fill the
device, and then several passes at once are faster: on a GPU each on a stream of its own, on a CPU
each in a thread of its own. Neither changes what a pass computes.
"""

import copy
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait

import torch
from torch import nn

Pass = Callable[[nn.Module], None]
"""Runs the model it is given, into memory of its own; no two need each other."""


class OneAfterAnother:
    """The passes in their order."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __call__(self, passes: Sequence[Pass]) -> None:
        """Run the passes."""
        for run in passes:
            run(self._model)


STREAMS = 32
"""At most, whatever the number of passes: a GPU runs no more kernels side by side."""


class Streams:
    """Streams that share the passes. In a CUDA graph they become branches that run side by side.

    Elsewhere Python launches no faster for them.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._streams: list[torch.cuda.Stream] = []

    def __call__(self, passes: Sequence[Pass]) -> None:
        """Launch the passes behind what the current stream has been given, which waits for them."""
        current = torch.cuda.current_stream()
        number = min(len(passes), STREAMS)
        while len(self._streams) < number:
            self._streams.append(torch.cuda.Stream())
        for i in range(number):
            self._streams[i].wait_stream(current)
            with torch.cuda.stream(self._streams[i]):
                for run in passes[i::number]:
                    run(self._model)
        for stream in self._streams[:number]:
            current.wait_stream(stream)


class Threads:
    """Several passes at once, each in a thread, on the cores that torch may use.

    torch lets go of Python's lock in its operations, so that these threads share the cores by whole
    passes, where torch's own would share operations that are too small for it. A thread needs a
    model of its own, since a functional call puts the parameters of its pass into the modules. The
    copies are made once, without memory for parameters.

    They are used where the environment says OMP_WAIT_POLICY=PASSIVE: torch's own threads otherwise
    spin for milliseconds after each operation that they shared, on the cores that these need, and
    two cores are then faster without. Passes also run one after another on one core
    (`torch.get_num_threads`); if the model has buffers, which threads would share; if it draws from
    torch's global generator, from which threads would draw in any order; and if it cannot be
    copied. The first passes do, to see whether it draws.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._in_order = OneAfterAnother(model)
        passive = os.environ.get("OMP_WAIT_POLICY", "").strip().upper() == "PASSIVE"
        self._possible = passive and not any(True for _ in model.buffers())
        self._seen = False
        self._cores = 1
        self._copies: list[nn.Module] = []
        self._pool: ThreadPoolExecutor | None = None

    def __call__(self, passes: Sequence[Pass]) -> None:
        """Run the passes. If one fails, raise that when all threads are done."""
        if not self._possible or len(passes) == 1 or torch.get_num_threads() == 1:
            self._in_order(passes)
        elif not self._seen:
            before = torch.get_rng_state()
            self._in_order(passes)
            self._possible = torch.equal(before, torch.get_rng_state())
            self._seen = True
        elif (pool := self._threads(len(passes), torch.get_num_threads())) is None:
            self._in_order(passes)
        else:
            shares = [pool.submit(self._share, i, passes) for i in range(len(self._copies))]
            wait(shares)
            for share in shares:
                share.result()

    @torch.no_grad()  # which each thread has to say
    def _share(self, i: int, passes: Sequence[Pass]) -> None:
        for run in passes[i :: len(self._copies)]:
            run(self._copies[i])

    def _threads(self, passes: int, cores: int) -> ThreadPoolExecutor | None:
        """As many threads as there is work for, or None if the model cannot be copied."""
        number = min(passes, cores)
        if self._pool is None or (len(self._copies), self._cores) != (number, cores):
            try:
                self._copies = [copy_without_parameters(self._model) for _ in range(number)]
            except (TypeError, RuntimeError):
                self._possible = False
                return None
            each = cores // number
            self._pool = ThreadPoolExecutor(number, "pass", torch.set_num_threads, (each,))
            self._cores = cores
        return self._pool


def copy_without_parameters(model: nn.Module) -> nn.Module:
    """A copy of a model that serves as a function only: its parameters have no memory."""
    empty = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad)
        for p in model.parameters()
    }
    return copy.deepcopy(model, empty)
