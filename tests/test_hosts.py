"""Runs on several hosts, which are network namespaces of this machine, by launch/multinode.sh."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hosts import Hosts

pytestmark = [pytest.mark.hosts, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[1]
RUN = [
    *("model=logistic", "workers=4", "potential=tan", "device=cpu", "output.tensorboard=false"),
    *("output.eval_every=500", "output.checkpoint_every=100", "output.log_every=50"),
]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    with Hosts(4, tmp_path_factory.mktemp("hosts")) as hosts:
        yield hosts


def rows(run_dir):
    path = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def start(hosts, number, processes, folder, *overrides):
    """launch/multinode.sh on so many hosts, so many processes on each."""
    environment = os.environ | {
        "REMOTE": str(hosts.remote),
        "ADDRESS": hosts.addresses[0],
        "INTERFACE": "eth0",
        "NPROC": str(processes),
        "CONSENSUS_VENV": sys.prefix,
    }
    script = str(ROOT / "launch" / "multinode.sh")
    command = [script, ",".join(hosts.names[:number]), *RUN, *overrides]
    return subprocess.Popen(
        command, cwd=folder, env=environment, text=True, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip


def wait_for(condition, process, seconds=120.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The digests of the same run on one host, four processes, Gloo."""
    folder = tmp_path_factory.mktemp("alone")
    script = str(ROOT / "launch" / "local.sh")
    words = [script, "4", *RUN, "algorithm.iterations=2000", "output.run_dir=alone"]
    environment = os.environ | {"CONSENSUS_VENV": sys.prefix}
    subprocess.run(
        [*words, "group.shared_memory=false"],
        cwd=folder, env=environment, check=True, capture_output=True,
    )  # fmt: skip
    return [row["digest"] for row in rows(folder / "alone")]


@pytest.mark.parametrize(("number", "processes"), [(2, 2), (4, 1)])
def test_several_hosts_are_one(hosts, alone, tmp_path, number, processes):
    run = ["algorithm.iterations=2000", "output.run_dir=mine"]
    process = start(hosts, number, processes, tmp_path, *run)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert [row["digest"] for row in rows(tmp_path / "mine")] == alone
    assert f"--rdzv-endpoint={hosts.addresses[0]}:29400" in err
    assert f"--local-addr={hosts.addresses[1]}" in err
    assert err.count("GLOO_SOCKET_IFNAME=eth0") == number
    assert out.count("consensus with tan: 4 workers, 4 processes on cpu over gloo") == 1


def test_a_host_that_is_cut_off_is_named_and_the_run_continues_when_it_is_back(
    hosts, alone, tmp_path
):
    own = ["output.run_dir=mine", "resume=auto", "group.timeout_s=10", "algorithm.iterations=2000"]
    process = start(hosts, 2, 2, tmp_path, *own)
    try:
        wait_for(lambda: rows(tmp_path / "mine"), process)
        hosts.cut("host1")
        cut = time.monotonic()
        _, err = process.communicate(timeout=200)
    finally:
        hosts.join("host1")
    assert process.returncode != 0
    assert time.monotonic() - cut < 120
    lines = [line for line in err.splitlines() if line.startswith("consensus.train: ")]
    assert lines, err
    assert any("rank" in line for line in lines), lines
    before = len(rows(tmp_path / "mine"))
    assert before < 4
    process = start(hosts, 2, 2, tmp_path, *own)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert "continues " in out
    assert [row["digest"] for row in rows(tmp_path / "mine")] == alone


def test_ctrl_c_asks_every_host_for_a_checkpoint(hosts, tmp_path):
    own = ["output.run_dir=mine", "algorithm.iterations=1000000"]
    process = start(hosts, 2, 1, tmp_path, *own)
    wait_for(lambda: rows(tmp_path / "mine"), process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "SIGTERM: stopped at iteration" in err
    left = subprocess.run(
        ["pgrep", "-f", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert left.stdout == ""


def test_a_mistake_ends_all_hosts(hosts, tmp_path):
    process = start(hosts, 2, 1, tmp_path, "algorithm.lam=-1")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    lines = {line for line in err.splitlines() if line.startswith("consensus.train: ")}
    assert len(lines) == 1


@pytest.mark.parametrize("arguments", [[], ["potential=tan"], ["--help"]])
def test_without_hosts_it_says_how_it_is_used(arguments):
    done = subprocess.run(
        [str(ROOT / "launch" / "multinode.sh"), *arguments],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == "usage: launch/multinode.sh HOST[,HOST ...] [OVERRIDE ...]\n"
