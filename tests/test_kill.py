"""Kills at random moments: a run that was killed and continued equals an uninterrupted one.

Real processes, Gloo, SIGKILL. The runs are compared in the bits of the model, every row of
metrics.jsonl, and every number on TensorBoard.

CONSENSUS_KILLS (3) is the number of runs, CONSENSUS_KILL_SEED (0) their seed. scripts/kill_test
kills 50.
"""

import functools
import json
import os
import random
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import consensus
from consensus.comm import Solo
from consensus.run.checkpoint.manifest import Manifest
from consensus.run.checkpoint.reader import choose, list_checkpoints, load
from consensus.server import digest
from tests.test_train import run as run_command
from tests.testing.launch import Ranks
from tests.testing.small_runs import rows_of

KILLS = int(os.environ.get("CONSENSUS_KILLS", "3"))
SEED = os.environ.get("CONSENSUS_KILL_SEED", "0")

# Dropout by a function: no module of the model says that it draws random numbers.
PLUGIN = """
from torch import nn
from torch.nn.functional import dropout as drop, relu
from consensus.problem import MODELS

class Dropping(nn.Module):
    def __init__(self, hidden, num_classes):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(784, hidden), nn.Linear(hidden, num_classes)

    def forward(self, images):
        return self.fc2(relu(drop(self.fc1(images.flatten(1)), 0.3, self.training)))

@MODELS.register("dropout")
def dropout(num_classes=10, hidden=16):
    return Dropping(hidden, num_classes)
"""

ITERATIONS, EVAL_EVERY, CHECKPOINT_EVERY = 120, 20, 7
TIMEOUT_S = 30
# All state of a run has an effect here: velocities, cuts of a bounded domain, shuffles and
# dropout, the phase of the period, a schedule. Checkpoints do not coincide with evaluations.
RUN = [
    "experiment=smoke",
    "device=cpu",
    "plugins=[dropout_model]",
    "model=logistic",
    "model.name=dropout",
    "potential=tan",
    "potential.eta=0.2",
    "algorithm.batch_size=8",
    f"algorithm.iterations={ITERATIONS}",
    "algorithm.period=2",
    "algorithm.schedule.sigma.name=cosine",
    "+algorithm.schedule.sigma.options.final=0.1",
    f"output.eval_every={EVAL_EVERY}",
    "output.log_every=5",
    f"output.checkpoint_every={CHECKPOINT_EVERY}",
    f"group.timeout_s={TIMEOUT_S}",
]
HERE = ["resume=auto", "output.run_dir=run"]
INT8 = ("group.shared_memory=false", "group.compress=int8")  # what is lost is a part of the state
CLOCKS = ("wall_s", "samples_per_s")


# ---- runs and their results


@dataclass
class Finished:
    """The results that must not depend on kills."""

    rows: list[dict[str, Any]]
    best: dict[str, float]
    model: dict[str, torch.Tensor]
    scalars: dict[str, list[tuple[int, float]]]


def read(run_dir: Path) -> Finished:
    rows = [{k: v for k, v in row.items() if k not in CLOCKS} for row in rows_of(run_dir)]
    summary = json.loads((run_dir / "summary.json").read_text())
    assert {key: summary[key] for key in rows[-1]} == rows[-1]
    model = torch.load(run_dir / "model.pt", weights_only=True)
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    scalars = {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
        if tag != "training/samples_per_s"
    }
    return Finished(rows, summary["best"], model, scalars)


def require_sound(run_dir: Path) -> None:
    """Assert one u: on all ranks, in the last row, in the checkpoint and in model.pt."""
    folder = run_dir / "checkpoints"
    assert [path.name for path in folder.iterdir() if not path.name.isdecimal()] == []
    newest = list_checkpoints(run_dir)[0]
    manifest = Manifest.read(newest)
    assert choose([newest], Solo(), pytest.fail) == newest
    model = torch.load(run_dir / "model.pt", weights_only=True)
    u = torch.cat([tensor.flatten() for tensor in model.values()])
    expected = f"{int(digest(u)) & (2**64 - 1):016x}"
    last = rows_of(run_dir)[-1]  # its digest was compared between the ranks
    assert (last["digest"], manifest.digest) == (expected, expected)
    workers = range(manifest.num_workers)
    rows = torch.zeros(len(workers), len(u), dtype=u.dtype)
    counts = torch.zeros(len(workers), dtype=torch.int64)
    state = {
        "server/u": u,
        "worker/z": rows,
        "worker/v": rows,
        "worker/cuts": counts,
        "worker/oracle/position": counts,
    }
    state = load(newest, state, workers)
    assert torch.equal(state["server/u"], u)
    assert state["worker/oracle/position"].tolist() == [last["iteration"]] * len(workers)
    assert int(state["worker/cuts"].sum()) == last["cuts_z"]


def require_equal(found: Finished, expected: Finished, scalars: bool = True) -> None:
    """Assert equal runs; without `scalars` they may have other workers on rank 0, which logs."""
    steps = [row["iteration"] for row in found.rows]
    assert steps == list(range(EVAL_EVERY, ITERATIONS + 1, EVAL_EVERY))
    assert [step for step, _ in found.scalars["evaluation/objective"]] == steps
    assert found.rows == expected.rows
    assert found.best == expected.best
    assert found.model.keys() == expected.model.keys()
    assert all(torch.equal(found.model[key], expected.model[key]) for key in expected.model)
    assert not scalars or found.scalars == expected.scalars


@dataclass
class Timing:
    """Seconds of an uninterrupted run: to the open group, between checkpoints, to the end."""

    met_s: float
    between_s: float
    end_s: float


@dataclass
class Reference:
    """An uninterrupted run."""

    finished: Finished
    timing: Timing


@pytest.fixture(scope="module")
def plugin(tmp_path_factory) -> dict[str, str]:
    """The environment in which `dropout_model` and `tests.testing.faults` are found."""
    folder = tmp_path_factory.mktemp("plugin")
    (folder / "dropout_model.py").write_text(PLUGIN)
    package = Path(consensus.__file__).parents[1]
    return {"PYTHONPATH": f"{folder}:{package}"}


@pytest.fixture(scope="module")
def reference(tmp_path_factory, plugin) -> Callable[..., Reference]:
    """`reference(size, *overrides)`: the uninterrupted run of `size` ranks."""

    @functools.cache
    def make(size: int, *own: str) -> Reference:
        warm_up(tmp_path_factory.mktemp("warm"))
        folder = tmp_path_factory.mktemp("reference")
        started = time.monotonic()
        with Ranks(size, [*RUN, *HERE, *own], folder, plugin) as ranks:
            while not has_met(ranks):
                assert not ranks.ended, ranks.err(0)
                time.sleep(0.01)
            met_s = time.monotonic() - started
            sleep_until(lambda: newest(folder) >= CHECKPOINT_EVERY or ranks.ended)
            started = time.monotonic()  # without the start-up
            sleep_until(lambda: newest(folder) == ITERATIONS or ranks.ended)
            between_s = (time.monotonic() - started) / (ITERATIONS // CHECKPOINT_EVERY)
            started = time.monotonic()
            assert ranks.wait(120) == [0] * size, ranks.err(0)
            end_s = time.monotonic() - started
        require_sound(folder / "run")
        finished = read(folder / "run")
        last = finished.rows[-1]
        assert min(last["cuts_u"], last["cuts_z"]) > 0, "the line search must cut"
        return Reference(finished, Timing(met_s, between_s, end_s))

    return make


@functools.cache
def warm_up(folder: Path) -> None:
    """Start the fork server, so that no measured time includes its imports."""
    with Ranks(1, ["--help"], folder) as ranks:
        ranks.wait(120)


def has_met(ranks: Ranks) -> bool:
    """Whether the group is open: rank 0 of this attempt has locked the run directory."""
    try:
        return json.loads((ranks.cwd / "run" / ".lock").read_text())["pid"] == ranks.pids[0]
    except (OSError, ValueError):
        return False


def is_writing(folder: Path) -> bool:
    """Whether a checkpoint is in writing; one left by an earlier start is older than the lock."""
    run_dir = folder / "run"
    try:
        begun = (run_dir / ".lock").stat().st_mtime_ns
        written = [path.stat().st_mtime_ns for path in (run_dir / "checkpoints").glob(".*.tmp")]
    except FileNotFoundError:
        return False
    return any(moment > begun for moment in written)


def require_exit_of_the_others(ranks: Ranks, victim: int) -> None:
    """Assert that the other ranks exit, each with one line that names the killed rank."""
    # In training they notice at once, but opening a connection may take the whole timeout.
    codes = ranks.wait(TIMEOUT_S + 20)
    assert codes[victim] == -9
    complete = (ranks.cwd / "run" / "summary.json").exists()
    for rank in range(ranks.size):
        if rank == victim or (complete and codes[rank] == 0):
            continue
        assert codes[rank] == 1, ranks.err(rank)
        (line,) = ranks.lines(rank)
        pattern = (
            rf"consensus\.train: rank {rank}: lost a peer in `\w+`: "
            r"no sign of life from rank ([\d, ]+) \(killed, stopped or cut off\)"
        )
        match = re.fullmatch(pattern, line)
        assert match, line
        named = match[1].split(", ")
        assert str(victim) in named, line
        assert len(named) == 1 or ranks.size > 2, line
        assert "Traceback" not in ranks.err(rank)


# ---- kills at random moments


@dataclass
class Tally:
    """Counts of runs and kills."""

    runs: int = 0
    kills: int = 0
    while_writing: int = 0
    equal: int = 0

    def __str__(self) -> str:
        return (
            f"{self.runs} runs, {self.kills} kills, {self.while_writing} of them while a "
            f"checkpoint was written; {self.equal} runs equal to the uninterrupted one"
        )


@pytest.fixture(scope="module")
def tally() -> Iterator[Tally]:
    tally = Tally()
    yield tally
    print(f"\n{tally}")  # for `pytest -s`
    if KILLS >= 50:
        assert tally.while_writing >= KILLS / 5, "some kills must hit the writing of a checkpoint"


MOMENTS = ("training", "writing", "start", "writing", "training", "end")


def kill_at_random(
    chance: random.Random, moment: str, ranks: Ranks, timing: Timing, tally: Tally
) -> bool:
    """Kill one rank or all during one of MOMENTS; False if the run had ended."""
    victim = chance.choice([*range(ranks.size), *["all"] * ranks.size])
    share = chance.random()
    if moment == "start":
        wait_s = chance.uniform(0.0, timing.met_s)
    else:
        # Counted in checkpoints, not in seconds, so that the load of the machine has no effect.
        sleep_until(lambda: has_met(ranks) or ranks.ended)
        done = newest(ranks.cwd)
        before_the_last = ITERATIONS - CHECKPOINT_EVERY
        goal = ITERATIONS if moment == "end" else done + share * (before_the_last - done)
        sleep_until(lambda: newest(ranks.cwd) >= int(goal) or ranks.ended)
        if moment == "writing":
            sleep_until(lambda: is_writing(ranks.cwd) or ranks.ended)
        wait_s = chance.uniform(0.0, timing.end_s if moment == "end" else timing.between_s)
    end = time.monotonic() + wait_s
    sleep_until(lambda: time.monotonic() > end or ranks.ended)
    if ranks.ended:
        assert ranks.wait(120) == [0] * ranks.size, ranks.err(0)
        return False
    met = has_met(ranks)
    writing = is_writing(ranks.cwd)
    victims = range(ranks.size) if victim == "all" else [victim]
    for rank in victims:
        ranks.kill(rank)
    writing = writing and is_writing(ranks.cwd)
    sleep_until(lambda: None not in [ranks.codes[rank] for rank in victims])
    codes = {ranks.codes[rank] for rank in victims}
    assert codes <= {-9, 0}, ranks.err(0)
    if codes == {0}:  # it ended before the kill
        assert ranks.wait(120) == [0] * ranks.size, ranks.err(0)
        return False
    tally.kills += 1
    tally.while_writing += writing
    if victim != "all" and met:
        require_exit_of_the_others(ranks, victim)
    return True


def sleep_until(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.001)


@pytest.mark.ranks
@pytest.mark.parametrize("number", range(KILLS))
def test_a_killed_run_equals_an_uninterrupted_one(number, reference, plugin, tally, tmp_path):
    chance = random.Random(f"{SEED}/{number}")
    size, own = 4 if number % 4 == 3 else 2, INT8 if number % 4 == 2 else ()
    expected = reference(size, *own)
    tally.runs += 1
    killed, wanted = 0, chance.choice([1, 1, 2, 3])
    while killed < wanted:
        with Ranks(size, [*RUN, *HERE, *own], tmp_path, plugin) as ranks:
            moment = MOMENTS[(number + killed) % len(MOMENTS)]
            if kill_at_random(chance, moment, ranks, expected.timing, tally):
                killed += 1
            elif killed:
                break  # it is complete
            else:
                shutil.rmtree(tmp_path / "run")
    with Ranks(size, [*RUN, *HERE, *own], tmp_path, plugin) as ranks:
        assert ranks.wait(120) == [0] * size, ranks.err(0)
    require_sound(tmp_path / "run")
    require_equal(read(tmp_path / "run"), expected.finished)
    tally.equal += 1


@pytest.mark.ranks
@pytest.mark.parametrize(("size", "victim"), [(2, 0), (2, 1), (4, 2)])
def test_the_other_ranks_name_the_killed_rank_and_exit(size, victim, plugin, tmp_path):
    fault = {"kind": "kill", "rank": victim, "iteration": 30}
    plugins = "plugins=[dropout_model,tests.testing.faults]"
    environment = plugin | {"FAULTS": json.dumps([fault])}
    with Ranks(size, [*RUN, *HERE, plugins], tmp_path, environment) as ranks:
        while ranks.codes[victim] is None:
            time.sleep(0.01)
        started = time.monotonic()
        require_exit_of_the_others(ranks, victim)
        assert time.monotonic() - started < TIMEOUT_S / 2, "they must not wait for the timeout"
    assert not (tmp_path / "run" / "summary.json").exists()


# ---- on other numbers of processes


@pytest.mark.ranks
def test_four_workers_continue_in_two_processes_and_then_in_one(tmp_path):
    # The layouts form sums in different orders, so they differ by rounding from the start. A convex
    # smooth loss and a quadratic coupling with stable steps contract that; ReLU, pooling and the
    # halvings of a line search would turn it into jumps.
    overrides = [
        "experiment=smoke",
        "device=cpu",
        "dtype=float64",
        "workers=4",
        "model=logistic",
        "potential=quad",
        "algorithm.sigma=0.001",
        "algorithm.iterations=150",
        "output.eval_every=10",
        f"output.checkpoint_every={CHECKPOINT_EVERY}",
        "group.timeout_s=60",
    ]
    chance = random.Random(f"{SEED}/layouts")
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    with Ranks(4, [*overrides, *HERE], tmp_path / "whole") as ranks:
        assert ranks.wait(120) == [0] * 4, ranks.err(0)
    folder, done = tmp_path / "killed", 0
    for size in (4, 2):
        with Ranks(size, [*overrides, *HERE], folder) as ranks:
            sleep_until(lambda done=done, ranks=ranks: newest(folder) > done or ranks.ended)
            time.sleep(chance.uniform(0, 0.1))
            assert not ranks.ended, "too late to kill it"
            ranks.kill_all()
            assert ranks.wait(20) == [-9] * size
        done = newest(folder)
    with Ranks(1, [*overrides, *HERE], folder) as ranks:
        assert ranks.wait(120) == [0], ranks.err(0)
        assert f"{done:08d} at iteration {done}" in ranks.out(0)
    for name in ("whole", "killed"):
        require_sound(tmp_path / name / "run")
    expected, found = read(tmp_path / "whole" / "run"), read(folder / "run")
    assert [row["iteration"] for row in found.rows] == list(range(10, 151, 10))
    for key, tensor in expected.model.items():
        assert float((found.model[key] - tensor).abs().max()) < 1e-9
    for row, other in zip(expected.rows, found.rows, strict=True):
        for key in row.keys() - {"digest"}:
            assert other[key] == pytest.approx(row[key], rel=1e-9, abs=1e-9), key


def newest(folder: Path) -> int:
    checkpoints = list_checkpoints(folder / "run")
    return int(checkpoints[0].name) if checkpoints else 0


# ---- torchrun starts them again


@pytest.mark.ranks
@pytest.mark.slow
def test_torchrun_restarts_until_the_run_is_complete(reference, plugin, tmp_path):
    faults = [
        {"kind": "kill", "rank": 1, "iteration": 30, "attempt": 0},
    ]
    expected = reference(2).finished
    environment = plugin | {"PET_MAX_RESTARTS": "3", "FAULTS": json.dumps(faults)}  # --max-restarts
    overrides = [*RUN, "plugins=[dropout_model,tests.testing.faults]"]
    ended = run_command(tmp_path, *overrides, processes=2, timeout=300, **environment)
    assert ended.code == 0, ended.err
    assert ended.left_behind == []
    (run_dir,) = (tmp_path / "runs").iterdir()
    resumed = [int(t) for t in re.findall(r"continues \S+ at iteration (\d+)", ended.out)]
    assert len(resumed) == 1
    assert 14 <= resumed[0] < 30
    require_sound(run_dir)
    require_equal(read(run_dir), expected)


# ---- the same bits on every layout


LAYOUTS = (1, 2, 4)


@pytest.mark.ranks
def test_deterministic_runs_are_equal_on_every_layout_killed_or_not(plugin, tmp_path):
    """Four workers: undisturbed on 1 and on 2 processes; killed again and again on any."""
    overrides = [*RUN, *HERE, "deterministic=true", "workers=4"]
    random_ = random.Random(f"layouts {SEED}")

    def start(name: str, size: int) -> Ranks:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        return Ranks(size, overrides, folder, plugin)

    def finished(name: str) -> Finished:
        require_sound(tmp_path / name / "run")
        return read(tmp_path / name / "run")

    for size in (1, 2):
        with start(f"{size}", size) as ranks:
            assert ranks.wait(120) == [0] * size, ranks.err(0)
    expected = finished("1")
    require_equal(finished("2"), expected, scalars=False)
    kills = 0
    for i in range(max(1, KILLS - 2)):
        sizes = random_.sample(LAYOUTS, 3)
        for size in sizes[:2]:
            with start(f"killed{i}", size) as ranks:
                at = newest(ranks.cwd) + random_.uniform(1, 6 * CHECKPOINT_EVERY)
                while newest(ranks.cwd) < at and not ranks.ended:
                    time.sleep(0.001)
                time.sleep(random_.uniform(0.0, 0.05))
                ranks.kill_all()
                kills += -9 in ranks.wait(120)
        with start(f"killed{i}", sizes[2]) as ranks:
            assert ranks.wait(120) == [0] * ranks.size, ranks.err(0)
        require_equal(finished(f"killed{i}"), expected, scalars=False)
    assert kills > 0
    print(f"{max(1, KILLS - 2)} runs, {kills} kills, on 1, 2 and 4 processes: equal")
