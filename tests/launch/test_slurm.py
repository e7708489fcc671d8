"""Jobs on a real SLURM cluster of virtual nodes on this machine: `scripts/slurm_test`."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from consensus.run.elastic.log import MEMBERSHIP, read_changes
from tests.testing import ROOT
from tests.testing.slurm import Cluster
from tests.testing.small_runs import rows_of

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

VENV = Path(sys.prefix)
RUN = [
    *("model=logistic", "workers=4", "potential=tan", "device=cpu", "output.tensorboard=false"),
    *("output.eval_every=1000", "output.checkpoint_every=200", "output.log_every=100"),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with Cluster(tmp_path_factory.mktemp("slurm") / "cluster") as cluster:
        cluster.environment |= {"CONSENSUS_VENV": str(VENV), "CONSENSUS_ROOT": str(ROOT)}
        yield cluster


def submit(cluster, folder, *options, overrides=()):
    """The number of a job of launch/slurm.sbatch with two processes on each of two nodes."""
    script = str(ROOT / "launch" / "slurm.sbatch")
    words = ["--parsable", "--nodes=2", "--cpus-per-task=2", *options, script, *RUN, *overrides]
    return cluster.call("sbatch", *words, cwd=folder)


def ended(cluster, job):
    return not any(line.split()[0] == job for line in cluster.queue())


def alone(folder, iterations):
    """The digests of an undisturbed run with the same layout, without SLURM."""
    command = [str(ROOT / "launch" / "local.sh"), "4", *RUN, f"algorithm.iterations={iterations}"]
    environment = os.environ | {"CONSENSUS_VENV": str(VENV)}
    words = [*command, "output.run_dir=alone", "group.shared_memory=false"]
    subprocess.run(words, cwd=folder, env=environment, check=True, capture_output=True)
    return [row["digest"] for row in rows_of(folder / "alone")]


def test_a_job_on_two_nodes_that_is_put_back_into_the_queue_ends_with_the_same_bits(
    cluster, tmp_path
):
    iterations = 6000
    job = submit(cluster, tmp_path, overrides=[f"algorithm.iterations={iterations}"])
    run_dir = tmp_path / "runs" / f"consensus-{job}"
    cluster.wait(lambda: len(rows_of(run_dir)) >= 1)
    cluster.call("scancel", "--batch", "--signal=USR1", job)  # what the time limit does
    cluster.wait(lambda: ended(cluster, job), 300.0)
    said = (tmp_path / f"consensus-{job}.out").read_text()
    assert "stopped before the time limit; requeued" in said
    assert "SIGTERM: stopped at iteration" in said
    assert said.count("-m consensus.train resume=auto") == 4, "two nodes, started twice"
    found = rows_of(run_dir)
    assert [row["iteration"] for row in found] == list(range(1000, iterations + 1, 1000))
    assert [row["digest"] for row in found] == alone(tmp_path, iterations)


def test_a_job_that_is_cancelled_leaves_a_checkpoint_and_is_not_put_back(cluster, tmp_path):
    job = submit(cluster, tmp_path, overrides=["algorithm.iterations=1000000"])
    run_dir = tmp_path / "runs" / f"consensus-{job}"
    cluster.wait(lambda: len(rows_of(run_dir)) >= 1)
    cluster.call("scancel", job)
    cluster.wait(lambda: ended(cluster, job))
    said = (tmp_path / f"consensus-{job}.out").read_text()
    assert "SIGTERM: stopped at iteration" in said
    assert "with a checkpoint" in said
    assert "requeued" not in said


def test_an_elastic_job_goes_on_without_a_node_and_is_requeued_as_a_whole(cluster, tmp_path):
    go = tmp_path / "go"
    variables = f"ELASTIC=true,NPROC=1,CONSENSUS_GO={go},PYTHONPATH={ROOT}"
    own = ["workers=null", "plugins=[tests.testing.patient]", "algorithm.iterations=3000"]
    own += ["output.eval_every=500"]

    def start():
        options = ["--no-kill", f"--export=ALL,{variables}"]
        job = submit(cluster, tmp_path, *options, overrides=own)
        run_dir = tmp_path / "runs" / f"consensus-{job}"
        cluster.wait(lambda: workers(run_dir) == 2)
        return job, run_dir, tmp_path / f"consensus-{job}.out"

    def workers(run_dir):
        return len(read_changes(run_dir)[-1].workers) if (run_dir / MEMBERSHIP).exists() else 0

    job, run_dir, log = start()
    cluster.call("scancel", "--batch", "--signal=USR1", job)  # what the time limit does
    cluster.wait(lambda: f"{job} PENDING" in cluster.queue())
    cluster.call("scancel", job)
    said = log.read_text()
    assert "stopped before the time limit; requeued" in said
    assert said.count("SIGUSR1: stopped at iteration") == 1
    job, run_dir, log = start()
    # The second node is lost: its slurmd, the keeper of the step, and the processes.
    node = cluster.call("scontrol", "show", "hostnames", nodes_of(cluster, job)).split()[1]
    os.kill(int((cluster.folder / f"slurmd.{node}.pid").read_text()), signal.SIGKILL)
    for pid in processes_of(node, job):
        os.kill(pid, signal.SIGKILL)
    cluster.wait(lambda: workers(run_dir) == 1)
    go.touch()
    cluster.wait(lambda: f"{job} COMPLETING" in cluster.queue())  # it waits for the lost node
    assert rows_of(run_dir)[-1]["iteration"] == 3000
    cluster.call("slurmd", "-N", node)
    cluster.wait(lambda: ended(cluster, job))
    about = cluster.call("scontrol", "show", "job", job).split()
    assert {"JobState=COMPLETED", "ExitCode=0:0"} <= set(about)
    changes = read_changes(run_dir)
    assert [len(change.workers) for change in changes] == [2, 1]
    assert all(change.digest for change in changes)


def nodes_of(cluster, job):
    return cluster.call("squeue", "-h", "-j", job, "-o", "%N")


def processes_of(node, job):
    """The processes of a job on a virtual node, and the parents that hold them for SLURM."""
    found = set()
    for path in Path("/proc").glob("[0-9]*"):
        try:
            variables = set((path / "environ").read_bytes().split(b"\0"))
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            command = Path(f"/proc/{parent}/cmdline").read_bytes()
        except (OSError, ValueError):
            continue
        step = {f"SLURMD_NODENAME={node}".encode(), f"SLURM_JOB_ID={job}".encode()}
        if step <= variables:
            found.add(int(path.name))
            if b"slurmstepd" in command:
                found.add(parent)
    return sorted(found)


def test_a_mistake_ends_the_job_with_one_line_of_ours(cluster, tmp_path):
    job = submit(cluster, tmp_path, overrides=["algorithm.lam=-1"])
    cluster.wait(lambda: ended(cluster, job))
    said = (tmp_path / f"consensus-{job}.out").read_text().splitlines()
    (line,) = {line for line in said if line.startswith("consensus.train: ")}
    assert line.startswith("consensus.train: `algorithm.lam` is -1.0; allowed: ")


def test_the_doctor_looks_at_the_nodes_of_a_job(cluster, tmp_path):
    option = "--export=ALL,MODULE=consensus.doctor"
    well = submit(cluster, tmp_path, option)
    ill = submit(cluster, tmp_path, option, overrides=["data=mnist", f"data.root={tmp_path}/none"])
    cluster.wait(lambda: ended(cluster, well) and ended(cluster, ill), seconds=240)
    said = (tmp_path / f"consensus-{well}.out").read_text()
    assert "2 nodes meet at " in said
    assert "consensus.doctor: 4 processes" in said
    assert "after 3 iterations all ranks hold the same bits of u" in said
    assert "FAULT" not in said
    said = (tmp_path / f"consensus-{ill}.out").read_text()
    assert f"MNIST is not in {tmp_path}/none/MNIST/raw" in said
    assert "1 fault" in said


def test_a_sweep_by_submitit_that_is_stopped_and_continued(cluster, tmp_path):
    overrides = ["grid=smoke", "device=cpu", "output.tensorboard=false", "sweep.dir=many"]
    overrides += [
        "algorithm.iterations=2000",
        "output.eval_every=500",
        "output.checkpoint_every=100",
    ]
    overrides += ["hydra.launcher.cpus_per_task=1", "hydra.launcher.timeout_min=10"]
    command = [str(ROOT / "launch" / "slurm_sweep.sh"), *overrides]

    def start():
        return subprocess.Popen(
            command, cwd=tmp_path, env=cluster.environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )  # fmt: skip

    first = start()
    many = tmp_path / "many"
    cluster.wait(lambda: any(many.glob("*/metrics.jsonl")))
    second = start()
    _, err = second.communicate(timeout=120)
    assert second.returncode == 2
    assert "still in the queue: wait for them, or `scancel " in err
    first.send_signal(signal.SIGINT)
    _, err = first.communicate(timeout=120)
    assert first.returncode == 130
    assert "consensus.sweep: stopped, the jobs " in err
    cluster.wait(lambda: not cluster.queue())
    states = [json.loads(path.read_text())["state"] for path in many.glob("*/status.json")]
    assert "failed" not in states
    assert "stopped" in states
    third = start()
    out, err = third.communicate(timeout=400)
    assert third.returncode == 0, err
    assert "\n4 done\n" in out
    for run_dir in many.glob("potential=*"):
        assert [row["iteration"] for row in rows_of(run_dir)] == list(range(500, 2001, 500))
    assert (many / "report" / "table1.md").exists()
