"""Sinks: metrics.jsonl, TensorBoard events, and a tracker of a plugin."""

import io
import json
import math
import os

import pytest
import yaml
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.plugins.hparams.metadata import (
    EXPERIMENT_TAG,
    SESSION_START_INFO_TAG,
    parse_experiment_plugin_data,
    parse_session_start_info_plugin_data,
)

from consensus.comm import Launch, Solo
from consensus.run import trainer
from consensus.run.plan import make_plan
from consensus.run.progress import Screen
from consensus.run.sinks import SINKS, JsonlSink, RunInfo, Sink, Sinks, TensorBoardSink

ROW = {
    "iteration": 20,
    "epoch": 0.25,
    "objective": 3.5,
    "train_loss": 3.0,
    "train_error": 12.5,
    "test_loss": 2.0,
    "test_error": 25.0,
    "regularizer": 0.25,
    "coupling": math.inf,
    "distance": [0.5, 0.75],
    "influence": [0.125, 8.0],
    "cuts_u": 4,
    "cuts_z": 9,
    "wall_s": 1.5,
    "samples_per_s": 800.0,
}


def open_sinks(run_dir, tensorboard=False, report=print, screen=None, **info):
    info = RunInfo(run_dir, ("conv1", "fc"), **info)
    return Sinks(info, tensorboard, report, screen)


def test_files_of_the_built_in_sinks(tmp_path):
    sinks = open_sinks(tmp_path, tensorboard=True)
    sinks.evaluation({**ROW, "iteration": 10, "coupling": 0.125})
    on_disk = (tmp_path / "metrics.jsonl").read_text()  # before it is closed
    assert on_disk.endswith("\n")
    assert [json.loads(line)["iteration"] for line in on_disk.splitlines()] == [10]
    sinks.evaluation(ROW)
    sinks.scalars({"training/s_u": 0.5}, 20)
    sinks.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[1]) == {**ROW, "coupling": None}

    assert scalars_of(tmp_path) == {
        "evaluation/objective": [(10, 3.5), (20, 3.5)],
        "evaluation/train_loss": [(10, 3.0), (20, 3.0)],
        "evaluation/train_error": [(10, 12.5), (20, 12.5)],
        "evaluation/test_loss": [(10, 2.0), (20, 2.0)],
        "evaluation/test_error": [(10, 25.0), (20, 25.0)],
        "objective/regularizer": [(10, 0.25), (20, 0.25)],
        "objective/coupling": [(10, 0.125), (20, math.inf)],
        "training/samples_per_s": [(10, 800.0), (20, 800.0)],
        "training/cuts_u": [(10, 4.0), (20, 4.0)],
        "training/cuts_z": [(10, 9.0), (20, 9.0)],
        "training/s_u": [(20, 0.5)],
        "workers_and_layers/distance/conv1": [(10, 0.5), (20, 0.5)],
        "workers_and_layers/distance/fc": [(10, 0.75), (20, 0.75)],
        "workers_and_layers/influence/worker_0": [(10, 0.125), (20, 0.125)],
        "workers_and_layers/influence/worker_1": [(10, 8.0), (20, 8.0)],
    }


def scalars_of(folder):
    """Of the files of one second and one process TensorBoard reads number 10 before number 9."""
    events = EventAccumulator(str(folder)).Reload()
    return {
        tag: sorted((e.step, e.value) for e in events.Scalars(tag))
        for tag in events.Tags()["scalars"]
    }


MEASURED = {
    "envelope_gradient": 0.5,
    "accuracy": 0.125,
    "consensus_residual": 2.0,
    "worker_residual": [3.0, 4.0],
    "translation_gap": [5.0, 1.0],
    "envelope_gradients": [0.25, 0.25],
    "force": [6.0, 7.0],
    "consensus_gap": [[8.0, 9.0], [10.0, 11.0]],
}


def test_tensorboard_shows_loss_and_error_first_and_names_the_equations(tmp_path):
    sink = TensorBoardSink(RunInfo(tmp_path, ("conv1", "fc")))
    sink.evaluation({**ROW, "stationarity": MEASURED})
    sink.scalars({"training/minibatch_loss": 1.0}, 20)
    sink.close()
    found = {tag: values[-1][1] for tag, values in scalars_of(tmp_path).items()}
    groups = sorted({tag.partition("/")[0] for tag in found})  # the order of the dashboard
    assert groups == ["evaluation", "objective", "stationarity", "training", "workers_and_layers"]
    assert {tag: value for tag, value in found.items() if tag.startswith("stationarity/")} == {
        "stationarity/accuracy": 0.125,
        "stationarity/consensus_residual_(5a)": 2.0,
        "stationarity/envelope_gradient_(13)": 0.5,
        "stationarity/translation_gap_(9)": 5.0,
        "stationarity/worker_residual_(5b)": 4.0,
    }
    assert found["workers_and_layers/worker_residual_(5b)/worker_0"] == 3.0
    assert found["workers_and_layers/consensus_gap/worker_1/conv1"] == 10.0


CONFIG = {
    "algorithm": {"lam": None, "sigma": 0.005, "schedule": {"sigma": {"options": {}}}},
    "potential": {"name": "tan", "eta": 2.0},
    "data": {"name": "digits", "root": "elsewhere"},
    "seed": 3,
    "output": {"root": "elsewhere"},
}


def test_tensorboard_has_the_config_and_the_best_number_once(tmp_path):
    info = {"config": CONFIG, "selection": ("test_error", "min")}
    first, second, third = ({**ROW, "iteration": t, "test_error": e} for t, e in
                            ((10, 20.0), (20, 5.0), (30, 9.0)))  # fmt: skip
    sink = TensorBoardSink(RunInfo(tmp_path, ("conv1", "fc"), **info))
    sink.evaluation(first)
    sink.evaluation(second)
    sink.close()
    sink = TensorBoardSink(RunInfo(tmp_path, ("conv1", "fc"), [first, second], 20, **info))
    sink.evaluation(third)
    sink.close()
    best = scalars_of(tmp_path)["evaluation/best_test_error"]
    assert best == [(10, 20.0), (20, 5.0), (30, 5.0)]

    events = [
        event
        for file in sorted(tmp_path.glob("events*"))
        for event in EventFileLoader(str(file)).Load()
    ]
    written = [value for event in events for value in event.summary.value]
    (text,) = [value for value in written if value.tag == "config/text_summary"]
    text = text.tensor.string_val[0].decode()
    assert text.startswith("```yaml\n")
    assert yaml.safe_load(text.strip("`").removeprefix("yaml")) == CONFIG
    plugin = [value for value in written if value.tag.startswith("_hparams_/")]
    assert [value.tag for value in plugin] == [EXPERIMENT_TAG, SESSION_START_INFO_TAG]
    experiment, start = (value.metadata.plugin_data.content for value in plugin)
    start = parse_session_start_info_plugin_data(start)
    shown = {key: value.string_value or value.number_value for key, value in start.hparams.items()}
    assert shown == {
        "algorithm.lam": "null",
        "algorithm.sigma": 0.005,
        "potential.name": "tan",
        "potential.eta": 2.0,
        "data.name": "digits",
        "seed": 3.0,
    }
    metrics = parse_experiment_plugin_data(experiment).metric_infos
    assert metrics[0].name.tag == "evaluation/best_test_error"


def test_the_best_number_may_be_the_highest(tmp_path):
    sink = TensorBoardSink(RunInfo(tmp_path, ("conv1", "fc"), selection=("test_accuracy", "max")))
    for t, accuracy in ((10, math.nan), (20, 5.0), (30, 9.0), (40, 7.0)):
        sink.evaluation({**ROW, "iteration": t, "test_accuracy": accuracy})
    sink.close()
    best = scalars_of(tmp_path)["evaluation/best_test_accuracy"]
    assert best == [(20, 5.0), (30, 9.0), (40, 9.0)]


def test_a_failure_of_tensorboard_ends_no_run(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("no space left")

    reported = []
    sinks = open_sinks(tmp_path, tensorboard=True, report=reported.append)
    monkeypatch.setattr(TensorBoardSink, "scalars", full)
    sinks.evaluation(ROW)
    sinks.evaluation({**ROW, "iteration": 30})
    sinks.close()
    cause = "OSError: no space left"
    assert reported == [f"sink `tensorboard` failed, the run continues without it: {cause}"]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_without_tensorboard_there_are_no_events(tmp_path):
    sinks = open_sinks(tmp_path)
    sinks.evaluation(ROW)
    sinks.scalars({"training/s_u": 0.5}, 20)
    sinks.sync()
    sinks.close()
    sinks.close()
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_evaluations_are_appended(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 1}\n{"iteration": 2}\n{"iter')
    sink = JsonlSink(RunInfo(tmp_path, ("conv1", "fc"), rows=[{"iteration": 1}]))
    sink.evaluation(ROW)
    sink.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == [1, 20]


@pytest.mark.parametrize(
    ("continues_after", "iterations"), [(None, [10, 20]), (10, [10, 20])], ids=["new", "same"]
)
def test_tensorboard_of_a_continued_run(tmp_path, continues_after, iterations):
    kept = {**ROW, "iteration": 10}
    if continues_after is not None:  # the killed run wrote an evaluation that is not kept
        before = TensorBoardSink(RunInfo(tmp_path, ("conv1", "fc")))
        for t in (10, 15):
            before.evaluation({**ROW, "iteration": t})
        before.close()
        (events,) = tmp_path.iterdir()  # files of one second are read in the order of their names
        events.rename(tmp_path / "events.out.tfevents.1700000000.host.1.0")
    sink = TensorBoardSink(RunInfo(tmp_path, ("conv1", "fc"), [kept], continues_after))
    sink.evaluation(ROW)
    sink.close()
    found = scalars_of(tmp_path)["workers_and_layers/distance/fc"]
    assert [step for step, _ in found] == iterations


def test_a_run_of_an_earlier_version_keeps_its_tensorboard_folder(tmp_path):
    (tmp_path / "tensorboard").mkdir()
    sink = TensorBoardSink(RunInfo(tmp_path, ("conv1", "fc"), [], 10))
    sink.evaluation(ROW)
    sink.close()
    assert [path.name for path in tmp_path.iterdir()] == ["tensorboard"]
    assert scalars_of(tmp_path / "tensorboard")["evaluation/train_loss"] == [(20, 3.0)]


def test_the_screen_is_a_sink(tmp_path):
    written = io.StringIO()
    sinks = open_sinks(tmp_path, screen=Screen(20, True, Console(file=written, soft_wrap=True)))
    sinks.evaluation(ROW)
    sinks.scalars({"training/s_u": 0.5}, 20)
    sinks.sync()
    sinks.close()
    assert written.getvalue().startswith("iteration     20  epoch   0.25  train loss 3 ")


# ---- a tracker of a plugin


class Tracker(Sink):
    """A sink as a plugin writes it."""

    def __init__(self, info):
        self.info, self.rows, self.values, self.calls = info, list(info.rows), [], []
        made.append(self)

    def evaluation(self, row):
        self.rows.append(row)

    def scalars(self, values, t):
        self.values.append((t, values))

    def sync(self):
        self.calls.append("sync")

    def close(self):
        self.calls.append("close")


made = []


@pytest.fixture
def register(monkeypatch):
    """`register(name, factory)`, undone after the test."""
    monkeypatch.setattr(SINKS, "_factories", dict(SINKS._factories))
    made.clear()
    return lambda name, factory: SINKS.register(name)(factory)


def test_a_registered_tracker_gets_what_a_run_writes(register, make_config, tmp_path):
    register("tracker", Tracker)
    config = make_config(
        *("experiment=smoke", "model=logistic", "device=cpu", "algorithm.iterations=4"),
        *("output.eval_every=2", "output.log_every=2", "output.checkpoint_every=2"),
        *("output.tensorboard=false", f"output.run_dir={tmp_path}/run"),
        *("algorithm.sigma=0.004", "algorithm.schedule.sigma.name=linear"),
    )
    last = trainer.Trainer(make_plan(config, Launch()), Solo()).run()
    (tracker,) = made
    assert (tracker.info.run_dir, tracker.info.continues_after) == (tmp_path / "run", None)
    assert tracker.info.config["algorithm"]["iterations"] == 4
    assert len(tracker.info.layer_names) == 1
    assert [row["iteration"] for row in tracker.rows] == [2, 4]
    assert tracker.rows[-1] == last
    assert [t for t, _ in tracker.values] == [2, 4]
    assert tracker.values[0][1].keys() >= {"training/minibatch_loss", "training/s_u"}
    # linear: 1 - t / 4 in iterations t = 1 and t = 3, the last before each entry
    sizes = [values["training/sigma"] for _, values in tracker.values]
    assert sizes == pytest.approx([0.003, 0.001])
    assert "training/tau" not in tracker.values[0][1], "constant"
    assert tracker.info.selection == ("test_error", "min")
    assert tracker.calls == ["sync", "sync", "close"]


def test_ten_lines_are_a_sink(register, tmp_path):
    class Errors(Sink):
        """Writes the test errors alone."""

        def __init__(self, info):
            self.path = info.run_dir / "errors.txt"

        def evaluation(self, row):
            with self.path.open("a") as file:
                file.write(f"{row['test_error']}\n")

    register("errors", Errors)
    sinks = open_sinks(tmp_path)
    sinks.evaluation(ROW)
    sinks.scalars({"training/s_u": 0.5}, 20)
    sinks.sync()
    sinks.close()
    assert (tmp_path / "errors.txt").read_text() == "25.0\n"


@pytest.mark.parametrize("broken", ["make", "evaluation", "scalars", "sync", "close"])
def test_a_tracker_that_fails_is_reported_once_and_dropped(register, tmp_path, broken):
    def fail(*_):
        raise RuntimeError("no\nconnection")

    register("broken", fail if broken == "make" else type("Broken", (Tracker,), {broken: fail}))
    register("tracker", Tracker)
    reported = []
    sinks = open_sinks(tmp_path, report=reported.append)
    for t in (10, 20):
        sinks.scalars({"training/s_u": 0.5}, t)
        sinks.evaluation({**ROW, "iteration": t})
        sinks.sync()
    sinks.close()
    cause = "RuntimeError: no connection"
    assert reported == [f"sink `broken` failed, the run continues without it: {cause}"]
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == [10, 20]
    assert [row["iteration"] for row in made[-1].rows] == [10, 20], "the other one goes on"
    assert made[-1].calls == ["sync", "sync", "close"]


def test_a_failure_of_metrics_jsonl_is_raised(tmp_path):
    with pytest.raises(FileNotFoundError):
        open_sinks(tmp_path / "absent")
