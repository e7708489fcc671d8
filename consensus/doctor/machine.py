"""What can be seen on one machine alone: software, cores, devices, memory, disk, the plan."""

import fcntl
import hashlib
import importlib
import importlib.metadata
import math
import os
import platform
import resource
import shutil
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from consensus.comm import Launch, backends, choose_backend
from consensus.comm.shared_memory import FOLDER, available, num_bytes
from consensus.doctor.finding import Finding, fault, warning
from consensus.run.checkpoint.directory import LOCK
from consensus.run.compose import config_dir
from consensus.run.config import Config, ConfigError
from consensus.run.plan import Plan, bytes_of_measurement, bytes_of_worker, make_plan

PACKAGES = ("torch", "torchvision", "numpy", "hydra-core", "omegaconf", "scikit-learn")
MUST_AGREE = ("python", "torch", "cuda", "nccl", "consensus")
"""Where ranks that differ in it may hang, or hold different bits of u."""

PACKAGE = Path(__file__).resolve().parents[1]
CGROUP = Path("/sys/fs/cgroup")


def versions() -> dict[str, str]:
    """What runs here, name -> version; of our own code a digest."""
    found = {"python": platform.python_version(), "consensus": _digest_of_code()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    found["torch"] = torch.__version__  # with the build, such as +cu132 or +cpu
    found["cuda"] = str(torch.version.cuda or torch.version.hip or "none")
    found["nccl"] = "none"
    if "nccl" in backends():  # also where the GPU is not seen, which is another matter
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def _digest_of_code() -> str:
    code = hashlib.sha256()
    for folder, pattern in ((PACKAGE, "*.py"), (Path(config_dir()), "*.yaml")):
        for path in sorted(folder.rglob(pattern)):
            code.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return code.hexdigest()[:12]


def compare_versions(found: Sequence[dict[str, str]], index: int) -> Iterator[Finding]:
    """What differs here from the first member.

    Args:
        found: The `versions` of all members.
        index: Of this one.
    """
    if all(other == found[0] for other in found):
        yield Finding("versions", "the same everywhere")
    for name in sorted(found[index].keys() | found[0].keys()):
        here, there = (found[i].get(name, "absent") for i in (index, 0))
        if here == there:
            continue
        text = f"{name} is {here} here and {there} on the first"
        if name == "consensus":
            text = f"the code of consensus is not that of the first ({here}, {there})"
        patch = name == "python" and here.split(".")[:2] == there.split(".")[:2]
        kind = fault if name in MUST_AGREE and not patch else warning
        yield kind(
            "versions",
            text,
            "the same checkout and the same environment on every node (scripts/setup makes it from "
            "requirements.lock), best on a folder that all of them see; CONSENSUS_VENV names one",
        )


def check_software() -> Iterator[Finding]:
    """Whether what torch comes with fits it."""
    found = versions()
    shown = [f"{name} {found[name]}" for name in ("python", "torch", "torchvision", "hydra-core")]
    yield Finding("versions", f"{', '.join(shown)}, consensus {found['consensus']}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module("torchvision")
    except Exception as error:  # two builds that do not fit raise whatever they come to
        yield fault(
            "versions",
            f"torchvision {found['torchvision']} does not work with torch {found['torch']} "
            f"({error})",
            "install both at once, from the same place: scripts/setup, or "
            "`uv pip install torch torchvision`",
        )


def check_cores(launch: Launch) -> Iterator[Finding]:
    """Threads of all processes of this machine against its cores."""
    cores, threads = cores_here(), torch.get_num_threads()
    text = (
        f"{_of(launch.local_size, 'process')} of {_of(threads, 'thread')} on {_of(cores, 'core')}"
    )
    wanted = launch.local_size * threads
    if wanted > cores:
        fitting = max(1, cores // launch.local_size)
        yield warning(
            "cores",
            f"{text}: they take each other's time",
            f"OMP_NUM_THREADS={fitting}"
            if launch.local_size <= cores
            else f"NPROC={cores}, with the workers dealt out over fewer processes",
        )
    else:
        yield Finding("cores", text)


def cores_here() -> int:
    """That this process may use: its affinity, and the quota of its container."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = cores or 1
    for folder in _cgroups():
        try:
            quota, period = (folder / "cpu.max").read_text().split()
            cores = min(cores, math.ceil(int(quota) / int(period)))
        except (OSError, ValueError):  # none, or "max"
            continue
    return max(1, cores)


def check_devices(config: Config, launch: Launch) -> Iterator[Finding]:
    """GPUs and the backend that follows from them."""
    remedy_of_driver = (
        "a torch built for CUDA, and a driver as new as it asks for (nvidia-smi says which); in a "
        "container, NVIDIA's runtime (docker run --gpus all)"
    )
    if not torch.cuda.is_available():
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
        driver = Path("/dev/nvidia0").exists() or Path("/proc/driver/nvidia/version").exists()
        if config.device != "cpu" and driver and not hidden:
            yield fault(
                "devices",
                f"this machine has a driver of NVIDIA, but torch {torch.__version__} finds no GPU",
                remedy_of_driver,
            )
        elif config.device == "cuda":
            yield fault("devices", "device=cuda, but there is no GPU here", "device=cpu, or auto")
        else:
            yield Finding("devices", f"no GPU; torch has {', '.join(backends())}")
        return
    count = torch.cuda.device_count()
    index = launch.local_rank % count
    properties = torch.cuda.get_device_properties(index)
    capability = f"sm_{properties.major}{properties.minor}"
    free, total = torch.cuda.mem_get_info(index)
    text = f"{count} x {properties.name}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free"
    if config.device == "cpu":
        yield Finding("devices", f"{text}, unused: device=cpu")
        return
    known = torch.cuda.get_arch_list()
    if torch.version.hip is None and not runs_on(known, properties.major, properties.minor):
        yield fault(
            "devices",
            f"torch {torch.__version__} is built for {', '.join(known)}, not for {capability}",
            "another build of torch: an older one for an older GPU, a newer one for a newer",
        )
        return
    if total - free > max(0.1 * total, 2 << 30):
        yield warning(
            "devices",
            f"GPU {index} has {free / 2**30:.0f} of {total / 2**30:.0f} GiB left before the run",
            "nvidia-smi names the processes that hold the rest",
        )
    backend = choose_backend(config.group.name, torch.device("cuda", index), launch)
    if launch.size > 1 and backend == "gloo":
        yield warning(
            "devices",
            f"{_of(launch.local_size, 'process')} of this node see {_of(count, 'GPU')}: sums go "
            "through the host, over Gloo",
            "a process for each GPU (NPROC), or, where each process is shown one of its own, "
            "group=nccl",
        )
    else:
        yield Finding("devices", f"{text}; {backend if launch.size > 1 else 'one process'}")


def runs_on(known: Sequence[str], major: int, minor: int) -> bool:
    """Whether code that is built for these architectures runs on a GPU of this capability.

    Of sm_80 on 8.0 and later 8.x; of sm_90a on 9.0 alone; of compute_90, which is compiled when it
    is loaded, on everything from 9.0 on.
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
    """Data, model, workers, resume: what a run would refuse before it opens its group."""
    try:
        plan = make_plan(config, launch)
    except ConfigError as error:
        topic = str(error).split("`")[1].partition(".")[0] if "`" in str(error) else "config"
        return None, [fault(topic, str(error), "")]
    data, layout = plan.dataset, plan.risk.layout
    seen = [
        Finding(
            "data",
            f"{config.data.name}, {len(data.train_labels):,} images to train and "
            f"{len(data.test_labels):,} to test; {_of(plan.num_workers, 'worker')}, the smallest "
            f"shard {min(plan.shard_sizes):,}",
        ),
        Finding("model", f"{config.model.name}, n = {layout.size:,}, L = {len(layout.layers)}"),
    ]
    return plan, seen


def check_memory(plan: Plan) -> Iterator[Finding]:
    """What the workers of this node, or of this GPU, need against what is left for them."""
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
    if need + beside > left:
        yield fault("memory", text, remedy)
    else:
        yield Finding("memory", text)
    if plan.device.type == "cpu" and plan.launch.size == plan.launch.local_size > 1:
        yield from _check_shared_memory(plan)


def memory_left() -> int | None:
    """Bytes that this machine, or the container, can still give; None where nobody says."""
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
            # Files that were read stay in memory for as long as nobody else wants it.
            used -= sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
        except (OSError, ValueError):  # no limit there
            continue
        left = min(left, max(0, limit - used))
    return left


def _cgroups() -> Iterator[Path]:
    """The control groups that this process is in, from its own upwards (version 2)."""
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
    if free < need:
        yield warning(
            "memory",
            f"{text}: it will go through Gloo, which is slower",
            "docker run --shm-size=1g; in Kubernetes an emptyDir of medium Memory at that place",
        )
    else:
        yield Finding("memory", text)


def check_files(launch: Launch) -> Iterator[Finding]:
    """How many files, hence connections, a process may have open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    need = 256 + 8 * launch.size  # Gloo has a connection to every peer, for each of its groups
    if 0 <= soft < need:
        yield warning(
            "limits",
            f"a process may open {soft} files, {launch.size} ranks may need {need}",
            f"ulimit -n {need} before the start",
        )


def check_disk(config: Config, plan: Plan | None) -> Iterator[Finding]:
    """Whether a run can leave its files where it wants to."""
    folder = Path(config.output.run_dir or config.output.root)
    remedy = "output.root=... or output.run_dir=... on a disk with room, or delete what is there"
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir():
        yield fault("disk", f"{there} is not a folder", "output.root=... or output.run_dir=...")
        return
    try:
        status = os.statvfs(there)
    except OSError as error:
        yield fault("disk", f"{there}: {error.strerror}", "output.root=... or output.run_dir=...")
        return
    free, need = status.f_bavail * status.f_frsize, room_for_run(config, plan)
    text = f"{there} has {_bytes(free)} free"
    if need:
        text += f", the checkpoints of this run take {_bytes(need)}"
    if not status.f_blocks:  # some file systems do not say; what is written there does
        yield Finding("disk", f"{there} does not say how much room it has")
    elif free < max(need, 1):
        yield fault("disk", f"{text}: the disk is full", f"{remedy}; or output.keep_checkpoints=1")
    elif status.f_files and not status.f_favail:
        yield fault("disk", f"{there} has room, but for no more files (inodes)", remedy)
    elif not os.access(there, os.W_OK | os.X_OK):
        who = f"user {os.getuid()}" if hasattr(os, "getuid") else "this user"
        yield fault("disk", f"{there} may not be written to by {who}", remedy)
    elif need and free < 10 * need:
        yield warning("disk", f"{text}: room for few runs", remedy)
    else:
        yield Finding("disk", text)


def check_in_use(config: Config) -> Iterator[Finding]:
    """Whether another run holds the directory of this one."""
    if config.output.run_dir is None:
        return
    lock = Path(config.output.run_dir) / LOCK
    try:
        with lock.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        yield fault(
            "disk",
            f"{lock.parent} is in use by a run that goes on",
            "another output.run_dir, or wait for its end",
        )
    except OSError:  # no run has been there, or there are no locks
        pass


def room_for_run(config: Config, plan: Plan | None) -> int:
    """Bytes of the checkpoints at their most: those kept and one that is being written."""
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


def _of(number: int, noun: str) -> str:
    plural = "es" if noun.endswith("s") else "s"
    return f"{number} {noun}{'' if number == 1 else plural}"
