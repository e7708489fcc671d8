"""The benchmark of sums: every way gives the sum, and a row holds its time."""

import io
import json

import pytest
import torch

from benchmarks import sums as bench
from benchmarks.harness import table


def every_way(group):
    found = {}
    for name, total in bench.sums(group, 1000).items():
        for _ in range(2):
            total.message.copy_(torch.arange(1000) * (group.rank + 1.0))
            result = total.start().wait().clone()
        found[name] = result
    return found


@pytest.mark.ranks
@pytest.mark.parametrize("size", [2, 3])
def test_every_way_gives_the_sum(ranks, size):
    exact = torch.arange(1000) * size * (size + 1) / 2
    for found in ranks(size, every_way):
        assert len(found) == 6
        for name, total in found.items():
            rounded = "bf16" in name or name == "int8"
            torch.testing.assert_close(total, exact, rtol=0, atol=0.02 * exact.max() * rounded)


class Started:
    """Hosts and a rank that answers at once."""

    def __init__(self, output):
        self.stdin, self.stdout, self.latencies = io.StringIO(), io.StringIO(output), []

    def set_latency(self, latency):
        self.latencies.append(latency)

    def wait(self, timeout):
        return 0

    def kill(self):
        pass

    communicate = kill


def test_a_row_for_every_way_and_latency(monkeypatch):
    answer = json.dumps({"ring": [1.5, 0.5]}) + "\n"
    started = Started(2 * answer)
    monkeypatch.setattr(bench, "start_on", lambda *_, **__: [started])
    rows = bench.measure(started, (0.0, 10.0), (7,), 3)
    assert rows == [(0.0, 7, "ring", 1.5, 0.5), (10.0, 7, "ring", 1.5, 0.5)]
    assert started.latencies == [0.0, 10.0]
    assert table(bench.COLUMNS, rows).splitlines()[1].split() == ["0", "7", "ring", "1.50", "0.50"]
    with pytest.raises(SystemExit, match="the ranks have failed"):
        bench.measure(started, (0.0,), (7,), 3)
