"""A DataLoader whose items are collated samples of a dataset, for requests that it reads ahead.

It seeds the global generators for each sample, since random augmentation draws from them. An item
is thus a function of its request, in this process or in loader processes.
"""

import errno
import gc
import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import wait
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info

from consensus.private_api import loader_processes
from consensus.problem.samples import Tree, described, map_tree
from consensus.problem.streams import restored_generators

Request = tuple[list[int], list[int]]
"""Samples of a dataset, and the seed of the global generators for each."""

Batch = tuple[Tree, Tree]
"""Inputs and targets (B, ...)."""

# A loader process must outlive a stop signal to all processes of a job: its run still needs it.
_BLOCKED = {signal.SIGINT, signal.SIGHUP, signal.SIGUSR1}
if _FORK := sys.platform == "linux":
    _BLOCKED.add(signal.SIGTERM)  # `_follow` waits for it


class SampleError(RuntimeError):
    """A sample cannot be read: one line that names it and the cause.

    `errno` is that of the cause, if it has one.
    """

    def __init__(self, message: str, number: int | None = None) -> None:
        super().__init__(message)
        self.errno = number


@dataclass(frozen=True)
class Failure:
    """A sample that cannot be read, in place of a batch: an exception would lose its index."""

    index: int
    text: str
    number: int | None  # errno


def read(
    source: Any, requests: Iterable[Request], processes: int, pin_memory: bool
) -> Generator[Batch | Failure, None, None]:
    """The collated samples of each request, in order, read ahead in some processes; 0: in this one.

    The processes end with the generator, and with this process. SampleError if one has died.
    """
    loader: DataLoader[Any] = DataLoader(
        _Reader(source),
        batch_size=None,
        sampler=requests,
        num_workers=processes,
        collate_fn=_unchanged,
        pin_memory=pin_memory,
        # A start by other means would need a dataset that can be pickled, and seconds.
        multiprocessing_context="fork" if _FORK and processes else None,
        worker_init_fn=partial(_follow, os.getpid()) if _FORK else None,
        generator=torch.Generator(),  # else the DataLoader draws from the global one
    )
    found: Iterator[Any] | None = None
    try:
        with _start_of_processes() if processes else nullcontext():
            found = iter(loader)
        yield from found
    except (OSError, EOFError, RuntimeError) as error:  # those of the dataset are a `Failure`
        started = loader_processes(found)
        # Its connections close first, then its sentinel, and then the kernel says how it has ended.
        closed = wait([child.sentinel for child in started], 1.0 if started else 0.0)
        for child in started:
            if child.sentinel in closed:
                child.join()
        causes = [str(error).partition("\n")[0] or type(error).__name__]
        causes += [f"process {x.pid}: {_ending(x.exitcode)}" for x in started if not x.is_alive()]
        cause = "; ".join(causes)
        remedy = "memory is a frequent cause, or /dev/shm: fewer data.loader_workers"
        raise SampleError(f"a loader process has failed ({cause}); {remedy}") from error
    finally:
        del found  # ends the processes


def _ending(code: int | None) -> str:
    """How a process has ended, by its exit code."""
    if code is not None and code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"exit code {code}"


def read_now(source: Any, request: Request) -> Batch | Failure:
    """The collated samples of a request, read in this process."""
    return _Reader(source)[request]


class _Reader(Dataset[Any]):
    """A dataset of torch whose items are the collated samples of a request."""

    def __init__(self, source: Any) -> None:
        self.source = source

    def __getitem__(self, request: Request) -> "Batch | Failure":
        here = get_worker_info() is None
        with restored_generators() if here else nullcontext():
            return self._read(*request)

    def _read(self, numbers: list[int], seeds: list[int]) -> "Batch | Failure":
        samples = []
        for index, seed in zip(numbers, seeds, strict=True):
            _seed_generators_of_cpu(seed)
            try:
                samples.append(_sample(self.source[index]))
            except Exception as error:  # a user's dataset may do anything
                return _failure(index, error)
        try:
            inputs, targets = default_collate(samples)
            return inputs, targets
        except Exception as error:
            kinds = [described(sample) for sample in samples]
            odd = next((i for i, kind in enumerate(kinds) if kind != kinds[0]), None)
            if odd is None:
                return _failure(numbers[0], error)
            text = f"{kinds[odd]}, and sample {numbers[0]} is {kinds[0]}; allowed: one shape and"
            text += " type, for images by Resize of torchvision.transforms.v2"
            return Failure(numbers[odd], text, None)


def _failure(index: int, error: Exception) -> Failure:
    number = errno.ENOMEM if isinstance(error, MemoryError) else getattr(error, "errno", None)
    return Failure(index, " ".join(f"{type(error).__name__}: {error}".split()), number)


def _sample(sample: Any) -> tuple[Tree, Tree]:
    if not isinstance(sample, tuple | list) or len(sample) != 2:
        raise TypeError(f"{described(sample)}; allowed: a pair (input, target)")
    return map_tree(_plain, sample[0]), map_tree(_plain, sample[1])


def _plain(leaf: Any) -> Any:
    """A leaf of a sample as torch collates it."""
    if isinstance(leaf, Tensor):
        return leaf.as_subclass(Tensor)  # images of torchvision are of a class of their own
    if hasattr(leaf, "getbands"):  # an image of PIL
        pixels = torch.from_numpy(np.array(leaf))
        return pixels.movedim(2, 0) if pixels.ndim == 3 else pixels.unsqueeze(0)
    return leaf


def _unchanged(batch: Any) -> Any:
    return batch


def _seed_generators_of_cpu(seed: int) -> None:
    """Seed the global generators of torch for the CPU, NumPy and Python."""
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  (a user's dataset may draw from it)
    random.seed(seed)


_starting = False  # whether a process that is forked now is one of loaders


def _keep_all() -> None:
    """Take the objects that a loader process inherits out of its garbage collection.

    It would destroy what is garbage in its parent. To destroy a process group of torch is to wait
    for its threads, which were not forked: the loader process hangs or crashes.
    """
    if _starting:
        gc.freeze()
        gc.enable()  # `_start_of_processes` has disabled it: the hooks before this one allocate


if _FORK:
    os.register_at_fork(after_in_child=_keep_all)


@contextmanager
def _start_of_processes() -> Iterator[None]:
    """Context whose new processes block the stop signals for good, and destroy nothing.

    The handler by which torch raises the death of a loader process anywhere is removed; torch finds
    it within 5 s of waiting for a batch as well.
    """
    global _starting
    collecting = gc.isenabled()
    gc.disable()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _BLOCKED)
    handler = signal.getsignal(signal.SIGCHLD)
    _starting = True
    try:
        with warnings.catch_warnings():  # of Python 3.12 and later
            warnings.filterwarnings("ignore", ".*multi-threaded.*fork", DeprecationWarning)
            yield
    finally:
        _starting = False
        if collecting:
            gc.enable()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, handler)


def _follow(parent: int, number: int) -> None:
    """Start a thread that ends this loader process once its parent is gone, or sends SIGTERM.

    A process that is left behind would hold the connections and the lock of a killed run open.
    """

    def follow() -> None:
        while os.getppid() == parent:
            found = signal.sigtimedwait([signal.SIGTERM], 0.2)
            if found is not None and found.si_pid == parent:
                break
        os._exit(0)

    threading.Thread(target=follow, name="follow-run", daemon=True).start()
