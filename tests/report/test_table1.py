"""The records of Table 1, against means and orders by hand."""

import math

import pytest

from consensus.report.table1 import Mean, group_seeds, rounded, table1
from tests.testing.made_runs import ACCURACY, MSE, accuracies, config, regression, row, run


def test_mean_and_sample_deviation_over_seeds():
    # 1, 2, 6: mean 3, deviations -2, -1, 3, squares 4 + 1 + 9 = 14, over 2 = 7
    runs = [run(config(seed=s), row(1, 1, 1, 1, e)) for s, e in enumerate((1.0, 2.0, 6.0))]
    (c,) = group_seeds(runs)
    mean = c.mean("test_error")
    assert mean.mean == 3.0
    assert mean.std == pytest.approx(7**0.5, rel=1e-15)
    assert mean.show("test_error") == "3.0 ± 2.6"
    assert c.seeds == "3"
    (one,) = group_seeds(runs[:1])
    assert one.mean("test_error").std is None
    assert one.mean("test_error").show("test_error") == "1.00"


def test_a_configuration_is_not_the_best_by_the_seeds_that_it_survived():
    last = {0: 0.1, 1: None, 2: None}
    survivors = [
        run(config(lam=0.5, seed=s), row(1, 1, 1, 1, e), finished=e is not None)
        for s, e in last.items()
    ]
    whole = [run(config(lam=0.1, seed=s), row(1, 1, 1, 1, 2.0 + s)) for s in range(3)]
    (record,) = table1([*survivors, *whole])
    assert (record.best.seeds, record.chosen["algorithm.lam"]) == ("3", "0.1")
    assert record.lowest["test_error"].mean == 3.0
    (alone,) = table1(survivors)
    assert (alone.best.seeds, alone.lowest["test_error"].mean) == ("1 of 3", 0.1)


def test_equal_sums_of_percents_are_a_tie():
    """63 + 71 + 74 = 72 + 70 + 66 of 360 images; their means differ in the last bit."""
    counts = {0.1: (63, 71, 74), 0.2: (72, 70, 66)}
    runs = [
        run(config(lam=lam, seed=s), row(1, 1, 1, 100 * lam, 100 * wrong / 360))
        for lam, of in counts.items()
        for s, wrong in enumerate(of)
    ]
    one, other = (c.mean("test_error").mean for c in group_seeds(runs))
    assert one != other
    for order in (runs, runs[::-1]):
        (record,) = table1(order)
        assert record.chosen["algorithm.lam"] == "0.1", "the lowest test loss"


@pytest.mark.parametrize(
    ("mean", "std", "text"),
    [
        (169.02, 1.6077, "169.0 ± 1.6"),
        (169.02, 16.077, "169 ± 16"),
        (169.02, 160.77, "170 ± 160"),
        (12345.0, 678.0, "12340 ± 680"),  # to even, as Python rounds
        (1.0, 0.0996, "1.00 ± 0.10"),
        (1.0, 0.994, "1.00 ± 0.99"),
        (1.0, 0.996, "1.0 ± 1.0"),
        (0.0, 0.5, "0.00 ± 0.50"),
        (-3.14159, 0.0271, "-3.142 ± 0.027"),
        (0.4, 3.0, "0.4 ± 3.0"),
        (3.2e-7, 1.2e-8, "(3.20 ± 0.12)e-7"),
        (1.23456e9, 1.2e6, "(1.2346 ± 0.0012)e9"),
        (1.0, 0.0, None),
        (1.0, 1e-9, None),
        (1.0, math.inf, None),
    ],
)
def test_a_mean_has_the_digits_of_its_deviation(mean, std, text):
    assert rounded(mean, std) == text


def test_a_deviation_without_digits_stands_beside_the_mean():
    assert Mean(0.3, 0.0).show("test_error") == "0.30 ± 0"
    assert Mean(1.0, 1e-9).show("objective") == "1 ± 1e-09"


def test_means_leave_out_diverged_and_unfinished_runs():
    runs = [
        run(config(seed=0), row(1, 1, 1, 1, 1.0)),
        run(config(seed=1), row(None, None, 90.0, None, 90.0)),
        run(config(seed=2), row(1, 1, 1, 1, 50.0), finished=False),
        run(config(seed=3), row(1, 1, 1, 1, 2.0)),
        run(config(seed=4), None, finished=False),
        run(config(seed=5), row(5.9e36, 5.9e36, 0.5, 1, 0.5)),
    ]
    (c,) = group_seeds(runs)
    assert c.mean("test_error").mean == 1.5
    assert c.seeds == "2 of 6"
    (line,) = table1(runs)
    assert (line.finished, line.others) == (2, 4)
    assert line.lowest["test_error"].mean == 1.5


def test_a_repeated_seed_counts_once():
    runs = [
        run(config(), row(1, 1, 1, 1, 5.0)),
        run(config(), row(1, 1, 1, 1, 7.0)),
        run(config(), row(1, 1, 1, 1, 1.0), finished=False),
    ]
    (c,) = group_seeds(runs)
    assert (c.mean("test_error").mean, c.mean("test_error").std) == (7.0, None)
    assert c.seeds == "1"
    (line,) = table1(runs)
    assert (line.finished, line.others) == (2, 1), "but every run is counted"


def test_the_order_of_lines():
    names = ["log_cosh", "log_sep", "tan", "quad", "tan_sep", "aaa", "log", "cubic"]
    runs = [
        run(config(algorithm__name=name), None) for name in ("msgd", "ddp", "easgd", "local_sgd")
    ]
    runs += [run(config(potential=name), None) for name in names]
    assert [line.label for line in table1(runs)] == [
        "quad", "cubic", "tan", "tan_sep", "log", "log_sep", "aaa", "log_cosh", "EASGD",
        "local SGD", "DDP", "mSGD",
    ]  # fmt: skip


def test_problems_keep_apart():
    last = row(1, 1, 1, 1, 1)
    runs = [run(config(data__name=name), last) for name in ("mnist", "digits")]
    assert [line.label for line in table1(runs)] == [
        "quad (digits, lenet5)",
        "quad (mnist, lenet5)",
    ]


@pytest.mark.parametrize("turn", [1, -1])
def test_ties_in_test_error_go_to_the_lower_test_loss(turn):
    runs = [
        run(config(lam=0.1), row(1, 1, 1, 120.0, 0.8)),
        run(config(lam=0.2), row(9, 9, 9, 110.0, 0.8)),
        run(config(lam=0.3), row(0, 0, 0, 1.0, 0.9)),
    ][::turn]
    (line,) = table1(runs)
    assert line.best.config["algorithm.lam"] == 0.2


def test_a_regression_is_ranked_by_its_first_metric():
    """By the mse, although the mae and the train loss say otherwise; ties go to the test loss."""
    runs = [
        run(config(lam=0.1), regression(3.0, 0.1), **MSE),
        run(config(lam=0.2), regression(2.0, 0.7, test_loss=40.0), **MSE),
        run(config(lam=0.3), regression(2.0, 0.6, test_loss=30.0), **MSE),
        run(config(lam=0.4), regression(1.0, 0.5), finished=False, **MSE),
    ]
    (line,) = table1(runs)
    assert line.best.config["algorithm.lam"] == 0.3
    assert list(line.lowest) == [
        "objective", "train_loss", "train_mse", "train_mae", "test_loss", "test_mse", "test_mae",
    ]  # fmt: skip
    assert (line.lowest["test_mse"].mean, line.lowest["test_mae"].mean) == (2.0, 0.1)
    assert line.at_best["test_mae"].mean == 0.6
    assert (line.column, line.highest) == ("test_mse", frozenset())


@pytest.mark.parametrize("turn", [1, -1])
def test_the_highest_accuracy_on_the_validation_set_is_the_best(turn):
    """0.8 and 0.9 are 0.85 over two seeds, above 0.84; that 0.84 tests at 0.99 does not count."""
    runs = [
        run(config(lam=0.1, seed=0), accuracies(0.8, 0.7), **ACCURACY),
        run(config(lam=0.1, seed=1), accuracies(0.9, 0.6), **ACCURACY),
        run(config(lam=0.2), accuracies(0.84, 0.99), **ACCURACY),
        run(config(lam=0.3), accuracies(0.85, 0.5, validation_loss=2.5), **ACCURACY),
        run(config(lam=0.4), accuracies(None, 0.98), **ACCURACY),  # not finite: never the best
    ][::turn]
    (line,) = table1(runs)
    assert line.best.config["algorithm.lam"] == 0.1, "0.85 twice: the lower validation loss"
    assert line.at_best["test_accuracy"].mean == pytest.approx(0.65)
    assert line.lowest["test_accuracy"].mean == 0.99, "the best of the column by itself"
    assert line.lowest["validation_loss"].mean == 2.0
    assert line.highest == {"train_accuracy", "validation_accuracy", "test_accuracy"}


def test_runs_with_other_losses_or_validation_are_not_compared():
    runs = [
        run(config(loss__name="mse"), regression(2.0, 1.0), **MSE),
        run(config(loss__name="huber"), regression(2.0, 1.0), column="test_mae"),
        run(config(loss__name="mse", data__validation=0.2), None, finished=False),
    ]
    lines = table1(runs)
    assert [(line.label, line.column) for line in lines] == [
        ("quad (digits, lenet5, huber, test)", "test_mae"),
        ("quad (digits, lenet5, mse, test)", "test_mse"),
        ("quad (digits, lenet5, mse, validation)", "test_error"),  # nothing is known of it
    ]
    smoothed = config(lam=1.0, loss__options={"label_smoothing": 0.1})
    last = row(1, 1, 1, 1, 1)
    assert len(table1([run(config(), last), run(smoothed, last)])) == 1, "options of one loss"


def test_unfinished_runs_are_judged_by_the_column_of_the_others():
    runs = [
        run(config("tan"), None, finished=False),
        run(config("cubic"), accuracies(0.9, 0.9), finished=False, column="validation_accuracy"),
        run(config(), accuracies(0.8, 0.7), **ACCURACY),
    ]
    assert [(r.name, r.column, "test_accuracy" in r.highest) for r in table1(runs)] == [
        ("quad", "validation_accuracy", True),
        ("cubic", "validation_accuracy", True),
        ("tan", "validation_accuracy", False),  # it has no columns
    ]
