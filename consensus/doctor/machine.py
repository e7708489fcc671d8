"""Checks of one machine: cores, limits, devices, data and model, memory, disk."""

import fcntl
import math
import os
import resource
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from consensus.comm import Launch, backends, choose_backend
from consensus.comm.shared_memory import FOLDER, available, num_bytes
from consensus.doctor.finding import Finding, count, fault, warning
from consensus.run.checkpoint.directory import LOCK
from consensus.run.checks import ConfigError
from consensus.run.config import Config
from consensus.run.plan import Plan, bytes_of_measurement, bytes_of_worker, make_plan

CGROUP = Path("/sys/fs/cgroup")


def check_cores(launch: Launch) -> Iterator[Finding]:
    """Threads of all processes on this machine, against its cores."""
    cores, threads, processes = num_cores(), torch.get_num_threads(), launch.local_size
    text = f"{count(processes, 'process')} of {count(threads, 'thread')} on {count(cores, 'core')}"
    if processes * threads <= cores:
        yield Finding("cores", text)
        return
    remedy = f"OMP_NUM_THREADS={max(1, cores // processes)}"
    if processes > cores:
        remedy = f"NPROC={cores}, with the workers dealt out over fewer processes"
    yield warning("cores", f"{text}: they take each other's time", remedy)


def num_cores() -> int:
    """Cores that this process may use: its affinity, and the quota of its container."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = cores or 1
    for folder in _cgroups():
        try:
            quota, period = (folder / "cpu.max").read_text().split()
            cores = min(cores, math.ceil(int(quota) / int(period)))
        except (OSError, ValueError):  # no file, or "max"
            continue
    return max(1, cores)


def check_files(launch: Launch) -> Iterator[Finding]:
    """Limit of open files, thus of connections."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    need = 256 + 8 * launch.size  # Gloo has a connection to every peer, for each of its groups
    if 0 <= soft < need:
        text = f"a process may open {soft} files, {launch.size} ranks may need {need}"
        yield warning("limits", text, f"ulimit -n {need} before the start")


def check_devices(config: Config, launch: Launch) -> Iterator[Finding]:
    """GPU of this process, and the backend that follows from it."""
    if not torch.cuda.is_available():
        yield _without_gpu(config)
        return
    num_gpus = torch.cuda.device_count()
    index = launch.local_rank % num_gpus
    gpu = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    room = f"{free / 2**30:.0f} of {total / 2**30:.0f} GiB"
    text = f"{num_gpus} x {gpu.name}, {room} free"
    if config.device == "cpu":
        yield Finding("devices", f"{text}, unused: device=cpu")
        return
    known = torch.cuda.get_arch_list()
    if torch.version.hip is None and not runs_on(known, gpu.major, gpu.minor):
        build = f"torch {torch.__version__} is built for {', '.join(known)}"
        remedy = "another build of torch: an older one for an older GPU, a newer one for a newer"
        yield fault("devices", f"{build}, not for sm_{gpu.major}{gpu.minor}", remedy)
        return
    if total - free > max(0.1 * total, 2 << 30):
        remedy = "nvidia-smi names the processes that hold the rest"
        yield warning("devices", f"GPU {index} has {room} left before the run", remedy)
    backend = choose_backend(config.group.name, torch.device("cuda", index), launch)
    if launch.size > 1 and backend == "gloo":
        processes, gpus = count(launch.local_size, "process"), count(num_gpus, "GPU")
        text = f"{processes} of this node see {gpus}: sums go through the host, over Gloo"
        remedy = "a process for each GPU (NPROC); group=nccl if each process sees one of its own"
        yield warning("devices", text, remedy)
    else:
        yield Finding("devices", f"{text}; {backend if launch.size > 1 else 'one process'}")


def _without_gpu(config: Config) -> Finding:
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    driver = Path("/dev/nvidia0").exists() or Path("/proc/driver/nvidia/version").exists()
    if config.device != "cpu" and driver and not hidden:
        return fault(
            "devices",
            f"this machine has a driver of NVIDIA, but torch {torch.__version__} finds no GPU",
            "a torch built for CUDA, and a driver as new as it asks for (nvidia-smi shows which); "
            "in a container, NVIDIA's runtime (docker run --gpus all)",
        )
    if config.device == "cuda":
        return fault("devices", "device=cuda, but there is no GPU here", "device=cpu, or auto")
    return Finding("devices", f"no GPU; torch has {', '.join(backends())}")


def runs_on(known: Sequence[str], major: int, minor: int) -> bool:
    """Whether code built for these architectures runs on a GPU of this compute capability.

    sm_80 runs on 8.0 and later 8.x, sm_90a on 9.0 alone. compute_90 is compiled when it is loaded,
    and runs on 9.0 and later.
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
    data, layout = plan.dataset, plan.risk.layout
    text = (
        f"{config.data.name}, {len(data.train_labels):,} images to train and "
        f"{len(data.test_labels):,} to test; {count(plan.num_workers, 'worker')}, the smallest "
        f"shard {min(plan.shard_sizes):,}"
    )
    model = f"{config.model.name}, n = {layout.size:,}, L = {len(layout.layers)}"
    return plan, [Finding("data", text), Finding("model", model)]


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
    text = f"{_bytes(left)} left; z, v and gradients of the workers of {where}: {_bytes(need)}"
    remedy = "fewer workers on a node, or nodes with more memory"
    if beside := bytes_of_measurement(plan.config, plan.model):
        beside *= 1 if plan.config.data.partition == "full" else processes
        text += f"; to measure the stationarity: {_bytes(beside)}"
        remedy += ", or stationarity.every=null"
    yield fault("memory", text, remedy) if need + beside > left else Finding("memory", text)
    if plan.device.type == "cpu" and plan.launch.size == plan.launch.local_size > 1:
        yield from _check_shared_memory(plan)


def memory_left() -> int | None:
    """Bytes that this machine, or the container, has left; None if unknown."""
    left = None
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        left = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvail"))
    except (OSError, ValueError, StopIteration):  # not Linux
        return None
    for folder in _cgroups():
        try:
            limit = int((folder / "memory.max").read_text())
            used = int((folder / "memory.current").read_text())
            lines = (folder / "memory.stat").read_text().splitlines()
            # The page cache is released when memory is needed.
            used -= sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
        except (OSError, ValueError):  # no limit there
            continue
        left = min(left, max(0, limit - used))
    return left


def _cgroups() -> Iterator[Path]:
    """Control groups (version 2) of this process, from its own upwards."""
    own = ""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        own = next(line[3:] for line in lines if line.startswith("0::")).strip("/")
    except (OSError, StopIteration):
        pass
    path = CGROUP / own
    while path != CGROUP and CGROUP in path.parents:
        yield path
        path = path.parent
    yield CGROUP


def _check_shared_memory(plan: Plan) -> Iterator[Finding]:
    if not plan.config.group.shared_memory:
        return
    if not available():
        yield Finding("memory", "sums go through Gloo: this machine cannot form them in memory")
        return
    need = num_bytes(plan.launch.size, plan.risk.layout.size, plan.start.dtype)
    free = shutil.disk_usage(FOLDER).free
    text = f"{FOLDER} has {_bytes(free)} free, the sum of line 3 takes {_bytes(need)}"
    if free >= need:
        yield Finding("memory", text)
        return
    remedy = "docker run --shm-size=1g; in Kubernetes an emptyDir of medium Memory at that place"
    yield warning("memory", f"{text}: it will go through Gloo, which is slower", remedy)


def check_disk(config: Config, plan: Plan | None) -> Iterator[Finding]:
    """Room and permission for the files of a run."""
    folder, elsewhere = _output(config), "output.root=... or output.run_dir=..."
    remedy = f"{elsewhere} on a disk with room, or delete what is there"
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir():
        yield fault("disk", f"{there} is not a folder", elsewhere)
        return
    try:
        status = os.statvfs(there)
    except OSError as error:
        yield fault("disk", f"{there}: {error.strerror}", elsewhere)
        return
    free, need = status.f_bavail * status.f_frsize, room_for_run(config, plan)
    text = f"{there} has {_bytes(free)} free"
    if need:
        text += f", the checkpoints of this run take {_bytes(need)}"
    if not status.f_blocks:  # some file systems do not tell; the check of the folder writes there
        yield Finding("disk", f"the file system of {there} does not tell its free space")
    elif free < max(need, 1):
        yield fault("disk", f"{text}: the disk is full", f"{remedy}; or output.keep_checkpoints=1")
    elif status.f_files and not status.f_favail:
        yield fault("disk", f"{there} has room, but for no more files (inodes)", remedy)
    elif not os.access(there, os.W_OK | os.X_OK):
        user = f"user {os.getuid()}" if hasattr(os, "getuid") else "this user"
        yield fault("disk", f"{there} may not be written to by {user}", remedy)
    elif need and free < 10 * need:
        yield warning("disk", f"{text}: room for few runs", remedy)
    else:
        yield Finding("disk", text)


def check_in_use(config: Config) -> Iterator[Finding]:
    """Whether another run has locked the run directory."""
    if config.output.run_dir is None:
        return
    lock = _output(config) / LOCK
    try:
        with lock.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        text = f"{lock.parent} is in use by a run that goes on"
        yield fault("disk", text, "another output.run_dir, or wait for its end")
    except OSError:  # no run has been there, or there are no locks
        pass


def _output(config: Config) -> Path:
    return Path(config.output.run_dir or config.output.root)


def room_for_run(config: Config, plan: Plan | None) -> int:
    """Largest size of the checkpoints in bytes: those kept, and one that is being written."""
    if plan is None or config.output.checkpoint_every is None:
        return 0
    vectors = 1 + 2 * plan.num_workers  # u, and z and v of each worker
    each = vectors * plan.risk.layout.size * plan.start.element_size()
    return (config.output.keep_checkpoints + 1) * each


def _bytes(number: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.2g} {unit}" if number < 99.5 else f"{number:.0f} {unit}"
        number /= 1000
    return f"{number:.3g} TB"
