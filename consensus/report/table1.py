"""Table 1 as a list of records: runs -> configurations -> one record for each potential.

The runs of a configuration differ in their seed alone. The last evaluation of a run counts, and
only if the run is finished and has not diverged. Its columns are those of the runs, and the best
configuration is that of the lowest or highest number in the column that decides in these runs.
"""

import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from consensus.records import columns, format_cell, is_percent, number, set_and_metric
from consensus.report.runs import Run, canonical, for_ranks, varying

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
PAPER_COLUMNS = ("train_loss", "train_error", "test_loss", "test_error")
PAPER = {
    name: dict(zip(PAPER_COLUMNS, numbers, strict=True))
    for name, numbers in {
        "quad": ("2.47", "0.00", "294", "0.65"),
        "cubic": ("6.87", "0.00", "231", "0.56"),
        "tan": ("0.83", "0.00", "301", "0.62"),
    }.items()
}
PAPER_PROBLEM = ("mnist", "lenet5")
PAPER_JUDGED = ("cross_entropy", "test")

# Keys whose values the label of a record already states.
_NAMES = ("potential.name", "algorithm.name", "data.name", "model.name")


@dataclass(frozen=True)
class Mean:
    """Mean and sample standard deviation (over seeds - 1) of a number; None for one seed."""

    mean: float
    std: float | None

    def show(self, column: str) -> str:
        """The text in a table; with ± for several seeds, to two digits of their deviation."""
        if self.std is None:
            return format_cell(column, self.mean)
        return rounded(self.mean, self.std) or f"{format_cell(column, self.mean)} ± {self.std:.2g}"


def rounded(mean: float, std: float) -> str | None:
    """A mean to the digits that two digits of its deviation have, as 169.0 ± 1.6.

    None where a deviation of 0, or one far below the mean, gives no number of digits.
    """
    if not 0.0 < std < math.inf:
        return None
    largest = max(abs(mean), std)
    if largest > 1e6 * std or not math.isfinite(largest):
        return None
    exponent = math.floor(math.log10(largest))
    exponent = 0 if -4 <= exponent < 6 else exponent
    mean, std = mean / 10.0**exponent, std / 10.0**exponent
    last = math.floor(math.log10(float(f"{std:.1e}"))) - 1  # 0.0996 is 0.10: rounded before
    texts = [f"{round(value, -last):.{max(-last, 0)}f}" for value in (mean, std)]
    text = " ± ".join(texts)
    return text if exponent == 0 else f"({text})e{exponent}"


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

    @property
    def is_whole(self) -> bool:
        """Whether each of its seeds has a finished run."""
        return self.seeds == str(len(self.kept))

    @property
    def criterion(self) -> tuple[str, bool]:
        """The column that decides, and whether its highest number is the best."""
        run = next(iter((*self.kept.values(), *self.runs)))
        return run.column, run.is_highest(run.column)

    def mean(self, column: str, within_s: float = math.inf) -> Mean | None:
        """Mean over the seeds of a column of the last evaluation in the first `within_s` seconds.

        None where no seed is finished, or one has no finite number there.
        """
        values = []
        for run in self.kept.values():
            early = (row for row in reversed(run.rows) if not later(row, within_s))
            values.append(number(next(early, {}), column))
        if not values or not all(map(math.isfinite, values)):
            return None
        std = statistics.stdev(values) if len(values) > 1 else None
        return Mean(statistics.fmean(values), std)

    def rank(self, column: str) -> float:
        """The mean of a column, negated if the highest is the best: the best has the least rank."""
        mean = self.mean(column)
        if mean is None:
            return math.inf
        sign = -1.0 if next(iter(self.kept.values())).is_highest(column) else 1.0
        return sign * mean.mean

    def sort_key(self) -> tuple[float, float]:
        """The ranks in the column that decides, then in the loss on its set; the best has least."""
        column, _ = self.criterion
        return for_ranks(self.rank(column)), self.rank(loss_beside(column))


@dataclass(frozen=True)
class Record:
    """One line of Table 1. A mean is None where no run finished."""

    label: str  # the name, followed by the problem where the runs have several problems
    name: str  # of the potential, or of a method in METHODS
    # Names of the data and the model; the loss and the set where they vary.
    problem: tuple[str, ...]
    judged: tuple[str, str]  # the loss, and the set that decides
    configurations: Sequence[Configuration]  # all, also those without a finished run
    finished: int  # runs
    others: int  # runs that diverged or are unfinished
    column: str  # decides which configuration is the best
    highest: frozenset[str]  # the columns whose highest number is the best
    lowest: Mapping[str, Mean | None]  # column -> its lowest or highest mean over configurations
    best: Configuration | None  # of the least `sort_key`
    at_best: Mapping[str, Mean | None]  # column -> its mean at `best`
    chosen: Mapping[str, str | None]  # varying key -> its value at `best`; None: it has no such key
    paper: Mapping[str, str]  # column -> the number printed in the paper, for its own problem only


_Group = tuple[tuple[str, str], tuple[str, str], str]  # problem, judged and name of a record


def table1(runs: Sequence[Run]) -> list[Record]:
    """The records of Table 1: the paper's potentials in its order, then others, then METHODS."""
    groups: dict[_Group, list[Run]] = {}
    for run in runs:
        groups.setdefault((run.problem, run.judged, method_or_potential(run)), []).append(run)

    last_places = {name: i for i, name in enumerate(METHODS.values(), start=1)}

    def place(key: _Group) -> tuple[Any, ...]:
        problem, judged, name = key
        last = last_places.get(name, 0)
        known = PAPER_ORDER.index(name) if name in PAPER_ORDER else len(PAPER_ORDER)
        return problem, judged, last, known, name

    keys = chosen_keys(runs)
    several = len({(problem, judged) for problem, judged, _ in groups}) > 1
    records = []
    for problem, judged, name in sorted(groups, key=place):
        others = {other for of_problem, other, _ in groups if of_problem == problem}
        varied = zip(judged, zip(*others, strict=True), strict=True)
        full = (*problem, *(word for word, found in varied if len(set(found)) > 1))
        label = f"{name} ({', '.join(full)})" if several else name
        alike = [run for run in runs if (run.problem, run.judged) == (problem, judged)]
        decided = max(alike, key=lambda run: (run.status == "finished", bool(run.rows)))
        records.append(_record(label, name, full, groups[problem, judged, name], keys, decided))
    return records


def method_or_potential(run: Run) -> str:
    """The name of the record of a run."""
    baseline = METHODS.get(str(run.config.get("algorithm.name")))
    return baseline or str(run.config["potential.name"])


def _record(
    label: str,
    name: str,
    problem: tuple[str, ...],
    runs: Sequence[Run],
    keys: Sequence[str],
    decided: Run,
) -> Record:
    """A record; the column that decides is that of the run `decided` of its problem."""
    configurations = group_seeds(runs)
    ranked = [c for c in configurations if c.is_whole] or [c for c in configurations if c.kept]
    best = min(ranked, key=Configuration.sort_key, default=None)
    finished = [run for run in runs if run.status == "finished"]
    shown = columns(run.rows[-1] for run in runs if run.rows)[2:]  # after iteration and epoch
    of_paper = (runs[0].problem, runs[0].judged) == (PAPER_PROBLEM, PAPER_JUDGED)
    return Record(
        label,
        name,
        problem,
        runs[0].judged,
        configurations,
        len(finished),
        others=len(runs) - len(finished),
        column=decided.column,
        highest=frozenset(filter(decided.is_highest, shown)),
        lowest={column: best_mean(ranked, column) for column in shown},
        best=best,
        at_best={column: best.mean(column) if best else None for column in shown},
        chosen={
            key: show(best.config[key]) if best and key in best.config else None for key in keys
        },
        paper=PAPER.get(name, {}) if of_paper else {},
    )


def best_mean(configurations: Iterable[Configuration], column: str) -> Mean | None:
    """The lowest mean of a column, or the highest; None where no configuration has one."""
    known = [c for c in configurations if c.mean(column) is not None]
    return min(known, key=lambda c: c.rank(column)).mean(column) if known else None


def later(row: Mapping[str, Any], seconds: float) -> bool:
    """Whether a run made this evaluation more than `seconds` after its start."""
    return number(row, "wall_s") > seconds


def loss_beside(column: str) -> str:
    """The column of the loss on the set of samples of another column."""
    return f"{set_and_metric(column)[0]}_loss"


def on_test_set(column: str) -> str:
    """The column of the same loss or metric on the test set."""
    return f"test_{set_and_metric(column)[1]}"


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


def shortest(records: Iterable[Record]) -> float:
    """The seconds of the fastest run among the best configurations; nan if one is unknown."""
    kept = [run for r in records if r.best for run in r.best.kept.values()]
    seconds = [number(run.rows[-1], "wall_s") for run in kept]
    return math.nan if any(map(math.isnan, seconds)) else min(seconds, default=math.nan)


def of_several_methods(records: Iterable[Record]) -> bool:
    """Whether the runs differ in `algorithm.name`."""
    return len({str(c.config.get("algorithm.name")) for r in records for c in r.configurations}) > 1


def of_the_paper(records: Iterable[Record]) -> bool:
    """Whether a record has the problem of the paper's Table 1."""
    return any((r.problem[:2], r.judged) == (PAPER_PROBLEM, PAPER_JUDGED) for r in records)


def result_columns(records: Iterable[Record]) -> list[str]:
    """The columns of Table 1: the objective, and all losses and metrics of the runs."""
    return columns(record.lowest for record in records)[2:]


def highest_columns(records: Sequence[Record]) -> list[str]:
    """The columns of Table 1 whose highest number is the best."""
    return [key for key in result_columns(records) if any(key in r.highest for r in records)]


def deciding_columns(records: Sequence[Record]) -> list[str]:
    """The columns that decide, each with the same metric on the test set, which is to be read."""
    found = [(r.column, on_test_set(r.column)) for r in _evaluated(records)]
    return list(dict.fromkeys(column for pair in found for column in pair))


def _evaluated(records: Sequence[Record]) -> Sequence[Record]:
    """The records whose column that decides is known; if there are none, all."""
    return [r for r in records if r.column in r.lowest] or records


def criteria(records: Sequence[Record], phrase: Callable[[str, bool], str]) -> str:
    """A phrase on what decides, from its column and whether the highest is the best.

    Where it is not the same for all records, one for each, after the problems that it is for.
    """
    problems: dict[tuple[str, bool], list[str]] = {}
    for r in _evaluated(records):
        name = f"({', '.join(r.problem)})"
        of = problems.setdefault((r.column, r.column in r.highest), [])
        of += [name] if name not in of else []
    if len(problems) == 1:
        return phrase(*next(iter(problems)))
    return "; ".join(f"for {' and '.join(of)} {phrase(*key)}" for key, of in problems.items())


def heading(column: str) -> str:
    """The heading of a column, with its unit."""
    return words(column) + " %" * is_percent(column)


def words(column: str, highest: bool = False) -> str:
    """A column in words, such as `test error` or `test accuracy (highest)`."""
    return column.replace("_", " ") + " (highest)" * highest


def of_held_out(column: str) -> str:
    """The remark that the validation set decides; "" if the test set does."""
    held_out = set_and_metric(column)[0] == "validation"
    return ", chosen on the validation set; test numbers are of that configuration" * held_out


def show_mean(mean: Mean | None, column: str) -> str:
    """A mean in a table; `-` where there is none."""
    return "-" if mean is None else mean.show(column)


def chosen_keys(runs: Sequence[Run]) -> list[str]:
    """The varying keys that distinguish the configurations of one record."""
    return [key for key in varying(runs) if key != "seed" and key not in _NAMES]


def show(value: Any) -> str:
    """A value of a config as YAML writes it."""
    return value if isinstance(value, str) else json.dumps(value, default=str)
