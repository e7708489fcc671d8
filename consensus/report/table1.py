"""Table 1 from many runs: runs -> configurations -> one line a potential.

A configuration is what several seeds share: equal configs but for `seed` and for where files lie.
Of each run its last evaluation counts, and only of a run that is finished and has not diverged:
numbers of half a run, or the error of a model of NaNs, are no result of its configuration.
"""

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.table import Table
from rich.text import Text
from yaml import YAMLError  # type: ignore[import-untyped]

from consensus.records import Row, format_cell, number

# The columns of Table 1, and what stands above them.
HEADINGS = {
    "objective": "objective",
    "train_loss": "train loss",
    "train_error": "train error %",
    "test_loss": "test loss",
    "test_error": "test error %",
}
RUNS_HEADING = "runs: finished / diverged or unfinished"
PAPER_ORDER = ("quad", "cubic", "tan", "tan_sep", "log", "log_sep")
EASGD, MSGD = "EASGD", "mSGD"

# Typed from the paper's Table 1 as printed there; each is the best over 72 settings. Of the other
# potentials and of the objective nothing is typed.
PAPER = {
    "quad": {"train_loss": "2.47", "test_loss": "294", "test_error": "0.65", "train_error": "0.00"},
    "cubic": {
        "train_loss": "6.87",
        "test_loss": "231",
        "test_error": "0.56",
        "train_error": "0.00",
    },
    "tan": {"train_loss": "0.83", "test_loss": "301", "test_error": "0.62", "train_error": "0.00"},
}
PAPER_PROBLEM = ("mnist", "lenet5")

# What a line of Table 1 says by its name already.
_NAMES = ("potential.name", "algorithm.name", "data.name", "model.name")


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        label: Its name in tables.
        config: Dotted key -> value, without the keys that say where files lie. `workers` is M even
            where config.yaml left it to the launch, if the run's summary.json says it.
        rows: Its evaluations; none if it ended before the first.
        finished: Whether it has a summary.json.
    """

    label: str
    config: Mapping[str, Any]
    rows: Sequence[Row]
    finished: bool

    @property
    def status(self) -> str:
        """finished, diverged or unfinished; diverged: a number of the last evaluation is not."""
        if self.rows and not all(is_finite(self.rows[-1].get(column)) for column in HEADINGS):
            return "diverged"
        return "finished" if self.finished and self.rows else "unfinished"

    @property
    def problem(self) -> tuple[str, str]:
        """Names of the data and of the model: losses of different ones do not compare."""
        return str(self.config.get("data.name", "?")), str(self.config.get("model.name", "?"))

    @property
    def name(self) -> str:
        """The potential, or the baseline, whose quadratic potential is not what it is named for."""
        baselines = {"easgd": EASGD, "msgd": MSGD}
        algorithm = str(self.config.get("algorithm.name"))
        return baselines.get(algorithm, str(self.config["potential.name"]))


@dataclass(frozen=True)
class Mean:
    """A number over the seeds of a configuration.

    Attributes:
        mean: Over the seeds.
        std: The sample standard deviation (over seeds - 1); None for one seed.
    """

    mean: float
    std: float | None

    def show(self, column: str) -> str:
        """As the column shows it, with +- for several seeds."""
        mean = format_cell(column, self.mean)
        return mean if self.std is None else f"{mean} ± {format_cell(column, self.std)}"


@dataclass(frozen=True)
class Configuration:
    """The runs that differ in their seed alone.

    Attributes:
        runs: All of them.
        kept: Seed -> the run that counts; of repeated runs with one seed the last that is finished.
    """

    runs: Sequence[Run]
    kept: Mapping[Any, Run]

    @property
    def config(self) -> Mapping[str, Any]:
        """What the runs share, and the seed of the first."""
        return self.runs[0].config

    @property
    def seeds(self) -> str:
        """How many seeds the numbers are of; `2 of 3` if one has no finished run."""
        tried = len({canonical(run.config.get("seed")) for run in self.runs})
        kept = len(self.kept)
        return str(kept) if kept == tried else f"{kept} of {tried}"

    def mean(self, column: str) -> Mean:
        """A column of the last evaluations, over the seeds that count; there must be one."""
        values = [number(run.rows[-1], column) for run in self.kept.values()]
        std = statistics.stdev(values) if len(values) > 1 else None
        return Mean(statistics.fmean(values), std)


@dataclass(frozen=True)
class Line:
    """One line of Table 1.

    Attributes:
        label: The potential; with its problem behind it where the runs are of several problems.
        name: The potential, or mSGD, or EASGD.
        problem: Names of the data and of the model.
        configurations: All of them, also those without a finished run.
    """

    label: str
    name: str
    problem: tuple[str, str]
    configurations: Sequence[Configuration]

    @property
    def finished(self) -> list[Configuration]:
        """The configurations with a finished run."""
        return [c for c in self.configurations if c.kept]

    def counts(self) -> tuple[int, int]:
        """How many runs finished, and how many diverged or did not finish."""
        runs = [run for c in self.configurations for run in c.runs]
        finished = sum(run.status == "finished" for run in runs)
        return finished, len(runs) - finished

    def lowest(self, column: str) -> Mean | None:
        """The lowest mean of a column over all configurations; None if nothing finished."""
        means = [c.mean(column) for c in self.finished]
        return min(means, key=lambda mean: mean.mean, default=None)

    def best(self) -> Configuration | None:
        """The configuration with the lowest mean test error; of equal ones, test loss decides."""
        return best_of(self.finished)

    def paper(self, column: str) -> str:
        """What the paper's Table 1 prints there; `-` if it is not typed or another problem."""
        typed = PAPER.get(self.name, {}) if self.problem == PAPER_PROBLEM else {}
        return typed.get(column, "-")

    def sensitivity(self) -> dict[float, dict[float, float | None]]:
        """For each eta, lam -> the lowest mean test error, None where nothing finished.

        Configurations without a finite lam > 0, such as uncoupled workers, are left out.
        """
        found: dict[float, dict[float, float | None]] = {}
        for c in self.configurations:
            eta: Any = c.config.get("potential.eta")
            lam: Any = c.config.get("algorithm.lam")
            if not (is_finite(eta) and is_finite(lam) and lam > 0):
                continue
            of_eta = found.setdefault(float(eta), {})
            before = of_eta.get(float(lam))
            values = [before] if before is not None else []
            values += [c.mean("test_error").mean] if c.kept else []
            of_eta[float(lam)] = min(values, default=None)
        return {eta: dict(sorted(found[eta].items())) for eta in sorted(found)}


# ---- reading


def read_configs(run_dirs: Sequence[Path]) -> list[dict[str, Any]] | None:
    """The config.yaml of each run, by dotted key; None if not one of them has any.

    Plain data, checked against no schema: a run of another version stays readable.

    Raises:
        ValueError: If some have one and one has not, or one cannot be read or names no potential.
    """
    if not any((run_dir / "config.yaml").exists() for run_dir in run_dirs):
        return None
    return [_read_config(run_dir / "config.yaml") for run_dir in run_dirs]


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = OmegaConf.to_container(OmegaConf.load(path))
    except FileNotFoundError as error:
        raise ValueError(
            f"{path} is missing: without it the run has no place in a table"
        ) from error
    except (OSError, UnicodeDecodeError, YAMLError, OmegaConfBaseException) as error:
        cause = " ".join(str(error).split())
        raise ValueError(f"{path} is no readable configuration: {cause}") from error
    flat = flatten(config) if isinstance(config, dict) else {}
    if not isinstance(flat.get("potential.name"), str):
        raise ValueError(f"{path} lacks potential.name")
    return flat


def flatten(config: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, `{"a": {"b": 1}}` as `{"a.b": 1}`; lists are values."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat


def make_run(label: str, run_dir: Path, config: Mapping[str, Any], rows: Sequence[Row]) -> Run:
    """A run from what it left.

    Args:
        label: Its name in tables.
        run_dir: Where its summary.json is, once it is finished.
        config: Dotted key -> value.
        rows: Its evaluations.

    Raises:
        ValueError: If summary.json is damaged.
    """
    path = run_dir / "summary.json"
    finished = path.exists()
    kept = {key: value for key, value in config.items() if not _says_where(key)}
    if finished and kept.get("workers") is None:
        try:
            environment = json.loads(path.read_bytes()).get("environment", {})
            kept["workers"] = environment.get("workers")
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error
    return Run(label, kept, rows, finished)


def _says_where(key: str) -> bool:
    """Whether a key says where files lie or what is written, and nothing about the mathematics."""
    return key in ("resume", "data.root") or key.startswith(("output.", "stationarity."))


# ---- grouping


def is_finite(value: Any) -> bool:
    """Whether it is a number; metrics have null where one overflowed."""
    return isinstance(value, int | float) and math.isfinite(value)


def canonical(value: Any) -> str:
    """A text that is equal for equal values."""
    return json.dumps(value, sort_keys=True, default=str)


def varying(runs: Sequence[Run]) -> list[str]:
    """The keys whose values differ between runs, in the order of the configs."""
    keys = dict.fromkeys(key for run in runs for key in run.config)

    def values(key: str) -> set[str]:
        return {canonical(run.config[key]) if key in run.config else "" for run in runs}

    return [key for key in keys if len(values(key)) > 1]


def group_seeds(runs: Iterable[Run]) -> list[Configuration]:
    """Runs that differ in their seed alone together, in the order in which they appear."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        key = canonical({k: v for k, v in run.config.items() if k != "seed"})
        groups.setdefault(key, []).append(run)
    return [
        Configuration(
            group,
            {canonical(r.config.get("seed")): r for r in group if r.status == "finished"},
        )
        for group in groups.values()
    ]


def make_lines(runs: Sequence[Run]) -> list[Line]:
    """The lines of Table 1: the paper's potentials in its order, then others, EASGD, mSGD."""
    groups: dict[tuple[tuple[str, str], str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.problem, run.name), []).append(run)
    several = len({problem for problem, _ in groups}) > 1

    def place(key: tuple[tuple[str, str], str]) -> tuple[Any, ...]:
        problem, name = key
        last = {EASGD: 1, MSGD: 2}.get(name, 0)
        known = PAPER_ORDER.index(name) if name in PAPER_ORDER else len(PAPER_ORDER)
        return problem, last, known, name

    return [
        Line(
            f"{name} ({', '.join(problem)})" if several else name,
            name,
            problem,
            group_seeds(groups[problem, name]),
        )
        for problem, name in sorted(groups, key=place)
    ]


def best_of(configurations: Iterable[Configuration]) -> Configuration | None:
    """The one with the lowest mean test error, then test loss; each needs a finished run."""
    return min(
        configurations,
        key=lambda c: (c.mean("test_error").mean, c.mean("test_loss").mean),
        default=None,
    )


# ---- showing


def show(value: Any) -> str:
    """A value of a config as YAML writes it."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def chosen_keys(runs: Sequence[Run]) -> list[str]:
    """The varying keys that tell the configurations of one line apart."""
    return [key for key in varying(runs) if key != "seed" and key not in _NAMES]


def part_one(lines: Sequence[Line]) -> list[list[str]]:
    """The lowest value of each column by itself, over all configurations; headings first.

    The paper's numbers have columns of their own, if the runs are of its problem.
    """
    with_paper = any(line.problem == PAPER_PROBLEM for line in lines)
    columns = [
        (column, paper)
        for column in HEADINGS
        for paper in ((False, True) if with_paper and column != "objective" else (False,))
    ]
    headings = ["paper" if paper else HEADINGS[column] for column, paper in columns]
    cells = [["potential", "configurations", *headings, RUNS_HEADING]]
    for line in lines:
        cells.append([line.label, str(len(line.configurations))])
        for column, paper in columns:
            lowest = line.lowest(column)
            ours = "-" if lowest is None else lowest.show(column)
            cells[-1].append(line.paper(column) if paper else ours)
        cells[-1].append(" / ".join(map(str, line.counts())))
    return cells


def part_two(lines: Sequence[Line], keys: Sequence[str]) -> list[list[str]]:
    """Of each line the configuration best in test error, with its values of `keys`."""
    cells = [["potential", "seeds", *HEADINGS.values(), *keys]]
    for line in lines:
        best = line.best()
        if best is None:
            cells.append([line.label, *["-"] * (len(cells[0]) - 1)])
            continue
        values = [best.mean(column).show(column) for column in HEADINGS]
        chosen = [show(best.config[key]) if key in best.config else "" for key in keys]
        cells.append([line.label, best.seeds, *values, *chosen])
    return cells


def screen_tables(lines: Sequence[Line], keys: Sequence[str]) -> list[Table]:
    """Both parts for a terminal: the paper's numbers in brackets, hyperparameters as overrides."""
    first = [["potential", *HEADINGS.values(), "finished / not"]]
    second = [["potential", "seeds", HEADINGS["test_error"], HEADINGS["test_loss"], "with"]]
    for line in lines:
        first.append([line.label])
        for column in HEADINGS:
            lowest, paper = line.lowest(column), line.paper(column)
            ours = "-" if lowest is None else lowest.show(column)
            first[-1].append(ours if paper == "-" else f"{ours} ({paper})")
        first[-1].append(" / ".join(map(str, line.counts())))
        best = line.best()
        if best is None:
            second.append([line.label, *["-"] * 4])
            continue
        means = [best.mean(column).show(column) for column in ("test_error", "test_loss")]
        chosen = [f"{key}={show(best.config[key])}" for key in keys if key in best.config]
        second.append([line.label, best.seeds, *means, " ".join(chosen)])
    with_paper = any(line.problem == PAPER_PROBLEM for line in lines)
    title = "Table 1: the lowest of each column by itself" + " (the paper's)" * with_paper
    return [_screen_table(title, first), _screen_table("the best in test error", second)]


def _screen_table(title: str, cells: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title)
    for i, heading in enumerate(cells[0]):
        words = i == 0 or heading == "with"
        table.add_column(
            heading,
            justify="left" if words else "right",
            overflow="fold",
            min_width=max(len(row[0]) for row in cells) if i == 0 else None,
        )
    for row in cells[1:]:
        table.add_row(*map(Text, row))  # Text: a name may look like markup
    return table
