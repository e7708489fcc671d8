"""A real SLURM cluster on this machine, for tests: one controller, virtual nodes, munge.

    with Cluster(folder, nodes=4) as cluster:
        cluster.call("sbatch", "job.sh")

All files are in one folder, and all daemons end with the block. Needs root and Debian's packages
slurm-wlm and munge.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "squeue", "scancel", "scontrol")

CONFIG = """
ClusterName=consensus
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=30
MinJobAge=60
OverTimeLimit=1
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
NodeName=node[1-{nodes}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs=2
PartitionName=all Nodes=node[1-{nodes}] Default=YES MaxTime=INFINITE State=UP
"""


def available() -> bool:
    path = f"{os.environ.get('PATH', '')}:/usr/sbin"
    return os.geteuid() == 0 and all(shutil.which(name, path=path) for name in PROGRAMS)


class Cluster:
    """The daemons; `environment` has the variables of a client."""

    def __init__(self, folder: Path, nodes: int = 4):
        self.folder = folder
        self.nodes = nodes
        self.environment = os.environ | {
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": f"{os.environ['PATH']}:/usr/sbin",
        }

    def __enter__(self) -> "Cluster":
        self.folder.mkdir(parents=True)
        self.folder.chmod(0o755)
        (self.folder / "state").mkdir()
        first = free_port(self.nodes + 1)
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        text = CONFIG.format(
            host=socket.gethostname(),
            folder=self.folder,
            nodes=self.nodes,
            port=first,
            first=first + 1,
            last=first + self.nodes,
        )
        (self.folder / "slurm.conf").write_text(text.lstrip())
        try:
            self.call(
                "munged",
                *("--force", f"--key-file={key}", f"--socket={self.folder}/munge.socket"),
                *(f"--pid-file={self.folder}/munged.pid", f"--log-file={self.folder}/munged.log"),
                f"--seed-file={self.folder}/munge.seed",
            )
            self.call("slurmctld", "-c")
            for i in range(1, self.nodes + 1):
                self.call("slurmd", "-N", f"node{i}")
            self.wait(lambda: self.call("sinfo", "-h", "-t", "idle", "-o", "%D") == f"{self.nodes}")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(subprocess.CalledProcessError):
            self.call("scancel", "--full", "--user=root")
            self.wait(lambda: not self.queue(), 60.0)
        pids = [int(path.read_text()) for path in self.folder.glob("*.pid")]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        self.wait(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), 30.0)

    def call(self, *command: str, cwd: Path | None = None) -> str:
        """The output of a command. Raises CalledProcessError, with its output, if it fails."""
        done = subprocess.run(
            command, env=self.environment, cwd=cwd, text=True, capture_output=True, check=False
        )
        if done.returncode:
            error = subprocess.CalledProcessError(done.returncode, command)
            error.add_note(done.stdout + done.stderr)
            raise error
        return done.stdout.strip()

    def queue(self) -> list[str]:
        """`number state` of each job."""
        return self.call("squeue", "-h", "-o", "%i %T").splitlines()

    @staticmethod
    def wait(condition, seconds: float = 120.0) -> None:
        """Until something is so."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "it did not become so"
            time.sleep(0.2)


def free_port(number: int) -> int:
    """The first of so many ports in a row that are free now."""
    for first in range(18000, 19000, number):
        with contextlib.ExitStack() as stack:
            try:
                for port in range(first, first + number):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
            return first
    raise AssertionError("no ports are free")
