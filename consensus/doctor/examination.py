"""The preflight check of the nodes of a job, and of the processes of a launch.

Data flow: every member checks its own machine (machine.py). Through a store (exchange.py), before a
group exists, members compare versions and clocks, connect to each other (network.py) and use one
folder (folder.py). One member collects the findings and prints them (finding.py). Only then the
group is opened, which may hang, and sums and iterations are measured (speed.py).
"""

import os
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from threading import Timer
from typing import NoReturn

import torch

from consensus.comm import (
    GroupError,
    Launch,
    LaunchError,
    PeerLostError,
    choose_backend,
    open_group,
)
from consensus.comm.rendezvous import first_line, in_time, open_store
from consensus.doctor import folder, machine, network, speed
from consensus.doctor.exchange import SILENT, Exchange
from consensus.doctor.finding import (
    FaultError,
    Finding,
    count,
    fault,
    faults,
    print_report,
    print_verdict,
    unexpected,
)
from consensus.run.config import Config
from consensus.run.plan import Plan, choose_device

SHORTEST_S, LONGEST_S = 20.0, 60.0
MEASURE_S = 300.0  # longest measurement: a collective that hangs may never return
HOPELESS = ("network", "rendezvous", "devices", "device", "group", "workers")
"""Topics whose faults keep a group from opening."""
LOST = (TimeoutError, ConnectionError)


def here() -> str:
    """Name of this member in a report."""
    rank = os.environ.get("RANK")
    return socket.gethostname() + (f" rank {rank}" if rank is not None else "")


def patience(config: Config) -> float:
    """Longest wait for a member, in seconds: `group.timeout_s` within bounds.

    At the rendezvous it is `group.timeout_s`, since nodes and pods may start minutes apart.
    """
    return max(SHORTEST_S, min(LONGEST_S, config.group.timeout_s))


@dataclass(frozen=True)
class Nodes:
    """Nodes of a job, as launch/node.sh describes them: how many, and where they meet."""

    size: int
    host: str
    port: int
    name: str  # of this start

    @classmethod
    def from_environment(cls) -> "Nodes | None":
        """Read NNODES, RENDEZVOUS and RUN_ID if CONSENSUS_DOCTOR is `nodes`; else None."""
        if os.environ.get("CONSENSUS_DOCTOR") != "nodes":
            return None
        size = os.environ.get("NNODES", "1")
        if not size.isdecimal() or int(size) < 1:
            raise LaunchError(f"`NNODES` is {size}; allowed: a whole number from 1")
        place = os.environ.get("RENDEZVOUS", "")
        host, _, port = place.rpartition(":")
        if not host or not port.isdecimal() or int(port) > 65535:
            raise LaunchError(f"`RENDEZVOUS` is {place}; allowed: host:port where the nodes meet")
        return cls(int(size), host.strip("[]"), int(port), os.environ.get("RUN_ID", "consensus"))


def examine_nodes(config: Config, nodes: Nodes) -> int:
    """Check the connections between nodes, before torchrun starts. Returns the exit code.

    Every node calls it. The node that hosts the store prints the report.
    """
    address, findings = network.check_interface()
    keep = network.own_address(nodes.host, nodes.port) is not None
    if keep:
        print(f"consensus.doctor: {nodes.size} nodes meet at {nodes.host}:{nodes.port}", flush=True)
    name = f"{here()} ({address or 'no address'})"
    return examine(config, partial(meet_nodes, config, nodes, name, keep), findings, address)


def meet_nodes(config: Config, nodes: Nodes, name: str, keep: bool) -> Exchange:
    """Rendezvous of all nodes, at a store that one of them hosts. FaultError if it fails."""
    place, timeout_s = f"{nodes.host}:{nodes.port}", config.group.timeout_s
    if not keep:
        network.reach(nodes.host, nodes.port, timeout_s, "the rendezvous")
    try:
        exchange = Exchange.of_nodes(
            nodes.host, nodes.port, nodes.name, nodes.size, timeout_s, keep
        )
    except ConnectionError as error:
        text = f"{place} answers, but not as the store of this job ({error})"
        remedy = "another port in RENDEZVOUS, if another program uses this one"
        raise FaultError("rendezvous", text, f"{remedy}; and one RUN_ID on all nodes") from error
    try:
        exchange.names = exchange.gather(name)
    except LOST as error:
        came = exchange.received() or [name]
        text = f"{len(came)} of {nodes.size} nodes came to {place} within {timeout_s:g} s"
        remedy = "the same command on every node, with the same NNODES, RENDEZVOUS and RUN_ID"
        raise FaultError("rendezvous", f"{text}: {', '.join(came)}", remedy) from error
    exchange.timeout_s = patience(config)
    return exchange


def examine_ranks(config: Config, launch: Launch) -> int:
    """Check every process and what is between them. Returns the exit code.

    Every rank calls it. Rank 0 prints the report.
    """
    if launch.rank == 0:
        print(f"consensus.doctor: {count(launch.size, 'process')}", flush=True)
    plan, findings = machine.check_machine(config, launch)
    address = None
    if launch.size > 1:
        own, seen = network.check_interface()
        findings += seen
        if launch.size > launch.local_size and launch.local_rank == 0:
            address = own
    meet, then = partial(meet_ranks, config, launch), partial(measure, config, launch, plan)
    return examine(config, meet, findings, address, alone=launch.local_rank == 0, then=then)


def meet_ranks(config: Config, launch: Launch) -> Exchange:
    """Rendezvous of all ranks, at the store of the launch. FaultError if it fails."""
    exchange, rank, timeout_s = Exchange.alone(), launch.rank, config.group.timeout_s
    if launch.size > 1:
        host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
        if not port.isdecimal():
            raise FaultError("rendezvous", f"MASTER_PORT is {port}", "a port, as torchrun sets it")
        if rank > 0:  # rank 0 may have to open it first
            network.reach(host, int(port), timeout_s, "MASTER_ADDR:MASTER_PORT")
        try:  # twice the timeout: for the connection, and for all ranks to come
            connect = partial(open_store, rank, launch.size, timeout_s)
            store = in_time(connect, 2 * timeout_s, SILENT)
        except (RuntimeError, *LOST) as error:
            text = f"the ranks do not meet at {host}:{port} ({first_line(error)})"
            remedy = "the same command on every node; MODULE=consensus.doctor launch/node.sh says"
            remedy = f"{remedy} which node is not reached"
            raise FaultError("rendezvous", text, remedy) from error
        exchange = Exchange(store, rank, launch.size, patience(config), keeps=rank == 0)
    exchange.names = exchange.gather(here())
    return exchange


def examine(
    config: Config,
    meet: Callable[[], Exchange],
    findings: list[Finding],
    address: str | None,
    *,
    alone: bool = True,
    then: Callable[[Exchange], list[Finding]] | None = None,
) -> int:
    """Meet, compare, report; measure and report again. A collective. Returns the exit code.

    `findings` are those of this member so far. Members that have an `address` connect to each
    other. If the others are lost, a member prints its own faults where it is `alone`. `then` are
    checks in a process group.
    """
    try:
        exchange = meet()
        if exchange.size > 1:
            found = exchange.gather(machine.versions())
            findings += machine.compare_versions(found, exchange.index)
        if any(exchange.gather(address is not None)):
            findings += network.check_clocks(exchange, exchange.index == 0 or address is not None)
            findings += network.check_pairs(exchange, address)
        output = Path(config.output.run_dir or config.output.root)
        findings += folder.check_folder(exchange, output)
        told = conclude(exchange, findings)
        if then is not None:
            hopeless = any(finding.topic in HOPELESS for finding in faults(told))
            told += conclude(exchange, [] if hopeless else then(exchange))
        if exchange.index == 0:
            print_verdict(told)
        exchange.close()
        return int(bool(faults(told)))
    except FaultError as error:
        findings.append(error.finding)
    except LOST as error:
        remedy = "the messages of the lost member, above or in its own log"
        findings.append(fault("network", str(error), remedy))
    if alone:
        print_report([here()], [faults(findings)])
    return 1


def conclude(exchange: Exchange, findings: Sequence[Finding]) -> list[Finding]:
    """Collect the findings of all members; the first prints them. A collective."""
    told = exchange.gather([asdict(finding) for finding in findings])
    found = [[Finding(**value) for value in values] for values in told]
    if exchange.index == 0:
        print_report(exchange.names, found)
    exchange.gather("read")  # a member that exits with a failure ends the others
    return [finding for findings in found for finding in findings]


def measure(config: Config, launch: Launch, plan: Plan | None, exchange: Exchange) -> list[Finding]:
    """Open the group and measure it. A collective.

    If a rank has no plan, no rank sums vectors of its model: all have to form the same sums.
    """
    device = choose_device(config, launch) if plan is None else plan.device
    backend = choose_backend(config.group.name, device, launch)
    told = exchange.gather([backend, None if plan is None else plan.risk.layout.size])
    if any(other != backend for other, _ in told):
        remedy = "the same devices on every node, or group=gloo"
        return [fault("devices", f"would use {backend}, other ranks another backend", remedy)]
    sizes = {size for _, size in told}
    own = sizes.pop() if len(sizes) == 1 else None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    late = Timer(MEASURE_S, give_up, [backend])
    late.daemon = True
    late.start()
    shared_memory, compress = config.group.shared_memory, config.group.compress
    findings: list[Finding] = []
    try:
        group = open_group(launch, backend, device, exchange.timeout_s, shared_memory, compress)
        with group.publish_failure():
            sum_s = 0.0
            if launch.size > 1:
                findings, sum_s = speed.check_sums(group, own, config, backend)
            if plan is not None and own is not None and not faults(findings):
                findings += speed.check_iterations(group, plan, sum_s)
        group.close()
    except PeerLostError as error:
        text = f"{backend} does not work between the ranks: {error}"
        remedy = f"{network.INTERFACE}; no firewall between the nodes"
        findings.append(fault("sums", text, remedy))
    except GroupError as error:
        findings.append(fault("sums", str(error), ""))
    except Exception as error:
        findings.append(unexpected("sums", error))
    late.cancel()
    return findings


def give_up(backend: str) -> None:
    """End this process, whose measurement hangs."""
    remedy = "NCCL_DEBUG=INFO shows where" if backend == "nccl" else network.INTERFACE
    text = f"measuring over {backend} has not ended within {MEASURE_S:g} s"
    print_report([here()], [[fault("sums", text, remedy)]])
    end(1)


def end(code: int) -> NoReturn:
    """End this process at once: the teardown of a group waits for peers that may hang."""
    with suppress(OSError):
        sys.stdout.flush()
    os._exit(code)
