"""Figures, by the pixels and the numbers drawn."""

import os
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from consensus.report.convergence import draw_convergence
from consensus.report.figure1 import curve, draw_figure1, figure1_groups
from consensus.report.sensitivity import draw_sensitivity
from consensus.report.style import line_style
from consensus.report.table1 import table1
from tests.testing import ROOT
from tests.testing.made_runs import (
    BLACK,
    BLUE,
    BLUE_BAND,
    ORANGE,
    accuracies,
    config,
    pixels_of,
    regression,
    row,
    row_at,
    run,
)


def test_draw_shows_every_run(tmp_path):
    path = tmp_path / "figure.png"
    one = {"one": [row_at(t) for t in (10, 20, 30)]}
    draw_convergence(one, path)
    assert pixels_of(path, BLUE) > 500
    assert pixels_of(path, ORANGE) == 0
    draw_convergence(one | {"two": [row_at(t, objective=5.0 * t) for t in (10, 20, 30)]}, path)
    assert pixels_of(path, BLUE) > 500
    assert pixels_of(path, ORANGE) > 500
    height, width = imread(path).shape[:2]
    assert (width, height) == (1500, 1050)


@pytest.mark.parametrize(
    "rows",
    [
        [row_at(10)],
        [row_at(10), row_at(20, objective=None, train_loss=None), row_at(30)],
        [row_at(10, objective=None, train_loss=None)],
        [row_at(10, objective=float("inf"), train_loss=float("nan"))],
        [row_at(10, objective=0.0, train_loss=0.0), row_at(20, objective=0.0, train_loss=0.0)],
        [row_at(10, objective=-1.0, train_loss=-1.0)],
    ],
    ids=["one point", "a gap", "nothing", "inf", "zeros", "negative"],
)
def test_draw_accepts_gaps_zeros_and_negative_numbers(tmp_path, rows):
    draw_convergence({"a": rows}, tmp_path / "figure.png")
    assert pixels_of(tmp_path / "figure.png", BLUE) > 50  # the errors are always there


def test_a_diverged_run_leaves_the_axes_to_the_others(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    wild = [row_at(10), row_at(20, objective=5e21, train_loss=5e21, diverged=True)]
    older = [row_at(10), row_at(20, objective=5e21, train_loss=5e21)]
    draw_convergence({"good": [row_at(10), row_at(20)], "wild": wild, "older": older}, tmp_path)
    tops = [axis.get_ylim()[1] for axis in drawn[0].axes]
    largest = [row_at(10)[key] for key in ("objective", "train_loss", "train_error", "test_error")]
    assert all(top < 2 * most for top, most in zip(tops, largest, strict=True))


def test_the_panels_are_those_of_the_problem(tmp_path, monkeypatch):
    """Units, axes and one panel for each set; a run without a column has no line there."""
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))

    def titles():
        return [axis.get_title() for axis in drawn[-1].axes]

    sets = ["train accuracy", "validation accuracy", "test accuracy"]
    draw_convergence({"a": [accuracies(0.5, 0.5)]}, tmp_path)
    assert titles() == ["objective", "train loss (sum)", *sets]
    lowest = [axis.get_xlabel() for axis in drawn[-1].axes]
    assert lowest == ["", "", "iteration", "iteration", "iteration"], "the third has none below"
    assert [axis.get_yscale() for axis in drawn[-1].axes] == ["log", "log", *3 * ["linear"]]
    (line,) = drawn[-1].axes[3].lines
    assert line.get_ydata().tolist() == [0.5]

    draw_convergence({"a": [row_at(10)], "b": [regression(2.0, 1.0)]}, tmp_path)
    errors = ["train error (%)", "test error (%)", "train mse", "test mse"]
    assert titles() == ["objective", "train loss (sum)", *errors]
    ends = [line.get_ydata().tolist() for line in drawn[-1].axes[5].lines]
    np.testing.assert_equal(ends, [[np.nan], [2.0]])

    draw_figure1({"quad": [[regression(2.0, 1.0, t=t) for t in (10, 20)]]}, [tmp_path])
    assert titles()[:4] == ["objective", "train loss (sum)", "train mse", "test mse"]
    draw_sensitivity({"quad": {1.0: {0.1: -1.0, 1.0: 50.0}}}, [tmp_path], "test_r2")
    (axis,) = drawn[-1].axes
    assert (axis.get_ylabel(), axis.get_yscale()) == ("test r2", "linear")


def test_many_runs_leave_room_for_their_lines(tmp_path):
    # a legend of them all would be larger than the figure, which matplotlib warns of
    draw_convergence({f"{n:0100}": [row_at(10 + n)] for n in range(65)}, tmp_path / "figure.png")
    assert pixels_of(tmp_path / "figure.png", BLUE) > 50


def test_curve_is_the_mean_and_band_at_common_iterations():
    def seed(values):
        return [row(v, 1, 1, 1, 1, t=t) for t, v in values.items()]

    seeds = [seed({100: 1.0, 150: 9.0, 200: 2.0}), seed({100: 4.0, 200: None, 300: 1.0})]
    x, mean, std = curve(seeds, "epoch", "objective")
    assert x.tolist() == [1.0, 2.0]
    # 1 and 4: mean 2.5, deviations 1.5, squares 2.25 + 2.25 = 4.5, over 1
    np.testing.assert_allclose(mean, [2.5, np.nan])
    np.testing.assert_allclose(std, [4.5**0.5, np.nan])
    x, mean, std = curve(seeds[:1], "iteration", "objective")
    assert (x.tolist(), mean.tolist(), std) == ([100.0, 150.0, 200.0], [1.0, 9.0, 2.0], None)


def test_figure1_shows_every_curve_and_the_band(tmp_path):
    def seed(scale):
        return [row(*[scale * 100.0 / t] * 5, t=t) for t in (10, 20, 30)]

    png, pdf = tmp_path / "f.png", tmp_path / "f.pdf"
    draw_figure1({"quad": [seed(1.0)]}, [png])
    assert pixels_of(png, BLUE) > 1000
    assert pixels_of(png, ORANGE) == 0
    assert pixels_of(png, BLUE_BAND) < 1000, "the edges of the line at most"
    black = pixels_of(png, BLACK)
    draw_figure1(
        {"quad": [seed(1.0), seed(1.6)], "cubic": [seed(2.0)], "mSGD": [seed(4.0)]}, [png, pdf]
    )
    assert min(pixels_of(png, colour) for colour in (BLUE, ORANGE)) > 1000
    assert pixels_of(png, BLUE_BAND) > 10_000
    assert pixels_of(png, BLACK) > black + 1000
    assert pdf.read_bytes().startswith(b"%PDF")
    # what a run may hold: zeros, gaps, one point, a name like a formula, a band to below 0
    odd = {"_$x": [[row(0.0, None, 1, 1, 1)]], "tan": [seed(1.0), seed(100.0), seed(0.0)]}
    draw_figure1(odd, [png])


def test_a_potential_has_one_colour_everywhere():
    assert line_style("tan", 0) == line_style("tan", 5) == {"color": "C2", "linestyle": "-"}
    styles = {tuple(line_style(name, n).values()) for n, name in enumerate("abcdefgh")}
    assert len(styles) == 8
    assert not {f"C{i}" for i in range(6)} & {colour for colour, _ in styles}


def test_sensitivity_has_lines_and_crosses(tmp_path):
    path = tmp_path / "s.png"
    draw_sensitivity({"quad": {0.5: {0.1: 1.0, 0.2: 2.0}}}, [path])
    assert pixels_of(path, BLUE) > 500
    assert pixels_of(path, ORANGE) == 0
    crosses = {"quad": {0.5: {0.1: 1.0, 0.2: 2.0}, 1.0: {0.1: None, 0.2: None}}}
    draw_sensitivity(crosses, [path])
    with_two = pixels_of(path, ORANGE)
    crosses["quad"][1.0].popitem()
    draw_sensitivity(crosses, [path])
    assert 0 < pixels_of(path, ORANGE) < with_two
    draw_sensitivity({str(n): {1.0: {0.1: None}} for n in range(4)}, [path])
    draw_sensitivity({"quad": {1.0: {0.1: 0.0, 1.0: 50.0}}}, [path])


def test_figure1_for_each_number_of_workers():
    last = row(1, 1, 1, 1, 1.0)
    runs = [run(config(workers=m, lam=lam), last | {"test_error": e}) for m, lam, e in
            [(4, 0.1, 2.0), (4, 0.2, 1.0), (8, 0.1, 0.5)]]  # fmt: skip
    runs += [run(config("tan", workers=4), None, finished=False)]
    runs += [run(config(workers=1, algorithm__name="msgd"), last)]
    groups = figure1_groups(table1(runs))
    assert [(suffix, what, list(best)) for suffix, what, best in groups] == [
        ("_M4", ", M = 4", ["quad", "mSGD"]),
        ("_M8", ", M = 8", ["quad", "mSGD"]),
    ]
    assert groups[0][2]["quad"].config["algorithm.lam"] == 0.2
    (single,) = figure1_groups(table1([runs[0], runs[-1]]))
    assert single[:2] == ("", "")
    (alone,) = figure1_groups(table1(runs[-1:]))
    assert list(alone[2]) == ["mSGD"]
    other = run(config(workers=4, data__name="a/b"), last)
    suffixes = [g[0] for g in figure1_groups(table1([*runs, other]))]
    assert suffixes == ["_a-b_lenet5", "_digits_lenet5_M4", "_digits_lenet5_M8"]
    assert figure1_groups(table1([runs[3]])) == []


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "nonsense", ""])
def test_the_backend_of_a_notebook_is_left_alone(tmp_path, backend):
    program = """
import os
from consensus.report.convergence import draw_convergence
row = dict.fromkeys(["objective", "train_loss", "train_error", "test_error"], 1.0)
draw_convergence({"run": [row | {"iteration": 1}]}, __import__("pathlib").Path("figure.png"))
print(os.environ["MPLBACKEND"])
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=os.environ | {"MPLBACKEND": backend, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, f"{backend}\n"), done.stderr
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
