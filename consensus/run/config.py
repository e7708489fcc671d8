"""The typed configuration of a run: every key, and every check that needs no data.

YAML files under configs/ hold the values, these classes their types (compose.py joins them). Each
class checks its own fields; plan.py checks what depends on the launch and the data.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from consensus.algorithm import ORDERS, U_STEP_ON
from consensus.core.kernels import COUPLINGS, U_UPDATES
from consensus.core.potentials import POTENTIALS, Potential
from consensus.core.schedules import SCHEDULES, Schedule
from consensus.problem import DATASETS, MODELS, PARTITIONS
from consensus.registry import Registry
from consensus.worker import MOMENTUM_ON

ALGORITHMS = ("consensus", "easgd", "msgd")
BACKENDS = ("auto", "gloo", "nccl")
DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("float32", "float64")
RESUME = ("never", "auto")  # or a path
REDUCTIONS = ("sum", "mean")


class ConfigError(ValueError):
    """A mistake of the user, told in one line that names key, value and what is allowed."""


def require(condition: bool, key: str, value: object, allowed: str) -> None:
    """Refuse a value.

    Raises:
        ConfigError: Unless the condition holds.
    """
    if not condition:
        raise ConfigError(f"`{key}` is {value}; allowed: {allowed}")


def require_one_of(key: str, value: str, allowed: Any) -> None:
    """Refuse a word that is not in a list."""
    require(value in allowed, key, value, ", ".join(sorted(allowed)))


def made(key: str, table: Registry[Any], name: str, options: dict[str, Any]) -> Any:
    """An entry of a table, with a table's complaint turned into a ConfigError."""
    require_one_of(f"{key}.name", name, table)
    try:
        return table.make(name, **options)
    except (ValueError, TypeError, OverflowError) as error:
        raise ConfigError(f"`{key}.options` is {options}: {error}") from error


def absolute(key: str, path: str) -> str:
    """A path that does not follow a later chdir.

    Raises:
        ConfigError: If its user is unknown, a name in it is too long, or it may not be looked at.
    """
    try:
        found = Path(path).expanduser().resolve()
        found.exists()  # raises now what a look at it would raise later
    except (OSError, RuntimeError, ValueError) as error:
        cause = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(
            f"`{key}` is {path}; allowed: the path of a file or folder ({cause})"
        ) from error
    return str(found)


@dataclass
class PotentialConfig:
    """phi of (18): a name in POTENTIALS, its width and its options."""

    name: str
    eta: float
    options: dict[str, Any]

    def __post_init__(self) -> None:
        """Check the fields."""
        require(0 < self.eta < math.inf, "potential.eta", self.eta, "a finite number > 0")
        self.make()

    def make(self) -> Potential:
        """The potential."""
        potential: Potential = made("potential", POTENTIALS, self.name, self.options)
        return potential


@dataclass
class ScheduleConfig:
    """A factor over time: a name in SCHEDULES and its options."""

    name: str
    options: dict[str, Any]

    def make(self, key: str) -> Schedule:
        """The schedule; `key` is where it stands, for messages."""
        schedule: Schedule = made(key, SCHEDULES, self.name, self.options)
        return schedule


@dataclass
class SchedulesConfig:
    """What multiplies tau, sigma and lam at iteration t."""

    tau: ScheduleConfig
    sigma: ScheduleConfig
    lam: ScheduleConfig

    def __post_init__(self) -> None:
        """Check the fields."""
        for name in ("tau", "sigma", "lam"):
            self.make(name)

    def make(self, name: str) -> Schedule:
        """The schedule of tau, sigma or lam."""
        config: ScheduleConfig = getattr(self, name)
        return config.make(f"algorithm.schedule.{name}")


@dataclass
class AlgorithmConfig:
    """Algorithm 1 and its baselines."""

    name: str
    lam: float
    tau: float
    sigma: float
    momentum: float
    weight_decay: float
    batch_size: int
    iterations: int
    period: int
    order: str
    momentum_on: str
    u_step_on: str
    coupling: str
    u_update: str
    loss_reduction: str
    schedule: SchedulesConfig

    def __post_init__(self) -> None:
        """Check the fields, and what `name` implies for them."""
        require_one_of("algorithm.name", self.name, ALGORITHMS)
        require(self.lam > 0, "algorithm.lam", self.lam, "a number > 0 (inf uncouples the workers)")
        for name in ("tau", "sigma"):
            value = getattr(self, name)
            require(0 < value < math.inf, f"algorithm.{name}", value, "a finite number > 0")
        require(0 <= self.momentum < 1, "algorithm.momentum", self.momentum, "a number in [0, 1)")
        require(
            0 <= self.weight_decay < math.inf,
            "algorithm.weight_decay",
            self.weight_decay,
            "a finite number >= 0",
        )
        for name in ("batch_size", "iterations", "period"):
            value = getattr(self, name)
            require(value >= 1, f"algorithm.{name}", value, "a whole number >= 1")
        require_one_of("algorithm.order", self.order, ORDERS)
        require_one_of("algorithm.momentum_on", self.momentum_on, MOMENTUM_ON)
        require_one_of("algorithm.u_step_on", self.u_step_on, U_STEP_ON)
        require_one_of("algorithm.coupling", self.coupling, COUPLINGS)
        require_one_of("algorithm.u_update", self.u_update, U_UPDATES)
        if self.coupling == "implicit":
            require(
                self.order == "gauss_seidel",
                "algorithm.coupling",
                self.coupling,
                f"explicit with order={self.order}: the proximal step is around u+",
            )
        require_one_of("algorithm.loss_reduction", self.loss_reduction, REDUCTIONS)
        if self.name != "consensus":
            for key, plain in (("coupling", "explicit"), ("u_update", "gradient")):
                value = getattr(self, key)
                allowed = f"{plain} for algorithm={self.name}"
                require(value == plain, f"algorithm.{key}", value, allowed)
        if self.name == "easgd":
            symmetric = "for algorithm=easgd, whose step is symmetric (algorithm=consensus is free)"
            require(self.order == "jacobi", "algorithm.order", self.order, f"jacobi, {symmetric}")
            require(
                self.u_step_on == "objective",
                "algorithm.u_step_on",
                self.u_step_on,
                f"objective, {symmetric}",
            )
            require(
                self.momentum_on == "loss",
                "algorithm.momentum_on",
                self.momentum_on,
                "loss for algorithm=easgd: the elastic force acts outside the velocity",
            )
            require(
                self.tau == self.sigma,
                "algorithm.tau",
                self.tau,
                f"algorithm.sigma = {self.sigma}, {symmetric}",
            )
            require(
                self.schedule.tau == self.schedule.sigma,
                "algorithm.schedule.tau",
                self.schedule.tau,
                f"the schedule of sigma, {symmetric}",
            )
        if self.name == "msgd":
            require(self.period == 1, "algorithm.period", self.period, "1 for algorithm=msgd")

    def factors(self, name: str) -> tuple[float, float]:
        """The smallest and the largest factor of the schedule of tau, sigma or lam in this run."""
        if getattr(self.schedule, name).name == "constant":
            return 1.0, 1.0
        factor = self.schedule.make(name)
        last, stride = self.iterations - 1, 1 + self.iterations // 100_000  # enough of a long run
        values = [factor(t, self.iterations) for t in (*range(0, last, stride), last)]
        return min(values), max(values)


@dataclass
class DataConfig:
    """What is learned, and how it is dealt out to the workers."""

    name: str
    root: str
    partition: str
    alpha: float
    options: dict[str, Any]

    def __post_init__(self) -> None:
        """Check the fields; make `root` absolute, so that it does not follow a later chdir."""
        require_one_of("data.name", self.name, DATASETS)
        require_one_of("data.partition", self.partition, PARTITIONS)
        require(0 < self.alpha < math.inf, "data.alpha", self.alpha, "a finite number > 0")
        self.root = absolute("data.root", self.root)


@dataclass
class ModelConfig:
    """The model: a name in MODELS and its options."""

    name: str
    options: dict[str, Any]

    def __post_init__(self) -> None:
        """Check the fields."""
        require_one_of("model.name", self.name, MODELS)
        free = "num_classes" not in self.options
        require(free, "model.options", self.options, "none called num_classes: the data say it")


@dataclass
class GroupConfig:
    """How the processes talk."""

    name: str
    timeout_s: float
    shared_memory: bool
    compress: str | None

    def __post_init__(self) -> None:
        """Check the fields."""
        require_one_of("group.name", self.name, BACKENDS)
        require(self.compress in (None, "bf16"), "group.compress", self.compress, "null, bf16")
        timeout = self.timeout_s
        require(1 <= timeout < math.inf, "group.timeout_s", timeout, "a number of seconds >= 1")


@dataclass
class OutputConfig:
    """Where a run leaves its files, and how often it speaks."""

    root: str
    run_dir: str | None
    name: str | None
    eval_every: int
    checkpoint_every: int | None
    keep_checkpoints: int
    log_every: int
    tensorboard: bool

    def __post_init__(self) -> None:
        """Check the fields; make the paths absolute."""
        for name in ("eval_every", "keep_checkpoints", "log_every"):
            value = getattr(self, name)
            require(value >= 1, f"output.{name}", value, "a whole number >= 1")
        require(
            self.checkpoint_every is None or self.checkpoint_every >= 1,
            "output.checkpoint_every",
            self.checkpoint_every,
            "a whole number >= 1, or null for no checkpoints",
        )
        if self.name is not None:
            plain = self.name != "" and "/" not in self.name
            require(plain, "output.name", repr(self.name), "a word without `/`")
        self.root = absolute("output.root", self.root)
        if self.run_dir is not None:
            self.run_dir = absolute("output.run_dir", self.run_dir)


@dataclass
class StationarityConfig:
    """Whether and how the stationarity of section 4 is measured during a run."""

    every: int | None
    lam: float | None
    samples: int | None
    batch_size: int
    tolerance: float
    budget: int

    def __post_init__(self) -> None:
        """Check the fields."""
        for name, none in (("every", "never"), ("samples", "all")):
            value = getattr(self, name)
            allowed = f"a whole number >= 1, or null for {none}"
            require(value is None or value >= 1, f"stationarity.{name}", value, allowed)
        lam, tolerance = self.lam, self.tolerance
        allowed = "a finite number > 0, or null"
        require(lam is None or 0 < lam < math.inf, "stationarity.lam", lam, allowed)
        size = self.batch_size
        require(size >= 1, "stationarity.batch_size", size, "a whole number >= 1")
        require(0 < tolerance < 1, "stationarity.tolerance", tolerance, "a number in (0, 1)")
        require(self.budget >= 2, "stationarity.budget", self.budget, "a whole number >= 2")


@dataclass
class Config:
    """One run."""

    workers: int | None
    seed: int
    dtype: str
    device: str
    deterministic: bool
    cuda_graph: bool
    resume: str
    plugins: list[str]
    potential: PotentialConfig
    algorithm: AlgorithmConfig
    data: DataConfig
    model: ModelConfig
    group: GroupConfig
    output: OutputConfig
    stationarity: StationarityConfig

    def __post_init__(self) -> None:
        """Check the fields, and the combinations that no launch and no data can make right."""
        require(self.workers is None or self.workers >= 1, "workers", self.workers, "null or >= 1")
        require(self.seed >= 0, "seed", self.seed, "a whole number >= 0")
        require_one_of("dtype", self.dtype, DTYPES)
        require_one_of("device", self.device, DEVICES)
        require(self.resume != "", "resume", "''", "never, auto, or a path")
        require(
            self.resume != "auto" or self.output.run_dir is not None,
            "resume",
            "auto",
            "never or a path, unless output.run_dir says which run to continue",
        )
        if self.resume not in RESUME:
            self.resume = absolute("resume", self.resume)
        algorithm = self.algorithm
        largest = float(torch.finfo(getattr(torch, self.dtype)).max)
        factors = {name: algorithm.factors(name) for name in ("tau", "sigma", "lam")}
        for name, (low, high) in factors.items():
            require(
                (low > 0 if name == "lam" else low >= 0) and high < math.inf,
                f"algorithm.schedule.{name}",
                f"a factor from {low:g} to {high:g}",
                "finite factors > 0" if name == "lam" else "finite factors >= 0",
            )
        step = max(algorithm.sigma * factors["sigma"][1], algorithm.tau * factors["tau"][1])
        lam = algorithm.lam * factors["lam"][0]
        require(
            step < largest * min(lam, 1.0),
            "algorithm.lam",
            f"{lam:g}",
            f"a number for which sigma / lam and tau / lam fit {self.dtype}, below {largest:.2g}",
        )
        require(
            algorithm.weight_decay < largest,
            "algorithm.weight_decay",
            algorithm.weight_decay,
            f"a number that fits {self.dtype}, below {largest:.2g}",
        )
        if algorithm.name in ("easgd", "msgd"):
            require(
                self.potential.name == "quad",
                "potential",
                self.potential.name,
                f"quad for algorithm={algorithm.name} (algorithm=consensus takes any)",
            )
        require(
            not (self.device == "cpu" and self.group.name == "nccl"),
            "group",
            self.group.name,
            "auto or gloo with device=cpu: NCCL moves CUDA tensors only",
        )

    @property
    def coupled(self) -> bool:
        """Whether there is a coupling, and so an envelope."""
        return self.algorithm.name != "msgd" and self.algorithm.lam < math.inf
