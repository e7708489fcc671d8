import pytest
import torch
from torch import Tensor

from consensus.comm import Pending, RepeatedSum, Solo
from consensus.doctor import speed


@pytest.mark.parametrize(
    ("gradient_s", "sum_s", "period", "expected"),
    [
        (5e-3, 4e-3, 1, None),  # hidden
        (5e-3, 5.5e-3, 1, None),  # nearly
        (5e-3, 0.0, 1, None),  # one process
        (5e-3, 15e-3, 1, "algorithm.period=18 "),  # 10 ms too much: 10 / (18 * 5 + 10) is a tenth
        (5e-3, 15e-3, 18, None),
        (5e-4, 15e-4, 1, "a larger algorithm.batch_size"),
    ],
)
def test_advice_on_slow_sums(gradient_s, sum_s, period, expected):
    found = speed.advice(gradient_s, sum_s, period)
    assert (found is None) == (expected is None)
    assert expected is None or found[1].startswith(expected)


class Distant(Solo):
    """A process whose sums take a latency, and a time for each number, on a clock of its own."""

    def __init__(self, latency_s: float, each_s: float) -> None:
        super().__init__(torch.device("cpu"))
        self.latency_s, self.each_s, self.now = latency_s, each_s, 0.0

    def perf_counter(self) -> float:
        return self.now

    def repeated_sum(self, numel: int, like: Tensor, exact: int = 0) -> RepeatedSum:
        total = super().repeated_sum(numel, like, exact)
        begin = total.start

        def start() -> Pending:
            self.now += self.latency_s + self.each_s * numel
            return begin()

        total.start = start
        return total


@pytest.mark.parametrize(
    ("latency_s", "each_s", "expected"),
    [
        (0.1, 0.0, [1, 1_000, 7_850, 100_000, 10_000_000]),  # a thousand latencies are too long
        (0.1, 1e-6, [1, 1_000, 7_850, 100_000]),
        (0.0, 1e-4, [1, 1_000, 7_850]),
        (0.0, 1e-2, [1, 1_000, 7_850]),  # u of this model is always measured
    ],
)
def test_sums_that_take_too_long_are_left_out(
    make_config, monkeypatch, latency_s, each_s, expected
):
    group = Distant(latency_s, each_s)
    monkeypatch.setattr(speed, "time", group)
    (finding,), own_s = speed.check_sums(group, 7_850, make_config("experiment=smoke"), "gloo")
    sizes = [int(line.split()[0].replace(",", "")) for line in finding.text.splitlines()[2:]]
    assert sizes == expected
    assert own_s == pytest.approx(latency_s + 7_850 * each_s)
