"""Members of populations: runs of a sweep that may train together.

Runs of one kind have equal configs except for the numbers that may differ within a `Population`:
lam or pull, eta, tau or outer, sigma, momentum, weight decay, schedules and the seed. They are
grouped into populations that fit the memory.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from consensus.comm import Launch
from consensus.records import Row
from consensus.run.config import Config
from consensus.run.limits import memory_of
from consensus.run.plan import Plan, make_plan

FORMAT = 2  # of the checkpoint; it is part of the file name, so that no other format is read
MOST_MODELS = 65_535  # in a population: the grid size of the Triton kernels
VECTORS = 8  # (M, n) per configuration at most: z, v, look-ahead points, u - z, forces, directions
SHARE_OF_MEMORY = 0.5  # that a population may use


@dataclass
class Member:
    """A run that is a member of a population."""

    name: str
    run_dir: Path
    config: Config
    rows: list[Row] = field(default_factory=list)  # its evaluations so far


@dataclass(frozen=True)
class Stage:
    """A part of the training of populations: a rung of `sweep.halving`, or all of it."""

    going: frozenset[str]  # names of the members that are trained; the others are left out
    todo: frozenset[str]  # those among them that are not there yet
    iterations: int | None = None  # to which they are trained; None: the end


def kind(config: Config) -> str:
    """The part of a config that all members of a population share, as a key."""
    shared = asdict(config)
    for key in ("lam", "tau", "sigma", "pull", "outer", "momentum", "weight_decay", "schedule"):
        del shared["algorithm"][key]
    shared["algorithm"]["local_pull"] = config.algorithm.local_pull > 0
    for key in ("root", "run_dir", "name"):
        del shared["output"][key]
    del shared["potential"]["eta"], shared["seed"], shared["resume"], shared["group"]
    return json.dumps(shared, sort_keys=True, default=str)


def key_of(members: Sequence[Member]) -> str:
    """The name of the checkpoint of a population: a hash of its runs and their configs."""
    configs = [asdict(member.config) for member in members]
    for config in configs:
        del config["output"]["root"], config["output"]["run_dir"]  # a sweep may be moved
    names = [member.name for member in members]
    content = json.dumps([FORMAT, names, configs], sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def populations(members: Sequence[Member], memory: int | None = None) -> list[list[Member]]:
    """Group the members into as few populations as fit the memory.

    Members whose model has running buffers, such as BatchNorm, or whose data are in storage, are
    left out: a population has neither.
    The result depends on all members, done or not, and on the machine. A restarted sweep therefore
    finds the checkpoints of its populations. `memory`: bytes; None: SHARE_OF_MEMORY of the device.
    """
    groups: dict[str, list[Member]] = {}
    for member in members:
        groups.setdefault(kind(member.config), []).append(member)
    found = []
    for group in groups.values():
        plan = plan_alone(group[0].config)
        if plan.oracle.running or not plan.dataset.in_memory:
            continue
        usable = int(SHARE_OF_MEMORY * memory_of(plan.device)) if memory is None else memory
        each = VECTORS * plan.num_workers * plan.start.numel() * plan.start.element_size()
        most = min(usable // each, MOST_MODELS // plan.num_workers)
        parts = math.ceil(len(group) / max(1, most))
        size = math.ceil(len(group) / parts)  # of even size
        found += [group[i : i + size] for i in range(0, len(group), size)]
    return found


def plan_alone(config: Config) -> Plan:
    """The plan of a config as if its run directory were empty."""
    output = replace(config.output, run_dir=None)
    return make_plan(replace(config, output=output, resume="never"), Launch())
