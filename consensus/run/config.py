"""Typed configuration of a run: every key, and every check that needs no launch and no data.

The YAML files in configs/ hold the values, these classes the types (compose.py joins them). The
metadata of a field states the values that its key allows; `__post_init__` adds the checks that
involve several keys.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from consensus.core.potentials import POTENTIALS, Potential
from consensus.problem import DATASETS, LOSSES, MODELS, PARTITIONS, Loss
from consensus.run.checks import (
    COUNT,
    POSITIVE,
    Section,
    absolute,
    check_fields,
    made,
    one_of,
    or_null,
    require,
    rule,
)
from consensus.run.config_algorithm import ALONE, AlgorithmConfig

RESUME = ("never", "auto")  # or a path
DTYPES = ("float32", "float64", "bfloat16")  # bfloat16: of passes; u and z_j are float32


@dataclass
class PotentialConfig(Section, key="potential"):
    """phi of (18): a name in POTENTIALS, its width and its options."""

    name: str
    eta: float = field(metadata=POSITIVE)
    options: dict[str, Any]

    def __post_init__(self) -> None:
        super().__post_init__()
        self.make()

    def make(self) -> Potential:
        """The potential."""
        return made("potential", POTENTIALS, self.name, self.options)


@dataclass
class DataConfig(Section, key="data"):
    """The data set, and its division between the workers."""

    name: str = field(metadata=one_of(DATASETS))
    root: str
    partition: str = field(metadata=one_of(PARTITIONS))
    alpha: float = field(metadata=POSITIVE)
    options: dict[str, Any]
    validation: float = field(default=0.0, metadata=rule(lambda x: 0 <= x < 1, "a share in [0, 1)"))
    loader_workers: int = field(
        default=0, metadata=rule(lambda x: x >= 0, "a whole number of processes >= 0")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.root = absolute("data.root", self.root)


@dataclass
class ModelConfig(Section, key="model"):
    """The model: a name in MODELS and its options."""

    name: str = field(metadata=one_of(MODELS))
    options: dict[str, Any] = field(
        metadata=rule(
            lambda x: "num_classes" not in x, "no num_classes; it comes from the data set"
        )
    )


@dataclass
class LossConfig(Section, key="loss"):
    """The loss and its metrics: a name in LOSSES and its options."""

    name: str = field(metadata=one_of(LOSSES))
    options: dict[str, Any]

    def __post_init__(self) -> None:
        super().__post_init__()
        self.make()

    def make(self) -> Loss:
        """The loss."""
        loss: Loss = made("loss", LOSSES, self.name, self.options)
        return loss


@dataclass
class GroupConfig(Section, key="group"):
    """Communication between the processes."""

    name: str = field(metadata=one_of(("auto", "gloo", "nccl")))
    timeout_s: float = field(metadata=rule(lambda x: 1 <= x < math.inf, "a number of seconds >= 1"))
    shared_memory: bool
    compress: str | None = field(
        metadata=rule(lambda x: x in (None, "bf16", "int8"), "null, bf16, int8")
    )
    sum: str = field(default="reduce", metadata=one_of(("reduce", "gather")))
    elastic: bool = False
    workers_per_process: int = field(default=1, metadata=COUNT)
    min_workers: int = field(default=1, metadata=COUNT)
    replay: str | None = None


@dataclass
class OutputConfig(Section, key="output"):
    """The files of a run, and the intervals of evaluations, checkpoints and log entries."""

    root: str
    run_dir: str | None
    name: str | None
    eval_every: int = field(metadata=COUNT)
    checkpoint_every: int | None = field(metadata=or_null(COUNT, "no checkpoints"))
    keep_checkpoints: int = field(metadata=COUNT)
    log_every: int = field(metadata=COUNT)
    tensorboard: bool
    figures: bool = True
    stop_at: int | None = field(default=None, metadata=or_null(COUNT, "algorithm.iterations"))

    def __post_init__(self) -> None:
        super().__post_init__()
        plain = self.name is None or (self.name != "" and "/" not in self.name)
        require(plain, "output.name", repr(self.name), "a word without `/`")
        self.root = absolute("output.root", self.root)
        if self.run_dir is not None:
            self.run_dir = absolute("output.run_dir", self.run_dir)


@dataclass
class StationarityConfig(Section, key="stationarity"):
    """Measurements of the stationarity of section 4 during a run."""

    every: int | None = field(metadata=or_null(COUNT, "never"))
    lam: float | None = field(metadata=or_null(POSITIVE))
    samples: int | None = field(metadata=or_null(COUNT, "all"))
    batch_size: int = field(metadata=COUNT)
    tolerance: float = field(metadata=rule(lambda x: 0 < x < 1, "a number in (0, 1)"))
    budget: int = field(metadata=rule(lambda x: x >= 2, "a whole number >= 2"))


@dataclass
class Config:
    """One run."""

    workers: int | None = field(
        metadata=rule(lambda m: m is None or m >= 1, "null, or a whole number >= 1")
    )
    seed: int = field(metadata=rule(lambda x: x >= 0, "a whole number >= 0"))
    dtype: str = field(metadata=one_of(DTYPES))
    device: str = field(metadata=one_of(("auto", "cpu", "cuda")))
    deterministic: bool
    cuda_graph: bool
    resume: str
    plugins: list[str]
    potential: PotentialConfig
    algorithm: AlgorithmConfig
    data: DataConfig
    model: ModelConfig
    loss: LossConfig
    group: GroupConfig
    output: OutputConfig
    stationarity: StationarityConfig

    def __post_init__(self) -> None:
        check_fields(self)
        require(self.resume != "", "resume", "''", "never, auto, or a path")
        known = self.resume != "auto" or self.output.run_dir is not None
        allowed = "never or a path, unless output.run_dir says which run to continue"
        require(known, "resume", "auto", allowed)
        if self.resume not in RESUME:
            self.resume = absolute("resume", self.resume)
        self._require_representable()
        name, potential = self.algorithm.name, self.potential.name
        allowed = f"quad for algorithm={name} (algorithm=consensus takes any)"
        require(name == "consensus" or potential == "quad", "potential", potential, allowed)
        known = self.algorithm.optimizer is None or not self.coupled
        known = known or self.stationarity.every is None
        key = "step_every" if known else "optimizer"
        known = known and (self.algorithm.step_every is None or self.stationarity.every is None)
        allowed = f"a number > 0 with algorithm.{key}, or stationarity.every=null"
        require(known or self.stationarity.lam is not None, "stationarity.lam", "null", allowed)
        exact = not self.deterministic or self.group.compress is None
        allowed = "null with deterministic=true: rounded partial sums depend on the layout"
        require(exact, "group.compress", self.group.compress, allowed)
        self._require_bounded_force()
        self._require_elastic()
        self._require_stop()
        movable = self.device != "cpu" or self.group.name != "nccl"
        allowed = "auto or gloo with device=cpu: NCCL moves CUDA tensors only"
        require(movable, "group", self.group.name, allowed)

    def _require_stop(self) -> None:
        """Refuse to stop a run early where it cannot continue."""
        stop, most, every = self.output.stop_at, self.algorithm.iterations, "checkpoint_every"
        if stop is not None:
            allowed = f"null, or a whole number from 1 to {most}, the iterations of the run"
            require(stop <= most, "output.stop_at", stop, allowed)
            saves = getattr(self.output, every) is not None
            require(saves, f"output.{every}", "null", "a number with output.stop_at")
            other = self.group.elastic or self.group.replay is not None
            require(not other, "output.stop_at", stop, "null with group.elastic or group.replay")

    def _require_elastic(self) -> None:
        """Refuse what cannot work where workers join and leave, or in a replay of such a run."""
        group, strides = self.group, self.algorithm.step_every
        if group.replay is not None:
            group.replay = absolute("group.replay", group.replay)
            require(not group.elastic, "group.elastic", "true", "false with group.replay")
            allowed = "true with group.replay, as in that run: else sums depend on the processes"
            require(self.deterministic, "deterministic", "false", allowed)
            require(self.workers is None, "workers", self.workers, "null with group.replay")
            require(strides is None, "algorithm.step_every", strides, "null with group.replay")
            require(self.resume == "never", "resume", self.resume, "never with group.replay")
        if not group.elastic:
            for name in ("workers_per_process", "min_workers"):
                value = getattr(group, name)
                require(value == 1, f"group.{name}", value, "1 without group.elastic=true")
            return
        name, update, delay = (getattr(self.algorithm, k) for k in ("name", "u_update", "delay"))
        one_each = group.workers_per_process == 1 or not self.deterministic
        partition, full = self.data.partition, "full: shards depend on the number of workers"
        for key, found, good, allowed in (
            ("workers", self.workers, self.workers is None, "null: as many as there are"),
            ("algorithm", name, name not in ALONE, "consensus, or another that couples workers"),
            ("algorithm.u_update", update, update == "gradient", "gradient"),
            ("algorithm.delay", delay, delay == 0, "0"),
            ("algorithm.step_every", strides, strides is None, "null"),
            ("data.partition", partition, partition == "full", full),
            ("group", group.name, group.name != "nccl", "auto, gloo"),
            ("group.sum", group.sum, group.sum == "reduce", "reduce"),
            ("group.compress", group.compress, group.compress is None, "null"),
            ("deterministic", "true", one_each, "false, or group.workers_per_process=1"),
        ):
            require(good, key, found, f"{allowed} with group.elastic=true")

    def _require_bounded_force(self) -> None:
        """Refuse to gather where no force is bounded, or where it would be rounded."""
        if self.group.sum == "reduce":
            return
        name, allowed = self.potential.name, "reduce, or a potential of linear growth such as huber"
        allowed += f": the force of {name} has no bound"
        require("A4" not in self.potential.make().assumptions, "group.sum", "gather", allowed)
        allowed = "null with group.sum=gather, which sends the z_j as they are"
        require(self.group.compress is None, "group.compress", self.group.compress, allowed)
        delay, allowed = self.algorithm.delay, "0 with group.sum=gather"
        require(delay == 0, "algorithm.delay", delay, allowed)

    def _require_representable(self) -> None:
        """Refuse step sizes and factors that overflow the dtype in some iteration."""
        algorithm, kind = self.algorithm, torch.finfo(self.dtype_of_u)
        largest, eta = float(kind.max), self.potential.eta
        low, high = largest**-0.5, float(kind.tiny) ** -0.5  # else 1 / eta^2 is inf or 0
        allowed = f"{low:.2g} to {high:.2g} with dtype={self.dtype}"
        require(low <= eta <= high, "potential.eta", eta, allowed)
        factors = {name: algorithm.factors(name) for name in ("tau", "sigma", "lam")}
        for name, (low, high) in factors.items():
            good = (low > 0 if name == "lam" else low >= 0) and high < math.inf
            allowed = "finite factors > 0" if name == "lam" else "finite factors >= 0"
            found = f"a factor from {low:g} to {high:g}"
            require(good, f"algorithm.schedule.{name}", found, allowed)
        fits = f"{self.dtype}, below {largest:.2g}"
        sigma_low, sigma = (algorithm.sigma * factor for factor in factors["sigma"])
        half = 0.5 * eta * eta
        if algorithm.tau is not None:
            step = algorithm.tau * factors["tau"][1]
        else:
            step = half * (algorithm.outer_rate or 0.0)
            allowed = f"a number for which outer eta^2 fits {fits}"
            require(step < largest, "algorithm.outer", algorithm.outer, allowed)
        if algorithm.lam is not None:
            key, lam, step = "lam", algorithm.lam * factors["lam"][0], max(step, sigma)
            shown, allowed = f"{lam:g}", f"sigma / lam and tau / lam fit {fits}"
        else:
            key, strength = "pull", half * (algorithm.pull or 0.0)
            lam, step = sigma_low / strength if strength else math.inf, max(step, strength, 1.0)
            shown, allowed = f"{algorithm.pull}", f"1 / lam = pull eta^2 / (2 sigma) fits {fits}"
        allowed = f"a number for which {allowed}"
        require(step < largest * min(lam, 1.0), f"algorithm.{key}", shown, allowed)
        nu = algorithm.weight_decay
        require(nu < largest, "algorithm.weight_decay", nu, f"a number that fits {fits}")

    @property
    def dtype_of_u(self) -> torch.dtype:
        """The type of u, of the z_j and of the data."""
        return torch.float64 if self.dtype == "float64" else torch.float32

    @property
    def coupled(self) -> bool:
        """Whether the workers are coupled, so that an envelope exists."""
        algorithm = self.algorithm
        pulled = algorithm.lam is not None and algorithm.lam < math.inf
        between = algorithm.local_pull > 0 and algorithm.period > 1
        pulled = pulled or bool(algorithm.pull) or between
        return algorithm.name not in ALONE and pulled
