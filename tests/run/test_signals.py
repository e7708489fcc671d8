"""Signal handling: the forced exit."""

import os
import signal
import threading

import pytest

from consensus.run.signals import StopSignals
from consensus.startup import STOP


def test_a_process_that_does_not_exit_in_time_is_ended(monkeypatch):
    ended = threading.Event()
    codes = []
    monkeypatch.setattr(os, "_exit", lambda code: (codes.append(code), ended.set()))
    signals = StopSignals(patience_s=0.05)
    os.kill(os.getpid(), signal.SIGUSR1)
    assert ended.wait(30.0)
    signals.close()
    assert (codes, signals.received) == ([128 + signal.SIGUSR1], signal.SIGUSR1)


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_second_ctrl_c_ends_the_process_at_once(monkeypatch, first):
    codes, clock = [], [100.0]
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setattr("consensus.run.signals.time.monotonic", lambda: clock[0])
    signals = StopSignals(patience_s=1e6)
    try:
        os.kill(os.getpid(), first)
        clock[0] += 0.9  # torchrun passes on the signal of the terminal
        os.kill(os.getpid(), signal.SIGINT)
        clock[0] += 0.2
        os.kill(os.getpid(), signal.SIGTERM)
        assert codes == []
        os.kill(os.getpid(), signal.SIGINT)
        assert codes == [130]
        assert signals.received == first
    finally:
        signals.close()


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


def test_a_process_of_a_caller_is_not_ended(monkeypatch):
    """Of a notebook, say: the second Ctrl+C interrupts the call."""
    clock = [100.0]
    monkeypatch.setattr("consensus.run.signals.time.monotonic", lambda: clock[0])
    before, threads = signal.getsignal(signal.SIGINT), threading.active_count()
    signals = StopSignals(patience_s=None)
    try:
        os.kill(os.getpid(), signal.SIGINT)
        assert threading.active_count() == threads, "none that would end the process"
        clock[0] += 1.1
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == signal.SIGINT
    finally:
        signals.close()
    assert signal.getsignal(signal.SIGINT) is before


def test_a_handler_that_python_cannot_restore_is_kept(monkeypatch):
    """That of a program in C that has Python inside, for which Python has None."""
    real = signal.getsignal
    monkeypatch.setattr(signal, "getsignal", lambda n: None if n == signal.SIGHUP else real(n))
    before = real(signal.SIGHUP)
    signals = StopSignals(patience_s=None)
    assert real(signal.SIGHUP) is before
    assert real(signal.SIGTERM) == signals._record
    signals.close()
