"""Launcher of an elastic run on one machine: it starts processes, and none ends with another.

    python -m consensus.elastic --processes 4 potential=tan output.run_dir=runs/elastic

The launcher keeps the key-value store in which the members agree, starts members, and tells the
others when one of its own has ended. It trains nothing itself. On several machines each has a
launcher, and one of them keeps the store (--store HOST:PORT, there with --serve).
"""

import argparse
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Any

from consensus.startup import heeded, protect_streams, version

LOOK_S = 0.02  # between two looks at the processes
TRY_AGAIN = 75  # exit code of a member that has left, or of a run that stopped with a checkpoint


@dataclass
class Child:
    """A process of this machine."""

    name: str  # as a member
    process: "subprocess.Popen[bytes]"
    place: int  # among those of this machine, for its GPU


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry of the command line; returns the exit code."""
    protect_streams("consensus.elastic")
    options, rest = _parser().parse_known_args(arguments)
    if problem := _problem(options, rest):
        print(f"consensus.elastic: {problem}", file=sys.stderr)
        return 2
    try:
        launcher = Launcher(options, rest)
    except (RuntimeError, OSError, TimeoutError) as error:
        line = str(error).splitlines()[0]
        print(f"consensus.elastic: the store cannot be opened: {line}", file=sys.stderr)
        return 1
    return launcher.run()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m consensus.elastic",
        description="Start processes of one elastic run on this machine. A process that is killed "
        "does not end the others, and a further launcher may add processes at any time.",
        epilog="All other arguments are overrides of consensus.train. SIGTERM to this launcher "
        "lets its processes leave the run; Ctrl+C stops the whole run with a checkpoint. Exit "
        "codes: 0 the run is complete, 75 stopped on request, else that of a failed process.",
    )
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="to start here (1)")
    parser.add_argument(
        "--expected", type=int, metavar="N", help="processes the run begins with (--processes)"
    )
    parser.add_argument(
        "--store", metavar="HOST:PORT", help="of the store; default: one of its own"
    )
    parser.add_argument("--serve", action="store_true", help="keep the store here, at --store")
    parser.add_argument(
        "--restarts", type=int, default=0, metavar="N", help="new processes for lost ones (0)"
    )
    parser.add_argument("--run", default="", metavar="NAME", help="of the run in a shared store")
    parser.add_argument("--version", action="version", version=f"consensus-training {version()}")
    return parser


def _problem(options: Any, rest: Sequence[str]) -> str | None:
    """What is wrong with the arguments, if anything."""
    if switch := next((text for text in rest if text.startswith("--")), None):
        return f"`{switch}` is no option; --help lists them"
    for name, least in (("processes", 0), ("restarts", 0), ("expected", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            return f"`--{name}` is {value}; allowed: a whole number >= {least}"
    if options.serve and not options.store:
        return "`--serve` needs --store HOST:PORT"
    if options.processes == 0 and not options.serve:
        return "`--processes` is 0; allowed: 1 or more, or 0 with --serve"
    host, _, port = (options.store or "localhost:1").rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        return f"`--store` is {options.store}; allowed: HOST:PORT"
    return None


class Launcher:
    """The store, or a connection to it, and the processes of this machine.

    Raises:
        RuntimeError: If the store can be neither opened nor reached.
    """

    def __init__(self, options: Any, overrides: Sequence[str]) -> None:
        from consensus.comm.rendezvous import connect, serve  # imports torch

        self.options = options
        self.command = [sys.executable, "-m", "consensus.train", "group.elastic=true", *overrides]
        host, port = "127.0.0.1", 0
        if options.store:
            host, _, text = options.store.rpartition(":")
            host, port = host.strip("[]"), int(text)
        if options.serve or not options.store:
            self._server, port = serve(port, "127.0.0.1" if not options.store else "0.0.0.0")
        self.store = connect(host, port, options.run, timedelta(seconds=60))
        self.environment = {
            **os.environ,
            "MASTER_ADDR": host,
            "MASTER_PORT": str(port),
            "CONSENSUS_RUN": options.run,
            "CONSENSUS_MEMBERS": str(options.expected or max(1, options.processes)),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
            "LOCAL_WORLD_SIZE": str(max(1, options.processes)),
        }
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):  # of another launcher
            self.environment.pop(name, None)
        self.children: list[Child] = []
        self.codes: list[int] = []  # of those that have ended
        self.asked = False  # whether a signal has asked to stop
        self.restarts = options.restarts

    def run(self) -> int:
        """Start the processes, and wait until all have ended. Returns the exit code."""
        for number in heeded():
            signal.signal(number, self._pass_on)
        host, port = self.environment["MASTER_ADDR"], self.environment["MASTER_PORT"]
        where = f"--store {host}:{port}" + f" --run {self.options.run}" * bool(self.options.run)
        print(f"consensus.elastic: further members: {where}", file=sys.stderr, flush=True)
        for place in range(self.options.processes):
            self._start(place)
        serves = self.options.serve
        while self.children or (serves and not self.asked and not self._finished()):
            time.sleep(LOOK_S)
            for child in [c for c in self.children if c.process.poll() is not None]:
                self._ended(child)
        if 0 in self.codes or not self.codes:
            return 0
        return next((code for code in self.codes if code != TRY_AGAIN), TRY_AGAIN)

    def _finished(self) -> bool:
        """Whether the run is complete."""
        return bool(self.store.check(["finished"]))

    def _start(self, place: int) -> None:
        name = uuid.uuid4().hex[:12]
        environment = {**self.environment, "CONSENSUS_MEMBER": name, "LOCAL_RANK": str(place)}
        self.children.append(Child(name, subprocess.Popen(self.command, env=environment), place))

    def _ended(self, child: Child) -> None:
        """Tell the others that a process has ended, and start another for a lost one."""
        self.children.remove(child)
        code = child.process.returncode
        why = "has ended" if code == 0 else "has left" if code == TRY_AGAIN else f"exit code {code}"
        if code < 0:
            why = f"killed by {signal.Signals(-code).name}"
            code = 128 - code
        with suppress(RuntimeError):
            self.store.compare_set(f"gone/{child.name}", "", why)
        self.codes.append(code)
        if code in (0, 2, TRY_AGAIN) or self.asked:
            return
        print(f"consensus.elastic: a process is lost ({why})", file=sys.stderr, flush=True)
        if self.restarts > 0 and not self._finished():
            self.restarts -= 1
            self._start(child.place)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        """Pass a stop signal on to the processes."""
        self.asked = True
        for child in self.children:
            with suppress(ProcessLookupError):
                child.process.send_signal(number)


if __name__ == "__main__":
    sys.exit(main())
