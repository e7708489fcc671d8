"""The folder of a report, and its tables."""

import csv
from dataclasses import replace

import pytest

from consensus.report.page import (
    markdown_table,
    part_one,
    part_three,
    part_two,
    table1_csv,
    table1_markdown,
    write_report,
)
from consensus.report.table1 import table1
from tests.testing.made_runs import (
    ACCURACY,
    FIRST,
    MSE,
    SECOND,
    accuracies,
    config,
    regression,
    row,
    run,
)


@pytest.mark.usefixtures("blank_figures")
def test_no_sensitivity_unless_a_number_varies(write_run, tmp_path):
    runs = [run(config(seed=s), FIRST) for s in (0, 1)]
    runs += [run(config(algorithm__name="msgd", lam=9.0), FIRST)]
    write_report(runs, tmp_path / "f", ["x"])
    assert not (tmp_path / "f" / "sensitivity.png").exists()
    assert "sensitivity" not in (tmp_path / "f" / "report.md").read_text(encoding="utf-8")
    runs += [run(config(potential__eta=2.0), FIRST)]
    write_report(runs, tmp_path / "f", ["x"])
    assert (tmp_path / "f" / "sensitivity.png").exists()


def test_part_one_takes_each_column_by_itself():
    runs = [
        run(config(lam=0.1), FIRST),
        run(config(lam=0.2), SECOND),
        run(config(lam=0.3), row(None, None, 0.0, None, 0.0)),
        run(config(lam=0.4), row(0, 0, 0, 0, 0), finished=False),
    ]
    assert part_one(table1(runs)) == [
        ["potential", "configurations", "objective", "train loss", "train error %", "test loss",
         "test error %", "runs: finished / diverged or unfinished"],
        ["quad", "4", "7", "6", "0.30", "100", "0.80", "2 / 2"],
    ]  # fmt: skip


def test_part_one_compares_means_of_seeds():
    # test errors 1 and 3 (mean 2, std sqrt 2) against 1.9: one lucky seed is not the best
    runs = [run(config(lam=0.1, seed=s), row(1, 1, 1, 1, e)) for s, e in ((0, 1.0), (1, 3.0))]
    other = run(config(lam=0.2), row(2, 2, 2, 2, 1.9))
    (line,) = table1([*runs, other])
    assert line.lowest["test_error"].mean == 1.9
    assert line.lowest["test_loss"].mean == 1.0
    worse = run(config(lam=0.2), row(2, 2, 2, 2, 2.5))
    (line,) = table1([*runs, worse])
    assert part_one([line])[1][-2:] == ["2.0 ± 1.4", "3 / 0"]


def test_part_two_is_one_configuration():
    runs = [run(config(lam=0.1), FIRST), run(config(lam=0.2), SECOND)]
    runs += [run(config(potential="tan", lam=0.1), None, finished=False)]
    assert part_two(table1(runs)) == [
        ["potential", "seeds", "objective", "train loss", "train error %", "test loss",
         "test error %", "algorithm.lam"],
        ["quad", "1", "7", "6", "0.50", "120", "0.80", "0.2"],
        ["tan", "-", "-", "-", "-", "-", "-", "-"],
    ]  # fmt: skip


def test_part_three_compares_methods_per_sample_and_per_second():
    def evaluations(wall):
        timed = ((FIRST | {"test_error": 4.0}, wall / 2), (FIRST, wall))
        return [found | {"wall_s": s, "samples_per_s": 1e4 / wall} for found, s in timed]

    runs = [
        replace(run(config(algorithm__name=name), FIRST), rows=evaluations(wall))
        for name, wall in (("consensus", 10.0), ("ddp", 20.0), ("easgd", 24.0))
    ]
    records = table1(runs)
    in_10_s = "test error % in 10 s"
    assert part_three(records) == [
        ["potential or method", "test error %", in_10_s, "epochs", "seconds", "samples/s"],
        ["quad", "0.90", "0.90", "1.00", "10", "1000"],
        ["EASGD", "0.90", "-", "1.00", "24", "416.67"],  # its first evaluation was after 12 s
        ["DDP", "0.90", "4.00", "1.00", "20", "500"],
    ]
    assert "| DDP | 0.90 | 4.00 | 1.00 | 20 | 500 |" in table1_markdown(records)
    assert "samples/s" not in table1_markdown(table1(runs[:1]))


def test_the_papers_numbers_stand_beside_its_own_problem_only():
    def cells(**others):
        runs = [run(config(p, **others), FIRST) for p in ("quad", "cubic", "tan", "tan_sep")]
        return part_one(table1(runs))

    paper = cells(data__name="mnist")
    assert paper[0][3:-1] == [
        "train loss", "paper", "train error %", "paper", "test loss", "paper", "test error %",
        "paper",
    ]  # fmt: skip
    assert [line[4:-1:2] for line in paper[1:]] == [
        ["2.47", "0.00", "294", "0.65"],
        ["6.87", "0.00", "231", "0.56"],
        ["0.83", "0.00", "301", "0.62"],
        ["-", "-", "-", "-"],
    ]
    assert "paper" not in cells()[0]
    assert "paper" not in cells(data__name="mnist", model__name="mlp")[0]
    mixed = table1([run(config(data__name=name), FIRST) for name in ("digits", "mnist")])
    assert [line[4:-1:2] for line in part_one(mixed)[1:]] == [
        ["-"] * 4,
        ["2.47", "0.00", "294", "0.65"],
    ]
    easgd = cells(data__name="mnist", algorithm__name="easgd")
    assert easgd[1][4:-1:2] == ["-"] * 4, "the paper's quad is not EASGD"


def test_markdown_escapes():
    assert markdown_table([["a|b", "c\nd"], ["\\|", "1"]]) == (
        "| a\\|b | c d |\n| --- | --- |\n| \\\\\\| | 1 |"
    )


MIXED = [
    run(config(lam=0.1), FIRST),
    run(config(lam=0.2), SECOND),
    run(
        config(data__name="table", model__name="linear", loss__name="mse"),
        regression(2.0, 0.5),
        **MSE,
    ),
]
"""Two problems with different columns."""


def test_a_table_of_accuracies_on_a_validation_set():
    runs = [
        run(config(lam=lam, loss__name="top", data__validation=0.2), last, **ACCURACY)
        for lam, last in ((0.1, accuracies(0.75, 0.5)), (0.2, accuracies(0.5, 1.0)))
    ]
    records = table1(runs)
    columns = [
        "objective", "train loss", "train accuracy", "validation loss", "validation accuracy",
        "test loss", "test accuracy",
    ]  # fmt: skip
    assert part_one(records) == [
        ["potential", "configurations", *columns, "runs: finished / diverged or unfinished"],
        ["quad", "2", "10", "8", "0.99", "2", "0.75", "3", "1", "2 / 0"],
    ]
    assert part_two(records) == [
        ["potential", "seeds", *columns, "algorithm.lam"],
        ["quad", "1", "10", "8", "0.99", "2", "0.75", "3", "0.5", "0.1"],
    ]
    assert part_three(records)[0][1:3] == ["validation accuracy", "test accuracy"]
    text = table1_markdown(records)
    assert (
        "The lowest value of each column by itself (the highest of train accuracy, validation "
        "accuracy, test accuracy), over all" in text
    )
    assert (
        "the configuration with the highest validation accuracy (on ties, the lowest validation "
        "loss), and its values of the keys that differ between the runs. Where a validation set "
        "decides, the configuration is chosen on it; test numbers are of that configuration."
        in text
    )
    (found,) = csv.DictReader(table1_csv(records).splitlines())
    assert (found["highest_test_accuracy"], found["test_accuracy_at_best"]) == ("1.0", "0.5")
    assert found["lowest_test_loss"] == "3.0"
    assert not [key for key in found if "paper" in key or key == "lowest_test_accuracy"]


def test_problems_with_other_columns_stand_in_one_table():
    records = table1(MIXED)
    assert part_two(records) == [
        ["potential", "seeds", "objective", "train loss", "train error %", "train mse",
         "train mae", "test loss", "test error %", "test mse", "test mae",
         "algorithm.lam", "loss.name"],
        ["quad (digits, lenet5)", "1", "7", "6", "0.50", "-", "-", "120", "0.80", "-", "-", "0.2",
         ""],
        ["quad (table, linear)", "1", "10", "8", "-", "0.25", "0.5", "1", "-", "2", "0.5", "0.1",
         "mse"],
    ]  # fmt: skip
    assert (
        "For each potential, the configuration for (digits, lenet5) with the lowest test error (on "
        "ties, the lowest test loss); for (table, linear) with the lowest test mse (on ties, the "
        "lowest test loss), and its values" in table1_markdown(records)
    )
    first, second = csv.DictReader(table1_csv(records).splitlines())
    assert (first["lowest_test_mse"], second["lowest_test_mse"]) == ("", "2.0")
    assert (first["lowest_test_error"], second["lowest_test_error"]) == ("0.8", "")


@pytest.mark.usefixtures("blank_figures")
def test_the_page_defines_the_columns_and_has_a_figure_for_each_that_decides(tmp_path):
    more = run(
        config(lam=0.9, data__name="table", model__name="linear", loss__name="mse"),
        regression(3.0, 0.5),
        **MSE,
    )
    write_report([*MIXED, more], tmp_path, ["x"])
    page = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "- **train loss, test loss**: data loss of u, summed over the set\n" in page
    assert "- **train mse, test mse**: `mse` of u, the mean over the set\n" in page
    assert "- **train error, test error**: percent of the set" in page
    for column, words in (("test_error", "Test error"), ("test_mse", "Test mse")):
        assert (tmp_path / f"sensitivity_{column}.pdf").exists()
        assert f"\n{words} of the last evaluation over each number that varies, " in page
    assert "the configuration best in final test mse; with several seeds" in page
    chosen = [run(config(lam=lam), accuracies(lam, 0.5), **ACCURACY) for lam in (0.1, 0.2)]
    write_report(chosen, tmp_path / "chosen", ["x"])
    assert (
        "best in final validation accuracy (highest), chosen on the validation set; test numbers "
        "are of that configuration; with" in (tmp_path / "chosen" / "report.md").read_text("utf-8")
    )
