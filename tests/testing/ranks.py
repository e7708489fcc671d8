"""Pool of rank processes for tests: real processes with a real Gloo group.

A pool keeps its processes, which fork_server.py forks. Every job opens a new group of the size it
needs over a file store (ports race), runs a function on every rank, and returns each rank's value
or traceback. Assertions belong in the test, where pytest explains them.
"""

import time
import traceback
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from consensus.comm import Launch, open_group
from consensus.run import trainer
from tests.testing import fork_server

OTHERS_S = 2.0  # between the first failure and those that follow from it


class RankError(AssertionError):
    """A rank raised, died or did not answer in time; the message names it and the cause."""


@dataclass
class _Rank:
    process: Any
    pipe: Connection


class RankPool:
    """Processes that wait for jobs; after a failure they are replaced at the next job."""

    def __init__(self) -> None:
        self._ranks: list[_Rank] = []

    def run(
        self,
        size: int,
        function: Callable[..., Any],
        *args: Any,
        folder: Path,
        timeout: float,
    ) -> list[Any]:
        """function(group, *args) on ranks 0 .. size - 1; their return values, by rank.

        Raises:
            RankError: If a rank fails; with what the others said of it. All are killed.
        """
        while len(self._ranks) < size:
            self._ranks.append(self._start())
        store = folder / f"store-{uuid.uuid4().hex}"
        for rank in range(size):
            self._ranks[rank].pipe.send((function, args, rank, size, str(store), timeout))
        answers: dict[int, Any] = {}
        errors: dict[int, str] = {}
        deadline = time.monotonic() + timeout
        while len(answers) + len(errors) < size:
            waiting = {
                self._ranks[r].pipe: r for r in range(size) if r not in answers and r not in errors
            }
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                if not errors:
                    late = sorted(waiting.values())
                    errors[late[0]] = f"ranks {late} gave no answer in {timeout} s"
                break
            for pipe in ready:
                rank = waiting[pipe]
                try:
                    kind, answer = pipe.recv()
                except EOFError:
                    self._ranks[rank].process.join(10.0)
                    code = self._ranks[rank].process.exitcode
                    errors[rank] = f"rank {rank} died with exit code {code}"
                else:
                    if kind == "error":
                        cause = answer.strip().rpartition("\n")[2]  # first: a long output is cut
                        errors[rank] = f"rank {rank} raised {cause}\n{answer}"
                    else:
                        answers[rank] = answer
            if errors:  # the cause may be on a rank that says so a little later
                deadline = min(deadline, time.monotonic() + OTHERS_S)
        if errors:
            self.close()  # a rank that waits in a collective for the failed one cannot be reused
            raise RankError("\n".join(errors.values()))
        return [answers[rank] for rank in range(size)]

    def close(self) -> None:
        """End all processes."""
        for rank in self._ranks:
            rank.process.kill()
            rank.process.join()
            rank.pipe.close()
        self._ranks.clear()

    def _start(self) -> _Rank:
        context = fork_server.context()
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs,), daemon=True)
        process.start()
        theirs.close()
        return _Rank(process, ours)


def _serve(pipe: Connection) -> None:
    fork_server.check()
    trainer.draw_pictures = lambda *_: None  # half the time of a small run; see Ranks in launch.py
    torch.set_num_threads(1)  # the ranks share the cores
    while True:
        try:
            function, args, rank, size, store, timeout = pipe.recv()
        except EOFError:
            return
        try:
            launch, method = Launch(rank, size, rank, size), f"file://{store}"
            group = open_group(launch, "gloo", torch.device("cpu"), timeout, init_method=method)
            try:
                group.raise_together(None)  # none may close the group while another still connects
                answer = function(group, *args)
            finally:
                group.close()
        except BaseException:
            pipe.send(("error", traceback.format_exc()))
        else:
            pipe.send(("answer", answer))
