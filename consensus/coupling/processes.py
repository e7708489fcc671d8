"""The processes of a coupling: one of each worker, and the others of this worker."""

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from consensus.comm import Group, Solo, group_inside, group_of_user, reshard
from consensus.core.sharded import Shards


class Processes:
    """Groups over the M workers and over the S processes of this worker.

    A worker is one process. Or it is several that hold its copy in shards (fully_shard), or that
    train it together (DistributedDataParallel). Process s of a worker is coupled with process s of
    the others. All methods are collectives of all processes.

    Args:
        workers: One process of each worker, this one among them.
        model: The copy of this worker.
        timeout_s: Longest wait for another process, in seconds.

    Attributes:
        inside: Group of the processes of this worker; `Solo` for one.
        shards: Sums over `inside` if the parameters are sharded; None: each process has all.
    """

    def __init__(self, workers: Group, model: nn.Module, timeout_s: float) -> None:
        self._model, self.workers = model, workers
        reshard(model)
        device, inside = device_of(model), group_inside(model)
        self.inside: Group = Solo(device)
        if inside is not None:
            self.inside = group_of_user(inside, device, timeout_s)
        self.shards: Shards | None = None
        if any(hasattr(own, "placements") for own in model.parameters()):
            self.shards = Shards(self.inside.sum_, self.inside.min_)

    def reshard(self) -> None:
        """Free the parameters that fully_shard has gathered: the shards will be read or written."""
        if self.shards is not None:
            reshard(self._model)

    def raise_together(self, problem: str | None) -> None:
        """Raise a ValueError on all processes if any has a problem."""
        for group, member in (self.workers, "rank"), (self.inside, "process"):
            if group.size > 1:
                problem = group.first_problem(problem, member)
        if problem is not None:
            raise ValueError(problem)

    def require_equal(self, of_all: Mapping[str, Any], of_workers: Mapping[str, Any]) -> None:
        """Raise a ValueError on all processes if values differ.

        Those `of_workers` differ between the processes of one worker where it is sharded.
        """
        problem = _difference(self.workers, {**of_all, **of_workers})
        if self.inside.size > 1:
            # Every process knows of a difference before the next comparison, or none does.
            problem = self.inside.first_problem(problem, "process")
            problem = problem or _difference(self.inside, of_all)
        if problem is not None:
            raise ValueError(problem)

    def mean_(self, buffers: Sequence[Tensor]) -> None:
        """The mean of each buffer, in place."""
        self.workers.mean_(buffers)
        self.inside.mean_(buffers)

    def close(self) -> None:
        """Leave the groups."""
        self.workers.close()
        self.inside.close()


def device_of(model: nn.Module) -> torch.device:
    """The device of the first parameter that has one; else the CPU. ValueError: no model."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"`model` is a {type(model).__name__}; allowed: a torch.nn.Module")
    devices = (parameter.device for parameter in model.parameters() if not parameter.is_meta)
    return next(devices, torch.device("cpu"))


def _difference(group: Group, values: Mapping[str, Any]) -> str | None:
    """A sentence about a value that is not the same on all ranks, if any. A collective."""
    first, *others = group.gather_objects(dict(values))
    for rank, own in enumerate(others, start=1):
        for key, value in first.items():
            if own[key] != value:
                shown, allowed = _shown(own[key], value), "the same on all"
                if key == "weights":  # a digest says nothing
                    shown, allowed = "", f"{allowed}, as torch.manual_seed(0) before makes them"
                return f"`{key}` on rank {rank} differs from rank 0{shown}; allowed: {allowed}"
    return None


def _shown(own: Any, first: Any) -> str:
    """The first difference of two values, if a reader can use it; `none`: a list is shorter."""
    if isinstance(own, list) and isinstance(first, list):
        pairs = zip_longest(own, first, fillvalue="none")
        own, first = next((a, b) for a, b in pairs if a != b)
    return f" ({own}, {first})" if isinstance(first, str | float | int) else ""
