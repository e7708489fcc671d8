"""Methods side by side in several settings."""

import pytest

from consensus.report.runs import read_run
from consensus.report.settings import draw_settings, settings, tables
from tests.testing.made_runs import ACCURACY, accuracies, config, row, run

# Test errors of two seeds: (partition, alpha, potential, lam) -> (seed 0, seed 1)
ERRORS = {
    ("label_skew", 0.5, "quad", 0.1): (4.0, 6.0),
    ("label_skew", 0.5, "quad", 0.2): (8.0, 8.0),
    ("label_skew", 0.5, "tan", 0.1): (3.0, 3.0),
    ("label_skew", 0.1, "quad", 0.1): (20.0, 21.0),
    ("label_skew", 0.1, "quad", 0.2): (10.0, 12.0),
    ("by_label", 0.5, "quad", 0.1): (40.0, 44.0),
}


def made_runs():
    found = []
    for (partition, alpha, potential, lam), errors in ERRORS.items():
        for seed, error in enumerate(errors):
            data = {"data__partition": partition, "data__alpha": alpha}
            nested = config(potential, lam, seed, **data)
            found.append(run(nested, row(1.0, 1.0, 1.0, 1.0, error)))
    found += [run(config("quad", 0.4, 0, data__partition="full", data__alpha=0.5), None, False)]
    return found


def test_each_method_is_at_its_best_in_each_setting():
    """By hand: means of ERRORS, sample deviations |a - b| / sqrt 2, and the lam of the lower."""
    found = settings(made_runs(), ["data.partition", "data.alpha"])
    labels = ["partition=by_label", "partition=full"]
    labels += ["partition=label_skew, alpha=0.1", "partition=label_skew, alpha=0.5"]
    assert [setting.label for setting in found] == labels
    numbers, choices = tables(found)
    assert numbers == [
        ["test error %", *labels],
        ["quad", "42.0 ± 2.8", "-", "11.0 ± 1.4", "5.0 ± 1.4"],
        ["tan", "", "", "", "3.00 ± 0"],
    ]
    assert choices == [
        ["with", *labels],
        ["quad", "", "", "lam=0.2", "lam=0.1"],
        ["tan", "", "", "", ""],  # it has one configuration
    ]


def test_numbers_are_in_their_order():
    found = settings(
        [run(config(lam=lam, workers=lam), row(*[lam] * 5)) for lam in (10, 9, 0.5)],
        ["algorithm.lam"],
    )
    assert [setting.label for setting in found] == ["lam=0.5", "lam=9", "lam=10"]


def test_a_validation_set_chooses_and_the_numbers_are_those_of_the_test_set():
    """And the highest accuracy is the best."""
    last = {(0.1, "full"): (0.8, 0.3), (0.2, "full"): (0.7, 0.9), (0.1, "sharded"): (0.6, 0.5)}
    runs = [
        run(
            config(lam=lam, data__partition=partition, data__validation=0.1),
            accuracies(*pair),
            **ACCURACY,
        )
        for (lam, partition), pair in last.items()
    ]
    numbers, choices = tables(settings(runs, ["data.partition"]))
    assert numbers == [
        ["test accuracy", "partition=full", "partition=sharded"],
        ["quad", "0.3", "0.5"],
    ]
    assert choices[1] == ["quad", "lam=0.1", ""]


def test_a_key_that_no_run_has_is_refused():
    line = r"^`--by` is data.alfa; allowed: a key of the runs, such as those that vary: seed, "
    with pytest.raises(ValueError, match=line):
        settings(made_runs(), ["data.alfa"])


def test_a_key_with_one_value_is_one_setting():
    (found,) = settings(made_runs(), ["data.name"])
    assert found.label == "name=digits"
    assert set(found.records) == {"quad", "tan"}


def test_methods_of_several_problems_have_a_row_each():
    runs = [
        run(config("quad", workers=workers, data__name=name), row(*[error] * 5))
        for workers, name, error in ((4, "digits", 3.0), (4, "mnist", 5.0), (8, "mnist", 6.0))
    ]
    assert tables(settings(runs, ["workers"]))[0] == [
        ["test error %", "workers=4", "workers=8"],
        ["quad (digits, lenet5)", "3.00", ""],
        ["quad (mnist, lenet5)", "5.00", ""],
        ["quad", "", "6.00"],
    ]


def test_a_panel_for_each_setting_with_a_mark_for_each_method(drawn, tmp_path):
    found = settings(made_runs(), ["data.partition", "data.alpha"])
    assert list(draw_settings(found, tmp_path)) == ["settings.png"]
    (figure,) = drawn
    assert [axis.get_title() for axis in figure.axes] == [setting.label for setting in found]
    last = figure.axes[-1]
    marks = [line.get_xydata().tolist() for line in last.lines if line.get_marker() in "o^"]
    assert marks == [[[5.0, 0.0]], [[3.0, 1.0]]]
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["quad", "tan"]


def test_the_command_writes_them_to_the_page(command, write_run, tmp_path, blank_figures):
    for lam, error in ((0.1, 4.0), (0.2, 6.0)):
        write_run(str(lam), config(lam=lam), [row(1.0, 1.0, 1.0, 1.0, error)])
    code, out, err = command(tmp_path / "sweep", "--by", "algorithm.lam")
    assert (code, err) == (0, "")
    assert "test error % lam=0.1 lam=0.2" in out
    page = (tmp_path / "sweep" / "report" / "report.md").read_text()
    assert "## Settings\n\n| test error % | lam=0.1 | lam=0.2 |\n| --- | --- | --- |\n" in page
    assert "](settings.png)" in page
    assert (tmp_path / "sweep" / "report" / "settings.png").exists()
    code, _, err = command(tmp_path / "sweep", "--by", "algorithm.lambda")
    assert (code, err.count("\n")) == (2, 1)
    assert "`--by` is algorithm.lambda; allowed: a key of the runs, such as those that vary" in err
    alone = tmp_path / "sweep" / "0.1"
    assert read_run("x", alone, []).config["algorithm.lam"] == 0.1
    assert "`--by` needs two or more runs" in command(alone, "--by", "seed")[2]
