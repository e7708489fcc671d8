"""The folder of a report: tables, figures, the best configuration, and report.md with them."""

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from consensus.atomic_files import write_whole
from consensus.records import Row, columns, set_and_metric
from consensus.report.best import best_files, best_lines
from consensus.report.figure1 import draw_table1
from consensus.report.halving import HALVED, read_places, rungs_table
from consensus.report.latex import booktabs
from consensus.report.paired import PAIRED, paired_table
from consensus.report.runs import Run, varying
from consensus.report.settings import Setting, draw_settings, tables
from consensus.report.stationarity import (
    draw_stationarity,
    measured,
    stationarity_cells,
    verdict,
)
from consensus.report.table1 import (
    PAPER_COLUMNS,
    Mean,
    Record,
    criteria,
    deciding_columns,
    heading,
    highest_columns,
    loss_beside,
    of_held_out,
    of_several_methods,
    of_the_paper,
    result_columns,
    shortest,
    show,
    show_mean,
    table1,
    words,
)

LAST_EVALUATION = (
    "The last evaluation of each run counts, if the run finished and did not diverge. Seeds of one "
    "configuration are one entry, mean ± sample standard deviation. A configuration of which not "
    "all seeds finished is compared only where there is no other: they are no sample of the seeds."
)
PART_ONE = (
    "The lowest value of each column by itself{highest}, over all configurations of a potential, "
    "as in the paper's Table 1: the numbers of a row may come from different configurations."
)
FROM_THE_PAPER = (
    " Columns `paper`: copied from the paper's Table 1 as printed, best over 72 settings for each "
    "potential; `-`: not copied."
)
PART_TWO = (
    "For each potential, the configuration {best}, and its values of the keys that differ "
    "between the runs."
)
HELD_OUT = (
    " Where a validation set decides, the configuration is chosen on it; test numbers are of that "
    "configuration."
)
PART_THREE = (
    "The same configurations at their last evaluation: the passes of a worker over its data, the "
    "seconds of the run with its evaluations, and the samples of all workers in a second between "
    "the last two evaluations. Columns `in N s` have the last evaluation within the time of the "
    "fastest run; methods are equal in samples only where their epochs are."
)
AS_NUMBERS = "As numbers: [table1.csv](table1.csv); for LaTeX: [table1.tex](table1.tex)."
STATIONARITY = (
    "The last measurement of each run, for the lam of its problem. f_j is the expected minibatch "
    "loss of worker j plus R, its force grad phi(u - z_j) / lam. |sum grad e f_j (u)| is 0 where u "
    "is stationary; its accuracy is the residual of the proxes that it is made of, and no bound of "
    "its error. (9) is 0 where each z_j is the phi-prox of u. Columns of workers show the largest "
    "value."
)
OBJECTIVE = "train loss + R(u) + mean over workers j of (1 / lam) phi(u - z_j): F of (15) over M"
METRICS = {
    "loss": "data loss of u, summed over the set",
    "error": "percent of the set that u classifies wrongly",
}
COUNTS = {
    "configurations": "settings that differ in more than their seed",
    "runs": "finished / diverged (at the last evaluation a number is not finite, or the objective "
    "is more than 1e6 times that of guessing) or unfinished (no summary.json); the latter two "
    "enter no other number",
    "seeds": "how many seeds finished, of how many that were tried",
}
"""Headings -> definitions."""

SPEED = {"epoch": "epochs", "wall_s": "seconds", "samples_per_s": "samples/s"}
"""Columns of a row -> headings."""


def write_report(
    runs: Sequence[Run],
    folder: Path,
    sources: Sequence[str],
    left_out: Sequence[str] = (),
    compared: Sequence[Setting] = (),
) -> None:
    """Write the tables, the figures, the best configuration and report.md of two or more runs.

    Creates the folder if it is absent, and replaces files of these names. The sources are the names
    of the folders that hold the runs, `left_out` the reasons why some are not among these.
    `compared` are settings in which methods are side by side.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = table1(runs)
    both = table1_markdown(lines)
    figures = draw_table1(lines, folder)
    analysed = measured({run.label: run.rows for run in runs})
    if analysed:
        draw_stationarity(analysed, folder / "stationarity.png")
    parts = [both, *best_text(lines, folder), AS_NUMBERS]
    if rows := paired_table(lines):
        parts += ["## Differences over the seeds", PAIRED, markdown_table(rows)]
    if places := read_places(folder):
        parts += ["## Successive halving", HALVED, markdown_table(rungs_table(places))]
    if compared:
        figures |= draw_settings(compared, folder)
        parts += ["## Settings", *map(markdown_table, tables(compared))]
    best = best_files(lines, folder)
    if best:
        (folder / "experiment").mkdir(exist_ok=True)
    for name, text in {
        **best,
        "table1.md": f"# Table 1\n\n{both}\n\n",
        "table1.csv": table1_csv(lines),
        "table1.tex": table1_tex(lines),
        "runs.csv": runs_csv(runs),
        "report.md": page(runs, lines, sources, parts, figures, analysed, left_out),
    }.items():
        write_whole(folder / name, text.encode("utf-8", errors="replace"))


def page(
    runs: Sequence[Run],
    records: Sequence[Record],
    sources: Sequence[str],
    tables: Sequence[str],
    figures: Mapping[str, str],
    analysed: Mapping[str, Sequence[Row]],
    left_out: Sequence[str],
) -> str:
    """The text of report.md, from Table 1, name -> caption, and label -> measurements."""
    statuses = [run.status for run in runs]
    counts = ", ".join(f"{statuses.count(s)} {s}" for s in ("finished", "diverged", "unfinished"))
    named = ", ".join(f"`{escape(source)}`" for source in sources)
    different = varying(runs)
    values = [[key, show(v)] for key, v in runs[0].config.items() if key not in different]
    images = [f"{caption}.\n\n![{name}]({name})" for name, caption in figures.items()]
    stationarity = []
    if analysed:
        stationarity = [
            "## Stationarity",
            STATIONARITY,
            markdown_table(stationarity_cells(analysed)),
            "\n".join(f"- `{label}`: {verdict(rows)}" for label, rows in analysed.items()),
            "![stationarity.png](stationarity.png)",
        ]
    missing = ["Left out:", "\n".join(f"- {escape(reason)}" for reason in left_out)]
    return "\n\n".join(
        [
            "# Report",
            f"{len(runs)} runs from {named}: {counts}. [runs.csv](runs.csv) has a row for each.",
            *(missing if left_out else ()),
            "## Table 1",
            *tables,
            "## Figures",
            *(images or ["None: no run finished without diverging."]),
            *stationarity,
            "## Settings shared by all runs",
            markdown_table([["key", "value"], *values]),
            "## Definitions",
            "\n".join(f"- **{name}**: {meaning}" for name, meaning in definitions(records).items()),
            "",
        ]
    )


def table1_markdown(records: Sequence[Record]) -> str:
    """Both parts, with a sentence on each."""
    first, second = markdown_table(part_one(records)), markdown_table(part_two(records))
    highest = ", ".join(map(words, highest_columns(records)))
    part_one_text = PART_ONE.format(highest=f" (the highest of {highest})" if highest else "")
    part_one_text += FROM_THE_PAPER if of_the_paper(records) else ""
    part_two_text = PART_TWO.format(best=criteria(records, the_best))
    part_two_text += HELD_OUT if any(map(of_held_out, deciding_columns(records))) else ""
    third = [PART_THREE, markdown_table(part_three(records))] if of_several_methods(records) else []
    return "\n\n".join([LAST_EVALUATION, part_one_text, first, part_two_text, second, *third])


def best_text(records: Sequence[Record], folder: Path) -> list[str]:
    """A line on each best configuration, and the command that trains it."""
    return [
        escape(text) + (f". To train it: `{command}`" if command else "")
        for text, command in best_lines(records, folder).items()
    ]


def table1_tex(records: Sequence[Record]) -> str:
    """The parts of Table 1 as tabulars, each under a comment."""
    parts = {"The best of each column": part_one(records), "One configuration": part_two(records)}
    if of_several_methods(records):
        parts["Time"] = part_three(records)
    tables = (f"% {title}\n{booktabs(rows)}\n" for title, rows in parts.items())
    return "\n".join([r"% needs \usepackage{booktabs}", *tables])


def the_best(column: str, highest: bool) -> str:
    """In words: the number that the best configuration has."""
    loss = loss_beside(column)
    ties = f" (on ties, the lowest {words(loss)})" if column != loss else ""
    return f"with the {'highest' if highest else 'lowest'} {words(column)}{ties}"


def definitions(records: Sequence[Record]) -> dict[str, str]:
    """Headings of the tables -> definitions."""
    sets: dict[str, list[str]] = {}
    for column in result_columns(records)[1:]:  # after the objective
        sets.setdefault(set_and_metric(column)[1], []).append(words(column))
    metrics = {
        ", ".join(of): METRICS.get(metric, f"`{metric}` of u, the mean over the set")
        for metric, of in sets.items()
    }
    return {"objective": OBJECTIVE, **metrics, **COUNTS}


def part_one(records: Sequence[Record]) -> list[list[str]]:
    """The best value of each column, beside the paper's if a record has its problem."""
    results = result_columns(records)
    papers = PAPER_COLUMNS if of_the_paper(records) else ()
    header = ["potential", "configurations"]
    for key in results:
        header += [heading(key), "paper"] if key in papers else [heading(key)]
    rows = [[*header, "runs: finished / diverged or unfinished"]]
    for r in records:
        row = [r.label, str(len(r.configurations))]
        for key in results:
            row.append(show_mean(r.lowest.get(key), key))
            row += [r.paper.get(key, "-")] if key in papers else []
        rows.append([*row, f"{r.finished} / {r.others}"])
    return rows


def part_two(records: Sequence[Record]) -> list[list[str]]:
    """The best configuration, with its values of the varying keys."""
    results = result_columns(records)
    rows = [["potential", "seeds", *map(heading, results), *records[0].chosen]]
    for r in records:
        means = [show_mean(r.at_best.get(key), key) for key in results]
        chosen = [value or "" if r.best else "-" for value in r.chosen.values()]
        rows.append([r.label, r.best.seeds if r.best else "-", *means, *chosen])
    return rows


def part_three(records: Sequence[Record]) -> list[list[str]]:
    """The epochs and the seconds that the best configuration needed."""
    deciding, seconds = deciding_columns(records), shortest(records)
    columns = [(key, heading(key), math.inf) for key in deciding]
    if not math.isnan(seconds):
        columns += [(key, f"{heading(key)} in {seconds:.3g} s", seconds) for key in deciding]
    columns += [(key, name, math.inf) for key, name in SPEED.items()]
    rows = [["potential or method", *(name for _, name, _ in columns)]]
    for r in records:
        means = [r.best.mean(key, limit) if r.best else None for key, _, limit in columns]
        shown = (show_mean(mean, key) for mean, (key, _, _) in zip(means, columns, strict=True))
        rows.append([r.label, *shown])
    return rows


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """A table; the first row holds the headings."""
    lines = ["| " + " | ".join(map(escape, row)) + " |" for row in rows]
    return "\n".join([lines[0], "| " + " | ".join(["---"] * len(rows[0])) + " |", *lines[1:]])


def escape(text: str) -> str:
    """Text that stays in its cell of a table: no bar, no line break."""
    return " ".join(text.replace("\\", "\\\\").replace("|", "\\|").split())


def table1_csv(records: Sequence[Record]) -> str:
    """Both parts side by side.

    `lowest_COLUMN` (or `highest_COLUMN`) and `COLUMN_at_best` are the parts, each followed by its
    `_std`; `paper_COLUMN` is the paper's number, if one has its problem. A missing number is
    empty.
    """
    rows, results, highest = [], result_columns(records), highest_columns(records)
    papers = PAPER_COLUMNS if of_the_paper(records) else ()
    for r in records:
        row: dict[str, Any] = {
            "potential": r.name,
            "data": r.problem[0],
            "model": r.problem[1],
            "configurations": len(r.configurations),
            "runs_finished": r.finished,
            "runs_diverged_or_unfinished": r.others,
        }
        for key in results:
            extreme = "highest" if key in highest else "lowest"
            row |= _mean(f"{extreme}_{key}", r.lowest.get(key))
            row |= {f"paper_{key}": r.paper.get(key)} if key in papers else {}
        row["seeds_at_best"] = len(r.best.kept) if r.best else None
        for key in results:
            row |= _mean(f"{key}_at_best", r.at_best.get(key))
        rows.append(row | {key: value or "" for key, value in r.chosen.items()})
    return csv_text(rows, rows[0])


def _mean(name: str, mean: Mean | None) -> dict[str, float | None]:
    return {name: mean.mean if mean else None, f"{name}_std": mean.std if mean else None}


def runs_csv(runs: Sequence[Run]) -> str:
    """A row for each run: its status, its values of the varying keys, its last evaluation.

    The single numbers of a measurement of stationarity have columns of their own.
    """
    keys = varying(runs)
    shown = columns(run.rows[-1] for run in runs if run.rows)
    header = dict.fromkeys(["run", "status", *keys, *shown])
    rows = []
    for run in runs:
        last: dict[str, Any] = dict(run.rows[-1]) if run.rows else {}
        found = last.pop("stationarity", None) or {}
        single = {k: v for k, v in found.items() if not isinstance(v, list | dict)}
        last |= {f"stationarity.{key}": value for key, value in single.items()}
        row = {k: json.dumps(v) if isinstance(v, list | dict) else v for k, v in last.items()}
        row |= {"run": run.label, "status": run.status}  # these replace columns of a plugin
        row |= {key: show(run.config[key]) if key in run.config else "" for key in keys}
        header |= dict.fromkeys(row)
        rows.append(row)
    return csv_text(rows, header)


def csv_text(rows: Sequence[Mapping[str, Any]], columns: Iterable[str]) -> str:
    """Rows as CSV; a value that is None or absent is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
