"""Schedules: closed forms, both ends, and what is refused."""

import math

import pytest

from consensus.core.schedules import SCHEDULES


def values(name, iterations, **options):
    factor = SCHEDULES.make(name, **options)
    return [factor(t, iterations) for t in range(iterations + 1)]


def test_constant():
    assert values("constant", 5) == [1.0] * 6


def test_linear():
    assert values("linear", 4) == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert values("linear", 4, final=0.2) == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
    assert values("linear", 4, final=2.0) == pytest.approx([1.0, 1.25, 1.5, 1.75, 2.0])


def test_cosine():
    half = math.sqrt(0.5)
    expected = [1.0, (1 + half) / 2, 0.5, (1 - half) / 2, 0.0]
    assert values("cosine", 4) == pytest.approx(expected)
    expected = [0.1 + 0.9 * e for e in expected]
    assert values("cosine", 4, final=0.1) == pytest.approx(expected)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_warmup_climbs_to_one_and_then_decays(name):
    warm = values(name, 10, final=0.1, warmup=4)
    assert warm[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert warm[4:] == pytest.approx(values(name, 6, final=0.1))
    assert warm[4:] == sorted(warm[4:], reverse=True)
    assert warm[-1] == pytest.approx(0.1)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_warmup_as_long_as_the_run_or_longer(name):
    assert values(name, 3, warmup=3) == pytest.approx([1 / 3, 2 / 3, 1.0, 1.0])
    assert values(name, 2, warmup=4) == [0.25, 0.5, 0.75]


def test_step():
    expected = [1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.25]
    assert values("step", 6, every=3, factor=0.5) == expected
    assert values("step", 2, every=1, factor=3.0) == [1.0, 3.0, 9.0]
    default = SCHEDULES["step"]
    assert default(9_999, 30_000) == 1.0
    assert default(20_000, 30_000) == pytest.approx(0.01)


def test_each_is_nonnegative_and_starts_at_one():
    for name in SCHEDULES:
        factors = values(name, 50)
        assert factors[0] == 1.0
        assert min(factors) >= 0.0


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("linear", {"final": -0.1}, "`final` is -0.1; allowed: a finite number >= 0"),
        ("cosine", {"final": -1.0}, "`final` is -1.0"),
        ("linear", {"warmup": -1}, "`warmup` is -1; allowed: a whole number >= 0"),
        ("cosine", {"warmup": -5}, "`warmup` is -5"),
        ("step", {"every": 0}, "`every` is 0; allowed: a whole number >= 1"),
        ("step", {"factor": 0.0}, "`factor` is 0.0; allowed: a finite number > 0"),
        ("step", {"factor": -0.1}, "`factor` is -0.1"),
        ("constant", {"final": 0.1}, "schedule `constant` has no option `final`"),
    ],
)
def test_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        SCHEDULES.make(name, **options)
