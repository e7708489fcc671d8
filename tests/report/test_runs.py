"""Finding and reading runs from files that are written here, by hand."""

import pytest

from consensus.comm import Launch, Solo
from consensus.records import read_rows
from consensus.report.runs import (
    Run,
    comparable_runs,
    deciding_column,
    find_runs,
    flatten,
    labels,
    panels,
    read_config,
    read_run,
    varying,
)
from consensus.report.table1 import chosen_keys, table1
from consensus.run.plan import make_plan
from consensus.run.trainer import Trainer
from tests.testing.made_runs import accuracies, config, evaluation, regression, row, row_at, run


def test_find_runs(tmp_path, write_run):
    b, a = write_run("b", None, [row_at(10)]), write_run("a", None, [row_at(10)])
    (tmp_path / "sweep" / "no-run").mkdir()
    parent = tmp_path / "sweep"
    assert find_runs([b]) == [b]
    assert find_runs([parent]) == [a, b]
    assert find_runs([b, parent, b]) == [b, a], "each once, in the order of the arguments"
    for wrong in (parent / "no-run", tmp_path / "absent"):
        with pytest.raises(ValueError, match="no run found here"):
            find_runs([a, wrong])


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
    with pytest.raises(ValueError, match="no run found here"):
        find_runs([sweep / "notes.txt"])


def test_runs_of_one_name_keep_apart(tmp_path):
    a, b = tmp_path / "x" / "seed0", tmp_path / "y" / "seed0"
    assert list(labels([a, b]).values()) == [str(a), str(b)]
    assert list(labels([a, tmp_path / "other"]).values()) == ["seed0", "other"]


def test_labels_are_as_short_as_they_may_be(tmp_path):
    x, y = tmp_path / "x", tmp_path / "y"
    paths = [x / "quad" / "seed0", x / "tan" / "seed0", x / "tan" / "seed1"]
    assert list(labels(paths, [x]).values()) == ["quad/seed0", "tan/seed0", "seed1"]
    paths = [x / "quad" / "seed0", y / "quad" / "seed0"]
    assert list(labels(paths, [x, y]).values()) == [str(path) for path in paths]


def test_a_config_is_plain_data(write_run):
    nested = config(lam=1e-4, algorithm__future={"deep": [1, None]}, data__options=None)
    nested["interpolated"] = "${nowhere}"
    run_dir = write_run("a", nested, [])
    text = (run_dir / "config.yaml").read_text(encoding="utf-8")
    (run_dir / "config.yaml").write_text(text.replace("0.0001", "1e-4"), encoding="utf-8")
    flat = read_config(run_dir)
    assert flat["algorithm.lam"] == 1e-4, "a number also without a point"
    assert flat["algorithm.future.deep"] == [1, None]
    assert flat["data.options"] is None
    assert flat["interpolated"] == "${nowhere}"


def test_keys_that_name_files_are_left_out(write_run):
    run_dir = write_run("a", config() | {"stationarity": {"every": 5}}, [])
    made = read_run("a", run_dir, [])
    assert set(made.config) == {
        "workers", "seed", "potential.name", "potential.eta", "algorithm.name", "algorithm.lam",
        "data.name", "model.name",
    }  # fmt: skip


def test_m_comes_from_the_summary_if_the_config_has_none(write_run):
    for finished, workers, m in [(True, None, 8), (True, 2, 2), (False, None, None)]:
        name = f"{finished}-{workers}"
        run_dir = write_run(name, config(workers=workers), [], finished=finished, workers=8)
        assert read_run("a", run_dir, []).config["workers"] == m


def test_no_configs_at_all_are_no_mistake_but_one_missing_is(write_run):
    a, b = write_run("a", None, []), write_run("b", None, [])
    c = write_run("c", config(), [])
    names = {a: "a", b: "b", c: "c"}
    left_out = {}
    assert comparable_runs({a: [], b: []}, names, [a, b], left_out) == []
    with pytest.raises(ValueError, match="is missing") as caught:
        comparable_runs({c: [], b: []}, names, [c, b], left_out)
    assert str(caught.value).startswith(f"{b}/config.yaml is missing")
    assert left_out == {}
    assert comparable_runs({c: [], b: []}, names, [c.parent], left_out) == []
    assert left_out == {b: str(caught.value)}


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"a: [1\n", "is no readable configuration: "),
        (b"\xff\xfe\x00", "is no readable configuration: "),
        (b"just words\n", "is no readable configuration: it holds no config"),
        (b"", "is no readable configuration: it holds no config"),
        (b"- 1\n", "is no readable configuration: it holds no config"),
        (b"potential: {name: null}\n", "lacks potential.name"),
        (b"potential: quad\n", "lacks potential.name"),
    ],
)
def test_a_damaged_config_is_named_in_one_line(write_run, content, complaint):
    run_dir = write_run("a", config(), [])
    (run_dir / "config.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.yaml") as caught:
        read_config(run_dir)
    assert str(caught.value).startswith(f"{run_dir}/config.yaml {complaint}")
    assert "\n" not in str(caught.value)


def test_the_summary_says_which_number_decides(write_run):
    """Runs of earlier versions are judged by the test error; evaluations tell the column alone."""
    rows = [accuracies(0.5, 0.5)]
    chosen = {"selection": {"column": "validation_accuracy", "goal": "max"}}
    for name, found, finished, column, highest in [
        ("new", chosen | {"goals": {"accuracy": "max", "nll": "min"}}, True, None, {"accuracy"}),
        ("other", chosen | {"goals": {"r2": "max"}}, True, None, {"accuracy", "r2"}),
        ("without goals", chosen, True, None, {"accuracy"}),
        ("unfinished", {}, False, None, set()),
        ("old", {}, True, "test_error", set()),
    ]:
        made = read_run("a", write_run(name, config(), rows, finished=finished, **found), rows)
        assert (made.column, made.highest) == (column or "validation_accuracy", highest)


@pytest.mark.parametrize(
    ("rows", "column"),
    [
        ([regression(1.0, 1.0)], "test_mse"),
        ([row(1, 1, 1, 1, 1)], "test_error"),
        ([evaluation({"train": {"loss": 1.0}, "test": {"loss": 1.0}})], "test_loss"),
        ([], "test_error"),
    ],
)
def test_the_column_that_decides(rows, column):
    assert deciding_column(rows) == column


def test_the_panels_of_a_figure():
    """The objective and the train loss, and the metric that decides on each set, of all runs."""
    losses = [evaluation({"train": {"loss": 1.0}, "test": {"loss": 1.0}})]
    sets = ["train_accuracy", "validation_accuracy", "test_accuracy"]
    both = ["objective", "train_loss"]
    assert panels([[accuracies(1.0, 1.0)]]) == [*both, *sets]
    assert panels([losses]) == [*both, "test_loss"]
    assert panels([[row(1, 1, 1, 1, 1)], [regression(1.0, 1.0)], []]) == [
        *both, "train_error", "test_error", "train_mse", "test_mse",
    ]  # fmt: skip


@pytest.mark.parametrize("content", ["{", "3", '{"environment": 3}', '{"selection": "error"}'])
def test_a_damaged_summary_is_named(write_run, content):
    run_dir = write_run("a", config(workers=None), [])
    (run_dir / "summary.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"summary\.json is damaged"):
        read_run("a", run_dir, [])


@pytest.mark.usefixtures("blank_figures")
def test_runs_written_by_the_trainer_are_read(make_config, tmp_path):
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
    made = read_run("tan", run_dir, read_rows(run_dir))
    assert (made.status, made.problem) == ("finished", ("digits", "lenet5"))
    assert made.config["workers"] == 1, "from summary.json: the config leaves it to the launch"
    assert not [key for key, value in made.config.items() if str(tmp_path) in str(value)]
    (record,) = table1([made])
    assert (record.name, record.lowest["test_loss"].mean) == ("tan", last["test_loss"])


# ---- comparing


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
        (good | {"diverged": True}, True, "diverged"),  # by the rule of the run
        (good | {"objective": 1e12}, True, "finished"),
        (good | {"objective": 5.9e36}, True, "diverged"),  # of a version without the mark
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
