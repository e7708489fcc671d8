import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import consensus
from tests.testing import ROOT

SCRIPTS = [f"scripts/{path.name}" for path in sorted((ROOT / "scripts").iterdir())]
LAUNCH = ["health.sh", "local.sh", "multinode.sh", "node.sh", "slurm.sbatch", "slurm_sweep.sh"]
SHELL = [*SCRIPTS, *(f"launch/{name}" for name in LAUNCH), ".ci/run"]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


# ---- every shell script


@pytest.mark.parametrize("script", SHELL)
def test_script_is_executable_strict_and_parses(script):
    path = ROOT / script
    lines = path.read_text().splitlines()
    assert os.access(path, os.X_OK)
    assert lines[0] == "#!/usr/bin/env bash"
    assert "set -euo pipefail" in lines
    assert subprocess.run(["bash", "-n", path], capture_output=True, text=True).stderr == ""


@pytest.mark.parametrize("script", [".ci/run", "scripts/test"])
def test_nothing_follows_the_last_command_of_a_test_run(script):
    assert (ROOT / script).read_text().splitlines()[-1].startswith("exec ")


# ---- requirements.lock


# No hash, path or address fits.
PIN = re.compile(r"(?P<name>[a-z0-9.-]+)==(?P<version>[^\s;@/]+)( ; [^@/]+)?")


def lock_lines() -> list[str]:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    return [line for line in lines if not line.startswith("#")]


def pins() -> dict[str, list[str]]:
    """Versions by package; a package may have one for each marker."""
    found: dict[str, list[str]] = {}
    for pin in filter(None, map(PIN.fullmatch, lock_lines())):
        found.setdefault(canonicalize_name(pin["name"]), []).append(pin["version"])
    return found


def test_lock_holds_pins_only():
    assert "://" not in (ROOT / "requirements.lock").read_text()
    assert [line for line in lock_lines() if not PIN.fullmatch(line)] == []


def test_lock_pins_every_dependency_within_its_bounds():
    project = PYPROJECT["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["docs"], *extras["dev"]]
    locked = pins()
    for requirement in map(Requirement, wanted):
        if requirement.name == project["name"]:
            continue  # dev includes docs
        versions = locked.get(canonicalize_name(requirement.name), [])
        assert versions, f"{requirement} is not in requirements.lock"
        for version in versions:
            assert version in requirement.specifier, f"{version} is locked for {requirement}"


# ---- version and citation


def test_the_version_is_that_of_pyproject():
    version = PYPROJECT["project"]["version"]
    assert consensus.__version__ in (version, "0+unknown")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == version
    assert {"title", "authors", "message"} <= set(citation)
    assert {"type", "title", "authors"} <= set(citation["preferred-citation"])


# ---- the wheel


def test_wheel_holds_the_package_the_configs_and_the_commands(tmp_path):
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("consensus_training-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        (entry_points,) = [n for n in archive.namelist() if n.endswith("/entry_points.txt")]
        commands = archive.read(entry_points).decode()

    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "consensus").rglob("*.py")}
    configs = {f"consensus/{p.relative_to(ROOT)}" for p in (ROOT / "configs").rglob("*.yaml")}
    assert modules | configs <= names
    assert {"consensus/configs/train.yaml", "consensus/py.typed"} <= names
    assert not [name for name in names if not name.startswith("consensus/")]
    assert "consensus-train = consensus.train:main" in commands
    assert "consensus-report = consensus.report.__main__:main" in commands
    assert "consensus-doctor = consensus.doctor.__main__:main" in commands
    assert "consensus-elastic = consensus.elastic:main" in commands


# ---- scripts/setup, with stand-ins for python, pip and uv that only note how they were called

# Programs that the scripts and the stand-ins may use.
TOOLS = ["bash", "cat", "dirname", "flock", "grep", "ls", "mkdir", "mv", "rm", "sed", "sha256sum"]
STUB_TOOLS = ["chmod", "env", "sleep"]

# Stands for the interpreter on PATH and, copied there by `-m venv`, for the one of the environment.
PYTHON = """#!/usr/bin/env bash
case "$*" in
    *"sys.version_info <"*)
        "$STUB_REAL" -c "import sys; sys.version_info = ${STUB_VERSION:-(3, 11, 0)}; ${*: 2}"
        ;;
    *"import ensurepip"*) exit "${STUB_BARE:-0}" ;;
    *"-venv"*) echo python3.11-venv ;;
    --version) echo "Python 3.11.0" ;;
    "-m venv "*)
        echo venv >>"$STUB_LOG"
        mkdir -p "$3/bin"
        cat "$0" >"$3/bin/python"
        cat "$STUB_UV" >"$3/bin/uv"
        chmod +x "$3/bin/python" "$3/bin/uv"
        ;;
    "-c import consensus.train"*) echo "compile${PYTHONDONTWRITEBYTECODE:-}" >>"$STUB_LOG" ;;
    "-m pip install "*) echo "pip ${*: -1}" >>"$STUB_LOG" ;;
    *) echo "cwd=$PWD omp=${OMP_NUM_THREADS:-} $*" ;;
esac
"""
UV = """#!/usr/bin/env bash
echo "uv $2" >>"$STUB_LOG"
sleep "${STUB_SLOW:-0}"
exit "${STUB_UV_FAILS:-0}"
"""
MADE = ["venv", "pip uv==9.9.9", "uv sync", "uv install", "compile"]


class Checkout:
    """A checkout of the scripts, and a PATH with a few tools and a stand-in python3.11 only."""

    def __init__(self, folder: Path):
        self.root = folder / "check out"  # a blank in the path, since people have them
        for name in [*SCRIPTS, "launch/local.sh", "launch/node.sh"]:
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, self.root / name)
        self.lock = self.root / "requirements.lock"
        self.lock.write_text("torch==1.0\nuv==9.9.9\n")
        (self.root / "pyproject.toml").write_text("[project]\n")
        self.venv = self.root / ".venv"

        self.bin = folder / "bin"
        self.bin.mkdir()
        for tool in [*TOOLS, *STUB_TOOLS]:
            found = shutil.which(tool)
            assert found, f"{tool} is not on PATH"
            (self.bin / tool).symlink_to(found)
        self.python = self.bin / "python3.11"
        self.python.write_text(PYTHON)
        self.python.chmod(0o755)
        uv = folder / "uv"
        uv.write_text(UV)
        self.log = folder / "log"
        self.log.touch()
        self.env = {
            "PATH": str(self.bin),
            "STUB_LOG": str(self.log),
            "STUB_UV": str(uv),
            "STUB_REAL": sys.executable,
            "PYTHONDONTWRITEBYTECODE": "1",  # as in many images
        }

    def start(self, *command: str, cwd: Path | None = None, **env: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [self.root / command[0], *command[1:]],
            cwd=cwd or self.root,
            env=self.env | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *command: str, cwd: Path | None = None, **env: str) -> tuple[int, str, str]:
        process = self.start(*command, cwd=cwd, **env)
        out, err = process.communicate(timeout=30)
        return process.returncode, out, err

    def calls(self) -> list[str]:
        """The calls of the stand-ins since the last time."""
        lines = self.log.read_text().splitlines()
        self.log.write_text("")
        return lines


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path)


def test_setup_makes_the_environment_once(checkout):
    code, out, _ = checkout.run("scripts/setup")
    assert (code, out) == (0, f"{checkout.venv}\n")
    assert checkout.calls() == MADE

    assert checkout.run("scripts/setup") == (0, f"{checkout.venv}\n", "")
    assert checkout.calls() == []


@pytest.mark.parametrize("file", ["requirements.lock", "pyproject.toml"])
def test_setup_updates_in_place_when_its_inputs_change(checkout, file):
    checkout.run("scripts/setup")
    checkout.calls()
    with (checkout.root / file).open("a") as lines:
        lines.write("# changed\n")
    assert checkout.run("scripts/setup")[0] == 0
    assert checkout.calls() == ["uv sync", "uv install", "compile"]
    assert checkout.run("scripts/setup")[2] == ""


@pytest.mark.parametrize("first_time", [True, False])
def test_setup_that_was_interrupted_is_repaired_by_the_next(checkout, first_time):
    if not first_time:
        checkout.run("scripts/setup")
        checkout.lock.write_text("torch==2.0\nuv==9.9.9\n")
    code, out, _ = checkout.run("scripts/setup", STUB_UV_FAILS="1")
    assert (code, out) == (1, "")
    leftover = checkout.venv / "half-installed"
    leftover.touch()
    checkout.calls()

    assert checkout.run("scripts/setup")[0] == 0
    assert checkout.calls() == MADE
    assert not leftover.exists()


def test_setup_makes_a_moved_environment_again(checkout):
    checkout.run("scripts/setup")
    checkout.calls()
    moved = checkout.root / "moved"
    checkout.venv.rename(moved)
    assert checkout.run("scripts/setup", CONSENSUS_VENV=str(moved))[0] == 0
    assert checkout.calls() == MADE


def test_setup_twice_at_once_installs_once(checkout):
    both = [checkout.start("scripts/setup", STUB_SLOW="0.3") for _ in range(2)]
    results = [process.communicate(timeout=30)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert results == [f"{checkout.venv}\n"] * 2
    assert checkout.calls() == MADE


def test_setup_takes_the_folder_from_the_environment(checkout, tmp_path):
    code, out, _ = checkout.run("scripts/setup", cwd=tmp_path, CONSENSUS_VENV="other/")
    assert (code, out) == (0, f"{tmp_path}/other\n")
    assert (tmp_path / "other/bin/python").exists()
    assert not checkout.venv.exists()


def test_setup_leaves_a_folder_of_someone_else_alone(checkout):
    checkout.venv.mkdir()
    precious = checkout.venv / "precious"
    precious.touch()
    code, _, err = checkout.run("scripts/setup")
    assert code == 1
    assert "was not made by scripts/setup" in err
    assert err.count("\n") == 1
    assert precious.exists()


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"STUB_VERSION": "(3, 10, 19)"}, "no Python >= 3.11 on PATH"),
        ({"CONSENSUS_PYTHON": "python9"}, "CONSENSUS_PYTHON=python9 is not a Python >= 3.11"),
        ({"STUB_BARE": "1"}, "python3.11-venv"),
    ],
)
def test_setup_says_in_one_line_which_python_is_missing(checkout, env, message):
    code, out, err = checkout.run("scripts/setup", **env)
    assert (code, out) == (1, "")
    assert message in err
    assert err.count("\n") == 1
    assert not checkout.venv.exists()


def test_setup_without_any_python(checkout):
    checkout.python.unlink()
    code, out, err = checkout.run("scripts/setup")
    assert (code, out) == (1, "")
    assert err.startswith("scripts/setup: no Python >= 3.11 on PATH")
    assert err.count("\n") == 1


# ---- scripts/train and launch/local.sh, with the same stand-ins


def command_of(cwd: Path, processes: int, *overrides: str, omp: str = "1") -> str:
    """The output of the stand-in python when it is started correctly."""
    run = "-m torch.distributed.run --standalone --local-addr=127.0.0.1"
    rest = " ".join(["-m consensus.train", *overrides])
    return f"cwd={cwd} omp={omp} {run} --nproc-per-node={processes} {rest}\n"


def test_train_sets_up_and_starts_four_processes_where_it_is_called(checkout, tmp_path):
    code, out, _ = checkout.run("scripts/train", "potential=tan", cwd=tmp_path)
    assert code == 0
    assert out == command_of(tmp_path, 4, "experiment=digits", "potential=tan")
    assert checkout.calls() == MADE


def test_train_keeps_a_chosen_experiment(checkout, tmp_path):
    _, out, _ = checkout.run("scripts/train", "seed=1", "experiment=smoke", cwd=tmp_path, NPROC="2")
    assert out == command_of(tmp_path, 2, "seed=1", "experiment=smoke")


def test_train_stops_where_setup_fails(checkout):
    code, out, err = checkout.run("scripts/train", STUB_VERSION="(3, 10, 19)")
    assert (code, out) == (1, "")
    assert err.count("\n") == 1


def test_local_without_arguments_prints_its_usage_and_starts_nothing(checkout):
    code, out, err = checkout.run("launch/local.sh", NPROC="2")
    assert (code, out) == (2, "")
    assert err.startswith("usage: launch/local.sh [NPROC] [OVERRIDE ...]\n")
    assert "set -" not in err
    assert checkout.calls() == []


def test_local_takes_the_number_of_processes_first(checkout):
    checkout.run("scripts/setup")
    code, out, err = checkout.run("launch/local.sh", "8", "data=mnist", OMP_NUM_THREADS="3")
    assert code == 0
    assert out == command_of(checkout.root, 8, "data=mnist", omp="3")
    assert err.rstrip().endswith(" --nproc-per-node=8 -m consensus.train data=mnist")


@pytest.mark.parametrize(
    ("gpus", "visible", "processes"),
    [
        (8, None, 8),
        (0, None, 1),
        (8, "2,3", 2),
        (8, "", 1),
        (8, "-1", 1),
        (8, "3,-1,4", 1),  # CUDA stops at the first invalid entry
        (2, "0,1,2", 2),
        (8, "GPU-8f2a,MIG-77", 2),
        (8, "08", 1),
        (0, "0,1", 1),
        (8, "NoDevFiles", 1),
    ],
)
def test_one_process_for_each_visible_gpu(checkout, gpus, visible, processes):
    checkout.run("scripts/setup")
    tool = checkout.bin / "nvidia-smi"
    tool.write_text(f"#!/usr/bin/env bash\nfor ((i = 0; i < {gpus}; i++)); do echo GPU $i; done\n")
    tool.chmod(0o755)
    env = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    code, out, err = checkout.run("launch/node.sh", **env)
    assert (code, out) == (0, command_of(checkout.root, processes)), err


@pytest.mark.parametrize(
    ("place", "rest"),
    [
        ("node1:29400", ""),
        ("10.0.0.99:29400", ",is_host=true"),  # the stand-in python can bind to any address
        ("[fd00::99]:29400", ",is_host=true"),
        ("127.0.0.1:29400", " --local-addr=127.0.0.1"),
        ("[::1]:29400", " --local-addr=::1"),
    ],
)
def test_nodes_meet_at_a_name_or_an_address(checkout, place, rest):
    checkout.run("scripts/setup")
    code, out, err = checkout.run("launch/node.sh", NNODES="2", NPROC="1", RENDEZVOUS=place)
    assert code == 0, err
    meeting = f"--rdzv-endpoint={place} --rdzv-id=consensus --rdzv-conf=join_timeout=600"
    assert f"{meeting}{rest} --nproc-per-node=1" in out


@pytest.mark.parametrize("place", ["", "node1", "node1:", "::1:29400", "[::1]", "[node1]:29400"])
def test_a_rendezvous_that_is_no_place_is_refused(checkout, place):
    code, out, err = checkout.run("launch/node.sh", NNODES="2", NPROC="1", RENDEZVOUS=place)
    assert (code, out) == (2, "")
    assert err.startswith(f"launch/node.sh: RENDEZVOUS={place}: 2 nodes meet at host:port")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("hosts", "address", "place"),
    [
        ("alice@node1,bob@node2", None, "node1:29400"),
        ("fd00::1,fd00::2", None, "[fd00::1]:29400"),
        ("alice@fd00::1,node2", None, "[fd00::1]:29400"),
        ("alias1,alias2", "10.0.0.1", "10.0.0.1:29400"),
        ("alias1,alias2", "[fd00::1]", "[fd00::1]:29400"),
    ],
)
def test_multinode_gives_the_user_to_ssh_alone(tmp_path, hosts, address, place):
    remote = tmp_path / "remote"
    remote.write_text('#!/bin/sh\necho "$1" >>"$0.hosts"\n')
    remote.chmod(0o755)
    env = os.environ | {"REMOTE": str(remote)} | ({"ADDRESS": address} if address else {})
    command = [ROOT / "launch/multinode.sh", hosts]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=True)
    assert sorted((tmp_path / "remote.hosts").read_text().split()) == sorted(hosts.split(","))
    started = [line.replace("\\[", "'[").replace("\\]", "]") for line in done.stderr.splitlines()]
    assert [
        f" RENDEZVOUS={place.strip(chr(39))} " in line.replace("'", "") for line in started
    ] == [
        True,
        True,
    ]


def test_under_nohup_torchrun_leaves_sighup_alone(checkout):
    checkout.run("scripts/setup")
    told = 'echo "handled=${PET_SIGNALS_TO_HANDLE:-default}"\n'
    python = checkout.venv / "bin/python"
    python.write_text(python.read_text() + told)
    for ignore, handled in (("", "default"), ("trap '' HUP; ", "SIGTERM,SIGINT,SIGQUIT")):
        script = f"{ignore}exec '{checkout.root}/launch/node.sh'"
        done = subprocess.run(
            ["bash", "-c", script],
            env=checkout.env | {"NPROC": "1"},
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
        assert done.stdout.endswith(f"handled={handled}\n")


def test_a_clone_with_windows_line_endings_has_none_in_its_files(tmp_path):
    if shutil.which("git") is None:
        pytest.skip("needs git")
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    names = [
        ".gitattributes",
        *SHELL,
        "launch/kubernetes/job.yaml",
        "Dockerfile",
        "docs/figure1.png",
    ]
    for name in names:
        (first / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, first / name)

    def git(*words: str, cwd: Path = first) -> None:
        settings = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "core.autocrlf=true"]
        subprocess.run(["git", *settings, *words], cwd=cwd, check=True, capture_output=True)

    git("init")
    git("add", "--all")
    git("commit", "--message=all")
    git("clone", str(first), str(second), cwd=tmp_path)
    assert [n for n in names if (second / n).read_bytes() != (ROOT / n).read_bytes()] == []


# ---- scripts/bench, with the same stand-ins


@pytest.mark.parametrize(
    ("words", "started", "omp"),
    [
        (["compare", "--quick"], "-m benchmarks.compare --quick", "1"),
        (["--quick", "--processes", "4"], "-m benchmarks.compare --quick --processes 4", "1"),
        (["gpu"], "-m benchmarks.gpu", "7"),
        (["latency", "--help"], "-m benchmarks.latency --help", "1"),
        (["population", "--quick"], "-m benchmarks.population --quick", "7"),
        (["robust"], "-m benchmarks.robust", "1"),
        (["scaling"], "-m benchmarks.scaling", "1"),
        (["startup"], "-m benchmarks.startup", "1"),
        (["checkpoints"], "-m benchmarks.checkpoints", "7"),
    ],
)
def test_bench_starts_the_benchmark_of_that_name(checkout, tmp_path, words, started, omp):
    code, out, err = checkout.run("scripts/bench", *words, cwd=tmp_path, OMP_NUM_THREADS="7")
    assert code == 0, err
    assert out == f"cwd={checkout.root} omp={omp} {started}\n"


@pytest.mark.parametrize("words", [[], ["--help"]])
def test_bench_lists_the_benchmarks(checkout, words):
    code, out, _ = checkout.run("scripts/bench", *words)
    assert code == 0
    names = re.findall(r"^  (\w+)  ", out, re.MULTILINE)
    here = ["compare", "coupling", "pull", "robust", "elastic", "char_gpt", "gpu"]
    assert names == [*here, "latency", "sums", "population", "scaling", "startup", "checkpoints"]
    assert all((ROOT / "benchmarks" / f"{name}.py").exists() for name in names)
    assert checkout.calls() == []


def test_bench_refuses_another_name(checkout):
    code, out, err = checkout.run("scripts/bench", "speed")
    assert (code, out) == (2, "")
    assert err.startswith("scripts/bench: NAME is speed; allowed: compare ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("nproc", ["0", "four", "-1", "2.5"])
def test_local_refuses_what_is_no_number_of_processes(checkout, nproc):
    code, out, err = checkout.run("launch/local.sh", "seed=1", NPROC=nproc)
    assert (code, out) == (2, "")
    assert f"NPROC={nproc}" in err
    assert err.count("\n") == 1


# ---- ELASTIC=true, with the same stand-ins


@pytest.mark.parametrize(
    ("variables", "rest"),
    [
        ({}, "--processes=1 --expected=1"),
        ({"NPROC": "3"}, "--processes=3 --expected=3"),
        (
            {"NPROC": "3", "NNODES": "2", "RENDEZVOUS": "node1:29400", "RUN_ID": "mine"},
            "--processes=3 --expected=6 --store=node1:29400 --run=mine --wait=8 --serve",
        ),
        (  # one more node, later
            {"RENDEZVOUS": "[fd00::1]:29400", "SERVE": "false"},
            "--processes=1 --expected=1 --store=[fd00::1]:29400 --run=consensus --wait=8",
        ),
    ],
)
def test_a_node_of_an_elastic_run(checkout, variables, rest):
    checkout.run("scripts/setup")
    own = {"ELASTIC": "true", "NPROC": "1"} | variables  # the stand-in python has every address
    code, out, err = checkout.run("launch/node.sh", "group.timeout_s=7.5", "seed=1", **own)
    assert code == 0, err
    command = f"-m consensus.elastic {rest} group.timeout_s=7.5 seed=1"
    assert out == f"cwd={checkout.root} omp=1 {command}\n"
    assert err.replace("\\", "").rstrip().endswith(command)


def test_the_node_with_the_address_of_the_store_keeps_it(checkout):
    (checkout.venv / "bin").mkdir(parents=True)
    (checkout.venv / "bin/python").symlink_to(sys.executable)
    for host, here in (
        ("localhost", True),
        ("127.0.0.1", True),
        ("::1", True),
        ("192.0.2.1", False),
    ):
        place = f"[{host}]" if ":" in host else host
        own = {"RENDEZVOUS": f"{place}:1", "ELASTIC": "true", "NPROC": "1"}
        _, _, err = checkout.run("launch/node.sh", "group.timeout_s=1", "--bad", **own)
        assert (" --serve " in err.splitlines()[0]) == here, host


def test_the_doctor_of_an_elastic_run_is_that_of_torchrun(checkout):
    checkout.run("scripts/setup")
    own = {"ELASTIC": "true", "NPROC": "2", "MODULE": "consensus.doctor"}
    _, out, _ = checkout.run("launch/node.sh", **own)
    assert "-m torch.distributed.run --standalone" in out


@pytest.mark.parametrize("name", ["ELASTIC", "SERVE"])
def test_a_variable_that_is_neither_true_nor_false_is_refused(checkout, name):
    code, out, err = checkout.run("launch/node.sh", **{name: "yes"})
    assert (code, out) == (2, "")
    assert err == f"launch/node.sh: {name}=yes: allowed are true and false\n"


def test_an_elastic_run_over_nodes_needs_a_place_for_its_store(checkout):
    code, _, err = checkout.run("launch/node.sh", ELASTIC="true", NNODES="2", NPROC="1")
    assert code == 2
    assert err.startswith("launch/node.sh: RENDEZVOUS=: 2 nodes meet at host:port")
