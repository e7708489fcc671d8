"""Signal handling: the forced exit."""

import os
import signal
import threading

import pytest

from consensus.run.signals import STOP, StopSignals


def test_a_process_that_does_not_exit_in_time_is_ended(monkeypatch):
    ended = threading.Event()
    codes = []
    monkeypatch.setattr(os, "_exit", lambda code: (codes.append(code), ended.set()))
    signals = StopSignals(patience_s=0.05)
    os.kill(os.getpid(), signal.SIGUSR1)
    assert ended.wait(30.0)
    signals.close()
    assert (codes, signals.received) == ([128 + signal.SIGUSR1], signal.SIGUSR1)


@pytest.mark.parametrize("number", STOP)
@pytest.mark.parametrize("ignored", [False, True])
def test_a_signal_stops_unless_it_is_ignored(number, ignored):
    """nohup ignores SIGHUP."""
    before = signal.signal(number, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        signals = StopSignals(patience_s=60.0)
        os.kill(os.getpid(), number)
        assert signals.received == (0 if ignored else number)
        signals.close()
        assert signal.getsignal(number) is (signal.SIG_IGN if ignored else signal.SIG_DFL)
    finally:
        signal.signal(number, before)
