"""The command, from run directories to the screen and the folder."""

import csv
import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from consensus.report.__main__ import comparison_table, screen_tables
from consensus.report.table1 import table1
from tests.testing.made_runs import (
    ACCURACY,
    BLUE,
    FIRST,
    ORANGE,
    SECOND,
    accuracies,
    config,
    pixels_of,
    regression,
    row,
    row_at,
    run,
)


def test_the_command_on_two_runs(command, write_run):
    a, b = write_run("a", None, [row_at(10), row_at(20)]), write_run("b", None, [row_at(30)])
    code, out, err = command(a, b)
    assert (code, err) == (0, "")
    assert re.search(r"\ba +20 +0\.20 +45 ", out)
    assert re.search(r"\bb +30 +0\.30 +30 ", out)
    assert out.splitlines()[-1] == f"figure in {a}/report.png"
    assert min(pixels_of(a / "report.png", colour) for colour in (BLUE, ORANGE)) > 50


def test_the_command_on_the_folder_of_runs(command, write_run, tmp_path):
    write_run("a", None, [row_at(10), row_at(20)])
    write_run("b", None, [row_at(30)])
    figure = tmp_path / "here.png"
    code, out, err = command(tmp_path / "sweep", "--output", figure)
    assert (code, err) == (0, "")
    assert re.search(r"\ba +20 ", out)
    assert re.search(r"\bb +30 ", out)
    assert min(pixels_of(figure, colour) for colour in (BLUE, ORANGE)) > 50
    assert not (tmp_path / "sweep" / "report.png").exists()


def test_the_command_refuses_in_one_line(command, write_run, tmp_path):
    good, empty = write_run("good", None, [row_at(10)]), write_run("empty", None, [])
    (tmp_path / "binary").mkdir()
    (tmp_path / "binary" / "metrics.jsonl").write_bytes(b"\xff\xfe\x00")
    for arguments, complaint in [
        ([tmp_path / "absent"], f"{tmp_path}/absent: no run found here (no metrics.jsonl)"),
        ([good, tmp_path / "absent"], f"{tmp_path}/absent: no run found here (no metrics.jsonl)"),
        ([empty], f"{empty}/metrics.jsonl holds no evaluation yet"),
        ([tmp_path / "binary"], f"{tmp_path}/binary"),
        ([good, "--output", tmp_path / "binary" / "metrics.jsonl" / "x.png"], "[Errno 17] File ex"),
        ([good, "--output", tmp_path], f"`--output` is {tmp_path}; allowed: a file such as"),
        ([good, "--output", tmp_path / "new"], f"`--output` is {tmp_path}/new; allowed: a file"),
        ([good, "--output", tmp_path / "x.exe"], "Format 'exe' is not supported"),
    ]:
        code, out, err = command(*arguments)
        assert (code, out) == (2, "")
        assert err.startswith(f"consensus.report: {complaint}")
        assert err.count("\n") == 1


def test_ctrl_c_is_one_line(command, write_run, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("consensus.report.__main__.draw_run", interrupted)
    assert command(write_run("a", None, [row_at(10)])) == (130, "", "consensus.report: stopped\n")


@pytest.fixture
def sweep(tmp_path, write_run):
    """Two potentials, two lam, two seeds of one, one diverged, one without an evaluation; mSGD."""
    write_run("quad/a", config(lam=0.1), [FIRST])
    write_run("quad/b", config(lam=0.1, seed=1), [FIRST | {"test_error": 0.5}])
    write_run("quad/c", config(lam=0.2), [SECOND])
    write_run("cubic/a", config("cubic", lam=0.2), [row(None, None, 90, None, 90)], finished=False)
    write_run("cubic/b", config("cubic", lam=0.3), [], finished=False)
    msgd = config(workers=None, algorithm__name="msgd")
    write_run("msgd", msgd, [row(50, 50, 5, 500, 5)], workers=1)
    return tmp_path / "sweep"


def read_csv(path):
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))


def test_the_command_on_a_sweep(command, sweep):
    code, out, err = command(sweep)
    assert (code, err) == (0, "")
    folder = sweep / "report"
    assert {path.name for path in folder.iterdir()} == {
        "table1.md", "table1.csv", "table1.tex", "runs.csv", "report.md", "experiment",
        "figure1.png", "figure1.pdf",
        "sensitivity.png", "sensitivity.pdf", "methods.png", "methods.pdf",
    }  # fmt: skip
    assert "last evaluation of each run" in out
    assert "1 without an evaluation" in out
    assert out.splitlines()[-2:] == [
        f"Table 1 and Figure 1 in {folder}/report.md",
        f"figure in {sweep}/report.png",
    ]
    # by hand: test error 0.9 and 0.5: mean 0.7, std 0.4 / sqrt 2 = 0.28
    part_one_rows = [
        "| quad | 2 | 7 | 6 | 0.30 ± 0 | 100 ± 0 | 0.70 ± 0.28 | 3 / 0 |",
        "| cubic | 2 | - | - | - | - | - | 0 / 2 |",
        "| mSGD | 1 | 50 | 50 | 5.00 | 500 | 5.00 | 1 / 0 |",
    ]
    part_two_rows = [
        "| quad | 2 | 9 ± 0 | 8 ± 0 | 0.30 ± 0 | 100 ± 0 | 0.70 ± 0.28 | 0.1 | 4 |",
        "| cubic | - | - | - | - | - | - | - | - |",
        "| mSGD | 1 | 50 | 50 | 5.00 | 500 | 5.00 | 0.1 | 1 |",
    ]
    part_three_rows = [
        "| quad | 0.70 ± 0.28 | 1.00 ± 0 | - | - |",
        "| cubic | - | - | - | - |",
        "| mSGD | 5.00 | 1.00 | - | - |",
    ]
    table = (folder / "table1.md").read_text(encoding="utf-8")
    assert [line for line in table.splitlines() if re.match(r"\| (quad|cubic|mSGD)", line)] == (
        part_one_rows + part_two_rows + part_three_rows
    )
    page = (folder / "report.md").read_text(encoding="utf-8")
    assert "6 runs from `sweep`: 4 finished, 1 diverged, 1 unfinished." in page
    assert all(line in page for line in part_one_rows + part_two_rows)
    sentence = "Best in test error: quad, 0.70 ± 0.28 (2 seeds), with algorithm.lam=0.1 workers=4"
    again = f"python -m consensus.train --config-dir={folder} experiment=best"
    assert f"\n{sentence}. To train it: `{again}`\n" in page
    assert f"\n{sentence}\n  {again}\n" in out
    assert "| data.name | digits |" in page
    assert "| algorithm.lam |" not in page.split("## Settings shared")[1]
    for target in re.findall(r"\]\(([^)]+)\)", page):
        assert (folder / target).exists()

    quad, cubic, msgd = read_csv(folder / "table1.csv")
    assert (quad["lowest_objective"], quad["objective_at_best"]) == ("7.0", "9.0")
    assert float(quad["lowest_test_error"]) == pytest.approx(0.7)
    assert float(quad["test_error_at_best_std"]) == pytest.approx(0.08**0.5)
    assert (quad["seeds_at_best"], quad["algorithm.lam"], quad["runs_finished"]) == (
        "2",
        "0.1",
        "3",
    )
    assert (cubic["lowest_objective"], cubic["algorithm.lam"]) == ("", "")
    assert cubic["runs_diverged_or_unfinished"] == "2"
    assert (msgd["potential"], msgd["workers"]) == ("mSGD", "1")
    assert not [key for key in msgd if "paper" in key], "it has none for these data"

    runs = read_csv(folder / "runs.csv")
    shown = ("run", "status", "seed", "algorithm.lam", "train_loss")
    assert [tuple(r[key] for key in shown) for r in runs] == [
        ("cubic/a", "diverged", "0", "0.2", ""),
        ("cubic/b", "unfinished", "0", "0.3", ""),
        ("msgd", "finished", "0", "0.1", "50"),
        ("quad/a", "finished", "0", "0.1", "8.0"),
        ("quad/b", "finished", "1", "0.1", "8.0"),
        ("c", "finished", "0", "0.2", "6.0"),
    ]  # fmt: skip


@pytest.mark.usefixtures("blank_figures")
def test_the_folder_may_be_elsewhere(command, sweep, tmp_path):
    code, _, err = command(
        sweep, "--folder", tmp_path / "new" / "here", "--output", tmp_path / "no" / "one.pdf"
    )
    assert (code, err) == (0, "")
    assert (tmp_path / "new" / "here" / "report.md").exists()
    assert (tmp_path / "no" / "one.pdf").exists()
    assert not (sweep / "report").exists()
    assert not (sweep / "report.png").exists()
    before = (tmp_path / "new" / "here" / "report.md").read_bytes()
    assert command(sweep, "--folder", tmp_path / "new" / "here")[0] == 0
    assert (tmp_path / "new" / "here" / "report.md").read_bytes() == before, "over the first"


@pytest.mark.usefixtures("blank_figures")
def test_runs_by_name_write_no_folder_unless_asked(command, sweep, tmp_path):
    a, c = sweep / "quad" / "a", sweep / "quad" / "c"
    code, out, err = command(a, c)
    assert (code, err) == (0, "")
    assert "Table 1: the lowest of each column" in out
    assert not list(sweep.rglob("report.md"))
    assert command(a, c, "--folder", tmp_path / "f")[0] == 0
    assert "2 runs from `a`, `c`: 2 finished" in (tmp_path / "f" / "report.md").read_text()


@pytest.mark.usefixtures("blank_figures")
def test_a_single_run_writes_its_figure_alone(command, write_run):
    run_dir = write_run("a", config(), [FIRST])
    for path in (run_dir, run_dir.parent):
        code, out, err = command(path)
        assert (code, err) == (0, "")
        assert "Table 1" not in out
        assert out.splitlines()[-1] == f"figure in {path}/report.png"
    assert {path.name for path in run_dir.parent.rglob("*")} == {
        "a", "config.yaml", "metrics.jsonl", "summary.json", "report.png", "report.pdf",
    }  # fmt: skip
    (run_dir / "config.yaml").write_text("a: [", encoding="utf-8")
    assert command(run_dir)[0] == 0, "the config of a single run is not read"


@pytest.mark.usefixtures("blank_figures")
def test_equal_configs_write_nothing_more(command, write_run):
    a = write_run("a", config(output__run_dir="/a"), [FIRST])
    write_run("b", config(output__run_dir="/b", data__root="/b"), [SECOND])
    code, out, err = command(a.parent)
    assert (code, err) == (0, "")
    assert "Table 1" not in out
    assert not (a.parent / "report").exists()


@pytest.mark.usefixtures("blank_figures")
def test_a_sweep_without_a_finished_run(command, write_run):
    a = write_run("a", config(lam=0.1), [FIRST], finished=False)
    write_run("b", config(lam=0.2), [FIRST], finished=False)
    code, _, err = command(a.parent)
    assert (code, err) == (0, "")
    page = (a.parent / "report" / "report.md").read_text(encoding="utf-8")
    assert "2 runs from `sweep`: 0 finished, 0 diverged, 2 unfinished." in page
    assert "figure1" not in page


@pytest.mark.usefixtures("blank_figures")
def test_more_than_forty_runs_are_not_all_on_the_screen(command, write_run):
    for n in range(42):
        run_dir = write_run(f"run{n:02}", config(lam=n + 1.0), [FIRST])
    code, out, err = command(run_dir.parent)
    assert (code, err) == (0, "")
    folder = run_dir.parent / "report"
    assert "run39" in out
    assert "run40" not in out
    assert f"and 2 more runs: {folder}/runs.csv, and {folder}/table1.csv" in out
    assert len(read_csv(folder / "runs.csv")) == 42


@pytest.mark.usefixtures("blank_figures")
def test_the_command_refuses_a_sweep_in_one_line(command, sweep, write_run, tmp_path):
    a, c = sweep / "quad" / "a", sweep / "quad" / "c"
    (tmp_path / "file").touch()
    silent = sweep / "cubic" / "b"
    for arguments, complaint in [
        ([a, "--folder", tmp_path / "f"], "`--folder` needs two or more runs"),
        ([a, c, "--folder", tmp_path / "file"], "[Errno 17] File exists"),
        ([a, silent], f"{silent}/metrics.jsonl holds no evaluation yet"),
        ([silent.parent, "--folder", tmp_path / "f"], None),
    ]:
        code, out, err = command(*arguments)
        if complaint is None:
            assert (code, err) == (0, "")
            continue
        assert (code, out) == (2, "")
        assert err.startswith(f"consensus.report: {complaint}")
        assert err.count("\n") == 1
    (c / "config.yaml").unlink()
    code, out, err = command(a, c)
    assert (code, out) == (2, "")
    assert err.startswith(f"consensus.report: {c}/config.yaml is missing")
    assert err.count("\n") == 1
    (sweep / "cubic" / "a" / "metrics.jsonl").write_text("", encoding="utf-8")
    code, out, err = command(sweep / "cubic")
    assert (code, out) == (2, "")
    assert err == f"consensus.report: {sweep}/cubic/a/metrics.jsonl holds no evaluation yet\n"


@pytest.mark.usefixtures("blank_figures")
@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("config.yaml", None, "{run}/config.yaml is missing: its run cannot be placed in a table"),
        ("config.yaml", "a: [", "{run}/config.yaml is no readable configuration: "),
        ("metrics.jsonl", '{"iteration": 1, "epo', "{run}/metrics.jsonl, line 1 is not JSON: "),
        ("metrics.jsonl", '{"iteration": 1}', "{run}/metrics.jsonl, line 1 lacks epoch"),
        ("summary.json", "{", "{run}/summary.json is damaged: "),
    ],
)
def test_a_damaged_run_costs_itself_and_a_line(command, sweep, write_run, name, content, reason):
    """Six runs, and a seventh, which is damaged: the others are in the table."""
    run = write_run("quad/d", config(lam=0.1, workers=None, seed=1), [FIRST])
    assert command(sweep)[0] == 0
    assert "Left out" not in (sweep / "report" / "report.md").read_text(encoding="utf-8")
    path = run / name
    path.unlink() if content is None else path.write_text(content, encoding="utf-8")
    code, out, err = command(sweep)
    assert (code, err) == (0, "")
    (line,) = [line for line in out.splitlines() if line.startswith("left out: ")]
    assert line.startswith(f"left out: {reason.format(run=run)}")
    page = (sweep / "report" / "report.md").read_text(encoding="utf-8")
    (listed,) = [text for text in page.splitlines() if text.startswith(f"- {run}")]
    assert listed == line.replace("left out: ", "- ")
    assert page.index("6 runs from") < page.index("Left out:") < page.index(listed)
    shown = [run["run"] for run in read_csv(sweep / "report" / "runs.csv")]
    assert len(shown) == 6
    assert not [label for label in shown if label in ("d", "quad/d")]
    code, out, err = command(run, sweep / "quad" / "a")
    assert (code, out) == (2, ""), "named by the user itself"
    assert err.startswith(f"consensus.report: {reason.format(run=run)}")


@pytest.mark.usefixtures("blank_figures")
def test_a_folder_that_may_not_be_read_is_left_out(command, sweep, monkeypatch):
    """As lost+found at the top of a volume; root may read everything, so it is a stand-in."""
    closed = sweep / "lost+found"
    closed.mkdir()
    exists, iterdir = Path.exists, Path.iterdir

    def refused(path):
        if path == closed or closed in path.parents:
            raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "exists", lambda path: (refused(path), exists(path))[1])
    monkeypatch.setattr(Path, "iterdir", lambda path: (refused(path), iterdir(path))[1])
    code, out, err = command(sweep)
    assert (code, err) == (0, "")
    assert f"left out: {closed}: Permission denied" in out.splitlines()
    assert f"\n- {closed}: Permission denied\n" in (sweep / "report" / "report.md").read_text()
    assert len(read_csv(sweep / "report" / "runs.csv")) == 6
    code, out, err = command(sweep, closed)
    assert (code, out) == (2, "")
    assert err == f"consensus.report: {closed}: Permission denied\n"


def test_comparison_table_shows_the_last_row_of_each_run():
    runs = {"a": [row_at(10), row_at(20)], "b": [row_at(30, objective=None)]}
    table = comparison_table(runs)
    shown = {str(c.header): list(c.cells) for c in table.columns}
    assert shown == {
        "run": ["a", "b (diverged)"],
        "iteration": ["20", "30"],
        "epoch": ["0.20", "0.30"],
        "objective": ["45", "overflow"],
        "train loss": ["40", "26.667"],
        "train error": ["2.50", "1.67"],
        "test loss": ["10", "6.6667"],
        "test error": ["3.00", "2.00"],
    }


def test_long_names_stay_apart_on_a_narrow_screen():
    written = io.StringIO()
    names = [f"20260101-000000-consensus-{name}-digits" for name in ("quad", "tan")]
    Console(file=written, width=80).print(comparison_table({name: [row_at(10)] for name in names}))
    lines = written.getvalue().splitlines()
    rule = next(n for n, line in enumerate(lines) if line.startswith("───"))
    first = [line.split()[0] for line in lines[rule + 1 :]]
    assert "".join(first) == "".join(names), "folded, not cut off"


def test_the_screen_shows_both_parts():
    runs = [run(config("[red]", lam=lam, data__name="mnist"), FIRST) for lam in (0.1, 0.2)]
    runs += [run(config("tan", data__name="mnist"), SECOND)]
    written = io.StringIO()
    for table in screen_tables(table1(runs)):
        Console(file=written, width=120).print(table)
    text = re.sub(" +", " ", written.getvalue())
    assert "\ntan 7 6 (0.83) 0.50 (0.00) 120 (301) 0.80 (0.62) 1 / 0\n" in text
    assert "\n[red] 9 8 0.30 100 0.90 2 / 0\n" in text
    assert "\ntan 1 0.80 120 algorithm.lam=0.1" in text


@pytest.mark.usefixtures("blank_figures")
def test_the_command_on_a_regression(command, write_run):
    """The lowest mse decides, not the lowest mae; columns and titles are those of the runs."""
    choice = {"selection": {"column": "test_mse", "goal": "min"}, "goals": {"mse": "min"}}
    for name, lam, last in [("a", 0.1, regression(3.0, 0.1)), ("b", 0.2, regression(2.0, 0.7))]:
        run_dir = write_run(name, config(lam=lam, loss__name="mse"), [last], **choice)
    code, out, err = command(run_dir.parent)
    assert (code, err) == (0, "")
    assert "error" not in out
    assert "nan" not in out
    assert re.search(r"\nthe best in test mse *\n", out)
    (found,) = read_csv(run_dir.parent / "report" / "table1.csv")
    assert (found["algorithm.lam"], found["test_mse_at_best"], found["lowest_test_mae"]) == (
        "0.2", "2.0", "0.1",
    )  # fmt: skip
    assert "error" not in (run_dir.parent / "report" / "report.md").read_text(encoding="utf-8")


def test_the_screen_says_on_which_set_the_best_was_chosen():
    runs = [run(config(lam=lam), accuracies(lam, 0.5), **ACCURACY) for lam in (0.25, 0.75)]
    first, second = screen_tables(table1(runs), 200)
    assert first.title == (
        "Table 1: the lowest of each column by itself, the highest of train accuracy, "
        "validation accuracy, test accuracy"
    )
    assert second.title == (
        "the best in validation accuracy (highest), chosen on the validation set; test numbers "
        "are of that configuration"
    )
    shown = {str(c.header): list(c.cells) for c in second.columns}
    assert shown == {
        "potential": ["quad"],
        "seeds": ["1"],
        "validation accuracy": ["0.75"],
        "test accuracy": ["0.5"],
        "test loss": ["3"],
        "with": ["algorithm.lam=0.75"],
    }
