"""A run on this process of a launch: a plan, the process group, and work on both."""

from collections.abc import Callable
from typing import TypeVar

import torch

from consensus.comm import Group, Launch, open_group
from consensus.run.checks import ConfigError
from consensus.run.config import Config
from consensus.run.limits import MachineError, machine_failures
from consensus.run.plan import Plan, make_plan, set_determinism

T = TypeVar("T")


def run(config: Config, launch: Launch, work: Callable[[Plan, Group], T]) -> T:
    """Plan a run on this process of a launch, open its process group, and work on both.

    ConfigError if the plan is refused, before the group opens; otherwise the errors of `work`.
    """
    set_determinism(config)
    try:
        with machine_failures():
            plan = make_plan(config, launch)
    except MachineError as error:  # as all ranks of this machine, before a group opens
        raise ConfigError(str(error)) from error
    if plan.device.type == "cuda":
        torch.cuda.set_device(plan.device)
    how = config.group
    where = launch, plan.backend, plan.device
    group = open_group(*where, how.timeout_s, how.shared_memory, how.compress)
    with group.publish_failure(), machine_failures():
        found = work(plan, group)
    group.close()  # not after a failure: peers may hang in the group
    return found
