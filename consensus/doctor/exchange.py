"""Exchange: small values between members of a job through a key-value store, without a group.

The checks of the network use it, since they run before a process group can be opened.
"""

import json
import time
import uuid
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from consensus.comm.rendezvous import first_line, in_time, open_store

KEEPER_S = 10.0
"""Within this time the member that hosts a store publishes the name of the job there."""
GONE = "the store is gone, and the process that kept it"
SILENT = "what answers there does not speak as a store"


class Exchange:
    """Values that JSON can represent, between `size` members.

    Every member calls `gather` and `close` in the same order; `publish` and `receive` are for two
    of them. Waiting is polling, so that signals are handled.

    Args:
        store: A store that all members reach.
        index: Index of this member, from 0.
        size: Number of members.
        timeout_s: Longest wait for a member, in seconds; may be changed, alike by all.
        keeps: Whether this process hosts the store, and therefore leaves last.

    Attributes:
        names: Names of all members in error messages, to be set once they are known.
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
        """One member."""
        return cls(dist.HashStore(), 0, 1, 1.0, keeps=True)

    @classmethod
    def of_ranks(cls, rank: int, size: int, timeout_s: float) -> "Exchange":
        """The processes of a launch, at MASTER_ADDR and MASTER_PORT.

        Raises:
            ConnectionError: If the store cannot be reached.
            TimeoutError: If a rank does not come; names it.
        """
        try:  # twice the timeout: for the connection, and for all ranks to come
            store = in_time(lambda: open_store(rank, size, timeout_s), 2 * timeout_s, SILENT)
        except RuntimeError as error:
            raise ConnectionError(first_line(error)) from error
        return cls(store, rank, size, timeout_s, keeps=rank == 0)

    @classmethod
    def of_nodes(
        cls, host: str, port: int, name: str, size: int, timeout_s: float, *, keep: bool
    ) -> "Exchange":
        """The nodes of a job, before it has processes. The node that hosts the store has index 0.

        Args:
            host: Address of the store.
            port: Port of the store.
            name: Name of this start, the same on all nodes.
            size: Number of nodes.
            timeout_s: Longest wait for another node, in seconds.
            keep: Whether this node hosts the store.

        Raises:
            ConnectionError: If the store cannot be opened or reached, or belongs to another job.
        """
        keeper = f"nodes/{name}/keeper"

        def connect() -> dist.TCPStore:
            timeout = timedelta(seconds=timeout_s)
            return dist.TCPStore(
                host, port, is_master=keep, timeout=timeout, wait_for_workers=False
            )

        try:
            tcp = in_time(connect, timeout_s, SILENT)
            if keep:  # a random prefix: the server may be that of a job that is still running
                tcp.set(keeper, uuid.uuid4().hex)
            elif not _appears(tcp, keeper, min(timeout_s, KEEPER_S)):
                raise ConnectionError(f"the store there is of another job, not of {name}")
            store = dist.PrefixStore(tcp.get(keeper).decode(), tcp)
            others = store.add("others", 0 if keep else 1)
        except (RuntimeError, TimeoutError) as error:
            raise ConnectionError(first_line(error)) from error
        index = 0 if keep else others
        if index >= size:
            raise ConnectionError(f"{index + 1} nodes came under the name {name}, not {size}")
        return cls(store, index, size, timeout_s, keeps=keep)

    def publish(self, key: str, value: Any) -> None:
        """Publish a value under a new key.

        Raises:
            ConnectionError: If the store is gone.
        """
        try:
            self._store.set(f"told/{key}", json.dumps(value))
        except RuntimeError as error:
            raise ConnectionError(GONE) from error

    def receive(self, key: str) -> Any:
        """Wait for the value that another member publishes under a key.

        Raises:
            TimeoutError: If there is none in time.
            ConnectionError: If the store is gone.
        """
        try:
            if not _appears(self._store, f"told/{key}", self.timeout_s):
                raise TimeoutError(f"no value of {key} within {self.timeout_s:g} s")
            return json.loads(self._store.get(f"told/{key}"))
        except RuntimeError as error:
            raise ConnectionError(GONE) from error

    def gather(self, value: Any) -> list[Any]:
        """Values of all members, by index.

        Raises:
            TimeoutError: If a member does not come; names the first that is absent.
            ConnectionError: If the store is gone.
        """
        self._rounds += 1
        self.publish(self._key(self.index), value)
        values = []
        for index, name in enumerate(self.names):
            try:
                values.append(self.receive(self._key(index)))
            except TimeoutError as error:
                text = f"{name} did not come to step {self._rounds} within {self.timeout_s:g} s"
                raise TimeoutError(text) from error
        return values

    def received(self) -> list[Any]:
        """Values of this round so far, of any members; does not wait."""
        keys = [f"told/{self._key(index)}" for index in range(self.size)]
        values = []
        with suppress(RuntimeError):  # the store is gone
            for key in keys:
                if self._store.check([key]):
                    values.append(json.loads(self._store.get(key)))
        return values

    def _key(self, index: int) -> str:
        return f"round {max(self._rounds, 1)} of {index}"

    def close(self) -> None:
        """Leave; the host of the store waits until all others have left."""
        self.publish(f"gone {self.index}", True)
        if self._keeps:
            for index in range(self.size):
                self.receive(f"gone {index}")
            self.publish("over", True)
        else:
            with suppress(ConnectionError):
                self.receive("over")


def _appears(store: dist.Store, key: str, timeout_s: float) -> bool:
    """Whether a key is set in time; unlike `Store.wait`, signals are handled meanwhile."""
    deadline, nap = time.monotonic() + timeout_s, 0.001
    while not store.check([key]):
        if time.monotonic() > deadline:
            return False
        time.sleep(nap)
        nap = min(1.5 * nap, 0.1)
    return True
