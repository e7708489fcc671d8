"""Sinks: the places to which a run writes its evaluations and training scalars.

metrics.jsonl always, TensorBoard if `output.tensorboard`, the screen, and every sink that a module
in `plugins` registers. Another tracker is one class, as CONTRIBUTING.md shows.
"""

import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from consensus.atomic_files import write_whole
from consensus.records import METRICS, Measurement, Row, columns, largest, number, to_json
from consensus.registry import Registry

NEEDED = ("jsonl", "screen")
"""The sinks whose failure is an error of the run."""
HPARAMS = ("potential", "algorithm", "workers", "seed", "data", "model", "loss", "dtype")
"""The sections of the config on TensorBoard's tab HPARAMS."""
DETAILS = "workers_and_layers"
"""The last group of tags on TensorBoard: numbers of single layers and workers."""
EQUATIONS = {
    "envelope_gradient": "envelope_gradient_(13)",
    "consensus_residual": "consensus_residual_(5a)",
    "worker_residual": "worker_residual_(5b)",
    "translation_gap": "translation_gap_(9)",
}
"""Keys of a measurement -> tags with the number of the equation in the paper."""
MINIBATCH_LOSS = "training/minibatch_loss"
"""The scalar that the screen shows between evaluations: mean over the workers of this rank."""


@dataclass(frozen=True)
class RunInfo:
    """The arguments of a sink."""

    run_dir: Path  # which exists; its name is the name of the run
    layer_names: Sequence[str]  # of the L layers, for the distances
    rows: Sequence[Row] = ()  # the evaluations that a continued run keeps
    continues_after: int | None = None  # an iteration: drop later entries; None: new directory
    config: Mapping[str, Any] = field(default_factory=dict)  # as nested dicts
    selection: tuple[str, str] | None = None  # the column that decides; its best is the min or max


class Sink:
    """A place for the numbers of a run, on rank 0. A method that is not overridden does nothing."""

    def evaluation(self, row: Row) -> None:
        """Write one evaluation."""

    def scalars(self, values: Mapping[str, float | None], t: int) -> None:
        """Write training scalars at iteration t; None: the number is not finite."""

    def sync(self) -> None:
        """Flush to the disk. A checkpoint is published after this; called from any thread."""

    def close(self) -> None:
        """Flush and close."""


SINKS: Registry[Sink] = Registry("sink", Sink)
"""Name -> factory, which may have the argument `info: RunInfo`."""


@SINKS.register("jsonl")
class JsonlSink(Sink):
    """metrics.jsonl: one row a line, whole on disk when `evaluation` returns."""

    def __init__(self, info: RunInfo) -> None:
        path = info.run_dir / METRICS
        content = "".join(to_json(row) + "\n" for row in info.rows).encode()
        if path.exists() or content:
            write_whole(path, content)
        self._file = path.open("a", encoding="utf-8")

    def evaluation(self, row: Row) -> None:
        """Append one line."""
        self._file.write(to_json(row) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Flush to the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Flush and close."""
        self._file.close()


@SINKS.register("tensorboard")
class TensorBoardSink(Sink):
    """TensorBoard events in the run directory, so that the run has its name on TensorBoard.

    The dashboard sorts groups of tags by name: `evaluation` is first, numbers of single layers and
    workers are last. A run directory of an earlier version has its events in `tensorboard/`.
    """

    def __init__(self, info: RunInfo) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes a second; other ranks skip it

        threading.excepthook = _report_other_threads
        self._info = info
        self._best: float | None = None
        earlier = info.run_dir / "tensorboard"
        folder = earlier if earlier.is_dir() else info.run_dir
        begun = any(folder.glob("events.out.tfevents.*"))
        t = info.continues_after
        self._events = SummaryWriter(str(folder), purge_step=None if t is None else t + 1)
        if info.config and not begun:
            text = OmegaConf.to_yaml(OmegaConf.create(dict(info.config)))
            self._events.add_text("config", f"```yaml\n{text}```", 0)
            self._events.flush()
        self._without_hparams = bool(info.config) and not (begun and info.rows)
        for row in info.rows:
            if t is None:
                self.evaluation(row)
            else:
                self._update_best(row)

    def evaluation(self, row: Row) -> None:
        """One scalar for each number, layer and worker; before the first, the hyperparameters."""
        values: Mapping[str, Any] = row
        shown = [key for key in columns([row]) if key not in ("iteration", "epoch")]
        scalars: dict[str, float | None] = {f"evaluation/{key}": values.get(key) for key in shown}
        if self._info.selection is not None:
            self._update_best(row)
            scalars[f"evaluation/best_{self._info.selection[0]}"] = self._best
        if self._without_hparams:
            self._hparams(list(scalars)[::-1])  # the best number is the first column
            self._without_hparams = False
        for group, keys in (
            ("objective", ("coupling", "regularizer")),
            ("training", ("samples_per_s", "cuts_u", "cuts_z")),
        ):
            scalars |= {f"{group}/{key}": values.get(key) for key in keys}
        scalars |= self._of_layers("distance", row["distance"])
        numbers = row.get("members")
        if "members" in row:
            scalars["training/workers"] = row["workers"]
        scalars |= _of_workers("influence", row.get("influence", ()), numbers)
        if "stationarity" in row:
            scalars |= self._stationarity(row["stationarity"], numbers)
        self.scalars(scalars, row["iteration"])

    def _update_best(self, row: Row) -> None:
        if self._info.selection is not None:
            key, goal = self._info.selection
            value = number(row, key)
            known = [x for x in (self._best, value) if x is not None and not math.isnan(x)]
            self._best = (min if goal == "min" else max)(known, default=None)

    def _hparams(self, metrics: Sequence[str]) -> None:
        """The entry of the run on the tab HPARAMS: its config, and the last value of the metrics.

        `SummaryWriter.add_hparams` would make another run for it.
        """
        from torch.utils.tensorboard.summary import hparams

        config = self._info.config
        values = dict(_flat({key: config[key] for key in HPARAMS if key in config}))
        experiment, start, _ = hparams(values, dict.fromkeys(metrics))
        file: Any = self._events.file_writer
        for summary in (experiment, start):
            file.add_summary(summary)

    def _of_layers(self, name: str, values: Sequence[float | None]) -> dict[str, float | None]:
        named = zip(self._info.layer_names, values, strict=True)
        return {f"{DETAILS}/{name}/{layer}": value for layer, value in named}

    def _stationarity(
        self, found: Measurement, numbers: Sequence[int] | None
    ) -> dict[str, float | None]:
        scalars: dict[str, float | None] = {
            f"stationarity/{EQUATIONS.get(k, k)}": v
            for k, v in found.items()
            if isinstance(v, int | float)
        }
        for key in ("worker_residual", "translation_gap"):
            scalars[f"stationarity/{EQUATIONS[key]}"] = largest(found[key])
        for key in ("envelope_gradients", "worker_residual", "translation_gap", "force"):
            scalars |= _of_workers(EQUATIONS.get(key, key), found[key], numbers)
        every = found["consensus_gap"]
        for j, gaps in zip(numbers or range(len(every)), every, strict=True):
            scalars |= self._of_layers(f"consensus_gap/worker_{j}", gaps)
        return scalars

    def scalars(self, values: Mapping[str, float | None], t: int) -> None:
        """Add the numbers at iteration t, without those that a file holds as null."""
        for key, value in values.items():
            if value is not None:
                self._events.add_scalar(key, value, t)

    def sync(self) -> None:
        """Flush the event file."""
        self._events.flush()

    def close(self) -> None:
        """Flush and close."""
        self._events.close()


def _of_workers(
    name: str, values: Sequence[float | None], numbers: Sequence[int] | None
) -> dict[str, float | None]:
    named = zip(numbers or range(len(values)), values, strict=True)
    return {f"{DETAILS}/{name}/worker_{j}": value for j, value in named}


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The numbers and texts in nested mappings, by dotted keys; other values as text.

    A null stays, as text: TensorBoard shows the keys of the first run alone.
    """
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif key not in ("root", "loader_workers"):  # no hyperparameters of the problem
            known = isinstance(value, int | float | str)
            yield f"{prefix}{key}", value if known else "null" if value is None else str(value)


def _report_other_threads(failure: threading.ExceptHookArgs) -> None:
    """Print exceptions of threads but TensorBoard's, which raises its own again in `add_scalar`."""
    if not type(failure.thread).__module__.startswith("tensorboard"):
        threading.__excepthook__(failure)


class Sinks(Sink):
    """All sinks of a run behind the interface of one.

    A failure of metrics.jsonl or the screen is raised. Another sink that fails, TensorBoard or that
    of a plugin, is dropped, in one line to `report`. The screen is called last.
    """

    def __init__(
        self,
        info: RunInfo,
        tensorboard: bool,
        report: Callable[[str], None],
        screen: Sink | None = None,
    ) -> None:
        self._report = report
        self._sinks: dict[str, Sink] = {}
        for name in SINKS:
            if name != "tensorboard" or tensorboard:
                with self._dropping(name):
                    self._sinks[name] = SINKS.make(name, **SINKS.completed(name, {}, info=info))
        if screen is not None:
            self._sinks["screen"] = screen

    @contextmanager
    def _dropping(self, name: str) -> Iterator[None]:
        """Report a failure of a sink that the run does not need, and drop the sink."""
        try:
            yield
        except Exception as error:
            if name in NEEDED:
                raise
            self._sinks.pop(name, None)
            cause = " ".join(f"{type(error).__name__}: {error}".split())
            self._report(f"sink `{name}` failed, the run continues without it: {cause}")

    def _each(self, call: Callable[[Sink], None]) -> None:
        for name, sink in list(self._sinks.items()):
            with self._dropping(name):
                call(sink)

    def evaluation(self, row: Row) -> None:
        """Write one evaluation."""
        self._each(lambda sink: sink.evaluation(row))

    def scalars(self, values: Mapping[str, float | None], t: int) -> None:
        """Write training scalars at iteration t."""
        self._each(lambda sink: sink.scalars(values, t))

    def sync(self) -> None:
        """Flush to the disk."""
        self._each(lambda sink: sink.sync())

    def close(self) -> None:
        """Flush and close; again: nothing."""
        self._each(lambda sink: sink.close())
        self._sinks.clear()
