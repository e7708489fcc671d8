"""Signal handling: graceful stop, forced exit, lost launcher.

SIGTERM, SIGUSR1 (preemption, requeue, `scancel --signal`), SIGINT (Ctrl+C) and SIGHUP (the end of a
terminal's session, unless it is ignored, as under nohup) request a stop: at the end of an iteration
the ranks agree on it, write a checkpoint and exit. Further signals change nothing, except SIGINT
after a second, which ends the process at once. A thread ends a process that has not exited after a
timeout. A process that belongs to a caller, such as a notebook, is not ended: there the second
SIGINT raises KeyboardInterrupt. A rank whose launcher is gone sends itself SIGTERM, so no rank
outlives its run.
"""

import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType

from consensus.startup import heeded

TRY_AGAIN = 75
"""Exit code of a run that stopped on request and left a checkpoint: EX_TEMPFAIL of sysexits.h."""


class RunStopped(Exception):  # noqa: N818  (a requested stop is no error)
    """A stop on request, with its exit code, on all ranks; the message names the checkpoint."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class StopSignals:
    """Handlers that record the first stop signal of this process.

    Before construction and after `close` these signals end the process at once, since there is
    nothing to save.
    """

    AGAIN_S = 1.0  # torchrun passes on the SIGINT that the terminal has sent to the ranks as well

    def __init__(self, patience_s: float | None) -> None:
        self.patience_s = patience_s  # from the first signal to a forced exit; None: never
        self.received = 0  # the number of the first signal
        self._done = threading.Event()
        self._first_s = 0.0  # the time of the first signal
        self._before = {}
        if threading.current_thread() is threading.main_thread():  # else Python forbids it
            # Python cannot restore a handler that is not its own, for which it has None.
            known = [number for number in heeded() if signal.getsignal(number) is not None]
            self._before = {number: signal.signal(number, self._record) for number in known}

    def _record(self, number: int, frame: FrameType | None) -> None:
        if self.received == 0:
            self.received, self._first_s = number, time.monotonic()
            if self.patience_s is not None:
                threading.Thread(target=self._force_exit, daemon=True).start()
        elif number == signal.SIGINT and time.monotonic() > self._first_s + self.AGAIN_S:
            if self.patience_s is None:
                raise KeyboardInterrupt
            os._exit(128 + number)

    def _force_exit(self) -> None:
        if not self._done.wait(self.patience_s):
            os._exit(128 + self.received)

    def close(self) -> None:
        """Restore the previous handlers."""
        self._done.set()
        for number, handler in self._before.items():
            signal.signal(number, handler)


def follow_launcher(look_every_s: float = 1.0) -> None:
    """Start a thread that sends SIGTERM to this process once the launcher that started it is gone.

    Without torchrun or consensus.elastic it does nothing. A killed launcher cannot notify its
    ranks; the kernel gives them another parent. A launcher that died before this call is noticed
    only if the new parent is process 1 and does not run Python.
    """
    if {"TORCHELASTIC_RUN_ID", "CONSENSUS_MEMBER"}.isdisjoint(os.environ):
        return
    launcher, command = os.getppid(), b"python"
    with suppress(OSError):
        command = Path("/proc/1/cmdline").read_bytes()
    orphaned = launcher == 1 and b"python" not in command

    def follow() -> None:
        while not orphaned and os.getppid() == launcher:
            time.sleep(look_every_s)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=follow, name="follow-launcher", daemon=True).start()
