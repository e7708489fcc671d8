"""The benchmark of populations, and the whole of Table 1 at small scale: on a CPU."""

import json
import os
import subprocess
import sys

import pytest
import torch

from benchmarks import population as bench
from tests.testing import ROOT

SAMPLES = 4 * 20  # of four workers


def test_the_floor_by_arithmetic(capsys, tmp_path):
    file = tmp_path / "rows.json"
    bench.main(["--quick", "--device", "cpu", "--models", "logistic", "--json", str(file)])
    found = json.loads(file.read_text())
    n, out = 7850, capsys.readouterr().out
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
    problem = bench.Problem(torch.device("cpu"), "lenet5", 100)
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


@pytest.mark.slow
def test_table_1_in_pieces(tmp_path):
    """Two potentials of four configurations; stopped when the first begin."""
    smaller = ["data=digits", "model=logistic", "potential=quad,tan", "algorithm.lam=0.1"]
    smaller += ["potential.eta=1.0", "algorithm.iterations=200", "output.eval_every=100"]
    smaller += ["device=cpu"]
    command = [str(ROOT / "scripts" / "table1_gpu"), *smaller, "sweep.dir=all"]
    folder = tmp_path / "all"
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment | {"SECONDS_EACH": "3600"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    ) as first:  # fmt: skip
        assert first.stdout is not None
        lines = []
        for line in first.stdout:
            lines.append(line)
            if "advance together" in line:
                subprocess.run(["pkill", "-TERM", "-s", str(first.pid), "timeout"], check=True)
        assert first.wait() == 130, "".join(lines)
    assert "stopped; the same command continues it" in lines[-1]
    assert (folder / "population.json").exists()
    second = subprocess.run(
        command, cwd=tmp_path, env=environment, text=True, capture_output=True, check=False
    )
    assert second.returncode == 0, second.stderr
    assert "billion operations/s" not in second.stdout, "measured once"
    assert "\n8 done\n" in second.stdout
    table = (folder / "report" / "report.md").read_text()
    assert "quad" in table
    assert "tan" in table
