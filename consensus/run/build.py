"""Construction of the algorithm from the config."""

from collections.abc import Callable

from consensus.algorithm import Algorithm, Consensus, Msgd
from consensus.comm import Group
from consensus.core.flat import Scalar
from consensus.core.kernels import consensus_kernel, worker_kernel
from consensus.run.config_algorithm import AlgorithmConfig
from consensus.run.plan import Plan
from consensus.server import Server
from consensus.worker import Worker


def build_algorithm(plan: Plan, group: Group) -> Algorithm:
    """The algorithm of the config, with u and the z_j at their common start. A collective."""
    config = plan.config.algorithm
    # Equal on all ranks already, unless their versions of torch differ.
    u = group.broadcast_(plan.start)
    worker = Worker(
        u.repeat(len(plan.local_workers), 1),
        plan.oracle,
        plan.phi,
        kappa=config.momentum,
        nu=config.weight_decay,
        momentum_on=config.momentum_on,
        kernel=worker_kernel(config.coupling, plan.phi, u),
    )
    if config.name == "msgd":
        return Msgd(worker, group, sigma=scheduled(config, "sigma"))
    return Consensus(
        Server(u, plan.phi, group, consensus_kernel(config.u_update, plan.phi, u, group.sum_)),
        worker,
        tau=scheduled(config, "tau"),
        sigma=scheduled(config, "sigma"),
        lam=scheduled(config, "lam"),
        order=config.order,
        u_step_on=config.u_step_on,
        period=config.period,
    )


def scheduled(config: AlgorithmConfig, name: str) -> float | Callable[[int], Scalar]:
    """tau, sigma or lam: a constant, or a constant times a schedule, as a function of t."""
    base: float = getattr(config, name)
    if getattr(config.schedule, name).name == "constant":
        return base
    factor = config.schedule.make(name)
    return lambda t: base * factor(t, config.iterations)
