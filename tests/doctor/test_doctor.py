"""consensus.doctor: on machines in order, and on broken ones, where it has to name the fault."""

import errno
import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from torch.distributed import TCPStore
from torchvision.datasets import MNIST

from consensus.comm import Launch
from consensus.comm.rendezvous import Exchange
from consensus.doctor import __main__ as doctor
from consensus.doctor import folder, machine, network, speed
from consensus.doctor.finding import (
    FaultError,
    Finding,
    Level,
    fault,
    print_report,
    print_verdict,
    warning,
)
from tests.testing import ROOT
from tests.testing.hosts import Hosts


def faults(findings):
    return [finding for finding in findings if finding.level == Level.FAULT]


# ---- one machine


@pytest.fixture
def examine(make_config, tmp_path, capsys):
    """The report of one process, and its exit code."""

    def run(*overrides):
        own = [f"output.root={tmp_path}/runs", "model=logistic", *overrides]
        code = doctor.examine_ranks(make_config(*own), Launch())
        return code, capsys.readouterr().out

    return run


def test_a_machine_in_order(examine, tmp_path):
    code, report = examine()
    assert code == 0
    assert "no faults, no warnings" in report
    assert f"torch {torch.__version__}" in report
    assert "digits, 1,437 images to train and 360 to test" in report
    assert "logistic, n = 7,850, L = 1" in report  # 784 x 10 + 10
    assert not (tmp_path / "runs").exists()  # it leaves nothing behind


def test_missing_data(examine, monkeypatch, tmp_path):
    monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:9/"])
    code, report = examine("data=mnist", f"data.root={tmp_path}")
    assert code == 1
    (line,) = [line for line in report.splitlines() if "FAULT" in line]
    assert line.startswith("data ")
    assert f"MNIST is not in {tmp_path}/MNIST/raw and cannot be downloaded" in line
    assert "1 fault" in report
    assert "folder  " in report  # it looks at the rest all the same


@contextmanager
def small_disk(path, num_bytes):
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(path)]
    subprocess.run(command, check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


@pytest.mark.hosts
def test_a_full_disk(examine, tmp_path):
    with small_disk(tmp_path / "full", 1 << 20) as path:
        with pytest.raises(OSError, match="No space left"):
            (path / "fill").write_bytes(bytes(2 << 20))
        code, report = examine(f"output.root={path}/runs")
        assert code == 1
        (line, _) = [line for line in report.splitlines() if "FAULT" in line]
        assert line.startswith("disk ")
        assert f"{path} has 0 B free" in line
        assert "the disk is full" in line
        assert sorted(os.listdir(path)) == ["fill"]


@pytest.mark.hosts
def test_a_disk_with_room_but_not_for_the_checkpoints(examine, tmp_path):
    # 4 workers: u, z and v are 9 vectors of 7,850 numbers of 8 bytes, 565,200 B; 3 checkpoints.
    with small_disk(tmp_path / "small", 1 << 20) as path:
        code, report = examine(f"output.root={path}", "workers=4", "dtype=float64")
        assert code == 1
        assert "the checkpoints of this run take 1.7 MB: the disk is full" in report


@pytest.mark.parametrize("value", ["eth77", "lo,eth77"])
def test_a_wrong_interface(monkeypatch, value):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", value)
    address, (finding,) = network.check_interface()
    assert address is None
    assert finding.level == Level.FAULT
    expected = f"GLOO_SOCKET_IFNAME is {value}, which this machine does not have; it has lo"
    assert finding.text.startswith(expected)
    assert finding.remedy.startswith("INTERFACE=NAME")


def test_a_run_that_goes_on_in_the_same_directory(examine, tmp_path):
    (tmp_path / "mine").mkdir()
    with (tmp_path / "mine" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        code, report = examine(f"output.run_dir={tmp_path}/mine")
    assert code == 1
    assert f"{tmp_path}/mine is in use by a run that goes on" in report
    assert examine(f"output.run_dir={tmp_path}/mine")[0] == 0


def test_what_nobody_thought_of_is_a_finding(examine, monkeypatch):
    def fail(config, launch):
        raise RuntimeError("CUDA out of memory\nand much more")

    monkeypatch.setattr(machine, "make_plan", fail)
    code, report = examine()
    assert code == 1
    assert "RuntimeError: CUDA out of memory" in report
    assert "and much more" not in report
    assert "folder  " in report


@pytest.mark.parametrize(
    ("word", "complaint"),
    [("potential=cubik", "`potential` is cubik; allowed: "), ("--cfg", "`--cfg` is no KEY=VALUE")],
)
def test_a_mistake_is_one_line(monkeypatch, capsys, word, complaint):
    monkeypatch.setattr(sys, "argv", ["doctor", word])
    with pytest.raises(SystemExit, match="2"):
        doctor.main()
    err = capsys.readouterr().err
    assert err.startswith(f"consensus.doctor: {complaint}")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("variables", "complaint"),
    [
        ({"NNODES": "two"}, "`NNODES` is two"),
        ({"NNODES": "2"}, "`RENDEZVOUS` is ;"),
        ({"NNODES": "2", "RENDEZVOUS": "here"}, "`RENDEZVOUS` is here"),
        ({"NNODES": "2", "RENDEZVOUS": "here:99999"}, "`RENDEZVOUS` is here:99999"),
    ],
)
def test_mistakes_in_the_variables_of_a_node(monkeypatch, capsys, variables, complaint):
    for name, value in (variables | {"CONSENSUS_DOCTOR": "nodes"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["doctor"])
    with pytest.raises(SystemExit, match="2"):
        doctor.main()
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize(
    ("processes", "threads", "cores", "remedy"),
    [(4, 1, 2, "NPROC=2"), (2, 4, 4, "OMP_NUM_THREADS=2"), (2, 2, 4, None), (1, 1, 1, None)],
)
def test_threads_and_cores(monkeypatch, processes, threads, cores, remedy):
    monkeypatch.setattr(machine, "cores_here", lambda: cores)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    (finding,) = machine.check_cores(Launch(0, processes, 0, processes))
    assert finding.level == (Level.FINE if remedy is None else Level.WARNING)
    assert remedy is None or finding.remedy.startswith(remedy)


def test_the_quota_of_a_container_counts(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)
    assert machine.cores_here() == 16
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert machine.cores_here() == 16
    (tmp_path / "cpu.max").write_text("250000 100000\n")
    assert machine.cores_here() == 3
    (tmp_path / "memory.max").write_text("3000000\n")
    (tmp_path / "memory.current").write_text("1000000\n")
    (tmp_path / "memory.stat").write_text("anon 7\ninactive_file 400000\n")
    assert machine.memory_left() == 2_400_000


@pytest.mark.parametrize(
    ("overrides", "measuring"),
    [
        ([], ""),
        (["stationarity.every=5"], "; to measure the stationarity: 1.1 MB"),  # 36 vectors, once
        (
            ["stationarity.every=5", "data.partition=sharded"],
            "; to measure the stationarity: 2.3 MB",
        ),
    ],
)
def test_the_memory_of_a_measurement_counts(make_config, monkeypatch, overrides, measuring):
    """7,850 numbers of 4 bytes, and two processes of two workers with three such vectors each."""
    config = make_config("model=logistic", "workers=4", "device=cpu", *overrides)
    plan = machine.make_plan(config, Launch(0, 2, 0, 2))
    monkeypatch.setattr(machine, "memory_left", lambda: 1_400_000)
    finding = next(iter(machine.check_memory(plan)))
    workers = "1.4 MB left; z, v and gradients of the workers of this node: 377 kB"
    assert finding.text == workers + measuring
    assert finding.level == (Level.FAULT if measuring else Level.FINE)
    assert ("stationarity.every=null" in finding.remedy) == bool(measuring)


@pytest.mark.parametrize(
    ("known", "capability", "runs"),
    [
        (["sm_80", "sm_90"], (8, 6), True),
        (["sm_80", "sm_90"], (7, 0), False),  # a V100, and a build that has left it behind
        (["sm_80", "sm_90"], (10, 0), False),
        (["sm_80", "compute_90"], (10, 0), True),  # compiled when it is loaded
        (["sm_120"], (12, 1), True),
        (["sm_90a"], (9, 0), True),
        (["sm_100a"], (10, 3), False),
        ([], (9, 0), True),  # nobody says
    ],
)
def test_what_a_build_of_torch_runs_on(known, capability, runs):
    assert machine.runs_on(known, *capability) == runs


@pytest.mark.parametrize(
    ("gradient_s", "sum_s", "period", "says"),
    [
        (5e-3, 4e-3, 1, None),  # hidden
        (5e-3, 5.5e-3, 1, None),  # nearly
        (5e-3, 15e-3, 1, "algorithm.period=18 "),  # 10 ms too much: 10 / (18 * 5 + 10) is a tenth
        (5e-3, 15e-3, 18, None),
        (5e-4, 15e-4, 1, "a larger algorithm.batch_size"),
    ],
)
def test_what_to_do_about_slow_sums(gradient_s, sum_s, period, says):
    found = speed.advice(gradient_s, sum_s, period)
    assert (found is None) == (says is None)
    assert says is None or found[1].startswith(says)


# ---- versions


def test_versions_that_differ():
    first = {"python": "3.11.7", "torch": "2.15.0", "numpy": "2.0", "consensus": "aa"}
    assert list(machine.compare_versions([first, first], 1)) == [
        Finding("versions", "the same everywhere")
    ]
    other = {"python": "3.11.7", "torch": "2.14.0", "numpy": "2.1", "consensus": "bb"}
    assert list(machine.compare_versions([first, other], 0)) == []
    found = list(machine.compare_versions([first, other], 1))
    assert [(finding.level, finding.text) for finding in found] == [
        (Level.FAULT, "the code of consensus is not that of the first (bb, aa)"),
        (Level.WARNING, "numpy is 2.1 here and 2.0 on the first"),
        (Level.FAULT, "torch is 2.14.0 here and 2.15.0 on the first"),
    ]


# ---- the network


def test_the_addresses_of_this_machine():
    found = network.interfaces()
    assert found["lo"][0] == "127.0.0.1"
    if shutil.which("ip") is None:
        return
    words = ["ip", "-json", "addr"]
    listed = json.loads(subprocess.run(words, capture_output=True, check=True).stdout)
    for interface in listed:
        own = [a["local"] for a in interface["addr_info"] if a["scope"] != "link"]
        assert set(found[interface["ifname"].partition("@")[0]]) <= set(own)


@pytest.mark.parametrize(
    ("variable", "value", "fits"),
    [
        ("GLOO_SOCKET_IFNAME", "eth0", True),
        ("GLOO_SOCKET_IFNAME", "eth", False),
        ("NCCL_SOCKET_IFNAME", "eth", True),  # a prefix
        ("NCCL_SOCKET_IFNAME", "=eth", False),
        ("NCCL_SOCKET_IFNAME", "=eth0", True),
        ("NCCL_SOCKET_IFNAME", "^lo", True),
        ("NCCL_SOCKET_IFNAME", "ib", False),
    ],
)
def test_names_of_interfaces(variable, value, fits):
    assert network._fits(variable, value, {"lo": [], "eth0": []}) == fits


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize(
    ("host", "says"),
    [
        ("127.0.0.1", "cannot be reached in 0.1 s (Connection refused)"),
        ("nowhere.invalid", "the name nowhere.invalid cannot be resolved here"),
    ],
)
def test_an_unreachable_rendezvous(host, says):
    with pytest.raises(FaultError) as failure:
        network.reach(host, free_port(), 0.1, "the rendezvous")
    assert says in failure.value.finding.text
    assert failure.value.finding.topic == "rendezvous"


def test_who_owns_an_address():
    port = free_port()
    assert network.owns("127.0.0.1", port)
    assert not network.owns("192.0.2.1", port)  # an address for documents, of nobody
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", port))
        busy.listen()
        assert not network.owns("127.0.0.1", port)


def test_a_port_of_another_program(make_config, capsys):
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        nodes = doctor.Nodes(2, "127.0.0.1", busy.getsockname()[1], "mine")
        assert doctor.examine_nodes(make_config("group.timeout_s=1"), nodes) == 1
    assert "answers, but not as the store of this job" in capsys.readouterr().out


def test_a_node_that_does_not_come(make_config, capsys):
    port = free_port()
    nodes = doctor.Nodes(3, "127.0.0.1", port, "mine")
    assert doctor.examine_nodes(make_config("group.timeout_s=1"), nodes) == 1
    says = f"1 of 3 nodes came to 127.0.0.1:{port} within 1 s: {socket.gethostname()} ("
    assert says in capsys.readouterr().out


@pytest.fixture
def together():
    """function(exchange, index) for so many members of one store, in threads."""
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def store():
        return TCPStore("127.0.0.1", server.port, is_master=False, wait_for_workers=False)

    def run(size, function):
        members = [Exchange(store(), index, size, 10.0) for index in range(size)]
        with ThreadPoolExecutor(size) as pool:
            return list(pool.map(function, members))

    return run


def test_members_that_reach_each_other(together):
    found = together(3, lambda exchange: network.check_pairs(exchange, "127.0.0.1"))
    expected = "3 nodes reach each other (127.0.0.1, 127.0.0.1, 127.0.0.1)"
    assert found == [[Finding("network", expected)]] * 3


def test_a_member_that_is_not_reached_is_named(together, monkeypatch):
    gather = Exchange.gather

    def lie(exchange, value):
        """The second says a port at which nobody listens."""
        if exchange.index == 1 and isinstance(value, tuple):
            value = ["127.0.0.1", 1]
        return gather(exchange, value)

    monkeypatch.setattr(Exchange, "gather", lie)
    first, second = together(2, lambda exchange: network.check_pairs(exchange, "127.0.0.1"))
    assert second == []
    assert [f.text for f in faults(first)] == [
        "cannot reach member 1 at 127.0.0.1, its loopback (Connection refused)"
    ]


@pytest.mark.parametrize(
    ("ahead", "level", "says"),
    [
        (0.0, Level.FINE, "all clocks agree within "),
        (3.0, Level.WARNING, "3.0 s ahead of the first clock"),
        (-60.0, Level.FAULT, "60.0 s behind the first clock"),
    ],
)
def test_clocks(together, ahead, level, says):
    def look(exchange):
        off = ahead if exchange.index == 1 else 0.0
        return network.check_clocks(exchange, True, lambda: time.time() + off)

    found = together(3, look)
    assert [finding.level for finding in found[1]] == [level]
    assert says in found[1][0].text
    assert [len(findings) for findings in found] == ([1, 1, 1] if not ahead else [0, 1, 0])


# ---- the folder


def test_one_folder(together, tmp_path):
    found = together(3, lambda exchange: folder.check_folder(exchange, tmp_path / "a" / "b"))
    assert [len(findings) for findings in found] == [1, 1, 1]
    assert "all see it, write there, and respect a lock" in found[0][0].text
    assert found[0] == found[1] == found[2]
    assert os.listdir(tmp_path) == []


def test_a_folder_that_nobody_can_make(together, tmp_path):
    (tmp_path / "file").write_text("")
    found = together(2, lambda exchange: folder.check_folder(exchange, tmp_path / "file" / "runs"))
    assert found[1] == []
    assert [f.text for f in faults(found[0])] == [
        f"cannot write 16 MiB to {tmp_path}/file/runs: Not a directory"
    ]


@pytest.mark.parametrize(
    ("error", "says"),
    [(None, "has locks of each node for itself"), (errno.ENOLCK, "has no locks (No locks avail")],
)
def test_a_folder_whose_locks_do_not_hold(together, monkeypatch, tmp_path, error, says):
    def lock(file, kind):
        if error is not None:
            raise OSError(error, os.strerror(error))

    monkeypatch.setattr(fcntl, "flock", lock)
    first, second = together(2, lambda exchange: folder.check_folder(exchange, tmp_path))
    assert [finding.level for finding in second] == [Level.WARNING, Level.FINE]
    assert says in second[0].text
    assert "respect a lock" not in first[0].text


# ---- the report


def lines_of(capsys, places, found):
    print_report(places, found)
    return [line.rstrip() for line in capsys.readouterr().out.splitlines()]


def test_a_report_says_each_thing_once_with_its_ranks(capsys):
    fine = Finding("versions", "the same")
    slow = warning("sums", "slow\n  as a table", "buy another")
    lost = fault("devices", "gone", "plug it in")
    places = [f"node rank {rank}" for rank in range(4)]
    assert lines_of(capsys, places, [[fine, slow], [fine, lost], [fine], [fine, lost]]) == [
        "versions  fine     the same",
        "devices   FAULT    rank 1, 3: gone",
        "                   remedy: plug it in",
        "sums      warning  rank 0: slow",
        "                     as a table",
        "                   remedy: buy another",
    ]


def test_a_report_of_many_nodes_names_nodes(capsys):
    places = [f"node{rank // 2} rank {rank}" for rank in range(12)]
    lost, full = fault("devices", "gone", ""), fault("disk", "full", "")
    found = [[] for _ in places]
    for rank in (2, 3, 5):
        found[rank].append(lost)
    found[4].append(full)  # by the first rank of node2, for the node
    assert lines_of(capsys, places, found) == [
        "devices  FAULT    node1; node2 rank 5: gone",
        "disk     FAULT    node2: full",
    ]
    (line,) = lines_of(capsys, places, [*([lost] for _ in places[:-2]), [], []])
    assert line == "devices  FAULT    node0; node1; node2; node3; and 1 more: gone"
    (line,) = lines_of(capsys, places, [[lost] for _ in places])
    assert line == "devices  FAULT    gone"


def test_what_is_fine_is_said_once_though_its_numbers_differ(capsys):
    found = [[Finding("memory", f"{480 + rank}.5 GB left")] for rank in range(3)]
    assert lines_of(capsys, ["a", "b", "c"], found) == ["memory  fine     480.5 GB left"]
    bad = [[fault("memory", f"{rank} GB left", "")] for rank in range(2)]
    assert len(lines_of(capsys, ["a", "b"], bad)) == 2


def test_a_verdict_counts_each_thing_once(capsys):
    lost, slow = fault("a", "b", ""), warning("a", "c", "")
    print_verdict([lost, slow, lost, Finding("a", "d")])
    print_verdict([])
    assert capsys.readouterr().out == "1 fault, 1 warning\nno faults, no warnings\n"


def test_findings_travel_as_json():
    for finding in (Finding("a", "b"), fault("a", "b", "c"), warning("a", "b", "c")):
        assert Finding.from_json(json.loads(json.dumps(finding.to_json()))) == finding


# ---- real processes


UNLUCKY = """
import os
from consensus.problem import DATASETS
from consensus.problem.data import digits

@DATASETS.register("unlucky")
def unlucky(root):
    if os.environ["RANK"] == "1":
        raise RuntimeError("no kernel image is available for execution on the device")
    return digits(root)
"""


@pytest.mark.ranks
@pytest.mark.slow
def test_one_rank_whose_data_fail_does_not_spoil_the_report_of_the_others(tmp_path):
    (tmp_path / "unlucky.py").write_text(UNLUCKY)
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    own = ["plugins=[unlucky]", "data.name=unlucky", "group.shared_memory=false", "model=logistic"]
    done = subprocess.run(
        [*words, "-m", "consensus.doctor", *own], cwd=tmp_path, timeout=200,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    (line,) = [line for line in done.stdout.splitlines() if "FAULT" in line]
    assert "rank 1: RuntimeError: no kernel image is available" in line
    assert "all-reduce over gloo" in done.stdout  # of what all ranks can sum
    assert "u of this model" not in done.stdout
    assert "1 fault, no warnings" in done.stdout


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    with Hosts(2, tmp_path_factory.mktemp("hosts")) as hosts:
        yield hosts


def look_at(hosts, cwd, *overrides, second="", **variables):
    """launch/multinode.sh with the doctor; `second` is done first by the second host's shell."""
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
def test_two_hosts_in_order(hosts, tmp_path):
    done = look_at(hosts, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"2 nodes reach each other ({', '.join(hosts.addresses)})" in done.stdout
    assert "consensus.doctor: 2 processes" in done.stdout
    assert "all see it, write there, and respect a lock" in done.stdout
    assert "7,850  u of this model" in done.stdout
    assert "after 3 iterations all ranks hold the same bits of u" in done.stdout
    assert done.stdout.count("no faults") == 2  # the nodes, then the processes
    assert os.listdir(tmp_path) == ["remote"]  # it leaves nothing behind


@pytest.mark.hosts
def test_hosts_that_show_each_other_an_address_of_no_use(hosts, tmp_path):
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
    """The second host has a checkout of its own, one line ahead, and a disk of its own."""
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
    assert "2 processes" not in done.stdout  # which would not be worth while
