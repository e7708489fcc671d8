"""Entry that looks before a run leaps: is everything there that it needs?

python -m consensus.doctor KEY=VALUE ...               this machine
torchrun ... -m consensus.doctor KEY=VALUE ...         the processes of a launch
MODULE=consensus.doctor launch/node.sh KEY=VALUE ...   the nodes of a job, then their processes

It takes the overrides of the run, and leaves nothing behind.

Data flow: every member looks at its own machine (machine.py). Through a store, which needs no
group, they compare versions and clocks, connect to each other (network.py) and look at one folder
(folder.py). Then the group opens, and sums and iterations are measured (speed.py). What each has
found goes to the first through the store, which prints it (finding.py).

Exit codes: 0 no fault; 1 a fault; 2 the config was refused.
"""

import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from hydra import compose, initialize_config_dir

from consensus.comm import GroupError, Launch, LaunchError, choose_backend, open_group
from consensus.doctor import folder, machine, network, speed
from consensus.doctor.finding import FaultError, Finding, Level, fault, print_report, worst
from consensus.meeting import Exchange
from consensus.run.compose import REFUSALS, config_dir, explain, register_schema, to_config
from consensus.run.config import Config
from consensus.run.plan import Plan, choose_device, set_determinism

PATIENCE_S = 60.0
"""At most, and less with a shorter `group.timeout_s`: who asks a doctor waits for the answer."""


def main() -> None:
    """Entry of the command line."""
    os.environ["HYDRA_FULL_ERROR"] = "1"
    if "--help" in sys.argv or "-h" in sys.argv:
        print(__doc__)
        return
    register_schema()
    try:
        with initialize_config_dir(config_dir(), version_base="1.3", job_name="doctor"):
            config = to_config(compose("train", overrides=sys.argv[1:]))
        launch, nodes = Launch.from_environment(), Nodes.from_environment()
    except (*REFUSALS, LaunchError) as error:
        print(f"consensus.doctor: {explain(error)}", file=sys.stderr)
        sys.exit(2)
    patience_s = min(PATIENCE_S, config.group.timeout_s)
    if nodes is not None and "WORLD_SIZE" not in os.environ:
        end(examine_nodes(config, nodes, patience_s))
    end(examine_ranks(config, launch, patience_s))


# ---- the nodes, before there is a process of the run


@dataclass(frozen=True)
class Nodes:
    """What launch/node.sh says of the nodes of a job.

    Attributes:
        size: How many.
        host: Where they meet.
        port: Where they meet.
        name: Of this start.
    """

    size: int
    host: str
    port: int
    name: str

    @classmethod
    def from_environment(cls) -> "Nodes | None":
        """Read NNODES, RENDEZVOUS and RUN_ID; None if there is one node.

        Raises:
            LaunchError: If they describe none.
        """
        size = os.environ.get("NNODES", "1")
        if not size.isdecimal() or int(size) < 1:
            raise LaunchError(f"`NNODES` is {size}; allowed: a whole number from 1")
        if int(size) == 1:
            return None
        place = os.environ.get("RENDEZVOUS", "")
        host, _, port = place.rpartition(":")
        if not host or not port.isdecimal() or int(port) > 65535:
            raise LaunchError(f"`RENDEZVOUS` is {place}; allowed: host:port where the nodes meet")
        return cls(int(size), host.strip("[]"), int(port), os.environ.get("RUN_ID", "consensus"))

    @property
    def place(self) -> str:
        """Where they meet."""
        return f"{self.host}:{self.port}"


def examine_nodes(config: Config, nodes: Nodes, patience_s: float) -> int:
    """The ways between the nodes, where torchrun would only wait. Returns the exit code.

    Every node calls it. The report comes from the one that keeps the store.
    """
    address, findings = network.check_interface()
    here = f"{socket.gethostname()} ({address or 'no address'})"
    try:
        keep = network.owns(nodes.host, nodes.port)
        if keep:
            print(f"consensus.doctor: {nodes.size} nodes meet at {nodes.place}", flush=True)
        exchange = meet_nodes(nodes, patience_s, keep=keep)
        places = exchange.gather(here)
        findings += compare(exchange, config, places, address)
        return conclude(exchange, places, findings, speak=keep)
    except FaultError as error:
        findings.append(error.finding)
    except TimeoutError as error:
        findings.append(lost(error))
    print_report([here], [findings])
    return 1


def meet_nodes(nodes: Nodes, patience_s: float, *, keep: bool) -> Exchange:
    """All nodes, through a store that one of them keeps.

    Raises:
        FaultError: If they do not meet.
    """
    if not keep:
        network.reach(nodes.host, nodes.port, patience_s, "the rendezvous")
    try:
        exchange = Exchange.of_nodes(
            nodes.host, nodes.port, nodes.name, nodes.size, patience_s, keep=keep
        )
    except ConnectionError as error:
        raise FaultError(
            "rendezvous",
            f"{nodes.place} answers, but not as the store of this job ({error})",
            "another port in RENDEZVOUS: this one is used by another program or job",
        ) from error
    try:
        exchange.gather("here")
    except TimeoutError as error:
        raise FaultError(
            "rendezvous",
            f"{exchange.came} of {nodes.size} nodes came to {nodes.place} within {patience_s:g} s",
            "the same command on every node, with the same NNODES, RENDEZVOUS and RUN_ID",
        ) from error
    return exchange


# ---- the processes of a launch


def examine_ranks(config: Config, launch: Launch, patience_s: float) -> int:
    """Every process, and what is between them. Returns the exit code.

    Every rank calls it. The report comes from rank 0.
    """
    set_determinism(config)
    findings = [
        *machine.check_software(),
        *machine.check_cores(launch),
        *machine.check_devices(config, launch),
        *machine.check_files(launch),
    ]
    plan, seen = machine.check_plan(config, launch)
    findings += seen
    if plan is not None:
        findings += machine.check_memory(plan)
    findings += machine.check_disk(config, plan)
    nodes = launch.size // launch.local_size
    address, seen = network.check_interface()
    findings += seen
    here = f"rank {launch.rank} on {socket.gethostname()}"
    if launch.rank == 0:
        many = f"{launch.size} process{'es' if launch.size > 1 else ''}"
        print(f"consensus.doctor: {many} on {nodes} node{'s' if nodes > 1 else ''}", flush=True)
    try:
        exchange = meet_ranks(launch, patience_s)
        places = exchange.gather(here)
        one_of_node = address if nodes > 1 and launch.local_rank == 0 else None
        findings += compare(exchange, config, places, one_of_node)
        findings += measure(exchange, config, plan, launch, patience_s, findings)
        return conclude(exchange, places, findings, speak=launch.rank == 0)
    except FaultError as error:
        findings.append(error.finding)
    except TimeoutError as error:
        findings.append(lost(error))
    print_report([here], [findings])
    return 1


def meet_ranks(launch: Launch, patience_s: float) -> Exchange:
    """All ranks, through the store of the launch.

    Raises:
        FaultError: If they do not meet.
    """
    if launch.size == 1:
        return Exchange.alone()
    host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    if not port.isdecimal():
        raise FaultError("rendezvous", f"MASTER_PORT is {port}", "a port, as torchrun sets it")
    if launch.rank > 0:  # rank 0 may have to open it first
        network.reach(host, int(port), patience_s, "MASTER_ADDR:MASTER_PORT")
    try:
        return Exchange.of_ranks(launch.rank, launch.size, patience_s)
    except (ConnectionError, TimeoutError) as error:
        raise FaultError(
            "rendezvous",
            f"the ranks do not meet at {host}:{port} ({error})",
            "the same command on every node; MODULE=consensus.doctor launch/node.sh says which "
            "node is not reached",
        ) from error


def measure(
    exchange: Exchange,
    config: Config,
    plan: Plan | None,
    launch: Launch,
    patience_s: float,
    so_far: Sequence[Finding],
) -> list[Finding]:
    """Open the group and time it, if there is any hope that it opens. A collective."""
    hopeless = worst(f for f in so_far if f.topic in ("network", "devices")) == Level.FAULT
    device = torch.device("cpu")
    if plan is not None:
        device = plan.device
    elif not hopeless:
        device = choose_device(config, launch)
    backend = choose_backend(config.group.name, device, launch)
    others = exchange.gather([hopeless, backend, plan is not None])
    if any(there for there, _, _ in others):
        return []
    if len({name for _, name, _ in others}) > 1:
        text = f"would talk over {backend}, others over another"
        return [fault("devices", text, "the same devices on every node, or group=gloo")]
    if device.type == "cuda":
        torch.cuda.set_device(device)
    options = config.group
    try:
        group = open_group(
            launch, backend, device, patience_s, options.shared_memory, options.compress
        )
        dtype = getattr(torch, config.dtype)
        findings = speed.check_sums(group, plan, dtype) if launch.size > 1 else []
        if plan is not None and all(planned for _, _, planned in others):
            findings += speed.check_iterations(group, plan)
        group.close()
    except GroupError as error:
        return [
            fault(
                "network",
                f"{backend} does not work between the ranks: {error}",
                f"{network.INTERFACE}; no firewall between the nodes",
            )
        ]
    return findings


# ---- both


def compare(
    exchange: Exchange, config: Config, places: Sequence[str], address: str | None
) -> list[Finding]:
    """What there is between the members that needs no group. A collective.

    Args:
        exchange: All members.
        config: Says where the run will write.
        places: Names of all members.
        address: Where this one shows itself to others; None: not to be tried.
    """
    findings: list[Finding] = []
    if exchange.size > 1:
        findings += machine.compare_versions(exchange.gather(machine.versions()), exchange.index)
    if any(exchange.gather(address is not None)):
        findings += network.check_clocks(exchange)
        findings += network.check_pairs(exchange, address, places)
    files = Path(config.output.run_dir or config.output.root)
    return findings + folder.check_folder(exchange, files)


def conclude(
    exchange: Exchange, places: Sequence[str], findings: Sequence[Finding], *, speak: bool
) -> int:
    """Bring together what all have found; one says it. A collective. Returns the exit code."""
    told = exchange.gather([finding.to_json() for finding in findings])
    found = [[Finding.from_json(value) for value in values] for values in told]
    if speak:
        print_report(places, found)
    exchange.gather("read")  # who leaves with a failure has the others ended
    exchange.close()
    return int(worst(finding for findings in found for finding in findings) == Level.FAULT)


def lost(error: TimeoutError) -> Finding:
    """A member that went away in between."""
    return fault("network", str(error), "what it says itself, above or in its own log")


def end(code: int) -> NoReturn:
    """End this process at once: the teardown of a group waits for peers that may be stuck."""
    sys.stdout.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
