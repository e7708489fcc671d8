"""What is measured at an evaluation, and the files it goes to.

One evaluation is one JSON object. The sums over workers, images and ranks travel in one all-reduce:
each rank evaluates u on its share of both data sets and adds what its own workers contribute.

    train_loss, test_loss    data loss of u, summed over the set
    train_error, test_error  percent
    coupling                 (1 / lam) phi(u - z_j), mean over the M workers
    objective                train_loss + R(u) + coupling: F of (15) over M, not multiplied by M
    distance                 |u - z_j| of each layer, mean over workers
    stationarity             where it was measured too: see run/stationarity.py
"""

import json
import math
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from consensus.algorithm import Algorithm, value_at
from consensus.atomic_files import write_whole
from consensus.comm import Group
from consensus.core.updates import coupling, regularizer
from consensus.run.plan import Plan

Row = dict[str, Any]


def measure(
    algorithm: Algorithm,
    plan: Plan,
    group: Group,
    t: int,
    evaluated: tuple[Tensor, Tensor] | None = None,
) -> Row:
    """Evaluate u and the consensus after t iterations. A collective; the same row on all ranks.

    Args:
        algorithm: What is measured.
        plan: Of the run.
        group: Its processes.
        t: How many iterations it has done.
        evaluated: What `Risk.evaluate` says of u on this rank's shares of the training and the test
            set, where that is known.
    """
    data, u, z = plan.dataset, algorithm.u, algorithm.worker.z
    lam = value_at(algorithm.lam, max(0, t - 1))
    cuts = algorithm.cuts.double()
    if group.rank > 0:
        cuts[0] = 0.0  # s_u is the same on all ranks: count it once
    if evaluated is None:
        evaluated = (
            plan.risk.evaluate(u, *_share(group, data.train_images, data.train_labels)),
            plan.risk.evaluate(u, *_share(group, data.test_images, data.test_labels)),
        )
    parts = [
        *evaluated,
        coupling(algorithm.phi, u, z, lam).double().sum().unsqueeze(0),
        cuts,
        algorithm.phi.distance(u - z).double().sum(0),
    ]
    total = group.sum_(torch.cat(parts)).tolist()
    train_loss, train_wrong, test_loss, test_wrong, coupling_sum, cuts_u, cuts_z = total[:7]
    mean_coupling = coupling_sum / plan.num_workers
    r = float(regularizer(u.double(), plan.config.algorithm.weight_decay))
    return {
        "iteration": t,
        "epoch": plan.epochs(t),
        "objective": train_loss + r + mean_coupling,
        "train_loss": train_loss,
        "train_error": 100.0 * train_wrong / len(data.train_labels),
        "test_loss": test_loss,
        "test_error": 100.0 * test_wrong / len(data.test_labels),
        "regularizer": r,
        "coupling": mean_coupling,
        "distance": [sum_j / plan.num_workers for sum_j in total[7:]],
        "cuts_u": int(cuts_u),
        "cuts_z": int(cuts_z),
    }


def _share(group: Group, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """This rank's contiguous share of a data set."""
    return (
        torch.tensor_split(images, group.size)[group.rank],
        torch.tensor_split(labels, group.size)[group.rank],
    )


METRICS = "metrics.jsonl"


def rows_until(run_dir: Path, t: int) -> list[Row]:
    """The evaluations of a run up to iteration t, in order, each once.

    A run that was killed may have written more of them, and its last line in part.
    """
    try:
        lines = (run_dir / METRICS).read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    rows: list[Row] = []
    for line in lines:
        try:
            row = json.loads(line)
            after = row["iteration"] > (rows[-1]["iteration"] if rows else 0)
        except (ValueError, TypeError, KeyError):
            continue
        if after and row["iteration"] <= t:
            rows.append(row)
    return rows


class MetricsFiles:
    """metrics.jsonl and TensorBoard events of a run; rank 0 alone makes one.

    Args:
        run_dir: Exists already.
        layer_names: Names of the L layers, for the distances.
        tensorboard: Whether to write events too.
        rows: The evaluations that a continued run keeps.
        continues_after: The iteration it continues after; TensorBoard then leaves out what the same
            directory holds of later ones. None: the directory is new.
    """

    def __init__(
        self,
        run_dir: Path,
        layer_names: tuple[str, ...],
        tensorboard: bool,
        rows: Sequence[Row] = (),
        continues_after: int | None = None,
    ) -> None:
        self._layer_names = layer_names
        path = run_dir / METRICS
        content = "".join(to_json(row) + "\n" for row in rows).encode()
        if path.exists() or content:
            write_whole(path, content)
        self._jsonl = path.open("a", encoding="utf-8")
        self._events = None
        if tensorboard:
            # Imported where it is used: the ranks above 0 need not spend the time.
            from torch.utils.tensorboard import SummaryWriter

            threading.excepthook = _tell_of_threads_but_tensorboards
            purge = None if continues_after is None else continues_after + 1
            self._events = SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge)
            if continues_after is None:
                for row in rows:
                    self._show(row)

    def evaluation(self, row: Row) -> None:
        """Append one evaluation, a line that is whole on disk when this returns."""
        self._jsonl.write(to_json(row) + "\n")
        self._jsonl.flush()
        self._show(row)

    def _show(self, row: Row) -> None:
        """One evaluation on TensorBoard."""
        scalars = {
            f"evaluation/{key}": value
            for key, value in row.items()
            if isinstance(value, float) and key not in ("epoch", "wall_s")
        }
        distances = zip(self._layer_names, row["distance"], strict=True)
        scalars |= {f"distance/{name}": value for name, value in distances}
        scalars |= {f"cuts/{key.removeprefix('cuts_')}": row[key] for key in ("cuts_u", "cuts_z")}
        if "stationarity" in row:
            scalars |= self._stationarity(row["stationarity"])
        self.scalars(scalars, row["iteration"])

    def _stationarity(self, found: Row) -> dict[str, float]:
        """What run/stationarity.py measures: numbers, and those of each worker and each layer."""
        scalars = {f"stationarity/{k}": v for k, v in found.items() if isinstance(v, int | float)}
        for key in ("envelope_gradients", "worker_residual", "translation_gap", "force"):
            scalars |= {f"{key}/worker_{j}": value for j, value in enumerate(found[key])}
        for j, gaps in enumerate(found["consensus_gap"]):
            named = zip(self._layer_names, gaps, strict=True)
            scalars |= {f"consensus_gap/worker_{j}/{name}": gap for name, gap in named}
        return scalars

    def scalars(self, values: Mapping[str, float | None], t: int) -> None:
        """Add numbers to TensorBoard at iteration t."""
        if self._events is not None:
            for key, value in values.items():
                if value is not None:  # a number that overflowed, read back from metrics.jsonl
                    self._events.add_scalar(key, value, t)

    def sync(self) -> None:
        """Everything so far to the disk: a checkpoint that appears after this relies on it."""
        self._jsonl.flush()
        os.fsync(self._jsonl.fileno())
        if self._events is not None:
            self._events.flush()

    def close(self) -> None:
        """Flush and close."""
        self._jsonl.close()
        if self._events is not None:
            self._events.close()


def _tell_of_threads_but_tensorboards(failure: threading.ExceptHookArgs) -> None:
    """TensorBoard raises what its writing thread met again, where we call it; once is enough."""
    if not type(failure.thread).__module__.startswith("tensorboard"):
        threading.__excepthook__(failure)


def to_json(row: Row, indent: int | None = None) -> str:
    """Strict JSON: a number that overflowed is null, since JSON has no inf or nan."""
    return json.dumps(_finite(row), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
