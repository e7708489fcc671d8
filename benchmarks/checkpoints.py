"""The overhead of a checkpoint every 500 iterations.

    scripts/bench checkpoints --repetitions 3 --processes 2 --models lenet5 mlp25m

The same run with checkpoints and without, alternating, for lenet5 (5,500 iterations) and for
mlp25m, a perceptron of 25 million parameters (60 iterations with a checkpoint every 25, since one
checkpoint takes about a second on a CPU; its shares are scaled to one checkpoint in 500
iterations). The first checkpoint of a run imports torch.distributed.checkpoint, about 2 s of CPU,
which the figures include. Medians over the repetitions:

    iteration   seconds for one, without checkpoints
    slower      additional time of the run with checkpoints, with the work of its second thread
    wait        share of the time for which the training waited (for the copy, or for the previous
                checkpoint)
    write       seconds that the second thread took for one checkpoint

The runs have one worker in each process and lie in a folder that is removed.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import harness
from benchmarks.harness import BATCH

EVERY = 500  # iterations from one checkpoint to the next
COLUMNS = {"model": "<8", "iteration, s": ">12.4f", "slower, %": ">10.2f", "wait, %": ">9.2f",
           "write, s": ">9.2f"}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A run: its iterations, the iterations from one checkpoint to the next, and its overrides."""

    iterations: int
    every: int
    overrides: tuple[str, ...]


CASES = {
    "lenet5": Case(5500, 500, ("model=lenet5",)),
    "mlp25m": Case(60, 25, ("model=mlp", "model.options.hidden=[4096,4096,1152]")),
}


def train(case: Case, every: int | None, processes: int, folder: Path) -> dict[str, Any]:
    """The summary.json of a run with a checkpoint at these iterations, or without checkpoints.

    Raises:
        SystemExit: If it fails; its output is on stderr.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={processes}", "-m", "consensus.train", "potential=tan"]
    command += ["device=cpu", "output.tensorboard=false", "output.log_every=1000"]
    command += [f"output.run_dir={folder}", f"algorithm.iterations={case.iterations}"]
    command += [f"output.eval_every={case.iterations}", *case.overrides]
    command += [f"output.checkpoint_every={'null' if every is None else every}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stdout + done.stderr, file=sys.stderr)
        raise SystemExit(f"scripts/bench checkpoints: a run in {folder.name} has failed")
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return summary


def training_s(run: dict[str, Any]) -> float:
    """Seconds without start-up and evaluations; the one evaluation is at the end."""
    return run["iteration"] * BATCH * run["environment"]["workers"] / run["samples_per_s"]


@dataclass
class Row:
    """The medians of one model; `slower` and `wait` are shares in percent."""

    model: str
    iteration_s: float
    slower: float
    wait: float
    write_s: float


def row_of(model: str, every: int, pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> Row:
    """The medians over pairs of summaries, with checkpoints and without."""
    iterations = pairs[0][0]["iteration"]
    iteration = median(training_s(without) / iterations for _, without in pairs)
    during = (iterations - 1) // every  # the checkpoint at the very end is not training
    slower = median((training_s(run) - training_s(without)) / during for run, without in pairs)
    costs = [run["checkpoints"] for run, _ in pairs]
    wait = median(cost["wait_s"] / cost["written"] for cost in costs)
    write = median(cost["write_s"] / cost["written"] for cost in costs)
    share = 100 / (EVERY * iteration)
    return Row(model, iteration, share * slower, share * wait, write)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, measure, print, write."""
    parser = harness.parser("checkpoints")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--models", nargs="+", choices=CASES, default=list(CASES))
    options = parser.parse_args(arguments)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for model in options.models:
            case, pairs = CASES[model], []
            for i in range(options.repetitions):
                run, without = (
                    train(case, every, options.processes, Path(folder, f"{model}-{every}-{i}"))
                    for every in (case.every, None)
                )
                pairs.append((run, without))
                print(f"{model}: pair {i + 1} of {options.repetitions}", file=sys.stderr)
            rows.append(row_of(model, case.every, pairs))
    print(f"one checkpoint in {EVERY} iterations")
    cells = [(row.model, row.iteration_s, row.slower, row.wait, row.write_s) for row in rows]
    print(harness.table(COLUMNS, cells))
    harness.write_json(options.json, {"environment": harness.environment(), "rows": rows})


if __name__ == "__main__":
    main()
