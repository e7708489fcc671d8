"""Signal handling: the forced exit."""

import os
import signal
import threading

from consensus.run.signals import StopSignals


def test_a_process_that_does_not_exit_in_time_is_ended(monkeypatch):
    ended = threading.Event()
    codes = []
    monkeypatch.setattr(os, "_exit", lambda code: (codes.append(code), ended.set()))
    signals = StopSignals(patience_s=0.05)
    os.kill(os.getpid(), signal.SIGUSR1)
    assert ended.wait(30.0)
    signals.close()
    assert (codes, signals.received) == ([128 + signal.SIGUSR1], signal.SIGUSR1)
