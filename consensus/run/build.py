"""Construction of the algorithm from the config.

The coupling is given in the letters of the paper or as rates of the force in the units of w,
q(w) = (eta^2 / 2) grad phi(w). Rates are translated here:

    pull = 2 sigma / (lam eta^2)        outer = 2 M tau / eta^2
"""

import math
from collections.abc import Callable
from functools import partial

from consensus.algorithm import Algorithm, Consensus, Ddp, Msgd, StepSize, half_square
from consensus.comm import Group, Solo
from consensus.core.kernels import consensus_kernel, worker_kernel
from consensus.core.kernels.by_worker import ForceOfEach, StepOfEach
from consensus.core.kernels.reach_step import ReachStep
from consensus.delayed import DelayedConsensus
from consensus.gathered import GatheringServer
from consensus.repeatable import RepeatableOracle, RepeatableServer
from consensus.run.config import Config
from consensus.run.config_algorithm import ALONE, AlgorithmConfig
from consensus.run.plan import Plan
from consensus.server import Server
from consensus.worker import Worker


def build_algorithm(plan: Plan, group: Group) -> Algorithm:
    """The algorithm of the config, with u and the z_j at their common start. A collective."""
    config = plan.config.algorithm
    # Equal on all ranks already, unless their versions of torch differ.
    u = group.broadcast_(plan.start)
    z = u.repeat(len(plan.local_workers), 1)
    line_6 = worker_kernel(config.coupling, plan.phi, u)
    gathers = plan.config.group.sum == "gather"
    total = Solo(u.device).sum_ if gathers else group.sum_
    elastic = plan.config.group.elastic
    # Ranks that join choose their kernel later; a replay has the bits of such a run.
    changes = elastic or plan.config.group.replay is not None
    smallest = None if changes else group.min_
    line_3 = consensus_kernel(config.u_update, plan.phi, u, total, smallest)
    if config.delay and plan.phi.bounded:
        line_3 = ReachStep(line_3, plan.phi)
    if plan.config.deterministic:
        line_3 = ForceOfEach(line_3)
    if plan.config.deterministic or config.step_every is not None:
        line_6 = StepOfEach(line_6)
    worker = Worker(
        z,
        RepeatableOracle(plan.oracle) if elastic else plan.oracle,
        plan.phi,
        kappa=config.momentum,
        nu=config.weight_decay,
        momentum_on=config.momentum_on,
        kernel=config.own_kernel(line_6, plan.phi, z),
        clip=config.clip_grad_norm,
        on_nonfinite=config.on_nonfinite,
        resting=plan.oracle.resting if config.step_every else frozenset,
    )
    if config.name in ALONE:
        one_model = {"msgd": Msgd, "ddp": Ddp}[config.name]
        return one_model(worker, group, sigma=scheduled(config, "sigma"))
    kernel = config.outer_kernel(line_3, plan.phi, u)
    if gathers:
        server: Server = GatheringServer(u, plan.phi, group, len(z), kernel)
    else:
        server = (RepeatableServer if elastic else Server)(u, plan.phi, group, kernel)
    make: Callable[..., Consensus] = Consensus
    if config.delay:
        make = partial(DelayedConsensus, delay=config.delay, implicit=config.coupling == "implicit")
    return make(
        server,
        worker,
        tau=tau_of(plan.config, plan.num_workers),
        sigma=scheduled(config, "sigma"),
        lam=lam_of(plan.config),
        order=config.order,
        u_step_on=config.u_step_on,
        period=config.period,
        local_pull=config.local_pull,
    )


def tau_of(config: Config, num_workers: int) -> StepSize:
    """The step size of u of M workers, from tau or outer."""
    outer = config.algorithm.outer_rate
    if outer is not None:
        return outer * half_square(config.potential.eta) / num_workers
    tau = scheduled(config.algorithm, "tau")
    if not config.algorithm.tau_per_worker:
        return tau
    return (lambda t: tau(t) / num_workers) if callable(tau) else tau / num_workers


def lam_of(config: Config) -> StepSize:
    """The coupling parameter. A given pull stays as it is while sigma follows a schedule.

    Then lam is proportional to sigma, and inf for pull = 0.
    """
    algorithm, pull = config.algorithm, config.algorithm.pull
    if pull is None:
        return scheduled(algorithm, "lam")
    if pull == 0:
        return math.inf
    sigma, strength = scheduled(algorithm, "sigma"), pull * half_square(config.potential.eta)
    return (lambda t: sigma(t) / strength) if callable(sigma) else sigma / strength


def scheduled(config: AlgorithmConfig, name: str) -> StepSize:
    """tau, sigma or lam: a constant, or a constant times a schedule, as a function of t."""
    base: float = getattr(config, name)
    if getattr(config.schedule, name).name == "constant":
        return base
    factor = config.schedule.make(name)
    return lambda t: base * factor(t, config.iterations)
