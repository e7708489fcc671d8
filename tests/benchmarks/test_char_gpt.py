"""The arithmetic of the benchmark of the GPT example."""

import statistics

import pytest

from benchmarks.char_gpt import rows


def test_the_last_losses_are_compared():
    curves = {"DDP": [[9.0, 2.0], [9.0, 4.0]], "consensus": [[9.0, 2.2], [9.0, 4.0]]}
    first, second, mean, deviation = rows(curves)
    assert first == ("0", 2.0, 2.2, pytest.approx(0.1))
    assert second == ("1", 4.0, 4.0, 0.0)
    assert mean == ("mean", 3.0, pytest.approx(3.1), pytest.approx(0.1 / 3.0))
    assert deviation == ("deviation", statistics.stdev([2, 4]), pytest.approx(1.8 / 2**0.5), None)
