"""Sinks: the places to which a run writes its evaluations and training scalars.

metrics.jsonl always, TensorBoard if `output.tensorboard`, the screen, and every sink that a module
in `plugins` registers. Another tracker is one class, as CONTRIBUTING.md shows.
"""

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from consensus.atomic_files import write_whole
from consensus.records import METRICS, Measurement, Row, to_json
from consensus.registry import Registry

BUILT_IN = ("jsonl", "tensorboard", "screen")
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
    """TensorBoard events in `tensorboard/`."""

    def __init__(self, info: RunInfo) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes a second; other ranks skip it

        threading.excepthook = _report_other_threads
        self._layer_names = info.layer_names
        t = info.continues_after
        purge = None if t is None else t + 1
        self._events = SummaryWriter(str(info.run_dir / "tensorboard"), purge_step=purge)
        for row in info.rows if t is None else ():
            self.evaluation(row)

    def evaluation(self, row: Row) -> None:
        """One scalar for each number, layer and worker."""
        scalars: dict[str, float | None] = {
            f"evaluation/{key}": value
            for key, value in row.items()
            if isinstance(value, float) and key not in ("epoch", "wall_s")
        }
        distances = zip(self._layer_names, row["distance"], strict=True)
        scalars |= {f"distance/{name}": value for name, value in distances}
        scalars |= {"cuts/u": row["cuts_u"], "cuts/z": row["cuts_z"]}
        if "stationarity" in row:
            scalars |= self._stationarity(row["stationarity"])
        self.scalars(scalars, row["iteration"])

    def _stationarity(self, found: Measurement) -> dict[str, float | None]:
        scalars: dict[str, float | None] = {
            f"stationarity/{k}": v for k, v in found.items() if isinstance(v, int | float)
        }
        for key in ("envelope_gradients", "worker_residual", "translation_gap", "force"):
            scalars |= {f"{key}/worker_{j}": value for j, value in enumerate(found[key])}
        for j, gaps in enumerate(found["consensus_gap"]):
            named = zip(self._layer_names, gaps, strict=True)
            scalars |= {f"consensus_gap/worker_{j}/{name}": gap for name, gap in named}
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


def _report_other_threads(failure: threading.ExceptHookArgs) -> None:
    """Print exceptions of threads but TensorBoard's, which raises its own again in `add_scalar`."""
    if not type(failure.thread).__module__.startswith("tensorboard"):
        threading.__excepthook__(failure)


class Sinks(Sink):
    """All sinks of a run behind the interface of one.

    A failure of a built-in sink is raised. A plugin's sink that fails is dropped, in one line to
    `report`. The screen is called last.
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
        """Report a failure of a plugin's sink and drop the sink."""
        try:
            yield
        except Exception as error:
            if name in BUILT_IN:
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
