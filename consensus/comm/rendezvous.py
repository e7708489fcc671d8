"""Where processes meet before they are a group: a store of keys that all of them reach.

Data flow: torchrun, or one of the nodes, keeps the store. `meet` gives the ranks of one start a
part of it that no other start has; `SignsOfLife` shows there who lives; `Exchange` passes small
values around where no collective can, since what is wrong with the network is yet to be found.
"""

import hashlib
import json
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


def in_time(work: Callable[[], T], timeout_s: float, problem: str) -> T:
    """What some work returns or raises that may wait for ever, for peers that are cut off.

    Raises:
        TimeoutError: With the text of `problem`, if it takes too long; it is left to itself.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="in-time", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(problem)
    return results[0]


def meet(store: dist.Store, rank: int, size: int, timeout_s: float) -> str:
    """A name that this start of all ranks has and no other: a part of the store for them alone.

    torchrun keeps one store over all its restarts. What it holds may be of ranks that are dead, the
    addresses at which Gloo would seek them as well, and nothing in the environment tells one start
    from another on all nodes alike. So each rank calls itself by a number that nobody had before;
    rank 0 publishes whom it sees, again and again, until all of them have found themselves on it.

    Raises:
        TimeoutError: If they have not after `timeout_s`; names the ranks that are absent.
    """
    mine = uuid.uuid4().hex
    store.set(f"rank/{rank}", mine)
    deadline = time.monotonic() + timeout_s

    def read(key: str) -> str:
        return store.get(key).decode() if store.check([key]) else ""

    while True:
        if rank == 0:
            seen = ",".join(read(f"rank/{r}") for r in range(size))
            store.set("seen", seen)
        else:
            seen = read("seen")
        met = hashlib.sha256(seen.encode()).hexdigest()
        if seen.split(",")[rank:][:1] == [mine]:
            store.set(f"{met}/{rank}", "here")
            if rank == 0 and all(read(f"{met}/{r}") for r in range(size)):
                store.set(f"{met}/all", "here")
            if read(f"{met}/all"):
                return met
        if time.monotonic() > deadline:
            absent = [r for r in range(size) if not read(f"{met}/{r}")]
            raise TimeoutError(
                f"rank {', '.join(map(str, absent))} did not come within {timeout_s:g} s"
            )
        time.sleep(0.05)


class SignsOfLife:
    """Who lives, and who said why it died, in the key-value store at which the group has met.

    A thread counts upwards in the store for as long as the process runs; a rank that is killed, or
    stopped, or whose machine is gone, no longer counts. Read after a collective has failed, never
    before: nothing waits for it.
    """

    EVERY_S = 0.5
    ANSWER_S = 10.0
    """After which the store is taken to be out of reach: a cut connection gives no error."""

    def __init__(self, store: dist.Store, rank: int, size: int) -> None:
        self._rank, self._size = rank, size
        self._store = store.clone()  # a connection of its own: no other thread waits on it
        self._store.set_timeout(timedelta(seconds=5.0))
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._store.set(f"count/{self._rank}", "0")
        self._thread = threading.Thread(target=self._count, name="signs-of-life", daemon=True)
        self._thread.start()

    def _count(self) -> None:
        beats = 0
        while not self._stopped.wait(self.EVERY_S):
            beats += 1
            try:
                with self._lock:
                    self._store.set(f"count/{self._rank}", str(beats))
            except RuntimeError:
                return  # the store is gone, and the launcher with it

    def last_words(self, text: str) -> None:
        """Say why this rank ends."""

        def say() -> str:
            with self._lock:
                self._store.set(f"words/{self._rank}", text)
            return ""

        self._in_time(say)

    def missing(self) -> str:
        """Which ranks failed, with what, and which give no sign of life; "" if nobody knows."""
        return self._in_time(self._missing)

    def _in_time(self, ask: Callable[[], str]) -> str:
        """What the store says, or that it does not answer."""
        try:
            return in_time(ask, self.ANSWER_S, "no answer")
        except RuntimeError:
            return ""  # the store is gone: nobody is left to know, or to read
        except TimeoutError:
            return "the host where the ranks have met cannot be reached from this one (cut off)"

    def _missing(self) -> str:
        with self._lock:
            self._store.set(f"waited/{self._rank}", "1")
        before = self._read("count")
        time.sleep(3 * self.EVERY_S)
        after, words, waited = (self._read(kind) for kind in ("count", "words", "waited"))
        said = [f"rank {rank} failed: {text}" for rank, text in sorted(words.items())]
        silent = [
            rank
            for rank in range(self._size)
            if rank != self._rank and rank not in words and before.get(rank) == after.get(rank)
        ]
        if silent:
            ranks = ", ".join(map(str, silent))
            said.append(f"no sign of life from rank {ranks} (killed, stopped or cut off)")
        late = [rank for rank in range(self._size) if rank not in waited]
        if not said and late:  # the others have waited in vain as this rank has
            said.append(f"rank {', '.join(map(str, late))} lives but did not come in time")
        return "; ".join(said)

    def _read(self, kind: str) -> dict[int, str]:
        found = {}
        with self._lock:
            for rank in range(self._size):
                if self._store.check([f"{kind}/{rank}"]):
                    found[rank] = self._store.get(f"{kind}/{rank}").decode(errors="replace")
        return found

    def stop(self) -> None:
        """End the counting, and wait for it: a thread in C++ must not meet Python's own end."""
        self._stopped.set()
        self._thread.join(self.ANSWER_S)


class Exchange:
    """Small values between members that have no group: what JSON can say, through a store.

    Every member calls `introduce`, `gather` and `close` in the same order; `tell` and `ask` are for
    two of them. Waiting is looking again and again, so that signals are heard meanwhile.

    Args:
        store: That all members reach.
        index: Of this member, from 0.
        size: Number of members.
        timeout_s: After which a member that is waited for is taken to be absent.
        keeps: Whether the store ends with this member, which therefore leaves last.

    Attributes:
        names: Of all members, once they are introduced.
        timeout_s: See above; may be changed, alike by all.
    """

    def __init__(
        self, store: dist.Store, index: int, size: int, timeout_s: float, *, keeps: bool = False
    ) -> None:
        self.index, self.size, self._keeps = index, size, keeps
        self.names = [f"member {i}" for i in range(size)]
        self._store, self.timeout_s = store, timeout_s
        self._rounds = 0

    @classmethod
    def alone(cls) -> "Exchange":
        """Of a single member."""
        return cls(dist.HashStore(), 0, 1, 1.0, keeps=True)

    @classmethod
    def of_ranks(cls, rank: int, size: int, timeout_s: float) -> "Exchange":
        """Of the processes of a launch, at MASTER_ADDR and MASTER_PORT.

        Raises:
            ConnectionError: If the store cannot be reached.
            TimeoutError: If a rank does not come; names it.
        """
        timeout = timedelta(seconds=timeout_s)
        try:
            store, _, _ = in_time(
                lambda: next(iter(dist.rendezvous("env://", rank, size, timeout=timeout))),
                timeout_s,
                "what answers there does not speak as a store",
            )
            store.set_timeout(timeout)
            store = dist.PrefixStore(meet(store, rank, size, timeout_s), store)
            return cls(store, rank, size, timeout_s, keeps=rank == 0)
        except RuntimeError as error:
            raise ConnectionError(_first_line(error)) from error

    @classmethod
    def of_nodes(
        cls, host: str, port: int, name: str, size: int, timeout_s: float, *, keep: bool
    ) -> "Exchange":
        """Of the nodes of a job, before it has any process. The one that keeps the store is first.

        Args:
            host: Where they meet.
            port: Where they meet.
            name: Of this start, which all its nodes share.
            size: How many they are.
            timeout_s: See above.
            keep: Whether this node has that address, and keeps the store.

        Raises:
            ConnectionError: If the store cannot be kept, or reached, or is another one.
        """
        timeout = timedelta(seconds=timeout_s)
        keeper = f"nodes/{name}/keeper"
        try:
            tcp = in_time(
                lambda: dist.TCPStore(
                    host, port, is_master=keep, timeout=timeout, wait_for_workers=False
                ),
                timeout_s,
                "what answers there does not speak as a store",
            )
            if keep:  # a name that no store had before: this one may be of a job that goes on
                tcp.set(keeper, uuid.uuid4().hex)
            elif not _appears(tcp, keeper, min(timeout_s, KEEPER_S)):
                raise ConnectionError(f"the store there is of another job, not of {name}")
            store = dist.PrefixStore(tcp.get(keeper).decode(), tcp)
            others = store.add("others", 0 if keep else 1)
            index = 0 if keep else others
        except (RuntimeError, TimeoutError) as error:
            raise ConnectionError(_first_line(error)) from error
        if index >= size:
            raise ConnectionError(f"{index + 1} nodes came under the name {name}, not {size}")
        return cls(store, index, size, timeout_s, keeps=keep)

    def tell(self, key: str, value: Any) -> None:
        """Leave a value under a key that was not used before.

        Raises:
            ConnectionError: If the store is gone.
        """
        try:
            self._store.set(f"told/{key}", json.dumps(value))
        except RuntimeError as error:
            raise ConnectionError(GONE) from error

    def ask(self, key: str) -> Any:
        """The value that another member leaves under a key, as soon as it does.

        Raises:
            TimeoutError: If it does not.
            ConnectionError: If the store is gone.
        """
        try:
            if not _appears(self._store, f"told/{key}", self.timeout_s):
                raise TimeoutError(f"no word of {key} within {self.timeout_s:g} s")
            return json.loads(self._store.get(f"told/{key}"))
        except RuntimeError as error:
            raise ConnectionError(GONE) from error

    def introduce(self, name: str) -> list[str]:
        """Everyone's name, by index; failures name members by it from now on."""
        self.names = self.gather(name)
        return self.names

    def gather(self, value: Any) -> list[Any]:
        """Everyone's value, by index.

        Raises:
            TimeoutError: If a member does not come; names the first that is absent.
            ConnectionError: If the store is gone.
        """
        self._rounds += 1
        self.tell(self._key(self.index), value)
        values = []
        for index, name in enumerate(self.names):
            try:
                values.append(self.ask(self._key(index)))
            except TimeoutError as error:
                raise TimeoutError(
                    f"{name} did not come to step {self._rounds} within {self.timeout_s:g} s"
                ) from error
        return values

    def heard(self) -> list[Any]:
        """What has been said so far in this round, or in the first, without waiting."""
        values = []
        try:
            for index in range(self.size):
                key = f"told/{self._key(index)}"
                if self._store.check([key]):
                    values.append(json.loads(self._store.get(key)))
        except RuntimeError:
            pass  # the store is gone
        return values

    def _key(self, index: int) -> str:
        return f"round {max(self._rounds, 1)} of {index}"

    def close(self) -> None:
        """Leave; who keeps the store does so when all others have."""
        self.tell(f"gone {self.index}", True)
        if self._keeps:
            for index in range(self.size):
                self.ask(f"gone {index}")
            self.tell("over", True)
        else:
            with suppress(ConnectionError):
                self.ask("over")


KEEPER_S = 10.0
"""Who keeps a store says so at once."""

GONE = "the store is gone, and the process that kept it"


def _appears(store: dist.Store, key: str, timeout_s: float) -> bool:
    """Whether a key is set in time. `wait` of torch would be deaf to signals, and complain."""
    deadline, nap = time.monotonic() + timeout_s, 0.001
    while not store.check([key]):
        if time.monotonic() > deadline:
            return False
        time.sleep(nap)
        nap = min(1.5 * nap, 0.1)
    return True


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]
