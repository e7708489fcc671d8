"""Renderers of tables: terminal, Markdown, and CSV with plain numbers."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from consensus.records import Row, cells, headings, text_table
from consensus.report.runs import RESULTS
from consensus.report.table1 import PAPER_PROBLEM, Mean, Record

HEADINGS = {key: key.replace("_", " ") + " %" * key.endswith("error") for key in RESULTS}

LAST_EVALUATION = (
    "The last evaluation of each run counts, if the run finished and did not diverge. Seeds of one "
    "configuration are one entry, mean ± sample standard deviation."
)
PART_ONE = (
    "The lowest value of each column by itself, over all configurations of a potential, as in the "
    "paper's Table 1: the numbers of a row may come from different configurations."
)
FROM_THE_PAPER = (
    "Columns `paper`: copied from the paper's Table 1 as printed, best over 72 settings for each "
    "potential; `-`: not copied."
)
PART_TWO = (
    "For each potential, the configuration with the lowest test error (on ties, the lowest test "
    "loss), and its values of the keys that differ between the runs."
)


def _text(mean: Mean | None, column: str) -> str:
    return "-" if mean is None else mean.show(column)


def _of_the_paper(records: Sequence[Record]) -> bool:
    return any(record.problem == PAPER_PROBLEM for record in records)


# ---- terminal


def comparison_table(runs: Mapping[str, Sequence[Row]]) -> Table:
    """The last evaluation of each run."""
    return text_table(
        "last evaluation of each run",
        [["run", *headings()], *([label, *cells(rows[-1])] for label, rows in runs.items())],
        left=("run",),
        first_width=min(max(map(len, runs), default=0), 16),
    )


def screen_tables(records: Sequence[Record]) -> list[Table]:
    """Both parts, with the paper's numbers in brackets and hyperparameters as overrides."""
    first = [["potential", *HEADINGS.values(), "finished / not"]]
    second = [["potential", "seeds", HEADINGS["test_error"], HEADINGS["test_loss"], "with"]]
    for r in records:
        lowest = [
            _text(r.lowest[key], key) + (f" ({r.paper[key]})" if key in r.paper else "")
            for key in RESULTS
        ]
        first.append([r.label, *lowest, f"{r.finished} / {r.others}"])
        means = [_text(r.at_best[key], key) for key in ("test_error", "test_loss")]
        chosen = " ".join(f"{k}={v}" for k, v in r.chosen.items() if v is not None)
        seeds, chosen = (r.best.seeds, chosen) if r.best else ("-", "-")
        second.append([r.label, seeds, *means, chosen])
    title = "Table 1: the lowest of each column by itself"
    title += " (the paper's)" if _of_the_paper(records) else ""
    width = max(len(r.label) for r in records)
    left = ("potential", "with")
    return [
        text_table(title, first, left=left, first_width=width),
        text_table("the best in test error", second, left=left, first_width=width),
    ]


# ---- Markdown


def table1_markdown(records: Sequence[Record]) -> str:
    """Both parts, with a sentence on each."""
    paper = [FROM_THE_PAPER] if _of_the_paper(records) else []
    return "\n\n".join(
        [
            LAST_EVALUATION,
            " ".join([PART_ONE, *paper]),
            markdown_table(part_one(records)),
            PART_TWO,
            markdown_table(part_two(records)),
            "",
        ]
    )


def part_one(records: Sequence[Record]) -> list[list[str]]:
    """The lowest value of each column, beside the paper's if a record has its problem."""
    papers = [key for key in RESULTS if key != "objective"] if _of_the_paper(records) else []
    header = ["potential", "configurations"]
    for key in RESULTS:
        header += [HEADINGS[key], "paper"] if key in papers else [HEADINGS[key]]
    rows = [[*header, "runs: finished / diverged or unfinished"]]
    for r in records:
        row = [r.label, str(len(r.configurations))]
        for key in RESULTS:
            row.append(_text(r.lowest[key], key))
            row += [r.paper.get(key, "-")] if key in papers else []
        rows.append([*row, f"{r.finished} / {r.others}"])
    return rows


def part_two(records: Sequence[Record]) -> list[list[str]]:
    """The configuration best in test error, with its values of the varying keys."""
    rows = [["potential", "seeds", *HEADINGS.values(), *records[0].chosen]]
    for r in records:
        means = [_text(r.at_best[key], key) for key in RESULTS]
        chosen = [value or "" if r.best else "-" for value in r.chosen.values()]
        rows.append([r.label, r.best.seeds if r.best else "-", *means, *chosen])
    return rows


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """A table; the first row holds the headings."""
    lines = ["| " + " | ".join(map(escape, row)) + " |" for row in rows]
    return "\n".join([lines[0], "| " + " | ".join(["---"] * len(rows[0])) + " |", *lines[1:]])


def escape(text: str) -> str:
    """Text that stays in its cell: no bar, no line break."""
    return " ".join(text.replace("\\", "\\\\").replace("|", "\\|").split())


# ---- CSV


def table1_csv(records: Sequence[Record]) -> str:
    """Both parts side by side.

    `lowest_COLUMN` and `COLUMN_at_best` are the parts, each followed by its `_std`; `paper_COLUMN`
    is the paper's number. A missing number is empty.
    """
    return csv_text([_numbers(record) for record in records])


def _numbers(r: Record) -> dict[str, Any]:
    numbers: dict[str, Any] = {
        "potential": r.name,
        "data": r.problem[0],
        "model": r.problem[1],
        "configurations": len(r.configurations),
        "runs_finished": r.finished,
        "runs_diverged_or_unfinished": r.others,
    }
    for key in RESULTS:
        numbers |= _mean(f"lowest_{key}", r.lowest[key]) | {f"paper_{key}": r.paper.get(key)}
    numbers["seeds_at_best"] = len(r.best.kept) if r.best else None
    for key in RESULTS:
        numbers |= _mean(f"{key}_at_best", r.at_best[key])
    return numbers | {key: value or "" for key, value in r.chosen.items()}


def _mean(name: str, mean: Mean | None) -> dict[str, float | None]:
    return {name: mean.mean if mean else None, f"{name}_std": mean.std if mean else None}


def csv_text(rows: Sequence[dict[str, Any]]) -> str:
    """Rows with the same keys as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
