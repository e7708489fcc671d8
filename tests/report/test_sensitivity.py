"""The sensitivity to hyperparameters, against means by hand, and its figures."""

import math

import numpy as np
import pytest

from consensus.report.sensitivity import (
    draw_lam_and_eta,
    draw_sensitivities,
    draw_sensitivity,
    sensitivity,
    varying_numbers,
)
from consensus.report.style import STYLES
from consensus.report.table1 import table1
from tests.testing.made_runs import ACCURACY, accuracies, config, row, run

LAM, ETA, SIGMA = "algorithm.lam", "potential.eta", "algorithm.sigma"


def at(lam, eta, sigma, error, finished=True, potential="quad", **others):
    steps = {"algorithm__sigma": sigma, "algorithm__tau": sigma}
    nested = config(potential, lam, potential__eta=eta, **steps, **others)
    return run(nested, row(1, 1, 1, 1, error), finished)


RUNS = [
    at(0.2, 1.0, 1, 3.0),
    at(0.1, 1.0, 1, 2.0),
    at(0.1, 1.0, 2, 1.0, seed=0),
    at(0.1, 1.0, 2, 2.0, seed=1),
    at(0.1, 1.0, 3, 0.0, finished=False),
    at(0.1, 0.5, 1, 0.0, finished=False),
    at(math.inf, 0.5, 1, 9.0),
]


def means(line):
    return {value: mean and (mean.mean, mean.std) for value, mean in line.items()}


@pytest.mark.parametrize("turn", [1, -1])
def test_sensitivity_takes_the_best_over_the_rest(turn):
    # 1 and 2 over two seeds: mean 1.5, std 1 / sqrt 2
    best = pytest.approx((1.5, 0.5**0.5))
    (line,) = table1(RUNS[::turn])
    assert means(sensitivity(line, LAM)) == {0.1: best, 0.2: (3.0, None)}
    assert means(sensitivity(line, ETA)) == {0.5: None, 1.0: best}
    assert means(sensitivity(line, LAM, {ETA: 0.5})) == {0.1: None}
    assert means(sensitivity(line, SIGMA)) == {1.0: (2.0, None), 2.0: best, 3.0: None}


def test_the_highest_accuracy_is_the_best():
    runs = [
        run(config(lam=lam, algorithm__sigma=s), accuracies(value, 0.5), **ACCURACY)
        for lam, s, value in ((0.1, 1, 0.85), (0.1, 2, 0.8), (0.2, 1, 0.84), (0.3, 1, None))
    ]
    (line,) = table1(runs)
    assert means(sensitivity(line, LAM)) == {0.1: (0.85, None), 0.2: (0.84, None), 0.3: None}


def test_every_number_that_varies_counts_once():
    """tau follows sigma; a flag, and a key of one number in each record, do not count."""
    records = table1([*RUNS, at(0.7, 1.0, 1, 1.0, potential="tan", cuda_graph=True)])
    assert varying_numbers(records) == {ETA: [], LAM: [], SIGMA: ["algorithm.tau"]}
    runs = [run(config(lam=lam), row(1, 1, 1, 1, 1)) for lam in (0.1, math.inf)]
    assert varying_numbers(table1(runs)) == {}, "uncoupled workers have no lam"
    runs = [run(config(lam=lam, algorithm__name="msgd"), row(1, 1, 1, 1, 1)) for lam in (0.1, 0.2)]
    assert varying_numbers(table1(runs)) == {}, "nor has momentum SGD"


def points(axis):
    """The numbers of lines, and the places of crosses."""
    lines = [x.get_xydata().tolist() for x in axis.lines if x.get_linestyle() != "None"]
    crosses = [x.get_xdata().tolist() for x in axis.lines if x.get_marker() == "x"]
    return lines, [places for places in crosses if places]


def test_a_panel_for_each_number_with_bars_and_crosses(drawn, tmp_path):
    others = [at(0.1, 2.0, 1, 4.0, potential="tan"), at(0.2, 2.0, 1, 5.0, potential="tan")]
    records = table1([*RUNS, *others])
    draw_sensitivity(records, varying_numbers(records), tmp_path / "s.png")
    of_eta, of_lam, of_sigma = drawn[0].axes
    labels = [axis.get_xlabel() for axis in drawn[0].axes]
    assert labels == [ETA, LAM, f"{SIGMA} = algorithm.tau"]
    assert of_eta.get_ylabel() == "test error (%)"
    assert points(of_lam) == ([[[0.1, 1.5], [0.2, 3.0]], [[0.1, 4.0], [0.2, 5.0]]], [])
    assert points(of_sigma) == ([[[1.0, 2.0], [2.0, 1.5]]], [[3.0]])
    assert points(of_eta) == ([[[1.0, 1.5]]], [[0.5]])
    first = of_lam.collections[0].get_segments()[0]
    np.testing.assert_allclose(first, [[0.1, 1.5 - 0.5**0.5], [0.1, 1.5 + 0.5**0.5]])
    assert of_lam.lines[0].get_color() == STYLES["quad"]["color"]
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["quad", "tan"]


def test_lam_has_a_line_for_each_eta(drawn, tmp_path):
    records = table1(RUNS)
    draw_lam_and_eta(records, tmp_path / "s.png")
    (axis,) = drawn[0].axes
    assert points(axis) == ([[[0.1, 1.5], [0.2, 3.0]]], [[0.1]])
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["η = 0.5", "η = 1"]
    found = draw_sensitivities(records, tmp_path)
    assert list(found) == ["sensitivity.png", "lam_eta.png"]
    assert len(drawn) == 3


def test_figures_of_numbers_that_cannot_be_scaled(tmp_path):
    runs = [at(lam, eta, 1, error) for lam, eta, error in ((1, 1, 0.0), (2, 2, 50.0), (0.5, 1, -1))]
    assert draw_sensitivities(table1(runs), tmp_path).keys() == {"sensitivity.png", "lam_eta.png"}
    none = [at(lam, 1.0, 1, 1.0, finished=False) for lam in (0.1, 0.2)]
    draw_sensitivities(table1(none), tmp_path)
    many = [at(lam, 1.0, 1, 1.0, data__name=name) for lam in (0.1, 0.2) for name in "abcde"]
    draw_sensitivities(table1(many), tmp_path)
    assert (tmp_path / "sensitivity.pdf").read_bytes().startswith(b"%PDF")
