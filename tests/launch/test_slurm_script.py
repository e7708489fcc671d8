"""launch/slurm.sbatch with stand-ins for srun, scancel and scontrol; real processes train.

test_slurm.py has the same with a real SLURM, where it is installed.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from consensus.run.elastic.log import MEMBERSHIP, read_changes
from tests.test_elastic import RUN
from tests.testing import ROOT
from tests.testing.small_runs import rows_of

# As `srun` starts a task on each node; the nodes are process groups, whose numbers go to a file.
SRUN = """#!/usr/bin/env bash
echo "$*" >>"$STUB/calls"
while [[ $1 == --* ]]; do shift; done
export SLURM_STEP_NUM_TASKS=$SLURM_JOB_NUM_NODES
for ((i = 0; i < SLURM_JOB_NUM_NODES; i++)); do
    setsid "$@" &
    pids+=($!)
done
echo "${pids[*]}" >"$STUB/nodes"
code=0
for pid in "${pids[@]}"; do
    wait "$pid" || code=$?
done
exit "$code"
"""
# A signal to all processes of the job step.
SCANCEL = """#!/usr/bin/env bash
for pid in $(<"$STUB/nodes"); do kill "-${1#--signal=}" -- "-$pid"; done
"""
# The requeue ends the batch script.
SCONTROL = """#!/usr/bin/env bash
echo "scontrol $*" >>"$STUB/calls"
kill -KILL "$PPID"
"""


class Job:
    """The batch script of a job on some nodes."""

    def __init__(self, folder, nodes, restart, *overrides):
        self.folder, self.run = folder, folder / "runs" / "consensus-7"
        stubs = folder / "bin"
        if not stubs.exists():
            stubs.mkdir()
            for name, text in (("srun", SRUN), ("scancel", SCANCEL), ("scontrol", SCONTROL)):
                (stubs / name).write_text(text)
                (stubs / name).chmod(0o755)
        environment = os.environ | {
            "PATH": f"{stubs}:{os.environ['PATH']}",
            "STUB": str(folder),
            "SLURM_SUBMIT_DIR": str(folder),
            "SLURM_JOB_NUM_NODES": str(nodes),
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NAME": "consensus",
            "SLURM_RESTART_COUNT": str(restart),
            "CONSENSUS_ROOT": str(ROOT),
            "CONSENSUS_VENV": sys.prefix,
            "CONSENSUS_GO": str(folder / "go"),
            "PYTHONPATH": str(ROOT),
            "PORT": str(free_port()),
            "NPROC": "1",
            "ELASTIC": "true",
        }
        self.log = folder / f"{restart}.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [ROOT / "launch" / "slurm.sbatch", *overrides],
                cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for group in (self.process.pid, *self.nodes()):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
        self.process.wait()

    def nodes(self):
        path = self.folder / "nodes"
        return [int(pid) for pid in path.read_text().split()] if path.exists() else []

    def until(self, condition):
        deadline = time.monotonic() + 90.0
        while not condition():
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)

    def workers(self):
        path = self.run / MEMBERSHIP
        return len(read_changes(self.run)[-1].workers) if path.exists() else 0


def free_port():
    with socket.socket() as free:
        free.bind(("", 0))
        return free.getsockname()[1]


@pytest.mark.slow
def test_an_elastic_job_is_requeued_with_a_checkpoint_and_goes_on_without_a_node(tmp_path):
    own = [*RUN, "plugins=[tests.testing.patient]", "algorithm.iterations=500"]
    own += ["output.eval_every=125"]
    with Job(tmp_path, 1, 0, *own) as job:
        job.until(lambda: job.workers() == 1)
        os.kill(job.process.pid, signal.SIGUSR1)  # B:USR1 reaches the batch script alone
        assert job.process.wait(60) == -signal.SIGKILL
        said = job.log.read_text()
    assert "stopped before the time limit; requeued" in said
    assert "SIGUSR1: stopped at iteration" in said
    srun, requeue = (tmp_path / "calls").read_text().splitlines()
    assert "--kill-on-bad-exit=0 --no-kill --wait=0" in srun
    assert requeue == "scontrol requeue 7"
    with Job(tmp_path, 2, 1, *own) as job:
        job.until(lambda: job.workers() == 2)
        os.killpg(job.nodes()[1], signal.SIGKILL)
        job.until(lambda: job.workers() == 1)
        (tmp_path / "go").touch()
        assert job.process.wait(90) == 0, job.log.read_text()
    changes = read_changes(job.run)
    assert [len(change.workers) for change in changes] == [1, 2, 1]
    assert all(change.digest for change in changes)  # that all members have compared
    assert rows_of(job.run)[-1]["iteration"] == 500
