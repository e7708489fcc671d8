"""Table 1, Figure 1 and the report folder from files that are written here, by hand."""

import csv
import io
import json
import re
import sys

import numpy as np
import pytest
import yaml
from matplotlib.figure import Figure
from matplotlib.image import imread
from rich.console import Console

from consensus.comm import Launch, Solo
from consensus.records import read_rows
from consensus.report import __main__ as report
from consensus.report.page import figure1_groups, markdown_table, write_report
from consensus.report.plots import curve, draw_figure1, draw_sensitivity, line_style
from consensus.report.runs import find_runs
from consensus.report.table1 import (
    Run,
    chosen_keys,
    flatten,
    group_seeds,
    make_lines,
    make_run,
    part_one,
    part_two,
    read_configs,
    screen_tables,
    varying,
)
from consensus.run.plan import make_plan
from consensus.run.trainer import Trainer


def row(objective, train_loss, train_error, test_loss, test_error, t=100):
    """An evaluation."""
    return {
        "iteration": t,
        "epoch": t / 100,
        "objective": objective,
        "train_loss": train_loss,
        "train_error": train_error,
        "test_loss": test_loss,
        "test_error": test_error,
    }


def config(potential="quad", lam=0.1, seed=0, **others):
    """A config, nested; `algorithm__sigma=1` sets algorithm.sigma."""
    nested = {
        "workers": 4,
        "seed": seed,
        "resume": "never",
        "potential": {"name": potential, "eta": 1.0, "options": {}},
        "algorithm": {"name": "consensus", "lam": lam},
        "data": {"name": "digits", "root": "/somewhere"},
        "model": {"name": "lenet5", "options": {}},
        "output": {"run_dir": None},
    }
    for key, value in others.items():
        *folders, last = key.split("__")
        place = nested
        for folder in folders:
            place = place[folder]
        place[last] = value
    return nested


@pytest.fixture
def write_run(tmp_path):
    """`write_run("a/b", config, rows)`: a run directory below tmp_path/sweep."""

    def write(name, nested, rows, finished=True, workers=4):
        run_dir = tmp_path / "sweep" / name
        run_dir.mkdir(parents=True)
        if nested is not None:
            (run_dir / "config.yaml").write_text(yaml.safe_dump(nested), encoding="utf-8")
        text = "".join(json.dumps(r) + "\n" for r in rows)
        (run_dir / "metrics.jsonl").write_text(text, encoding="utf-8")
        if finished:
            summary = {"environment": {"workers": workers}}
            (run_dir / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
        return run_dir

    return write


def run(nested, last, finished=True, label="r"):
    """A run with one evaluation, in memory."""
    flat = flatten(nested)
    del flat["resume"], flat["data.root"], flat["output.run_dir"]
    return Run(label, flat, [] if last is None else [last], finished)


# ---- reading


def test_find_runs_at_any_depth(tmp_path, write_run):
    rows = [row(1, 1, 1, 1, 1)]
    deep = write_run("tan/lam0.1/seed0", None, rows)
    first = write_run("a", None, rows)
    second = write_run("b/seed0", None, rows)
    write_run("a/inside", None, rows)  # a run holds no runs
    write_run("b/checkpoints/500", None, rows)
    sweep = tmp_path / "sweep"
    (sweep / "b" / "circle").symlink_to(sweep)
    (sweep / "c").symlink_to(deep)
    (sweep / "notes.txt").touch()
    assert find_runs([sweep]) == [first, second, sweep / "c", deep]
    with pytest.raises(ValueError, match="is no run directory and holds none"):
        find_runs([sweep / "notes.txt"])


def test_a_config_is_plain_data(write_run):
    nested = config(lam=1e-4, algorithm__future={"deep": [1, None]}, data__options=None)
    nested["interpolated"] = "${nowhere}"
    run_dir = write_run("a", nested, [])
    text = (run_dir / "config.yaml").read_text(encoding="utf-8")
    (run_dir / "config.yaml").write_text(text.replace("0.0001", "1e-4"), encoding="utf-8")
    (flat,) = read_configs([run_dir])
    assert flat["algorithm.lam"] == 1e-4, "a number also without a point"
    assert flat["algorithm.future.deep"] == [1, None]
    assert flat["data.options"] is None
    assert flat["interpolated"] == "${nowhere}"


def test_where_files_lie_is_no_part_of_a_run(write_run):
    run_dir = write_run("a", config() | {"stationarity": {"every": 5}}, [])
    made = make_run("a", run_dir, read_configs([run_dir])[0], [])
    assert set(made.config) == {
        "workers", "seed", "potential.name", "potential.eta", "algorithm.name", "algorithm.lam",
        "data.name", "model.name",
    }  # fmt: skip


def test_the_summary_says_m_where_the_config_does_not(write_run):
    for finished, workers, m in [(True, None, 8), (True, 2, 2), (False, None, None)]:
        name = f"{finished}-{workers}"
        run_dir = write_run(name, config(workers=workers), [], finished=finished, workers=8)
        assert make_run("a", run_dir, read_configs([run_dir])[0], []).config["workers"] == m


def test_no_configs_at_all_are_no_mistake_but_one_missing_is(write_run):
    a, b = write_run("a", None, []), write_run("b", None, [])
    c = write_run("c", config(), [])
    assert read_configs([a, b]) is None
    with pytest.raises(ValueError, match="is missing") as caught:
        read_configs([c, b])
    assert str(caught.value).startswith(f"{b}/config.yaml is missing")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"a: [1\n", "is no readable configuration: "),
        (b"\xff\xfe\x00", "is no readable configuration: "),
        (b"just words\n", "lacks potential.name"),
        (b"", "lacks potential.name"),
        (b"- 1\n", "lacks potential.name"),
        (b"potential: {name: null}\n", "lacks potential.name"),
        (b"potential: quad\n", "lacks potential.name"),
    ],
)
def test_a_damaged_config_is_named_in_one_line(write_run, content, complaint):
    run_dir = write_run("a", config(), [])
    (run_dir / "config.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.yaml") as caught:
        read_configs([run_dir])
    assert str(caught.value).startswith(f"{run_dir}/config.yaml {complaint}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["{", "3", '{"environment": 3}'])
def test_a_damaged_summary_is_named(write_run, content):
    run_dir = write_run("a", config(workers=None), [])
    (run_dir / "summary.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"summary\.json is damaged"):
        make_run("a", run_dir, read_configs([run_dir])[0], [])


# ---- grouping


def test_status():
    good = row(1, 1, 1, 1, 1)
    for last, finished, status in [
        (good, True, "finished"),
        (good, False, "unfinished"),
        (None, False, "unfinished"),
        (None, True, "unfinished"),
        (good | {"objective": None}, True, "diverged"),
        (good | {"test_loss": None}, False, "diverged"),
        (good | {"train_loss": float("inf")}, True, "diverged"),
        (good | {"train_loss": float("nan")}, True, "diverged"),
    ]:
        assert run(config(), last, finished).status == status
    early = Run("r", flatten(config()), [good | {"train_loss": None}, good], True)
    assert early.status == "finished", "the last evaluation counts"


def test_varying_keys():
    runs = [run(config(lam=0.1), None), run(config(lam=0.2, potential="cubic", seed=1), None)]
    assert varying(runs) == ["seed", "potential.name", "algorithm.lam"]
    assert chosen_keys(runs) == ["algorithm.lam"], "the seed is averaged, the name is the line's"
    with_option = run(config(potential__options={"eps": None}), None)
    assert varying([runs[0], with_option]) == ["potential.options.eps"], "absent is not null"
    assert varying([runs[0], runs[0]]) == []


def test_mean_and_sample_deviation_over_seeds():
    # 1, 2, 6: mean 3, deviations -2, -1, 3, squares 4 + 1 + 9 = 14, over 2 = 7
    runs = [run(config(seed=s), row(1, 1, 1, 1, e)) for s, e in enumerate((1.0, 2.0, 6.0))]
    (c,) = group_seeds(runs)
    mean = c.mean("test_error")
    assert mean.mean == 3.0
    assert mean.std == pytest.approx(7**0.5, rel=1e-15)
    assert mean.show("test_error") == "3.00 ± 2.65"
    assert c.seeds == "3"
    (one,) = group_seeds(runs[:1])
    assert one.mean("test_error").std is None
    assert one.mean("test_error").show("test_error") == "1.00"


def test_what_diverged_or_did_not_finish_enters_no_mean():
    runs = [
        run(config(seed=0), row(1, 1, 1, 1, 1.0)),
        run(config(seed=1), row(None, None, 90.0, None, 90.0)),
        run(config(seed=2), row(1, 1, 1, 1, 50.0), finished=False),
        run(config(seed=3), row(1, 1, 1, 1, 2.0)),
        run(config(seed=4), None, finished=False),
    ]
    (c,) = group_seeds(runs)
    assert c.mean("test_error").mean == 1.5
    assert c.seeds == "2 of 5"
    (line,) = make_lines(runs)
    assert line.counts() == (2, 3)


def test_a_repeated_seed_counts_once():
    runs = [
        run(config(), row(1, 1, 1, 1, 5.0)),
        run(config(), row(1, 1, 1, 1, 7.0)),
        run(config(), row(1, 1, 1, 1, 1.0), finished=False),
    ]
    (c,) = group_seeds(runs)
    assert (c.mean("test_error").mean, c.mean("test_error").std) == (7.0, None)
    assert c.seeds == "1"
    assert make_lines(runs)[0].counts() == (2, 1), "but every run is counted"


def test_the_order_of_lines():
    names = ["log_cosh", "log_sep", "tan", "quad", "tan_sep", "aaa", "log", "cubic"]
    runs = [run(config(algorithm__name=name), None) for name in ("msgd", "easgd")]
    runs += [run(config(potential=name), None) for name in names]
    assert [line.label for line in make_lines(runs)] == [
        "quad", "cubic", "tan", "tan_sep", "log", "log_sep", "aaa", "log_cosh", "EASGD", "mSGD",
    ]  # fmt: skip


def test_problems_keep_apart():
    last = row(1, 1, 1, 1, 1)
    runs = [run(config(data__name=name), last) for name in ("mnist", "digits")]
    assert [line.label for line in make_lines(runs)] == [
        "quad (digits, lenet5)",
        "quad (mnist, lenet5)",
    ]


# ---- Table 1

FIRST = row(9.0, 8.0, 0.3, 100.0, 0.9)
SECOND = row(7.0, 6.0, 0.5, 120.0, 0.8)


def test_part_one_takes_each_column_by_itself():
    runs = [
        run(config(lam=0.1), FIRST),
        run(config(lam=0.2), SECOND),
        run(config(lam=0.3), row(None, None, 0.0, None, 0.0)),
        run(config(lam=0.4), row(0, 0, 0, 0, 0), finished=False),
    ]
    assert part_one(make_lines(runs)) == [
        ["potential", "configurations", "objective", "train loss", "train error %", "test loss",
         "test error %", "runs: finished / diverged or unfinished"],
        ["quad", "4", "7", "6", "0.30", "100", "0.80", "2 / 2"],
    ]  # fmt: skip


def test_part_one_compares_means_of_seeds():
    # test errors 1 and 3 (mean 2, std sqrt 2) against 1.9: one lucky seed is not the best
    runs = [run(config(lam=0.1, seed=s), row(1, 1, 1, 1, e)) for s, e in ((0, 1.0), (1, 3.0))]
    other = run(config(lam=0.2), row(2, 2, 2, 2, 1.9))
    (line,) = make_lines([*runs, other])
    assert line.lowest("test_error").mean == 1.9
    assert line.lowest("test_loss").mean == 1.0
    worse = run(config(lam=0.2), row(2, 2, 2, 2, 2.5))
    (line,) = make_lines([*runs, worse])
    assert part_one([line])[1][-2:] == ["2.00 ± 1.41", "3 / 0"]


def test_part_two_is_one_configuration():
    runs = [run(config(lam=0.1), FIRST), run(config(lam=0.2), SECOND)]
    runs += [run(config(potential="tan", lam=0.1), None, finished=False)]
    lines, keys = make_lines(runs), chosen_keys(runs)
    assert part_two(lines, keys) == [
        ["potential", "seeds", "objective", "train loss", "train error %", "test loss",
         "test error %", "algorithm.lam"],
        ["quad", "1", "7", "6", "0.50", "120", "0.80", "0.2"],
        ["tan", "-", "-", "-", "-", "-", "-", "-"],
    ]  # fmt: skip


@pytest.mark.parametrize("turn", [1, -1])
def test_ties_in_test_error_go_to_the_lower_test_loss(turn):
    runs = [
        run(config(lam=0.1), row(1, 1, 1, 120.0, 0.8)),
        run(config(lam=0.2), row(9, 9, 9, 110.0, 0.8)),
        run(config(lam=0.3), row(0, 0, 0, 1.0, 0.9)),
    ][::turn]
    (line,) = make_lines(runs)
    assert line.best().config["algorithm.lam"] == 0.2


def test_the_papers_numbers_stand_beside_its_own_problem_only():
    def cells(**others):
        runs = [run(config(p, **others), FIRST) for p in ("quad", "cubic", "tan", "tan_sep")]
        return part_one(make_lines(runs))

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
    mixed = make_lines([run(config(data__name=name), FIRST) for name in ("digits", "mnist")])
    assert [line[4:-1:2] for line in part_one(mixed)[1:]] == [
        ["-"] * 4,
        ["2.47", "0.00", "294", "0.65"],
    ]
    easgd = cells(data__name="mnist", algorithm__name="easgd")
    assert easgd[1][4:-1:2] == ["-"] * 4, "the paper's quad is not EASGD"


def test_the_screen_shows_both_parts():
    runs = [run(config("[red]", lam=lam, data__name="mnist"), FIRST) for lam in (0.1, 0.2)]
    runs += [run(config("tan", data__name="mnist"), SECOND)]
    written = io.StringIO()
    for table in screen_tables(make_lines(runs), chosen_keys(runs)):
        Console(file=written, width=120).print(table)
    text = re.sub(" +", " ", written.getvalue())
    assert "│ tan │ 7 │ 6 (0.83) │ 0.50 (0.00) │ 120 (301) │ 0.80 (0.62) │ 1 / 0 │" in text
    assert "│ [red] │ 9 │ 8 │ 0.30 │ 100 │ 0.90 │ 2 / 0 │" in text
    assert "│ tan │ 1 │ 0.80 │ 120 │ algorithm.lam=0.1 │" in text


def test_sensitivity_takes_the_best_over_the_rest():
    def at(lam, eta, sigma, error, finished=True):
        nested = config(lam=lam, potential__eta=eta, algorithm__sigma=sigma)
        return run(nested, row(1, 1, 1, 1, error), finished)

    runs = [
        at(0.2, 1.0, 1, 3.0),
        at(0.1, 1.0, 1, 2.0),
        at(0.1, 1.0, 2, 1.0),
        at(0.1, 1.0, 3, 0.0, finished=False),
        at(0.1, 0.5, 1, 0.0, finished=False),
        at(float("inf"), 0.5, 1, 9.0),
    ]
    (line,) = make_lines(runs)
    assert line.sensitivity() == {0.5: {0.1: None}, 1.0: {0.1: 1.0, 0.2: 3.0}}
    (line,) = make_lines(runs[::-1])
    assert line.sensitivity() == {0.5: {0.1: None}, 1.0: {0.1: 1.0, 0.2: 3.0}}


def test_markdown_escapes():
    assert markdown_table([["a|b", "c\nd"], ["\\|", "1"]]) == (
        "| a\\|b | c d |\n| --- | --- |\n| \\\\\\| | 1 |"
    )


# ---- figures


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


def pixels_of(path, colour):
    """How many pixels of a picture have a colour, up to the rounding of what shines through."""
    pixels = (imread(path)[..., :3] * 255).round().astype(int)
    return int((abs(pixels - np.array(colour)) <= 1).all(-1).sum())


BLUE, ORANGE, BLACK = (0x1F, 0x77, 0xB4), (0xFF, 0x7F, 0x0E), (0, 0, 0)
BLUE_BAND = (0xD2, 0xE4, 0xF0)  # a fifth of blue on white


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
    groups = figure1_groups(make_lines(runs))
    assert [(suffix, what, list(best)) for suffix, what, best in groups] == [
        ("_M4", ", M = 4", ["quad", "mSGD"]),
        ("_M8", ", M = 8", ["quad", "mSGD"]),
    ]
    assert groups[0][2]["quad"].config["algorithm.lam"] == 0.2
    (single,) = figure1_groups(make_lines([runs[0], runs[-1]]))
    assert single[:2] == ("", "")
    (alone,) = figure1_groups(make_lines(runs[-1:]))
    assert list(alone[2]) == ["mSGD"]
    other = run(config(workers=4, data__name="a/b"), last)
    suffixes = [g[0] for g in figure1_groups(make_lines([*runs, other]))]
    assert suffixes == ["_a-b_lenet5", "_digits_lenet5_M4", "_digits_lenet5_M8"]
    assert figure1_groups(make_lines([runs[3]])) == []


# ---- the folder and the command


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


@pytest.fixture
def blank_figures(monkeypatch):
    """Figures are built, but the files stay empty: that takes a tenth of the time."""
    monkeypatch.setattr(Figure, "savefig", lambda _, path, **__: path.write_bytes(b""))


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
        "table1.md", "table1.csv", "runs.csv", "report.md", "figure1.png", "figure1.pdf",
        "sensitivity.png", "sensitivity.pdf",
    }  # fmt: skip
    assert "last evaluation of each run" in out
    assert "1 without an evaluation" in out
    assert out.splitlines()[-2:] == [
        f"Table 1 and Figure 1 in {folder}/report.md",
        f"figure in {sweep}/report.png",
    ]
    # by hand: test error 0.9 and 0.5: mean 0.7, std 0.4 / sqrt 2 = 0.28
    part_one_rows = [
        "| quad | 2 | 7 | 6 | 0.30 ± 0.00 | 100 ± 0 | 0.70 ± 0.28 | 3 / 0 |",
        "| cubic | 2 | - | - | - | - | - | 0 / 2 |",
        "| mSGD | 1 | 50 | 50 | 5.00 | 500 | 5.00 | 1 / 0 |",
    ]
    part_two_rows = [
        "| quad | 2 | 9 ± 0 | 8 ± 0 | 0.30 ± 0.00 | 100 ± 0 | 0.70 ± 0.28 | 0.1 | 4 |",
        "| cubic | - | - | - | - | - | - | - | - |",
        "| mSGD | 1 | 50 | 50 | 5.00 | 500 | 5.00 | 0.1 | 1 |",
    ]
    table = (folder / "table1.md").read_text(encoding="utf-8")
    assert [line for line in table.splitlines() if re.match(r"\| (quad|cubic|mSGD)", line)] == (
        part_one_rows + part_two_rows
    )
    page = (folder / "report.md").read_text(encoding="utf-8")
    assert "6 runs from `sweep`: 4 finished, 1 diverged, 1 unfinished." in page
    assert all(line in page for line in part_one_rows + part_two_rows)
    assert "| data.name | digits |" in page
    assert "| algorithm.lam |" not in page.split("## What is the same")[1]
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
    assert (msgd["potential"], msgd["workers"], msgd["paper_test_error"]) == ("mSGD", "1", "")

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
        sweep, "--folder", tmp_path / "new" / "here", "--output", tmp_path / "one.pdf"
    )
    assert (code, err) == (0, "")
    assert (tmp_path / "new" / "here" / "report.md").exists()
    assert (tmp_path / "one.pdf").exists()
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
        "a", "config.yaml", "metrics.jsonl", "summary.json", "report.png",
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
def test_no_sensitivity_unless_lam_or_eta_varies(write_run, tmp_path):
    runs = [run(config(seed=s), FIRST) for s in (0, 1)]
    runs += [run(config(algorithm__name="msgd", lam=9.0), FIRST)]
    write_report(runs, tmp_path / "f", ["x"])
    assert not (tmp_path / "f" / "sensitivity.png").exists()
    assert "sensitivity" not in (tmp_path / "f" / "report.md").read_text(encoding="utf-8")
    runs += [run(config(potential__eta=2.0), FIRST)]
    write_report(runs, tmp_path / "f", ["x"])
    assert (tmp_path / "f" / "sensitivity.png").exists()


@pytest.mark.usefixtures("blank_figures")
def test_a_sweep_of_which_nothing_finished(command, write_run):
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
def test_the_command_refuses_in_one_line(command, sweep, write_run, tmp_path):
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
    code, out, err = command(sweep)
    assert (code, out) == (2, "")
    assert err.startswith(f"consensus.report: {c}/config.yaml is missing")
    assert err.count("\n") == 1
    (sweep / "cubic" / "a" / "metrics.jsonl").write_text("", encoding="utf-8")
    code, out, err = command(sweep / "cubic")
    assert (code, out) == (2, "")
    assert err == f"consensus.report: {sweep}/cubic/a/metrics.jsonl holds no evaluation yet\n"


def test_labels_are_as_short_as_they_may_be(tmp_path):
    x, y = tmp_path / "x", tmp_path / "y"
    paths = [x / "quad" / "seed0", x / "tan" / "seed0", x / "tan" / "seed1"]
    assert report.labels(paths, [x]) == ["quad/seed0", "tan/seed0", "seed1"]
    paths = [x / "quad" / "seed0", y / "quad" / "seed0"]
    assert report.labels(paths, [x, y]) == [str(path) for path in paths]


@pytest.mark.usefixtures("blank_figures")
def test_what_the_trainer_writes_is_what_is_read(make_config, tmp_path):
    trained = make_config(
        "experiment=smoke",
        "potential=tan",
        "algorithm.iterations=2",
        "output.tensorboard=false",
        "output.checkpoint_every=null",
        f"output.run_dir={tmp_path}/runs/tan",
    )
    last = Trainer(make_plan(trained, Launch()), Solo()).run()
    (run_dir,) = find_runs([tmp_path / "runs"])
    made = make_run("tan", run_dir, read_configs([run_dir])[0], read_rows(run_dir))
    assert (made.status, made.name, made.problem) == ("finished", "tan", ("digits", "lenet5"))
    assert made.config["workers"] == 1, "from summary.json: the config leaves it to the launch"
    assert not [key for key, value in made.config.items() if str(tmp_path) in str(value)]
    assert make_lines([made])[0].lowest("test_loss").mean == last["test_loss"]
