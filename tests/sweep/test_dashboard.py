"""The dashboard: lines of ended runs, counts, the live table, durations."""

import io
import json
import os

import pytest
from rich.console import Console

from consensus.records import last_row
from consensus.sweep.dashboard import Dashboard, duration
from consensus.sweep.grid import Job
from consensus.sweep.job import Status


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(5, "5 s"), (89.6, "90 s"), (90, "2 min"), (3600, "60 min"), (7500, "2 h 5 min")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_lines_counts_and_table(tmp_path):
    """Jobs a to d: a was done before, b ends, c fails, d runs."""
    output = io.StringIO()
    jobs = [Job(name, ()) for name in "abcd"]
    for job in jobs:
        (tmp_path / job.name).mkdir()
    (tmp_path / "a" / "summary.json").write_text("{}")
    assert last_row(tmp_path / "b") is None
    with Dashboard(tmp_path, jobs, Console(file=output, width=200), every_s=60.0) as dashboard:
        assert dashboard.seconds_left() is None
        row = {"iteration": 2000, "test_error": 1.25}
        (tmp_path / "b" / "metrics.jsonl").write_text(json.dumps(row) + "\n")
        (tmp_path / "b" / "summary.json").write_text("{}")
        Status("done", seconds=7.0, code=0).write(tmp_path / "b")
        Status("failed", seconds=3.0, code=2, message="[no] luck").write(tmp_path / "c")
        Status("running", os.getpid(), os.uname().nodename).write(tmp_path / "d")
        (tmp_path / "d" / "metrics.jsonl").write_text(json.dumps(row) + "\n")
        dashboard.refresh()
        assert dashboard.seconds_left() is not None
        table = dashboard.table()
        assert [list(column.cells) for column in table.columns][:4] == [
            ["running", "failed"],
            ["d", "c"],
            ["2,000", "0"],
            ["1.25", ""],
        ]
    lines = output.getvalue().splitlines()
    assert lines[0].startswith("4 runs in ")
    assert lines[0].endswith(", 1 of them done before")
    assert lines[1:3] == [
        "   done  b  7 s  test error 1.25 %",
        " failed  c  3 s  exit code 2: [no] luck",
    ]
    assert lines[3].startswith("2 done, 1 running, 1 failed; about ")
