"""Hosts on this machine: network namespaces with an address each, on one bridge; for root.

    with Hosts(4, folder) as hosts:
        subprocess.run([hosts.remote, "host0", "hostname"])

`remote` is what launch/multinode.sh takes for ssh: it runs a command in the namespace of a host.
"""

import contextlib
import os
import shutil
import subprocess
from pathlib import Path


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
    """So many of them; each sees the others through its interface eth0, and nothing else."""

    def __init__(self, number: int, folder: Path):
        self.names = [f"host{i}" for i in range(number)]
        self.addresses = [f"10.77.{os.getpid() % 200}.{i + 1}" for i in range(number)]
        self.bridge = f"br{os.getpid() % 100_000}"
        self.remote = folder / "remote"
        self.remote.write_text(f'#!/bin/sh\nexec ip netns exec "{self.space("$1")}" sh -c "$2"\n')
        self.remote.chmod(0o755)

    def space(self, name: str) -> str:
        return f"consensus-{os.getpid()}-{name}"

    def __enter__(self) -> "Hosts":
        try:
            ip("link", "add", self.bridge, "type", "bridge")
            ip("link", "set", self.bridge, "up")
            for i, (name, address) in enumerate(zip(self.names, self.addresses, strict=True)):
                space, port = self.space(name), f"{self.bridge}p{i}"
                ip("netns", "add", space)
                ip("link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", space)
                ip("link", "set", port, "master", self.bridge, "up")
                ip("-n", space, "addr", "add", f"{address}/24", "dev", "eth0")
                ip("-n", space, "link", "set", "eth0", "up")
                ip("-n", space, "link", "set", "lo", "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for i, name in enumerate(self.names):
            with contextlib.suppress(subprocess.CalledProcessError):
                ip("netns", "del", self.space(name))
            with contextlib.suppress(subprocess.CalledProcessError):
                ip("link", "del", f"{self.bridge}p{i}")  # gone with the namespace, a little later
        with contextlib.suppress(subprocess.CalledProcessError):
            ip("link", "del", self.bridge)

    def cut(self, name: str) -> None:
        """Take a host off the network."""
        ip("link", "set", f"{self.bridge}p{self.names.index(name)}", "down")

    def join(self, name: str) -> None:
        """And back."""
        ip("link", "set", f"{self.bridge}p{self.names.index(name)}", "up")
