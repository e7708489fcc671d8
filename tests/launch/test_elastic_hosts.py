"""An elastic run over several hosts by launch/multinode.sh; the hosts are network namespaces."""

import os
import signal
import subprocess
import sys

import pytest

from consensus.run.elastic.log import MEMBERSHIP, read_changes
from tests.launch.test_hosts import RUN, wait_for
from tests.testing import ROOT
from tests.testing.hosts import Hosts
from tests.testing.small_runs import rows_of

pytestmark = [pytest.mark.hosts, pytest.mark.slow]


def test_a_run_goes_on_without_a_host_that_is_killed_and_one_that_is_cut_off(tmp_path):
    own = ["workers=null", "algorithm.iterations=500", "output.run_dir=mine"]
    own += ["plugins=[tests.testing.patient]", "output.eval_every=125", "group.timeout_s=15"]
    go, run = tmp_path / "go", tmp_path / "mine"

    def workers(count):
        def reached():
            found = read_changes(run) if (run / MEMBERSHIP).exists() else []
            return bool(found) and len(found[-1].workers) == count

        wait_for(reached, process)

    with Hosts(3, tmp_path) as hosts:
        environment = os.environ | {
            "ELASTIC": "true",
            "REMOTE": str(hosts.remote),
            "ADDRESS": hosts.addresses[0],
            "INTERFACE": "eth0",
            "NPROC": "1",
            "CONSENSUS_VENV": sys.prefix,
            "CONSENSUS_GO": str(go),
            "PYTHONPATH": str(ROOT),
        }
        process = subprocess.Popen(
            [str(ROOT / "launch" / "multinode.sh"), ",".join(hosts.names), *RUN, *own],
            cwd=tmp_path, env=environment, text=True, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        workers(3)
        there = ["ip", "netns", "pids", hosts.space("host2")]
        for pid in subprocess.run(there, capture_output=True, text=True, check=True).stdout.split():
            os.kill(int(pid), signal.SIGKILL)
        workers(2)
        hosts.cut("host1")
        workers(1)
        go.touch()
        _, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert "launch/multinode.sh: host2: exit code 137" in err
    started = [line for line in err.splitlines() if " --expected=3 " in line]
    store = f"--store={hosts.addresses[0]}:29400 --run=multinode-"
    assert [store in line for line in started] == [True] * 3
    assert [" --serve " in line for line in started].count(True) == 1
    changes = read_changes(run)
    assert [len(change.workers) for change in changes] == [3, 2, 1]
    assert list(changes[-1].gone.values()) == ["no heartbeat for 10 s"]
    assert all(change.digest for change in changes)  # that all members have compared
    assert rows_of(run)[-1]["iteration"] == 500
    left = subprocess.run(
        ["pgrep", "-f", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert left.stdout == ""
