import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch.distributed import TCPStore

from consensus.comm.rendezvous import Heartbeat, await_name, in_time, meet, open_store


@pytest.fixture
def store():
    """A server as torchrun keeps it over all restarts; the fixture opens a client."""
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return lambda: TCPStore("127.0.0.1", server.port, is_master=False, wait_for_workers=False)


def start(store, delays, timeout_s=20.0):
    """Prefixes, or errors, of one rank for each delay; None is a rank that never comes."""

    def come(rank):
        if delays[rank] is None:
            return None
        time.sleep(delays[rank])
        try:
            return meet(store(), rank, len(delays), timeout_s)
        except TimeoutError as error:
            return str(error)

    with ThreadPoolExecutor(len(delays)) as pool:
        return list(pool.map(come, range(len(delays))))


@pytest.mark.parametrize("late", [0, 1, 2])
def test_every_start_gets_a_prefix_of_its_own(store, late):
    # The store holds all keys of the earlier starts, also those of one that has failed.
    names = [start(store, [0.0, 0.0, 0.0]) for _ in range(2)]
    broken_off = start(store, [0.0, 0.0, None], timeout_s=0.3)
    assert "rank 2 did not come within 0.3 s" in broken_off[0]
    names += [start(store, [0.3 * (rank == late) for rank in range(3)]) for _ in range(3)]
    assert all(len(set(of_one_start)) == 1 for of_one_start in names)
    assert len({of_one_start[0] for of_one_start in names}) == 5


def test_absent_ranks_are_named(store):
    expected = start(store, [0.0, None, 0.0, None], timeout_s=0.5)
    assert expected[0] == "rank 1, 3 did not come within 0.5 s"
    assert expected[2].startswith("rank ")


def test_a_blocking_call_ends_in_time():
    assert in_time(lambda: 7, 10.0, "late") == 7
    with pytest.raises(TimeoutError, match="late"):
        in_time(lambda: time.sleep(5.0), 0.05, "late")
    with pytest.raises(ZeroDivisionError):
        in_time(lambda: 1 / 0, 10.0, "late")


def test_a_heartbeat_names_failed_and_silent_ranks(store, monkeypatch):
    monkeypatch.setattr(Heartbeat, "PERIOD_S", 0.1)
    first, second, third = (Heartbeat(store(), rank, 3) for rank in range(3))
    assert first.describe_lost_ranks() == "rank 1, 2 lives but did not come in time"
    second.stop()
    silent = "no sign of life from rank 1 (killed, stopped or cut off)"
    assert first.describe_lost_ranks() == silent
    third.publish_failure("OSError: the disk is full")
    failed = "rank 2 failed: OSError: the disk is full"
    assert first.describe_lost_ranks() == f"{failed}; {silent}"
    for heartbeat in (first, third):
        heartbeat.stop()


def test_a_host_without_an_address_is_named_in_time(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "no-such-host.invalid")
    monkeypatch.setenv("MASTER_PORT", "29500")
    started = time.monotonic()
    with pytest.raises(TimeoutError, match=r"no-such-host\.invalid \(MASTER_ADDR\) does not"):
        open_store(0, 2, timeout_s=0.5)
    assert time.monotonic() - started < 30.0


def test_a_name_may_come_late(monkeypatch):
    answers = [socket.gaierror(-2, "unknown"), socket.gaierror(-3, "try again"), []]
    monkeypatch.setattr(time, "sleep", lambda _: None)

    def answer(*_):
        found = answers.pop(0)
        if isinstance(found, OSError):
            raise found
        return found

    monkeypatch.setattr(socket, "getaddrinfo", answer)
    await_name("pod-0", timeout_s=60.0)
    assert answers == []
