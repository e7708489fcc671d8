"""Elastic runs: members are killed, leave and join, and the run goes on with one u.

Real processes, Gloo, SIGKILL. The expected u is that of a replay on one process, which has neither
members nor messages, and where nothing changes, that of a run of the same workers.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from consensus.run.elastic.log import MEMBERSHIP, Change, read_changes
from tests.testing.launch import Ranks
from tests.testing.small_runs import rows_of

RUN = [
    "experiment=smoke",
    "device=cpu",
    "model=logistic",
    "algorithm.batch_size=8",
    "deterministic=true",
    "group.timeout_s=60",
    "output.tensorboard=false",
    "output.log_every=50",
]
ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
SLOW = "plugins=[tests.testing.slow]"


class Members(Ranks):
    """Processes of an elastic run, whose store this process keeps.

    Args:
        size: Their number.
        overrides: Of consensus.train, beside `group.elastic=true`.
        cwd: Working directory; the run is in `cwd / "run"`.
        joins: The processes whose run they join.
        expected: The number of processes that the run begins with.
    """

    def __init__(
        self,
        size: int,
        overrides: Sequence[str],
        cwd: Path,
        joins: "Members | None" = None,
        expected: int | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.run_dir = cwd / "run" if joins is None else joins.run_dir
        self._all = [self] if joins is None else joins._all  # that are in the run
        env = {**ALONE, "CONSENSUS_MEMBERS": str(expected or size), **(env or {})}
        if joins is not None:
            env["MASTER_PORT"] = str(joins.port)
        cwd.mkdir(exist_ok=True)
        own = [] if joins is not None else [f"output.run_dir={self.run_dir}"]
        super().__init__(size, ["group.elastic=true", *overrides, *own], cwd, env)
        if joins is not None:
            joins._all.append(self)

    def changes(self) -> list[Change]:
        return read_changes(self.run_dir) if (self.run_dir / MEMBERSHIP).exists() else []

    def until(self, condition: Callable[[list[Change]], bool]) -> list[Change]:
        """Wait until the membership log fulfils a condition; returns it."""
        deadline = time.monotonic() + 60.0
        while not condition(found := self.changes()):
            assert time.monotonic() < deadline, f"{found}\n{self.said()}"
            time.sleep(0.01)
        return found

    def until_row(self, iteration: int) -> None:
        """Wait for the evaluation of an iteration."""
        path = self.run_dir / "metrics.jsonl"
        deadline = time.monotonic() + 60.0
        while not (path.exists() and f'"iteration": {iteration},' in path.read_text()):
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.01)

    def said(self) -> str:
        """The output of all processes of the run, those that have joined it as well."""
        places = [(group, r) for group in self._all for r in range(group.size)]
        return "\n".join(f"{m.cwd.name} {r}: {m.out(r)}{m.err(r)}" for m, r in places)


def digests(run_dir: Path) -> list[tuple[int, str]]:
    return [(row["iteration"], row["digest"]) for row in rows_of(run_dir)]


def require_replayed(run_dir: Path, cwd: Path) -> None:
    """Assert that a replay on one process has the same u at every evaluation of a run."""
    cwd.mkdir()
    expected = digests(run_dir)
    # The run may have ended before its last iteration, and so does its replay, by a signal.
    overrides = [f"group.replay={run_dir}", f"output.run_dir={cwd / 'run'}"]
    with Ranks(1, overrides, cwd) as ranks:
        deadline = time.monotonic() + 120.0
        while not ranks.ended and (
            not (cwd / "run" / "metrics.jsonl").exists()
            or len(rows_of(cwd / "run")) < len(expected)
        ):
            assert time.monotonic() < deadline, ranks.err(0)
            time.sleep(0.05)
        ranks.terminate(0)
        # Python, which has finished already, may end by the signal.
        assert ranks.wait(60)[0] in (0, 75, -15), ranks.err(0)
    assert digests(cwd / "run")[: len(expected)] == expected


def test_without_a_change_it_is_the_run_of_as_many_workers(tmp_path):
    overrides = [*RUN, "potential=tan", "algorithm.iterations=60", "output.eval_every=20"]
    with Members(3, overrides, tmp_path) as members:
        assert members.wait(120) == [0, 0, 0], members.err(0)
    (tmp_path / "plain").mkdir()
    plain = [*overrides, "workers=3", f"output.run_dir={tmp_path / 'plain' / 'run'}"]
    with Ranks(1, plain, tmp_path / "plain") as ranks:
        assert ranks.wait(120) == [0], ranks.err(0)
    clocks = {"wall_s", "samples_per_s", "members"}
    found, expected = (
        [{k: v for k, v in row.items() if k not in clocks} for row in rows_of(path)]
        for path in (tmp_path / "run", tmp_path / "plain" / "run")
    )
    assert found == expected
    assert [row["members"] for row in rows_of(tmp_path / "run")] == [[0, 1, 2]] * 3
    (change,) = read_changes(tmp_path / "run")
    assert (change.iteration, change.workers, change.new) == (0, (0, 1, 2), (0, 1, 2))


# Outer momentum, a pull between communications, cuts at a boundary that is near: all state counts.
METHODS = {
    "period 1, cuts": ["potential=tan", "potential.eta=0.3"],
    "period 3, outer momentum": [
        "algorithm.period=3",
        "algorithm.local_pull=0.1",
        "algorithm.tau=null",
        "algorithm.outer={optimizer: SGD, lr: 0.7, momentum: 0.9, nesterov: true}",
    ],
    "Jacobi, tau per worker, a schedule": [
        "potential=cubic",
        "algorithm.order=jacobi",
        "algorithm.tau_per_worker=true",
        "algorithm.schedule.sigma.name=step",
        "+algorithm.schedule.sigma.options.every=50",
        "+algorithm.schedule.sigma.options.factor=0.97",
    ],
}


@pytest.mark.parametrize("method", METHODS)
def test_members_are_lost_join_and_leave_and_the_replay_has_the_same_bits(tmp_path, method):
    # 60,000 iterations are not awaited: the run ends when all have left.
    overrides = [*RUN, *METHODS[method], "algorithm.iterations=60000", "output.eval_every=30"]
    with Members(3, [*overrides, "output.checkpoint_every=30"], tmp_path) as members:
        members.until_row(30)
        first = next(r for r in range(3) if "3 workers" in members.out(r))
        members.kill(first)  # the first by rank, which writes the files
        found = members.until(lambda log: len(log) > 1)
        assert len(found[1].workers) == 2
        assert len(found[1].gone) == 1
        with Members(2, [], tmp_path / "more", joins=members) as more:  # the config is the run's
            found = members.until(lambda log: len(log[-1].workers) == 4)
            assert sorted(found[-1].workers) == [0, 1, 2, 3]
            joined = {j for change in found[2:] for j in change.new}
            assert joined == {0, 1, 2, 3} - {*found[1].workers}
            more.kill(0)
            members.until(lambda log: len(log[-1].workers) == 3)
            more.terminate(1)
            assert more.wait(60)[1] == 75
            assert "left the run" in more.err(1)
            members.until(lambda log: len(log[-1].workers) == 2)
        for rank in {0, 1, 2} - {first}:
            members.terminate(rank)
        codes = members.wait(60)
    assert sorted(codes) == [-9, 75, 75]
    rows = rows_of(tmp_path / "run")
    assert [row["iteration"] for row in rows] == list(range(30, 30 * len(rows) + 1, 30))
    assert {len(row["members"]) for row in rows} >= {3, 2}
    assert all(row["workers"] == len(row["members"]) == len(row["influence"]) for row in rows)
    log = read_changes(tmp_path / "run")
    assert all(len({*change.workers}) == len(change.workers) for change in log)
    require_replayed(tmp_path / "run", tmp_path / "replay")


def test_a_run_below_the_least_number_stops_with_a_checkpoint_and_goes_on_with_others(tmp_path):
    overrides = [*RUN, "algorithm.iterations=400", "output.eval_every=20", SLOW]
    least = "group.min_workers=2"
    with Members(2, [*overrides, least], tmp_path) as members:
        members.until_row(20)
        members.kill(1)
        assert members.wait(60) == [75, -9]
        assert "1 workers are left, and group.min_workers is 2" in members.err(0)
    done = int(sorted((tmp_path / "run" / "checkpoints").iterdir())[-1].name)
    assert 20 <= done < 400
    again = [*overrides[:-1], "group.min_workers=1", "resume=auto"]
    with Members(3, again, tmp_path) as members:
        assert members.wait(120) == [0, 0, 0], members.err(0)
    last = read_changes(tmp_path / "run")[-1]
    assert (last.iteration, last.workers) == (done, (0, 1, 2))
    assert len(last.new) == 2, "the checkpoint has one worker; the others begin at u"
    assert rows_of(tmp_path / "run")[-1]["iteration"] == 400
    require_replayed(tmp_path / "run", tmp_path / "replay")


def test_a_member_that_is_lost_while_a_checkpoint_is_written(tmp_path):
    overrides = [*RUN, "algorithm.iterations=200", "output.checkpoint_every=1", SLOW]
    with Members(3, [*overrides, "output.eval_every=50"], tmp_path) as members:
        members.until_row(50)
        members.kill(2)
        assert members.wait(120) == [0, 0, -9], members.err(0)
    folder = tmp_path / "run" / "checkpoints"
    assert [path.name for path in folder.iterdir() if not path.name.isdecimal()] == []
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["iteration"] == 200


@pytest.mark.parametrize("then", ["nothing", "killed and joined"])
def test_a_checkpoint_that_only_one_member_has_lost_is_written_again_by_all(tmp_path, then):
    plugins = "plugins=[tests.testing.slow, tests.testing.lost_on_one]"
    overrides = [*RUN, "algorithm.iterations=300", "output.eval_every=20", plugins]
    overrides += ["output.checkpoint_every=100", "output.keep_checkpoints=10"]
    with Members(2, overrides, tmp_path, expected=3) as members:
        same, lost = [*overrides, f"output.run_dir={members.run_dir}"], {"LOST_ON_ONE": "1"}
        with Members(1, same, tmp_path / "lost", joins=members, expected=3, env=lost) as other:
            members.until_row(100)
            if then != "nothing":
                members.kill(next(r for r in range(2) if "3 workers" not in members.out(r)))
            members.until(lambda log: len(log) > 1)
            if then != "nothing":
                with Members(1, [], tmp_path / "more", joins=members) as more:
                    members.until(lambda log: len(log[-1].workers) == 3)
                    assert more.wait(60) == [0], more.err(0)
            assert other.wait(60) == [0], other.err(0)
            codes = [0, 0] if then == "nothing" else [-9, 0]
            assert sorted(members.wait(60)) == codes, members.err(0) + members.err(1)
    found = {int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert found >= {200, 300}
    changed = {change.iteration for change in read_changes(tmp_path / "run")[1:]}
    again = found - {100, 200, 300}
    assert again
    assert again <= changed | {t + 1 for t in changed}
    require_replayed(tmp_path / "run", tmp_path / "replay")


def test_a_process_with_another_config_is_refused_and_one_without_takes_that_of_the_run(tmp_path):
    overrides = [*RUN, "algorithm.iterations=60000", "algorithm.lam=0.2"]
    with Members(1, overrides, tmp_path) as members:
        members.until(lambda log: len(log) == 1)
        with Members(1, ["algorithm.lam=0.3"], tmp_path / "other", joins=members) as other:
            assert other.wait(60) == [2]
            line = "`algorithm.lam` is 0.3; allowed: 0.2, as in the run that this process joins"
            assert line in other.err(0)
        with Members(1, ["algorithm.lam=0.2"], tmp_path / "same", joins=members) as same:
            members.until(lambda log: len(log[-1].workers) == 2)
            same.terminate(0)
            assert same.wait(60) == [75]


def test_two_workers_on_each_process_and_a_measurement_of_stationarity(tmp_path):
    overrides = [*RUN, "deterministic=false", "group.workers_per_process=2", SLOW]
    overrides += ["algorithm.iterations=120", "output.eval_every=30", "output.tensorboard=true"]
    measured = ["stationarity.every=60", "stationarity.samples=20", "stationarity.budget=3"]
    with Members(2, [*overrides, *measured], tmp_path) as members:
        members.until_row(30)
        second = next(r for r in range(2) if "4 workers" not in members.out(r))
        members.kill(second)  # the first may have numbers for TensorBoard in its memory
        assert sorted(members.wait(120)) == [-9, 0], members.err(1 - second)
    (first, *_, last) = rows_of(tmp_path / "run")
    assert (first["members"], first["workers"]) == ([0, 1, 2, 3], 4)
    assert last["members"] == [0, 1]
    assert (last["iteration"], len(last["influence"])) == (120, 2)
    assert len(last["stationarity"]["worker_residual"]) == 2
    events = EventAccumulator(str(tmp_path / "run"), size_guidance={"scalars": 0}).Reload()
    tags = events.Tags()["scalars"]
    assert all(f"workers_and_layers/influence/worker_{j}" in tags for j in range(4))
    assert [event.value for event in events.Scalars("training/workers")] == [4.0, 2.0, 2.0, 2.0]


@pytest.mark.parametrize("where", ["open_writer", "start", "open_sinks", "describe"])
def test_a_process_that_dies_where_the_run_begins(tmp_path, where):
    plugin = "plugins=[tests.testing.dies_at_start]"
    overrides = [*RUN, "algorithm.iterations=40", "output.eval_every=20", plugin]
    with Members(2, overrides, tmp_path, expected=3) as members:
        same = [*overrides, f"output.run_dir={members.run_dir}"]  # it may be the first to come
        where = {"DIES_AT_START": where}
        with Members(1, same, tmp_path / "dies", joins=members, expected=3, env=where) as dying:
            assert dying.wait(60) == [-9], dying.err(0)
            assert members.wait(60) == [0, 0], members.err(0)
    assert [row["workers"] for row in rows_of(tmp_path / "run")] == [2, 2]
    (change,) = read_changes(tmp_path / "run")
    assert (change.iteration, len(change.workers)) == (0, 2)
    require_replayed(tmp_path / "run", tmp_path / "replay")


@pytest.mark.parametrize("method", METHODS)
def test_a_member_that_is_behind_takes_u_and_catches_up(tmp_path, method):
    """One member fails in a sum that the others finish: a run in which nothing happened."""
    plugin = "plugins=[tests.testing.behind]"
    overrides = [*RUN, *METHODS[method], plugin, "algorithm.iterations=60", "output.eval_every=20"]
    with Members(2, overrides, tmp_path, expected=3) as members:
        same, behind = [*overrides, f"output.run_dir={members.run_dir}"], {"BEHIND": "7"}
        with Members(1, same, tmp_path / "behind", members, expected=3, env=behind) as late:
            assert late.wait(60) == [0], late.err(0)
            assert members.wait(60) == [0, 0], members.err(0)
    log = read_changes(tmp_path / "run")
    assert [change.workers for change in log] == [(0, 1, 2)] * 2
    assert (log[1].new, log[1].gone) == ((), {})
    (tmp_path / "plain").mkdir()
    plain = [*overrides, "workers=3", f"output.run_dir={tmp_path / 'plain' / 'run'}"]
    with Ranks(1, plain, tmp_path / "plain") as ranks:
        assert ranks.wait(120) == [0], ranks.err(0)
    assert digests(tmp_path / "run") == digests(tmp_path / "plain" / "run")


def test_a_process_that_has_joined_goes_on_with_the_files_of_the_run(tmp_path):
    overrides = [*RUN, "algorithm.iterations=400", "output.eval_every=20", SLOW]
    with Members(1, overrides, tmp_path) as members:
        members.until_row(40)
        with Members(1, [], tmp_path / "more", joins=members) as more:
            members.until(lambda log: len(log) == 2)
            members.kill(0)
            assert more.wait(60) == [0], more.err(0)
    rows = rows_of(tmp_path / "run")
    assert [row["iteration"] for row in rows] == list(range(20, 401, 20))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    lowest = min(rows, key=lambda row: row["test_error"])
    assert summary["best"]["test_error"] == lowest["test_error"]
    log = read_changes(tmp_path / "run")
    assert [(change.workers, change.new) for change in log] == [
        ((0,), (0,)),
        ((0, 1), (1,)),
        ((1,), ()),
    ]
    require_replayed(tmp_path / "run", tmp_path / "replay")
