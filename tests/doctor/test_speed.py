import pytest

from consensus.doctor import speed


@pytest.mark.parametrize(
    ("gradient_s", "sum_s", "period", "expected"),
    [
        (5e-3, 4e-3, 1, None),  # hidden
        (5e-3, 5.5e-3, 1, None),  # nearly
        (5e-3, 15e-3, 1, "algorithm.period=18 "),  # 10 ms too much: 10 / (18 * 5 + 10) is a tenth
        (5e-3, 15e-3, 18, None),
        (5e-4, 15e-4, 1, "a larger algorithm.batch_size"),
    ],
)
def test_advice_on_slow_sums(gradient_s, sum_s, period, expected):
    found = speed.advice(gradient_s, sum_s, period)
    assert (found is None) == (expected is None)
    assert expected is None or found[1].startswith(expected)
