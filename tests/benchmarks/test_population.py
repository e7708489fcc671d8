"""The population benchmark and scripts/table1_gpu, at small scale on a CPU."""

import json
import os
import subprocess
import sys

import pytest
import torch

from benchmarks import population as bench
from benchmarks.harness import Problem
from tests.testing import ROOT

SAMPLES = 4 * 20  # of four workers


def test_the_floor_by_arithmetic_through_the_command(tmp_path):
    """The one benchmark that runs through scripts/bench."""
    file = tmp_path / "rows.json"
    command = [str(ROOT / "scripts" / "bench"), "population", "--quick", "--device", "cpu"]
    command += ["--models", "logistic", "--json", str(file)]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTHON": sys.executable}, text=True,
        capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found, out = json.loads(file.read_text()), done.stdout
    n = 7850
    vectors = {"quad": (4 + 2 + 3) + (5 * 4 + 1), "tan": (3 * (4 + 2) + 3 - 1) + (8 * 4 + 2)}
    for potential, lines in vectors.items():
        floor = found["floors"][f"logistic {potential}"]
        # x W and x^T (dloss / dlogits): 784 x 10 multiplications and additions each
        assert floor["operations"] == SAMPLES * 2 * 2 * 784 * 10
        assert floor["bytes"] == 4 * n * (lines + 5 * 4)
        seconds = max(
            floor["operations"] / floor["operations_per_s"],
            floor["bytes"] / floor["bytes_per_s"],
        )
        rows = [row for row in found["rows"] if row["potential"] == potential]
        assert [row["method"] for row in rows] == ["separate", "one_by_one", "grouped", "products"]
        for row in rows:
            assert row["configurations"] == 2
            assert row["over_separate"] == pytest.approx(row["ms"] / rows[0]["ms"])
            assert row["over_floor"] == pytest.approx(row["ms"] / (2 * 1e3 * seconds))
        assert f"\nlogistic, {potential}, 2 configurations of 4 workers: floor " in out


def test_the_operations_of_lenet5_by_arithmetic():
    forward = 576 * 20 * 25 + 64 * 50 * 500 + 800 * 10  # twice more in the backward pass,
    inputs = 64 * 50 * 500 + 800 * 10  # but images need no gradient
    problem = Problem(num_images=100)
    assert bench.operations_of_gradients(problem) == SAMPLES * 2 * (2 * forward + inputs)


def test_what_it_refuses(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for arguments, message in (
        (["--configurations", "0"], "`--configurations` is 0; allowed: at least 1"),
        (["--device", "cuda"], "`--device` is cuda, and torch finds none; allowed here: cpu"),
    ):
        with pytest.raises(SystemExit) as refused:
            bench.main(arguments)
        assert refused.value.code == 2
        assert message in capsys.readouterr().err


# Stands for the interpreter: the benchmark writes its file, and a sweep runs until it is stopped.
PYTHON = """#!/usr/bin/env bash
printf '%s\n' "$*" >>calls
case "$*" in
    *benchmarks.population*) touch "${@: -1}" ;;
    *consensus.sweep*) trap 'exit 130' TERM; touch started; while true; do sleep 0.05; done ;;
    *) exit 1 ;;
esac
"""


@pytest.mark.slow
def test_table_1_in_pieces(tmp_path):
    """Four configurations; the first piece is stopped by a stand-in, the second one is real."""
    smaller = ["data=digits", "model=logistic", "potential=tan", "algorithm.lam=0.1"]
    smaller += ["potential.eta=1.0", "algorithm.iterations=40", "output.eval_every=20"]
    smaller += ["device=cpu"]
    command = [str(ROOT / "scripts" / "table1_gpu"), *smaller, "sweep.dir=all"]
    folder = tmp_path / "all"
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    first = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"SECONDS_EACH": "1", "PYTHON": str(python)},
        text=True, capture_output=True, check=False,
    )  # fmt: skip
    assert first.returncode == 130, first.stderr
    own = " ".join(smaller)
    assert (tmp_path / "calls").read_text().splitlines()[1:] == [
        "-m benchmarks.population --quick --models lenet5 --json all/population.json",
        f"-m consensus.sweep grid=table1 sweep.engine=population {own} sweep.dir=all",
    ]
    real = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    second = subprocess.run(
        command, cwd=tmp_path, env=real, text=True, capture_output=True, check=False
    )
    assert second.returncode == 0, second.stderr
    assert "billion operations/s" not in second.stdout, "measured once"
    assert "\n4 done\n" in second.stdout
    assert "tan" in (folder / "report" / "report.md").read_text()
