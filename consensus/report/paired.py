"""Differences between the best configurations of the methods, paired by seed.

Runs of one seed share the initial weights, the partition and the order of the samples, so that
their difference varies less than each of them.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from consensus.records import number
from consensus.report.best import best_of_each
from consensus.report.table1 import Configuration, Mean, Record, heading, on_test_set

PAIRED = (
    "The differences to the best, at the same configurations: means over the seeds that both have, "
    "with their 95 % interval by Student's t, and p of the paired t-test. A p below 0.05 decides "
    "the sign of one difference; of many differences, one in twenty is below it by chance."
)


@dataclass(frozen=True)
class Difference:
    """A method minus the best one, over the seeds of both."""

    seeds: int
    mean: Mean
    half_width: float  # of the 95 % interval
    p: float


def difference(one: Configuration, best: Configuration, column: str) -> Difference | None:
    """`one` minus `best` in a column of the last evaluation; None with fewer than two seeds."""
    # The import takes 0.3 s, which a report without seeds does not spend.
    from scipy.stats import t as student  # type: ignore[import-untyped]

    both = [seed for seed in one.kept if seed in best.kept]
    found = [
        number(one.kept[seed].rows[-1], column) - number(best.kept[seed].rows[-1], column)
        for seed in both
    ]
    if len(found) < 2 or not all(map(math.isfinite, found)):
        return None
    mean, std, free = statistics.fmean(found), statistics.stdev(found), len(found) - 1
    error = std / math.sqrt(len(found))
    p = float(2.0 * student.sf(abs(mean) / error, free)) if error else float(mean == 0.0)
    return Difference(len(found), Mean(mean, std), float(student.ppf(0.975, free)) * error, p)


def paired_table(records: Sequence[Record]) -> list[list[str]]:
    """A row for each record beside the best one of its problem; the first row holds the headings.

    Empty without two records of one problem whose best configurations share two seeds.
    """
    rows = []
    for first, best in best_of_each(records).values():
        column = on_test_set(first.column)
        for record in records:
            if record is first or record.problem != first.problem or record.best is None:
                continue
            found = difference(record.best, best, column)
            if found:
                mean, half = found.mean.mean, found.half_width
                cells = [f"{record.label} - {first.label}", heading(column), str(found.seeds)]
                interval = f"{mean - half:.3g} to {mean + half:.3g}"
                rows.append([*cells, found.mean.show(column), interval, f"{found.p:.2g}"])
    titles = ["difference", "column", "seeds", "mean", "95 % interval", "p"]
    return [titles, *rows] if rows else []
