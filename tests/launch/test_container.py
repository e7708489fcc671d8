"""The Dockerfile: what it says, and, by scripts/container_test, what it makes."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.testing import ROOT, container, hosts

DOCKERFILE = container.parse((ROOT / "Dockerfile").read_text())
RUNS = "/srv/consensus/runs"


def values(name):
    return [found.value for found in DOCKERFILE if found.name == name]


# ---- reading a Dockerfile


def test_instructions_are_read_over_several_lines_without_comments():
    text = "# one\nFROM a\n\nENV A=1 \\\n    # two\n    B='2 3'\ncmd [\"x\"]\n"
    assert container.parse(text) == [
        container.Instruction("FROM", "a", 2),
        container.Instruction("ENV", "A=1 B='2 3'", 4),
        container.Instruction("CMD", '["x"]', 7),
    ]


@pytest.mark.parametrize(
    "text",
    ["ADD a b", "ENV A 1", "ENV A=$PATH", "COPY --chown=1 a b", "COPY absent .", "CMD sleep 1"],
)
def test_what_it_does_not_know_is_refused(tmp_path, text):
    (tmp_path / ".dockerignore").write_text("*\n")
    builder = container.Builder(tmp_path, container.Image(tmp_path))
    (instruction,) = container.parse(text)
    with pytest.raises(ValueError, match=r"known|context|Expecting value"):
        builder.carry_out(instruction)


@pytest.mark.parametrize(
    ("patterns", "out", "into"),
    [
        ("*\n!a\n**/b", ["x", "x/a", "a/b", "a/c/b/d", "b"], ["a", "a/c", "a/bc"]),
        ("a/*.py", ["a/x.py"], ["x.py", "a/b/x.py", "a/x.pyc"]),
        ("# a\n\n?/x", ["a/x"], ["a", "aa/x"]),
    ],
)
def test_dockerignore(patterns, out, into):
    ignore = container.Ignore.read(patterns)
    assert [path for path in out + into if ignore.excludes(path)] == out


def test_what_is_ignored_at_the_top_is_not_walked_but_where_something_is_brought_back(tmp_path):
    for file in ("a/x", "b/x", "c/d/x", "c/e", "x", "e"):
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    for text, files in (
        ("*\n!a\n!c/d\n", ["a/x", "c/d/x"]),
        ("*\n!**/e\n", ["c/e", "e"]),
        ("b\n", ["a/x", "c/d/x", "c/e", "e", "x"]),
    ):
        (tmp_path / ".dockerignore").write_text(text)
        assert [name for name in container.context(tmp_path) if name != ".dockerignore"] == files
    entered = [name for name in "abcd" if container.Ignore.read("*\n!a\n!c/d\n").enters(name)]
    assert entered == ["a", "c"]


# ---- what ours says


def test_the_base_is_pinned_and_has_the_oldest_python_that_we_support():
    (base,) = values("FROM")
    version = re.fullmatch(r"python:(3\.\d+)\.\d+-slim-[a-z]+", base)
    assert version, f"{base} may be another image tomorrow"
    assert f'requires-python = ">={version[1]}"' in (ROOT / "pyproject.toml").read_text()


def test_the_image_gets_what_a_run_needs_and_nothing_else():
    files = container.context(ROOT)
    sources = [source for value in values("COPY") for source in value.split()[:-1]]
    brought = {file for source in sources for file in container.copied(source, files)}
    assert set(files) == brought
    assert not [file for file in files if "__pycache__" in file or "/." in file]
    ours = {str(path.relative_to(ROOT)) for path in (ROOT / "consensus").rglob("*.py")}
    ours |= {str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.yaml")}
    assert ours <= brought


def test_it_runs_as_a_user_that_is_not_root_which_kubernetes_can_see():
    (user,) = values("USER")
    (job,) = [
        document
        for document in yaml.safe_load_all((ROOT / "launch/kubernetes/job.yaml").read_text())
        if document["kind"] == "Job"
    ]
    assert int(user) == job["spec"]["template"]["spec"]["securityContext"]["runAsUser"] > 0


def test_what_it_starts_is_in_it():
    (entrypoint,), (health,) = values("ENTRYPOINT"), values("HEALTHCHECK")
    for words in (entrypoint, health.partition("CMD ")[2]):
        path = Path(container.exec_form(words)[0]).relative_to("/opt/consensus")
        assert os.access(ROOT / path, os.X_OK)
        assert str(path) in container.context(ROOT)


# ---- launch/health.sh

STAND_IN = """#!/usr/bin/env bash
printf '%s\\n' "$PWD" "${RANK:-none}" "$*" >"$STUB_LOG"
printf 'line %s\\n' {1..9}
exit "$STUB_EXIT"
"""


def health(folder, **env):
    folder.joinpath("tmp").mkdir(exist_ok=True)
    return subprocess.run(
        [ROOT / "launch/health.sh"],
        cwd=folder, env=os.environ | {"TMPDIR": str(folder / "tmp")} | env,
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(("code", "answer"), [(0, 0), (1, 1), (2, 1), (75, 1)])
def test_health_check_is_a_run_of_its_own(tmp_path, code, answer):
    python = tmp_path / "bin/python"
    python.parent.mkdir()
    python.write_text(STAND_IN)
    python.chmod(0o755)
    log = tmp_path / "log"
    own = {"CONSENSUS_VENV": str(tmp_path), "STUB_LOG": str(log), "STUB_EXIT": str(code)}
    done = health(tmp_path, RANK="3", WORLD_SIZE="4", **own)
    assert done.returncode == answer, "docker knows 0 and 1"
    assert done.stdout == ""
    assert done.stderr.splitlines() == [f"line {i}" for i in range(5, 10) if code]
    folder, rank, arguments = log.read_text().splitlines()
    assert folder.startswith(f"{tmp_path}/tmp/")
    assert rank == "none"
    assert arguments.startswith("-m consensus.train experiment=smoke device=cpu ")
    assert list((tmp_path / "tmp").iterdir()) == []


def test_health_check_trains_and_leaves_nothing(tmp_path):
    done = health(tmp_path, CONSENSUS_VENV=sys.prefix, PYTHONPATH=str(ROOT))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert [path.name for path in tmp_path.rglob("*")] == ["tmp"]


# ---- what the Dockerfile makes


@pytest.fixture(scope="module")
def image():
    started = time.monotonic()
    image = container.build(ROOT, Path(os.environ["CONSENSUS_CONTAINER"]))
    container.say(f"built in {time.monotonic() - started:.0f} s")
    return image


@pytest.fixture
def runs(tmp_path):
    """A folder of user 1000, as the mounted one must be."""
    folder = tmp_path / "runs"
    folder.mkdir()
    os.chown(folder, 1000, 1000)
    return folder


PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}


def said(image, *words, **options):
    code, out, err = image.start(*words, **PIPES, **options).finish()
    assert code == 0, err
    return out


def check_health(image, **options):
    started = time.monotonic()
    code, out, err = image.start(*image.health, **PIPES, **options).finish()
    last = err.strip().rpartition("\n")[2]
    container.say(f"health check: exit code {code} after {time.monotonic() - started:.0f} s {last}")
    return code, out, err


@pytest.mark.container
def test_image_has_what_the_lock_pins_and_no_more(image):
    container.say(f"{container.megabytes(image.root)} MB in all, the base included; the largest:")
    largest = (
        "du -m -d 1 /usr/local/lib/python3*/*-packages | sort -rn | head -n 8; du -sm /usr/lib/gcc"
    )
    container.say(said(image, "/bin/sh", "-c", largest, user="0").rstrip())
    lines = (ROOT / "requirements.lock").read_text().splitlines()[1:]
    python = {"python_version": "3.11", "python_full_version": "3.11.2"}
    pins = [pin for pin in map(Requirement, lines) if not pin.marker or pin.marker.evaluate(python)]
    lock = {canonicalize_name(pin.name): str(pin.specifier)[2:] for pin in pins}
    shown = said(image, "pip", "list", "--format=json", "--path", packages(image))
    found = {canonicalize_name(p["name"]): p["version"] for p in json.loads(shown)}
    assert found.pop("consensus-training")
    assert found == {name: lock[name] for name in found}
    dev = for_developers() & set(found)
    assert not dev, f"{dev} is for developers"
    left = said(image, "find", "/tmp", "/root", "/var/lib/apt/lists", "-type", "f", user="0")
    assert [path for path in left.split() if not path.startswith("/root/.")] == []


def packages(image):
    script = "import torch; print(torch.__path__[0].rpartition('/')[0])"
    return said(image, "python3", "-c", script).strip()


def for_developers():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = project["optional-dependencies"]["dev"]
    return {canonicalize_name(Requirement(name).name) for name in names}


@pytest.mark.container
def test_user_is_not_root_and_may_not_change_the_image(image):
    assert said(image, "id", "-u") == "1000\n"
    assert said(image, "sh", "-c", "echo $HOME; pwd") == "/tmp\n/srv/consensus\n"
    writable = "find / -xdev -writable -not -type l -not -path '/proc/*' -not -path '/sys/*'"
    found = said(image, "sh", "-c", f"{writable} 2>/dev/null || true").split()
    assert set(found) <= {"/tmp", "/var/tmp", "/run/lock", "/srv/consensus", RUNS}


@pytest.mark.container
def test_triton_can_build_what_it_builds_on_a_gpu(image):
    """The part that calls the driver, here with an empty library in the driver's place."""
    script = """
import os, subprocess
from triton.backends.nvidia import driver
from triton.runtime.build import compile_so_from_file

subprocess.run("gcc -shared -o /tmp/libcuda.so.1 -x c /dev/null", shell=True, check=True)
source = os.path.join(driver.dirname, "driver.c")
where = {"include_dirs": driver.include_dirs, "library_dirs": ["/tmp"]}
print(compile_so_from_file(source, "cuda_utils", libraries=driver.libraries, **where))
"""
    assert said(image, "python3", "-c", script, user="12345").startswith("/tmp/.triton/cache/")


@pytest.mark.container
@pytest.mark.parametrize("user", ["1000", "12345"])
def test_healthy(image, user):
    code, out, err = check_health(image, user=user)
    assert (code, out, err) == (0, "", "")
    assert list((image.root / "srv/consensus/runs").iterdir()) == []


@pytest.mark.container
def test_unhealthy_where_it_cannot_train(image):
    configs = image.root / packages(image).lstrip("/") / "consensus/configs"
    configs.chmod(0o700)
    try:
        code, out, err = check_health(image)
    finally:
        configs.chmod(0o755)
    assert (code, out) == (1, "")
    assert "configs" in err


@pytest.mark.container
@pytest.mark.parametrize(
    ("user", "overrides"),
    [("1000", []), ("12345", ["deterministic=true", "output.run_dir=runs/x"])],
)
def test_a_run_to_its_end_leaves_its_files_in_the_mounted_folder(image, runs, user, overrides):
    os.chown(runs, int(user), 0)
    words = ["experiment=smoke", "potential=tan", *overrides]
    process = image.run(*words, env={"NPROC": "2"}, user=user, volumes={runs: RUNS}, **PIPES)
    code, out, err = process.finish()
    assert code == 0, err
    assert "2 workers, 2 processes on cpu" in out
    assert "Traceback" not in err
    assert "Warning" not in err, err
    (folder,) = runs.iterdir()
    names = {path.name for path in folder.iterdir()}
    assert names >= {"config.yaml", "metrics.jsonl", "model.pt", "convergence.png", "checkpoints"}
    assert (folder / "model.pt").stat().st_uid == int(user)


@pytest.mark.container
def test_a_stop_reaches_the_ranks_and_they_leave_a_checkpoint(image, runs):
    words = ["experiment=digits", "algorithm.iterations=1000000", "output.run_dir=runs/long"]
    words += ["output.checkpoint_every=1000000", "output.eval_every=100"]
    options = {"env": {"NPROC": "2"}, "volumes": {runs: RUNS}}
    process = image.run(*words, **options, **PIPES)
    try:
        deadline = time.monotonic() + 120
        while not (runs / "long/metrics.jsonl").exists():
            assert time.monotonic() < deadline
            assert process.process.poll() is None, process.finish()
            time.sleep(0.1)
        assert check_health(image, **options) == (0, "", ""), "beside the run"
        assert not list((runs / "long").glob("checkpoints/*"))
        stopped = time.monotonic()
        process.signal(signal.SIGTERM)
    finally:
        code, _, err = process.finish(timeout=60)
    container.say(f"stopped in {time.monotonic() - stopped:.0f} s with exit code {code}")
    assert code != 0
    assert "SIGTERM: stopped at iteration" in err
    assert len(list((runs / "long/checkpoints").iterdir())) == 1


@pytest.mark.container
def test_a_mistake_is_one_line(image, runs):
    process = image.run("potential=cubik", env={"NPROC": "2"}, volumes={runs: RUNS}, **PIPES)
    code, _, err = process.finish()
    assert code != 0
    lines = [line for line in err.splitlines() if line.startswith("consensus.train:")]
    assert len(lines) == 1, err
    assert "cubik" in lines[0]
    assert list(runs.iterdir()) == []


@pytest.mark.container
@pytest.mark.hosts
def test_two_containers_meet_as_the_pods_of_the_job_do(image, runs, tmp_path):
    """By launch/node.sh and the interface; the image has no `ip`."""
    words = ["/opt/consensus/launch/node.sh", "experiment=smoke", "output.run_dir=runs/pods"]
    with hosts.Hosts(2, tmp_path) as two:
        meet = {"RENDEZVOUS": f"{two.addresses[0]}:29400", "INTERFACE": "eth0"}
        own = {"env": {"NNODES": "2", "NPROC": "1"} | meet, "volumes": {runs: RUNS}} | PIPES
        pods = [image.start(*words, network=two.space(name), **own) for name in two.names]
        ends = [pod.finish() for pod in pods]
    assert [code for code, _, _ in ends] == [0, 0], ends
    for address, (_, _, err) in zip(two.addresses, ends, strict=True):
        assert f"--local-addr={address}" in err
    assert (runs / "pods/model.pt").exists()
