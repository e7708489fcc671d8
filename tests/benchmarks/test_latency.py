"""The benchmark of the latency: what is expected, what counts, and when the latency changes."""

import json
import subprocess
from dataclasses import replace

import pytest
import torch

from benchmarks import latency as bench
from benchmarks.latency_report import Costs, Found, Plan, Row, Run
from consensus.problem import build_model

PLAN = Plan((0.0, 10.0), (1, 4), rounds=1, hosts=2, loss=0.0, potential="quad", seed=0)


def test_the_expected_time_by_hand():
    costs = Costs(total=0.05, minimum=0.02, gather=0.02)
    # Nothing of the sum is hidden but the time of the gradient; the look comes once a segment.
    assert costs.expected(0.01, 1, 0.0, 10) == pytest.approx(0.01 + 0.04 + 0.02 / 10)
    assert costs.expected(0.01, 4, 0.5, 10) == pytest.approx(0.01 + (0.04 + 0.01) / 4 + 0.02 / 10)
    # Once a second, where a segment takes longer.
    assert costs.expected(0.01, 1, 0.0, 1000) == pytest.approx(0.05 + 0.02 * 0.05)
    # Whatever is shorter than the gradient is hidden.
    hidden = replace(costs, total=0.005, gather=0.0)
    assert hidden.expected(0.01, 1, 0.0, 10) == 0.01
    # Hidden by the gradients of three iterations, as is the check of a second.
    late = costs.expected(0.01, 4, 0.0, 10, delay=2)
    assert late == pytest.approx(0.01 + (0.05 - 0.03) / 4 + 0.02 / 10)
    assert costs.expected(0.01, 16, 0.0, 10, delay=7) == pytest.approx(0.01 + 0.02 / 10)
    assert hidden.expected(0.01, 1, 1.0, 10) == pytest.approx(0.03)


@pytest.mark.parametrize(("periods", "segment"), [((1, 4, 16, 64), 64), ((3, 10), 90), ((5,), 65)])
def test_a_segment_holds_whole_periods(periods, segment):
    plan = replace(PLAN, periods=periods)
    assert plan.segment == segment
    assert plan.iterations == segment * 7  # to warm up, and three for each of two latencies


def test_the_segments_that_count():
    # The first segment does not count, nor does the one in which a latency starts.
    rates = [1, 2, 40.0, 20.0, 5, 10.0, 8.0]
    rows = [{"samples_per_s": rate} for rate in rates]
    assert bench.segments(rows, 2, (0.0, 10.0)) == [[1.0, 2.0], [4.0, 5.0]]


class Process:
    """A run that writes a row, and half of the next one, whenever it is looked at."""

    def __init__(self, metrics, rows):
        self.metrics, self.left, self.text = metrics, rows, ""

    def poll(self):
        if not self.left:
            return 0
        self.text += json.dumps({"left": self.left}) + "\n"
        self.metrics.write_text(self.text + '{"le')
        self.left -= 1
        return None


class Latencies:
    """Hosts that note how many rows there were when their latency changed."""

    def __init__(self, metrics):
        self.metrics, self.found = metrics, []

    def set_latency(self, latency):
        self.found.append((self.metrics.read_text().count("\n"), latency))


def test_the_latency_changes_after_the_rows_of_the_last_one(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "POLL_S", 0.0)
    metrics = tmp_path / "metrics.jsonl"
    hosts = Latencies(metrics)
    rows = bench.follow(Process(metrics, 7), metrics, hosts, (10.0, 0.0))
    assert hosts.found == [(1, 10.0), (4, 0.0)]
    assert [row["left"] for row in rows] == [7, 6, 5, 4, 3, 2, 1]


def test_the_sum_that_is_measured_is_that_of_the_model():
    u = build_model("lenet5", 0, torch.float32, num_classes=10).parameters()
    assert sum(parameter.numel() for parameter in u) == bench.COORDINATES


def test_minima_are_counted():
    plan = replace(PLAN, latencies=(), periods=(1,))
    assert bench.share_of_minima(plan, 1) == 0.0
    assert 0.0 < bench.share_of_minima(replace(plan, potential="tan"), 1) < 1.0


def test_a_failed_run_is_an_error(tmp_path, capsys, monkeypatch):
    class Nowhere(Latencies):
        names, addresses, remote = ["a", "b"], ["10.0.0.1", "10.0.0.2"], "false"

        def set_latency(self, latency):
            pass

    monkeypatch.setattr(subprocess, "Popen", quickly(subprocess.Popen))
    with pytest.raises(SystemExit, match="a run with period 4 has failed"):
        bench.run_once(Nowhere(None), PLAN, 4, PLAN.latencies)
    assert "node.sh" in capsys.readouterr().err


def quickly(popen):
    """Popen of a command that ends at once, before it is looked at."""

    def start(*args, **kwargs):
        process = popen(*args, **kwargs)
        process.wait(timeout=60)
        return process

    return start


def test_the_tables_and_the_figure(tmp_path):
    costs = {0.0: Costs(0.001, 0.001, 0.001), 10.0: Costs(0.04, 0.02, 0.02)}
    rows = [Row(0.0, 1, [0.01, 0.02, 0.03], 0.015), Row(0.0, 4, [0.01], 0.01)]
    rows += [Row(10.0, 1, [0.04], 0.045), Row(10.0, 4, [0.02], 0.0175)]
    runs = [Run(1, 2.5, "a", 0.0), Run(4, 5.0, "b", 0.25)]
    floors = {"bridge": (1e-5, 2e9), "switch": (4e-5, 1e9)}
    found = Found(PLAN, floors, costs, rows, runs)
    lines = bench.tables(found).splitlines()
    assert "| switch | 0.040 | 1000 |" in lines
    assert "| 10 | 40.0 | 20.0 | 20.0 |" in lines
    assert "| period | 0 ms | 10 ms | minima | test error |" in lines
    assert "| 1 | 20.0 (15.0) | 40.0 (45.0) | 0 % | 2.50 % |" in lines
    assert "| 4 | 10.0 (10.0) | 20.0 (17.5) | 25 % | 5.00 % |" in lines
    bench.draw(found, str(tmp_path / "figure.png"))
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    assert json.loads(json.dumps(bench.content(found)))["iterations"] == 448
