"""ViewGroup: collectives over the members of one view, which end when a member is lost."""

import pickle
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from consensus.comm.group import Group, PeerLostError, Pending, Solo
from consensus.comm.members import Members
from consensus.comm.process_group import ProcessGroup
from consensus.comm.shared_memory import available

CHECK_EVERY = timedelta(seconds=0.2)  # of a collective that waits: is a member lost?


class ViewGroup(ProcessGroup):
    """The members of a view, connected by Gloo over keys of their own in the store.

    A collective that waits asks from time to time whether a member is lost: Gloo alone notices a
    process that was killed, but not one that is stopped or cut off, nor one that has left another
    collective. torch's own table of process groups, which is that of one fixed set of ranks, does
    not have this group.

    Args:
        handle: Gloo's part of it.
        device: Device of the tensors that will be reduced.
        timeout_s: As in `ProcessGroup`.
        lost: Why a collective cannot go on, or "".
        connect: Another handle of the same members, for a purpose.
        options: Keyword arguments of `ProcessGroup`.
    """

    _exchanges = False  # to wait for a message for a short time would break its connection

    def __init__(
        self,
        handle: dist.ProcessGroupGloo,
        device: torch.device,
        timeout_s: float,
        lost: Callable[[], str],
        connect: Callable[[str], dist.ProcessGroupGloo],
        **options: Any,
    ) -> None:
        super().__init__(handle, device, timeout_s, **options)
        self._lost, self._connect, self._options = lost, connect, options
        self._sides = 0

    def lost(self) -> str:
        """As in `ProcessGroup`."""
        return self._lost()

    def side(self) -> "ViewGroup":
        """Another group of the same members, for CPU tensors of another thread. A collective."""
        self._sides += 1
        with self.reporting("start"):
            handle = self._connect(f"side/{self._sides}")
        where = torch.device("cpu"), self.timeout_s
        side = ViewGroup(handle, *where, self._lost, self._connect, **self._options)
        self._owned.callback(side.close)
        return side

    def await_work(self, work: dist.Work) -> None:
        """Wait for an operation of Gloo, or until a member is lost."""
        while True:
            try:
                work.wait(CHECK_EVERY)
                return
            except RuntimeError:
                if work.is_completed():
                    raise
            if why := self.lost():
                raise TimeoutError(why)

    def min_(self, tensor: Tensor) -> Tensor:
        """All-reduce with MIN."""
        options = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp.MIN
        with self.reporting("min"):
            self.await_work(self.handle.allreduce([tensor], options))
        return tensor

    def broadcast_(self, tensor: Tensor, source: int = 0) -> Tensor:
        """Broadcast from a rank of the view."""
        options = dist.BroadcastOptions()
        options.rootRank = source
        with self.reporting("broadcast"):
            self.await_work(self.handle.broadcast([tensor], options))
        return tensor

    def start_reduce(self, tensor: Tensor) -> Pending:
        """Asynchronous all-reduce with SUM."""
        with self.reporting("sum"):
            work = self.handle.allreduce([tensor], dist.AllreduceOptions())
        return self._pending("sum", work, tensor)

    def start_gather(self, tensor: Tensor, out: Tensor) -> Pending:
        """Asynchronous all-gather."""
        with self.reporting("gather"):
            work = self.handle.allgather([list(out.unbind())], [tensor])
        return self._pending("gather", work, out)

    def gather(self, tensor: Tensor) -> Tensor:
        """All-gather."""
        out = tensor.new_empty(self.size, *tensor.shape)
        return self.start_gather(tensor, out).wait()

    def share(self, value: Any, source: int = 0) -> Any:
        """Broadcast of a pickled object from a rank of the view."""
        content = _packed(value) if self.rank == source else torch.empty(0, dtype=torch.uint8)
        length = self.broadcast_(torch.tensor([len(content)]), source)
        if self.rank != source:
            content = torch.empty(int(length), dtype=torch.uint8)
        return _unpacked(self.broadcast_(content, source))

    def gather_objects(self, value: Any) -> list[Any]:
        """All-gather of pickled objects."""
        content = _packed(value)
        lengths = self.gather(torch.tensor([len(content)])).flatten().tolist()
        padded = torch.zeros(max(lengths), dtype=torch.uint8)
        padded[: len(content)] = content
        rows = self.gather(padded)
        return [_unpacked(row[:n]) for row, n in zip(rows, lengths, strict=True)]

    def barrier(self) -> None:
        """Wait for all members."""
        self.gather(torch.zeros(1))


def _packed(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)


def _unpacked(content: Tensor) -> Any:
    return pickle.loads(content.numpy().tobytes())


def open_view(
    members: Members,
    device: torch.device,
    timeout_s: float,
    *,
    shared_memory: bool = True,
    tree: bool = False,
) -> Group:
    """The group of the members' current view; `Solo` for one. A collective of the view.

    PeerLostError if a member is lost before all are connected.
    """
    view = members.view
    assert view is not None
    rank, size = members.rank, len(view.members)
    if size == 1:
        return Solo(device)

    def connect(purpose: str) -> dist.ProcessGroupGloo:
        """A handle, made in a thread: Gloo waits for each peer in turn, lost or not."""
        made: list[dist.ProcessGroupGloo] = []
        store = dist.PrefixStore(f"group/{view.number}/{purpose}", members.store.clone())
        limit = timedelta(seconds=timeout_s)
        work = threading.Thread(
            target=lambda: made.append(dist.ProcessGroupGloo(store, rank, size, limit)),
            name="connect",
            daemon=True,
        )
        work.start()
        while work.is_alive():
            work.join(CHECK_EVERY.total_seconds())
            if work.is_alive() and (why := members.lost()):
                raise PeerLostError(f"rank {rank}: lost a peer in `start`: {why}")
        if not made:
            raise PeerLostError(f"rank {rank}: not all members could be connected")
        return made[0]

    return ViewGroup(
        connect("main"),
        device,
        timeout_s,
        members.lost,
        connect,
        shared_memory=shared_memory and available(),
        tree=tree,
    )
