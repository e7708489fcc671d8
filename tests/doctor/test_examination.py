import os
import shutil
import socket
import subprocess
import sys

import pytest
import torch

from consensus.doctor import examination, machine
from tests.doctor.test_network import free_port
from tests.testing import ROOT
from tests.testing.hosts import Hosts
from tests.testing.launch import Ranks


def test_a_machine_without_faults(examine, tmp_path):
    code, report = examine()
    assert code == 0
    assert "no faults, no warnings" in report
    assert f"torch {torch.__version__}" in report
    assert "digits, 1,437 samples to train, 360 to test" in report
    assert "logistic, n = 7,850, L = 1" in report  # 784 x 10 + 10
    assert "sigma = 0.005 on a loss summed over 20 samples is lr = 0.1 of torch" in report
    assert not (tmp_path / "runs").exists()  # no files are left behind


def test_missing_data(examine, monkeypatch, tmp_path):
    monkeypatch.setattr("torchvision.datasets.MNIST.mirrors", ["http://127.0.0.1:9/"])
    code, report = examine("data=mnist", f"data.root={tmp_path}")
    assert code == 1
    (line,) = [line for line in report.splitlines() if "FAULT" in line]
    assert line.startswith("data ")
    assert f"MNIST is not in {tmp_path}/MNIST/raw (" in line
    assert ") and cannot be downloaded (" in line
    assert "1 fault" in report
    assert "folder  " in report  # the other checks run


def test_an_unexpected_exception_becomes_a_finding(examine, monkeypatch):
    def fail(config, launch):
        raise RuntimeError("CUDA out of memory\nand much more")

    monkeypatch.setattr(machine, "make_plan", fail)
    code, report = examine()
    assert code == 1
    assert "RuntimeError: CUDA out of memory" in report
    assert "and much more" not in report
    assert "folder  " in report


def test_a_port_of_another_program(make_config, capsys):
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        nodes = examination.Nodes(2, "127.0.0.1", busy.getsockname()[1], "mine")
        assert examination.examine(make_config("group.timeout_s=1"), nodes) == 1
    assert "answers, but not as the store of this job" in capsys.readouterr().out


def test_a_node_that_does_not_come(make_config, capsys):
    port = free_port()
    nodes = examination.Nodes(3, "127.0.0.1", port, "mine")
    assert examination.examine(make_config("group.timeout_s=1"), nodes) == 1
    expected = f"1 of 3 nodes came to 127.0.0.1:{port} within 1 s: {socket.gethostname()} ("
    assert expected in capsys.readouterr().out


UNLUCKY = """
import os
from consensus.problem import DATASETS
from consensus.problem.digits import digits

@DATASETS.register("unlucky")
def unlucky(root):
    if os.environ["RANK"] == "1":
        raise RuntimeError("no kernel image is available for execution on the device")
    return digits(root)
"""


@pytest.mark.ranks
@pytest.mark.slow
def test_one_rank_whose_data_fail_leaves_the_report_of_the_others_complete(tmp_path):
    (tmp_path / "unlucky.py").write_text(UNLUCKY)
    own = ["plugins=[unlucky]", "data.name=unlucky", "group.shared_memory=false", "model=logistic"]
    env, module = {"PYTHONPATH": str(tmp_path)}, "consensus.doctor.__main__"
    with Ranks(2, own, tmp_path, env, module=module) as ranks:
        assert ranks.wait(200) == [1, 1]
        report = ranks.out(0)
    (line,) = [line for line in report.splitlines() if "FAULT" in line]
    assert "rank 1: RuntimeError: no kernel image is available" in line
    assert "all-reduce over gloo" in report  # of what all ranks can sum
    assert "u of this model" not in report
    assert "1 fault, no warnings" in report


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    with Hosts(2, tmp_path_factory.mktemp("hosts")) as hosts:
        yield hosts


def look_at(hosts, cwd, *overrides, second="", **variables):
    """The doctor by launch/multinode.sh; `second` is a command that the second host runs first."""
    remote = cwd / "remote"
    remote.write_text(
        f'#!/bin/sh\nhost=$1; command=$2\n[ "$host" = {hosts.names[1]} ] && {second or "true"}\n'
        f'exec {hosts.remote} "$host" "$command"\n'
    )
    remote.chmod(0o755)
    environment = os.environ | {
        "REMOTE": str(remote),
        "ADDRESS": hosts.addresses[0],
        "INTERFACE": "eth0",
        "NPROC": "1",
        "CONSENSUS_VENV": sys.prefix,
        "MODULE": "consensus.doctor",
    }
    script = str(ROOT / "launch" / "multinode.sh")
    return subprocess.run(
        [script, ",".join(hosts.names), "model=logistic", "group.timeout_s=20", *overrides],
        cwd=cwd, env=environment | variables, text=True, stdin=subprocess.DEVNULL,
        capture_output=True, check=False, timeout=200,
    )  # fmt: skip


@pytest.mark.hosts
@pytest.mark.slow
def test_two_hosts_without_faults(hosts, tmp_path):
    done = look_at(hosts, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"2 nodes reach each other ({', '.join(hosts.addresses)})" in done.stdout
    assert "consensus.doctor: 2 processes" in done.stdout
    assert "all see it, write there, and respect a lock" in done.stdout
    assert "7,850  u of this model" in done.stdout
    assert "after 3 iterations all ranks hold the same bits of u" in done.stdout
    assert done.stdout.count("no faults") == 2  # the nodes, then the processes
    assert os.listdir(tmp_path) == ["remote"]  # no files are left behind


@pytest.mark.hosts
def test_hosts_that_announce_their_loopback(hosts, tmp_path):
    done = look_at(hosts, tmp_path, INTERFACE="lo")
    name = socket.gethostname()
    assert done.returncode == 1
    assert f"cannot reach {name} (127.0.0.1) at 127.0.0.1, its loopback (" in done.stdout
    assert "torch.distributed" not in done.stdout


@pytest.mark.hosts
def test_hosts_that_cannot_reach_the_rendezvous(hosts, tmp_path):
    nobody = f"{hosts.addresses[0].rpartition('.')[0]}.99"
    done = look_at(hosts, tmp_path, "group.timeout_s=1", ADDRESS=nobody)
    assert done.returncode == 1
    assert f"the rendezvous is {nobody}:29400, which cannot be reached in 1 s" in done.stdout


@pytest.mark.hosts
@pytest.mark.slow
def test_hosts_with_other_code_and_another_folder(hosts, tmp_path):
    """The second host has its own checkout, with one more line, and its own disk."""
    checkout, runs = tmp_path / "checkout", tmp_path / "runs"
    shutil.copytree(ROOT / "consensus", checkout / "consensus")
    shutil.copytree(ROOT / "configs", checkout / "configs")
    with (checkout / "consensus" / "server.py").open("a") as file:
        file.write("# one line more\n")
    runs.mkdir()
    done = look_at(
        hosts,
        tmp_path,
        second=f'export PYTHONPATH={checkout} && command="mount -t tmpfs none {runs}; $command"',
    )
    assert done.returncode == 1, done.stderr
    lines = [line for line in done.stdout.splitlines() if "FAULT" in line]
    assert len(lines) == 2, done.stdout
    assert "the code of consensus is not that of the first (" in lines[0]
    assert f"{runs} is not the folder of that name on the first" in lines[1]
    assert "2 processes" not in done.stdout  # the processes are not started
