"""Figures and tables from metrics files that are written here, by hand."""

import io
import json
import re
import sys

import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console

from consensus.records import read_rows
from consensus.report import __main__ as report
from consensus.report.runs import comparison_table, draw, find_runs


def row(t, **others):
    """An evaluation of a made-up run."""
    numbers = {
        "iteration": t,
        "epoch": t / 100,
        "objective": 900.0 / t,
        "train_loss": 800.0 / t,
        "train_error": 50.0 / t,
        "test_loss": 200.0 / t,
        "test_error": 60.0 / t,
    }
    return numbers | others


@pytest.fixture
def write_run(tmp_path):
    """`write_run("name", rows)`: a run directory below tmp_path/runs."""

    def write(name, rows):
        run_dir = tmp_path / "runs" / name
        run_dir.mkdir(parents=True)
        text = "".join(json.dumps(r) + "\n" for r in rows)
        (run_dir / "metrics.jsonl").write_text(text, encoding="utf-8")
        return run_dir

    return write


# ---- reading


def test_read_rows(write_run):
    rows = [row(10, objective=None, extra=[1, 2]), row(20)]
    assert read_rows(write_run("a", rows)) == rows


def test_nothing_to_read(tmp_path, write_run):
    with pytest.raises(ValueError, match="no readable metrics") as caught:
        read_rows(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path} holds no readable metrics.jsonl (No such file or directory)"
    )
    run_dir = write_run("empty", [])
    with pytest.raises(ValueError, match="holds no evaluation yet") as caught:
        read_rows(run_dir)
    assert str(caught.value) == f"{run_dir}/metrics.jsonl holds no evaluation yet"


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (b'{"iteration": 20, "epo\n', "line 2 is not JSON: "),
        (b"\n", "line 2 is not JSON: "),
        (b'{"iteration": 20, "epoch": 1, "objective": 3, "train_loss": 1, "train_error": 1}\n',
         "line 2 lacks test_loss, test_error"),
        (b"[1, 2]\n", "line 2 lacks iteration, epoch, objective, train_loss, train_error"),
        (b"3\n", "line 2 lacks iteration, "),
        (b"\xff\xfe\n", "line 2 is not JSON: "),
    ],
)  # fmt: skip
def test_a_damaged_line_is_named(write_run, damage, complaint):
    run_dir = write_run("a", [row(10)])
    with (run_dir / "metrics.jsonl").open("ab") as file:
        file.write(damage)
    with pytest.raises(ValueError, match="line 2") as caught:
        read_rows(run_dir)
    assert str(caught.value).startswith(f"{run_dir}/metrics.jsonl, {complaint}")
    assert "\n" not in str(caught.value)


def test_find_runs(tmp_path, write_run):
    b, a = write_run("b", [row(10)]), write_run("a", [row(10)])
    (tmp_path / "runs" / "no-run").mkdir()
    parent = tmp_path / "runs"
    assert find_runs([b]) == [b]
    assert find_runs([parent]) == [a, b]
    assert find_runs([b, parent, b]) == [b, a], "each once, in the order of the arguments"
    for wrong in (parent / "no-run", tmp_path / "absent"):
        with pytest.raises(ValueError, match="is no run directory and holds none"):
            find_runs([a, wrong])


# ---- drawing


def pixels_of(path, colour):
    """How many pixels of a picture have a colour."""
    pixels = (imread(path)[..., :3] * 255).round().astype(np.uint8)
    return int((pixels == np.array(colour, dtype=np.uint8)).all(-1).sum())


BLUE, ORANGE = (0x1F, 0x77, 0xB4), (0xFF, 0x7F, 0x0E)  # the first two lines of matplotlib


def test_draw_shows_every_run(tmp_path):
    path = tmp_path / "figure.png"
    one = {"one": [row(t) for t in (10, 20, 30)]}
    draw(one, path)
    assert pixels_of(path, BLUE) > 500
    assert pixels_of(path, ORANGE) == 0
    draw(one | {"two": [row(t, objective=5.0 * t) for t in (10, 20, 30)]}, path)
    assert pixels_of(path, BLUE) > 500
    assert pixels_of(path, ORANGE) > 500
    height, width = imread(path).shape[:2]
    assert (width, height) == (1500, 1050)


@pytest.mark.parametrize(
    "rows",
    [
        [row(10)],
        [row(10), row(20, objective=None, train_loss=None), row(30)],
        [row(10, objective=None, train_loss=None)],
        [row(10, objective=float("inf"), train_loss=float("nan"))],
        [row(10, objective=0.0, train_loss=0.0), row(20, objective=0.0, train_loss=0.0)],
        [row(10, objective=-1.0, train_loss=-1.0)],
    ],
    ids=["one point", "a gap", "nothing", "inf", "zeros", "negative"],
)
def test_draw_takes_what_a_run_may_hold(tmp_path, rows):
    draw({"a": rows}, tmp_path / "figure.png")
    assert pixels_of(tmp_path / "figure.png", BLUE) > 50  # the errors are always there


def test_many_runs_leave_room_for_their_lines(tmp_path):
    # a legend of them all would be larger than the figure, which matplotlib warns of
    draw({f"{n:0100}": [row(10 + n)] for n in range(65)}, tmp_path / "figure.png")
    assert pixels_of(tmp_path / "figure.png", BLUE) > 50


def test_comparison_table_shows_the_last_row_of_each_run():
    runs = {"a": [row(10), row(20)], "b": [row(30, objective=None)]}
    table = comparison_table(runs)
    shown = {str(c.header): list(c.cells) for c in table.columns}
    assert shown == {
        "run": ["a", "b"],
        "iteration": ["20", "30"],
        "epoch": ["0.20", "0.30"],
        "objective": ["45", "overflow"],
        "train loss": ["40", "26.667"],
        "train error": ["2.50", "1.67"],
        "test loss": ["10", "6.6667"],
        "test error": ["3.00", "2.00"],
    }


# ---- the command


@pytest.fixture
def command(monkeypatch, capsys):
    """`command(path, ...)`: exit code, standard output and standard error of consensus.report."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["consensus.report", *map(str, arguments)])
        code = 0
        try:
            report.main()
        except SystemExit as leaving:
            code = leaving.code
        return code, *capsys.readouterr()

    return call


def test_the_command_on_two_runs(command, write_run):
    a, b = write_run("a", [row(10), row(20)]), write_run("b", [row(30)])
    code, out, err = command(a, b)
    assert (code, err) == (0, "")
    assert re.search(r"\ba +│ +20 │ +0\.20 │ +45 │", out)
    assert re.search(r"\bb +│ +30 │ +0\.30 │ +30 │", out)
    assert out.splitlines()[-1] == f"figure in {a}/report.png"
    assert min(pixels_of(a / "report.png", colour) for colour in (BLUE, ORANGE)) > 50


def test_the_command_on_the_folder_of_runs(command, write_run, tmp_path):
    write_run("a", [row(10), row(20)])
    write_run("b", [row(30)])
    figure = tmp_path / "here.png"
    code, out, err = command(tmp_path / "runs", "--output", figure)
    assert (code, err) == (0, "")
    assert re.search(r"\ba +│ +20 │", out)
    assert re.search(r"\bb +│ +30 │", out)
    assert min(pixels_of(figure, colour) for colour in (BLUE, ORANGE)) > 50
    assert not (tmp_path / "runs" / "report.png").exists()


def test_runs_of_one_name_keep_apart(tmp_path):
    a, b = tmp_path / "x" / "seed0", tmp_path / "y" / "seed0"
    assert report.labels([a, b]) == [str(a), str(b)]
    assert report.labels([a, tmp_path / "other"]) == ["seed0", "other"]


def test_long_names_stay_apart_on_a_narrow_screen():
    written = io.StringIO()
    names = [f"20260101-000000-consensus-{name}-digits" for name in ("quad", "tan")]
    Console(file=written, width=80).print(comparison_table({name: [row(10)] for name in names}))
    first = [line.split("│")[1].strip() for line in written.getvalue().splitlines() if "│" in line]
    assert "".join(first) == "".join(names), "folded, not cut off"


def test_the_command_refuses_in_one_line(command, write_run, tmp_path):
    good, empty = write_run("good", [row(10)]), write_run("empty", [])
    (tmp_path / "binary").mkdir()
    (tmp_path / "binary" / "metrics.jsonl").write_bytes(b"\xff\xfe\x00")
    for arguments, complaint in [
        ([tmp_path / "absent"], f"{tmp_path}/absent is no run directory and holds none"),
        ([good, tmp_path / "absent"], f"{tmp_path}/absent is no run directory and holds none"),
        ([empty], f"{empty}/metrics.jsonl holds no evaluation yet"),
        ([tmp_path / "binary"], f"{tmp_path}/binary"),
        ([good, "--output", tmp_path / "no" / "x.png"], "[Errno 2] No such file or directory"),
        ([good, "--output", tmp_path / "x.exe"], "Format 'exe' is not supported"),
    ]:
        code, out, err = command(*arguments)
        assert (code, out) == (2, "")
        assert err.startswith(f"consensus.report: {complaint}")
        assert err.count("\n") == 1
