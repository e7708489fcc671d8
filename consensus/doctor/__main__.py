"""Entry that looks before a run leaps: is everything there that it needs?

python -m consensus.doctor KEY=VALUE ...               this machine
torchrun ... -m consensus.doctor KEY=VALUE ...         the processes of a launch
MODULE=consensus.doctor launch/node.sh KEY=VALUE ...   the nodes of a job, then their processes

It takes the overrides of the run, and leaves nothing behind.

Data flow: every member looks at its own machine (machine.py). Through a store, which needs no
group, they compare versions and clocks, connect to each other (network.py) and look at one folder
(folder.py). What each has found goes to the first through the store, which prints it (finding.py).
Only then, since it may hang or be killed, the group opens, and sums and iterations are measured
(speed.py).

Exit codes: 0 no fault; 1 a fault; 2 the config was refused.
"""

import io
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch
from hydra import compose, initialize_config_dir

from consensus.comm import (
    GroupError,
    Launch,
    LaunchError,
    PeerLostError,
    choose_backend,
    open_group,
)
from consensus.comm.rendezvous import Exchange
from consensus.doctor import folder, machine, network, speed
from consensus.doctor.finding import (
    FaultError,
    Finding,
    Level,
    fault,
    looked,
    print_report,
    print_verdict,
    unexpected,
    worst,
)
from consensus.run.compose import REFUSALS, config_dir, explain, register_schema, to_config
from consensus.run.config import Config, ConfigError
from consensus.run.plan import Plan, choose_device, set_determinism

SHORTEST_S, LONGEST_S = 20.0, 60.0
"""How long members wait for each other once they have met: `group.timeout_s` within these bounds.

They meet within `group.timeout_s` itself, since nodes and pods may start minutes apart.
"""
MEASURE_S = 300.0
"""After which measuring is given up: what hangs there may never come back."""

HOPELESS = ("network", "rendezvous", "devices", "device", "group", "workers")
"""What a fault is about that keeps a group from opening."""

LOST = (TimeoutError, ConnectionError)


def main() -> None:
    """Entry of the command line."""
    os.environ["HYDRA_FULL_ERROR"] = "1"
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    if "--help" in sys.argv or "-h" in sys.argv:
        print(__doc__)
        return
    try:
        config, launch, nodes = read(sys.argv[1:])
    except (*REFUSALS, LaunchError) as error:
        print(f"consensus.doctor: {explain(error)}", file=sys.stderr)
        sys.exit(2)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that folders are cleared away
    code = 1
    try:
        code = examine_ranks(config, launch) if nodes is None else examine_nodes(config, nodes)
    except KeyboardInterrupt:
        code = 130
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BrokenPipeError:  # whoever reads the report has read enough
        pass
    except Exception as error:
        print_report([here()], [[unexpected("doctor", error)]])
    end(code)


def read(arguments: Sequence[str]) -> "tuple[Config, Launch, Nodes | None]":
    """The run, its processes, and its nodes if they are what is to be examined.

    Raises:
        ConfigError, HydraException, OmegaConfBaseException, LaunchError: If they make no sense.
    """
    for text in arguments:
        if text.startswith("-"):
            raise ConfigError(f"`{text}` is no KEY=VALUE, and the doctor takes nothing else")
    register_schema()
    with initialize_config_dir(config_dir(), version_base="1.3", job_name="doctor"):
        config = to_config(compose("train", overrides=list(arguments)))
    return config, Launch.from_environment(), Nodes.from_environment()


def here() -> str:
    """This place in a report."""
    rank = os.environ.get("RANK")
    return socket.gethostname() + (f" rank {rank}" if rank is not None else "")


def patience(config: Config) -> float:
    """How long members that have met wait for each other."""
    return max(SHORTEST_S, min(LONGEST_S, config.group.timeout_s))


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
        """Read NNODES, RENDEZVOUS and RUN_ID if CONSENSUS_DOCTOR is `nodes`; else None.

        Raises:
            LaunchError: If they describe none.
        """
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

    @property
    def place(self) -> str:
        """Where they meet."""
        return f"{self.host}:{self.port}"


def examine_nodes(config: Config, nodes: Nodes) -> int:
    """The ways between the nodes, where torchrun would only wait. Returns the exit code.

    Every node calls it. The report comes from the one that keeps the store.
    """
    address, findings = network.check_interface()
    name = f"{here()} ({address or 'no address'})"
    keep = network.owns(nodes.host, nodes.port)
    if keep:
        say(f"{nodes.size} nodes meet at {nodes.place}")
    meet = partial(meet_nodes, nodes, name, config.group.timeout_s, patience(config), keep=keep)
    return examine(config, meet, findings, address, speak=keep)


def meet_nodes(
    nodes: Nodes, name: str, meeting_s: float, patience_s: float, *, keep: bool
) -> Exchange:
    """All nodes, through a store that one of them keeps.

    Args:
        nodes: They.
        name: Of this one.
        meeting_s: How long they wait for the last one.
        patience_s: How long they wait for each other later.
        keep: Whether this one keeps the store.

    Raises:
        FaultError: If they do not meet.
    """
    if not keep:
        network.reach(nodes.host, nodes.port, meeting_s, "the rendezvous")
    try:
        exchange = Exchange.of_nodes(
            nodes.host, nodes.port, nodes.name, nodes.size, meeting_s, keep=keep
        )
    except ConnectionError as error:
        raise FaultError(
            "rendezvous",
            f"{nodes.place} answers, but not as the store of this job ({error})",
            "another port in RENDEZVOUS, if another job or program uses this one; and one RUN_ID "
            "on all nodes",
        ) from error
    try:
        exchange.introduce(name)
    except LOST as error:
        came = exchange.heard() or [name]
        raise FaultError(
            "rendezvous",
            f"{len(came)} of {nodes.size} nodes came to {nodes.place} within {meeting_s:g} s: "
            f"{', '.join(came)}",
            "the same command on every node, with the same NNODES, RENDEZVOUS and RUN_ID",
        ) from error
    exchange.timeout_s = patience_s
    return exchange


# ---- the processes of a launch


def examine_ranks(config: Config, launch: Launch) -> int:
    """Every process, and what is between them. Returns the exit code.

    Every rank calls it. The report comes from rank 0.
    """
    speak = launch.rank == 0
    if speak:
        say(f"{launch.size} process{'es' if launch.size > 1 else ''}")
    plan, findings = look_alone(config, launch)
    address = None
    if launch.size > launch.local_size and launch.local_rank == 0:
        address, seen = network.check_interface()
        findings += seen
    elif launch.size > 1:
        findings += network.check_interface()[1]
    return examine(
        config,
        partial(meet_ranks, launch, config.group.timeout_s, patience(config)),
        findings,
        address,
        speak=speak,
        alone=launch.local_rank == 0,
        then=lambda exchange: measure(exchange, config, plan, launch),
    )


def look_alone(config: Config, launch: Launch) -> tuple[Plan | None, list[Finding]]:
    """What this process sees of its machine by itself; of the machine as such, one process."""
    set_determinism(config)
    checks: list[tuple[str, Callable[[], Iterable[Finding]]]] = [
        ("versions", machine.check_software),
        ("devices", partial(machine.check_devices, config, launch)),
    ]
    if launch.local_rank == 0:
        checks += [
            ("cores", partial(machine.check_cores, launch)),
            ("limits", partial(machine.check_files, launch)),
        ]
    if launch.rank == 0:
        checks += [("disk", partial(machine.check_in_use, config))]
    findings = [finding for topic, check in checks for finding in looked(topic, check)]
    plan: Plan | None = None

    def plan_it() -> list[Finding]:
        nonlocal plan
        plan, seen = machine.check_plan(config, launch)
        return seen

    findings += looked("config", plan_it)
    if launch.local_rank == 0:
        if plan is not None:
            findings += looked("memory", partial(machine.check_memory, plan))
        findings += looked("disk", partial(machine.check_disk, config, plan))
    return plan, findings


def meet_ranks(launch: Launch, meeting_s: float, patience_s: float) -> Exchange:
    """All ranks, through the store of the launch.

    Args:
        launch: They.
        meeting_s: How long they wait for the last one.
        patience_s: How long they wait for each other later.

    Raises:
        FaultError: If they do not meet.
    """
    if launch.size == 1:
        exchange = Exchange.alone()
        exchange.introduce(here())
        return exchange
    host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    if not port.isdecimal():
        raise FaultError("rendezvous", f"MASTER_PORT is {port}", "a port, as torchrun sets it")
    if launch.rank > 0:  # rank 0 may have to open it first
        network.reach(host, int(port), meeting_s, "MASTER_ADDR:MASTER_PORT")
    try:
        exchange = Exchange.of_ranks(launch.rank, launch.size, meeting_s)
    except LOST as error:
        raise FaultError(
            "rendezvous",
            f"the ranks do not meet at {host}:{port} ({error})",
            "the same command on every node; MODULE=consensus.doctor launch/node.sh says which "
            "node is not reached",
        ) from error
    exchange.timeout_s = patience_s
    exchange.introduce(here())
    return exchange


def measure(exchange: Exchange, config: Config, plan: Plan | None, launch: Launch) -> list[Finding]:
    """Open the group and time it. A collective.

    Where one rank has no plan, none uses its own: all have to form the same sums.
    """
    device = choose_device(config, launch) if plan is None else plan.device
    backend = choose_backend(config.group.name, device, launch)
    told = exchange.gather([backend, None if plan is None else plan.risk.layout.size])
    if any(other != backend for other, _ in told):
        return [
            fault(
                "devices",
                f"would talk over {backend}, others over another",
                "the same devices on every node, or group=gloo",
            )
        ]
    sizes = {size for _, size in told}
    own = sizes.pop() if len(sizes) == 1 else None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    late = threading.Timer(MEASURE_S, give_up, [backend])
    late.daemon = True
    late.start()
    options = config.group
    findings: list[Finding] = []
    try:
        group = open_group(
            launch,
            backend,
            device,
            patience(config),
            options.shared_memory,
            options.compress,
        )
        with group.telling():
            sum_s = 0.0
            if launch.size > 1:
                dtype = getattr(torch, config.dtype)
                findings, sum_s = speed.check_sums(group, own, dtype, options.compress, backend)
            if plan is not None and own is not None and worst(findings) < Level.FAULT:
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
    """End this process: what it waits for does not come back."""
    remedy = "NCCL_DEBUG=INFO shows where" if backend == "nccl" else network.INTERFACE
    text = f"measuring over {backend} has not ended within {MEASURE_S:g} s"
    print_report([here()], [[fault("sums", text, remedy)]])
    end(1)


# ---- both


def examine(
    config: Config,
    meet: Callable[[], Exchange],
    findings: list[Finding],
    address: str | None,
    *,
    speak: bool,
    alone: bool = True,
    then: Callable[[Exchange], list[Finding]] | None = None,
) -> int:
    """Meet, compare, report; measure and report again. A collective. Returns the exit code.

    Args:
        config: The run.
        meet: Brings all members together.
        findings: What this one has found by itself.
        address: Where it shows itself to others; None: not to be tried.
        speak: Whether it prints the report of all.
        alone: Whether it prints its own faults if the others are lost.
        then: Looks further where no fault forbids it.
    """
    try:
        exchange = meet()
        findings += compare(exchange, config, address)
        told = conclude(exchange, findings, speak=speak)
        if then is not None:
            hopeless = any(f.level == Level.FAULT and f.topic in HOPELESS for f in told)
            told += conclude(exchange, [] if hopeless else then(exchange), speak=speak)
        if speak:
            print_verdict(told)
        exchange.close()
        return int(worst(told) == Level.FAULT)
    except FaultError as error:
        findings.append(error.finding)
    except LOST as error:
        findings.append(lost(error))
    if alone:
        print_report([here()], [[finding for finding in findings if finding.level == Level.FAULT]])
    return 1


def compare(exchange: Exchange, config: Config, address: str | None) -> list[Finding]:
    """What there is between the members that needs no group. A collective.

    Args:
        exchange: All members.
        config: Says where the run will write.
        address: Where this one shows itself to others; None: not to be tried.
    """
    findings: list[Finding] = []
    if exchange.size > 1:
        findings += machine.compare_versions(exchange.gather(machine.versions()), exchange.index)
    if any(exchange.gather(address is not None)):
        findings += network.check_clocks(exchange, exchange.index == 0 or address is not None)
        findings += network.check_pairs(exchange, address)
    files = Path(config.output.run_dir or config.output.root)
    return findings + folder.check_folder(exchange, files)


def conclude(exchange: Exchange, findings: Sequence[Finding], *, speak: bool) -> list[Finding]:
    """Bring together what all have found; one says it. A collective."""
    told = exchange.gather([finding.to_json() for finding in findings])
    found = [[Finding.from_json(value) for value in values] for values in told]
    if speak:
        print_report(exchange.names, found)
    exchange.gather("read")  # who leaves with a failure has the others ended
    return [finding for findings in found for finding in findings]


def lost(error: Exception) -> Finding:
    """A member that went away in between."""
    return fault("network", str(error), "what it says itself, above or in its own log")


def say(text: str) -> None:
    """A line before the report."""
    print(f"consensus.doctor: {text}", flush=True)


def end(code: int) -> NoReturn:
    """End this process at once: the teardown of a group waits for peers that may be stuck."""
    with suppress(OSError):
        sys.stdout.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
