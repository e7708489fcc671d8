"""The curves run end to end, and their laws are those of the points."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import scaling

ROOT = Path(__file__).resolve().parents[1]


def test_fit_recovers_a_line_over_five_decades():
    xs = [10.0**k for k in range(3, 9)]
    a, b = scaling.fit(xs, [2e-5 + 3e-9 * x for x in xs])
    assert (a, b) == (pytest.approx(2e-5, rel=1e-9), pytest.approx(3e-9, rel=1e-9))


def test_fit_counts_relative_errors():
    # The closed form for a = 0 of both t = (1, 200) at x = (1, 100): 1 / t and x / t give
    # a system of two equations with an exact answer, a + b = 1 and a + 100 b = 200.
    a, b = scaling.fit([1.0, 100.0], [1.0, 200.0])
    assert b == pytest.approx(199 / 99)
    assert a == pytest.approx(1 - 199 / 99)


def test_the_quadratic_has_its_gradient():
    points = torch.randn(2, 5, dtype=torch.float64)
    found = scaling.Quadratic().gradient(points.clone(), None)
    torch.testing.assert_close(found, scaling.Quadratic.CURVATURE * points)


def test_what_needs_more_memory_than_there_is_is_left_out(monkeypatch):
    monkeypatch.setattr(scaling, "available_memory", lambda: 100.0 * 2**30)
    kept, sentences = scaling.affordable("n", [1, 99, 101], lambda gib: gib * 2**30)
    assert kept == [1, 99]
    assert sentences == [
        "n = 101 is left out: it needs 101.0 GiB of memory, 100.0 GiB are available"
    ]


@pytest.mark.ranks
@pytest.mark.slow
def test_all_panels(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "scaling.py"), "--quick"]
    command += ["--json", "rows.json", "--plot", "curves.png"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "rows.json").read_text())
    points = {(row["panel"], row["series"], row["x"]) for row in found["rows"]}
    ours = ("quad", "tan")
    assert points == {
        *(("n", s, n) for s in ("copy", *ours, "tan_sep") for n in (10**4, 10**5, 10**6)),
        *(("workers", s, m) for s in ours for m in (2, 4)),
        *(("processes", s, p) for s in ("alone", *ours) for p in (1, 2)),
        *(("period", s, h) for s in ours for h in (1, 2, 4)),
    }
    assert len(found["rows"]) == len(points)
    assert all(row["ms"] > 0 for row in found["rows"])
    assert {(law["panel"], law["series"]) for law in found["laws"]} == {p[:2] for p in points}
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
