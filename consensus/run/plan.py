"""Everything a run needs that can be refused before a process group opens.

Every rank makes the same plan from the same config, so a mistake is found on all of them alike and
nobody is left waiting. Needs the launch (how many processes) and the data, but no communication.
"""

import math
import os
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from consensus.comm import Launch, choose_backend
from consensus.core.layerwise import Layerwise
from consensus.problem import (
    DATASETS,
    MODELS,
    Dataset,
    DataUnavailableError,
    Minibatches,
    MinibatchRisk,
    Risk,
    build_model,
    partition,
)
from consensus.run.checkpoint.directory import Origin, find_origin
from consensus.run.config import Config, ConfigError, require
from consensus.theory.descent import VECTORS


@dataclass(frozen=True)
class Plan:
    """What is trained, by whom, on which device.

    Attributes:
        config: The run.
        launch: The processes.
        origin: Where the run writes, and from where it continues.
        num_workers: M.
        device: Of this process.
        backend: "gloo" or "nccl"; without meaning for one process.
        dataset: On the device, in the dtype of the run.
        model: The network as a function; its own parameters are the start.
        oracle: Minibatches and gradients for the K workers of this process.
        phi: The layer-wise potential (18).
        shard_sizes: Number of training images of each of the M workers.
    """

    config: Config
    launch: Launch
    origin: Origin
    num_workers: int
    device: torch.device
    backend: str
    dataset: Dataset
    model: nn.Module
    oracle: MinibatchRisk
    phi: Layerwise
    shard_sizes: tuple[int, ...]

    @property
    def risk(self) -> Risk:
        """The data loss."""
        return self.oracle.risk

    @property
    def start(self) -> Tensor:
        """The initial weights, the same for u and all workers. (n,)."""
        return self.risk.layout.flatten(self.model)

    @property
    def local_workers(self) -> range:
        """The j of the workers on this process."""
        return self.launch.block(self.num_workers)

    def epochs(self, iterations: int) -> float:
        """Images drawn over the size of the shard, the mean over workers, after some iterations.

        An epoch of minibatches drops its last partial one, so it is slightly less than 1 here.
        """
        images = iterations * self.config.algorithm.batch_size
        return sum(images / size for size in self.shard_sizes) / len(self.shard_sizes)


def make_plan(config: Config, launch: Launch) -> Plan:
    """Load the data, build the model, deal out the workers.

    Raises:
        ConfigError: If the config asks for what this launch or this data cannot give.
    """
    num_workers = count_workers(config, launch)
    origin = find_origin(config, launch, num_workers)
    device = choose_device(config, launch)
    backend = choose_backend(config.group.name, device, launch)
    require(
        backend != "nccl" or device.type == "cuda",
        "group",
        "nccl",
        "gloo or auto here: NCCL moves CUDA tensors only",
    )
    dtype = getattr(torch, config.dtype)
    options = {"root": config.data.root, **config.data.options}
    try:
        dataset: Dataset = DATASETS.make(config.data.name, **options)
    except DataUnavailableError as error:
        raise ConfigError(str(error)) from error
    except (ValueError, TypeError, OSError) as error:
        raise ConfigError(f"`data` is {config.data.name} {options}: {error}") from error
    dataset = dataset.to(device, dtype)
    options = {"num_classes": dataset.num_classes, **config.model.options}
    try:
        model = build_model(config.model.name, config.seed, dtype, **options).to(device)
        with torch.no_grad():
            logits = model(dataset.test_images[:1])  # do the model and the data fit each other?
        if logits.shape != (1, dataset.num_classes):
            wanted = (1, dataset.num_classes)
            raise ValueError(f"it turns 1 image into {tuple(logits.shape)}, not logits {wanted}")
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise ConfigError(f"`model` is {config.model.name} {options}: {error}") from error
    require_memory(config, model, num_workers // launch.size, device)
    shards = deal_out(config, dataset, num_workers)
    minibatches = [
        Minibatches(shards[j].to(device), config.algorithm.batch_size, config.seed, worker=j)
        for j in launch.block(num_workers)
    ]
    risk = Risk(model, config.algorithm.loss_reduction)  # type: ignore[arg-type]
    return Plan(
        config,
        launch,
        origin,
        num_workers,
        device,
        backend,
        dataset,
        model,
        MinibatchRisk(risk, dataset, minibatches),
        make_phi(config, risk, device, dtype),
        tuple(len(shard) for shard in shards),
    )


def count_workers(config: Config, launch: Launch) -> int:
    """M: the config says how many workers, the launch how many processes."""
    if config.algorithm.name == "msgd":
        require(
            launch.size == 1,
            "algorithm",
            "msgd",
            f"one process, since it is one worker, but there are {launch.size}: start it with "
            "`python -m consensus.train` or --nproc-per-node=1",
        )
        return 1
    num_workers = launch.size if config.workers is None else config.workers
    require(
        num_workers % launch.size == 0,
        "workers",
        num_workers,
        f"a multiple of the {launch.size} processes (WORLD_SIZE), or null for one each",
    )
    return num_workers


def choose_device(config: Config, launch: Launch) -> torch.device:
    """The device of this process; several processes share a GPU where there are too few."""
    available = torch.cuda.is_available()
    require(config.device != "cuda" or available, "device", "cuda", "cpu or auto: no CUDA device")
    if config.device == "cpu" or not available:
        return torch.device("cpu")
    return torch.device("cuda", launch.local_rank % torch.cuda.device_count())


def require_memory(config: Config, model: nn.Module, workers: int, device: torch.device) -> None:
    """Refuse more workers on this process than its memory has room for z, v and gradients of."""
    most = _room_for_workers(config, model, device) // bytes_of_worker(model)
    require(workers <= most, "workers", f"{workers} on one process", _at_most(most))


def require_memory_for_many(config: Config, processes: int, jobs: int) -> None:
    """Refuse runs of so many processes, so many at once, that this machine has no memory for.

    Builds the model without memory for its parameters. A model that cannot be built so, or not at
    all, is left to the run, and so is a number of workers that does not fit the processes.
    """
    try:
        with torch.device("meta"):
            model = MODELS.make(config.model.name, num_classes=10, **config.model.options)
        bytes_each = bytes_of_worker(model.to(getattr(torch, config.dtype)))
        beside = bytes_of_measurement(config, model)
    except Exception:  # a model of a user, which may do anything
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
    """Bytes that are left beside a measurement of the stationarity, if there is one."""
    memory, beside = memory_of(device), bytes_of_measurement(config, model)
    require(
        not beside or beside + bytes_of_worker(model) <= memory,
        "stationarity.every",
        config.stationarity.every,
        f"null for this model: a phi-prox needs {beside:,} bytes of memory, there are {memory:,}",
    )
    return memory - beside


def _at_most(most: int, of: str = "") -> str:
    return f"at most {most}{of}, whose z, v and gradients fit the memory"


def bytes_of_worker(model: nn.Module) -> int:
    """z, v and gradient."""
    return 3 * _bytes_of_vector(model)


def bytes_of_measurement(config: Config, model: nn.Module) -> int:
    """What one phi-prox needs (run/stationarity.py); 0 where none is sought."""
    return VECTORS * _bytes_of_vector(model) if config.stationarity.every is not None else 0


def _bytes_of_vector(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def memory_of(device: torch.device) -> int:
    """Bytes."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def set_determinism(config: Config) -> None:
    """Have torch compute deterministically in this process, or not."""
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
    if config.deterministic != torch.are_deterministic_algorithms_enabled():
        # Only where it changes something: it imports torch's compiler, which takes seconds.
        torch.use_deterministic_algorithms(config.deterministic)


def deal_out(config: Config, dataset: Dataset, num_workers: int) -> list[Tensor]:
    """The training indices of each of the M workers.

    Raises:
        ConfigError: If a shard is smaller than a minibatch. Every rank looks at every shard, so
            that all of them refuse.
    """
    data, batch_size = config.data, config.algorithm.batch_size
    try:
        shards = partition(
            dataset.train_labels.cpu(), data.partition, num_workers, config.seed, data.alpha
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    smallest = min(range(num_workers), key=lambda j: len(shards[j]))
    require(
        batch_size <= len(shards[smallest]),
        "algorithm.batch_size",
        batch_size,
        f"at most {len(shards[smallest])}, the images in the shard of worker {smallest} "
        f"(data.partition={data.partition}, {num_workers} workers)",
    )
    return shards


def make_phi(config: Config, risk: Risk, device: torch.device, dtype: torch.dtype) -> Layerwise:
    """The layer-wise potential over the layers of the model.

    Raises:
        ConfigError: If its numbers do not fit the layers or the dtype.
    """
    try:
        phi = Layerwise(config.potential.make(), risk.layout.layers, config.potential.eta)
    except ValueError as error:
        raise ConfigError(f"`potential.options` is {config.potential.options}: {error}") from error
    phi = phi.to(torch.empty(0, device=device, dtype=dtype))
    origin = torch.zeros(risk.layout.size, device=device, dtype=dtype)
    require(  # a number that overflows gives inf * 0 there
        bool(phi.value(origin).isfinite()) and bool(phi.grad(origin).isfinite().all()),
        "potential",
        f"{config.potential.name} with eta = {config.potential.eta} and {config.potential.options}",
        f"numbers for which phi and its gradient at 0 are finite in {config.dtype}",
    )
    return phi
