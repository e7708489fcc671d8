"""The dashboard: lines of ended runs, counts, the live table, durations."""

import io
import json
import threading

import pytest
from rich.console import Console

from consensus import LOSSES, Loss, Metric
from consensus.records import REQUIRED, last_row
from consensus.sweep.dashboard import Dashboard, duration
from consensus.sweep.earlier import Found
from consensus.sweep.grid import Job
from consensus.sweep.job import Status


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(5, "5 s"), (89.6, "90 s"), (90, "2 min"), (3600, "60 min"), (7500, "2 h 5 min")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def evaluated(run_dir, iteration, error, iterations=4000, **others):
    """The files of a run that has evaluated once."""
    run_dir.mkdir(exist_ok=True)
    row = dict.fromkeys(REQUIRED, 0.0) | {"iteration": iteration, "test_error": error} | others
    (run_dir / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    config = f"algorithm: {{iterations: {iterations}}}\npotential: {{name: quad}}\n"
    (run_dir / "config.yaml").write_text(config)


def test_lines_counts_and_table(tmp_path):
    """Jobs a to e: a was done before, b ends, c fails, d runs, e is damaged."""
    output = io.StringIO()
    jobs = {name: Job(name, ()) for name in "abcde"}
    earlier = dict.fromkeys(jobs.values(), Found("new"))
    earlier[jobs["a"]] = Found("done", 4000, 4000)
    earlier[jobs["e"]] = Found("damaged", problem="e/config.yaml cannot be read")
    for name in jobs:
        (tmp_path / name).mkdir()
    assert last_row(tmp_path / "b") is None
    with Dashboard(tmp_path, earlier, Console(file=output, width=200), every_s=60.0) as dashboard:
        assert dashboard.seconds_left() is None
        evaluated(tmp_path / "b", 4000, 1.25)
        (tmp_path / "b" / "summary.json").write_text('{"iteration": 4000}')
        Status("done", seconds=7.0, code=0).write(tmp_path / "b")
        evaluated(tmp_path / "c", 0, 0.5, objective=9e9, diverged=True)  # not the best
        Status("failed", seconds=3.0, code=2, message="[no] luck").write(tmp_path / "c")
        Status.running().write(tmp_path / "d")
        evaluated(tmp_path / "d", 2000, 1.5)
        dashboard.refresh()
        assert dashboard.seconds_left() is not None
        assert dashboard.best() == {"test_error": (1.25, "b")}
        table = dashboard.table()
        assert [list(column.cells) for column in table.columns][:4] == [
            ["running", "failed", "failed"],
            ["d", "c\n\\[no] luck", "e\ne/config.yaml cannot be read"],
            ["2,000", "0", "0"],
            ["1.50", "", ""],
        ]
        assert dashboard.run_dirs() == [tmp_path / name for name in "bcd"]
    lines = output.getvalue().splitlines()
    assert lines[0].startswith("5 runs in ")
    assert lines[0].endswith(", 1 of them done before")
    assert lines[1:4] == [
        " failed  e  e/config.yaml cannot be read",
        "   done  b  7 s  test error 1.25 %",
        " failed  c  3 s  exit code 2: [no] luck",
    ]
    assert lines[4].startswith("2 done, 1 running, 2 failed; about ")


def test_the_best_is_of_the_metric_of_the_loss(tmp_path, monkeypatch):
    """The goals come from the losses: no run has finished. Runs a and b have the same number."""

    def of_loss(name, **goals):
        metrics = {key: Metric(lambda x, y: y, goal) for key, goal in goals.items()}
        LOSSES.register(name)(lambda scale=1.0: Loss(lambda x, y: y, metrics))

    def accuracies(validation, test):
        found = {"validation_loss": 1.0, "validation_accuracy": validation, "test_accuracy": test}
        return "{name: top, options: {scale: 2.0}}", found

    monkeypatch.setattr(LOSSES, "_factories", dict(LOSSES._factories))
    of_loss("top", accuracy="max", nll="min")
    of_loss("distance", mae="min")
    runs = {"a": accuracies(0.5, 0.9), "b": accuracies(0.5, 0.8), "c": accuracies(0.25, 1.0)}
    runs |= {"d": ("{name: distance}", {"test_mae": 3.0})}
    runs |= {"e": ("{name: distance}", {"test_mae": 2.0})}
    runs |= {"f": ("{name: gone}", {"test_r2": 7.0})}
    for name, (loss, found) in runs.items():
        evaluated(tmp_path / name, 10, 0.0)
        row = dict.fromkeys(REQUIRED, 0.0) | {"iteration": 10} | found
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps(row) + "\n")
        with (tmp_path / name / "config.yaml").open("a") as config:
            config.write(f"loss: {loss}\n")
        Status.running().write(tmp_path / name)
    jobs = {name: Job(name, ()) for name in runs}
    console = Console(file=io.StringIO())
    dashboard = Dashboard(tmp_path, dict.fromkeys(jobs.values(), Found("new")), console)
    assert dashboard.best() == {"validation_accuracy": (0.5, "a"), "test_mae": (2.0, "e")}
    table = dashboard.table()
    assert table.title.splitlines()[1:] == [
        "best so far: validation accuracy 0.5, a",
        "best so far: test mae 2, e",
    ]
    assert [str(column.header) for column in table.columns][2:4] == ["iteration", "result"]
    assert list(table.columns[3].cells) == ["0.5", "0.5", "0.25", "3", "2", "7"]
    line = dashboard.line(jobs["c"], Status("done", seconds=2.0))
    assert line == "   done  c  2 s  validation accuracy 0.25"
    alone = Dashboard(tmp_path, {jobs["d"]: Found("new")}, console)
    assert str(alone.table().columns[3].header) == "mae"


def test_the_time_left_of_a_rung_counts_the_runs_that_come_to_it(tmp_path, monkeypatch):
    """After 20 s, 800 iterations: 200 are left in this rung, and 3,000 in later ones."""
    clock = [0.0]
    monkeypatch.setattr("consensus.sweep.dashboard.time.monotonic", lambda: clock[0])
    jobs = [Job(name, ()) for name in "abc"]
    dashboard = Dashboard(tmp_path, dict.fromkeys(jobs, Found("new")), Console(file=io.StringIO()))
    dashboard.begin_rung("rung 1 of 2, 500 iterations", jobs[:2], 500, later=3000)
    for name, done in (("a", 500), ("b", 300)):
        evaluated(tmp_path / name, done, 1.0)
        Status.running().write(tmp_path / name)
    dashboard.refresh()
    clock[0] = 20.0
    assert dashboard.seconds_left() == pytest.approx(20.0 / 800 * (200 + 3000))
    assert dashboard.counts().startswith(
        "rung 1 of 2, 500 iterations: 2 running, 1 waiting; about "
    )


def test_the_time_left_is_proportional_to_the_iterations_left(tmp_path, monkeypatch):
    """Two of four runs have done 1,000 of 4,000 in 10 s: 14,000 more take 70 s, and it falls."""
    clock = [100.0]
    monkeypatch.setattr("consensus.sweep.dashboard.time.monotonic", lambda: clock[0])
    jobs = [Job(name, ()) for name in "abcd"]
    earlier = dict.fromkeys(jobs, Found("new"))
    dashboard = Dashboard(tmp_path, earlier, Console(file=io.StringIO()))
    for name in "ab":
        evaluated(tmp_path / name, 1000, 5.0)
        Status.running().write(tmp_path / name)
    clock[0] += 10.0
    dashboard.refresh()
    assert dashboard.seconds_left() == pytest.approx(70.0)
    evaluated(tmp_path / "a", 3000, 5.0)
    clock[0] += 10.0
    dashboard.refresh()
    assert dashboard.seconds_left() == pytest.approx(20.0 / 4000 * 12000)


def test_a_continued_run_counts_from_where_it_began(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("consensus.sweep.dashboard.time.monotonic", lambda: clock[0])
    evaluated(tmp_path / "a", 3000, 5.0)
    earlier = {Job("a", ()): Found("continues", 4000, 3000)}
    dashboard = Dashboard(tmp_path, earlier, Console(file=io.StringIO()))
    assert dashboard.seconds_left() is None
    evaluated(tmp_path / "a", 3500, 5.0)
    Status.running().write(tmp_path / "a")
    clock[0] = 6.0
    dashboard.refresh()
    assert dashboard.seconds_left() == pytest.approx(6.0)


def test_the_table_fits_80_columns_without_breaking_a_word(tmp_path):
    name = "potential=tan_sep,eta=0.5,lam=0.0025,sigma=0.001,momentum=0.99"
    job = Job(name, ())
    evaluated(tmp_path / name, 20000, 12.5, 30000)
    reason = "`algorithm.batch_size` is 5000; allowed: at most 1437"
    Status("failed", seconds=43_000.0, code=2, message=reason).write(tmp_path / name)
    output = io.StringIO()
    console = Console(file=output, width=80)
    console.print(Dashboard(tmp_path, {job: Found("continues", 30000, 0)}, console).table())
    lines = output.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    words = [word for line in lines for word in line.split()]
    for word in (*f"failed 20,000 12.50 11 h 57 min {reason}".split(), "sigma=0.001,momentum=0.99"):
        assert word in words
    assert f"best so far: test error 12.50 %, {name}" in " ".join(words)


def test_a_dashboard_that_fails_ends_no_run(tmp_path, monkeypatch):
    output = io.StringIO()
    dashboard = Dashboard(tmp_path, {}, Console(file=output), every_s=0.001)
    real = dashboard.refresh

    def broken():
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("no screen")
        real()

    monkeypatch.setattr(dashboard, "refresh", broken)
    with dashboard:
        dashboard._thread.join(10.0)
    assert "no dashboard: no screen" in output.getvalue()
