"""Runs of `consensus.sweep` in this process, and stand-ins for the runs that it starts."""

import io
import json
import signal
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

from consensus.sweep import __main__ as entry

STAND_IN = """
import json, os, pathlib, re, signal, sys, time
keys = dict(text.split("=", 1) for text in sys.argv[1:])
run_dir = pathlib.Path(keys["output.run_dir"].strip("'"))
with (run_dir / "started").open("a") as file:
    print(json.dumps({"argv": sys.argv[1:], "env": dict(os.environ)}), file=file)
if keys["seed"] == "13":
    print("consensus.train: `seed` is 13; allowed: luck")
    print("more")
    sys.exit(2)
if keys["seed"] in ("14", "15"):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    (run_dir / "slow").write_text(str(os.getpid()))
    time.sleep(60)
row = dict.fromkeys(["epoch", "objective", "train_loss", "train_error", "test_loss"], 1.0)
iterations = int(re.search(r"  iterations: (\\d+)", (run_dir / "config.yaml").read_text())[1])
stop_at = int(keys.get("output.stop_at", iterations))
row |= {"iteration": stop_at, "test_error": float(keys["seed"])}
if "algorithm.lam" in keys:
    row["train_loss"] = float(keys["algorithm.lam"])
with (run_dir / "metrics.jsonl").open("a") as file:
    print(json.dumps(row), file=file)
if stop_at == iterations:
    (run_dir / "summary.json").write_text(json.dumps(row))
"""
"""A program in place of `consensus.train`: seed 13 fails, seeds 14 and 15 run until SIGTERM.

Its test error is the seed and its train loss lam.
"""

SLURM = """#!{python}
import pathlib, sys
name, *arguments = pathlib.Path(sys.argv[0]).name, *sys.argv[1:]
queue = pathlib.Path(sys.argv[0]).parent / "queue"
if name == "squeue":
    print(queue.read_text(), end="")
else:
    left = [line for line in queue.read_text().splitlines() if line not in arguments]
    queue.write_text("".join(line + chr(10) for line in left))
"""
"""A program in place of squeue and scancel, over a file with one job number per line."""


def call_sweep(*arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `python -m consensus.sweep`, in this process."""
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)}
    out, err, code = io.StringIO(), io.StringIO(), 0
    argv = mock.patch.object(sys, "argv", ["consensus.sweep", *arguments])
    try:
        with argv, redirect_stdout(out), redirect_stderr(err):
            entry.main()
    except SystemExit as left:
        code = left.code
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return code, out.getvalue(), err.getvalue()


def started(run_dir: Path) -> list[dict]:
    """The starts of a stand-in: its arguments and environment."""
    return [json.loads(line) for line in (run_dir / "started").read_text().splitlines()]
