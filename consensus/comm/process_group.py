"""ProcessGroup: collectives over a process group of torch.distributed, Gloo or NCCL."""

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from consensus.comm.exchanged_sum import LARGEST, ExchangedSum
from consensus.comm.group import Group, GroupError, PeerLostError, Pending, RepeatedSum, Solo
from consensus.comm.int8_sum import Int8Sum
from consensus.comm.launch import Launch
from consensus.comm.rendezvous import Heartbeat, first_line, in_time, open_store
from consensus.comm.shared_memory import PeersGoneError, available
from consensus.comm.sums import SumInSharedMemory, TreeSum, open_shared_sum, sent_sum

# Gloo raises a plain RuntimeError when the other side of a connection is gone or late.
_LOST = re.compile(r"connect|timed? ?out|peer|socket|broken pipe|read error|write error", re.I)
_LATE = "not all ranks were connected in time"


class ProcessGroup(Group):
    """A process group of torch.distributed, or a dimension of a device mesh.

        dist.init_process_group("gloo")
        group = ProcessGroup(dist.group.WORLD, torch.device("cpu"), timeout_s=600.0)
        group = ProcessGroup(mesh.get_group("worker"), torch.device("cuda", 0), timeout_s=600.0)

    Ranks are those of the group, from 0. `close` leaves `handle` and torch's default group open:
    they belong to their creator. See `open_group` for a group that is created and destroyed here.

    Args:
        handle: The process group. ValueError if this process is not a member.
        device: Device of the tensors that will be reduced.
        timeout_s: Longest wait for a peer in shared memory and while `side` connects, and in
            collectives of `side`, in seconds. Collectives on `handle` keep the timeout it has.
        shared_memory: Whether repeated sums of CPU tensors on one host may use shared memory.
        compress: "bf16" or "int8" rounds repeated sums, except those in shared memory; "int8" needs
            CPU tensors.
        tree: Whether sums have the order of tree_sum.py, whatever the backend.
        heartbeat: Source of the names of lost peers in error messages; None: the backend's message.
    """

    _exchanges = True  # whether sums of two may be exchanged messages

    def __init__(
        self,
        handle: Any,
        device: torch.device,
        timeout_s: float,
        *,
        shared_memory: bool = True,
        compress: str | None = None,
        tree: bool = False,
        heartbeat: Heartbeat | None = None,
    ) -> None:
        if isinstance(handle, int):  # new_group's answer to other processes
            raise ValueError(f"`handle` is {handle}; allowed: a group that has this process")
        assert compress in (None, "bf16", "int8"), compress
        assert not (tree and compress), "a partial sum that is rounded depends on the layout"
        self.handle, self.device, self.timeout_s = handle, device, timeout_s
        self.rank, self.size = handle.rank(), handle.size()
        self._shared_memory, self._compress, self._tree = shared_memory, compress, tree
        self._heartbeat = heartbeat
        self._owned = ExitStack()  # closed by `close`, last opened first

    def lost(self) -> str:
        """Why a collective that waits cannot go on, where this is known; else ""."""
        return ""

    def reporting(self, operation: str) -> AbstractContextManager[None]:
        """Context manager that raises `PeerLostError` if a peer is lost in a collective."""
        return _reporting(operation, self.rank, self._heartbeat)

    @contextmanager
    def publish_failure(self) -> Iterator[None]:
        """Publish a local failure so that peers can report its cause; needs a heartbeat."""
        try:
            yield
        except GroupError:
            raise  # the other ranks know it, or have lost the same peer
        except BaseException as error:
            if self._heartbeat is not None:
                text = f"{type(error).__name__}: {error}".splitlines()[0]
                self._heartbeat.publish_failure(text)
            raise

    def side(self) -> "ProcessGroup":
        """A Gloo group of the same ranks.

        torch counts the groups that a process creates and names groups by that count. If only some
        ranks of the default group open a side, the counts differ and a later `dist.new_group` of
        all ranks hangs. Open sides on all ranks, each for its own group, or not at all.
        """
        with self.reporting("start"):
            handle = _same_ranks(self.handle, self.timeout_s, "gloo")
        side = ProcessGroup(
            handle,
            torch.device("cpu"),
            self.timeout_s,
            shared_memory=self._shared_memory,
            compress=self._compress,
            tree=self._tree,
            heartbeat=self._heartbeat,
        )
        side._owned.callback(_destroy, handle)
        self._owned.callback(side.close)
        return side

    def min_(self, tensor: Tensor) -> Tensor:
        """All-reduce with MIN."""
        with self.reporting("min"):
            dist.all_reduce(tensor, dist.ReduceOp.MIN, group=self.handle)
        return tensor

    def broadcast_(self, tensor: Tensor, source: int = 0) -> Tensor:
        """Broadcast from a rank of the group."""
        with self.reporting("broadcast"):
            dist.broadcast(tensor, group=self.handle, group_src=source)
        return tensor

    def start_sum(self, tensor: Tensor) -> Pending:
        """Asynchronous all-reduce with SUM, or an all-gather and a sum along the tree."""
        return TreeSum(self, tensor).start() if self._tree else self.start_reduce(tensor)

    def start_reduce(self, tensor: Tensor) -> Pending:
        """Asynchronous all-reduce with SUM."""
        with self.reporting("sum"):
            work = dist.all_reduce(tensor, dist.ReduceOp.SUM, self.handle, async_op=True)
        return self._pending("sum", work, tensor)

    def repeated_sum(self, numel: int, like: Tensor, exact: int = 0) -> RepeatedSum:
        """In shared memory if the tensors are on the CPU and all ranks on one host; else sent."""
        if numel == 0:
            return sent_sum(Solo(), like.new_empty(0))  # nothing to send
        shared = None
        if like.device.type == "cpu":
            what = numel, like.dtype, self.timeout_s, self._shared_memory
            shared = open_shared_sum(self, *what, self.lost)
        if shared is not None:
            self._owned.callback(shared.close)
            return SumInSharedMemory(shared, self.reporting)
        message = like.new_empty(numel)
        if self._tree:
            return TreeSum(self, message)
        with self.reporting("sum"):  # a sum that announces memory finds out that a peer is lost
            if self._compress == "int8":
                return Int8Sum(self, message, exact)
            small = like.device.type == "cpu" and message.nbytes <= LARGEST  # of CPU tensors: Gloo
            exchange = self._exchanges and self.size == 2 and small
            send = partial(ExchangedSum, self) if exchange else None
            return sent_sum(self, message, self._compress, send)

    def start_gather(self, tensor: Tensor, out: Tensor) -> Pending:
        """Asynchronous all-gather."""
        with self.reporting("gather"):
            work = dist.all_gather(list(out.unbind()), tensor, self.handle, async_op=True)
        return self._pending("gather", work, out)

    def gather(self, tensor: Tensor) -> Tensor:
        """All-gather."""
        pieces = [torch.empty_like(tensor) for _ in range(self.size)]
        with self.reporting("gather"):
            dist.all_gather(pieces, tensor, group=self.handle)
        return torch.stack(pieces)

    def _pending(self, operation: str, work: dist.Work | None, result: Tensor) -> Pending:
        assert work is not None

        def wait() -> Tensor:
            with self.reporting(operation):
                self.await_work(work)
            return result

        return Pending(wait)

    def await_work(self, work: dist.Work) -> None:
        """Wait for an operation of the backend."""
        work.wait()

    def share(self, value: Any, source: int = 0) -> Any:
        """Broadcast of a pickled object from a rank of the group."""
        box = [value]
        with self.reporting("share"):
            dist.broadcast_object_list(box, group=self.handle, group_src=source)
        return box[0]

    def gather_objects(self, value: Any) -> list[Any]:
        """All-gather of pickled objects."""
        values: list[Any] = [None] * self.size
        with self.reporting("gather"):
            dist.all_gather_object(values, value, group=self.handle)
        return values

    def barrier(self) -> None:
        """Barrier."""
        with self.reporting("barrier"):
            dist.barrier(group=self.handle)

    def close(self) -> None:
        """Close what was opened here: shared sums, sides, and the group itself after `open_group`.

        The references to handles are deleted: the last one closes the connections, and a Gloo
        thread that is left at interpreter shutdown may abort the process.
        """
        self.__dict__.pop("handle", None)
        self._owned.close()


@contextmanager
def _reporting(operation: str, rank: int, heartbeat: Heartbeat | None) -> Iterator[None]:
    """PeerLostError, one line that names rank and collective, in place of a backend's errors.

    Other errors, such as two ranks that disagree on a shape, are bugs and keep their traceback.
    """
    try:
        yield
    except (RuntimeError, TimeoutError) as error:
        lost = isinstance(error, dist.DistError | PeersGoneError | TimeoutError)
        if isinstance(error, GroupError) or not (lost or _LOST.search(str(error))):
            raise  # a GroupError is that of a collective inside this one
        cause = heartbeat.describe_lost_ranks() if heartbeat is not None else ""
        line = f"rank {rank}: lost a peer in `{operation}`: {cause or first_line(error)}"
        raise PeerLostError(line) from error


def _destroy(handle: dist.ProcessGroup | None = None) -> None:
    """Destroy a process group, or all of them, unless their owner has done so."""
    if dist.is_initialized():
        dist.destroy_process_group(handle)


def _same_ranks(handle: dist.ProcessGroup, timeout_s: float, backend: str) -> dist.ProcessGroup:
    """Another process group of the same ranks. A collective."""
    ranks, gloo = dist.get_process_group_ranks(handle), backend == "gloo"

    def connect() -> dist.ProcessGroup:
        limit, some = timedelta(seconds=timeout_s), len(ranks) < dist.get_world_size()
        made = dist.new_group(ranks, limit, backend, use_local_synchronization=some)
        assert isinstance(made, dist.ProcessGroup)  # this process is one of the ranks
        if gloo:  # others may still connect: without the barrier this rank could close it too soon
            dist.barrier(made)
        return made

    # Gloo waits for each peer in turn; NCCL needs the thread whose device is set.
    return in_time(connect, timeout_s, _LATE) if gloo else connect()


def open_like(
    handle: dist.ProcessGroup, device: torch.device, timeout_s: float, shared_memory: bool
) -> ProcessGroup:
    """A group of the same ranks with connections of its own, which `close` ends. A collective.

    It is Gloo on the CPU and has the backend of `handle` elsewhere.
    """
    backend = "gloo" if device.type == "cpu" else dist.get_backend(handle)
    with _reporting("start", handle.rank(), None):
        own = _same_ranks(handle, timeout_s, backend)
    group = ProcessGroup(own, device, timeout_s, shared_memory=shared_memory)
    group._owned.callback(_destroy, own)
    return group


def backends() -> list[str]:
    """Backends that this build of torch has."""
    return [name for name in ("gloo", "nccl") if dist.is_backend_available(name)]


def choose_backend(name: str, device: torch.device, launch: Launch) -> str:
    """The backend, "gloo" or "nccl", for a name that may be "auto".

    NCCL needs a CUDA device of its own for every process. "auto" selects Gloo otherwise, which also
    takes CUDA tensors, through the host.
    """
    if name != "auto":
        return name
    own_device = device.type == "cuda" and launch.local_size <= torch.cuda.device_count()
    return "nccl" if own_device and "nccl" in backends() else "gloo"


def may_share_memory(launch: Launch, wanted: bool) -> bool:
    """Whether sums may be formed in shared memory: all ranks on one host that supports it."""
    return wanted and launch.local_size == launch.size and available()


def open_group(
    launch: Launch,
    backend: str,
    device: torch.device,
    timeout_s: float,
    shared_memory: bool = True,
    compress: str | None = None,
    init_method: str = "env://",
    tree: bool = False,
) -> Group:
    """Open the group of a run: `Solo` for one process, else torch's default group. A collective.

    Where the caller has opened torch's default group, it is another group of the same ranks; a
    GroupError if these are not all ranks of the launch.

    `close` destroys what was opened here. `timeout_s` holds for the connection (then PeerLostError)
    and for each collective. `backend` is "gloo" or "nccl", `init_method` is the rendezvous
    ("env://": the address that torchrun sets), and the other arguments are those of `ProcessGroup`.
    """
    if launch.size == 1:
        return Solo(device)
    rank, size = launch.rank, launch.size
    given = dist.group.WORLD if dist.is_initialized() else None
    if given is not None and given.size() != size:
        found = f"the default group of torch.distributed has {given.size()} processes"
        raise GroupError(f"{found}, the launch has {size} (WORLD_SIZE)")
    with _reporting("start", rank, None):
        store = open_store(rank, size, timeout_s, init_method)
        heartbeat = Heartbeat(dist.PrefixStore("alive", store), rank, size)
    connect = partial(
        dist.init_process_group,
        backend,
        store=dist.PrefixStore("group", store),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout_s),
        device_id=device if backend == "nccl" else None,  # binds NCCL to its device
    )
    with _reporting("start", rank, heartbeat):
        if given is not None:
            handle = _same_ranks(given, timeout_s, backend)
        elif backend == "nccl":  # needs the thread whose device is set, and has a watchdog
            connect()
        else:  # Gloo waits for each peer in turn, and the timeout is for all of them
            in_time(connect, timeout_s, _LATE)
    if given is None:
        assert dist.group.WORLD is not None
        handle = dist.group.WORLD
    group = ProcessGroup(
        handle,
        device,
        timeout_s,
        shared_memory=may_share_memory(launch, shared_memory),
        compress=compress,
        tree=tree,
        heartbeat=heartbeat,
    )
    group._owned.callback(_destroy, None if given is None else handle)
    group._owned.callback(heartbeat.stop)
    return group
