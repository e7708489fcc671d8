"""Differences over the seeds, against closed forms of Student's t for two degrees of freedom."""

import math

import pytest

from consensus.report.paired import difference, paired_table
from consensus.report.table1 import table1
from tests.testing.made_runs import config, row, run

QUAD, TAN = (5.0, 7.0, 6.0), (4.0, 5.0, 3.0)  # differences 1, 2, 3


def made(potential, errors, seeds=(0, 1, 2), **others):
    return [
        run(config(potential, seed=seed, **others), row(1.0, 1.0, 1.0, 1.0, error))
        for seed, error in zip(seeds, errors, strict=True)
    ]


def test_the_difference_of_two_methods():
    """For 2 degrees of freedom: p = 1 - t / sqrt(2 + t^2), and the quantile from p = 0.05."""
    quad, tan = table1(made("quad", QUAD) + made("tan", TAN))
    found = difference(quad.best, tan.best, "test_error")
    t = 2.0 * math.sqrt(3.0)
    quantile = math.sqrt(2.0 * 0.95**2 / (1.0 - 0.95**2))
    assert (found.seeds, found.mean.mean, found.mean.std) == (3, 2.0, 1.0)
    assert found.p == pytest.approx(1.0 - t / math.sqrt(2.0 + t * t))
    assert found.half_width == pytest.approx(quantile / math.sqrt(3.0))
    back = difference(tan.best, quad.best, "test_error")
    assert (back.mean.mean, back.p) == (-2.0, pytest.approx(found.p))


def test_seeds_that_only_one_has_are_left_out():
    """Seeds 1 and 2 are common: 7 - 4 and 6 - 5, so t = 2 sqrt 2 with one degree of freedom."""
    quad, tan = table1(made("quad", QUAD) + made("tan", TAN, (1, 2, 3)))
    found = difference(quad.best, tan.best, "test_error")
    assert (found.seeds, found.mean.mean) == (2, 2.0)
    assert found.p == pytest.approx(1.0 - 2.0 / math.pi * math.atan(2.0))
    quad, tan = table1(made("quad", QUAD) + made("tan", TAN, (2, 3, 4)))
    assert difference(quad.best, tan.best, "test_error") is None


@pytest.mark.parametrize(("errors", "p"), [(TAN, 1.0), ((5.0, 6.0, 4.0), 0.0)])
def test_equal_differences_have_no_deviation(errors, p):
    one, other = table1(made("quad", errors) + made("tan", TAN))
    assert difference(one.best, other.best, "test_error").p == p


def test_the_table_is_beside_the_best_of_each_problem():
    """Of digits `tan` is the best; of MNIST there is one method."""
    runs = made("quad", QUAD) + made("tan", TAN) + made("quad", QUAD, data__name="mnist")
    assert paired_table(table1(runs)) == [
        ["difference", "column", "seeds", "mean", "95 % interval", "p"],
        [
            *("quad (digits, lenet5) - tan (digits, lenet5)", "test error %", "3"),
            *("2.0 ± 1.0", "-0.484 to 4.48", "0.074"),
        ],
    ]
    assert paired_table(table1(made("quad", QUAD[:1], (0,)) + made("tan", TAN[:1], (0,)))) == []
