import os
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch.distributed import TCPStore

from consensus.doctor import exchange as exchange_module
from consensus.doctor.exchange import Exchange


@pytest.fixture
def store():
    """What torchrun keeps over all its restarts."""
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return lambda: TCPStore("127.0.0.1", server.port, is_master=False, wait_for_workers=False)


def together(store, size, function, timeout_s=20.0):
    """function(exchange) for so many members, in threads."""
    with ThreadPoolExecutor(size) as pool:
        members = [
            Exchange(store(), index, size, timeout_s, keeps=index == 0) for index in range(size)
        ]
        return list(pool.map(function, members))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_all_members_hear_all_values(store, size):
    def talk(exchange):
        first = exchange.gather({"index": exchange.index})
        time.sleep(0.05 * exchange.index)  # who is late hears the same
        second = exchange.gather([exchange.index, None, "ä"])
        exchange.close()
        return first, second

    expected = ([{"index": i} for i in range(size)], [[i, None, "ä"] for i in range(size)])
    assert together(store, size, talk) == [expected] * size


def test_alone_one_hears_oneself():
    exchange = Exchange.alone()
    assert exchange.gather(7) == [7]
    exchange.close()


def test_one_asks_another(store):
    def talk(exchange):
        if exchange.index == 0:
            return exchange.ask("question") + 1
        exchange.tell("question", 41)
        return None

    assert together(store, 2, talk) == [42, None]


def test_a_member_that_is_absent_is_named(store):
    exchange = Exchange(store(), 0, 2, 0.3)
    with pytest.raises(TimeoutError, match=r"member 1 did not come to step 1 within 0\.3 s"):
        exchange.gather("here")
    assert exchange.heard() == ["here"]
    exchange.names = ["a", "b"]
    with pytest.raises(TimeoutError, match=r"b did not come to step 2 within 0\.3 s"):
        exchange.gather("here")


def test_who_waits_hears_a_signal(store):
    exchange = Exchange(store(), 0, 2, 10.0)
    timer = threading.Timer(0.3, os.kill, [os.getpid(), signal.SIGINT])
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        exchange.gather("here")


def test_members_know_each_other_by_name(store):
    def introduce(exchange):
        exchange.introduce(f"node{exchange.index}")
        return exchange.names

    assert together(store, 2, introduce) == [["node0", "node1"]] * 2


def test_a_store_that_is_gone_is_said_to_be():
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    client = TCPStore("127.0.0.1", server.port, is_master=False, wait_for_workers=False)
    exchange = Exchange(client, 1, 2, 5.0)
    del server
    with pytest.raises(ConnectionError, match="the store is gone"):
        exchange.gather("here")
    assert exchange.heard() == []


def test_the_node_that_keeps_the_store_is_the_first():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def come(keep):
        return Exchange.of_nodes("127.0.0.1", port, "mine", 3, 5.0, keep=keep)

    nodes = [come(True), come(False), come(False)]
    assert [node.index for node in nodes] == [0, 1, 2]
    with pytest.raises(ConnectionError, match="4 nodes came under the name mine, not 3"):
        come(False)


def test_the_store_of_another_job_is_not_taken_for_ours(monkeypatch):
    """torchrun keeps one at the same port for as long as its run lasts."""
    monkeypatch.setattr(exchange_module, "KEEPER_S", 0.3)
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with pytest.raises(ConnectionError, match="the store there is of another job, not of mine"):
        Exchange.of_nodes("127.0.0.1", server.port, "mine", 2, 5.0, keep=False)


def test_what_does_not_speak_as_a_store_is_not_waited_for():
    """torch's own client would wait for ever."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(ConnectionError, match="does not speak as a store"):
            Exchange.of_nodes("127.0.0.1", silent.getsockname()[1], "a", 2, 0.5, keep=False)


def test_the_keeper_of_a_store_stays_until_all_others_leave(store):
    began = time.monotonic()
    took = {}

    def leave(exchange):
        time.sleep(0.3 * exchange.index)
        exchange.close()
        took[exchange.index] = time.monotonic() - began

    together(store, 3, leave)
    assert took[0] >= 0.6
