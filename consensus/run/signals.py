"""What the outside asks of a process: to stop soon, to stop now, or nothing because it is gone.

SIGTERM and SIGUSR1 (a preemption, a requeue, `scancel --signal`) ask to stop: the ranks agree at
the end of an iteration, write a checkpoint and leave. A second one changes nothing. If the process
has not left after a while, it ends itself. Ranks whose launcher is gone get a SIGTERM from
themselves: no rank outlives its run.
"""

import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType

STOP = (signal.SIGTERM, signal.SIGUSR1)

TRY_AGAIN = 75
"""Exit code of a run that was asked to stop and left a checkpoint: sysexits.h's EX_TEMPFAIL."""


class StopSignals:
    """Remembers the first signal that asked this process to stop.

    Until it is made, and after it is closed, these signals end the process at once: there is
    nothing to save yet, or any more.

    Args:
        patience_s: From the first signal to the end of the process, if it does not leave itself.

    Attributes:
        received: The number of that signal, 0 before.
    """

    def __init__(self, patience_s: float) -> None:
        self.patience_s = patience_s
        self.received = 0
        self._done = threading.Event()
        self._before = {}
        if threading.current_thread() is threading.main_thread():  # else Python forbids it
            self._before = {number: signal.signal(number, self._remember) for number in STOP}

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.received == 0:
            self.received = number
            threading.Thread(target=self._last_resort, daemon=True).start()

    def _last_resort(self) -> None:
        if not self._done.wait(self.patience_s):
            os._exit(128 + self.received)

    def close(self) -> None:
        """Give the signals back."""
        self._done.set()
        for number, handler in self._before.items():
            signal.signal(number, handler)


def follow_launcher(look_every_s: float = 1.0) -> None:
    """Send this process a SIGTERM when the torchrun that started it is gone; else nothing.

    A killed launcher cannot tell its ranks; they are handed to another parent. Begins now: one that
    was killed before is noticed only if its orphans were handed to an init that never trains.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    launcher = os.getppid()
    orphaned = launcher == 1 and "python" not in _command(1)

    def follow() -> None:
        while not orphaned and os.getppid() == launcher:
            time.sleep(look_every_s)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=follow, name="follow-launcher", daemon=True).start()


def _command(pid: int) -> str:
    """The command line of a process; "python" where it cannot be known."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return "python"
