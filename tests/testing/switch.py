"""A switch in user space, with a latency and a loss: for kernels that have no netem.

    python switch.py LATENCY_S LOSS SEED NAMESPACE=ADDRESS ...

Every namespace gets a TUN device eth0, and this process holds the other ends. It reads each packet,
delays it by the latency, and writes it to the destination, or drops it with the probability LOSS.
The devices disappear when the process ends. It ends when its standard input is closed, thus with
its parent. Its commands are lines on the standard input: `cut NAMESPACE`, `join NAMESPACE` and
`latency SECONDS`. The reply to each command, and the first line of output, is the number of packets
lost so far. (Packets from and to a host that is cut off do not count as lost.)

The latency is one way and starts when the packet is read, so the time of the switch itself adds to
it. Packets keep their order, also when the latency changes. Losses are drawn from SEED, but the
order of packets depends on the machine, so two runs lose different packets.

The devices have the MTU of an Ethernet, so TCP has the same slow start. The kernel still passes
up to 64 KB of TCP at once (TUN_F_TSO4), as to a veth or to netem. So Python moves few packets, and
one lost packet can be 40 on the wire. TCP is Reno, which every kernel has, since the default
differs between machines and behaves differently under a latency.
"""

import contextlib
import ctypes
import fcntl
import os
import random
import select
import socket
import struct
import sys
import time
from collections import deque
from collections.abc import Iterator

CLONE_NEWNET = 0x40000000
TUNSETIFF, TUNSETOFFLOAD = 0x400454CA, 0x400454D0
IFF_TUN, IFF_NO_PI, IFF_VNET_HDR = 0x0001, 0x1000, 0x4000
TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO_ECN = 0x01, 0x02, 0x08
VNET_HEADER = 10  # bytes in front of a packet: its checksum to be, and the sizes to cut it into
DESTINATION = slice(VNET_HEADER + 16, VNET_HEADER + 20)  # of an IPv4 packet
AT_ONCE = 64  # packets of one host, before the others and those that are due have their turn


@contextlib.contextmanager
def inside(space: str) -> Iterator[None]:
    """This thread in a network namespace; what it opens there stays there."""
    libc = ctypes.CDLL(None, use_errno=True)

    def enter(namespace: int) -> None:
        if libc.setns(namespace, CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"setns {space}")

    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        there = os.open(f"/run/netns/{space}", os.O_RDONLY)
        try:
            enter(there)
        finally:
            os.close(there)
        try:
            yield
        finally:
            enter(home)
    finally:
        os.close(home)


def open_tun(space: str) -> int:
    """The device eth0 of a namespace, as a file of packets."""
    with inside(space):
        tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        flags = IFF_TUN | IFF_NO_PI | IFF_VNET_HDR
        fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH22x", b"eth0", flags))
        fcntl.ioctl(tun, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO_ECN)
        with open("/proc/sys/net/ipv4/tcp_congestion_control", "w") as control:
            control.write("reno")
    return tun


class Switch:
    """The hosts by address, and the packets in flight."""

    def __init__(self, latency_s: float, loss: float, seed: int, hosts: dict[str, str]):
        self.latency_s, self.loss = latency_s, loss
        self.random = random.Random(seed)
        self.tuns = {space: open_tun(space) for space in hosts}
        self.by_address = {socket.inet_aton(hosts[space]): tun for space, tun in self.tuns.items()}
        self.off: set[int] = set()
        self.lost = 0
        self.travelling: deque[tuple[float, int, bytes]] = deque()  # time, TUN, packet

    def serve(self) -> None:
        """Forward packets until the standard input is closed."""
        commands = sys.stdin.fileno()
        sources = [commands, *self.tuns.values()]
        while True:
            wait = max(0.0, self.travelling[0][0] - time.monotonic()) if self.travelling else None
            for ready in select.select(sources, [], [], wait)[0]:
                if ready != commands:
                    self.receive(ready)
                elif not self.obey(os.read(commands, 4096).decode()):
                    return
            self.deliver()

    def receive(self, tun: int) -> None:
        for _ in range(AT_ONCE):
            try:
                packet = os.read(tun, 1 << 17)
            except BlockingIOError:
                return
            target = self.by_address.get(packet[DESTINATION])
            if target is None or tun in self.off:
                continue
            if self.loss > 0 and self.random.random() < self.loss:
                self.lost += 1
                continue
            self.travelling.append((time.monotonic() + self.latency_s, target, packet))

    def deliver(self) -> None:
        while self.travelling and self.travelling[0][0] <= time.monotonic():
            _, target, packet = self.travelling.popleft()
            if target not in self.off:
                with contextlib.suppress(OSError):  # an interface that is down drops packets
                    os.write(target, packet)

    def obey(self, text: str) -> bool:
        """Execute commands; false at the end of the input."""
        for line in text.splitlines():
            match line.split():
                case ["cut", space]:
                    self.off.add(self.tuns[space])
                case ["join", space]:
                    self.off.discard(self.tuns[space])
                case ["latency", seconds]:
                    self.latency_s = float(seconds)
                case _:
                    raise ValueError(f"not a command: {line}")
            self.answer()
        return bool(text)

    def answer(self) -> None:
        print(self.lost, flush=True)


def main() -> None:
    latency_s, loss, seed, *hosts = sys.argv[1:]
    spaces = dict(host.split("=") for host in hosts)
    switch = Switch(float(latency_s), float(loss), int(seed), spaces)
    with contextlib.suppress(PermissionError):
        # The hosts compute on the same cores, and the switch must not wait for one.
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    switch.answer()
    switch.serve()


if __name__ == "__main__":
    main()
