"""The preflight check of the nodes of a job, and of the processes of a launch.

Every member checks its own machine (machine.py). Through a store (exchange.py), members compare
versions and clocks, connect to each other (network.py) and use one folder (folder.py). The first
prints all findings (finding.py). Only then the group is opened, which may hang, to measure sums and
iterations (speed.py).
"""

import os
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from threading import Timer
from typing import NoReturn

import torch

from consensus.comm import GroupError, Launch, PeerLostError, choose_backend, open_group
from consensus.comm.rendezvous import first_line, in_time, open_store
from consensus.doctor import folder, machine, network, speed
from consensus.doctor.exchange import SILENT, Exchange, Nodes, RendezvousError
from consensus.doctor.finding import Finding, fault, faults, print_report, print_verdict, unexpected
from consensus.run.config import Config
from consensus.run.plan import Plan, choose_device

MEASURE_S = 300.0  # longest measurement: a collective that hangs may never return
HOPELESS = ("network", "rendezvous", "devices", "device", "group", "workers")
"""Topics whose faults keep a group from opening."""
LOST = (TimeoutError, ConnectionError)


def here() -> str:
    """Name of this member in a report."""
    rank = os.environ.get("RANK")
    return socket.gethostname() + (f" rank {rank}" if rank is not None else "")


def examine(config: Config, job: Nodes | Launch) -> int:
    """Check nodes before torchrun starts, or the processes of a launch. Returns the exit code.

    Every member calls it. The first prints the report; if the others are lost, each node its own.
    """
    findings: list[Finding] = []
    plan = address = None
    if isinstance(job, Launch):
        plan, findings = machine.check_machine(config, job)
    if isinstance(job, Nodes) or job.size > 1:
        address, seen = network.check_interface()
        findings += seen
    if isinstance(job, Launch) and (job.local_rank > 0 or job.size == job.local_size):
        address = None  # the first rank of a node connects to other nodes
    try:
        if isinstance(job, Nodes):
            exchange = meet_nodes(config, job, address)
        else:
            exchange = meet_ranks(config, job)
        # Members may start minutes apart, but once they have met they answer soon.
        exchange.timeout_s = max(20.0, min(60.0, config.group.timeout_s))
        if isinstance(job, Launch):
            exchange.names = exchange.gather(here())
        if exchange.size > 1:
            found = exchange.gather(machine.versions())
            findings += machine.compare_versions(found, exchange.index)
        if any(exchange.gather(address is not None)):
            findings += network.check_clocks(exchange, exchange.index == 0 or address is not None)
            findings += network.check_pairs(exchange, address)
        findings += folder.check_folder(exchange, Path(config.output.run_dir or config.output.root))
        told = conclude(exchange, findings)
        if isinstance(job, Launch):
            hopeless = any(finding.topic in HOPELESS for finding in faults(told))
            told += conclude(exchange, [] if hopeless else measure(config, job, plan, exchange))
        if exchange.index == 0:
            print_verdict(told)
        exchange.close()
        return int(bool(faults(told)))
    except RendezvousError as error:
        findings.append(error.finding)
    except LOST as error:
        remedy = "the messages of the lost member, above or in its own log"
        findings.append(fault("network", str(error), remedy))
    if isinstance(job, Nodes) or job.local_rank == 0:
        print_report([here()], [faults(findings)])
    return 1


def meet_nodes(config: Config, nodes: Nodes, address: str | None) -> Exchange:
    """Rendezvous of all nodes, at a store that one of them hosts. RendezvousError if it fails."""
    host, port, timeout_s = nodes.host, nodes.port, config.group.timeout_s
    place, name = f"{host}:{port}", f"{here()} ({address or 'no address'})"
    keep = network.own_address(host, port) is not None
    if keep:
        print(f"consensus.doctor: {nodes.size} nodes meet at {place}", flush=True)
    else:
        network.reach(host, port, timeout_s, "the rendezvous")
    try:
        exchange = Exchange.of_nodes(host, port, nodes.name, nodes.size, timeout_s, keep)
    except ConnectionError as error:
        text = f"{place} answers, but not as the store of this job ({error})"
        remedy = "another port in RENDEZVOUS, if another program uses this one"
        raise RendezvousError(text, f"{remedy}; and one RUN_ID on all nodes") from error
    try:
        exchange.names = exchange.gather(name)
        return exchange
    except LOST as error:
        came = exchange.received() or [name]
        text = f"{len(came)} of {nodes.size} nodes came to {place} within {timeout_s:g} s"
        remedy = "the same command on every node, with the same NNODES, RENDEZVOUS and RUN_ID"
        raise RendezvousError(f"{text}: {', '.join(came)}", remedy) from error


def meet_ranks(config: Config, launch: Launch) -> Exchange:
    """Rendezvous of all ranks, at the store of the launch. RendezvousError if it fails."""
    rank, size, timeout_s = launch.rank, launch.size, config.group.timeout_s
    if size == 1:
        return Exchange.alone()
    host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    if not port.isdecimal():
        raise RendezvousError(f"MASTER_PORT is {port}", "a port, as torchrun sets it")
    if rank > 0:  # rank 0 may have to open it first
        network.reach(host, int(port), timeout_s, "MASTER_ADDR:MASTER_PORT")
    try:  # twice the timeout: for the connection, and for all ranks to come
        store = in_time(lambda: open_store(rank, size, timeout_s), 2 * timeout_s, SILENT)
    except (RuntimeError, *LOST) as error:
        text = f"the ranks do not meet at {host}:{port} ({first_line(error)})"
        remedy = "the same command on every node; MODULE=consensus.doctor launch/node.sh says"
        raise RendezvousError(text, f"{remedy} which node is not reached") from error
    return Exchange(store, rank, size, timeout_s, keeps=rank == 0)


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
