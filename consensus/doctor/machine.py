"""Checks of one machine: versions, cores, limits, devices, data and model, memory."""

import hashlib
import math
import os
import platform
import resource
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib import import_module, metadata
from pathlib import Path

import torch

from consensus.comm import Launch, backends, choose_backend
from consensus.comm.shared_memory import FOLDER, available, num_bytes
from consensus.doctor.finding import Finding, amount, count, fault, run_check, unexpected, warning
from consensus.doctor.folder import check_disk, check_in_use
from consensus.doctor.step_size import meaning
from consensus.run.checks import ConfigError
from consensus.run.config import Config
from consensus.run.limits import control_groups, memory_limits
from consensus.run.plan import (
    Plan,
    bytes_of_measurement,
    bytes_of_worker,
    make_plan,
    set_determinism,
)
from consensus.run.yaml_files import config_dir

PACKAGES = ("torch", "torchvision", "numpy", "hydra-core", "omegaconf", "scikit-learn")
MUST_AGREE = ("python", "torch", "cuda", "nccl", "consensus")
"""Versions that must be equal on all ranks: others may hang or give different bits of u."""


def check_machine(config: Config, launch: Launch) -> tuple[Plan | None, list[Finding]]:
    """The plan of this process, and findings that need no other; of a node by its first rank."""
    if launch.rank == 0:
        print(f"consensus.doctor: {count(launch.size, 'process')}", flush=True)
    set_determinism(config)
    findings = run_check("versions", check_software)
    findings += run_check("devices", check_devices, config, launch)
    if launch.local_rank == 0:
        findings += run_check("cores", check_cores, launch)
        findings += run_check("limits", check_files, launch)
    if launch.rank == 0:
        findings += run_check("disk", check_in_use, config)
    plan, seen = check_plan(config, launch)
    findings += seen
    if launch.local_rank == 0:
        if plan is not None:
            findings += run_check("memory", check_memory, plan)
        findings += run_check("disk", check_disk, config, plan)
    return plan, findings


def versions() -> dict[str, str]:
    """Versions by name; of consensus a digest of its code."""
    code = hashlib.sha256()
    for folder, pattern in ((Path(__file__).parents[1], "*.py"), (Path(config_dir()), "*.yaml")):
        for path in sorted(folder.rglob(pattern)):
            code.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    found = {"python": platform.python_version(), "consensus": code.hexdigest()[:12]}
    for name in PACKAGES:
        found[name] = "absent"
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    found["torch"] = torch.__version__  # with the build, such as +cu132 or +cpu
    found["cuda"] = str(torch.version.cuda or torch.version.hip or "none")
    found["nccl"] = "none"
    if "nccl" in backends():  # also where no GPU is visible; `check_devices` reports that
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def check_software() -> Iterator[Finding]:
    """Versions, and whether torchvision fits torch."""
    found = versions()
    shown = [f"{name} {found[name]}" for name in ("python", "torch", "torchvision", "hydra-core")]
    yield Finding("versions", f"{', '.join(shown)}, consensus {found['consensus']}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import_module("torchvision")
    except Exception as error:  # builds that do not fit raise errors of any type
        text = f"torchvision {found['torchvision']} does not work with torch {found['torch']}"
        remedy = "install both at once: scripts/setup, or `uv pip install torch torchvision`"
        yield fault("versions", f"{text} ({error})", remedy)


def compare_versions(found: Sequence[dict[str, str]], index: int) -> Iterator[Finding]:
    """Differences between a member and the first, of the `versions` of all."""
    if all(other == found[0] for other in found):
        yield Finding("versions", "the same everywhere")
    how = "scripts/setup makes it from requirements.lock"
    remedy = f"the same checkout and the same environment on every node ({how}), best on a folder "
    remedy += "that all of them see; CONSENSUS_VENV names one"
    for name in sorted(found[index].keys() | found[0].keys()):
        here, there = (found[i].get(name, "absent") for i in (index, 0))
        if here == there:
            continue
        text = f"{name} is {here} here and {there} on the first"
        if name == "consensus":
            text = f"the code of consensus is not that of the first ({here}, {there})"
        patch = name == "python" and here.split(".")[:2] == there.split(".")[:2]
        kind = fault if name in MUST_AGREE and not patch else warning
        yield kind("versions", text, remedy)


def check_cores(launch: Launch) -> list[Finding]:
    """Threads of all processes on this machine, against its cores."""
    cores, threads, processes = num_cores(), torch.get_num_threads(), launch.local_size
    text = f"{count(processes, 'process')} of {count(threads, 'thread')} on {count(cores, 'core')}"
    if processes * threads <= cores:
        return [Finding("cores", text)]
    remedy = f"OMP_NUM_THREADS={max(1, cores // processes)}"
    if processes > cores:
        remedy = f"NPROC={cores}, with the workers dealt out over fewer processes"
    return [warning("cores", f"{text}: they take each other's time", remedy)]


def num_cores() -> int:
    """Cores that this process may use: its affinity, and the quota of its container."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = cores or 1
    for folder in control_groups():
        with suppress(OSError, ValueError):  # no file, or "max"
            quota, period = (folder / "cpu.max").read_text().split()
            cores = min(cores, math.ceil(int(quota) / int(period)))
    return max(1, cores)


def check_files(launch: Launch) -> Iterator[Finding]:
    """Limit of open files, thus of connections."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    need = 256 + 8 * launch.size  # Gloo has a connection to every peer, for each of its groups
    if 0 <= soft < need:
        text = f"a process may open {soft} files, {launch.size} ranks may need {need}"
        yield warning("limits", text, f"ulimit -n {need} before the start")


def check_devices(config: Config, launch: Launch) -> list[Finding]:
    """GPU of this process, and the backend that follows from it."""
    if not torch.cuda.is_available():
        return [_without_gpu(config)]
    num_gpus = torch.cuda.device_count()
    index = launch.local_rank % num_gpus
    gpu = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    room = f"{free / 2**30:.0f} of {total / 2**30:.0f} GiB"
    text = f"{num_gpus} x {gpu.name}, {room} free"
    if config.device == "cpu":
        return [Finding("devices", f"{text}, unused: device=cpu")]
    known = torch.cuda.get_arch_list()
    if torch.version.hip is None and not runs_on(known, gpu.major, gpu.minor):
        build = f"torch {torch.__version__} is built for {', '.join(known)}"
        remedy = "another build of torch: an older one for an older GPU, a newer one for a newer"
        return [fault("devices", f"{build}, not for sm_{gpu.major}{gpu.minor}", remedy)]
    findings = []
    if total - free > max(0.1 * total, 2 << 30):
        remedy = "nvidia-smi names the processes that hold the rest"
        findings.append(warning("devices", f"GPU {index} has {room} left before the run", remedy))
    backend = choose_backend(config.group.name, torch.device("cuda", index), launch)
    if launch.size > 1 and backend == "gloo":
        processes, gpus = count(launch.local_size, "process"), count(num_gpus, "GPU")
        text = f"{processes} of this node see {gpus}: sums go through the host, over Gloo"
        remedy = "a process for each GPU (NPROC); group=nccl if each process sees one of its own"
        return [*findings, warning("devices", text, remedy)]
    where = backend if launch.size > 1 else "one process"
    return [*findings, Finding("devices", f"{text}; {where}")]


def _without_gpu(config: Config) -> Finding:
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    driver = Path("/dev/nvidia0").exists() or Path("/proc/driver/nvidia/version").exists()
    if config.device != "cpu" and driver and not hidden:
        text = f"this machine has a driver of NVIDIA, but torch {torch.__version__} finds no GPU"
        remedy = "a torch built for CUDA, and a driver as new as it asks for "
        remedy += (
            "(nvidia-smi shows which); in a container, NVIDIA's runtime (docker run --gpus all)"
        )
        return fault("devices", text, remedy)
    if config.device == "cuda":
        return fault("devices", "device=cuda, but there is no GPU here", "device=cpu, or auto")
    return Finding("devices", f"no GPU; torch has {', '.join(backends())}")


def runs_on(known: Sequence[str], major: int, minor: int) -> bool:
    """Whether code built for these architectures runs on a GPU of this compute capability.

    sm_80 runs on 8.0 and later 8.x, sm_90a on 9.0 alone, compute_90 (compiled here) from 9.0 on.
    """
    for architecture in known:
        kind, _, text = architecture.partition("_")
        number = int("".join(filter(str.isdigit, text)) or 0)
        same, least = number // 10 == major, number <= 10 * major + minor
        exactly = text.endswith("a")
        if kind == "sm" and (number == 10 * major + minor if exactly else same and least):
            return True
        if kind == "compute" and least and not exactly:
            return True
    return not known


def check_plan(config: Config, launch: Launch) -> tuple[Plan | None, list[Finding]]:
    """Data, model, workers and resume: the errors of a run before it opens its group."""
    try:
        plan = make_plan(config, launch)
    except ConfigError as error:
        topic = str(error).split("`")[1].partition(".")[0] if "`" in str(error) else "config"
        return None, [fault(topic, str(error), "")]
    except Exception as error:  # as in `run_check`, whose checks return findings only
        return None, [unexpected("config", error)]
    data, layout = plan.dataset, plan.risk.layout
    verbs = {"train": "samples to train", "validation": "to validate", "test": "to test"}
    text = ", ".join(f"{len(samples):,} {verbs[name]}" for name, samples in data.splits.items())
    text = f"{config.data.name}, {text}; {count(plan.num_workers, 'worker')}"
    text += f", the smallest shard {min(plan.shard_sizes):,}"
    model = f"{config.model.name}, n = {layout.size:,}, L = {len(layout.layers)}"
    sigma = f"{meaning(config)}; step_size=true tries others"
    return plan, [Finding("data", text), Finding("model", model), Finding("sigma", sigma)]


def check_memory(plan: Plan) -> Iterator[Finding]:
    """Memory for the workers of this node, or of this GPU."""
    if plan.device.type == "cuda":
        processes = math.ceil(plan.launch.local_size / torch.cuda.device_count())
        left: int | None = torch.cuda.mem_get_info(plan.device)[0]
        where = f"GPU {plan.device.index}"
    else:
        processes = plan.launch.local_size
        left, where = memory_left(), "this node"
    if left is None:
        return
    need = bytes_of_worker(plan.model) * len(plan.local_workers) * processes
    text = f"{amount(left)} left; z, v and gradients of the workers of {where}: {amount(need)}"
    remedy = "fewer workers on a node, or nodes with more memory"
    if beside := bytes_of_measurement(plan.config, plan.model):
        beside *= 1 if plan.config.data.partition == "full" else processes
        text += f"; to measure the stationarity: {amount(beside)}"
        remedy += ", or stationarity.every=null"
    yield fault("memory", text, remedy) if need + beside > left else Finding("memory", text)
    together = plan.launch.size == plan.launch.local_size > 1
    if plan.device.type != "cpu" or not together or not plan.config.group.shared_memory:
        return
    if not available():
        yield Finding("memory", "sums go through Gloo: this machine cannot form them in memory")
        return
    need = num_bytes(plan.launch.size, plan.risk.layout.size, plan.start.dtype)
    free = shutil.disk_usage(FOLDER).free
    text = f"{FOLDER} has {amount(free)} free, the sum of line 3 takes {amount(need)}"
    slower = f"{text}: it will go through Gloo, which is slower"
    remedy = "docker run --shm-size=1g; in Kubernetes an emptyDir of medium Memory at that place"
    yield Finding("memory", text) if free >= need else warning("memory", slower, remedy)


def memory_left() -> int | None:
    """Bytes that this machine, or the container, has left; None if unknown."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        left = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvail"))
    except (OSError, ValueError, StopIteration):  # not Linux
        return None
    for limit, used in memory_limits():
        left = min(left, max(0, limit - used))
    return left
