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
    """A server as torchrun keeps it; the fixture opens a client."""
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return lambda: TCPStore("127.0.0.1", server.port, is_master=False, wait_for_workers=False)


def together(store, size, function, timeout_s=20.0):
    """function(exchange) for each of `size` members, in threads."""
    with ThreadPoolExecutor(size) as pool:
        members = [
            Exchange(store(), index, size, timeout_s, keeps=index == 0) for index in range(size)
        ]
        return list(pool.map(function, members))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_all_members_gather_all_values(store, size):
    def talk(exchange):
        first = exchange.gather({"index": exchange.index})
        time.sleep(0.05 * exchange.index)  # a late member gathers the same
        second = exchange.gather([exchange.index, None, "ä"])
        exchange.close()
        return first, second

    expected = ([{"index": i} for i in range(size)], [[i, None, "ä"] for i in range(size)])
    assert together(store, size, talk) == [expected] * size


def test_one_member_gathers_its_own_value():
    exchange = Exchange.alone()
    assert exchange.gather(7) == [7]
    exchange.close()


def test_one_member_receives_from_another(store):
    def talk(exchange):
        if exchange.index == 0:
            return exchange.receive("question") + 1
        exchange.publish("question", 41)
        return None

    assert together(store, 2, talk) == [42, None]


def test_an_absent_member_is_named(store):
    exchange = Exchange(store(), 0, 2, 0.3)
    with pytest.raises(TimeoutError, match=r"member 1 did not come to step 1 within 0\.3 s"):
        exchange.gather("here")
    assert exchange.received() == ["here"]
    exchange.names = ["a", "b"]
    with pytest.raises(TimeoutError, match=r"b did not come to step 2 within 0\.3 s"):
        exchange.gather("here")


def test_signals_interrupt_a_wait(store):
    exchange = Exchange(store(), 0, 2, 10.0)
    timer = threading.Timer(0.3, os.kill, [os.getpid(), signal.SIGINT])
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        exchange.gather("here")


def test_a_lost_store_is_reported():
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    client = TCPStore("127.0.0.1", server.port, is_master=False, wait_for_workers=False)
    exchange = Exchange(client, 1, 2, 5.0)
    del server
    with pytest.raises(ConnectionError, match="the store is gone"):
        exchange.gather("here")
    assert exchange.received() == []


def test_the_node_that_hosts_the_store_has_index_0():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def come(keep):
        return Exchange.of_nodes("127.0.0.1", port, "mine", 3, 5.0, keep=keep)

    nodes = [come(True), come(False), come(False)]
    assert [node.index for node in nodes] == [0, 1, 2]
    with pytest.raises(ConnectionError, match="4 nodes came under the name mine, not 3"):
        come(False)


def test_the_store_of_another_job_is_refused(monkeypatch):
    # torchrun keeps one at the same port for as long as its run lasts.
    monkeypatch.setattr(exchange_module, "KEEPER_S", 0.3)
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with pytest.raises(ConnectionError, match="the store there is of another job, not of mine"):
        Exchange.of_nodes("127.0.0.1", server.port, "mine", 2, 5.0, keep=False)


def test_a_server_that_is_no_store_is_refused():
    # The client of torch would wait for ever.
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(ConnectionError, match="does not speak as a store"):
            Exchange.of_nodes("127.0.0.1", silent.getsockname()[1], "a", 2, 0.5, keep=False)


def test_the_host_of_the_store_leaves_last(store):
    began = time.monotonic()
    took = {}

    def leave(exchange):
        time.sleep(0.3 * exchange.index)
        exchange.close()
        took[exchange.index] = time.monotonic() - began

    together(store, 3, leave)
    assert took[0] >= 0.6
