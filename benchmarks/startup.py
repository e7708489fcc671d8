"""The time that a short run needs to its first iteration and to its end, beside torch's import.

    scripts/bench startup --processes 1 2 4 --rounds 5 --against ../before

Each round starts three programs in turn, as a user does: plain python for one process, torchrun for
several. The same number of processes, and torchrun, load the machine each time.

    torch alone     a program that only imports torch: the least that any run needs
    this checkout   `consensus.train experiment=smoke`, 20 iterations of LeNet-5
    against         the same in the checkout of `--against`, in the same Python environment

A plugin (benchmarks/startup_probe.py) notes the beginning of the first iteration on each rank.
Medians over the rounds, after a start of each program that does not count:

    first       seconds from the command to the first iteration, on the slowest rank
    end         seconds from the command to its end
    CPU         seconds of CPU time of a process before its first iteration: rank 0, and the mean
                of the others
    over torch  `first` less that of torch alone in the same round

The runs lie in a folder that is removed.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median

from benchmarks import harness

ROOT = Path(__file__).parents[1]
PROBE = Path(__file__).with_name("startup_probe.py")
TORCH, HERE, AGAINST = "torch alone", "this checkout", "against"
COLUMNS = {"processes": ">9", "program": "<14", "first, s": ">9.2f", "end, s": ">7.2f",
           "CPU, s": ">7.2f", "others": ">7.2f", "over torch, s": ">13.2f"}  # fmt: skip


@dataclass(frozen=True)
class Start:
    """One start of a program, in seconds."""

    first: float
    end: float
    cpu: float  # of rank 0
    others: float | None  # CPU time of the other ranks, the mean; None if there are none


def command(checkout: Path | None, processes: int, folder: Path) -> list[str]:
    """The command of a program: that of a checkout, or torch alone."""
    probe = folder / PROBE.name
    program = [str(probe)]
    if checkout is not None:
        program = ["-m", "consensus.train", "experiment=smoke", f"plugins=[{PROBE.stem}]"]
        program += ["device=cpu", f"output.run_dir={folder / 'run'}"]
    if processes == 1:
        return [sys.executable, *program]
    ranks = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [sys.executable, "-m", *ranks, *program]


def start(checkout: Path | None, processes: int) -> Start:
    """Start a program on so many processes and wait for its end.

    Raises:
        SystemExit: If it fails; its output is on stderr.
    """
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        shutil.copy(PROBE, folder)
        path = os.pathsep.join(str(p) for p in (checkout, folder) if p is not None)
        started = time.monotonic()
        done = subprocess.run(
            command(checkout, processes, folder),
            cwd=folder,
            env=os.environ | {"PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        end = time.monotonic() - started
        if done.returncode:
            print(done.stdout + done.stderr, file=sys.stderr)
            raise SystemExit(f"scripts/bench startup: a start in {checkout or 'torch'} has failed")
        notes = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)]
    cpu, *others = [note["cpu_s"] for note in notes]
    first = max(note["clock"] for note in notes) - started
    return Start(first, end, cpu, fmean(others) if others else None)


@dataclass
class Row:
    """The medians of one program on some processes, in seconds."""

    processes: int
    program: str
    first: float
    end: float
    cpu: float
    others: float | None
    over_torch: float | None
    rounds: int

    def cells(self) -> tuple[object, ...]:
        """By COLUMNS."""
        times = (self.first, self.end, self.cpu, self.others, self.over_torch)
        return self.processes, self.program, *times


def row_of(processes: int, program: str, own: Sequence[Start], torch: Sequence[Start]) -> Row:
    """The medians of the starts of one program, beside those of torch alone in the same rounds."""
    over = [a.first - b.first for a, b in zip(own, torch, strict=True)]
    others = [s.others for s in own if s.others is not None]
    return Row(
        processes,
        program,
        median(s.first for s in own),
        median(s.end for s in own),
        median(s.cpu for s in own),
        median(others) if others else None,
        None if program == TORCH else median(over),
        len(own),
    )


def measure(checkouts: dict[str, Path | None], processes: int, rounds: int) -> list[Row]:
    """All programs on so many processes, in turn."""
    found: dict[str, list[Start]] = {name: [] for name in checkouts}
    for i in range(-1, rounds):  # the first round fills the caches
        for name, checkout in checkouts.items():
            made = start(checkout, processes)
            if i >= 0:
                found[name].append(made)
    return [row_of(processes, name, own, found[TORCH]) for name, own in found.items()]


def checkout_of(text: str) -> Path:
    """A folder with a package `consensus`, as argparse reads it."""
    path = Path(text).absolute()
    if not (path / "consensus" / "train.py").is_file():
        raise argparse.ArgumentTypeError(f"{text} is not allowed: no consensus/train.py is there")
    return path


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, measure, print, write."""
    parser = harness.parser("startup", quick="one round of one process")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--against", type=checkout_of, metavar="DIR", help="another checkout")
    options = parser.parse_args(arguments)
    if options.quick:
        options.processes, options.rounds = [1], 1
    checkouts: dict[str, Path | None] = {TORCH: None, HERE: ROOT}
    if options.against is not None:
        checkouts[AGAINST] = options.against
    rows: list[Row] = []
    for processes in options.processes:
        new = measure(checkouts, processes, options.rounds)
        head, *lines = harness.table(COLUMNS, [row.cells() for row in new]).splitlines()
        print("\n".join(lines if rows else [head, *lines]), flush=True)
        rows += new
    harness.write_json(options.json, {"environment": harness.environment(), "rows": rows})


if __name__ == "__main__":
    main()
