"""Faults of a long run: no rank hangs, one line names rank and cause, and the run can continue.

Every fault is injected into real processes (testing/faults.py, testing/launch.py). Afterwards the
run is continued without it, and must end with the bits of an undisturbed run.
"""

import contextlib
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

import consensus
from consensus.server import digest
from tests.test_train import command, environment, marked
from tests.testing.launch import Ranks
from tests.testing.small_runs import rows_of

pytestmark = [pytest.mark.ranks, pytest.mark.slow]

TIMEOUT_S = 6
RUN = [
    "model=logistic",
    "potential=tan",
    "device=cpu",
    "algorithm.iterations=40",
    "algorithm.batch_size=8",
    "output.eval_every=10",
    "output.checkpoint_every=5",
    "output.log_every=2",
    "output.tensorboard=false",
    "output.run_dir=run",
    "group.timeout_s=60",  # other tests may occupy the cores for seconds
]
LOSING = f"group.timeout_s={TIMEOUT_S}"
LATEST_S = TIMEOUT_S + 25  # includes the start of the processes, beside other tests


def final(folder: Path) -> tuple[str, list[int], bytes]:
    """The digest of u that all ranks agreed on, the iterations of the rows, and the model."""
    rows = rows_of(folder / "run")
    state = torch.load(folder / "run/model.pt", weights_only=True)
    u = torch.cat([value.flatten() for value in state.values()])
    of_model = f"{int(digest(u)) & (2**64 - 1):016x}"
    manifest = json.loads((folder / "run/checkpoints/00000040/manifest.json").read_text())
    assert of_model == rows[-1]["digest"] == manifest["digest"], "replicas, file and checkpoint"
    return of_model, [row["iteration"] for row in rows], u.numpy().tobytes()


@pytest.fixture(scope="module", autouse=True)
def warm(tmp_path_factory):
    """Start the fork server; LATEST_S does not cover its imports."""
    with Ranks(1, ["--help"], tmp_path_factory.mktemp("warm")) as ranks:
        ranks.wait(120)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """`undisturbed(size)`: the result of the run of `size` ranks without a fault."""

    @functools.cache
    def make(size: int) -> tuple[str, list[int], bytes]:
        folder = tmp_path_factory.mktemp("undisturbed")
        with Ranks(size, RUN, folder) as ranks:
            assert ranks.wait(120) == [0] * size, ranks.err(0)
        return final(folder)

    return make


def strike(folder: Path, size: int, fault: dict, *overrides: str) -> Ranks:
    """Start a run with this fault."""
    how = ["plugins=[tests.testing.faults]", *overrides]
    return Ranks(size, [*RUN, *how], folder, env={"FAULTS": json.dumps([fault])})


def continued(folder: Path, size: int) -> tuple[str, list[int], bytes]:
    """The result of the run that continues after the fault."""
    with Ranks(size, [*RUN, "resume=auto"], folder) as ranks:
        assert ranks.wait(120) == [0] * size, ranks.err(0)
    return final(folder)


def newest(folder: Path) -> int:
    names = [path.name for path in (folder / "run/checkpoints").iterdir()]
    return max(int(name) for name in names if name.isdecimal())


LOST = r"rank 0: lost a peer in `\w+`: "
SILENT = r"no sign of life from rank 1 \(killed, stopped or cut off\)"


@pytest.mark.parametrize(
    ("kind", "size", "code", "why"),
    [
        ("kill", 2, -signal.SIGKILL, SILENT),
        ("kill", 4, -signal.SIGKILL, SILENT),
        ("stop", 4, None, SILENT),
        ("hang", 2, None, "rank 1 lives but did not come in time"),
        ("raise", 4, 1, "rank 1 failed: RuntimeError: an injected failure"),
    ],
    ids=lambda value: value if isinstance(value, int | str) and len(str(value)) < 9 else "",
)
def test_a_rank_that_is_lost(undisturbed, tmp_path, kind, size, code, why):
    started = time.monotonic()
    with strike(tmp_path, size, {"kind": kind, "rank": 1, "iteration": 17}, LOSING) as ranks:
        while [c for rank, c in enumerate(ranks.codes) if rank != 1].count(None):
            assert time.monotonic() - started < LATEST_S, ranks.codes
            time.sleep(0.05)
        others = [rank for rank in range(size) if rank != 1]
        assert [ranks.codes[rank] for rank in others] == [1] * len(others)
        if code is not None:
            assert ranks.wait(LATEST_S)[1] == code
        (said,) = ranks.lines(0)
        assert re.match(f"consensus.train: {LOST}{why}", said), said
        assert all(len(ranks.lines(rank)) == 1 for rank in others)
        assert not any("Traceback" in ranks.err(rank) for rank in others)
    assert newest(tmp_path) in (10, 15)
    assert continued(tmp_path, size) == undisturbed(size)


@pytest.mark.parametrize(("kind", "size"), [("stop", 2), ("slow", 4)])
def test_a_rank_that_comes_back_in_time(undisturbed, tmp_path, kind, size):
    fault = {"kind": kind, "rank": 1, "iteration": 17, "seconds": 2.0}
    with strike(tmp_path, size, fault) as ranks:
        assert ranks.wait(120) == [0] * size, [ranks.err(rank) for rank in range(size)]
    assert final(tmp_path) == undisturbed(size)


def test_a_rank_that_dies_before_the_rendezvous(tmp_path):
    fault = {"kind": "kill", "rank": 1, "iteration": "import"}
    with strike(tmp_path, 2, fault, LOSING) as ranks:
        assert ranks.wait(LATEST_S) == [1, -signal.SIGKILL]
        (said,) = ranks.lines(0)
        assert said.startswith("consensus.train: rank 0: lost a peer in `start`: ")
        assert "Traceback" not in ranks.err(0)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("size", [2])
def test_a_rank_that_is_lost_at_the_very_end(undisturbed, tmp_path, size):
    fault = {"kind": "kill", "rank": 1, "iteration": "finish"}
    with strike(tmp_path, size, fault, LOSING) as ranks:
        codes = ranks.wait(LATEST_S)
        assert codes == [-signal.SIGKILL if rank == 1 else 1 for rank in range(size)]
        assert re.match(f"consensus.train: {LOST}no sign of life from rank 1", ranks.lines(0)[0])
    assert continued(tmp_path, size) == undisturbed(size)


@pytest.mark.parametrize("size", [4])
def test_nan_in_the_gradient_of_one_worker(undisturbed, tmp_path, size):
    with strike(tmp_path, size, {"kind": "nan", "rank": 1, "iteration": 17}) as ranks:
        assert ranks.wait(LATEST_S) == [1] * size
        assert ranks.lines(0)[0].startswith(
            "consensus.train: iteration 18: worker 1 on rank 1 became non-finite, and u with it; "
        )
        assert "Traceback" not in ranks.err(1)
    assert newest(tmp_path) == 15, "no checkpoint holds a NaN"
    assert continued(tmp_path, size) == undisturbed(size)


@pytest.mark.parametrize("size", [2])
def test_replicas_that_differ_by_one_bit(undisturbed, tmp_path, size):
    with strike(tmp_path, size, {"kind": "flip_bit", "rank": 1, "iteration": 17}) as ranks:
        assert ranks.wait(LATEST_S) == [1] * size
        assert ranks.lines(0)[0].startswith(
            "consensus.train: u on rank [1] differs from u on rank 0: the replicas diverged"
        )
    assert newest(tmp_path) == 15, "no checkpoint holds diverged replicas"
    assert continued(tmp_path, size) == undisturbed(size)


def test_replicas_that_differ_are_found_by_the_checkpoint_too(tmp_path):
    with strike(tmp_path, 4, {"kind": "flip_bit", "rank": 1, "iteration": 22}) as ranks:
        assert ranks.wait(LATEST_S) == [1] * 4
        assert "u on rank [1] differs from u on rank 0" in ranks.lines(0)[0]
    assert newest(tmp_path) == 20
    assert not list((tmp_path / "run/checkpoints").glob(".*"))


@pytest.mark.parametrize(
    ("kind", "size", "cause"),
    [
        ("no_reader", 1, "Broken pipe"),
        ("no_reader", 2, "Broken pipe"),
        ("full", 2, "No space left"),
    ],
)
def test_a_run_goes_on_without_its_standard_output(undisturbed, tmp_path, kind, size, cause):
    with strike(tmp_path, size, {"kind": kind, "rank": 0, "iteration": 12}) as ranks:
        assert ranks.wait(120) == [0] * size, ranks.err(0)
        assert ranks.err(0).startswith(f"consensus.train: no more output ({cause}")
        assert ranks.err(0).count("\n") == 1
    assert final(tmp_path) == undisturbed(size)


@pytest.mark.parametrize(("name", "size"), [("SIGTERM", 2), ("SIGUSR1", 4), ("SIGINT", 1)])
def test_one_rank_receives_a_stop_signal(undisturbed, tmp_path, name, size):
    fault = {"kind": "signal", "signal": name, "rank": size // 2, "iteration": 17}
    with strike(tmp_path, size, fault) as ranks:
        assert ranks.wait(LATEST_S) == [75] * size
        (said,) = ranks.lines(0)
        pattern = rf"consensus.train: {name}: stopped at iteration (\d+) with a checkpoint; "
        stopped = int(re.match(pattern, said)[1])
        assert 17 < stopped <= 20, "log_every is 2"
        assert all(ranks.err(rank) == "" for rank in range(1, size))
    assert newest(tmp_path) == stopped
    assert continued(tmp_path, size) == undisturbed(size)


@pytest.mark.parametrize("size", [4])
def test_all_ranks_are_interrupted(undisturbed, tmp_path, size):
    fault = {"kind": "signal", "signal": "SIGINT", "rank": "all", "iteration": 17}
    with strike(tmp_path, size, fault) as ranks:
        assert ranks.wait(LATEST_S) == [75] * size
        (said,) = ranks.err(0).splitlines()
        assert said.startswith("consensus.train: SIGINT: stopped at iteration ")
        assert all(ranks.err(rank) == "" for rank in range(1, size))
    assert continued(tmp_path, size) == undisturbed(size)


@pytest.mark.parametrize("size", [2])
def test_a_quota_is_reached_while_a_checkpoint_is_written(undisturbed, tmp_path, size):
    fault = {"kind": "quota", "bytes": 20_000, "rank": 1, "iteration": 17}
    with strike(tmp_path, size, fault) as ranks:
        assert ranks.wait(LATEST_S) == [1] * size
        # The checkpoint of iteration 15 may still be in writing.
        pattern = r"consensus.train: rank 1: cannot write checkpoint \S+/000000(15|20): (.*)"
        match = re.fullmatch(pattern, ranks.lines(0)[0])
        assert match, ranks.lines(0)
        assert match[2] == "File too large"
    assert newest(tmp_path) == int(match[1]) - 5
    assert not list((tmp_path / "run/checkpoints").glob(".*"))
    assert continued(tmp_path, size) == undisturbed(size)


# ---- file systems, with one process


def can_mount() -> bool:
    """Whether this user may create a mount namespace."""
    if not shutil.which("unshare"):
        return False
    return subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode == 0


def with_mount(mount: str, folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """The command of one process, in a namespace in which `mount` has been called."""
    script = f'{mount} && shift && exec "$@"'
    return subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, "sh", "-", *command(*RUN, *overrides)],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_full_disk(tmp_path):
    if not can_mount():
        pytest.skip("needs a mount namespace; the quota above is tested everywhere")
    (tmp_path / "run").mkdir()
    # Three checkpoints of 96 kB do not fit. The disk is listed before it is unmounted.
    keep = "output.keep_checkpoints=9"
    script = "mount -t tmpfs -o size=300k none run"
    look = f'{script} && shift && "$@"; code=$?; ls -A run/checkpoints; exit $code'
    ended = subprocess.run(
        ["unshare", "-rm", "sh", "-c", look, "sh", "-", *command(*RUN, keep)],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 1, ended.stderr
    (line,) = ended.stderr.splitlines()
    assert line.startswith("consensus.train: rank 0: cannot write ")
    assert "No space left on device" in line
    left = [name for name in ended.stdout.splitlines() if re.fullmatch(r"\.?\d{8}\S*", name)]
    assert left
    assert left == [name for name in left if name.isdecimal()], "no incomplete checkpoint"


def test_a_read_only_run_directory(tmp_path):
    (tmp_path / "run").mkdir()
    expected = f"cannot write the run directory: {{}}: {tmp_path}/run/.lock"
    if can_mount():
        read_only = "mount --bind run run && mount -o remount,ro,bind run"
        ended, why = with_mount(read_only, tmp_path), "Read-only file system"
    else:
        (tmp_path / "run").chmod(0o500)
        ended, why = with_mount("true", tmp_path), "Permission denied"
    assert ended.returncode == 1
    assert ended.stderr == f"consensus.train: rank 0: {expected.format(why)}\n"


@pytest.mark.parametrize("size", [0, 1, 20, 1000])
def test_truncated_data(tmp_path, size):
    raw = tmp_path / "data/MNIST/raw"
    raw.mkdir(parents=True)
    header = {"images-idx3": (2051, 60000, 28, 28), "labels-idx1": (2049, 60000)}
    for part in ("train", "t10k"):
        for name, numbers in header.items():
            content = b"".join(n.to_bytes(4, "big") for n in numbers) + bytes(10_000)
            (raw / f"{part}-{name}-ubyte").write_bytes(content[:size])
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTPS_PROXY"), "http://127.0.0.1:9")
    mnist = ["data=mnist", f"data.root={tmp_path}/data"]
    with Ranks(1, [*RUN, *mnist], tmp_path, env={"no_proxy": "", **nowhere}) as ranks:
        assert ranks.wait(LATEST_S) == [2]
        (line,) = ranks.err(0).splitlines()
        assert line.startswith("consensus.train: `data.root` is ")
        assert ranks.out(0) == ""
    assert not (tmp_path / "run").exists()


# ---- under torchrun


def test_a_directory_in_use_and_a_launcher_that_is_killed(tmp_path):
    endless = ["algorithm.iterations=1000000", "output.eval_every=5", "group.timeout_s=60"]
    mark = "launcher-is-killed"
    torchrun = subprocess.Popen(
        command(*RUN, *endless, processes=2),
        cwd=tmp_path,
        env=environment(CONSENSUS_TEST_MARK=mark),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        metrics = tmp_path / "run/metrics.jsonl"
        wait_until(lambda: metrics.exists() and metrics.read_text())
        with Ranks(1, [*RUN, *endless, "resume=auto", "workers=2"], tmp_path) as second:
            assert second.wait(120) == [1]
            (line,) = second.lines(0)
        assert re.match(
            rf"consensus.train: rank 0: {tmp_path}/run is in use by another run, begun by process "
            rf"\d+ on \S+, or by ranks left of it",
            line,
        )
        torchrun.kill()
        torchrun.wait()
        wait_until(lambda: marked(mark) == [])
        assert newest(tmp_path) > 5, "the orphans have left a checkpoint"
        rows = [json.loads(line)["iteration"] for line in metrics.read_text().splitlines()]
        assert rows == sorted(set(rows))
    finally:
        torchrun.kill()
        torchrun.wait()
        for pid in marked(mark):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)


def wait_until(condition, seconds: float = 90.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_successful_run_calls_the_exit_handlers(tmp_path):
    # The processes skip the end of the interpreter, but not the functions registered with atexit.
    (tmp_path / "goodbye.py").write_text(
        "import atexit, os, pathlib\n"
        "atexit.register(lambda: pathlib.Path(f'left-{os.environ[\"RANK\"]}').touch())\n"
    )
    env = {"PYTHONPATH": f"{tmp_path}:{Path(consensus.__file__).parents[1]}"}
    with Ranks(2, [*RUN, "plugins=[goodbye]"], tmp_path, env) as ranks:
        assert ranks.wait(120) == [0, 0], ranks.err(0)
        assert "results in" in ranks.out(0)
    assert {path.name for path in tmp_path.glob("left-*")} == {"left-0", "left-1"}
