"""Figures, by the numbers drawn and by pixels."""

import os
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.image import imread

from consensus.report.convergence import MOST_CURVES, draw_convergence, draw_run
from consensus.report.curves import Curve, mean_and_spread
from consensus.report.figure1 import draw_figure1, draw_methods, figure1_groups
from consensus.report.style import STYLES, styles
from consensus.report.table1 import table1
from tests.testing import ROOT
from tests.testing.made_runs import (
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

KEYS = ("objective", "train_loss", "train_error", "test_error")


def lines_of(axis):
    """The numbers of the lines with markers: those of curves."""
    return [line.get_xydata().tolist() for line in axis.lines if line.get_marker() != "None"]


def texts_of(figure):
    (legend,) = figure.legends
    return [text.get_text() for text in legend.get_texts()]


def test_the_lines_of_a_figure_are_the_rows(drawn, tmp_path):
    rows = {"a": [row_at(10), row_at(20)], "b": [row_at(10, test_error=7.0), row_at(30)]}
    draw_convergence(rows, tmp_path / "f.png")
    (figure,) = drawn
    for axis, key in zip(figure.axes, KEYS, strict=True):
        expected = [[[r["iteration"], r[key]] for r in of_run] for of_run in rows.values()]
        assert lines_of(axis) == expected, key
        assert axis.get_xlim()[0] == 0.0
    assert texts_of(figure) == ["a", "b"]
    assert figure.get_figwidth() == 5.5
    labels = [(axis.get_xlabel(), axis.get_ylabel()) for axis in figure.axes]
    assert labels == [
        ("iteration", "objective (sum)"),
        ("iteration", "train loss (sum)"),
        ("iteration", "train error (%)"),
        ("iteration", "test error (%)"),
    ]


def test_the_picture_of_a_run_tells_train_from_test_and_marks_events(drawn, tmp_path):
    rows = [
        row_at(10, cuts_u=0, cuts_z=2),
        row_at(20, cuts_u=0, cuts_z=2),
        row_at(30, cuts_u=1, cuts_z=5),
    ]
    draw_run(rows, tmp_path / "f.png", "name_$x", checkpoints=[15, 30])
    (figure,) = drawn
    loss, error = figure.axes
    at = {}
    for axis, keys in ((loss, KEYS[:2]), (error, KEYS[2:])):
        curves = lines_of(axis)
        assert curves[:2] == [[[r["iteration"], r[key]] for r in rows] for key in keys]
        at[axis] = [[x for x, _ in line] for line in curves[2:]]
        assert at[axis] == [[30], [10, 30], [15, 30]], "cuts of u, cuts of z, checkpoints"
    assert error.get_ylabel() == "error (%)"
    assert texts_of(figure) == [
        "objective", "train", "test", "cuts of the step of u", "cuts of steps of z", "checkpoint",
    ]  # fmt: skip
    train, test = error.lines[:2]
    assert train.get_color() != test.get_color()
    assert train.get_linestyle() != test.get_linestyle()
    assert train.get_color() == loss.lines[1].get_color(), "train in both panels"
    assert figure.get_suptitle() == "name_$x"


def test_a_run_without_cuts_and_checkpoints_has_no_marks(drawn, tmp_path):
    draw_run([accuracies(0.5, 0.25)], tmp_path / "f.png")
    assert texts_of(drawn[0]) == ["objective", "train", "validation", "test"]
    assert lines_of(drawn[0].axes[1]) == [[[100, 0.99]], [[100, 0.5]], [[100, 0.25]]]
    assert drawn[0].axes[1].get_ylabel() == "accuracy (mean)"


ODD = {
    "one point": [row_at(10)],
    "a gap": [row_at(10), row_at(20, objective=None, train_loss=None), row_at(30)],
    "nothing": [row_at(10, objective=None, train_loss=None)],
    "inf": [row_at(10, objective=float("inf"), train_loss=float("nan"))],
    "zeros": [row_at(t, objective=0.0, train_loss=0.0) for t in (10, 20)],
    "negative": [row_at(10, objective=-1.0, train_loss=-1.0)],
}


@pytest.mark.parametrize("rows", ODD.values(), ids=ODD)
def test_a_picture_accepts_gaps_zeros_and_negative_numbers(tmp_path, rows):
    path = tmp_path / "figure.png"
    draw_run(rows, path)
    assert imread(path).shape[1] == 1100
    assert path.with_suffix(".pdf").read_bytes().startswith(b"%PDF")


def test_a_picture_of_runs_accepts_them_too(tmp_path):
    draw_convergence({f"run {n}": rows for n, rows in enumerate(ODD.values())}, tmp_path / "f.png")
    assert imread(tmp_path / "f.png").shape[1] > 1000


def test_zero_stands_at_the_end_of_its_axis(drawn, tmp_path):
    zeros = [row_at(t, train_error=0.0, test_error=3.0) for t in (10, 20)]
    draw_convergence({"a": zeros, "b": zeros}, tmp_path / "f.png")
    assert drawn[0].axes[2].get_ylim() == (0.0, 1.0), "not -0.04 to 0.04"


def test_a_diverged_run_leaves_the_axes_to_the_others(drawn, tmp_path):
    # the evaluation before the last is not marked, and as wild
    wild = [row_at(10), row_at(15, objective=1e12), row_at(20, train_loss=5e21, diverged=True)]
    older = [row_at(10), row_at(20, objective=5e21, train_loss=5e21)]
    good = [row_at(10), row_at(20)]
    draw_convergence({"good": good, "wild": wild, "older": older}, tmp_path / "f.png")
    for axis, key in zip(drawn[0].axes, KEYS, strict=True):
        assert row_at(10)[key] < axis.get_ylim()[1] < 2 * row_at(10)[key]
    assert drawn[0].get_suptitle() == "2 diverged (cut off at the range of the others)"
    draw_convergence({"wild": wild, "older": older}, tmp_path / "f.png")  # nothing else to show


def test_many_runs_have_representatives(drawn, tmp_path):
    """The least, median and largest objective without configs; the best of each name with them."""
    bare = {f"run{n}": [row_at(10), row_at(20, objective=float(n))] for n in range(1, 12)}
    bare["wild"] = [row_at(10), row_at(20, objective=5e21)]
    draw_convergence(bare, tmp_path / "f.png")
    assert len(bare) > MOST_CURVES
    assert texts_of(drawn[-1]) == ["run1", "run6", "run11"]
    assert drawn[-1].get_suptitle() == "12 runs (thin), 1 diverged (not shown)"
    assert len(drawn[-1].axes[0].lines) == 11 + 3

    last = row(1, 1, 1, 1, 1)
    runs = [
        run(config(name, lam=lam, seed=seed), last | {"test_error": lam + seed}, label=f"{n}{seed}")
        for n, (name, lam) in enumerate((p, 0.1 * i) for p in ("quad", "tan") for i in range(1, 6))
        for seed in (0, 1)
    ]
    draw_convergence({r.label: r.rows for r in runs}, tmp_path / "f.png", runs)
    assert texts_of(drawn[-1]) == ["quad", "tan"]
    # test errors 0.1 and 1.1 over two seeds: 0.6
    heights = [y for line in lines_of(drawn[-1].axes[3]) for _, y in line]
    np.testing.assert_allclose(heights, [0.6, 0.6])
    colours = [line.get_color() for line in drawn[-1].axes[3].lines[-2:]]
    assert colours == [STYLES["quad"]["color"], STYLES["tan"]["color"]]


def test_seeds_of_one_configuration_are_one_curve(drawn, tmp_path):
    last = row(1, 1, 1, 1, 1)
    runs = [
        run(config(lam=lam, seed=s), last | {"test_error": 1.0 + s}, label=f"lam={lam},seed={s}")
        for lam in (0.1, 0.2)
        for s in (0, 1)
    ]
    draw_convergence({r.label: r.rows for r in runs}, tmp_path / "f.png", runs)
    assert texts_of(drawn[0]) == ["lam=0.1 (2 seeds)", "lam=0.2 (2 seeds)"]
    assert lines_of(drawn[0].axes[3]) == [[[100, 1.5]], [[100, 1.5]]]
    assert len({line.get_color() for line in drawn[0].axes[3].lines}) == 2


def test_the_panels_are_those_of_the_problem(drawn, tmp_path):
    """A panel for each set; a run without a column has no line there."""
    draw_convergence({"a": [row_at(10)], "b": [regression(2.0, 1.0)]}, tmp_path / "f.png")
    labels = [axis.get_ylabel() for axis in drawn[0].axes]
    assert labels[2:] == [
        "train error (%)",
        "test error (%)",
        "train mse (mean)",
        "test mse (mean)",
    ]
    ends = [line.get_ydata().tolist() for line in drawn[0].axes[5].lines]
    np.testing.assert_equal(ends, [[np.nan], [2.0]])


def test_long_names_leave_room_for_the_panels(tmp_path):
    # a legend larger than the figure is a warning of matplotlib, and an error here
    runs = {f"{n:0100}": [row_at(10 + n)] for n in range(MOST_CURVES)}
    draw_convergence(runs, tmp_path / "f.png")
    assert pixels_of(tmp_path / "f.png", BLUE) > 50


def test_curve_is_the_mean_and_band_at_common_iterations():
    def seed(values):
        return [row(v, 1, 1, 1, 1, t=t) for t, v in values.items()]

    seeds = [seed({100: 1.0, 150: 9.0, 200: 2.0}), seed({100: 4.0, 200: None, 300: 1.0})]
    x, mean, std = mean_and_spread(seeds, "epoch", "objective")
    assert x.tolist() == [1.0, 2.0]
    # 1 and 4: mean 2.5, deviations 1.5, squares 2.25 + 2.25 = 4.5, over 1
    np.testing.assert_allclose(mean, [2.5, np.nan])
    np.testing.assert_allclose(std, [4.5**0.5, np.nan])
    x, mean, std = mean_and_spread(seeds[:1], "iteration", "objective")
    assert (x.tolist(), mean.tolist(), std) == ([100.0, 150.0, 200.0], [1.0, 9.0, 2.0], None)


def test_figure1_shows_every_curve_and_the_band(tmp_path):
    def seed(scale):
        return [row(*[scale * 100.0 / t] * 5, t=t) for t in (10, 20, 30)]

    def curve(name, *seeds):
        return Curve(name, seeds, styles([name])[name])

    png = tmp_path / "f.png"
    draw_figure1([curve("quad", seed(1.0))], png)
    assert pixels_of(png, BLUE) > 500
    assert pixels_of(png, ORANGE) == 0
    assert pixels_of(png, BLUE_BAND) < 500, "the edges of the line at most"
    draw_figure1([curve("quad", seed(1.0), seed(1.6)), curve("cubic", seed(2.0))], png)
    assert min(pixels_of(png, colour) for colour in (BLUE, ORANGE)) > 500
    assert pixels_of(png, BLUE_BAND) > 5_000
    # what a run may hold: zeros, gaps, one point, a name like a formula, a band to below 0
    odd = [curve("_$x", [row(0.0, None, 1, 1, 1)]), curve("tan", seed(1.0), seed(100.0), seed(0.0))]
    draw_figure1(odd, png)


def test_methods_are_drawn_per_epoch_and_per_second(drawn, tmp_path):
    rows = [row_at(t, wall_s=2.0 * t) for t in (100, 200)]
    draw_methods([Curve("DDP", [rows], STYLES["DDP"])], tmp_path / "f.png")
    found = [lines_of(axis)[0] for axis in drawn[0].axes]
    assert found == [
        [[1.0, 8.0], [2.0, 4.0]],
        [[200.0, 8.0], [400.0, 4.0]],
        [[1.0, 0.6], [2.0, 0.3]],
        [[200.0, 0.6], [400.0, 0.3]],
    ]
    labels = [axis.get_xlabel() for axis in drawn[0].axes[2:]]
    assert labels == ["epochs of a worker", "wall time (s)"]


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
from consensus.report.convergence import draw_run
row = dict.fromkeys(["objective", "train_loss", "train_error", "test_error"], 1.0)
draw_run([row | {"iteration": 1}], __import__("pathlib").Path("figure.png"))
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
