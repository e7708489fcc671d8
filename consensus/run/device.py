"""The device of a process: choice, memory limits and determinism."""

import math
import os

import torch
from torch import nn

from consensus.comm import Launch
from consensus.problem import MODELS
from consensus.run.checks import require
from consensus.run.config import Config
from consensus.theory.descent import VECTORS


def choose_device(config: Config, launch: Launch) -> torch.device:
    """The device of this process. Processes share a GPU where there are fewer GPUs than ranks."""
    available = torch.cuda.is_available()
    require(config.device != "cuda" or available, "device", "cuda", "cpu or auto: no CUDA device")
    if config.device == "cpu" or not available:
        return torch.device("cpu")
    return torch.device("cuda", launch.local_rank % torch.cuda.device_count())


def set_determinism(config: Config) -> None:
    """Switch torch's deterministic algorithms of this process on or off."""
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS requires it
    if config.deterministic != torch.are_deterministic_algorithms_enabled():
        # Only on a change: the call imports torch's compiler, which takes seconds.
        torch.use_deterministic_algorithms(config.deterministic)


def memory_of(device: torch.device) -> int:
    """The memory of a device in bytes."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def bytes_of_worker(model: nn.Module) -> int:
    """The bytes that a worker needs for z, v and its gradient."""
    return 3 * _bytes_of_vector(model)


def bytes_of_measurement(config: Config, model: nn.Module) -> int:
    """The bytes that a phi-prox needs (run/stationarity.py); 0 if the run measures none."""
    return VECTORS * _bytes_of_vector(model) if config.stationarity.every is not None else 0


def _bytes_of_vector(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


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
            model = MODELS.make(config.model.name, num_classes=10, **config.model.options)
        bytes_each = bytes_of_worker(model.to(getattr(torch, config.dtype)))
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
