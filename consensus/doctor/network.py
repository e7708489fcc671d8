"""Checks of the network by plain sockets: address, rendezvous, connections, clocks.

Gloo and NCCL detect these faults only by a timeout, and without the cause.
"""

import errno
import fcntl
import os
import socket
import struct
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from ipaddress import ip_address
from pathlib import Path

from consensus.doctor.exchange import Exchange, RendezvousError
from consensus.doctor.finding import Finding, fault, warning

SIOCGIFADDR = 0x8915
CONNECT_S = 3.0
PRINT_EVERY_S = 10.0
ROUNDS = 5
WORST_CLOCK_S, BAD_CLOCK_S = 15.0, 1.0  # torchrun takes a node that is 15 s behind for dead

INTERFACE = (
    "INTERFACE=NAME for launch/node.sh, or GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME, of the "
    "network that all nodes are on"
)


def interfaces() -> dict[str, list[str]]:
    """Addresses by network interface, IPv4 first."""
    found: dict[str, list[str]] = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            found[name] = []
            with suppress(OSError):  # it has none
                answer = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                found[name].append(socket.inet_ntoa(answer[20:24]))
    with suppress(OSError):
        for line in Path("/proc/net/if_inet6").read_text().splitlines():
            digits, _, _, scope, _, name = line.split()
            if scope != "20":  # link-local: usable only together with the interface's name
                packed = bytes.fromhex(digits)
                found.setdefault(name, []).append(socket.inet_ntop(socket.AF_INET6, packed))
    return found


def check_interface() -> tuple[str | None, list[Finding]]:
    """Address at which Gloo will listen; None and a fault if it is unusable.

    It is that of GLOO_SOCKET_IFNAME, else that of the host's name, else the loopback.
    """
    present = interfaces()
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        value = os.environ.get(variable, "")
        if value and not _fits(variable, value, present):
            has = ", ".join(f"{name} {' '.join(own) or '-'}" for name, own in present.items())
            text = f"{variable} is {value}, which this machine does not have; it has {has}"
            return None, [fault("network", text, INTERFACE)]
    name = os.environ.get("GLOO_SOCKET_IFNAME", "").partition(",")[0]
    if not name:
        return own_address(socket.gethostname(), 0) or "127.0.0.1", []
    down = False
    with suppress(OSError, ValueError):
        down = not int(Path(f"/sys/class/net/{name}/flags").read_text(), 16) & 1
    if not present[name] or down:
        problem = "is down" if down else "has no address"
        text = f"the interface {name} (GLOO_SOCKET_IFNAME) {problem}"
        return None, [fault("network", text, f"ip link set {name} up, or {INTERFACE}")]
    return present[name][0], []


def _fits(variable: str, value: str, present: dict[str, list[str]]) -> bool:
    """Whether an interface has that name; NCCL also takes prefixes, "=exact" and "^not these"."""
    if variable == "GLOO_SOCKET_IFNAME":
        return all(name in present for name in value.split(","))
    if value.startswith("^"):
        return True
    exact, names = value.startswith("="), value.lstrip("=").split(",")
    return any(own == name if exact else own.startswith(name) for name in names for own in present)


def own_address(host: str, port: int) -> str | None:
    """First address of a host that this machine has, with the port unused; None if none is."""
    with suppress(OSError, UnicodeError):
        for family, _, _, _, place in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            with suppress(OSError), socket.create_server(place, family=family):
                return str(place[0])
    return None


def reach(host: str, port: int, patience_s: float, name: str) -> None:
    """Wait until a server, called `name`, answers; RendezvousError with the cause if none does."""
    deadline, speak = time.monotonic() + patience_s, time.monotonic() + PRINT_EVERY_S
    while True:
        try:
            socket.create_connection((host, port), timeout=CONNECT_S).close()
            return
        except (OSError, UnicodeError) as error:
            problem, cause = error, reason(error)
        if time.monotonic() > deadline:
            break
        if time.monotonic() > speak:
            speak += PRINT_EVERY_S
            line = f"{host}:{port} does not answer yet ({cause}); tries for {patience_s:g} s"
            print(f"consensus.doctor: {line}", flush=True)
        time.sleep(0.5)
    text = f"{name} is {host}:{port}, which cannot be reached in {patience_s:g} s ({cause})"
    remedy = "an address in a network that all nodes are on, and a port that no firewall closes"
    if isinstance(problem, socket.gaierror | UnicodeError):
        text = f"{name} is {host}:{port}, but the name {host} cannot be resolved here"
        remedy = f"an address in place of the name, or {INTERFACE}"
    elif problem.errno == errno.ECONNREFUSED:
        remedy = "start the node that has this address: the others meet there"
    raise RendezvousError(text, remedy) from problem


def reason(error: OSError | UnicodeError) -> str:
    """Cause of a failed connection, in plain words."""
    if isinstance(error, UnicodeError):
        return "no name of a machine"
    if isinstance(error, TimeoutError):
        return "no answer: a firewall, another network, or the machine is off"
    return error.strerror or str(error)


def check_pairs(exchange: Exchange, address: str | None) -> list[Finding]:
    """Connect all members that have an address, at ports that the system chooses. A collective."""
    with ExitStack() as stack:
        place = None if address is None else _listen(address, exchange, stack)
        places = exchange.gather(place)

        def connect(index: int) -> str:
            if place is None or places[index] is None or index == exchange.index:
                return ""
            try:
                with socket.create_connection(places[index], timeout=CONNECT_S) as connection:
                    connection.settimeout(CONNECT_S)
                    found = connection.makefile().readline().strip()
                    return "" if found == str(index) else "something else answers there"
            except OSError as error:
                return reason(error)

        with ThreadPoolExecutor(min(32, exchange.size)) as pool:
            problems = list(pool.map(connect, range(exchange.size)))
        wrong = exchange.gather(any(problems))
    if not any(wrong):
        reached = [there[0] for there in places if there is not None]
        shown = ", ".join(reached[:4]) + (", ..." if len(reached) > 4 else "")
        return [Finding("network", f"{len(reached)} nodes reach each other ({shown})")]
    findings = []
    why = "since ranks connect at ports that the system chooses"
    remedy = f"{INTERFACE}; no firewall between the nodes, {why}"
    for name, there, problem in zip(exchange.names, places, problems, strict=True):
        if problem:
            loopback = ", its loopback" if ip_address(there[0]).is_loopback else ""
            text = f"cannot reach {name.partition(' rank ')[0]} at {there[0]}{loopback} ({problem})"
            findings.append(fault("network", text, remedy))
    return findings


def _listen(address: str, exchange: Exchange, stack: ExitStack) -> tuple[str, int]:
    """Answer every connection with the index of this member, in a thread, until the stack ends."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.create_server((address, 0), family=family, backlog=exchange.size)
    stack.enter_context(listener)

    def answer() -> None:
        with suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection, suppress(OSError):
                    connection.sendall(f"{exchange.index}\n".encode())

    def stop() -> None:
        with suppress(OSError):  # not supported on all platforms
            listener.shutdown(socket.SHUT_RDWR)  # wakes `accept`
        thread.join(CONNECT_S)

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    stack.callback(stop)
    return address, listener.getsockname()[1]


def check_clocks(
    exchange: Exchange, takes_part: bool = True, clock: Callable[[], float] = time.time
) -> list[Finding]:
    """Offset of this member's clock from the clock of the first, which takes part. A collective.

    The first answers each of the others in turn with its time. That time lies between a question
    and its answer, so the error is at most half of that delay, for the quickest of five.
    """
    parts = exchange.gather(takes_part)
    measured = []
    for index in (index for index in range(1, exchange.size) if parts[index]):
        for turn in range(ROUNDS):
            key = f"clock {index} {turn}"
            if exchange.index == 0:
                exchange.receive(f"{key} asks")
                exchange.publish(key, clock())
            elif exchange.index == index:
                asked, began = clock(), time.monotonic()
                exchange.publish(f"{key} asks", True)
                answer = exchange.receive(key)
                half = (time.monotonic() - began) / 2
                measured.append((half, asked + half - answer))
    within, off = min(measured, default=(0.0, 0.0))
    known = exchange.gather([off, within])
    if sum(parts) < 2:
        return []
    if all(abs(there) - doubt <= BAD_CLOCK_S for there, doubt in known):
        most = max(abs(there) + doubt for there, doubt in known)
        return [Finding("clock", f"all clocks agree within {1e3 * most:.2g} ms")]
    if abs(off) - within <= BAD_CLOCK_S:
        return []
    kind = fault if abs(off) > WORST_CLOCK_S else warning
    text = f"{abs(off):.1f} s {'ahead of' if off > 0 else 'behind'} the first clock"
    why = "torchrun takes a node that is 15 s off for dead, and dates of files and logs mislead"
    remedy = f"NTP on every node (chrony, systemd-timesyncd): {why}"
    return [kind("clock", text, remedy)]
