"""The metrics row: reading, writing, showing, and runs of earlier versions."""

import io
import json
import math
import shutil
import sys

import pytest
from matplotlib.figure import Figure
from rich.console import Console

from consensus.records import (
    REQUIRED,
    at_commas,
    cells,
    columns,
    evaluation_lines,
    format_cell,
    largest,
    last_row,
    number,
    read_rows,
    rows_until,
    text_table,
    to_json,
)
from consensus.report.__main__ import main
from tests.testing import ROOT

OLD_RUNS = ROOT / "tests" / "data" / "run_a7db8c5"
OLD_COLUMNS = [
    "iteration", "epoch", "objective", "train_loss", "train_error", "test_loss", "test_error",
]  # fmt: skip


def row(t, **others):
    return dict.fromkeys(OLD_COLUMNS, 1.0) | {"iteration": t} | others


def test_the_required_keys_are_those_of_the_first_version():
    """A key that is added here makes every run directory of today unreadable."""
    assert set(REQUIRED) <= set(OLD_COLUMNS)
    assert columns([row(1)]) == OLD_COLUMNS


def test_the_columns_follow_the_problem():
    """The loss and the metrics of each set of samples, in whatever order rows have the sets."""
    keys = ["test_mae", "test_loss", "train_loss", "train_mae", "wall_s"]
    of_regression = dict.fromkeys(keys, 1.0)
    assert columns([of_regression]) == [
        "iteration", "epoch", "objective", "train_loss", "train_mae", "test_mae", "test_loss",
    ]  # fmt: skip
    held_out = row(1, validation_loss=1.0, validation_error=2.0)
    assert columns([row(1), held_out]) == [
        *OLD_COLUMNS[:5], "validation_loss", "validation_error", *OLD_COLUMNS[5:],
    ]  # fmt: skip
    assert cells(row(1), columns([held_out]))[5:7] == ["-", "-"]
    assert " validation loss 1 error 2.00 %  test loss 1 " in evaluation_lines(held_out)[0]
    numbers = row(1) | {"train_mae": 0.123456}
    assert " train loss 1 error 1.00 % mae 0.12346  test " in evaluation_lines(numbers)[0]


# ---- runs that commit a7db8c5 wrote


@pytest.fixture
def old_runs(tmp_path):
    """A copy, since the report writes figures beside the runs, of two configurations."""
    folder = shutil.copytree(OLD_RUNS, tmp_path / "old")
    path = folder / "stationarity" / "config.yaml"
    path.write_text(path.read_text().replace("lam: 0.1\n", "lam: 0.2\n"))
    return folder


def test_a_run_of_today_stays_readable():
    rows = read_rows(OLD_RUNS / "stationarity")
    assert [r["iteration"] for r in rows] == [10, 20]
    assert rows[1]["test_error"] == 12.222222222222221
    assert rows[1]["stationarity"]["envelope_gradient"] == 6.886927604675293
    assert rows_until(OLD_RUNS / "resumed", 10) == read_rows(OLD_RUNS / "resumed")[:1]
    assert last_row(OLD_RUNS / "resumed")["digest"] == "faf42ff5edab3fd2"
    assert evaluation_lines(rows[1]) == [
        "iteration     20  epoch   0.28  train loss 860.98 error 10.51 %  "
        "test loss 229.91 error 12.22 %  coupling 17  15708 samples/s  cuts 0, 3",
        "    stationarity  |sum grad e f_j (u)| 6.89 (accuracy 0.06)  (5a) 15  (5b) 28.8  "
        "(9) 6.08  in 0.1 s",
    ]
    rows[1]["stationarity"]["converged"] = False
    assert " 6.89 (accuracy 0.06, not converged)  (5a) 15  " in evaluation_lines(rows[1])[1]


@pytest.mark.parametrize("added", [None, "test_new"])
def test_a_run_of_today_is_reported_also_after_a_column_was_added(
    old_runs, added, monkeypatch, capsys
):
    if added:  # by a run of a later version beside them
        later = shutil.copytree(old_runs / "resumed", old_runs / "later")
        text = (later / "metrics.jsonl").read_text()
        text = text.replace('"test_error"', f'"{added}": 1, "test_error"')
        (later / "metrics.jsonl").write_text(text)
    monkeypatch.setattr(Figure, "savefig", lambda _, path, **__: path.touch())
    monkeypatch.setattr(sys, "argv", ["consensus.report", str(old_runs)])
    main()
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    found = {cells[0]: cells[1:] for cells in shown[:8] if len(cells) > 6}
    expected = ["20", "0.28", "877.96", "860.98", "10.51", "229.91", "12.22"]
    expected[-1:-1] = ["-"] if added else []
    assert found["resumed"] == found["stationarity"] == expected
    page = (old_runs / "report" / "report.md").read_text(encoding="utf-8")
    number = 3 if added else 2
    assert f"{number} runs from `old`: {number} finished, 0 diverged, 0 unfinished." in page
    assert f"| tan | 1 | {' | '.join(expected[2:])} |" in page
    assert "- `stationarity`: u is not z_j yet: " in page


# ---- reading


def write(folder, text):
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    return folder


def lines(*rows):
    return "".join(json.dumps(r) + "\n" for r in rows)


@pytest.fixture
def write_run(tmp_path):
    """`write_run("name", rows)`: a run directory with these rows."""

    def write_rows(name, rows):
        (tmp_path / name).mkdir()
        return write(tmp_path / name, lines(*rows))

    return write_rows


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
         "line 2 lacks test_loss"),
        (b"[1, 2]\n", "line 2 lacks iteration, epoch, objective, train_loss, test_loss"),
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


def test_rows_until_keeps_each_iteration_once_and_skips_damage(tmp_path):
    text = lines(row(10), row(20)) + '{"iteration": 2\n3\n{"epoch": 1}\n'
    text += lines(row(20, test_error=9.0), row(15), row(30), row(40)) + '{"iteration": 5'
    assert rows_until(write(tmp_path, text), 30) == [row(10), row(20), row(30)]
    assert rows_until(tmp_path / "absent", 30) == []


def test_last_row_is_the_newest_whole_one(tmp_path):
    assert last_row(tmp_path) is None
    assert last_row(write(tmp_path, '{"iteration"')) is None
    assert last_row(write(tmp_path, lines(row(10), row(20)) + '{"iteration": 3')) == row(20)


# ---- writing


def test_json_is_strict():
    inf, nan = math.inf, math.nan
    row = {"a": inf, "b": -inf, "c": nan, "d": [1.0, inf], "e": {"f": nan}, "g": 2, "h": 0.5}
    assert to_json(row) == (
        '{"a": null, "b": null, "c": null, "d": [1.0, null], "e": {"f": null}, "g": 2, "h": 0.5}'
    )
    assert to_json({"a": [inf]}, indent=2) == '{\n  "a": [\n    null\n  ]\n}'
    assert row["d"] == [1.0, inf], "the row itself is not touched"


# ---- showing


@pytest.mark.parametrize(
    ("column", "value", "shown"),
    [
        ("objective", None, "overflow"),  # as a metrics file holds it
        ("test_error", None, "overflow"),
        ("objective", math.inf, "inf"),  # as the run itself holds it
        ("objective", 1.0e9, "1e+09"),
        ("objective", 0.000123456, "0.00012346"),
        ("epoch", 0.1234, "0.12"),
        ("validation_error", 0.1234, "0.12"),
        ("test_relative_error", 0.1234, "0.1234"),  # a metric of a user, not in percent
        ("iteration", 30000, "30000"),
        ("digest", "c6c8", "c6c8"),
    ],
)
def test_cells(column, value, shown):
    assert format_cell(column, value) == shown


def test_a_value_that_a_row_lacks():
    assert cells({"iteration": 10}, OLD_COLUMNS) == ["10", *["-"] * 6]
    assert math.isnan(number({}, "wall_s"))
    assert math.isnan(number({"wall_s": None}, "wall_s"))
    assert number({"wall_s": 2}, "wall_s") == 2.0
    assert math.isnan(number({"deterministic": True}, "deterministic")), "no axis from 0 to 1"


def test_the_largest_is_nan_if_one_is_not_finite():
    assert largest([1.0, 3.0, 2.0]) == 3.0
    assert math.isnan(largest([1.0, None, 2.0]))
    assert math.isnan(largest([math.nan, 2.0]))


def test_a_row_without_optional_keys_has_a_log_line():
    (line,) = evaluation_lines(row(7))
    assert line.startswith("iteration      7  epoch   1.00  train loss 1 error 1.00 %")
    assert "coupling nan" in line


def test_a_table_breaks_no_word_and_no_number_in_80_columns():
    name = "potential=tan_sep,eta=0.5,lam=1e-05,sigma=0.001,momentum=0.99"
    dated = "20260101-000000-consensus-pseudo_huber-digits"
    headings = ["run", "iteration", "train loss", "train error %", "test error", "mean"]
    numbers = ["30000", "1.2345e-05", "100.00", "12.22", "0.123 ± 0.45678"]
    console = Console(file=io.StringIO(), width=80, soft_wrap=True)
    rows = [headings, *([entry, *numbers] for entry in (name, dated, "short"))]
    console.print(text_table("t", rows, left=("run",)))
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    words = [word for line in lines for word in line.split()]
    assert words.count("short") == 1
    for word in " ".join([*headings[1:], *numbers]).split():
        assert words.count(word) >= 1, word
    assert words.count("1.2345e-05") == 3
    starts = [line.split()[0] for line in lines if line[:1].strip()]
    assert name in "".join(starts)
    assert dated in "".join(starts)
    assert all(start.endswith((",", "-", "0.99", "digits")) for start in starts[3:-1])


@pytest.mark.parametrize(
    ("name", "width", "lines"),
    [
        ("a=1,b=2", 9, ["a=1,b=2"]),
        ("a=1,b=2", 6, ["a=1,", "b=2"]),
        ("lam=1e-05", 4, ["lam=1e-05"]),
        ("consensus-tan-digits", 12, ["consensus-", "tan-digits"]),
        ("", 3, [""]),
    ],
)
def test_lines_of_a_name_end_at_commas_and_words(name, width, lines):
    assert at_commas(name, width).split("\n") == lines


def test_names_in_a_table_are_not_markup():
    console = Console(file=io.StringIO(), width=40)
    console.print(text_table("t", [["run", "x"], ["[red]", "1"]]))
    assert "[red]" in console.file.getvalue()


def damaged(n, change):
    """The lines of ten rows with a change in row n, and the iterations of the others."""
    rows = [row(10 * i) for i in range(1, 11)]
    text = [json.dumps(r) for r in rows]
    text[n] = change(text[n], rows[n])
    return "\n".join(text) + "\n", [r["iteration"] for i, r in enumerate(rows) if i != n]


@pytest.mark.parametrize("n", [0, 4, 9])
@pytest.mark.parametrize(
    "change",
    [
        lambda text, _: text.replace("train_loss", "train_lors"),
        lambda text, _: text.replace('"iteration"', '"iterbtion"'),
        lambda text, _: text[:-3],
        lambda text, r: text.replace(f'"iteration": {r["iteration"]}', '"iteration": "x"'),
        lambda text, _: json.dumps(json.loads(text) | {"objective": [1]}),
        lambda text, r: json.dumps(r | {"iteration": 99 if r["iteration"] < 100 else 15}),
        lambda text, r: json.dumps(r | {"iteration": -5}),
    ],
)
def test_a_damaged_row_is_named_and_left_out(tmp_path, n, change):
    text, iterations = damaged(n, change)
    said = []
    found = rows_until(write(tmp_path, text), 100, said.append)
    assert [r["iteration"] for r in found] == iterations
    named = f"{tmp_path}/metrics.jsonl: line {n + 1} is damaged and left out"
    assert said == ([named] if n < 9 else []), "a killed run may leave its last line in part"


def test_rows_of_a_run_that_went_back_are_not_damaged(tmp_path):
    rows = [row(t) for t in (10, 20, 30, 20, 30, 40, 50)]
    said = []
    found = rows_until(write(tmp_path, lines(*rows)), 40, said.append)
    assert [r["iteration"] for r in found] == [10, 20, 30, 40]
    assert said == []
