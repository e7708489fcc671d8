"""halving.csv: the ranks of a sweep with successive halving, and its part of report.md."""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from consensus.atomic_files import write_whole
from consensus.records import format_cell

HALVING = "halving.csv"  # in the folder of a report
HALVED = (
    "The runs that remain are trained to the iterations of a rung; then the configurations with "
    "the best means of the column over their seeds go on. [halving.csv](halving.csv) has the place "
    "of each configuration at each rung, and whether it was kept or stopped there. A stopped run "
    "counts as unfinished."
)

KEPT, STOPPED, FINISHED, NO_NUMBER = "kept", "stopped", "finished", "no number"
"""Decisions: it went on, it was stopped, it is of the last rung, a run diverged or failed."""


@dataclass(frozen=True)
class Place:
    """The rank of a configuration at a rung: a row of halving.csv."""

    rung: int  # from 1
    iterations: int  # of the rung
    group: str  # the value of `sweep.within`; "" without it
    place: int  # in its group, from 1
    configuration: str
    runs: int  # its seeds
    column: str  # of metrics.jsonl, which ranks
    mean: float  # of the column over the seeds; nan where one has no number
    decision: str


def read_places(folder: Path) -> list[Place]:
    """The rows of halving.csv in the folder of a report; none without the file.

    Raises:
        ValueError: If it is damaged.
    """
    path = folder / HALVING
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        kinds = [(entry.name, entry.type) for entry in fields(Place)]
        return [Place(**{name: kind(row[name]) for name, kind in kinds}) for row in rows]  # type: ignore[operator]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged; the sweep writes it again ({error})") from error


def write_places(places: Sequence[Place], folder: Path) -> None:
    """Write halving.csv to the folder of a report, which is made."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [entry.name for entry in fields(Place)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(map(asdict, places))
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / HALVING, text.getvalue().encode())


def rungs_table(places: Sequence[Place]) -> list[list[str]]:
    """A row for each rung and group; the first row holds the headings."""
    grouped = any(place.group for place in places)
    rows = [["rung", "iterations", *(["group"] if grouped else []), "configurations", "runs"]]
    rows[0] += ["went on", "no number", "column", "best", "last to go on", "best configuration"]
    parts: dict[tuple[int, str], list[Place]] = {}
    for place in places:
        parts.setdefault((place.rung, place.group), []).append(place)
    for (rung, group), part in parts.items():
        kept = [p for p in part if p.decision in (KEPT, FINISHED)]
        lost = sum(p.decision == NO_NUMBER for p in part)
        counts = [len(part), sum(p.runs for p in part), len(kept), lost]
        first = [str(rung), f"{part[0].iterations:,}", *([group] if grouped else [])]
        numbers = [_shown(kept[0]), _shown(kept[-1])] if kept else ["-", "-"]
        name = kept[0].configuration if kept else "-"
        rows.append([*first, *map(str, counts), part[0].column, *numbers, name])
    return rows


def _shown(place: Place) -> str:
    return "-" if math.isnan(place.mean) else format_cell(place.column, place.mean)
