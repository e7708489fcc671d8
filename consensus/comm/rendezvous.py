"""Rendezvous and heartbeat, through a key-value store that all processes reach."""

import hashlib
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future, wait
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from consensus.comm.group import GroupError

T = TypeVar("T")

Store = dist.Store
"""A key-value store of torch."""


def in_thread(work: Callable[[], T], name: str) -> Future[T]:
    """Future of a call in a daemon thread: at its end the process does not wait for peers."""
    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(work())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return result


def in_time(work: Callable[[], T], timeout_s: float, problem: str) -> T:
    """Result of a call that may block for ever, such as a connection to an unreachable peer.

    After `timeout_s` seconds it raises TimeoutError(problem), and the call goes on in its thread.
    """
    result = in_thread(work, "in-time")
    wait([result], timeout_s)
    if not result.done():
        raise TimeoutError(problem)
    return result.result()


def first_line(error: BaseException) -> str:
    """First line of an error message."""
    return (str(error).strip() or repr(error)).splitlines()[0]


def open_store(
    rank: int, size: int, timeout_s: float, init_method: str = "env://"
) -> dist.PrefixStore:
    """Key-value store of the ranks of one start, after all of them have come. A collective.

    `timeout_s` holds for the rendezvous, and for each operation of the store. Raises TimeoutError,
    which names a rank that does not come or a host whose name does not resolve, or RuntimeError if
    the store cannot be reached.
    """
    timeout = timedelta(seconds=timeout_s)
    if init_method == "env://":
        await_name(os.environ.get("MASTER_ADDR", ""), timeout_s)
    store, _, _ = next(iter(dist.rendezvous(init_method, rank, size, timeout=timeout)))
    store.set_timeout(timeout)
    return dist.PrefixStore(meet(store, rank, size, timeout_s), store)


def await_name(host: str, timeout_s: float) -> None:
    """Wait until the name of a host resolves, which in a cluster may take a while at the start.

    torch would try without end. TimeoutError after `timeout_s` seconds.
    """
    problem = f"the name of the host {host} (MASTER_ADDR) does not resolve on this machine"
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            in_time(lambda: socket.getaddrinfo(host, None), timeout_s, problem)
            return
        except OSError as error:
            if isinstance(error, TimeoutError) or time.monotonic() > deadline:
                raise TimeoutError(problem) from error
        time.sleep(0.5)


def meet(store: dist.Store, rank: int, size: int, timeout_s: float) -> str:
    """A key prefix that is unique to this start of the ranks, agreed on by all of them.

    torchrun keeps one store over all its restarts. It may hold keys of ranks that are dead, among
    them addresses for Gloo, and no environment variable tells one start from another on all nodes.
    So each rank draws a random number. Rank 0 publishes the list of all numbers again and again,
    until every rank has found its own on the list. TimeoutError names the ranks that are absent.
    """
    mine = uuid.uuid4().hex
    store.set(f"rank/{rank}", mine)
    deadline = time.monotonic() + timeout_s
    while True:
        if rank == 0:
            seen = ",".join(read_text(store, f"rank/{r}") for r in range(size))
            store.set("seen", seen)
        else:
            seen = read_text(store, "seen")
        met = hashlib.sha256(seen.encode()).hexdigest()
        if seen.split(",")[rank:][:1] == [mine]:
            store.set(f"{met}/{rank}", "here")
            if rank == 0 and all(read_text(store, f"{met}/{r}") for r in range(size)):
                store.set(f"{met}/all", "here")
            if read_text(store, f"{met}/all"):
                return met
        if time.monotonic() > deadline:
            absent = ", ".join(str(r) for r in range(size) if not read_text(store, f"{met}/{r}"))
            raise TimeoutError(f"rank {absent} did not come within {timeout_s:g} s")
        time.sleep(0.05)


def read_text(store: dist.Store, key: str) -> str:
    """The text of a key; "" if it is absent."""
    return store.get(key).decode(errors="replace") if store.check([key]) else ""


class Heartbeat:
    """Heartbeat of this rank, and the failures that ranks have published, in a store.

    A thread increments a counter there, until the rank is killed or stopped or its host is cut off.
    Counters are read after a collective has failed, never before: no collective waits for them.
    """

    PERIOD_S = 0.5
    ANSWER_S = 10.0  # timeout of the store: a cut connection gives no error

    def __init__(self, store: dist.Store, rank: int, size: int) -> None:
        self._rank, self._size = rank, size
        self._store = store.clone()  # a connection of its own: no other thread waits on it
        self._store.set_timeout(timedelta(seconds=5.0))
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._set("count", "0")
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        beats = 0
        while not self._stopped.wait(self.PERIOD_S):
            beats += 1
            try:
                self._set("count", str(beats))
            except RuntimeError:
                return  # the store is gone, and the launcher with it

    def publish_failure(self, text: str) -> None:
        """Publish the cause of this rank's failure."""
        self._in_time(lambda: self._set("words", text))

    def describe_lost_ranks(self) -> str:
        """Failures that ranks have published, and silent ranks; or "". Takes 3 periods."""
        return self._in_time(self._describe)

    def _in_time(self, work: Callable[[], T]) -> T | str:
        """Result of the store, or a description of why there is none."""
        try:
            return in_time(work, self.ANSWER_S, "no answer")
        except RuntimeError:
            return ""  # the store is gone
        except TimeoutError:
            return "the host where the ranks have met cannot be reached from this one (cut off)"

    def _describe(self) -> str:
        self._set("waited", "1")
        before = self._texts("count")
        time.sleep(3 * self.PERIOD_S)
        after, words, waited = (self._texts(kind) for kind in ("count", "words", "waited"))
        lines = [f"rank {rank} failed: {text}" for rank, text in enumerate(words) if text]
        others = [rank for rank, text in enumerate(words) if rank != self._rank and not text]
        silent = [str(rank) for rank in others if before[rank] == after[rank]]
        if silent:
            ranks = ", ".join(silent)
            lines.append(f"no sign of life from rank {ranks} (killed, stopped or cut off)")
        late = [str(rank) for rank, text in enumerate(waited) if not text]
        if not lines and late:  # the other ranks have timed out as this one has
            lines.append(f"rank {', '.join(late)} lives but did not come in time")
        return "; ".join(lines)

    def _set(self, kind: str, text: str) -> None:
        with self._lock:
            self._store.set(f"{kind}/{self._rank}", text)

    def _texts(self, kind: str) -> list[str]:
        with self._lock:
            return [read_text(self._store, f"{kind}/{rank}") for rank in range(self._size)]

    def stop(self) -> None:
        """Join the heartbeat thread, which must end before interpreter shutdown."""
        self._stopped.set()
        self._thread.join(self.ANSWER_S)


def serve(port: int, host: str) -> tuple[Store, int]:
    """A store that this process keeps, and its port; 0: a free one.

    RuntimeError if the port cannot be had.
    """
    try:  # torch would log a stack
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("", port))
    except OSError as error:
        raise RuntimeError(str(error.strerror)) from error
    store = dist.TCPStore(host, port, is_master=True, wait_for_workers=False)
    return store, store.port


def connect(host: str, port: int, run: str, timeout: timedelta) -> Store:
    """A store that another process keeps, as seen by one run.

    TimeoutError if it cannot be reached in time.
    """
    seconds = timeout.total_seconds()
    deadline = time.monotonic() + seconds
    await_name(host, seconds)
    _await_answer(host, port, seconds)
    problem = f"another program answers there, or none within {seconds:g} s"

    def open_client() -> dist.TCPStore:
        return dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)

    try:
        store = in_time(open_client, max(1.0, deadline - time.monotonic()), problem)
    except RuntimeError as error:
        raise TimeoutError(f"{problem}: {first_line(error)}") from error
    return dist.PrefixStore(f"elastic/{run}", store)


def connect_to_launcher(timeout: timedelta) -> Store:
    """The store that the launcher of this process has named in its environment.

    GroupError if it cannot be reached in time; KeyError without MASTER_ADDR and MASTER_PORT.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        return connect(host, port, os.environ.get("CONSENSUS_RUN", ""), timeout)
    except (RuntimeError, TimeoutError) as error:
        raise GroupError(f"no store at {host}:{port}: {first_line(error)}") from error


def _await_answer(host: str, port: int, timeout_s: float) -> None:
    """Wait until a port takes connections, since torch logs a stack for each attempt."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection((host, port), timeout=min(timeout_s, 5.0)).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                problem = f"nothing answers within {timeout_s:g} s"
                raise TimeoutError(f"{problem} ({error.strerror or error})") from error
        time.sleep(0.1)
