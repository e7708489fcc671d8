"""Runs: finding run directories, and reading their config, rows and status."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from consensus import stored_config
from consensus.records import (
    METRICS,
    SPLITS,
    NoEvaluationError,
    Row,
    columns,
    diverged,
    read_rows,
    set_and_metric,
)


@dataclass(frozen=True)
class Run:
    """One run; its config maps dotted keys to values, without the keys that name files.

    `workers` is M, from summary.json where config.yaml leaves it to the launch.
    """

    label: str  # in tables
    config: Mapping[str, Any]
    rows: Sequence[Row]  # the evaluations; empty if it ended before the first
    finished: bool  # whether it has a summary.json
    column: str = "test_error"  # decides which configuration is the best, by its last evaluation
    highest: frozenset[str] = (
        frozenset()
    )  # metrics whose highest number is the best, not the lowest
    settings: Mapping[str, Any] = field(default_factory=dict)
    """config.yaml as it is nested, but for the places of files; empty if it is not known."""

    @property
    def status(self) -> str:
        """finished, diverged (at the last evaluation) or unfinished."""
        if self.rows and diverged(self.rows[-1]):
            return "diverged"
        return "finished" if self.finished and self.rows else "unfinished"

    def is_highest(self, column: str) -> bool:
        """Whether the highest number of a column is the best."""
        return set_and_metric(column)[1] in self.highest

    @property
    def problem(self) -> tuple[str, str]:
        """Names of the data and the model: losses of different problems are not comparable."""
        return str(self.config.get("data.name", "?")), str(self.config.get("model.name", "?"))

    @property
    def judged(self) -> tuple[str, str]:
        """The loss, and the set of samples that decides: runs that differ here are not compared."""
        held_out = bool(self.config.get("data.validation"))
        loss = str(self.config.get("loss.name", "cross_entropy"))  # the only one of old versions
        return loss, "validation" if held_out else "test"


def find_runs(paths: Sequence[Path], left_out: dict[Path, str] | None = None) -> list[Path]:
    """The run directories among the paths and, sorted, at any depth below them.

    Run directories and `checkpoints` are not searched. A path without a run, or that cannot be
    read, is a ValueError. A folder below it that cannot be read is left out: `left_out` gets it,
    with the reason.
    """
    runs: list[Path] = []
    unread = {} if left_out is None else left_out
    for path in paths:
        found = _runs_in(path, unread)
        if path in unread:
            raise ValueError(unread[path])
        if not found:
            raise ValueError(f"{path}: no run found here (no {METRICS})")
        runs += [run for run in found if run not in runs]
    return runs


def is_run(path: Path) -> bool:
    """Whether a path is a run directory."""
    return (path / METRICS).exists()


def _runs_in(path: Path, unread: dict[Path, str]) -> list[Path]:
    try:
        if is_run(path):
            return [path]
        if not path.is_dir():
            return []
        # Links to folders may form a circle, so a link counts only if it is a run itself.
        inside = [p for p in sorted(path.iterdir()) if p.name != "checkpoints"]
        searched = [p for p in inside if not p.is_symlink() or is_run(p)]
    except OSError as error:  # such as lost+found at the top of a volume
        unread[path] = f"{path}: {error.strerror}"
        return []
    return [run for p in searched for run in _runs_in(p, unread)]


def labels(paths: Sequence[Path], folders: Sequence[Path] = ()) -> dict[Path, str]:
    """The name of each run directory, with more of its path where names coincide.

    The path below the first of the searched folders that holds the run may suffice.
    """
    names = [path.resolve().name for path in paths]
    inside = [
        next((str(path.relative_to(f)) for f in folders if f in path.parents), str(path))
        for path in paths
    ]
    return {
        path: name if names.count(name) == 1 else below if inside.count(below) == 1 else str(path)
        for name, below, path in zip(names, inside, paths, strict=True)
    }


def read_all(
    paths: Sequence[Path], named: Sequence[Path], left_out: dict[Path, str]
) -> dict[Path, list[Row]]:
    """The evaluations of each run; a ValueError if none has one, or a named one is damaged.

    A damaged run that was found beside others, and is not named on the command line itself, is left
    out: `left_out` gets it, with the reason. A run of a sweep may be waiting, or may have failed
    before its first evaluation. Such a run has no rows here, again unless it is named.
    """
    metrics: dict[Path, list[Row]] = {}
    missing: ValueError | None = None
    for path in paths:
        try:
            metrics[path] = read_rows(path)
        except ValueError as error:
            if path in named:
                raise
            missing = missing or error
            if isinstance(error, NoEvaluationError):
                metrics[path] = []
            else:
                left_out[path] = str(error)
    if missing is not None and not any(metrics.values()):
        raise missing
    return metrics


def comparable_runs(
    metrics: Mapping[Path, Sequence[Row]],
    names: Mapping[Path, str],
    named: Sequence[Path],
    left_out: dict[Path, str],
) -> list[Run]:
    """The runs with their configs, if there are two or more that differ; otherwise none.

    If only some have a config.yaml, or a file is damaged, these runs are left out as in `read_all`,
    or a ValueError where they are named.
    """
    if len(metrics) < 2 or not any((path / "config.yaml").exists() for path in metrics):
        return []
    runs = []
    for path, rows in metrics.items():
        try:
            runs.append(read_run(names[path], path, rows))
        except ValueError as error:
            if path in named:
                raise
            left_out[path] = str(error)
    return runs if varying(runs) else []


def read_run(label: str, run_dir: Path, rows: Sequence[Row]) -> Run:
    """A run from its directory and its evaluations."""
    path = run_dir / "summary.json"
    finished = path.exists()
    # Keys that name files or select output do not distinguish configurations.
    ignored = re.compile(r"resume$|data\.root$|output\.|stationarity\.")
    nested = _nested_config(run_dir)
    config = {key: v for key, v in flatten(nested).items() if not ignored.match(key)}
    column, goals = "test_error" if finished else deciding_column(rows), {}
    if finished:
        try:
            summary = json.loads(path.read_bytes())
            if config.get("workers") is None:
                config["workers"] = summary.get("environment", {}).get("workers")
            if "selection" in summary:  # earlier versions wrote none: by the test error
                column, goal = summary["selection"]["column"], summary["selection"]["goal"]
                goals = {set_and_metric(column)[1]: goal} | summary.get("goals", {})
        except (ValueError, AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error
    highest = frozenset(metric for metric, goal in goals.items() if goal == "max")
    settings = {key: value for key, value in nested.items() if key != "resume"}
    if isinstance(output := settings.get("output"), dict):
        places = ("run_dir", "root", "name")
        settings["output"] = {key: v for key, v in output.items() if key not in places}
    return Run(label, config, rows, finished, column, highest, settings)


def for_ranks(mean: float) -> float:
    """A mean to 12 digits, so that equal sums of percents over the seeds are a tie."""
    return float(f"{mean:.12g}")


def deciding_column(rows: Sequence[Row]) -> str:
    """The column that decides, from evaluations: the first metric, or without one the loss.

    It is that of the validation set, if there is one. The evaluations do not tell its goal.
    """
    keys = columns(rows)
    for samples in ("validation", "test"):
        of_set = [key for key in keys if set_and_metric(key)[0] == samples]
        metrics = [key for key in of_set if key != f"{samples}_loss"]
        if of_set:
            return (metrics or of_set)[0]
    return "test_error"


def panels(runs: Iterable[Sequence[Row]]) -> list[str]:
    """The columns that the figures of some runs show.

    They are the objective, the train loss, and the metric that decides in each run, on each set.
    """
    chosen = ["objective", "train_loss"]
    for rows in runs:
        _, metric = set_and_metric(deciding_column(rows))
        present = {key for row in rows for key in row}
        chosen += [key for samples in SPLITS if (key := f"{samples}_{metric}") in present]
    return list(dict.fromkeys(chosen))


def read_config(run_dir: Path) -> dict[str, Any]:
    """The config.yaml of a run by dotted key; a ValueError if it is damaged or has no potential.

    The values are plain data, checked against no schema: runs of other versions stay readable.
    """
    return flatten(_nested_config(run_dir))


def _nested_config(run_dir: Path) -> dict[str, Any]:
    path = run_dir / "config.yaml"
    try:
        nested = stored_config.read_config(path)
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing: its run cannot be placed in a table") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no readable configuration: {error}") from error
    if not isinstance(flatten(nested).get("potential.name"), str):
        raise ValueError(f"{path} lacks potential.name")
    return nested


def flatten(config: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, `{"a": {"b": 1}}` as `{"a.b": 1}`; lists are values."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat


def canonical(value: Any) -> str:
    """A text that is equal for equal values."""
    return json.dumps(value, sort_keys=True, default=str)


def varying(runs: Sequence[Run]) -> list[str]:
    """The keys whose values differ between runs, in the order of the configs."""
    values: dict[str, set[str]] = {key: set() for run in runs for key in run.config}
    for run in runs:
        for key, found in values.items():
            found.add(canonical(run.config[key]) if key in run.config else "")
    return [key for key, found in values.items() if len(found) > 1]
