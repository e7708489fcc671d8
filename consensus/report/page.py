"""The folder of a report on many runs: Table 1, Figure 1, every run, and one page with all."""

import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from consensus.atomic_files import write_whole
from consensus.records import COLUMNS, Row
from consensus.report.plots import draw_figure1, draw_sensitivity
from consensus.report.stationarity import (
    draw_stationarity,
    measured,
    stationarity_cells,
    verdict,
)
from consensus.report.table1 import (
    HEADINGS,
    MSGD,
    PAPER_PROBLEM,
    Configuration,
    Line,
    Mean,
    Run,
    best_of,
    chosen_keys,
    make_lines,
    part_one,
    part_two,
    show,
    varying,
)

LAST_EVALUATION = (
    "Of each run the last evaluation counts, if the run finished and did not diverge. Several "
    "seeds of one configuration are one entry, mean ± sample standard deviation."
)
PART_ONE = (
    "The lowest value of each column by itself, over all configurations of a potential, as in the "
    "paper's Table 1: the numbers of a row may come from different configurations."
)
PART_TWO = (
    "The one configuration of each potential with the lowest test error (of equal ones the lowest "
    "test loss), and its values of the keys that differ between the runs."
)
FROM_THE_PAPER = (
    "Columns `paper`: typed from the paper's Table 1 as printed there, best over 72 settings for "
    "each potential; `-`: not typed."
)
STATIONARITY = (
    "The last measurement of each run, for the lam of the problem that it solves. f_j is the "
    "expected minibatch loss of worker j plus R, its force grad phi(u - z_j) / lam. "
    "|sum grad e f_j (u)| is 0 where u is stationary, ± how exactly it is known; (9) is 0 where "
    "each z_j is the phi-prox of u; of the workers, the largest."
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
        runs: All of them, two or more.
        folder: Made if it is absent; what it holds under these names is replaced.
        sources: Names of where the runs are from.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = make_lines(runs)
    keys = chosen_keys(runs)
    tables = table1_markdown(lines, keys)
    _write(folder / "table1.md", f"# Table 1\n\n{tables}")
    _write(folder / "table1.csv", csv_text(table1_records(lines, keys)))
    _write(folder / "runs.csv", csv_text(run_records(runs)))
    figures = _draw_all(lines, folder)
    analysed = measured({run.label: run.rows for run in runs})
    if analysed:
        draw_stationarity(analysed, folder / "stationarity.png")
    stationarity = stationarity_markdown(analysed)
    _write(folder / "report.md", page(runs, sources, tables, figures, stationarity))


def _write(path: Path, text: str) -> None:
    write_whole(path, text.encode("utf-8", errors="replace"))


# ---- figures


def _draw_all(lines: Sequence[Line], folder: Path) -> dict[str, str]:
    """Draw Figure 1, and the sensitivity if lam or eta varies; name of the PNG -> caption."""
    captions = {}
    for suffix, what, best in figure1_groups(lines):
        name = f"figure1{suffix}"
        curves = {
            potential: [run.rows for run in configuration.kept.values()]
            for potential, configuration in best.items()
        }
        draw_figure1(curves, [folder / f"{name}.{ending}" for ending in ("png", "pdf")])
        captions[f"{name}.png"] = (
            f"Figure 1{what}: of each potential the configuration best in final test error; with "
            "several seeds their mean, in a band of one sample standard deviation"
        )
    panels = {line.label: line.sensitivity() for line in lines if line.name != MSGD}
    panels = {label: of_eta for label, of_eta in panels.items() if of_eta}
    places = {
        (e, lam) for of_eta in panels.values() for e, of_lam in of_eta.items() for lam in of_lam
    }
    if len(places) > 1:
        draw_sensitivity(panels, [folder / f"sensitivity.{ending}" for ending in ("png", "pdf")])
        captions["sensitivity.png"] = (
            "Test error of the last evaluation over lam, one line for each eta, the best over all "
            "other keys; a cross at the top where no run finished without diverging"
        )
    return captions


def figure1_groups(
    lines: Sequence[Line],
) -> list[tuple[str, str, dict[str, Configuration]]]:
    """What each Figure 1 shows: one for each problem and each M, mSGD of that problem in all.

    Returns:
        The end of its file name and of its title, empty for a single figure, and potential -> the
        configuration with the lowest test error. Nothing for a group without a finished run.
    """
    groups: dict[tuple[tuple[str, str], Any], dict[str, list[Configuration]]] = {}
    for line in (line for line in lines if line.name != MSGD):
        for c in line.finished:
            group = groups.setdefault((line.problem, c.config.get("workers")), {})
            group.setdefault(line.name, []).append(c)
    for line in (line for line in lines if line.name == MSGD and line.finished):
        of_problem = [key for key in groups if key[0] == line.problem]
        for key in of_problem or [(line.problem, None)]:
            groups.setdefault(key, {})[MSGD] = line.finished
    problems = {problem for problem, _ in groups}
    found = []
    for (problem, m), of_name in sorted(groups.items(), key=lambda g: (g[0][0], g[0][1] or 0)):
        ms = {other_m for other, other_m in groups if other == problem}
        words = list(problem) if len(problems) > 1 else []
        m_text = "unknown" if m is None else str(m)
        suffix = "".join("_" + re.sub(r"\W+", "-", word) for word in words)
        what = f" ({', '.join(words)})" if words else ""
        if len(ms) > 1:
            suffix, what = f"{suffix}_M{m_text}", f"{what}, M = {m_text}"
        best = {name: best_of(configurations) for name, configurations in of_name.items()}
        found.append((suffix, what, {name: c for name, c in best.items() if c is not None}))
    return found


# ---- CSV: plain numbers, empty where there is none


def table1_records(lines: Sequence[Line], keys: Sequence[str]) -> list[dict[str, Any]]:
    """Both parts of Table 1 beside each other, a record for each line.

    `lowest_COLUMN` and `COLUMN_at_best`, with `_std` behind them, are the parts; `paper_COLUMN` is
    the paper's.
    """
    records = []
    for line in lines:
        finished, others = line.counts()
        record: dict[str, Any] = {
            "potential": line.name,
            "data": line.problem[0],
            "model": line.problem[1],
            "configurations": len(line.configurations),
            "runs_finished": finished,
            "runs_diverged_or_unfinished": others,
        }
        best = line.best()
        for column in HEADINGS:
            record |= _mean_record(f"lowest_{column}", line.lowest(column))
            paper = line.paper(column)
            record[f"paper_{column}"] = None if paper == "-" else paper
        record["seeds_at_best"] = len(best.kept) if best else None
        for column in HEADINGS:
            record |= _mean_record(f"{column}_at_best", best.mean(column) if best else None)
        config = best.config if best else {}
        records.append(record | {key: _shown(config, key) for key in keys})
    return records


def _shown(config: Mapping[str, Any], key: str) -> str:
    return show(config[key]) if key in config else ""


def _mean_record(name: str, mean: Mean | None) -> dict[str, float | None]:
    return {name: mean.mean if mean else None, f"{name}_std": mean.std if mean else None}


def run_records(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """A record for each run: its status, its values of the differing keys, its last evaluation."""
    keys = varying(runs)
    lasts = [_with_scalars(run.rows[-1]) if run.rows else {} for run in runs]
    columns = dict.fromkeys([*COLUMNS, *(key for last in lasts for key in last)])
    records = []
    for run, last in zip(runs, lasts, strict=True):
        record: dict[str, Any] = {"run": run.label, "status": run.status}
        record |= {key: _shown(run.config, key) for key in keys}
        values = {column: last.get(column) for column in columns}
        # A column may be called like a key only by a plugin; the key then keeps its place.
        record |= {
            column: json.dumps(value) if isinstance(value, list | dict) else value
            for column, value in values.items()
            if column not in record
        }
        records.append(record)
    return records


def _with_scalars(row: Row) -> dict[str, Any]:
    """A row with the single numbers of its stationarity as columns of their own."""
    found = row.get("stationarity") or {}
    scalars = {f"stationarity.{k}": v for k, v in found.items() if not isinstance(v, list | dict)}
    return {key: value for key, value in row.items() if key != "stationarity"} | scalars


def csv_text(records: Sequence[dict[str, Any]]) -> str:
    """Records with the same keys as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


# ---- Markdown


def table1_markdown(lines: Sequence[Line], keys: Sequence[str]) -> str:
    """Both parts of Table 1, with a sentence on each."""
    paper = [FROM_THE_PAPER] if any(line.problem == PAPER_PROBLEM for line in lines) else []
    return "\n\n".join(
        [
            LAST_EVALUATION,
            " ".join([PART_ONE, *paper]),
            markdown_table(part_one(lines)),
            PART_TWO,
            markdown_table(part_two(lines, keys)),
            "",
        ]
    )


def markdown_table(cells: Sequence[Sequence[str]]) -> str:
    """A table whose first row are the headings."""
    rows = ["| " + " | ".join(map(escape, row)) + " |" for row in cells]
    return "\n".join([rows[0], "| " + " | ".join(["---"] * len(cells[0])) + " |", *rows[1:]])


def escape(text: str) -> str:
    """Text that stays in its cell: no bar, no line break."""
    return " ".join(text.replace("\\", "\\\\").replace("|", "\\|").split())


def stationarity_markdown(analysed: Mapping[str, Sequence[Row]]) -> str:
    """The section on stationarity; empty if no run measured it."""
    if not analysed:
        return ""
    sentences = [f"- `{label}`: {verdict(rows)}" for label, rows in analysed.items()]
    return "\n\n".join(
        [
            "## Stationarity",
            STATIONARITY,
            markdown_table(stationarity_cells(analysed)),
            "\n".join(sentences),
            "![stationarity.png](stationarity.png)",
        ]
    )


def page(
    runs: Sequence[Run],
    sources: Sequence[str],
    tables: str,
    figures: dict[str, str],
    stationarity: str = "",
) -> str:
    """report.md.

    Args:
        runs: All of them.
        sources: Names of where they are from.
        tables: Table 1 in Markdown.
        figures: Name of a file beside it -> caption.
        stationarity: A section, or nothing.
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
            *([stationarity] if stationarity else []),
            "## What is the same in all runs",
            markdown_table([["key", "value"], *values]),
            "## What the columns are",
            "\n".join(f"- **{column}**: {meaning}" for column, meaning in DEFINITIONS.items()),
            "",
        ]
    )
