"""Virtual hosts on this machine: network namespaces on one bridge; needs root.

    with Hosts(4, folder) as hosts:
        subprocess.run([hosts.remote, "host0", "hostname"])
    with Hosts(4, folder, latency_ms=10.0, loss=0.01) as hosts:
        ...

`remote` replaces ssh in launch/multinode.sh: it runs a command in the namespace of a host.

`latency_ms` is one way, as with `tc qdisc add dev eth0 root netem delay 10ms loss 1%` on each host,
so a round trip takes twice as long. Not every kernel has netem, so switch.py replaces the bridge
where there is a latency or a loss. A latency of 0 is the switch alone; None is the kernel's bridge.
"""

import contextlib
import itertools
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

from tests.testing.switch import inside

SWITCH = Path(__file__).with_name("switch.py")


def available() -> bool:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    probe = f"consensus-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, check=False)
    subprocess.run(["ip", "netns", "del", probe], capture_output=True, check=False)
    return made.returncode == 0


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


class Hosts:
    """Hosts that reach each other through their interface eth0, and nothing else.

    Args:
        number: Of hosts.
        folder: The folder of `remote`.
        latency_ms: Of every packet, one way; None: no switch but the kernel's bridge.
        loss: The probability that a packet is lost; a positive one needs the switch as well.
        seed: Of the losses.

    Attributes:
        lost: The number of lost packets, as of the last command to the switch.
    """

    _serial = itertools.count()

    def __init__(
        self,
        number: int,
        folder: Path,
        latency_ms: float | None = None,
        loss: float = 0.0,
        seed: int = 0,
    ):
        self.names = [f"host{i}" for i in range(number)]
        self.addresses = [f"10.77.{os.getpid() % 200}.{i + 1}" for i in range(number)]
        self.serial = next(self._serial)  # a process may have several sets of them
        self.bridge = f"br{os.getpid() % 100_000}x{self.serial}"
        self.switched = latency_ms is not None or loss > 0
        self.options = [str((latency_ms or 0.0) / 1e3), str(loss), str(seed)]
        self.switch: subprocess.Popen[str] | None = None
        self.lost = 0
        self.remote = folder / "remote"
        self.remote.write_text(f'#!/bin/sh\nexec ip netns exec "{self.space("$1")}" sh -c "$2"\n')
        self.remote.chmod(0o755)

    def space(self, name: str) -> str:
        return f"consensus-{os.getpid()}-{self.serial}-{name}"

    def port(self, name: str) -> str:
        return f"{self.bridge}p{self.names.index(name)}"

    def __enter__(self) -> "Hosts":
        try:
            for name in self.names:
                ip("netns", "add", self.space(name))
            if self.switched:
                self._start_switch()
            else:
                self._build_bridge()
            for name, address in zip(self.names, self.addresses, strict=True):
                space = self.space(name)
                ip("-n", space, "addr", "add", f"{address}/24", "dev", "eth0")
                ip("-n", space, "link", "set", "eth0", "up")
                ip("-n", space, "link", "set", "lo", "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def _build_bridge(self) -> None:
        ip("link", "add", self.bridge, "type", "bridge")
        ip("link", "set", self.bridge, "up")
        for name in self.names:
            port = self.port(name)
            peer = ("peer", "name", "eth0", "netns", self.space(name))
            ip("link", "add", port, "type", "veth", *peer)
            ip("link", "set", port, "master", self.bridge, "up")

    def _start_switch(self) -> None:
        places = zip(self.names, self.addresses, strict=True)
        hosts = [f"{self.space(name)}={address}" for name, address in places]
        self.switch = subprocess.Popen(
            [sys.executable, "-I", str(SWITCH), *self.options, *hosts],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
            start_new_session=True,  # so that Ctrl+C reaches the hosts only
        )  # fmt: skip
        self._hear_switch()

    def _hear_switch(self) -> None:
        assert self.switch is not None
        assert self.switch.stdout is not None
        answer = self.switch.stdout.readline()
        if not answer:
            raise RuntimeError(f"the switch has ended, with exit code {self.switch.wait()}")
        self.lost = int(answer)

    def _tell_switch(self, command: str) -> None:
        assert self.switch is not None
        assert self.switch.stdin is not None
        self.switch.stdin.write(f"{command}\n")
        self._hear_switch()

    def __exit__(self, *_: object) -> None:
        if self.switch is not None:
            with self.switch:  # closes its pipes, which ends it and its devices
                pass
        for name in self.names:
            with contextlib.suppress(subprocess.CalledProcessError):
                ip("netns", "del", self.space(name))
            if not self.switched:
                with contextlib.suppress(subprocess.CalledProcessError):
                    ip(
                        "link", "del", self.port(name)
                    )  # it disappears with the namespace, a little later
        if not self.switched:
            with contextlib.suppress(subprocess.CalledProcessError):
                ip("link", "del", self.bridge)

    def cut(self, name: str) -> None:
        """Disconnect a host from the network."""
        if self.switched:
            self._tell_switch(f"cut {self.space(name)}")
        else:
            ip("link", "set", self.port(name), "down")

    def join(self, name: str) -> None:
        """Connect a host again."""
        if self.switched:
            self._tell_switch(f"join {self.space(name)}")
        else:
            ip("link", "set", self.port(name), "up")

    def set_latency(self, latency_ms: float) -> None:
        """Set the latency of new packets; with the switch only."""
        self._tell_switch(f"latency {latency_ms / 1e3}")

    def socket(self, name: str, kind: socket.SocketKind) -> socket.socket:
        """A socket of this process in the namespace of a host, at a free port."""
        with inside(self.space(name)):
            own = socket.socket(socket.AF_INET, kind)
        own.bind((self.addresses[self.names.index(name)], 0))
        return own

    def round_trips(self, number: int) -> list[float]:
        """Round-trip times of one byte between the first two hosts, by UDP. Seconds."""
        kind = socket.SOCK_DGRAM
        with self.socket(self.names[0], kind) as here, self.socket(self.names[1], kind) as there:
            found = []
            for side in (here, there):
                side.settimeout(1.0)
            for _ in range(number):
                started = time.perf_counter()
                here.sendto(b"x", there.getsockname())
                there.sendto(*there.recvfrom(1))
                here.recv(1)
                found.append(time.perf_counter() - started)
        return found
