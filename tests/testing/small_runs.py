"""Runs of two workers that take well below a second, and their evaluations."""

import json

SMALL = ["model=logistic", "device=cpu", "workers=2", "algorithm.batch_size=4", "potential=tan"]

PACE = ["algorithm.iterations=12", "output.eval_every=4", "output.checkpoint_every=6"]


def rows_of(run_dir):
    """The evaluations in metrics.jsonl, none before there is a file.

    A line without its end is being written.
    """
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def without_clocks(row):
    """A row without the entries that depend on the speed of the machine."""
    return {key: value for key, value in row.items() if key not in ("wall_s", "samples_per_s")}


def same_rows(run_dir, reference) -> bool:
    """Whether two runs have the same evaluations."""
    return list(map(without_clocks, rows_of(run_dir))) == list(
        map(without_clocks, rows_of(reference))
    )
