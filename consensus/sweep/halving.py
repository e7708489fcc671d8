"""Successive halving: the rungs of a sweep, and which configurations go on after each of them.

A rung is a number of iterations to which all runs that remain are trained. There they are ranked,
and the better part goes on to the next rung. A configuration is the runs that differ in their seed
alone: it is ranked by the mean over its seeds, and its runs go on or stop together. See Jamieson
and Talwalkar, Non-stochastic best arm identification and hyperparameter optimization, 2016.

A decision is a function of the rows of the runs at the rung. A repeated sweep therefore makes the
same decisions, and none is read from a file.
"""

import math
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from consensus.records import SPLITS, Row, diverged, last_row, number, rows_until, set_and_metric
from consensus.report.halving import FINISHED, KEPT, NO_NUMBER, STOPPED, Place
from consensus.report.runs import deciding_column, for_ranks
from consensus.run.checks import require
from consensus.run.config import Config
from consensus.run.health import ADVICE
from consensus.run.yaml_files import did_you_mean, nearest
from consensus.sweep.grid import Job, Sweep, SweepOptions, name_of, values_of, varying
from consensus.sweep.job import Status

OF_ALL_LOSSES = ("objective", "regularizer", "coupling")
"""Columns of metrics.jsonl that do not depend on the loss; the lowest number is the best."""


@dataclass(frozen=True)
class Rung:
    """A stage of a sweep: the iterations to which it trains, and the part that goes on then."""

    number: int  # from 1
    iterations: int
    keep: float | None  # a share below 1, or a number of configurations; None: the last rung

    def count(self, configurations: int) -> int:
        """The number of configurations of a group that go on, at most."""
        if self.keep is None:
            return configurations
        # Products such as 0.1 * 30 may be just above a whole number.
        share = math.ceil(self.keep * configurations - 1e-9)
        return share if self.keep < 1 else min(int(self.keep), configurations)

    def is_over(self, run_dir: Path) -> bool:
        """Whether a run needs no training to be ranked here; False at the last rung."""
        last = last_row(run_dir)
        reached = last is not None and last["iteration"] >= self.iterations
        return has_diverged(run_dir) or (reached and self.keep is not None)

    def row(self, run_dir: Path) -> Row | None:
        """The row that ranks a run here; None if it has not come as far and has not diverged.

        Of a run that went beyond the rung without a row there, it is the last one before, or else
        the first one.
        """
        rows = rows_until(run_dir, sys.maxsize)
        if not rows or not (diverged(rows[-1]) or rows[-1]["iteration"] >= self.iterations):
            return None
        return ([row for row in rows if row["iteration"] <= self.iterations] or rows[:1])[-1]


@dataclass(frozen=True)
class Candidate:
    """A configuration: its runs, which differ in their seed alone."""

    name: str
    group: str  # the values of `sweep.within`; "" without it
    goal: str  # min or max: the best number of the column
    jobs: tuple[Job, ...]


@dataclass(frozen=True)
class Halving:
    """The plan of a sweep with `sweep.halving`.

    Attributes:
        rungs: The last one is the end of the runs.
        candidates: All configurations.
        column: Ranks them; None: the one that decides in the runs.
        seeds: The runs of a configuration before the last rung, its first ones; None: all.
    """

    rungs: tuple[Rung, ...]
    candidates: tuple[Candidate, ...]
    column: str | None
    seeds: int | None = None

    def jobs(self, candidate: Candidate, rung: Rung) -> tuple[Job, ...]:
        """The runs of a configuration at a rung."""
        return candidate.jobs if rung.keep is None else candidate.jobs[: self.seeds]

    def decide(
        self, rung: Rung, candidates: Sequence[Candidate], rows: Mapping[Job, Row | None]
    ) -> list[Place]:
        """Rank the candidates of each group by the rows of their runs at a rung, the best first.

        A candidate without a finite number for each seed comes last and never goes on. Equal
        numbers keep the order of the grid.
        """
        places = []
        for group in dict.fromkeys(candidate.group for candidate in candidates):
            own = [candidate for candidate in candidates if candidate.group == group]
            found = [
                (candidate, *self._mean([rows[job] for job in self.jobs(candidate, rung)]))
                for candidate in own
            ]
            found.sort(key=lambda one: _rank(one[1], one[0].goal))
            for place, (candidate, mean, column) in enumerate(found, start=1):
                decision = KEPT if place <= rung.count(len(found)) else STOPPED
                decision = FINISHED if rung.keep is None else decision
                decision = decision if math.isfinite(mean) else NO_NUMBER
                at = (rung.number, rung.iterations, group, place, candidate.name)
                runs = len(self.jobs(candidate, rung))
                places.append(Place(*at, runs, column, mean, decision))
        return places

    def _mean(self, rows: Iterable[Row | None]) -> tuple[float, str]:
        """The mean over the seeds, nan if one has no number, and its column."""
        column, values = self.column or "", []
        for row in rows:
            if row is not None:
                column = column or deciding_column([row])
            values.append(math.nan if row is None or diverged(row) else number(row, column))
        return statistics.fmean(values), column

    def stopped(self, folder: Path) -> dict[Job, Rung]:
        """The runs in the folder of a sweep that are stopped, as far as all have come to a rung."""
        going, stopped = list(self.candidates), dict[Job, Rung]()
        for rung in self.rungs[:-1]:
            jobs = [job for candidate in going for job in self.jobs(candidate, rung)]
            if not all(rung.is_over(folder / job.name) for job in jobs):
                break
            rows = {job: rung.row(folder / job.name) for job in jobs}
            kept = kept_of(going, self.decide(rung, going, rows))
            out = [candidate for candidate in going if candidate not in kept]
            stopped |= {job: rung for candidate in out for job in candidate.jobs}
            going = kept
        return stopped

    def sizes(self) -> list[int]:
        """The largest possible number of runs at each rung."""
        left: dict[str, list[Candidate]] = {}
        for candidate in self.candidates:
            left.setdefault(candidate.group, []).append(candidate)
        sizes = []
        for rung in self.rungs:
            sizes.append(sum(len(self.jobs(c, rung)) for of in left.values() for c in of))
            most = {group: sorted(of, key=lambda c: -len(c.jobs)) for group, of in left.items()}
            left = {group: of[: rung.count(len(of))] for group, of in most.items()}
        return sizes

    def after(self, rung: Rung) -> int:
        """The iterations of all runs beyond a rung, at most.

        Other seeds train at the last rung from the start, and in a population all of them do.
        """
        begun = [0, *(r.iterations for r in self.rungs[:-1])]
        begun[-1] = begun[-1] if self.seeds is None else 0
        steps = zip(self.rungs, begun, self.sizes(), strict=True)
        return sum(
            (r.iterations - start) * runs for r, start, runs in steps if r.number > rung.number
        )

    def lines(self) -> list[str]:
        """The rungs, for `--dry-run`."""
        lines, sizes = [], self.sizes()
        for rung, runs in zip(self.rungs, sizes, strict=True):
            most = "at most " if rung.number > 1 else ""
            lines.append(f"rung {rung.number}: {most}{runs} runs to {rung.iterations:,} iterations")
        part = sizes[0] * self.rungs[0].iterations + self.after(self.rungs[0])
        whole = sum(len(c.jobs) for c in self.candidates) * self.rungs[-1].iterations
        lines.append(f"at most {part:,} iterations, {100 * part / whole:.3g} % of the whole grid's")
        return lines


def kept_of(candidates: Iterable[Candidate], places: Iterable[Place]) -> list[Candidate]:
    """The candidates that go on after a rung, in their order."""
    kept = {place.configuration for place in places if place.decision == KEPT}
    return [candidate for candidate in candidates if candidate.name in kept]


def has_diverged(run_dir: Path) -> bool:
    """Whether a run ended because it diverged: it would do so again.

    An iterate that is not finite ends a run before its next row, and leaves a message only.
    """
    last, status = last_row(run_dir), Status.read(run_dir)
    failed = status.state == "failed" and ADVICE in status.message
    return failed or (last is not None and diverged(last))


def _rank(mean: float, goal: str) -> tuple[bool, float]:
    """The sort key of a mean: the best is the least, and one that is not finite the greatest."""
    if not math.isfinite(mean):
        return True, 0.0
    return False, for_ranks(-mean if goal == "max" else mean)


def plan_halving(sweep: Sweep) -> Halving | None:
    """The plan of `sweep.halving`, if it is set; ConfigError if it does not suit the grid.

    The configs that are composed so far cover each value of each key (`grid.check`).
    """
    options, composed = sweep.options, sweep.composed()
    if options.halving is None:
        return None
    below, shown = options.halving, f"[{','.join(map(str, options.halving))}]"
    totals = sorted({config.algorithm.iterations for config in composed.values()})
    several = f"null here: the runs differ in algorithm.iterations ({totals[0]} to {totals[-1]})"
    require(len(totals) == 1, "sweep.halving", shown, several)
    allowed = f"numbers below {totals[0]}, the algorithm.iterations of all runs"
    require(below[-1] < totals[0], "sweep.halving", shown, allowed)
    saves = all(config.output.checkpoint_every is not None for config in composed.values())
    require(saves, "output.checkpoint_every", "null", "a number with sweep.halving")
    ends = zip([*below, totals[0]], [*options.keeps(), None], strict=True)
    rungs = tuple(Rung(i, end, keep) for i, (end, keep) in enumerate(ends, start=1))
    candidates = tuple(_candidates(sweep, composed))
    return Halving(rungs, candidates, options.metric, options.screening_seeds)


def _candidates(sweep: Sweep, composed: Mapping[Job, Config]) -> list[Candidate]:
    """The configurations of a sweep, in the order of the grid."""
    within, keys = sweep.options.keys_within(), varying(map(values_of, sweep.jobs))
    groups = [key for key in keys if key != "seed"]
    for key in within:
        hint = did_you_mean(nearest(key, groups))
        allowed = f"a key that varies over the sweep: {', '.join(groups) or 'there is none'}{hint}"
        require(key in groups, "sweep.within", key, allowed)
    jobs_of: dict[tuple[str, str], list[Job]] = {}
    configs_of: dict[str, list[Config]] = {}
    for job in sweep.jobs:
        values = values_of(job)
        group = ", ".join(filter(None, map(values.get, within)))
        name = name_of({key: values[key] for key in groups if key in values})
        jobs_of.setdefault((group, name), []).append(job)
        configs_of.setdefault(group, []).extend([composed[job]] if job in composed else [])
    goals = {}
    for group, configs in configs_of.items():
        configs = configs or [
            sweep.config(next(j[0] for (g, _), j in jobs_of.items() if g == group))
        ]
        goals[group] = _goal(sweep.options, configs)
    return [Candidate(name, g, goals[g], tuple(jobs)) for (g, name), jobs in jobs_of.items()]


def _goal(options: SweepOptions, configs: Sequence[Config]) -> str:
    """The goal of the column that ranks a group; ConfigError if its runs are not comparable."""
    for key in ("data", "loss"):
        names = {getattr(config, key).name for config in configs}
        allowed = f"{key}, so that runs of {', '.join(sorted(names))} are not ranked together"
        shown = ", ".join(options.keys_within()) or "null"
        require(len(names) == 1, "sweep.within", shown, allowed)
    loss, metric = configs[0].loss.make(), options.metric
    if metric is None:
        return loss.best[1]
    known = [*OF_ALL_LOSSES, *(f"{s}_{m}" for s in SPLITS for m in ("loss", *loss.metrics))]
    hint = did_you_mean(nearest(metric, known))
    require(metric in known, "sweep.metric", metric, f"{', '.join(known)}, or null{hint}")
    found = loss.metrics.get(set_and_metric(metric)[1])
    return "min" if found is None else found.goal
