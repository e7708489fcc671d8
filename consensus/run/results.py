"""The files of a finished run: model.pt, summary.json and the pictures."""

import io
import platform
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from consensus.atomic_files import write_whole
from consensus.records import Row, to_json
from consensus.report.convergence import draw_run
from consensus.report.stationarity import draw_stationarity, measurements
from consensus.run.metrics import selection
from consensus.run.plan import Plan
from consensus.run.problem import model_options


def finish_run(
    run_dir: Path,
    rows: Sequence[Row],
    best: Mapping[str, float] | None,
    u: Tensor,
    plan: Plan,
    extra: Mapping[str, Any],
) -> None:
    """Write model.pt, the state dict of u (n,), and summary.json, which marks a run as finished.

    The summary repeats the last of the rows, and has what makes the model again; `extra` entries
    replace others of the same name.
    """
    buffer = io.BytesIO()
    torch.save(plan.risk.state_dict(u), buffer)
    write_whole(run_dir / "model.pt", buffer.getvalue())
    options = model_options(plan.config, plan.dataset)
    key, goal = selection(plan)
    own = {
        "best": best,
        "selection": {"column": key, "goal": goal},
        "goals": {name: metric.goal for name, metric in plan.risk.loss.metrics.items()},
        "model": {"name": plan.config.model.name, "options": options},
        "environment": environment(plan),
    }
    summary = {**rows[-1], **own, **extra}
    write_whole(run_dir / "summary.json", to_json(summary, indent=2).encode() + b"\n")


def draw_pictures(
    run_dir: Path,
    rows: Sequence[Row],
    say: Callable[[str], None],
    checkpoint_every: int | None = None,
) -> None:
    """Draw convergence.png, and stationarity.png if the run measured it, each as PDF too.

    A picture that fails costs a line to `say`, not the run: its results are complete before.
    """
    last, every = rows[-1]["iteration"], checkpoint_every
    checkpoints = [] if every is None else sorted({*range(every, last, every), last})
    measured = measurements(rows)
    pictures: dict[str, Callable[[Path], None]] = {
        "convergence.png": partial(draw_run, rows, title=run_dir.name, checkpoints=checkpoints)
    }
    if measured:
        pictures["stationarity.png"] = partial(draw_stationarity, {run_dir.name: measured})
    for name, draw in pictures.items():
        try:
            draw(run_dir / name)
        except Exception as error:
            cause = " ".join(f"{type(error).__name__}: {error}".split())
            say(f"{run_dir / name} was not drawn ({cause})")


def environment(plan: Plan) -> dict[str, Any]:
    """The software, the device and the layout of a run."""
    device = plan.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": str(device.type),
        "device_name": name or platform.machine(),
        "threads": torch.get_num_threads(),
        "processes": plan.launch.size,
        "workers": plan.num_workers,
        "backend": plan.backend if plan.launch.size > 1 else "none",
        "seed": plan.config.seed,
    }
