"""Measurements of stationarity in the report: table, verdict, figure, page."""

import io
import json
import sys

import pytest
from matplotlib.image import imread
from rich.console import Console

from consensus.report import __main__ as report
from consensus.report.stationarity import (
    SERIES,
    distance,
    draw_stationarity,
    measured,
    stationarity_cells,
    stationarity_table,
    verdict,
)


def row(t, envelope, gaps, **others):
    """A row as a run writes it; two workers with two layers, |u| = 10."""
    found = {
        "envelope_gradient": envelope,
        "accuracy": 0.003,
        "envelope_gradients": [envelope, envelope],
        "consensus_residual": 0.5 * (envelope or 0.0),
        "worker_residual": [1.0, 2.0],
        "translation_gap": [4.0, 3.0],
        "force": [6.0, 5.0],
        "consensus_gap": gaps,
        "u_norm": 10.0,
    }
    losses = dict.fromkeys(
        ("objective", "train_loss", "train_error", "test_loss", "test_error"), 1.0
    )
    return {"iteration": t, "epoch": t / 10, **losses, "stationarity": found | others}


PULLS = {"envelope_gradients": [0.5, 0.48]}
APART = [row(10, 8.0, [[3.0, 4.0], [0.0, 1.0]]), row(20, 0.04, [[0.3, 0.4], [0.0, 0.1]], **PULLS)]
NEAR = [APART[0], row(20, 0.04, [[3e-3, 4e-3], [0.0, 0.0]], **PULLS)]
ONE = [row(10, 8.0, [[3.0, 4.0], [0.0, 1.0]]), row(20, 0.02, [[3e-3, 4e-3], [0.0, 1e-3]])]


def plain(t):
    return {key: value for key, value in row(t, 1.0, [[1.0]]).items() if key != "stationarity"}


def test_runs_without_measurements_are_left_out():
    runs = {"plain": [plain(1)], "some": [plain(1), APART[0], plain(15), APART[1]]}
    assert measured(runs) == {"some": APART}


def test_the_distance_is_that_of_the_farthest_copy():
    assert [distance(r) for r in APART] == [0.5, 0.05]
    assert [distance(r) for r in ONE] == pytest.approx([0.5, 5e-4])


def test_the_table_has_the_largest_of_the_workers():
    headings, cells = stationarity_cells({"name": APART})
    assert dict(zip(headings, cells, strict=True)) == {
        "run": "name",
        "iteration": "20",
        "|sum grad e f_j (u)|: first": "8",
        "last": "0.04",
        "accuracy": "0.003",
        "(5a)": "0.02",
        "(5b)": "2",
        "(9)": "4",
        "force": "6",
        "|u - z_j| / |u|": "0.05",
    }


def test_a_prox_above_its_tolerance_is_said():
    rough = [row(10, 8.0, [[3.0, 4.0]], converged=False), row(20, 0.04, [[0.3, 0.4]])]
    rough.append(row(30, 0.02, [[0.3, 0.4]], converged=False))
    headings, first, second = stationarity_cells({"rough": rough, "fine": APART})
    assert headings[-1] == "not converged"
    assert (first[-1], second[-1]) == ("2 of 3", "0 of 2")
    assert "from 8 (not converged) to 0.02 (accuracy 0.003, not converged)" in verdict(rough)
    assert "from 8 (not converged) to 0.04 (accuracy 0.003)" in verdict(rough[:2])
    assert "not converged" not in verdict(rough[1:2])
    console = Console(width=80, file=io.StringIO())
    console.print(stationarity_table({"rough": rough}))
    assert "2 of 3" in console.file.getvalue()


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (ONE, "u = z_j: |u - z_j| is up to 5.0e-04 of |u|, and all f_j pull u the same way; "),
        (
            ONE[:1],
            "u is not z_j yet: |u - z_j| is up to 5.0e-01 of |u|, but all f_j pull u the same way"
            "; ",
        ),
        (
            APART,
            "u is not z_j: |u - z_j| is up to 5.0e-02 of |u|, since the f_j pull u apart: "
            "|grad e f_j (u)| is up to 0.5; ",
        ),
        (  # a stiff coupling holds together what is pulled apart
            NEAR,
            "u is not z_j: |u - z_j| is up to 5.0e-04 of |u|, since the f_j pull u apart: "
            "|grad e f_j (u)| is up to 0.5; ",
        ),
    ],
    ids=["one", "not yet", "apart", "near"],
)
def test_the_verdict(rows, said):
    last = rows[-1]["stationarity"]["envelope_gradient"]
    change = f"from 8 to {last:g}" if len(rows) > 1 else "is 8"
    assert verdict(rows) == f"{said}|sum grad e f_j (u)| {change} (accuracy 0.003)"


@pytest.mark.parametrize(
    ("first", "last", "accuracy", "said"),
    [
        (2.11, 2.04, 0.2, "has not changed by more than its accuracy: 2 (accuracy 0.2)"),
        (
            2.04,
            2.35,
            0.2,
            "has not changed by more than its accuracy: 2.4 (accuracy 0.2)",
        ),  # of both
        (2.04, 1.96, 0.01, "from 2.04 to 1.96 (accuracy 0.01)"),  # two digits would show 2 and 2
        (2.0, 1.5, 0.2, "from 2 to 1.5 (accuracy 0.2)"),
        (99.0, 28.0, 19.0, "from 99 to 28 (accuracy 20)"),
    ],
)
def test_numbers_that_cannot_be_told_apart_are_no_change(first, last, accuracy, said):
    rows = [row(10, first, [[0.0]], accuracy=accuracy), row(20, last, [[0.0]], accuracy=accuracy)]
    assert verdict(rows).endswith(f"|sum grad e f_j (u)| {said}")


def test_numbers_that_overflowed_are_null_in_the_file_and_no_failure():
    """JSON has no inf."""
    bad = row(30, None, [[0.0, 1.0], [None, 1.0]], worker_residual=[1.0, None], u_norm=0.0)
    assert verdict([*APART, bad]).startswith("whether u = z_j is not known")
    assert stationarity_cells({"name": [bad]})[1].count("nan") == 4  # an envelope gradient twice


def test_the_figure_has_a_panel_for_each_series(tmp_path):
    draw_stationarity({"a": APART, "b": ONE}, tmp_path / "x.png")
    assert imread(tmp_path / "x.png").shape[1] == 1100, "5.5 inches at 200 dots"
    assert len(SERIES) == 6
    draw_stationarity({"a": [row(1, 0.0, [[0.0]])]}, tmp_path / "zeros.png")


def test_the_figure_shows_the_measurements(drawn, tmp_path):
    draw_stationarity({"apart": APART, "near": NEAR}, tmp_path / "f.png")
    first, *_, last = drawn[0].axes
    assert [line.get_ydata().tolist() for line in last.lines] == [[0.5, 0.05], [0.5, 5e-4]]
    ends = [segment[:, 1].tolist() for segment in first.collections[0].get_segments()]
    assert ends == [pytest.approx([7.997, 8.003]), pytest.approx([0.037, 0.043])]
    assert first.get_title(loc="left") == r"$|\Sigma_j \nabla e f_j(u)|$"
    assert last.get_xlabel() == "iteration"
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["apart", "near"]


def test_one_measurement_is_a_point_for_each_number(drawn, tmp_path):
    draw_stationarity({"a": APART[:1], "b": ONE[1:]}, tmp_path / "f.png")
    (axis,) = drawn[0].axes
    points = [line.get_xdata().tolist() for line in axis.lines if len(line.get_xdata()) == 6]
    # (5a) is half the envelope gradient, the others as `row` has them
    assert points == [[8.0, 4.0, 2.0, 4.0, 6.0, 0.5], pytest.approx([0.02, 0.01, 2, 4, 6, 5e-4])]
    assert axis.get_yticklabels()[5].get_text() == r"$\mathrm{max}_j\, |u - z_j|\,/\,|u|$"
    assert axis.get_xlabel() == "the only measurement"


def test_of_many_runs_three_are_named(drawn, tmp_path):
    runs = {f"run{n}": [row(10, 9.0, [[1.0]]), row(20, float(n), [[1.0]])] for n in range(1, 10)}
    draw_stationarity(runs, tmp_path / "f.png")
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["run1", "run5", "run9"]
    assert len(drawn[0].axes[1].lines) == 9 + 3
    draw_stationarity({name: rows[:1] for name, rows in runs.items()}, tmp_path / "f.png")
    assert len(drawn[1].axes) == 1


@pytest.fixture
def folder(tmp_path):
    """Three runs: two that measured and one that did not."""
    for name, rows in {"full": ONE, "skew": APART, "none": [plain(20)]}.items():
        path = tmp_path / name
        path.mkdir()
        (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        (path / "summary.json").write_text(json.dumps(rows[-1]))
        (path / "config.yaml").write_text(
            f"potential: {{name: quad}}\ndata: {{name: digits, partition: {name}}}\n"
            "model: {name: lenet5}\nalgorithm: {name: consensus}\n"
        )
    return tmp_path


@pytest.mark.usefixtures("blank_figures")
def test_the_command_and_the_page_contain_the_verdict(folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["consensus.report", str(folder)])
    report.main()
    said = capsys.readouterr().out
    assert f"full: {verdict(ONE)}" in said
    assert f"skew: {verdict(APART)}" in said
    assert "none:" not in said
    page = (folder / "report" / "report.md").read_text()
    assert "## Stationarity" in page
    assert f"- `full`: {verdict(ONE)}" in page
    assert "\\|sum grad e f_j (u)\\|: first" in page  # a bar would end the cell
    assert (folder / "report" / "stationarity.png").exists()
    assert (folder / "report_stationarity.png").exists()
    table = (folder / "report" / "runs.csv").read_text().splitlines()
    assert "stationarity.envelope_gradient" in table[0].split(",")
    assert all(line.count(",") == table[0].count(",") for line in table)


def test_without_measurements_nothing_is_printed(folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["consensus.report", str(folder / "none")])
    report.main()
    assert "stationarity" not in capsys.readouterr().out
    assert not (folder / "none" / "report_stationarity.png").exists()
