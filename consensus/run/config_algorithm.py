"""The section `algorithm` of the config: its types, and the checks that involve its keys only."""

import math
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from consensus.algorithm import ORDERS, U_STEP_ON
from consensus.core.kernels import (
    COUPLINGS,
    U_UPDATES,
    ConsensusKernel,
    WorkerKernel,
)
from consensus.core.kernels.outer_step import FlatOptimizerStep
from consensus.core.kernels.plain import Plain
from consensus.core.kernels.worker_step import WorkerOptimizerStep
from consensus.core.layerwise import Layerwise
from consensus.core.potentials import POTENTIALS
from consensus.core.schedules import SCHEDULES, Schedule
from consensus.run.checks import (
    COUNT,
    POSITIVE,
    RATE,
    ConfigError,
    Section,
    made,
    one_of,
    or_null,
    require,
    rule,
)
from consensus.worker import MOMENTUM_ON, ON_NONFINITE


@dataclass
class ScheduleConfig:
    """A factor as a function of the iteration: a name in SCHEDULES and its options."""

    name: str
    options: dict[str, Any]


@dataclass
class SchedulesConfig:
    """The factors of tau, sigma and lam at iteration t."""

    tau: ScheduleConfig
    sigma: ScheduleConfig
    lam: ScheduleConfig

    def __post_init__(self) -> None:
        for name in ("tau", "sigma", "lam"):
            self.make(name)

    def make(self, name: str) -> Schedule:
        """The schedule of tau, sigma or lam."""
        config: ScheduleConfig = getattr(self, name)
        return made(f"algorithm.schedule.{name}", SCHEDULES, config.name, config.options)


OUTER = rule(
    lambda x: isinstance(x.get("optimizer"), str) if isinstance(x, dict) else number(x),
    "a finite number >= 0, {optimizer: NAME IN torch.optim, OPTION: VALUE}",
)


OPTIMIZER = rule(
    lambda x: isinstance(x, dict) and isinstance(x.get("optimizer"), str) and is_rate(x.get("lr")),
    "{optimizer: NAME IN torch.optim, lr: A FINITE NUMBER > 0, OPTION: VALUE}",
)


def number(x: object) -> bool:
    """Whether it is a finite number >= 0."""
    return isinstance(x, float) and 0 <= x < math.inf


def is_rate(x: object) -> bool:
    """Whether it is a finite number > 0."""
    return isinstance(x, int | float) and not isinstance(x, bool) and 0 < x < math.inf


def name_and_options(optimizer: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The two parts of {optimizer: NAME, OPTION: VALUE}."""
    options = {key: value for key, value in optimizer.items() if key != "optimizer"}
    return optimizer["optimizer"], options


def as_call(optimizer: dict[str, Any]) -> str:
    """NAME(OPTION=VALUE, ...) of {optimizer: NAME, OPTION: VALUE}."""
    name, options = name_and_options(optimizer)
    return f"{name}({', '.join(f'{key}={value}' for key, value in options.items())})"


AVERAGING: dict[
    str, dict[str, object]
] = {  # methods in which the z_j continue from u -> what each implies beside pull = 1
    "local_sgd": {"outer": 1, "local_pull": 0},
    "fedprox": {"outer": 1},
    "lookahead": {"local_pull": 0},
    "diloco": {"local_pull": 0},
}


ALONE = ("msgd", "ddp")
"""Methods that train one model: nothing is coupled."""


STRIDES = rule(
    lambda x: isinstance(x, list) and all(type(n) is int and n >= 1 for n in x),
    "a list of whole numbers >= 1, one for each worker",
)


@dataclass
class AlgorithmConfig(Section, key="algorithm"):
    """Algorithm 1 and its baselines."""

    name: str = field(metadata=one_of(("consensus", "easgd", *ALONE, *AVERAGING)))
    lam: float | None = field(
        metadata=rule(lambda x: x is None or x > 0, "a number > 0 (inf uncouples the workers)")
    )
    tau: float | None = field(
        metadata=rule(lambda x: x is None or 0 < x < math.inf, "a finite number > 0")
    )
    pull: float | None = field(metadata=or_null(RATE, "lam in its place"))
    outer: Any = field(metadata=or_null(OUTER, "tau in its place"))
    local_pull: float = field(metadata=RATE)
    optimizer: Any = field(metadata=or_null(OPTIMIZER, "Nesterov momentum"))
    clip_grad_norm: float | None = field(metadata=or_null(POSITIVE, "no limit"))
    sigma: float = field(metadata=POSITIVE)
    momentum: float = field(metadata=rule(lambda x: 0 <= x < 1, "a number in [0, 1)"))
    weight_decay: float = field(metadata=rule(lambda x: 0 <= x < math.inf, "a finite number >= 0"))
    batch_size: int = field(metadata=COUNT)
    iterations: int = field(metadata=COUNT)
    period: int = field(metadata=COUNT)
    order: str = field(metadata=one_of(ORDERS))
    momentum_on: str = field(metadata=one_of(MOMENTUM_ON))
    u_step_on: str = field(metadata=one_of(U_STEP_ON))
    coupling: str = field(metadata=one_of(COUPLINGS))
    u_update: str = field(metadata=one_of(U_UPDATES))
    loss_reduction: str = field(metadata=one_of(("sum", "mean")))
    schedule: SchedulesConfig
    on_nonfinite: str = field(default="stop", metadata=one_of(ON_NONFINITE))
    tau_per_worker: bool = False
    delay: int = field(default=0, metadata=rule(lambda x: x >= 0, "a whole number >= 0"))
    step_every: list[int] | None = field(
        default=None, metadata=or_null(STRIDES, "a step in every iteration")
    )

    def __post_init__(self) -> None:
        if isinstance(self.outer, int) and not isinstance(self.outer, bool):
            self.outer = float(self.outer) if abs(self.outer) < 1e308 else math.inf
        super().__post_init__()
        self._require_optimizers()
        if self.name != "consensus":
            self._require_point()
        if self.name != "ddp":
            self._require_one_of("lam", "pull", "pull = 2 sigma / (lam eta^2)")
            self._require_one_of("tau", "outer", "outer = 2 M tau / eta^2")
        divided = self.tau is not None or not self.tau_per_worker
        allowed = "false with algorithm.outer, which does not depend on M"
        require(divided, "algorithm.tau_per_worker", "true", allowed)
        allowed = f"a number of iterations below algorithm.period = {self.period}"
        require(self.delay < self.period, "algorithm.delay", self.delay, allowed)
        if self.delay:
            where = f"with algorithm.delay={self.delay}: its sums wait for each other"
            self._require_implied("u_update", "gradient", f"gradient {where}")
        if self.step_every is not None:
            allowed = "loss with algorithm.step_every: the velocity of a worker at rest stays"
            self._require_implied("momentum_on", "loss", allowed)
        if self.outer is not None:
            where = "with algorithm.outer, the step of u"
            self._require_implied("u_step_on", "coupling", f"coupling {where}")
            self._require_implied("u_update", "gradient", f"gradient {where}")
        for possible, where in (
            (self.order == "gauss_seidel", f"order={self.order}: the proximal step is around u+"),
            (self.pull is None, "algorithm.pull, the rate of an explicit step"),
            (self.local_pull == 0, "algorithm.local_pull, the rate of an explicit step"),
        ):
            if not possible:
                self._require_implied("coupling", "explicit", f"explicit with {where}")

    def _require_optimizers(self) -> None:
        """Refuse optimizers that cannot be made, and what contradicts that of the workers."""
        like = torch.zeros(2)
        phi = Layerwise(POTENTIALS["quad"], [(0, 2)])
        kernel, key = Plain(phi, like), "outer"
        try:
            self.outer_kernel(kernel, phi, like)
            key = "optimizer"
            self.own_kernel(kernel, phi, like.unsqueeze(0))
        except ValueError as error:
            shown = getattr(self, key)
            raise ConfigError(f"`algorithm.{key}` is {shown}: {error}") from error
        if self.optimizer is None:
            return
        where = "with algorithm.optimizer"
        name, lr = self.optimizer["optimizer"], float(self.optimizer["lr"])
        self._require_implied("sigma", lr, f"{lr} {where}, whose lr it is")
        for option in ("momentum", "weight_decay"):
            self._require_implied(option, 0, f"0 {where}: an option of {name}, if it has one")
        self._require_implied("momentum_on", "loss", f"loss {where}")

    def own_kernel(self, kernel: WorkerKernel, phi: Layerwise, z: Tensor) -> WorkerKernel:
        """Line 6 of workers z (K, n) with their optimizer; the given one where there is none."""
        if self.optimizer is None:
            return kernel
        return WorkerOptimizerStep(kernel, z, *name_and_options(self.optimizer), cut=phi.bounded)

    def outer_kernel(
        self, kernel: ConsensusKernel, phi: Layerwise, like: Tensor
    ) -> ConsensusKernel:
        """Line 3 with the optimizer over u; the given one where `outer` is none."""
        if not isinstance(self.outer, dict):
            return kernel
        return FlatOptimizerStep(kernel, like, *name_and_options(self.outer), cut=phi.bounded)

    @property
    def outer_rate(self) -> float | None:
        """`outer` as a number, 1 for an optimizer, whose gradient is the whole way; None: tau."""
        return 1.0 if isinstance(self.outer, dict) else self.outer

    def _require_point(self) -> None:
        """Refuse what contradicts the named method."""
        where = f"for algorithm={self.name}"
        self._require_implied("coupling", "explicit", f"explicit {where}")
        self._require_implied("u_update", "gradient", f"gradient {where}")
        if self.name == "easgd":
            outside = f"loss {where}: the elastic force acts outside the velocity"
            where += ", whose step is symmetric (algorithm=consensus is free)"
            self._require_implied("order", "jacobi", f"jacobi, {where}")
            self._require_implied("u_step_on", "objective", f"objective, {where}")
            self._require_implied("momentum_on", "loss", outside)
            self._require_implied("outer", None, f"null, {where}")
            self._require_implied("tau", self.sigma, f"algorithm.sigma = {self.sigma}, {where}")
            sigma = self.schedule.sigma
            self._require_implied("schedule.tau", sigma, f"the schedule of sigma, {where}")
        implied: dict[str, object] = {}
        if self.name in ALONE:
            implied = {"period": 1, "pull": None, "outer": None, "local_pull": 0}
            implied |= {"on_nonfinite": "stop", "step_every": None}
            only = {"msgd": {"optimizer": None}, "ddp": {"lam": None, "tau": None}}
            implied |= only[self.name]
        elif self.name in AVERAGING:
            implied = {"pull": 1, "tau": None, "order": "gauss_seidel", "momentum_on": "loss"}
            implied |= AVERAGING[self.name]
            where += " (algorithm=consensus is free)"
        if self.name == "diloco":
            allowed = f"{{optimizer: NAME, OPTION: VALUE}} {where}"
            require(isinstance(self.outer, dict), "algorithm.outer", self.outer, allowed)
        elif self.name in AVERAGING:
            require(
                not isinstance(self.outer, dict), "algorithm.outer", self.outer, f"a number {where}"
            )
        for key, value in implied.items():
            self._require_implied(key, value, f"{'null' if value is None else value} {where}")

    def _require_one_of(self, letter: str, rate: str, formula: str) -> None:
        """Refuse a letter of the paper beside the rate in its place, and a lack of both."""
        value, given = getattr(self, letter), getattr(self, rate)
        if given is None:
            allowed = f"a number > 0, or null where algorithm.{rate} is given"
            return require(value is not None, f"algorithm.{letter}", "null", allowed)
        allowed = f"null beside algorithm.{rate} = {given}, which replaces it ({formula})"
        require(value is None, f"algorithm.{letter}", value, allowed)
        allowed = f"constant with algorithm.{rate}, which follows no schedule"
        schedule = f"schedule.{letter}.name"
        return self._require_implied(schedule, "constant", allowed)

    def _require_implied(self, key: str, needed: object, allowed: str) -> None:
        """Refuse any value of a key but the one that `name` implies."""
        value = attrgetter(key)(self)
        require(value == needed, f"algorithm.{key}", value, allowed)

    def strides(self, num_workers: int) -> list[int]:
        """Iterations from a step of a worker to its next, for each worker."""
        return [1] * num_workers if self.step_every is None else self.step_every

    def factors(self, name: str) -> tuple[float, float]:
        """The smallest and the largest factor of the schedule of tau, sigma or lam in this run."""
        if getattr(self.schedule, name).name == "constant":
            return 1.0, 1.0
        factor = self.schedule.make(name)
        last, stride = self.iterations - 1, 1 + self.iterations // 100_000  # enough of a long run
        values = [factor(t, self.iterations) for t in (*range(0, last, stride), last)]
        return min(values), max(values)
