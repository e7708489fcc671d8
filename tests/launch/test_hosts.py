"""Runs over several hosts by launch/multinode.sh; the hosts are network namespaces."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from tests.testing import ROOT
from tests.testing.hosts import Hosts
from tests.testing.launch import Ranks
from tests.testing.small_runs import rows_of

pytestmark = [pytest.mark.hosts, pytest.mark.slow]

RUN = [
    *("model=logistic", "workers=4", "potential=tan", "device=cpu", "output.tensorboard=false"),
    *("output.eval_every=25", "output.checkpoint_every=10", "output.log_every=25"),
    "deterministic=true",  # the same bits on every layout
]
LENGTH = 100  # iterations whose bits are compared


def digests(run_dir):
    return {row["iteration"]: row["digest"] for row in rows_of(run_dir)}


SCRIPT = ROOT / "launch" / "multinode.sh"
PATIENCE = "sleep 30;"  # of the script, before it kills what has not ended


def impatient(hosts, folder):
    """A remote shell for a run that loses a host, whose torchrun waits until it is killed."""
    assert SCRIPT.read_text().count(PATIENCE) == 1
    remote = folder / "impatient"
    remote.write_text(f'#!/bin/bash\nexec {hosts.remote} "$1" "${{2/{PATIENCE}/sleep 5;}}"\n')
    remote.chmod(0o755)
    return remote


def start(remote, hosts, number, processes, folder, *overrides):
    """launch/multinode.sh on the first `number` hosts, with that many processes on each."""
    environment = os.environ | {
        "REMOTE": str(remote),
        "ADDRESS": hosts.addresses[0],
        "INTERFACE": "eth0",
        "NPROC": str(processes),
        "CONSENSUS_VENV": sys.prefix,
    }
    command = [str(SCRIPT), ",".join(hosts.names[:number]), *RUN, *overrides]
    return subprocess.Popen(
        command, cwd=folder, env=environment, text=True, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip


def wait_for(condition, process, seconds=200.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The digests of the same run as one process, by iteration."""
    folder = tmp_path_factory.mktemp("alone")
    own = [f"algorithm.iterations={LENGTH}", "output.run_dir=alone"]
    with Ranks(1, [*RUN, *own], folder) as ranks:
        assert ranks.wait(200) == [0], ranks.err(0)
    return digests(folder / "alone")


def test_a_run_over_hosts_has_the_same_bits_after_a_host_was_cut_off_and_until_ctrl_c(
    alone, tmp_path
):
    """Two hosts of two processes over a bad network; then two hosts of one process."""
    run = ["algorithm.iterations=1000000", "output.run_dir=mine", "resume=auto"]
    with Hosts(2, tmp_path, latency_ms=10.0, loss=0.01) as hosts:
        remote = impatient(hosts, tmp_path)
        process = start(remote, hosts, 2, 2, tmp_path, *run, "group.timeout_s=15")
        wait_for(lambda: rows_of(tmp_path / "mine"), process)
        hosts.cut("host1")
        cut = time.monotonic()
        assert hosts.lost > 0
        out, err = process.communicate(timeout=200)
        assert process.returncode not in (0, 130)
        assert time.monotonic() - cut < 120
        lines = [line for line in err.splitlines() if line.startswith("consensus.train: rank ")]
        assert any("no sign of life from rank 2, 3" in line for line in lines), err
        assert f"--rdzv-endpoint={hosts.addresses[0]}:29400" in err
        assert f"--local-addr={hosts.addresses[1]}" in err
        assert err.count("GLOO_SOCKET_IFNAME=eth0") == 2
        assert out.count("consensus with tan: 4 workers, 4 processes on cpu over gloo") == 1
        before = digests(tmp_path / "mine")
        assert before.items() <= alone.items()
        hosts.join("host1")
        hosts.set_latency(0.0)
        process = start(hosts.remote, hosts, 2, 1, tmp_path, *run)
        wait_for(lambda: LENGTH in digests(tmp_path / "mine"), process)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    assert "continues " in out
    assert alone.items() <= digests(tmp_path / "mine").items()
    assert process.returncode == 130
    assert "SIGTERM: stopped at iteration" in err
    left = subprocess.run(
        ["pgrep", "-f", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert left.stdout == ""


def test_no_packet_is_faster_than_the_latency(tmp_path):
    """The fastest round trip takes twice the latency, and not that of another setting."""
    with Hosts(2, tmp_path, latency_ms=10.0) as hosts:
        assert 0.020 <= min(hosts.round_trips(20)) < 0.040
        hosts.set_latency(5.0)
        assert 0.010 <= min(hosts.round_trips(20)) < 0.020


@pytest.mark.parametrize(("loss", "least", "most"), [(0.0, 1000, 1000), (0.2, 730, 870)])
def test_packets_are_lost_as_often_as_asked(tmp_path, loss, least, most):
    kind = socket.SOCK_DGRAM
    with (
        Hosts(3, tmp_path, latency_ms=0.0, loss=loss) as hosts,
        hosts.socket("host0", kind) as here,
        hosts.socket("host2", kind) as there,
    ):
        arrived = 0
        there.settimeout(0.1)
        for _ in range(20):
            for _ in range(50):  # within the size of its buffer
                here.sendto(b"x", there.getsockname())
            for _ in range(50):
                try:
                    arrived += len(there.recv(2))
                except TimeoutError:
                    break
        hosts.join("host1")  # the reply has the number of lost packets
        assert hosts.lost == 1000 - arrived
        assert least <= arrived <= most  # 1000 (1 - loss), and five standard deviations


def test_a_host_behind_the_switch_is_cut_off_and_back(tmp_path):
    with Hosts(2, tmp_path, latency_ms=0.0) as hosts:
        hosts.cut("host1")
        with pytest.raises(TimeoutError):
            hosts.round_trips(1)
        hosts.join("host1")
        assert len(hosts.round_trips(1)) == 1


def test_hosts_leave_nothing_behind(tmp_path):
    with Hosts(2, tmp_path, latency_ms=1.0) as hosts:
        spaces = {hosts.space(name) for name in hosts.names}
        assert spaces <= set(os.listdir("/run/netns"))
    assert not spaces & set(os.listdir("/run/netns"))
    assert hosts.switch.returncode == 0


def test_hosts_that_fail_to_start_leave_nothing_behind(tmp_path):
    hosts = Hosts(2, tmp_path, latency_ms=1.0)
    hosts.options[0] = "soon"
    with pytest.raises(RuntimeError, match="switch has ended"), hosts:
        pass
    assert not {hosts.space(name) for name in hosts.names} & set(os.listdir("/run/netns"))


@pytest.mark.parametrize("arguments", [[], ["potential=tan"], ["--help"]])
def test_without_hosts_it_prints_its_usage(arguments):
    done = subprocess.run([str(SCRIPT), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "usage: launch/multinode.sh HOST[,HOST ...] [OVERRIDE ...]\n"
