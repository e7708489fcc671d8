"""The folder of a report: Table 1, the figures, runs.csv, and report.md, which contains them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from consensus import records
from consensus.atomic_files import write_whole
from consensus.records import Row
from consensus.report.plots import draw_stationarity, draw_table1
from consensus.report.render import csv_text, escape, markdown_table, table1_csv, table1_markdown
from consensus.report.runs import Run, varying
from consensus.report.stationarity import measured, stationarity_cells, verdict
from consensus.report.table1 import show, table1

STATIONARITY = (
    "The last measurement of each run, for the lam of its problem. f_j is the expected minibatch "
    "loss of worker j plus R, its force grad phi(u - z_j) / lam. |sum grad e f_j (u)| is 0 where u "
    "is stationary, and is known to ±; (9) is 0 where each z_j is the phi-prox of u. Columns of "
    "workers show the largest value."
)
DEFINITIONS = {
    "objective": "train loss + R(u) + mean over workers j of (1 / lam) phi(u - z_j): F of (15) "
    "over M",
    "train loss, test loss": "data loss of u, summed over the set",
    "train error, test error": "percent of the set that u classifies wrongly",
    "configurations": "settings that differ in more than their seed",
    "runs": "finished / diverged (a number of the last evaluation is not finite) or unfinished (no "
    "summary.json); the latter two enter no other number",
    "seeds": "how many seeds finished, of how many that were tried",
}


def write_report(runs: Sequence[Run], folder: Path, sources: Sequence[str]) -> None:
    """Write table1.md, table1.csv, runs.csv, the figures and report.md.

    Args:
        runs: Two runs or more.
        folder: Created if absent; files of these names are replaced.
        sources: Names of the folders that hold the runs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = table1(runs)
    tables = table1_markdown(lines)
    figures = draw_table1(lines, folder)
    analysed = measured({run.label: run.rows for run in runs})
    if analysed:
        draw_stationarity(analysed, folder / "stationarity.png")
    for name, text in {
        "table1.md": f"# Table 1\n\n{tables}",
        "table1.csv": table1_csv(lines),
        "runs.csv": runs_csv(runs),
        "report.md": page(runs, sources, tables, figures, stationarity_markdown(analysed)),
    }.items():
        write_whole(folder / name, text.encode("utf-8", errors="replace"))


def runs_csv(runs: Sequence[Run]) -> str:
    """A row for each run: its status, its values of the varying keys, its last evaluation."""
    keys = varying(runs)
    lasts = [_with_scalars(run.rows[-1]) if run.rows else {} for run in runs]
    columns = dict.fromkeys([*records.COLUMNS, *(key for last in lasts for key in last)])
    rows = []
    for run, last in zip(runs, lasts, strict=True):
        row: dict[str, Any] = {"run": run.label, "status": run.status}
        row |= {key: show(run.config[key]) if key in run.config else "" for key in keys}
        for column in columns:
            value = last.get(column)
            text = json.dumps(value) if isinstance(value, list | dict) else value
            row.setdefault(column, text)  # a column of a plugin may have the name of a key
        rows.append(row)
    return csv_text(rows)


def _with_scalars(row: Row) -> dict[str, Any]:
    """A row with the single numbers of its stationarity as columns of their own."""
    found = row.get("stationarity") or {}
    scalars = {f"stationarity.{k}": v for k, v in found.items() if not isinstance(v, list | dict)}
    return {key: value for key, value in row.items() if key != "stationarity"} | scalars


def stationarity_markdown(analysed: Mapping[str, Sequence[Row]]) -> list[str]:
    """The section on stationarity; empty if no run measured it."""
    if not analysed:
        return []
    return [
        "## Stationarity",
        STATIONARITY,
        markdown_table(stationarity_cells(analysed)),
        "\n".join(f"- `{label}`: {verdict(rows)}" for label, rows in analysed.items()),
        "![stationarity.png](stationarity.png)",
    ]


def page(
    runs: Sequence[Run],
    sources: Sequence[str],
    tables: str,
    figures: Mapping[str, str],
    stationarity: Sequence[str] = (),
) -> str:
    """The text of report.md.

    Args:
        runs: All of them.
        sources: Names of the folders that hold them.
        tables: Table 1 in Markdown.
        figures: Name of a file in the folder -> caption.
        stationarity: Paragraphs of a section, or nothing.
    """
    statuses = [run.status for run in runs]
    counts = ", ".join(f"{statuses.count(s)} {s}" for s in ("finished", "diverged", "unfinished"))
    named = ", ".join(f"`{escape(source)}`" for source in sources)
    fixed = runs[0].config.keys() - set(varying(runs))
    values = [[key, show(value)] for key, value in runs[0].config.items() if key in fixed]
    images = [f"{caption}.\n\n![{name}]({name})" for name, caption in figures.items()]
    return "\n\n".join(
        [
            "# Report",
            f"{len(runs)} runs from {named}: {counts}. [runs.csv](runs.csv) has a row for each.",
            "## Table 1",
            tables.rstrip(),
            "As numbers: [table1.csv](table1.csv).",
            "## Figures",
            *(images or ["None: no run finished without diverging."]),
            *stationarity,
            "## Settings shared by all runs",
            markdown_table([["key", "value"], *values]),
            "## Definitions",
            "\n".join(f"- **{column}**: {meaning}" for column, meaning in DEFINITIONS.items()),
            "",
        ]
    )
