"""The plan of a run: everything that can be refused before a process group opens.

Every rank makes the same plan from the same config, the launch and the data, so all ranks find a
mistake alike, and none waits for another.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from consensus.comm import Launch, choose_backend
from consensus.core.layerwise import Layerwise
from consensus.core.profile_checks import mistake_of
from consensus.problem import (
    MODELS,
    NUMBERS_AT_ONCE,
    Dataset,
    MinibatchRisk,
    Risk,
    Trial,
)
from consensus.run.checkpoint.directory import Origin
from consensus.run.checkpoint.resume import find_origin
from consensus.run.checks import ConfigError, require
from consensus.run.config import Config
from consensus.run.config_algorithm import ALONE, as_call
from consensus.run.elastic.log import changes_to_replay
from consensus.run.limits import memory_of
from consensus.run.problem import load_data, make_minibatches, make_model, make_shards
from consensus.theory.descent import VECTORS
from consensus.tree_sum import layouts


@dataclass(frozen=True)
class Plan:
    """The problem, the workers and the device of a run."""

    config: Config
    launch: Launch
    origin: Origin
    num_workers: int  # M
    device: torch.device  # of this process
    backend: str  # "gloo" or "nccl"; meaningless for one process
    dataset: Dataset  # on the device, in the dtype of the run
    model: nn.Module  # the network as a function; its own parameters are the start
    oracle: MinibatchRisk  # minibatches and gradients for the K workers of this process
    phi: Layerwise  # (18)
    shard_sizes: tuple[int, ...]  # training samples of each of the M workers
    trial: Trial  # of the model and the loss
    members: tuple[int, ...] | None = None  # the numbers j of an elastic run; None: 0, ..., M - 1

    @property
    def risk(self) -> Risk:
        """The data loss."""
        return self.oracle.risk

    @property
    def start(self) -> Tensor:
        """The initial weights of u and of all workers. (n,)."""
        return self.risk.layout.flatten(self.model)

    @property
    def local_workers(self) -> range:
        """The places of the workers of this process among all M."""
        return self.launch.block(self.num_workers)

    @property
    def numbers(self) -> Sequence[int]:
        """The number j of each worker, in the order of places."""
        return range(self.num_workers) if self.members is None else self.members

    @property
    def own_numbers(self) -> list[int]:
        """The numbers j of the workers of this process."""
        return [self.numbers[place] for place in self.local_workers]

    @property
    def evaluation_shares(self) -> tuple[int, Sequence[int]]:
        """The number of shares of each set of samples, and those that this process evaluates.

        One for each process; if deterministic, one for each worker, on every layout.
        """
        if self.config.deterministic:
            return self.num_workers, self.local_workers
        return self.launch.size, [self.launch.rank]

    def epochs(self, iterations: int) -> float:
        """Samples drawn over the size of the shard, the mean over workers, after some iterations.

        An epoch of minibatches drops its last partial one, so it is slightly less than 1 here.
        """
        samples = iterations * self.config.algorithm.batch_size
        strides = self.config.algorithm.strides(self.num_workers)
        own = (samples / n / size for n, size in zip(strides, self.shard_sizes, strict=True))
        return sum(own) / self.num_workers

    def description(self) -> str:
        """One line: the method, the workers, the processes, the model, the data, the coupling."""
        config, layout, size = self.config, self.risk.layout, self.launch.size
        where = f"{size} processes" if size > 1 else "1 process"
        where += f" on {self.device}" + (f" over {self.backend}" if size > 1 else "")
        optimizer = config.algorithm.optimizer
        step = "" if optimizer is None else f", {as_call(optimizer)}"
        return (
            f"{config.algorithm.name} with {config.potential.name}: {self.num_workers} worker"
            f"{'s' if self.num_workers > 1 else ''}, {where}, {config.model.name} "
            f"(n = {layout.size:,}, L = {len(layout.layers)}) on {config.data.name}, "
            f"{config.algorithm.iterations:,} iterations{step}{self._rates()}"
        )

    def _rates(self) -> str:
        """The coupling as rates (run/build.py), without the factors of schedules."""
        algorithm, eta = self.config.algorithm, self.config.potential.eta
        if not self.config.coupled:
            return ""
        pull, outer, lam = algorithm.pull, algorithm.outer_rate, algorithm.lam
        if pull is None and lam is not None:
            pull = 2.0 * algorithm.sigma / lam / eta / eta
        if outer is None and algorithm.tau is not None:
            summed = 1 if algorithm.tau_per_worker else self.num_workers
            outer = 2.0 * summed * algorithm.tau / eta / eta
            if algorithm.u_step_on == "objective":
                outer *= 0.5 * (pull or 0.0) * eta * eta / algorithm.sigma
        of_u = "u exact" if algorithm.u_update == "exact" else f"outer {outer:.3g}"
        if isinstance(algorithm.outer, dict):
            of_u = f"outer {as_call(algorithm.outer)}"
        rates = ["", f"pull {pull:.3g}", of_u]
        if algorithm.local_pull:
            rates.append(f"local_pull {algorithm.local_pull:.3g}")
        rates += [f"period {algorithm.period}"] if algorithm.period > 1 else []
        rates += [f"delay {algorithm.delay}"] if algorithm.delay else []
        rates += [f"step_every {algorithm.step_every}"] if algorithm.step_every else []
        return ", ".join(rates)

    def remarks(self) -> list[str]:
        """Lines about options that have no effect on this run, its workers and the model."""
        config, lines = self.config, list(self.dataset.remarks)
        if config.algorithm.local_pull and config.algorithm.period == 1:
            lines.append("algorithm.local_pull has no effect: with period=1 there is no between")
        if config.data.loader_workers and self.dataset.in_memory:
            lines.append("data.loader_workers has no effect: the samples are in memory")
        if config.group.sum == "gather":
            lines.append(self._bytes_of_gather())
        if config.workers not in (None, self.num_workers):
            lines.append(f"workers={config.workers} has no effect: mSGD is one worker")
        if config.stationarity.every is not None and not config.coupled:
            why = "without a coupling there is no envelope"
            lines.append(f"stationarity.every has no effect: {why}")
        alone = config.workers is None and self.num_workers == self.launch.size == 1
        if alone and config.algorithm.name not in ALONE:
            how = "workers=4, or four processes (torchrun --nproc-per-node=4), train four"
            lines.append(f"one worker is coupled to itself alone: {how}")
        if self.risk.random_evaluation:
            why = "draws random numbers in evaluation mode too, always the same ones"
            lines.append(f"model {config.model.name} {why}: is `training=self.training` missing?")
        if unused := self.trial.unused:
            more = f" and {len(unused) - 1} more" if len(unused) > 1 else ""
            lines.append(f"parameter {unused[0]}{more} has no gradient: the loss does not use it")
        return lines

    def _bytes_of_gather(self) -> str:
        """A line with the bytes of group.sum=gather beside those of an all-reduce."""
        size, vector = self.launch.size, self.start.nbytes
        if size == 1:
            return "group.sum has no effect: one process sends nothing"
        gathered = (self.num_workers - len(self.local_workers)) * vector / 1e6
        reduced = 2 * (size - 1) / size * vector / 1e6
        both = f"{gathered:.3g} MB in each communication, in an all-reduce {reduced:.3g} MB"
        return f"group.sum=gather: each process receives {both}"


def make_plan(config: Config, launch: Launch) -> Plan:
    """Load the data, build the model and assign the data to the workers, or raise ConfigError."""
    num_workers = count_workers(config, launch)
    members = changes_to_replay(path)[0].workers if (path := config.group.replay) else None
    elastic = config.group.elastic  # then the origin is found when the members have met
    origin = Origin() if elastic else find_origin(config, launch, num_workers)
    device = choose_device(config, launch)
    backend = "gloo" if elastic else choose_backend(config.group.name, device, launch)
    gpu, nccl, rounding = device.type == "cuda", backend == "nccl", config.group.compress
    require(gpu or not nccl, "group", "nccl", "gloo or auto here: NCCL moves CUDA tensors only")
    require(not gpu or rounding != "int8", "group.compress", rounding, "null or bf16 on a GPU")
    dtype = config.dtype_of_u
    dataset = load_data(config).to(device, dtype)
    loss = config.loss.make()
    model, trial = make_model(config, dataset, loss)
    require_memory(config, model, num_workers // launch.size, device)
    shards = make_shards(config, dataset, num_workers)
    own = launch.block(num_workers)
    minibatches = make_minibatches(config, shards, members or range(num_workers), own, device)
    risk = Risk(model, config.algorithm.loss_reduction, loss)  # type: ignore[arg-type]
    oracle = MinibatchRisk(risk, dataset, minibatches)
    allowed = f"false with model={config.model.name}, whose running statistics a member would lack"
    require(not (elastic and oracle.running), "group.elastic", "true", allowed)
    kept = config.algorithm.on_nonfinite == "stop" or not oracle.running
    allowed = f"stop with model={config.model.name}, whose running statistics would stay non-finite"
    require(kept, "algorithm.on_nonfinite", "drop", allowed)
    risk.low_precision = config.dtype == "bfloat16"
    risk.at_once = max(1, min(risk.at_once, NUMBERS_AT_ONCE // trial.numbers))
    return Plan(
        config,
        launch,
        origin,
        num_workers,
        device,
        backend,
        dataset,
        model,
        oracle,
        make_phi(config, risk, device, dtype),
        tuple(len(shard) for shard in shards),
        trial,
        members,
    )


def count_workers(config: Config, launch: Launch) -> int:
    """M, from the number of workers in the config and the number of processes of the launch."""
    if config.algorithm.name == "msgd":
        allowed = (
            f"one process, since it is one worker, but there are {launch.size}: start it with "
            "`python -m consensus.train` or --nproc-per-node=1"
        )
        require(launch.size == 1, "algorithm", "msgd", allowed)
        return 1
    if config.group.elastic:
        return launch.size * config.group.workers_per_process
    if config.group.replay is not None:
        allowed = "null under torchrun: a replay is one process"
        require(launch.size == 1, "group.replay", config.group.replay, allowed)
        return len(changes_to_replay(config.group.replay)[0].workers)
    num_workers = launch.size if config.workers is None else config.workers
    allowed = f"a multiple of the {launch.size} processes (WORLD_SIZE), or null for one each"
    require(num_workers % launch.size == 0, "workers", num_workers, allowed)
    if config.deterministic:
        *others, last = map(str, layouts(num_workers))
        counts = f"{', '.join(others)} or {last}" if others else last
        allowed = f"with deterministic=true on {counts} processes, not {launch.size} (tree_sum.py)"
        require(str(launch.size) in [*others, last], "workers", num_workers, allowed)
    return num_workers


def make_phi(config: Config, risk: Risk, device: torch.device, dtype: torch.dtype) -> Layerwise:
    """The layer-wise potential over the layers of the model."""
    potential = config.potential
    made = potential.make()
    if mistake := mistake_of(made.profile):
        raise ConfigError(f"`potential` is {potential.name} {potential.options}: {mistake}")
    try:
        phi = Layerwise(made, risk.layout.layers, potential.eta)
    except ValueError as error:
        raise ConfigError(f"`potential.options` is {potential.options}: {error}") from error
    origin = torch.zeros(risk.layout.size, device=device, dtype=dtype)
    phi = phi.to(origin)
    # A number that overflows gives inf * 0 there.
    finite = bool(phi.value(origin).isfinite()) and bool(phi.grad(origin).isfinite().all())
    found = f"{potential.name} with eta = {potential.eta} and {potential.options}"
    allowed = f"numbers for which phi and its gradient at 0 are finite in {config.dtype}"
    require(finite, "potential", found, allowed)
    return phi


def choose_device(config: Config, launch: Launch) -> torch.device:
    """The device of this process. Processes share a GPU where there are fewer GPUs than ranks."""
    available = torch.cuda.is_available()
    require(config.device != "cuda" or available, "device", "cuda", "cpu or auto: no CUDA device")
    if config.device == "cpu" or not available:
        return torch.device("cpu")
    return torch.device("cuda", launch.local_rank % torch.cuda.device_count())


def set_determinism(config: Config) -> None:
    """Switch torch's deterministic algorithms of this process on or off.

    On, with one thread: products and convolutions add in another order with another number of them.
    """
    if config.deterministic:
        torch.set_num_threads(1)
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS requires it
    if config.deterministic != torch.are_deterministic_algorithms_enabled():
        # Only on a change: the call imports torch's compiler, which takes seconds.
        torch.use_deterministic_algorithms(config.deterministic)


def bytes_of_worker(model: nn.Module) -> int:
    """The bytes that a worker needs for z, v and its gradient."""
    return 3 * _bytes_of_vector(model)


def bytes_of_measurement(config: Config, model: nn.Module) -> int:
    """The bytes that a phi-prox needs (run/stationarity.py); 0 if the run measures none."""
    return VECTORS * _bytes_of_vector(model) if config.stationarity.every is not None else 0


def _bytes_of_vector(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


def require_memory(config: Config, model: nn.Module, workers: int, device: torch.device) -> None:
    """Refuse more workers on this process than its memory can hold."""
    most = _room_for_workers(config, model, device) // bytes_of_worker(model)
    require(workers <= most, "workers", f"{workers} on one process", _at_most(most))


def require_memory_for_many(config: Config, processes: int, jobs: int) -> None:
    """Refuse `jobs` concurrent runs, of some processes each, that exceed this machine's memory.

    Builds the model on the meta device. A model that cannot be built there is left to the run, and
    so is a number of workers that is no multiple of the processes.
    """
    try:
        with torch.device("meta"):
            name, options = config.model.name, config.model.options
            model = MODELS.make(name, **MODELS.completed(name, options, num_classes=10))
        bytes_each = bytes_of_worker(model.to(config.dtype_of_u))
        beside = bytes_of_measurement(config, model)
    except Exception:  # a user's model may do anything
        return
    if not bytes_each:  # no parameters, which the run refuses
        return
    device = choose_device(config, Launch())
    devices = torch.cuda.device_count() if device.type == "cuda" else 1
    room = _room_for_workers(config, model, device) // bytes_each
    workers = processes if config.workers is None else config.workers
    if config.algorithm.name == "msgd":
        workers = 1
    share = math.ceil(processes / devices)  # of the processes, on one device
    most = room // share * processes
    require(workers <= most, "workers", workers, _at_most(most))
    if jobs > 1:  # each run has one of the devices
        most = memory_of(device) // (workers * bytes_each + beside) * devices
        require(jobs <= most, "sweep.jobs", jobs, _at_most(most, f" of {workers} workers each"))


def _room_for_workers(config: Config, model: nn.Module, device: torch.device) -> int:
    """The bytes that a measurement of the stationarity leaves for workers."""
    memory, beside = memory_of(device), bytes_of_measurement(config, model)
    fits = not beside or beside + bytes_of_worker(model) <= memory
    needs = f"a phi-prox needs {beside:,} bytes of memory, there are {memory:,}"
    every = config.stationarity.every
    require(fits, "stationarity.every", every, f"null for this model: {needs}")
    return memory - beside


def _at_most(most: int, of: str = "") -> str:
    return f"at most {most}{of}, whose z, v and gradients fit the memory"
