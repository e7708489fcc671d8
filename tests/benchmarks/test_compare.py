"""The benchmark runs, and counts what the methods send as arithmetic says."""

import json
import subprocess
import sys

import pytest

from tests.testing import ROOT

N = 33_580


@pytest.mark.ranks
@pytest.mark.slow
def test_the_table_of_the_benchmark(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(ROOT / "benchmarks" / "compare.py"), "--workloads", "lenet5", "--rounds", "2"]
    command += ["--seconds", "0.05", "--json", "rows.json", "--plot", "bars.png"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    lines = [line for line in done.stdout.splitlines() if line.startswith("lenet5")]
    assert len(lines) == len(rows)
    sent = {row["method"]: row["bytes_per_iteration"] for row in rows}
    layers = 3
    assert sent == {
        "local": 0,
        "consensus quad, period 1": 4 * N,
        "consensus cubic, period 1": 4 * N,
        "consensus tan, period 1": 4 * (N + 2 * layers),  # two ranks tell how far they are from 0
        "consensus log, period 1": 4 * (N + 2 * layers),
        "consensus tan_sep, period 1": 4 * (N + 2),
        "consensus quad, period 10": pytest.approx(4 * N / 10),
        "consensus tan, period 10": pytest.approx(4 * (N + 2 * layers) / 10),
        "consensus quad over Gloo": 4 * N,
        "  the same in bf16": 2 * N,
        "ddp": 4 * N,
        "postlocal, period 1": 4 * N,
        "postlocal, period 10": pytest.approx(4 * N / 10),
        "naive easgd": 4 * N,
    }
    for row in rows:
        assert (row["workload"], row["parameters"], row["processes"]) == ("lenet5", N, 2)
        assert row["ms"] > 0
        error = {"consensus quad over Gloo": 2.0**-23, "  the same in bf16": 2.0**-7}
        if row["method"] in error:  # two numbers rounded, and their sum, of unknown signs
            assert 0 < row["error"] < error[row["method"]]
        else:
            assert row["error"] is None
        assert row["samples_per_s"] == pytest.approx(2 * 20 * 1e3 / row["ms"])
    assert rows[0]["ratio_to_local"] == 1.0
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")
