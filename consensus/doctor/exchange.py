"""Exchange: small values between members of a job, before a process group can be opened."""

import json
import os
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch.distributed as dist

from consensus.comm import LaunchError
from consensus.comm.rendezvous import first_line, in_time
from consensus.doctor.finding import fault

KEEPER_S = 10.0  # within it the member that hosts a store publishes the name of the job there
GONE = "the store is gone, and the process that kept it"
SILENT = "what answers there does not speak as a store"


class RendezvousError(Exception):
    """Members cannot meet, because of the fault in `finding`."""

    def __init__(self, text: str, remedy: str) -> None:
        super().__init__(text)
        self.finding = fault("rendezvous", text, remedy)


@dataclass(frozen=True)
class Nodes:
    """Nodes of a job, as launch/node.sh describes them: how many, and where they meet."""

    size: int
    host: str
    port: int
    name: str  # of this start

    @classmethod
    def from_environment(cls) -> "Nodes | None":
        """Read NNODES, RENDEZVOUS and RUN_ID if CONSENSUS_DOCTOR is `nodes`; else None."""
        if os.environ.get("CONSENSUS_DOCTOR") != "nodes":
            return None
        size = os.environ.get("NNODES", "1")
        if not size.isdecimal() or int(size) < 1:
            raise LaunchError(f"`NNODES` is {size}; allowed: a whole number from 1")
        place = os.environ.get("RENDEZVOUS", "")
        host, _, port = place.rpartition(":")
        if not host or not port.isdecimal() or int(port) > 65535:
            raise LaunchError(f"`RENDEZVOUS` is {place}; allowed: host:port where the nodes meet")
        return cls(int(size), host.strip("[]"), int(port), os.environ.get("RUN_ID", "consensus"))


class Exchange:
    """Values that JSON can represent, between `size` members; this one has number `index`.

    Every member calls `gather` and `close` in the same order; `publish` and `receive` are for two.
    A wait polls, so that signals are handled, for at most `timeout_s`, then raises TimeoutError;
    ConnectionError if the store is gone. Errors mention `names`, to be set once they are known.
    """

    def __init__(
        self, store: dist.Store, index: int, size: int, timeout_s: float, *, keeps: bool = False
    ) -> None:
        self.index, self.size, self._keeps = index, size, keeps
        self.names = [f"member {i}" for i in range(size)]
        self._store, self.timeout_s, self._rounds = store, timeout_s, 0

    @classmethod
    def alone(cls) -> "Exchange":
        """One member."""
        return cls(dist.HashStore(), 0, 1, 1.0, keeps=True)

    @classmethod
    def of_nodes(
        cls, host: str, port: int, name: str, size: int, timeout_s: float, keep: bool
    ) -> "Exchange":
        """The nodes of a job, before it has processes. The one to `keep` the store has index 0.

        ConnectionError if the store cannot be opened or reached, or is not of the job `name`.
        """
        keeper, timeout = f"nodes/{name}/keeper", timedelta(seconds=timeout_s)
        connect = partial(
            dist.TCPStore, host, port, is_master=keep, timeout=timeout, wait_for_workers=False
        )
        try:
            tcp = in_time(connect, timeout_s, SILENT)
            if keep:  # a random prefix: the server may be that of a job that is still running
                tcp.set(keeper, uuid.uuid4().hex)
            elif not _appears(tcp, keeper, min(timeout_s, KEEPER_S)):
                raise ConnectionError(f"the store there is of another job, not of {name}")
            store = dist.PrefixStore(tcp.get(keeper).decode(), tcp)
            index = 0 if keep else store.add("others", 1)
        except (RuntimeError, TimeoutError) as error:
            raise ConnectionError(first_line(error)) from error
        if index >= size:
            raise ConnectionError(f"{index + 1} nodes came under the name {name}, not {size}")
        return cls(store, index, size, timeout_s, keeps=keep)

    def publish(self, key: str, value: Any) -> None:
        """Publish a value under a new key."""
        try:
            self._store.set(f"told/{key}", json.dumps(value))
        except RuntimeError as error:
            raise ConnectionError(GONE) from error

    def receive(self, key: str, problem: str = "") -> Any:
        """Wait for the value that another member publishes under a key."""
        try:
            if not _appears(self._store, f"told/{key}", self.timeout_s):
                problem = problem or f"no value of {key}"
                raise TimeoutError(f"{problem} within {self.timeout_s:g} s")
            return json.loads(self._store.get(f"told/{key}"))
        except RuntimeError as error:
            raise ConnectionError(GONE) from error

    def gather(self, value: Any) -> list[Any]:
        """Values of all members, by index. TimeoutError names the first that does not come."""
        self._rounds += 1
        self.publish(self._key(self.index), value)
        problems = [f"{name} did not come to step {self._rounds}" for name in self.names]
        return [self.receive(self._key(index), text) for index, text in enumerate(problems)]

    def received(self) -> list[Any]:
        """Values of this round so far, of any members; does not wait."""
        keys = [f"told/{self._key(index)}" for index in range(self.size)]
        with suppress(RuntimeError):  # the store is gone
            return [json.loads(self._store.get(key)) for key in keys if self._store.check([key])]
        return []

    def _key(self, index: int) -> str:
        return f"round {self._rounds} of {index}"

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
