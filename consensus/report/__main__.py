"""Command line of the report: python -m consensus.report RUN_DIR..."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from consensus.help import answer_questions
from consensus.records import Row, cells, columns, diverged, headings, text_table
from consensus.report.best import best_lines
from consensus.report.convergence import draw_convergence, draw_run
from consensus.report.page import write_report
from consensus.report.runs import comparable_runs, find_runs, is_run, labels, read_all
from consensus.report.settings import settings, tables
from consensus.report.stationarity import draw_stationarity, measured, stationarity_table, verdict
from consensus.report.table1 import (
    Record,
    criteria,
    deciding_columns,
    heading,
    highest_columns,
    of_held_out,
    of_the_paper,
    result_columns,
    show_mean,
    table1,
    words,
)
from consensus.startup import protect_streams

MOST_RUNS_ON_SCREEN = 40


def main() -> None:
    """Print a table of the runs and draw them; of different configs make Table 1 and Figure 1."""
    answer_questions("__main__", "consensus.report")
    protect_streams("consensus.report")
    parser = argparse.ArgumentParser(prog="python -m consensus.report", add_help=False)
    parser.add_argument("paths", nargs="+", type=Path, metavar="RUN_DIR")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--by", type=lambda text: text.split(","), default=())
    arguments = parser.parse_args()
    try:
        report(arguments.paths, arguments.output, arguments.folder, by=arguments.by)
    except (ValueError, OSError) as error:
        print(f"consensus.report: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("consensus.report: stopped", file=sys.stderr)
        sys.exit(130)


def report(
    named: Sequence[Path],
    figure: Path | None = None,
    folder: Path | None = None,
    paths: Sequence[Path] | None = None,
    damaged: Mapping[Path, str] | None = None,
    by: Sequence[str] = (),
) -> None:
    """Compare runs, or those in folders, on the screen and in files; `main` explains the paths.

    `paths` are the run directories to compare, by default all that are found in the named ones;
    `damaged` maps others, which were left out, to the reasons. With `by`, methods are side by side
    for each value of these keys too.

    Raises:
        ValueError: If no metrics can be read, or `folder` is given and the runs do not differ.
        OSError: If a file cannot be written.
    """
    first, left_out = named[0], dict(damaged or {})
    if paths is None:
        paths = find_runs(named, left_out)
    by_path = read_all(paths, named, left_out)
    names = labels(list(by_path), named)
    runs = comparable_runs(by_path, names, named, left_out)
    metrics = {names[path]: rows for path, rows in by_path.items()}
    for option, given in (("folder", folder is not None), ("by", bool(by))):
        if given and not runs:
            raise ValueError(
                f"`--{option}` needs two or more runs that differ in their config.yaml"
            )
    compared = settings(runs, by) if by else []
    if folder is None and runs and not is_run(first):
        folder = first / "report"
    figure = figure or first / "report.png"
    if not figure.suffix or figure.is_dir():  # matplotlib would write to another path
        raise ValueError(f"`--output` is {figure}; allowed: a file such as {figure}/report.png")
    figure.parent.mkdir(parents=True, exist_ok=True)
    evaluated = {label: rows for label, rows in metrics.items() if rows}
    shown = dict(list(evaluated.items())[:MOST_RUNS_ON_SCREEN])
    if len(evaluated) == 1:
        draw_run(next(iter(evaluated.values())), figure, title=next(iter(evaluated)))
    else:
        draw_convergence(evaluated, figure, runs)
    if folder is not None:
        sources, reasons = [path.resolve().name for path in named], list(left_out.values())
        write_report(runs, folder, sources, reasons, compared)
    analysed, second = measured(shown), figure.with_stem(f"{figure.stem}_stationarity")
    if analysed:
        draw_stationarity(analysed, second)
    console = Console(soft_wrap=True, highlight=False)
    say = partial(console.print, markup=False)
    console.print(comparison_table(shown, console.width))
    if len(shown) < len(evaluated):
        where = f": {folder}/runs.csv, and {folder}/table1.csv" if folder else ""
        say(f"and {len(evaluated) - len(shown)} more runs{where}")
    if len(evaluated) < len(metrics):
        say(f"{len(metrics) - len(evaluated)} without an evaluation")
    for reason in left_out.values():
        say(f"left out: {reason}")
    if runs:
        records = table1(runs)
        for table in screen_tables(records, console.width):
            console.print(table)
        for text, command in best_lines(records, folder).items():
            say(text)
            say(f"  {command or '(--folder FOLDER writes it as an experiment, to train again)'}")
        for entries in tables(compared) if compared else ():
            console.print(text_table("", entries, left=entries[0], screen=console.width))
        written = f"Table 1 and Figure 1 in {folder}/report.md"
        say(written if folder else "Table 1 and Figure 1 as files: --folder FOLDER")
    if analysed:
        console.print(stationarity_table(analysed, console.width))
        for label, rows in analysed.items():
            say(f"{label}: {verdict(rows)}")
        say(f"stationarity in {second}")
    say(f"figure in {figure}")


def comparison_table(runs: Mapping[str, Sequence[Row]], screen: int = 80) -> Table:
    """The last evaluation of each run."""
    keys = columns(rows[-1] for rows in runs.values())
    return text_table(
        "last evaluation of each run",
        [
            ["run", *headings(keys)],
            *(
                [f"{label} (diverged)" if diverged(rows[-1]) else label, *cells(rows[-1], keys)]
                for label, rows in runs.items()
            ),
        ],
        left=("run",),
        screen=screen,
    )


def screen_tables(records: Sequence[Record], screen: int = 80) -> list[Table]:
    """Both parts of Table 1, the paper's numbers in brackets and hyperparameters as overrides."""
    results, deciding = result_columns(records), [*deciding_columns(records), "test_loss"]
    deciding = list(dict.fromkeys(deciding))  # the loss itself may decide
    first = [["potential", *map(heading, results), "finished / not"]]
    second = [["potential", "seeds", *map(heading, deciding), "with"]]
    for r in records:
        lowest = [
            show_mean(r.lowest.get(key), key) + (f" ({r.paper[key]})" if key in r.paper else "")
            for key in results
        ]
        first.append([r.label, *lowest, f"{r.finished} / {r.others}"])
        means = [show_mean(r.at_best.get(key), key) for key in deciding]
        chosen = " ".join(f"{k}={v}" for k, v in r.chosen.items() if v is not None)
        seeds, chosen = (r.best.seeds, chosen) if r.best else ("-", "-")
        second.append([r.label, seeds, *means, chosen])
    highest = ", ".join(map(words, highest_columns(records)))
    title = "Table 1: the lowest of each column by itself"
    title += f", the highest of {highest}" if highest else ""
    title += " (the paper's)" if of_the_paper(records) else ""
    best = criteria(records, lambda *found: f"in {words(*found)}{of_held_out(found[0])}")
    left = ("potential", "with")
    return [
        text_table(title, first, left=left, screen=screen),
        text_table(f"the best {best}", second, left=left, screen=screen),
    ]


if __name__ == "__main__":
    main()
