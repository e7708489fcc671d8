"""Whether the members of a job reach each other, and what time it is there.

Gloo and NCCL find out by waiting, and say little. Here every step is made alone, by plain sockets:
which address this machine shows, whether the place to meet answers there, whether every member
reaches every other, how far their clocks are apart.
"""

import contextlib
import errno
import fcntl
import os
import socket
import struct
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from consensus.comm.rendezvous import Exchange
from consensus.doctor.finding import FaultError, Finding, fault, warning

NET = Path("/sys/class/net")
SIOCGIFADDR = 0x8915
CONNECT_S = 3.0
SPEAK_EVERY_S = 10.0
ROUNDS = 5
WORST_CLOCK_S, BAD_CLOCK_S = 15.0, 1.0
"""torchrun takes a node whose clock is 15 s behind for one that has died."""

INTERFACE = (
    "INTERFACE=NAME for launch/node.sh, or GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME, of the "
    "network that all nodes are on"
)


def interfaces() -> dict[str, list[str]]:
    """Network interfaces of this machine with their addresses, IPv4 first. {} if nobody says."""
    found: dict[str, list[str]] = {}
    for _, name in socket.if_nameindex():
        found[name] = _ipv4(name)
    with contextlib.suppress(OSError):
        for line in Path("/proc/net/if_inet6").read_text().splitlines():
            digits, _, _, scope, _, name = line.split()
            if scope != "20":  # link-local: of no use without naming the interface again
                packed = bytes.fromhex(digits)
                found.setdefault(name, []).append(socket.inet_ntop(socket.AF_INET6, packed))
    return found


def _ipv4(interface: str) -> list[str]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        except OSError:  # it has none
            return []
    return [socket.inet_ntoa(answer[20:24])]


def check_interface() -> tuple[str | None, list[Finding]]:
    """The address at which Gloo will wait for the others; None and a fault if it is of no use.

    As Gloo does: the interface that GLOO_SOCKET_IFNAME names, else what the name of this machine
    resolves to, else the loopback.
    """
    there = interfaces()
    named = {
        variable: os.environ[variable]
        for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
        if os.environ.get(variable)
    }
    for variable, value in named.items():
        if not _fits(variable, value, there):
            has = ", ".join(f"{name} {' '.join(own) or '-'}" for name, own in there.items())
            text = f"{variable} is {value}, which this machine does not have; it has {has}"
            return None, [fault("network", text, INTERFACE)]
    name = named.get("GLOO_SOCKET_IFNAME", "").partition(",")[0]
    if name:
        state = _state(name)
        if not there[name] or state == "down":
            what = "is down" if state == "down" else "has no address"
            text = f"the interface {name} (GLOO_SOCKET_IFNAME) {what}"
            return None, [fault("network", text, f"ip link set {name} up, or {INTERFACE}")]
        return there[name][0], []
    return _address_of_hostname(), []


def _fits(variable: str, value: str, there: dict[str, list[str]]) -> bool:
    """Whether an interface has that name; NCCL also takes prefixes, "=exact" and "^not these"."""
    if variable == "GLOO_SOCKET_IFNAME":
        return all(name in there for name in value.split(","))
    if value.startswith("^"):
        return True
    exact, names = value.startswith("="), value.lstrip("=").split(",")
    return any(own == name if exact else own.startswith(name) for name in names for own in there)


def _state(interface: str) -> str:
    try:
        return "up" if int((NET / interface / "flags").read_text(), 16) & 1 else "down"
    except (OSError, ValueError):
        return "unknown"


def _address_of_hostname() -> str:
    with contextlib.suppress(OSError, UnicodeError):
        found = socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)
        for family, kind, _, _, place in found:
            with socket.socket(family, kind) as probe, contextlib.suppress(OSError):
                probe.bind(place)
                return str(place[0])
    return "127.0.0.1"


def _is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


def reach(host: str, port: int, patience_s: float, what: str) -> None:
    """Wait until something answers at a place.

    Raises:
        FaultError: If nothing does; says why.
    """
    deadline, speak = time.monotonic() + patience_s, time.monotonic() + SPEAK_EVERY_S
    problem: OSError | UnicodeError
    while True:
        try:
            socket.create_connection((host, port), timeout=CONNECT_S).close()
            return
        except (OSError, UnicodeError) as error:
            problem = error
        if time.monotonic() > deadline:
            break
        if time.monotonic() > speak:
            speak += SPEAK_EVERY_S
            print(
                f"consensus.doctor: {host}:{port} does not answer yet ({reason(problem)}); tries "
                f"for {patience_s:g} s",
                flush=True,
            )
        time.sleep(0.5)
    if isinstance(problem, socket.gaierror | UnicodeError):
        raise FaultError(
            "rendezvous",
            f"{what} is {host}:{port}, but the name {host} cannot be resolved here",
            f"an address in place of the name, or {INTERFACE}",
        ) from problem
    refused = problem.errno == errno.ECONNREFUSED
    raise FaultError(
        "rendezvous",
        f"{what} is {host}:{port}, which cannot be reached in {patience_s:g} s ({reason(problem)})",
        "start the node that has this address: without it nobody meets"
        if refused
        else "an address in a network that all nodes are on, and a port that no firewall closes",
    ) from problem


def reason(error: OSError | UnicodeError) -> str:
    """In words of the system."""
    if isinstance(error, UnicodeError):
        return "no name of a machine"
    if isinstance(error, TimeoutError):
        return "no answer: a firewall, another network, or the machine is off"
    return error.strerror or str(error)


def owns(host: str, port: int) -> bool:
    """Whether this machine has that address, and nothing uses the port yet."""
    with contextlib.suppress(socket.gaierror, UnicodeError):
        for family, kind, _, _, place in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            with socket.socket(family, kind) as probe, contextlib.suppress(OSError):
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(place)
                probe.listen()
                return True
    return False


def check_pairs(exchange: Exchange, address: str | None) -> list[Finding]:
    """Have members connect to each other, at ports that the system chooses. A collective.

    Args:
        exchange: All members.
        address: Where this one listens; None: it takes no part.
    """
    with contextlib.ExitStack() as stack:
        place: tuple[str, int] | None = None
        if address is not None:
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            listener = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
            listener.bind((address, 0))
            listener.listen(exchange.size)
            place = listener.getsockname()[:2]
            answering = threading.Thread(
                target=_answer, args=(listener, exchange.index), daemon=True
            )
            answering.start()
            stack.callback(answering.join, CONNECT_S)
            stack.callback(_shut, listener)
        others = dict(enumerate(exchange.gather(place)))
        seekers = min(32, exchange.size)

        def seek(index: int) -> str:
            there = others[index]
            if place is None or there is None or index == exchange.index:
                return ""
            try:
                with socket.create_connection(there, timeout=CONNECT_S) as connection:
                    connection.settimeout(CONNECT_S)
                    found = connection.makefile().readline().strip()
                    return "" if found == str(index) else "something else answers there"
            except OSError as error:
                return reason(error)

        with ThreadPoolExecutor(seekers) as pool:
            problems = list(pool.map(seek, others))
        wrong = exchange.gather(any(problems))
    if not any(wrong):
        reached = [there[0] for there in others.values() if there is not None]
        shown = ", ".join(reached[:4]) + (", ..." if len(reached) > 4 else "")
        return [Finding("network", f"{len(reached)} nodes reach each other ({shown})")]
    return [
        fault(
            "network",
            f"cannot reach {exchange.names[index].partition(' rank ')[0]} at {others[index][0]}"
            f"{', its loopback' if _is_loopback(others[index][0]) else ''} ({problem})",
            f"{INTERFACE}; no firewall between the nodes, since ranks connect at ports that the "
            "system chooses",
        )
        for index, problem in enumerate(problems)
        if problem
    ]


def _shut(listener: socket.socket) -> None:
    with contextlib.suppress(OSError):  # not everywhere has a listener something to shut
        listener.shutdown(socket.SHUT_RDWR)  # wakes `accept`


def _answer(listener: socket.socket, index: int) -> None:
    """Say who is here to whoever asks, until the listener is shut down."""
    with contextlib.suppress(OSError):
        while True:
            connection, _ = listener.accept()
            with connection, contextlib.suppress(OSError):
                connection.sendall(f"{index}\n".encode())


def check_clocks(
    exchange: Exchange, takes_part: bool = True, clock: Callable[[], float] = time.time
) -> list[Finding]:
    """How far this member's clock is from the first one's, who takes part. A collective.

    The first answers each of the others in turn with its time. That time lies between a question
    and its answer, so the difference is known to half of that, of the quickest of five.
    """
    parts = exchange.gather(takes_part)
    off, within = 0.0, float("inf")
    for index in (index for index in range(1, exchange.size) if parts[index]):
        for turn in range(ROUNDS):
            key = f"clock {index} {turn}"
            if exchange.index == 0:
                exchange.ask(f"{key} asks")
                exchange.tell(key, clock())
            elif exchange.index == index:
                asked, began = clock(), time.monotonic()
                exchange.tell(f"{key} asks", True)
                answer = exchange.ask(key)
                took = time.monotonic() - began
                if took / 2 < within:
                    off, within = asked + took / 2 - answer, took / 2
    known = exchange.gather([off, within if within < float("inf") else 0.0])
    if sum(parts) < 2:
        return []
    if all(abs(there) - doubt <= BAD_CLOCK_S for there, doubt in known):
        most = max(abs(there) + doubt for there, doubt in known)
        return [Finding("clock", f"all clocks agree within {1e3 * most:.2g} ms")]
    if abs(off) - within <= BAD_CLOCK_S:
        return []
    kind = fault if abs(off) > WORST_CLOCK_S else warning
    return [
        kind(
            "clock",
            f"{abs(off):.1f} s {'ahead of' if off > 0 else 'behind'} the first clock",
            "NTP on every node (chrony, systemd-timesyncd): torchrun takes a node that is 15 s off "
            "for dead, and dates of files and logs mislead",
        )
    ]
