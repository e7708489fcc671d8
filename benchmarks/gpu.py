"""An iteration on one GPU: kernel launches, memory traffic, and the overhead on large models.

    scripts/bench gpu --json gpu.json --trace traces --models resnet50 gpt2
    python -m benchmarks.gpu ...          the same in the current environment

Three parts, each with a table:

    lenet5   4 workers on one device, LeNet-5, batch 20: a step is some hundred small kernels, and
             launching them takes longer than running them. `Consensus.step` is timed as it is, and
             recorded as a CUDA graph and replayed (consensus/replay.py), as in a run. The
             gradients are computed worker by worker; side by side, each worker on a stream of its
             own; or in one pass, the convolutions grouped or as products of matrices, which sums
             in another order.
    vector   lines 3 and 6 alone on large vectors (benchmarks/gpu_vectors.py)
    models   --models: the overhead of the coupling on large models (benchmarks/gpu_models.py)

All parts run on a CPU as well (--device cpu). There are no CUDA graphs there: the step that would
be captured runs eagerly, from the same fixed memory. Times are medians over blocks of calls.
"""

import argparse
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_models, gpu_vectors, harness
from benchmarks.gpu_models import MODELS, model_rows
from benchmarks.gpu_vectors import MODES, TABLE_2, vector_rows
from benchmarks.harness import (
    BATCH,
    WORKERS,
    Call,
    Effort,
    MakeRisk,
    Problem,
    copy_bytes_per_s,
    counted,
    median_ms,
    require_finite,
    table,
)
from benchmarks.profiler import save_trace
from consensus.problem import BatchedRisk, Risk
from consensus.replay import Replay, cuda_graph

ITERATIONS = 30_000  # of the paper's runs
COLUMNS = {
    "potential": "<9", "gradients": "<9", "mode": "<7", "ms": ">9.3f", "steps/s": ">8.0f",
    "30,000 in s": ">12.1f", "syncs": ">6",
}  # fmt: skip


def host_syncs(call: Call, device: torch.device) -> int | None:
    """The number of host waits for the device in a call, as torch reports them; None on a CPU."""
    if device.type != "cuda":
        return None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing CUDA operation" in str(w.message) for w in caught)


GRADIENTS: dict[str, MakeRisk] = {
    "loop": Risk,
    "streams": Risk,
    "grouped": partial(BatchedRisk, convolutions="grouped"),
    "products": partial(BatchedRisk, convolutions="products"),
}
"""Computation of the K gradients: worker by worker, each on its own stream, or batched."""

VARIANTS = (
    ("loop", "plain"),
    ("loop", "eager"),
    ("loop", "graph"),
    ("streams", "graph"),
    ("grouped", "graph"),
    ("products", "graph"),
)
"""Gradients and mode: without the fused kernels, with them, and replayed."""


@dataclass
class StepRow:
    """The step of 4 workers with LeNet-5."""

    potential: str
    gradients: str
    mode: str
    ms: float
    steps_per_s: float
    seconds_for_30000: float
    host_syncs: int | None

    def cells(self) -> tuple[object, ...]:
        """By COLUMNS."""
        rates = (self.ms, self.steps_per_s, self.seconds_for_30000)
        return self.potential, self.gradients, self.mode, *rates, self.host_syncs


def step_rows(
    device: torch.device,
    potentials: Sequence[str],
    effort: Effort,
    num_images: int,
    trace: Path | None,
) -> list[StepRow]:
    """The step of each potential, eager and replayed, worker by worker and batched."""
    rows = []
    on_gpu = device.type == "cuda"
    for potential in potentials:
        for gradients, mode in VARIANTS:
            problem = Problem(num_images=num_images, device=device, make_risk=GRADIENTS[gradients])
            algorithm = problem.consensus(potential, range(WORKERS), fused=mode != "plain")
            step = algorithm.step
            if mode == "graph":
                record = cuda_graph if on_gpu else as_it_is
                step = Replay(algorithm, record=record, side_by_side=gradients == "streams").step
                mode = "graph" if on_gpu else "static"
            call = counted(step)
            fewer = Effort(effort.blocks, max(1, effort.calls // 5))
            ms = median_ms(call, device, effort if mode == "graph" else fewer)
            syncs = host_syncs(call, device)
            if trace and potential == potentials[-1]:
                save_trace(call, device, trace / f"lenet5-{potential}-{gradients}-{mode}.json")
            require_finite(algorithm)
            rows.append(
                StepRow(potential, gradients, mode, ms, 1e3 / ms, ITERATIONS * ms / 1e3, syncs)
            )
    return rows


def as_it_is(call: Call) -> Call:
    """Replacement of a CUDA graph on a CPU: the step runs again, from the same memory."""
    return call


def whole_number(text: str) -> int:
    """An integer, in scientific notation as well: 1e8."""
    value = float(text)
    if not value.is_integer() or value < 16:
        raise argparse.ArgumentTypeError(f"{text}; allowed: a whole number, at least 16")
    return int(value)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, measure, print, write."""
    parts = ["lenet5", "vector"]
    parser = harness.parser("gpu", quick="tiny sizes, on any machine", device=True)
    parser.add_argument("--parts", nargs="*", choices=parts, default=parts)
    parser.add_argument("--models", nargs="*", choices=list(MODELS), default=[])
    parser.add_argument("--potentials", nargs="+", choices=TABLE_2, default=list(TABLE_2))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="of vector")
    parser.add_argument("--n", type=whole_number, help="of vector: 1e8 on a GPU, 1e6 on a CPU")
    parser.add_argument("--trace", metavar="DIR", help="write chrome traces and print the kernels")
    options = parser.parse_args(arguments)
    device, quick = harness.device_of(options, parser), options.quick
    on_gpu = device.type == "cuda"
    n = options.n or (100_000 if quick else 100_000_000 if on_gpu else 1_000_000)
    trace = Path(options.trace) if options.trace else None
    harness.print_environment(device)
    content: dict[str, Any] = {"environment": harness.environment(device)}
    # Written after each part, since the next one may not fit into the memory.
    if "lenet5" in options.parts:
        effort = Effort(3, 5) if quick else Effort(5, 100 if on_gpu else 20)
        steps = step_rows(device, options.potentials, effort, 1_000 if quick else 60_000, trace)
        print(f"\nLeNet-5, {WORKERS} workers on one device, batch {BATCH}")
        print(table(COLUMNS, [row.cells() for row in steps]))
        content["lenet5"] = steps
        harness.write_json(options.json, content)
    if "vector" in options.parts:
        effort = Effort(3, 5) if quick else Effort(7, 10)
        copy = copy_bytes_per_s(device, n, effort)
        vectors = vector_rows(device, n, options.potentials, effort, copy, trace, options.modes)
        gpu_vectors.show(vectors, n, copy)
        content["vector"] = {"n": n, "copy_bytes_per_s": copy, "rows": vectors}
        harness.write_json(options.json, content)
    if options.models:
        effort = Effort(2, 2) if quick else Effort(5, 10)
        models = [row for name in options.models for row in model_rows(device, name, quick, effort)]
        gpu_models.show(models)
        content["models"] = models
        harness.write_json(options.json, content)


if __name__ == "__main__":
    main()
