"""Communication: one process without a process group, or many over Gloo or NCCL.

Everything above sees a `Group`: the sums, minima and broadcasts of Algorithm 1, and the rule that a
rank never raises alone. Only this module and meeting.py below it import torch.distributed.
"""

import copy
import os
import re
import socket
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from consensus.comm.rendezvous import SignsOfLife, in_time, meet
from consensus.comm.shared_memory import PeersGoneError, SharedSum, available

T = TypeVar("T")


class GroupError(RuntimeError):
    """A failure that every rank knows of and raises alike."""


class PeerLostError(GroupError):
    """A collective failed because a peer is gone or late; each rank learns it by itself.

    The message names the peer where the store of the group knows it: a rank that failed left its
    last words there, one that was killed or stopped no longer shows that it lives.

    Gloo reports it where the collective is waited for. NCCL's `wait` only orders the device's
    stream: there torch's watchdog finds the lost peer after `timeout_s` and ends the process itself
    with a report of its own.
    """


class LaunchError(ValueError):
    """The environment does not describe a launch; the message names the variable."""


@dataclass(frozen=True)
class Launch:
    """What torchrun tells a process through its environment; a plain python is one of one.

    Attributes:
        rank: Of this process, among all.
        size: Number of processes.
        local_rank: Of this process, on its node.
        local_size: Number of processes on this node.
        restart: How often torchrun has started these processes again (--max-restarts).
        name: Of the launch, the same before and after a restart; "" for a plain python.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    restart: int = 0
    name: str = ""

    @classmethod
    def from_environment(cls) -> "Launch":
        """Read RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE and what torchrun says of restarts.

        Raises:
            LaunchError: If one of them is no whole number, they contradict each other, or there is
                more than one process and no address to meet at.
        """
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        values = []
        for name, default in zip(names, ("0", "1", "0", "1"), strict=True):
            text = os.environ.get(name, default)
            if not text.isdecimal():
                raise LaunchError(f"`{name}` is {text}; allowed: a whole number, as torchrun sets")
            values.append(int(text))
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        if not restart.isdecimal():
            name = "TORCHELASTIC_RESTART_COUNT"
            raise LaunchError(f"`{name}` is {restart}; allowed: a whole number, as torchrun sets")
        rank, size, local_rank, local_size = values
        launch = cls(rank, size, local_rank, local_size, int(restart), _launch_name())
        for name, rank, size in zip(names[::2], values[::2], values[1::2], strict=True):
            if rank >= size:
                of = f"{'LOCAL_' if 'LOCAL' in name else ''}WORLD_SIZE"
                raise LaunchError(f"`{name}` is {rank}; allowed: below {of} = {size}")
        absent = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if launch.size > 1 and absent:
            raise LaunchError(f"`{absent[0]}` is not set; with WORLD_SIZE > 1 start with torchrun")
        return launch

    def block(self, num_workers: int) -> range:
        """The j of the workers on this process, of M = num_workers, a multiple of `size`."""
        each = num_workers // self.size
        return range(self.rank * each, (self.rank + 1) * each)


def _launch_name() -> str:
    """The --rdzv-id of this torchrun; where it has none, its process, which restarts outlive."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "")
    if name != "none":
        return name
    return f"{socket.gethostname()}:{os.getppid()}:{_started(os.getppid())}"


def _started(pid: int) -> str:
    """When a process started, in clock ticks since boot; "" where there is no /proc."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


class Pending(ABC):
    """A sum on its way; what was handed in must not be touched before `wait`."""

    @abstractmethod
    def wait(self) -> Tensor:
        """The sum over all ranks."""


class RepeatedSum(ABC):
    """A sum of tensors of one shape that is formed again and again, in memory made for it."""

    @property
    @abstractmethod
    def message(self) -> Tensor:
        """Where this rank writes its summand, from `wait` to `start`. (numel,)."""

    @property
    def num_bytes(self) -> int:
        """Of a summand as it is sent."""
        return self.message.nbytes

    @property
    def in_shared_memory(self) -> bool:
        """Whether it is formed there, and not sent."""
        return False

    @abstractmethod
    def start(self) -> Pending:
        """Begin the sum of all messages.

        What `wait` returns is for reading, until the next `start`: it may be memory of all ranks,
        or `message` itself, which may be written to. (numel,)
        """


class Group(ABC):
    """Collectives over the processes of a run. All ranks call them in the same order.

    Methods that end in an underscore work in place and return their argument.
    """

    rank: int
    size: int

    @abstractmethod
    def sum_(self, tensor: Tensor) -> Tensor:
        """The sum over ranks."""

    @abstractmethod
    def min_(self, tensor: Tensor) -> Tensor:
        """The elementwise minimum over ranks."""

    @abstractmethod
    def broadcast_(self, tensor: Tensor) -> Tensor:
        """Rank 0's values."""

    @abstractmethod
    def start_sum(self, tensor: Tensor) -> Pending:
        """Begin `sum_`, in the tensor, so that a gradient can be computed meanwhile."""

    def repeated_sum(self, numel: int, like: Tensor) -> RepeatedSum:
        """`start_sum` of vectors (numel,) like a tensor, by the fastest way. A collective."""
        return sent_sum(self, numel, like)

    @abstractmethod
    def gather(self, tensor: Tensor) -> Tensor:
        """Everyone's tensor, on every rank. (...) -> (size, ...)."""

    @abstractmethod
    def share(self, value: Any) -> Any:
        """Rank 0's picklable object, on every rank."""

    @abstractmethod
    def gather_objects(self, value: Any) -> list[Any]:
        """Everyone's picklable object, on every rank, by rank."""

    @abstractmethod
    def barrier(self) -> None:
        """Wait for all ranks."""

    @abstractmethod
    def side(self) -> "Group":
        """A second group of the same ranks for tensors on the CPU. A collective.

        A thread may use it while another thread uses this one.
        """

    @abstractmethod
    def close(self) -> None:
        """Leave the group; no collective may follow."""

    @contextmanager
    def telling(self) -> Iterator[None]:
        """Around what may fail on this rank alone: leave word of it for the peers it abandons."""
        yield

    def raise_together(self, problem: str | None) -> None:
        """Raise on all ranks if any rank has a problem; every rank must call this.

        A rank that raised alone would leave the others waiting in their next collective.

        Raises:
            GroupError: On every rank, with the problem of the lowest rank that has one.
        """
        flag = self.min_(torch.tensor([0 if problem else 1], device=self.device))
        if int(flag) == 1:
            return
        problems = self.gather_objects(problem)
        rank = next(rank for rank, text in enumerate(problems) if text)
        text = str(problems[rank])
        raise GroupError(text if text.startswith("rank ") else f"rank {rank}: {text}")

    device: torch.device
    """Where the tensors of the collectives live."""


# What Gloo says, as a plain RuntimeError, when the other side of a connection is gone or late.
_LOST = re.compile(r"connect|timed? ?out|peer|socket|broken pipe|read error|write error", re.I)


class _Done(Pending):
    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def wait(self) -> Tensor:
        return self._tensor


class _SumOfTensors(RepeatedSum):
    def __init__(self, group: Group, message: Tensor) -> None:
        self._group, self._message = group, message

    @property
    def message(self) -> Tensor:
        return self._message

    def start(self) -> Pending:
        return self._group.start_sum(self._message)


class _SumInBfloat16(RepeatedSum):
    """Half the bytes of float32: every summand is rounded to 8 significant bits, and each addition.

    Messages are compressed as a whole, the total arrives in the message. The error of a sum of P
    summands x_r is at most P u / (1 - P u) sum_r |x_r| in each coordinate, u = 2^-8.
    """

    def __init__(self, group: Group, message: Tensor) -> None:
        self._group, self._message = group, message
        self._sent = torch.empty_like(message, dtype=torch.bfloat16)

    @property
    def message(self) -> Tensor:
        return self._message

    @property
    def num_bytes(self) -> int:
        return self._sent.nbytes

    def start(self) -> Pending:
        return _Expanded(self._group.start_sum(self._sent.copy_(self._message)), self._message)


class _Expanded(Pending):
    def __init__(self, pending: Pending, out: Tensor) -> None:
        self._pending, self._out = pending, out

    def wait(self) -> Tensor:
        return self._out.copy_(self._pending.wait())


def sent_sum(group: Group, numel: int, like: Tensor, compress: str | None = None) -> RepeatedSum:
    """A repeated sum that sends its messages, as they are or compressed (None or "bf16")."""
    message = like.new_empty(numel)
    return _SumOfTensors(group, message) if compress is None else _SumInBfloat16(group, message)


class Solo(Group):
    """One process: every collective is the identity, and no process group exists."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.rank = 0
        self.size = 1
        self.device = torch.device(device)

    def sum_(self, tensor: Tensor) -> Tensor:
        """The argument."""
        return tensor

    def min_(self, tensor: Tensor) -> Tensor:
        """The argument."""
        return tensor

    def broadcast_(self, tensor: Tensor) -> Tensor:
        """The argument."""
        return tensor

    def start_sum(self, tensor: Tensor) -> Pending:
        """The argument, at once."""
        return _Done(tensor)

    def gather(self, tensor: Tensor) -> Tensor:
        """(...) -> (1, ...)."""
        return tensor.unsqueeze(0)

    def share(self, value: Any) -> Any:
        """The argument."""
        return value

    def gather_objects(self, value: Any) -> list[Any]:
        """The argument, alone."""
        return [value]

    def barrier(self) -> None:
        """Nothing to wait for."""

    def side(self) -> "Solo":
        """Another like it."""
        return Solo("cpu")

    def close(self) -> None:
        """Nothing to leave."""


class _Work(Pending):
    def __init__(self, group: "ProcessGroup", work: dist.Work, tensor: Tensor) -> None:
        self._group, self._work, self._tensor = group, work, tensor

    def wait(self) -> Tensor:
        with self._group.reporting("sum"):
            self._work.wait()
        return self._tensor


class _SumInSharedMemory(RepeatedSum, Pending):
    def __init__(self, group: "ProcessGroup", shared: SharedSum) -> None:
        self._group, self._shared = group, shared

    @property
    def message(self) -> Tensor:
        return self._shared.message

    @property
    def in_shared_memory(self) -> bool:
        return True

    def start(self) -> Pending:
        self._shared.start()
        return self

    def wait(self) -> Tensor:
        with self._group.reporting("sum"):
            return self._shared.wait()


class ProcessGroup(Group):
    """Many processes, one torch.distributed process group.

    Args:
        launch: Rank and size.
        backend: "gloo" or "nccl".
        device: Of the tensors that will be reduced.
        timeout_s: After which a collective that waits for a peer fails. Seconds.
        init_method: Where the processes meet: "env://" under torchrun.
        shared_memory: Whether repeated sums may use it: on one machine, for tensors on the CPU.
        compress: "bf16" sends repeated sums in bfloat16, but for those in shared memory, which are
            not sent; None sends them as they are.

    Attributes:
        handle: What torch's own collective functions take.

    Raises:
        PeerLostError: If the processes do not meet.
    """

    def __init__(
        self,
        launch: Launch,
        backend: str,
        device: torch.device,
        timeout_s: float,
        init_method: str = "env://",
        shared_memory: bool = True,
        compress: str | None = None,
    ) -> None:
        assert compress in (None, "bf16"), compress
        self.rank, self.size, self.device = launch.rank, launch.size, device
        self._compress = compress
        self._shared_memory = may_share_memory(launch, shared_memory)
        self._shared_sums: list[SharedSum] = []
        self._timeout = timedelta(seconds=timeout_s)
        self._signs: SignsOfLife | None = None
        self._sides: list[ProcessGroup] = []
        with self.reporting("start"):
            place = dist.rendezvous(init_method, launch.rank, launch.size, timeout=self._timeout)
            store, _, _ = next(iter(place))
            store.set_timeout(self._timeout)
            store = dist.PrefixStore(meet(store, launch.rank, launch.size, timeout_s), store)
            self._signs = SignsOfLife(dist.PrefixStore("alive", store), launch.rank, launch.size)

            def connect() -> None:
                dist.init_process_group(
                    backend,
                    store=dist.PrefixStore("group", store),
                    rank=launch.rank,
                    world_size=launch.size,
                    timeout=self._timeout,
                    device_id=device if backend == "nccl" else None,  # binds NCCL to its device
                )

            if backend == "nccl":  # it wants the thread whose device is set, and has a watchdog
                connect()
            else:
                self._in_time(connect)
        assert dist.group.WORLD is not None
        self.handle: dist.ProcessGroup = dist.group.WORLD

    def _in_time(self, connect: Callable[[], T]) -> T:
        """Let Gloo connect. It waits for each peer in turn, and the timeout is for all of them.

        Raises:
            TimeoutError: If not all are there in time.
        """
        late = "not all ranks were connected in time"
        return in_time(connect, self._timeout.total_seconds(), late)

    @contextmanager
    def reporting(self, operation: str) -> Iterator[None]:
        """Turn a lost peer into one line that names the rank and the collective.

        Other errors, such as two ranks that disagree on a shape, are bugs and keep their traceback.
        """
        try:
            yield
        except (RuntimeError, TimeoutError) as error:
            lost = isinstance(error, dist.DistError | PeersGoneError | TimeoutError)
            if not lost and not _LOST.search(str(error)):
                raise
            cause = (str(error).strip() or repr(error)).splitlines()[0]
            who = self._signs.missing() if self._signs is not None else ""
            raise PeerLostError(
                f"rank {self.rank}: lost a peer in `{operation}`: {who or cause}"
            ) from error

    @contextmanager
    def telling(self) -> Iterator[None]:
        """Around what may fail on this rank alone: leave word of it for the peers it abandons."""
        try:
            yield
        except GroupError:
            raise  # the others know, or have lost the same peer
        except BaseException as error:
            if self._signs is not None:
                self._signs.last_words(f"{type(error).__name__}: {error}".splitlines()[0])
            raise

    def side(self) -> "ProcessGroup":
        """A Gloo group of the same ranks."""
        side = copy.copy(self)
        side.device = torch.device("cpu")
        with self.reporting("start"):
            handle = self._in_time(lambda: dist.new_group(backend="gloo", timeout=self._timeout))
        assert isinstance(handle, dist.ProcessGroup)
        side.handle = handle
        self._sides.append(side)
        return side

    def sum_(self, tensor: Tensor) -> Tensor:
        """All-reduce with SUM."""
        return self.start_sum(tensor).wait()

    def min_(self, tensor: Tensor) -> Tensor:
        """All-reduce with MIN."""
        with self.reporting("min"):
            dist.all_reduce(tensor, dist.ReduceOp.MIN, group=self.handle)
        return tensor

    def broadcast_(self, tensor: Tensor) -> Tensor:
        """Broadcast from rank 0."""
        with self.reporting("broadcast"):
            dist.broadcast(tensor, src=0, group=self.handle)
        return tensor

    def start_sum(self, tensor: Tensor) -> Pending:
        """Asynchronous all-reduce with SUM."""
        with self.reporting("sum"):
            work = dist.all_reduce(tensor, dist.ReduceOp.SUM, self.handle, async_op=True)
        assert work is not None
        return _Work(self, work, tensor)

    def repeated_sum(self, numel: int, like: Tensor) -> RepeatedSum:
        """In shared memory where all ranks have it and the tensors are on the CPU.

        Raises:
            PeerLostError: If a peer does not answer.
        """
        if numel == 0:
            return sent_sum(Solo(), numel, like)  # nothing to send
        shared = None
        if like.device.type == "cpu":
            shared = self._share_memory(numel, like.dtype)
        if shared is not None:
            return shared
        return sent_sum(self, numel, like, self._compress)

    def _share_memory(self, numel: int, dtype: torch.dtype) -> "_SumInSharedMemory | None":
        """The sum in memory of all ranks, or None on all ranks if one of them cannot."""
        if not self._all(self._shared_memory):
            return None
        path, problem = "", ""
        shared = None
        if self.rank == 0:
            try:
                path = SharedSum.reserve(self.size, numel, dtype)
            except OSError as error:
                problem = str(error)
        try:
            place = self.share(path)
            if place:
                timeout_s = self._timeout.total_seconds()
                try:
                    shared = SharedSum(place, self.rank, self.size, numel, dtype, timeout_s)
                except OSError as error:
                    problem = str(error)
            together = self._all(shared is not None)
        finally:
            if path:  # all have it open, or none will
                SharedSum.forget(path)
        if shared is not None and together:
            self._shared_sums.append(shared)
            return _SumInSharedMemory(self, shared)
        if shared is not None:
            shared.close()
        if problem:
            warnings.warn(
                f"rank {self.rank}: no shared memory, sums go through Gloo: {problem}", stacklevel=2
            )
        return None

    def _all(self, here: bool) -> bool:
        return bool(self.min_(torch.tensor([int(here)], device=self.device)).item())

    def gather(self, tensor: Tensor) -> Tensor:
        """All-gather."""
        pieces = [torch.empty_like(tensor) for _ in range(self.size)]
        with self.reporting("gather"):
            dist.all_gather(pieces, tensor, group=self.handle)
        return torch.stack(pieces)

    def share(self, value: Any) -> Any:
        """Broadcast of a pickled object from rank 0."""
        box = [value]
        with self.reporting("share"):
            dist.broadcast_object_list(box, src=0, group=self.handle)
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
        """Destroy the process group, and its sides with it.

        Whoever still holds a side must not keep its threads: one that is left when the process ends
        may abort it.
        """
        if self._signs is not None:
            self._signs.stop()
            self._signs = None
        for shared in self._shared_sums:
            shared.close()
        self._shared_sums.clear()
        for group in (*self._sides, self):
            if hasattr(group, "handle"):
                del group.handle  # the last reference closes the connections, which peers notice
        self._sides.clear()
        if dist.is_initialized():
            dist.destroy_process_group()


def backends() -> list[str]:
    """Those that this torch has."""
    there = {"gloo": dist.is_gloo_available(), "nccl": dist.is_nccl_available()}
    return [name for name, has in there.items() if has]


def choose_backend(name: str, device: torch.device, launch: Launch) -> str:
    """The backend for `group`: gloo or nccl as named; auto takes NCCL where it can work.

    NCCL needs a CUDA device of its own for every process; otherwise Gloo, which also takes CUDA
    tensors, through the host.
    """
    if name != "auto":
        return name
    own_device = device.type == "cuda" and launch.local_size <= torch.cuda.device_count()
    return "nccl" if own_device and "nccl" in backends() else "gloo"


def may_share_memory(launch: Launch, wanted: bool) -> bool:
    """Whether sums may be formed in shared memory: all ranks on one machine that can."""
    return wanted and launch.local_size == launch.size and available()


def open_group(
    launch: Launch,
    backend: str,
    device: torch.device,
    timeout_s: float,
    shared_memory: bool = True,
    compress: str | None = None,
) -> Group:
    """The group of this run: `Solo` for one process, otherwise a `ProcessGroup`."""
    if launch.size == 1:
        return Solo(device)
    return ProcessGroup(
        launch, backend, device, timeout_s, shared_memory=shared_memory, compress=compress
    )
