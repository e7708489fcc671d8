"""The metrics row: its keys, and how rows are read, written and shown.

Each evaluation appends one row to metrics.jsonl, a JSON object on a line of its own. In memory a
row is a plain dict. JSON has no inf or nan, so a number that is not finite is written as null and
read as None.
"""

import json
import math
import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Required, TypedDict, cast

from rich.box import SIMPLE_HEAD
from rich.console import JustifyMethod
from rich.markup import escape
from rich.table import Table

METRICS = "metrics.jsonl"

Measurement = dict[str, Any]
"""A measurement of stationarity: numbers, and lists over the M workers and the L layers."""


class Row(TypedDict, total=False):
    """One evaluation of u. A new key must be optional: runs written before must stay readable."""

    iteration: Required[int]  # the iterations done
    epoch: Required[float]  # passes of one worker over its training data
    objective: Required[float]  # train_loss + R(u) + coupling: F of (15), divided by M
    train_loss: Required[float]  # data loss of u, summed over the training set
    test_loss: Required[float]  # data loss of u, summed over the test set
    validation_loss: float  # the same of the samples held out of training
    train_error: float  # percent that u classifies wrongly; other losses have other metrics, each a
    test_error: float  # mean over the samples under `train_NAME`, `validation_NAME`, `test_NAME`
    validation_error: float
    regularizer: float  # R(u)
    coupling: float  # (1 / lam) phi(u - z_j), mean over the M workers
    distance: list[float]  # |u - z_j| of each layer, mean over the workers, (L,)
    workers: int  # M
    members: list[
        int
    ]  # the numbers j of the workers of an elastic run, in the order of ranks, (M,)
    influence: list[float]  # |grad phi(u - z_j)| of each worker, its part of line 3, (M,)
    cuts_u: int  # step-size cuts of line 3 so far
    cuts_z: int  # step-size cuts of line 6 so far, summed over the workers
    wall_s: float  # seconds since the start, those before a resume included
    samples_per_s: float  # training throughput of all workers since the previous evaluation
    digest: str  # hash of the bits of u, in hexadecimal
    diverged: bool  # true at the evaluation that ended the run as diverged, absent elsewhere
    stationarity: Measurement  # of run/stationarity.py, at the evaluations that have one


REQUIRED = tuple(key for key in Row.__annotations__ if key in Row.__required_keys__)
"""The keys without which `read_rows` refuses a row."""

SPLITS = ("train", "validation", "test")


def columns(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """The keys that a table of evaluations shows; a row may lack some of them.

    The loss and the metrics on each set of samples, as the rows have them.
    """
    known = dict.fromkeys(key for row in rows for key in row)
    found = [[key for key in known if key.startswith(f"{name}_")] for name in SPLITS]
    return ["iteration", "epoch", "objective", *(key for keys in found for key in keys)]


BEYOND_DOUBT = 7e13
"""An objective of a diverged run: 1e6 times the loss of guessing 1,000 classes of 10^7 images."""


def diverged(row: Mapping[str, Any]) -> bool:
    """Whether a run has diverged at this evaluation.

    A run marks the evaluation at which it ends by the rule of run/diagnosis.py. Runs of versions
    without the mark have diverged where a number is not finite or the objective is beyond doubt.
    """
    numbers = [number(row, key) for key in REQUIRED]
    finite = all(map(math.isfinite, numbers))
    return bool(row.get("diverged")) or not finite or number(row, "objective") > BEYOND_DOUBT


# ---- reading


class NoEvaluationError(ValueError):
    """A metrics.jsonl without a row: the run has not evaluated yet, or failed before it did."""


def read_rows(run_dir: Path) -> list[Row]:
    """All rows of a run; NoEvaluationError if there is none.

    ValueError if metrics.jsonl is missing, or a line is damaged or lacks a required key.
    """
    path = run_dir / METRICS
    try:
        lines = _lines(path)
    except OSError as error:
        raise ValueError(f"{run_dir} holds no readable {METRICS} ({error.strerror})") from error
    rows: list[Row] = []
    for n, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {n} is not JSON: {error}") from error
        missing = [key for key in REQUIRED if not isinstance(row, dict) or key not in row]
        if missing:
            raise ValueError(f"{path}, line {n} lacks {', '.join(missing)}")
        if not isinstance(row["iteration"], int):
            raise ValueError(f"{path}, line {n}: its iteration is {row['iteration']!r}")
        rows.append(row)
    if not rows:
        raise NoEvaluationError(f"{path} holds no evaluation yet")
    return rows


def rows_until(run_dir: Path, t: int, report: Callable[[str], None] | None = None) -> list[Row]:
    """The rows up to iteration t in order, each iteration once.

    A killed run may have written later rows, and its last line in part. Other lines that are
    damaged, or whose iteration does not fit the order of most, are left out and named to `report`.
    """
    path = run_dir / METRICS
    try:
        lines = _lines(path)
    except FileNotFoundError:
        return []
    found = {n: row for n, line in enumerate(lines) for row in _whole([line])}
    known = [n for n, row in found.items() if row["iteration"] <= t]
    chosen = _increasing([found[n]["iteration"] for n in known])
    kept = {known[i]: found[known[i]] for i in chosen}
    taken = {row["iteration"] for row in kept.values()}
    left = [
        n + 1
        for n in range(max(kept, default=-1))
        if n not in kept and (n not in found or found[n]["iteration"] not in taken)
    ]
    if left and report is not None:
        report(f"{path}: line {', '.join(map(str, left))} is damaged and left out")
    return list(kept.values())


def _increasing(numbers: Sequence[int]) -> list[int]:
    """The places of a longest strictly increasing selection; of equal numbers the first."""
    ends: list[int] = []  # from the last number on: the largest first number, negated, of a
    places: list[int] = []  # selection of each length, and its place
    after: dict[int, int] = {}  # place -> the next place in its selection
    for place in reversed(range(len(numbers))):
        length = bisect_left(ends, -numbers[place])
        if length:
            after[place] = places[length - 1]
        ends[length : length + 1] = [-numbers[place]]
        places[length : length + 1] = [place]
    chosen = places[-1:]
    while chosen and chosen[-1] in after:
        chosen.append(after[chosen[-1]])
    return chosen


def last_row(run_dir: Path) -> Row | None:
    """The newest whole row of a run that may be writing; None if there is none yet."""
    try:
        return next(_whole(reversed(_lines(run_dir / METRICS))), None)
    except OSError:
        return None


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines()


def _whole(lines: Iterable[str]) -> Iterator[Row]:
    """The rows among lines that may be damaged."""
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and _sound(row):
            yield cast(Row, row)


def _sound(row: Mapping[str, Any]) -> bool:
    """Whether a row has the required keys, and numbers or null in them."""
    return (
        all(key in row and isinstance(row[key], int | float | None) for key in REQUIRED)
        and type(row["iteration"]) is int
        and row["iteration"] >= 0
        and isinstance(row.get("distance", []), list)
    )


# ---- writing


def to_json(row: Mapping[str, Any], indent: int | None = None) -> str:
    """Strict JSON, with null for each number that is not finite."""
    return json.dumps(_finite(row), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---- showing


def number(row: Mapping[str, Any], key: str) -> float:
    """A number of a mapping; nan where it is null, absent or no number."""
    x = row.get(key)
    return math.nan if isinstance(x, bool) or not isinstance(x, int | float) else float(x)


def largest(values: Iterable[float | None]) -> float:
    """The largest value; nan if one is nan or null."""
    numbers = [math.nan if value is None else value for value in values]
    return max(numbers, key=lambda number: (math.isnan(number), number))


def headings(keys: Sequence[str]) -> list[str]:
    """The keys of `columns` as table headings."""
    return [key.replace("_", " ") for key in keys]


def cells(row: Mapping[str, Any], keys: Sequence[str]) -> list[str]:
    """The values of a row in the columns `keys`; `-` where the row lacks one."""
    return [format_cell(key, row[key]) if key in row else "-" for key in keys]


def format_cell(column: str, value: Any) -> str:
    """A value as its column shows it."""
    if value is None:
        return "overflow"
    if column == "iteration" or not isinstance(value, int | float):
        return str(value)
    return format(value, ".2f" if column == "epoch" or is_percent(column) else ".5g")


def set_and_metric(column: str) -> tuple[str, str]:
    """The set of samples and the metric of a column, such as test and mae; "" without a set."""
    samples, _, metric = column.partition("_")
    return (samples, metric) if samples in SPLITS else ("", column)


def is_percent(column: str) -> bool:
    """Whether the numbers of a column are percent."""
    return set_and_metric(column)[1] == "error"


def evaluation_lines(row: Row) -> list[str]:
    """The log lines of an evaluation: one, and a second if it measured stationarity."""
    lines = [
        f"iteration {row['iteration']:>6}  epoch {row['epoch']:6.2f}  {_on_sets(row)}"
        f"coupling {number(row, 'coupling'):.3g}  {number(row, 'samples_per_s'):.0f} samples/s"
    ]
    cuts = row.get("cuts_u", 0), row.get("cuts_z", 0)
    if any(cuts):
        lines[0] += f"  cuts {cuts[0]}, {cuts[1]}"
    if "stationarity" in row:
        found = row["stationarity"]
        lines.append(
            f"    stationarity  |sum grad e f_j (u)| {number(found, 'envelope_gradient'):.3g} "
            f"({to_accuracy(found)})  "
            f"(5a) {number(found, 'consensus_residual'):.3g}  "
            f"(5b) {largest(found['worker_residual']):.3g}  "
            f"(9) {largest(found['translation_gap']):.3g}  in {number(found, 'seconds'):.1f} s"
        )
    return lines


def to_accuracy(found: Measurement) -> str:
    """The accuracy of the envelope gradient, a residual and no bound, to one digit."""
    rounded = float(f"{number(found, 'accuracy'):.1g}")  # 0.003, 20
    text = f"accuracy {rounded:g}"
    return text if has_converged(found) else f"{text}, not converged"


def has_converged(found: Measurement) -> bool:
    """Whether no phi-prox of a measurement is above its tolerance."""
    return bool(found.get("converged", True))


def _on_sets(row: Row) -> str:
    """The loss and the metrics on each set of samples."""
    text = ""
    for split in SPLITS:
        keys = [key for key in columns([row]) if key.startswith(f"{split}_")]
        text += f"{split} " if keys else ""
        for key in keys:
            shown = format_cell(key, number(row, key)) + (" %" if is_percent(key) else "")
            text += f"{key.removeprefix(f'{split}_')} {shown} "
        text += " " if keys else ""
    return text


def text_table(
    title: str, rows: Sequence[Sequence[str]], *, left: Sequence[str] = (), screen: int = 80
) -> Table:
    """A table for a terminal of `screen` columns, in which no word and no number is broken.

    The first row holds the headings; `left` are those of the columns that are aligned to the left.
    Entries of the first column, such as names of runs, get the room that is left, in lines that end
    at commas. What is longer still is folded, so that no name is cut off.
    """
    columns = list(zip(*rows, strict=True))
    most = [max(map(len, column)) for column in columns]
    least = [
        max(len(word) for cell in column for word in [*cell.split(), ""]) for column in columns
    ]
    spare = screen - sum(least[1:]) - len(least) + 1
    least[0] = min(most[0], max(spare, LEAST_ROOM))
    spare -= least[0]
    widths = list(least)
    while spare > 0 and widths != most:  # one column each, so that all get their share
        for i in (i for i, width in enumerate(widths) if width < most[i]):
            widths[i] += min(1, spare)
            spare -= min(1, spare)
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=0, show_edge=False)
    for heading, width in zip(rows[0], widths, strict=True):
        side: JustifyMethod = "left" if heading in left else "right"
        table.add_column(heading, justify=side, overflow="fold", width=width)
    for first, *others in rows[1:]:
        table.add_row(
            *map(escape, (at_commas(first, least[0]), *others))
        )  # it may look like markup
    return table


LEAST_ROOM = 16  # columns for the name of a run


def at_commas(name: str, width: int) -> str:
    """A name such as `potential=tan,lam=0.1` in lines that end at commas and fit the width.

    They also end between words, as in `consensus-tan-digits`, but never within a number.
    """
    lines = [""]
    for part in re.split("(?<=,)|(?<=-)(?=[a-z])", name):
        if lines[-1] and len(lines[-1]) + len(part) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)
