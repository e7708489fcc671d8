import json
import shutil
import socket
import subprocess
import time

import pytest

from consensus.doctor import network
from consensus.doctor.exchange import Exchange, RendezvousError
from consensus.doctor.finding import Finding, Level


@pytest.mark.parametrize("value", ["eth77", "lo,eth77"])
def test_a_wrong_interface(monkeypatch, value):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", value)
    address, (finding,) = network.check_interface()
    assert address is None
    assert finding.level == Level.FAULT
    expected = f"GLOO_SOCKET_IFNAME is {value}, which this machine does not have; it has lo"
    assert finding.text.startswith(expected)
    assert finding.remedy.startswith("INTERFACE=NAME")


def test_the_addresses_of_this_machine():
    found = network.interfaces()
    assert found["lo"][0] == "127.0.0.1"
    if shutil.which("ip") is None:
        return
    words = ["ip", "-json", "addr"]
    listed = json.loads(subprocess.run(words, capture_output=True, check=True).stdout)
    for interface in listed:
        own = [a["local"] for a in interface["addr_info"] if a["scope"] != "link"]
        assert set(found[interface["ifname"].partition("@")[0]]) <= set(own)


@pytest.mark.parametrize(
    ("variable", "value", "fits"),
    [
        ("GLOO_SOCKET_IFNAME", "eth0", True),
        ("GLOO_SOCKET_IFNAME", "eth", False),
        ("NCCL_SOCKET_IFNAME", "eth", True),  # a prefix
        ("NCCL_SOCKET_IFNAME", "=eth", False),
        ("NCCL_SOCKET_IFNAME", "=eth0", True),
        ("NCCL_SOCKET_IFNAME", "^lo", True),
        ("NCCL_SOCKET_IFNAME", "ib", False),
    ],
)
def test_names_of_interfaces(variable, value, fits):
    assert network._fits(variable, value, {"lo": [], "eth0": []}) == fits


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", "cannot be reached in 0.1 s (Connection refused)"),
        ("nowhere.invalid", "the name nowhere.invalid cannot be resolved here"),
    ],
)
def test_an_unreachable_rendezvous(host, expected):
    with pytest.raises(RendezvousError) as failure:
        network.reach(host, free_port(), 0.1, "the rendezvous")
    assert expected in failure.value.finding.text
    assert failure.value.finding.topic == "rendezvous"


def test_an_address_is_our_own_for_a_free_port_of_this_machine():
    port = free_port()
    assert network.own_address("127.0.0.1", port) == "127.0.0.1"
    assert network.own_address("192.0.2.1", port) is None  # reserved for documentation
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", port))
        busy.listen()
        assert network.own_address("127.0.0.1", port) is None


def test_members_that_reach_each_other(together):
    found = together(3, lambda exchange: network.check_pairs(exchange, "127.0.0.1"))
    expected = "3 nodes reach each other (127.0.0.1, 127.0.0.1, 127.0.0.1)"
    assert found == [[Finding("network", expected)]] * 3


def test_a_member_that_is_not_reached_is_named(together, monkeypatch):
    gather = Exchange.gather

    def lie(exchange, value):
        """The second member announces a port without a listener."""
        if exchange.index == 1 and isinstance(value, tuple):
            value = ["127.0.0.1", 1]
        return gather(exchange, value)

    monkeypatch.setattr(Exchange, "gather", lie)
    first, second = together(2, lambda exchange: network.check_pairs(exchange, "127.0.0.1"))
    assert second == []
    assert [f.text for f in first if f.level == Level.FAULT] == [
        "cannot reach member 1 at 127.0.0.1, its loopback (Connection refused)"
    ]


@pytest.mark.parametrize(
    ("ahead", "level", "expected"),
    [
        (0.0, Level.FINE, "all clocks agree within "),
        (3.0, Level.WARNING, "3.0 s ahead of the first clock"),
        (-60.0, Level.FAULT, "60.0 s behind the first clock"),
    ],
)
def test_clocks(together, ahead, level, expected):
    def look(exchange):
        off = ahead if exchange.index == 1 else 0.0
        return network.check_clocks(exchange, True, lambda: time.time() + off)

    found = together(3, look)
    assert [finding.level for finding in found[1]] == [level]
    assert expected in found[1][0].text
    assert [len(findings) for findings in found] == ([1, 1, 1] if not ahead else [0, 1, 0])
