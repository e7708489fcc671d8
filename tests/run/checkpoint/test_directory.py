"""Where a run begins, what may not be continued, and the lock on its directory."""

import fcntl
import json
import multiprocessing
import os
import signal
import socket
import threading
import time

import pytest
from omegaconf import OmegaConf

from consensus.comm import Group, GroupError, Launch, Solo
from consensus.run.checkpoint.directory import LOCK, Origin, RunDirectory, find_origin
from consensus.run.config import ConfigError
from consensus.run.health import Watch
from consensus.run.plan import make_plan
from consensus.run.signals import TRY_AGAIN, StopSignals
from consensus.run.trainer import RunStopped, Trainer

SMALL = ["model=logistic", "device=cpu", "workers=2", "algorithm.batch_size=4", "potential=tan"]
PACE = ["algorithm.iterations=12", "output.eval_every=4", "output.checkpoint_every=6"]
PLAIN = Launch()


@pytest.fixture
def train(make_config):
    """`train("resume=auto", ...)`: run to the end in this process; the trainer."""

    def call(*overrides: str, launch: Launch = PLAIN) -> Trainer:
        config = make_config(*SMALL, *PACE, *overrides)
        trainer = Trainer(make_plan(config, launch), Solo())
        trainer.run()
        return trainer

    return call


@pytest.fixture
def refusal(make_config):
    """`refusal("resume=auto", ...)`: why the plan is refused."""

    def call(*overrides: str, launch: Launch = PLAIN) -> str:
        with pytest.raises(ConfigError) as caught:
            make_plan(make_config(*SMALL, *PACE, *overrides), launch)
        return str(caught.value)

    return call


def rows_of(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def lasting(row):
    return {key: value for key, value in row.items() if key not in ("wall_s", "samples_per_s")}


def same_rows(run_dir, reference) -> bool:
    return list(map(lasting, rows_of(run_dir))) == list(map(lasting, rows_of(reference)))


# ---- continuing


def test_a_grown_run_equals_one_that_was_as_long_from_the_start(train, tmp_path):
    train(f"output.run_dir={tmp_path}/a")
    whole = train(f"output.run_dir={tmp_path}/b", "algorithm.iterations=20")
    grown = train(f"output.run_dir={tmp_path}/a", "algorithm.iterations=20", "resume=auto")
    assert same_rows(tmp_path / "a", tmp_path / "b")
    assert [row["iteration"] for row in rows_of(tmp_path / "a")] == [4, 8, 12, 16, 20]
    assert bool((grown.algorithm.u == whole.algorithm.u).all())
    assert bool((grown.algorithm.worker.v == whole.algorithm.worker.v).all())
    assert OmegaConf.load(tmp_path / "a" / "config.yaml").algorithm.iterations == 20


def test_time_continues(train, tmp_path):
    train(f"output.run_dir={tmp_path}/a")
    before = rows_of(tmp_path / "a")[-1]["wall_s"]
    train(f"output.run_dir={tmp_path}/a", "algorithm.iterations=20", "resume=auto")
    times = [row["wall_s"] for row in rows_of(tmp_path / "a")]
    assert times == sorted(times)
    assert times[3] > before


def test_a_finished_run_is_finished_again_without_a_step(train, tmp_path, monkeypatch):
    run_dir = tmp_path / "a"
    train(f"output.run_dir={run_dir}")
    kept = (run_dir / "metrics.jsonl").read_bytes(), (run_dir / "model.pt").read_bytes()
    (run_dir / "summary.json").unlink()  # it was killed while it wrote its last files
    monkeypatch.setattr("consensus.algorithm.Consensus.step", None)
    train(f"output.run_dir={run_dir}", "resume=auto")
    assert ((run_dir / "metrics.jsonl").read_bytes(), (run_dir / "model.pt").read_bytes()) == kept
    assert json.loads((run_dir / "summary.json").read_text())["iteration"] == 12


def test_auto_begins_where_nothing_is(train, tmp_path):
    train(f"output.run_dir={tmp_path}/new", "resume=auto")
    assert [row["iteration"] for row in rows_of(tmp_path / "new")] == [4, 8, 12]


def test_auto_begins_again_where_no_checkpoint_was_reached(train, tmp_path):
    train(f"output.run_dir={tmp_path}/whole")
    run_dir = tmp_path / "a"
    (run_dir / "checkpoints" / ".00000006.tmp").mkdir(parents=True)
    (run_dir / "metrics.jsonl").write_text((tmp_path / "whole/metrics.jsonl").read_text()[:-20])
    train(f"output.run_dir={run_dir}", "resume=auto")
    assert same_rows(run_dir, tmp_path / "whole")
    assert {path.name for path in (run_dir / "checkpoints").iterdir()} == {"00000006", "00000012"}


def test_from_a_path_the_other_run_stays_as_it_is(train, tmp_path):
    source = tmp_path / "a"
    train(f"output.run_dir={source}")
    before = {path: path.stat().st_mtime_ns for path in source.rglob("*")}
    whole = train(f"output.run_dir={tmp_path}/whole", "algorithm.iterations=20")
    for name, where in {"run": source, "checkpoint": source / "checkpoints" / "00000006"}.items():
        new = tmp_path / f"from-{name}"
        fork = train(f"resume={where}", f"output.run_dir={new}", "algorithm.iterations=20")
        assert same_rows(new, tmp_path / "whole")
        assert bool((fork.algorithm.u == whole.algorithm.u).all())
    assert {path: path.stat().st_mtime_ns for path in source.rglob("*")} == before


def test_best_is_of_the_whole_run(train, tmp_path):
    train(f"output.run_dir={tmp_path}/a")
    grown = train(f"output.run_dir={tmp_path}/a", "algorithm.iterations=20", "resume=auto")
    rows = rows_of(tmp_path / "a")
    lowest = min(row["test_error"] for row in rows)
    first = next(row["iteration"] for row in rows if row["test_error"] == lowest)
    summary = json.loads((tmp_path / "a" / "summary.json").read_text())
    assert summary["best"] == grown.best == {"iteration": first, "test_error": lowest}


def test_without_checkpoints_none_are_written(train, tmp_path):
    train(f"output.run_dir={tmp_path}/a", "output.checkpoint_every=null")
    assert not (tmp_path / "a" / "checkpoints").exists()
    assert "checkpoints" not in json.loads((tmp_path / "a" / "summary.json").read_text())


# ---- refusals


def test_what_may_not_be_continued(train, refusal, tmp_path):
    run_dir = tmp_path / "a"
    train(f"output.run_dir={run_dir}")
    where = f"output.run_dir={run_dir}"
    newest = run_dir / "checkpoints" / "00000012"
    as_it_began = f"as in {newest} (a run is continued as it began)"
    cases = {
        "algorithm.lam=0.2": f"`algorithm.lam` is 0.2; allowed: 0.1, {as_it_began}",
        "potential=log": f"`potential.name` is log; allowed: tan, {as_it_began}",
        "seed=1": f"`seed` is 1; allowed: 0, {as_it_began}",
        "dtype=float64": f"`dtype` is float64; allowed: float32, {as_it_began}",
        "data.partition=sharded": f"`data.partition` is sharded; allowed: full, {as_it_began}",
        "workers=4": (
            f"`workers` is 4; allowed: 2, as in {newest} (on any number of processes dividing it)"
        ),
        "algorithm.iterations=6": (
            f"`algorithm.iterations` is 6; allowed: at least 12, which {newest} has done"
        ),
    }
    for override, line in cases.items():
        assert refusal(where, "resume=auto", override) == line
        assert refusal(f"resume={run_dir}", override) == line
    assert refusal(where) == (
        f"`output.run_dir` is {run_dir}; allowed: an empty or new directory; this one holds a "
        "finished run (summary.json); resume=auto continues it"
    )
    assert refusal(where, f"resume={run_dir}").startswith(f"`output.run_dir` is {run_dir}; ")
    assert refusal(f"resume={tmp_path}/none") == (
        f"`resume` is {tmp_path}/none; allowed: never, auto, or the path of a checkpoint or of a "
        "run that has one"
    )


def test_what_may_differ(train, tmp_path):
    train(f"output.run_dir={tmp_path}/a")
    free = ["output.eval_every=2", "output.keep_checkpoints=1", "group.timeout_s=9", "data.root=x"]
    train(f"output.run_dir={tmp_path}/a", "resume=auto", "algorithm.iterations=14", *free)
    assert [row["iteration"] for row in rows_of(tmp_path / "a")] == [4, 8, 12, 14]
    assert [path.name for path in (tmp_path / "a/checkpoints").iterdir()] == ["00000014"]


def test_a_finished_run_without_checkpoints_is_not_begun_again(train, refusal, tmp_path):
    where = f"output.run_dir={tmp_path}/a"
    train(where, "output.checkpoint_every=null")
    assert refusal(where, "resume=auto") == (
        f"`resume` is auto; allowed: never, in a new directory: {tmp_path}/a holds a finished run "
        "without checkpoints"
    )


def test_another_unfinished_run_is_not_replaced(train, refusal, tmp_path):
    where = f"output.run_dir={tmp_path}/a"
    train(where, "output.checkpoint_every=null")
    (tmp_path / "a" / "summary.json").unlink()
    assert refusal(where, "resume=auto", "algorithm.tau=0.1") == (
        f"`algorithm.tau` is 0.1; allowed: 0.005, as in {tmp_path}/a (a run is continued as it "
        "began)"
    )


def test_a_run_whose_checkpoints_are_all_damaged_is_left_to_a_person(train, tmp_path):
    run_dir = tmp_path / "a"
    train(f"output.run_dir={run_dir}")
    for file in run_dir.glob("checkpoints/*/*.distcp"):
        file.write_bytes(file.read_bytes()[:-1])
    before = (run_dir / "metrics.jsonl").read_bytes()
    with pytest.raises(GroupError, match=r"no checkpoint in .*/a can be read: begin again in a"):
        train(f"output.run_dir={run_dir}", "resume=auto")
    assert (run_dir / "metrics.jsonl").read_bytes() == before
    assert (run_dir / "summary.json").exists()


def test_of_a_damaged_checkpoint_the_one_before_it_is_used(train, tmp_path, capsys):
    run_dir = tmp_path / "a"
    train(f"output.run_dir={run_dir}")
    train(f"output.run_dir={tmp_path}/whole")
    (file,) = run_dir.glob("checkpoints/00000012/*.distcp")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    train(f"output.run_dir={run_dir}", "resume=auto")
    said = capsys.readouterr().out
    damaged = run_dir / "checkpoints" / "00000012"
    assert f"checkpoint {damaged} is damaged and skipped: {file.name} is not as it was" in said
    assert f"continues {run_dir}/checkpoints/00000006 at iteration 6" in said
    assert same_rows(run_dir, tmp_path / "whole")
    names = {path.name for path in (run_dir / "checkpoints").iterdir()}
    assert names == {"00000006", "00000012", "00000012.damaged"}


# ---- torchrun starts the same launch again


def test_a_restart_continues_whatever_resume_says(train, tmp_path):
    train(f"output.run_dir={tmp_path}/a", launch=Launch(name="x"))
    again = Launch(restart=1, name="x")
    train(f"output.run_dir={tmp_path}/a", "algorithm.iterations=16", launch=again)
    assert [row["iteration"] for row in rows_of(tmp_path / "a")] == [4, 8, 12, 16]


def test_a_restart_finds_the_directory_that_rank_0_had_named(train, tmp_path):
    first = train(launch=Launch(name="x"))
    other = train(launch=Launch(name="y"))
    again = train("algorithm.iterations=16", launch=Launch(restart=2, name="x"))
    assert again.run_dir == first.run_dir != other.run_dir
    assert again.rows[-1]["iteration"] == 16


def test_a_restart_before_the_first_directory_begins(make_config, tmp_path):
    config = make_config(*SMALL)
    assert find_origin(config, Launch(restart=1, name="x"), 2) == Origin()


# ---- the lock


def hold(path, started):
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        started.set()
        time.sleep(60.0)


def test_a_second_run_into_a_directory_is_refused_until_the_holder_dies(make_config, tmp_path):
    config = make_config(*SMALL, f"output.run_dir={tmp_path}/a")
    origin = Origin(tmp_path / "a")
    first = RunDirectory(origin, config, Launch(name="x"), Solo())
    note = json.loads((tmp_path / "a" / LOCK).read_text())
    assert note == {"pid": os.getpid(), "host": socket.gethostname(), "launch": "x"}
    before = (tmp_path / "a" / "config.yaml").stat().st_mtime_ns
    with pytest.raises(GroupError) as caught:
        RunDirectory(origin, config, Launch(name="y"), Solo())
    assert str(caught.value) == (
        f"rank 0: {tmp_path}/a is in use by another run, begun by process {os.getpid()} on "
        f"{socket.gethostname()}, or by ranks left of it"
    )
    assert (tmp_path / "a" / "config.yaml").stat().st_mtime_ns == before
    first.close()

    # A rank that outlives its launcher and rank 0 holds the lock as well as they did.
    context = multiprocessing.get_context("spawn")
    started = context.Event()
    orphan = context.Process(target=hold, args=(tmp_path / "a" / LOCK, started), daemon=True)
    orphan.start()
    assert started.wait(60.0)
    with pytest.raises(GroupError, match="is in use by another run"):
        RunDirectory(origin, config, Launch(name="y"), Solo())
    orphan.kill()
    orphan.join()
    RunDirectory(origin, config, Launch(name="y"), Solo()).close()


def open_and_tell(group: Group, config, path):
    directory = RunDirectory(Origin(path), config, Launch(group.rank, group.size), group)
    free = True
    group.barrier()
    with (path / LOCK).open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            free = False
    group.barrier()
    directory.close()
    return free, directory.path


@pytest.mark.ranks
def test_every_rank_holds_the_lock(ranks, make_config, tmp_path):
    config = make_config(*SMALL)
    assert ranks(4, open_and_tell, config, tmp_path / "a") == [(False, tmp_path / "a")] * 4


def test_a_file_system_without_locks_is_said(make_config, tmp_path, monkeypatch):
    def unsupported(*args):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    directory = RunDirectory(Origin(tmp_path / "a"), make_config(*SMALL), Launch(), Solo())
    assert directory.warning == (
        f"{tmp_path}/a/{LOCK} cannot be locked here: take care of it yourself"
    )
    directory.close()


# ---- signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_stops_with_a_checkpoint_and_the_rest_is_the_same(
    train, tmp_path, monkeypatch, number
):
    train(f"output.run_dir={tmp_path}/whole")
    from consensus.algorithm import Consensus  # its step is replaced here

    step = Consensus.step

    def interrupted(self, t):
        if t == 7:
            os.kill(os.getpid(), number)
        step(self, t)

    monkeypatch.setattr(Consensus, "step", interrupted)
    monkeypatch.setattr(Watch, "LOOK_EVERY_S", 0.0)  # after every iteration
    where = f"output.run_dir={tmp_path}/a"
    with pytest.raises(RunStopped) as caught:
        train(where)
    assert str(caught.value) == (
        f"{number.name}: stopped at iteration 8 with a checkpoint; to continue: resume=auto {where}"
    )
    assert caught.value.code == TRY_AGAIN == os.EX_TEMPFAIL
    assert signal.getsignal(number) == signal.SIG_DFL
    names = {path.name for path in (tmp_path / "a" / "checkpoints").iterdir()}
    assert names == {"00000006", "00000008"}
    assert not (tmp_path / "a" / "summary.json").exists()
    monkeypatch.setattr(Consensus, "step", step)
    train(where, "resume=auto")
    assert same_rows(tmp_path / "a", tmp_path / "whole")


def test_a_signal_without_checkpoints(train, tmp_path, monkeypatch):
    monkeypatch.setattr(Watch, "look", lambda *args: signal.SIGTERM)
    with pytest.raises(RunStopped, match="SIGTERM: stopped at iteration 1 without a che") as caught:
        train(f"output.run_dir={tmp_path}/a", "output.checkpoint_every=null")
    assert caught.value.code == 128 + signal.SIGTERM


def test_whoever_does_not_leave_in_time_is_ended(monkeypatch):
    ended = threading.Event()
    codes = []
    monkeypatch.setattr(os, "_exit", lambda code: (codes.append(code), ended.set()))
    signals = StopSignals(patience_s=0.05)
    os.kill(os.getpid(), signal.SIGUSR1)
    assert ended.wait(30.0)
    signals.close()
    assert (codes, signals.received) == ([128 + signal.SIGUSR1], signal.SIGUSR1)
