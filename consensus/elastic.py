"""Launcher of an elastic run on one machine: it starts processes, and none ends with another.

    python -m consensus.elastic --processes 4 potential=tan output.run_dir=runs/elastic
    python -m consensus.elastic --processes 4 --script my_loop.py        # with an ElasticCoupling

The launcher keeps the key-value store in which the members agree, starts members, and tells the
others when one of its own has ended. It trains nothing itself. On several machines each has a
launcher, and one of them keeps the store (--store HOST:PORT, there with --serve).
"""

import argparse
import json
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
from typing import Any, NoReturn

from consensus.startup import begin_imports, end_imports, heeded, protect_streams

begin_imports(__name__, "consensus.elastic")  # the import of torch takes seconds

from consensus.help import answer_questions

answer_questions(__name__, "consensus.elastic")

LOOK_S = 0.02  # between two looks at the processes
STORE_LOOK_S = 0.5  # between two looks at the store
LINGER_S = 4 * STORE_LOOK_S  # that the store stays for other launchers, which read there the end
SILENT_S = 10.0  # without a heartbeat a member is gone
ANSWER_S = 10.0  # longest wait for an answer of the store
TRY_AGAIN = 75  # exit code of a member that has left, or of a run that stopped with a checkpoint


@dataclass
class Child:
    """A process of this machine."""

    name: str  # as a member
    process: "subprocess.Popen[bytes]"
    place: int  # among those of this machine, for its GPU


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry of the command line; returns the exit code."""
    answer_questions("__main__", "consensus.elastic")
    protect_streams("consensus.elastic")
    try:
        options, rest = _parser().parse_known_args(arguments)
        _check(options, rest)
    except ValueError as error:
        print(f"consensus.elastic: {error}", file=sys.stderr)
        return 2
    try:
        launcher = Launcher(options, rest)
    except (RuntimeError, OSError) as error:
        line = str(error).splitlines()[0]
        place = options.store or "a free port"
        print(f"consensus.elastic: no store at {place}: {line}", file=sys.stderr)
        return 1
    return launcher.run()


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line of this command."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; --help lists the options")


def _parser() -> argparse.ArgumentParser:
    """The options; consensus/help.py describes them."""
    parser = _Parser(add_help=False, allow_abbrev=False)
    for name, default in COUNTS.items():
        parser.add_argument(f"--{name}", default=default[0])
    parser.add_argument("--store")
    parser.add_argument("--serve", action="store_true")
    parser.add_argument("--run", default="")
    parser.add_argument("--script")
    return parser


COUNTS = {"processes": ("1", 0), "restarts": ("0", 0), "wait": ("60", 1), "expected": (None, 1)}
"""Options that are whole numbers: their defaults and the smallest that are allowed."""


def _check(options: Any, rest: Sequence[str]) -> None:
    """Take the numbers and the address from the options; ValueError for a mistake."""
    for text in rest if options.script is None else ():
        override = ("=" in text and text[0] != "-") or text[0] == "~"
        if not override and not text.startswith("--config-dir="):
            raise ValueError(f"`{text}` is no option and no override; --help lists the options")
    for name, (_, least) in COUNTS.items():
        text = getattr(options, name)
        if text is not None and not (text.isdecimal() and int(text) >= least):
            raise ValueError(f"`--{name}` is {text}; allowed: a whole number >= {least}")
        setattr(options, name, None if text is None else int(text))
    if options.serve and not options.store:
        raise ValueError("`--serve` needs --store HOST:PORT")
    if options.processes == 0 and not options.serve:
        raise ValueError("`--processes` is 0; allowed: 1 or more, or 0 with --serve")
    if not options.store:
        options.host, options.port = "127.0.0.1", 0
        return
    host, _, port = options.store.rpartition(":")
    least = 0 if options.serve else 1
    good = host and port.isdecimal() and least <= int(port) <= 65535
    if not good or (":" in host and (host[0], host[-1]) != ("[", "]")):
        raise ValueError(f"`--store` is {options.store}; allowed: HOST:PORT, [ADDRESS]:PORT")
    options.host, options.port = host.strip("[]"), int(port)


class Launcher:
    """The store, or a connection to it, and the processes of this machine.

    Raises:
        RuntimeError, OSError: If the store can be neither opened nor reached.
    """

    def __init__(self, options: Any, overrides: Sequence[str]) -> None:
        # torch would log a stack for every connection that the end of a store closes.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
        from consensus.comm.rendezvous import connect, serve  # imports torch

        end_imports()
        self.options = options
        program = ["-m", "consensus.train", "group.elastic=true"]
        if options.script is not None:
            program = [options.script]
        self.command = [sys.executable, *program, *overrides]
        host, port = options.host, options.port
        self._server = None
        if options.serve or not options.store:
            self._server, port = serve(port, host)
        self.store = connect(host, port, options.run, timedelta(seconds=options.wait))
        self.store.set_timeout(timedelta(seconds=ANSWER_S))
        self.address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self.environment = {
            **os.environ,
            "MASTER_ADDR": host,
            "MASTER_PORT": str(port),
            "CONSENSUS_RUN": options.run,
            "CONSENSUS_MEMBERS": str(options.expected or max(1, options.processes)),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
            "LOCAL_WORLD_SIZE": str(max(1, options.processes)),
            "RANK": "0",  # each is a launch of its own, also under srun
            "WORLD_SIZE": "1",
        }
        self.children: list[Child] = []
        self.codes: list[int] = []  # of those that have ended, in this order
        self.asked = 0  # how many signals have asked to stop
        self.restarts = options.restarts
        self._own: set[str] = set()  # names of all processes that were started here
        self._looked = 0.0  # when the store was read
        self._finished = self._lost = False  # whether the run is complete, and the store is gone
        self._heard: dict[str, tuple[str, float]] = {}  # member -> heartbeat, when it changed
        self._others_until = 0.0  # the last time that members of other launchers were alive

    def run(self) -> int:
        """Start the processes, and wait until all have ended. Returns the exit code."""
        for number in heeded():
            signal.signal(number, self._pass_on)
        where = f"--store {self.address}" + f" --run {self.options.run}" * bool(self.options.run)
        print(f"consensus.elastic: further members: {where}", file=sys.stderr, flush=True)
        for place in range(self.options.processes):
            if not self.asked:
                self._start(place)
        while self.children or self._is_needed():
            time.sleep(LOOK_S)
            for child in [c for c in self.children if c.process.poll() is not None]:
                self._ended(child)
            if time.monotonic() > self._looked + STORE_LOOK_S:
                self._look_at_store()
        for number in heeded():  # the shutdown of Python would reset the handlers
            signal.signal(number, signal.SIG_IGN)
        self._look_at_store()
        if 0 in self.codes or (self._finished and not self.codes):
            return 0
        if 2 in self.codes:
            return 2
        asked = self.asked > 0 and (TRY_AGAIN in self.codes or not self.codes)
        return TRY_AGAIN if asked or not self.codes else self.codes[-1]

    # ---- the store

    def _look_at_store(self) -> None:
        """Read whether the run is complete, or the store is gone."""
        self._looked = time.monotonic()
        if self._lost:
            return
        try:
            self._finished |= self.store.check(["finished"])
            if self._server is not None and self._others_live():
                self._others_until = self._looked + LINGER_S
        except RuntimeError:
            self._lost = True
            if self.children and not self._finished:
                stops = self.options.script is None  # a script has no handler of SIGUSR1
                then = "the run stops with a checkpoint" if stops else "nobody can join any more"
                line = f"the store at {self.address} is lost; {then}"
                print(f"consensus.elastic: {line}", file=sys.stderr, flush=True)
                if stops:
                    self._send(signal.SIGUSR1)

    def _is_needed(self) -> bool:
        """Whether the store is, without processes here: by others that live or may come."""
        if self._server is None or self._lost or self.asked > 1:
            return False
        if self.options.serve and not self.asked and not self._finished:
            return True
        if time.monotonic() > self._others_until:
            self._look_at_store()  # a member may have come since the last time
        return time.monotonic() < self._others_until

    def _members(self) -> list[str]:
        """The members of the newest view."""
        if not self.store.check(["latest"]):
            return []
        number = self.store.get("latest").decode()
        return list(json.loads(self.store.get(f"view/{number}"))["members"])

    def _others_live(self) -> bool:
        """Whether a member of another launcher is alive."""
        now = time.monotonic()
        for name in self._members():
            if name in self._own or self.store.check([f"gone/{name}"]):
                continue
            beat = self.store.get(f"alive/{name}").decode()
            before, since = self._heard.get(name, ("", now))
            self._heard[name] = (beat, since if beat == before else now)
            if now < self._heard[name][1] + SILENT_S:
                return True
        return False

    # ---- processes

    def _start(self, place: int) -> None:
        name = uuid.uuid4().hex[:12]
        environment = {**self.environment, "CONSENSUS_MEMBER": name, "LOCAL_RANK": str(place)}
        asked = self.asked
        self._own.add(name)
        self.children.append(Child(name, subprocess.Popen(self.command, env=environment), place))
        if self.asked > asked:  # a signal has come meanwhile, which it may have missed
            self.children[-1].process.send_signal(signal.SIGTERM)

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
        if code == 2:
            self._end_refused()
        if code in (0, TRY_AGAIN) or self.asked or 2 in self.codes:
            return
        print(f"consensus.elastic: a process is lost ({why})", file=sys.stderr, flush=True)
        self._look_at_store()
        if self.restarts > 0 and not self._finished and not self._lost:
            self.restarts -= 1
            self._start(child.place)

    def _end_refused(self) -> None:
        """End processes that are no members yet: they have the arguments of a refused one."""
        members: list[str] = []
        with suppress(RuntimeError):
            members = self._members()
        for child in self.children:
            if child.name not in members:
                child.process.kill()

    def _send(self, number: int) -> None:
        for child in self.children:
            with suppress(ProcessLookupError):
                child.process.send_signal(number)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        """Pass a stop signal on to the processes."""
        self.asked += 1
        self._send(number)


if __name__ == "__main__":
    sys.exit(main())
