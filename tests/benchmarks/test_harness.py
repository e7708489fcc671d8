"""The code that benchmarks share: medians, tables and options."""

import json
from dataclasses import dataclass

import pytest
import torch

from benchmarks import harness
from benchmarks.harness import CPU, Effort


def test_a_call_takes_the_median_of_its_blocks(monkeypatch):
    now = 0.0
    calls = []

    def call():
        nonlocal now
        calls.append(now)
        now += 50.0 if 7 <= len(calls) <= 10 else 0.001  # the second block is disturbed

    monkeypatch.setattr(harness, "perf_counter", lambda: now)
    assert harness.median_ms(call, CPU, Effort(blocks=3, calls=4)) == pytest.approx(1.0)
    assert len(calls) == 2 + 3 * 4


def test_a_table_is_aligned_and_has_empty_cells():
    columns = {"name": "<6", "ms": ">7.2f", "share": ">6.0%"}
    rows = [("a", 1.234, 0.5), ("b", None, None), ("c", 10, "none")]
    assert harness.table(columns, rows).splitlines() == [
        "name        ms  share",
        "a         1.23    50%",
        "b",
        "c        10.00   none",
    ]


def test_rows_are_written_as_objects(tmp_path):
    @dataclass
    class Row:
        ms: float

    harness.write_json(str(tmp_path / "rows.json"), {"rows": [Row(1.0)]})
    assert json.loads((tmp_path / "rows.json").read_text()) == {"rows": [{"ms": 1.0}]}
    harness.write_json(None, {})


def test_a_problem_is_the_same_for_everyone_and_every_worker_draws_for_itself():
    one, other = (harness.Problem().consensus("quad", range(2)) for _ in range(2))
    one.step(0)
    other.step(0)
    assert torch.equal(one.worker.z, other.worker.z)
    assert not torch.equal(one.worker.z[0], one.worker.z[1])


def test_methods_are_chosen_by_a_part_of_their_name():
    options = harness.parser("compare")
    harness.add_methods(options)
    names = ["local", "tan, period 1", "tan, period 10", "ddp"]
    assert harness.chosen(names, options.parse_args([])) == names
    own = options.parse_args(["--methods", "period 10", "dd"])
    assert harness.chosen(iter(names), own) == ["tan, period 10", "ddp"]
    with pytest.raises(SystemExit, match="`--methods` is no; no name of a method has it"):
        harness.chosen(names, options.parse_args(["--methods", "no"]))


def test_the_name_of_the_command_is_in_its_help(capsys):
    with pytest.raises(SystemExit):
        harness.parser("gpu", quick="tiny", device=True, plot=True).parse_args(["--help"])
    out = capsys.readouterr().out
    assert out.startswith("usage: scripts/bench gpu ")
    assert all(option in out for option in ("--json", "--quick", "--device", "--plot"))
