"""The benchmark of start-up: one start of torch alone, and the rest by arithmetic."""

import json
import subprocess
import sys

import pytest

from benchmarks import startup
from benchmarks.startup import AGAINST, HERE, PROBE, ROOT, TORCH, Start

ABSENT = "no consensus/train.py is there"


def test_the_medians_by_hand():
    torch = [Start(5.0, 5.5, 2.0, 2.2), Start(9.0, 9.5, 3.0, 3.2), Start(6.0, 7.0, 2.5, 2.6)]
    own = [Start(6.5, 9.0, 3.0, 2.8), Start(9.5, 11.0, 4.0, 4.2), Start(8.0, 12.0, 3.5, 3.0)]
    row = startup.row_of(2, HERE, own, torch)
    assert (row.first, row.end, row.cpu, row.others) == (8.0, 11.0, 3.5, 3.0)
    assert row.over_torch == 1.5, "of the differences 1.5, 0.5, 2.0"
    assert startup.row_of(2, TORCH, torch, torch).over_torch is None
    alone = [Start(1.0, 2.0, 0.5, None)]
    assert startup.row_of(1, HERE, alone, alone).others is None


def test_the_programs_alternate_and_the_first_round_does_not_count(monkeypatch, capsys):
    seen = []

    def start(checkout, processes):
        seen.append((checkout, processes))
        slow = 100.0 if len(seen) in (1, 2, 3, 7, 8, 9) else 0.0  # the first round of each
        return Start(slow + processes, slow + 2.0, 1.0, None)

    monkeypatch.setattr(startup, "start", start)
    startup.main(["--processes", "1", "4", "--rounds", "1", "--against", str(ROOT)])
    assert seen == [(place, n) for n in (1, 4) for _ in range(2) for place in (None, ROOT, ROOT)]
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line[10:24].strip() for line in lines] == [TORCH, HERE, AGAINST] * 2
    assert [line.split()[0] for line in lines] == ["1"] * 3 + ["4"] * 3
    assert lines[0].split()[3:] == ["1.00", "2.00", "1.00"]


@pytest.mark.parametrize("processes", [1, 2])
def test_the_commands_are_those_of_a_user(tmp_path, processes):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    how = [sys.executable, *(torchrun if processes == 2 else [])]
    assert startup.command(None, processes, tmp_path) == [*how, str(tmp_path / PROBE.name)]
    words = ["experiment=smoke", "plugins=[startup_probe]", "device=cpu"]
    words.append(f"output.run_dir={tmp_path}/run")
    assert startup.command(ROOT, processes, tmp_path) == [*how, "-m", "consensus.train", *words]


def test_the_first_iteration_is_noted(monkeypatch, tmp_path):
    """A rank that starts at second 12.5 of the clock, of a command that began at 10."""
    ended = []

    def run(command, *, cwd, env, **options):
        assert env["PYTHONPATH"].split(":") == [str(tmp_path), str(cwd)]
        assert (cwd / PROBE.name).read_bytes() == PROBE.read_bytes()
        for rank, clock in enumerate((12.0, 12.5, 11.0)):
            note = {"clock": clock, "cpu_s": 2.0 + rank}
            (cwd / f"{rank}.json").write_text(json.dumps(note))
        ended.append(cwd)
        return subprocess.CompletedProcess(command, 0, "", "")

    times = iter((10.0, 15.0))
    monkeypatch.setattr(startup.time, "monotonic", lambda: next(times))
    monkeypatch.setattr(startup.subprocess, "run", run)
    assert startup.start(tmp_path, 3) == Start(2.5, 5.0, 2.0, 3.5)
    assert not ended[0].exists()


@pytest.mark.slow
def test_a_start_of_torch_alone():
    found = startup.start(None, 1)
    assert 0.1 < found.cpu < found.end
    assert 0.1 < found.first <= found.end
    assert found.others is None


def test_a_start_that_fails_ends_the_command(monkeypatch, tmp_path, capsys):
    def run(command, **options):
        return subprocess.CompletedProcess(command, 1, "out", "why")

    monkeypatch.setattr(startup.subprocess, "run", run)
    with pytest.raises(SystemExit, match="scripts/bench startup: a start in torch has failed"):
        startup.start(None, 2)
    assert "why" in capsys.readouterr().err


def test_a_folder_without_the_package_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        startup.main(["--against", str(tmp_path)])
    assert caught.value.code == 2
    assert f"argument --against: {tmp_path} is not allowed: {ABSENT}" in capsys.readouterr().err
