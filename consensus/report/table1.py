"""Table 1 as a list of records: runs -> configurations -> one record for each potential.

The runs of a configuration differ in their seed alone. The last evaluation of a run counts, and
only if the run is finished and has not diverged.
"""

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from consensus.records import format_cell, number
from consensus.report.runs import RESULTS, Run, canonical, varying

PAPER_ORDER = ("quad", "cubic", "tan", "tan_sep", "log", "log_sep")
MSGD = "mSGD"
METHODS = {
    "easgd": "EASGD",
    "local_sgd": "local SGD",
    "fedprox": "FedProx",
    "lookahead": "Lookahead",
    "diloco": "DiLoCo",
    "ddp": "DDP",
    "msgd": MSGD,
}
"""`algorithm.name` -> the name of a method with records of its own, in their order."""

# Copied from the paper's Table 1 as printed: the best over 72 settings each. The paper's numbers
# for other potentials are not copied, and it prints no objective.
PAPER = {
    name: dict(zip(("train_loss", "train_error", "test_loss", "test_error"), numbers, strict=True))
    for name, numbers in {
        "quad": ("2.47", "0.00", "294", "0.65"),
        "cubic": ("6.87", "0.00", "231", "0.56"),
        "tan": ("0.83", "0.00", "301", "0.62"),
    }.items()
}
PAPER_PROBLEM = ("mnist", "lenet5")

HEADINGS = {key: key.replace("_", " ") + " %" * key.endswith("error") for key in RESULTS}

# Keys whose values the label of a record already states.
_NAMES = ("potential.name", "algorithm.name", "data.name", "model.name")


@dataclass(frozen=True)
class Mean:
    """Mean and sample standard deviation (over seeds - 1) of a number; None for one seed."""

    mean: float
    std: float | None

    def show(self, column: str) -> str:
        """The text in a table, with ± for several seeds."""
        mean = format_cell(column, self.mean)
        return mean if self.std is None else f"{mean} ± {format_cell(column, self.std)}"


@dataclass(frozen=True)
class Configuration:
    """The runs that differ in their seed alone."""

    runs: Sequence[Run]
    kept: Mapping[Any, Run]  # seed -> its last finished run, which alone counts

    @property
    def config(self) -> Mapping[str, Any]:
        """The shared config, with the seed of the first run."""
        return self.runs[0].config

    @property
    def seeds(self) -> str:
        """The number of finished seeds; `2 of 3` if a seed has no finished run."""
        tried = len({canonical(run.config.get("seed")) for run in self.runs})
        kept = len(self.kept)
        return str(kept) if kept == tried else f"{kept} of {tried}"

    def mean(self, column: str) -> Mean:
        """Mean over the seeds of a column of the last evaluation; one must be finished."""
        values = [number(run.rows[-1], column) for run in self.kept.values()]
        std = statistics.stdev(values) if len(values) > 1 else None
        return Mean(statistics.fmean(values), std)

    def sort_key(self) -> tuple[float, float]:
        """Mean test error, then mean test loss: the best configuration has the least."""
        return self.mean("test_error").mean, self.mean("test_loss").mean


@dataclass(frozen=True)
class Record:
    """One line of Table 1. A mean is None where no run finished."""

    label: str  # the name, followed by the problem where the runs have several problems
    name: str  # of the potential, or of a method in METHODS
    problem: tuple[str, str]  # names of the data and the model
    configurations: Sequence[Configuration]  # all, also those without a finished run
    finished: int  # runs
    others: int  # runs that diverged or are unfinished
    lowest: Mapping[str, Mean | None]  # column -> its lowest mean over the configurations
    best: Configuration | None  # of the least `sort_key`
    at_best: Mapping[str, Mean | None]  # column -> its mean at `best`
    chosen: Mapping[str, str | None]  # varying key -> its value at `best`; None: it has no such key
    paper: Mapping[str, str]  # column -> the number printed in the paper, for its own problem only


def table1(runs: Sequence[Run]) -> list[Record]:
    """The records of Table 1: the paper's potentials in its order, then others, then METHODS."""
    groups: dict[tuple[tuple[str, str], str], list[Run]] = {}
    for run in runs:
        baseline = METHODS.get(str(run.config.get("algorithm.name")))
        name = baseline or str(run.config["potential.name"])
        groups.setdefault((run.problem, name), []).append(run)

    last_places = {name: i for i, name in enumerate(METHODS.values(), start=1)}

    def place(key: tuple[tuple[str, str], str]) -> tuple[Any, ...]:
        problem, name = key
        last = last_places.get(name, 0)
        known = PAPER_ORDER.index(name) if name in PAPER_ORDER else len(PAPER_ORDER)
        return problem, last, known, name

    keys = chosen_keys(runs)
    several = len({problem for problem, _ in groups}) > 1
    records = []
    for problem, name in sorted(groups, key=place):
        label = f"{name} ({', '.join(problem)})" if several else name
        paper = PAPER.get(name, {}) if problem == PAPER_PROBLEM else {}
        records.append(_record(label, name, groups[problem, name], keys, paper))
    return records


def _record(
    label: str, name: str, runs: Sequence[Run], keys: Sequence[str], paper: Mapping[str, str]
) -> Record:
    configurations = group_seeds(runs)
    kept = [c for c in configurations if c.kept]
    best = min(kept, key=Configuration.sort_key, default=None)
    finished = sum(run.status == "finished" for run in runs)
    return Record(
        label,
        name,
        runs[0].problem,
        configurations,
        finished,
        others=len(runs) - finished,
        lowest={
            column: min((c.mean(column) for c in kept), key=lambda m: m.mean, default=None)
            for column in RESULTS
        },
        best=best,
        at_best={column: best.mean(column) if best else None for column in RESULTS},
        chosen={
            key: show(best.config[key]) if best and key in best.config else None for key in keys
        },
        paper=paper,
    )


def group_seeds(runs: Iterable[Run]) -> list[Configuration]:
    """The configurations of runs, in the order in which they appear."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        key = canonical({k: v for k, v in run.config.items() if k != "seed"})
        groups.setdefault(key, []).append(run)
    return [
        Configuration(
            group, {canonical(r.config.get("seed")): r for r in group if r.status == "finished"}
        )
        for group in groups.values()
    ]


def of_several_methods(records: Iterable[Record]) -> bool:
    """Whether the runs differ in `algorithm.name`."""
    return len({str(c.config.get("algorithm.name")) for r in records for c in r.configurations}) > 1


def of_the_paper(records: Iterable[Record]) -> bool:
    """Whether a record has the problem of the paper's Table 1."""
    return any(record.problem == PAPER_PROBLEM for record in records)


def show_mean(mean: Mean | None, column: str) -> str:
    """A mean in a table; `-` where no run finished."""
    return "-" if mean is None else mean.show(column)


def chosen_keys(runs: Sequence[Run]) -> list[str]:
    """The varying keys that distinguish the configurations of one record."""
    return [key for key in varying(runs) if key != "seed" and key not in _NAMES]


def show(value: Any) -> str:
    """A value of a config as YAML writes it."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def sensitivity(record: Record) -> dict[float, dict[float, float | None]]:
    """For each eta, lam -> the lowest mean test error, None where nothing finished.

    Configurations without a finite lam > 0, such as uncoupled workers, are left out.
    """
    found: dict[float, dict[float, float | None]] = {}
    for c in record.configurations:
        eta, lam = number(c.config, "potential.eta"), number(c.config, "algorithm.lam")
        if math.isfinite(eta) and 0.0 < lam < math.inf:
            of_eta = found.setdefault(eta, {})
            values = [of_eta.get(lam), c.mean("test_error").mean if c.kept else None]
            of_eta[lam] = min((v for v in values if v is not None), default=None)
    return {eta: dict(sorted(found[eta].items())) for eta in sorted(found)}
