"""Command line of the report: python -m consensus.report RUN_DIR..."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from consensus.report.page import write_report
from consensus.report.plots import draw_convergence, draw_stationarity
from consensus.report.render import comparison_table, screen_tables
from consensus.report.runs import comparable_runs, find_runs, is_run, read_all
from consensus.report.stationarity import measured, stationarity_table, verdict
from consensus.report.table1 import table1

MOST_RUNS_ON_SCREEN = 40


def main() -> None:
    """Print a table of the runs and draw them; of different configs make Table 1 and Figure 1."""
    parser = argparse.ArgumentParser(
        prog="python -m consensus.report", description="Compare runs from their metrics files."
    )
    parser.add_argument(
        "paths", nargs="+", type=Path, metavar="RUN_DIR", help="a run, or a folder of runs"
    )
    parser.add_argument(
        "--output", type=Path, default=None, help="the figure [RUN_DIR/report.png of the first]"
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=None,
        help="folder for Table 1, Figure 1 and report.md, if two or more runs differ in their "
        "config [RUN_DIR/report of the first, if that is a folder of runs]",
    )
    arguments = parser.parse_args()
    try:
        report(arguments.paths, arguments.output, arguments.folder)
    except (ValueError, OSError) as error:
        print(f"consensus.report: {error}", file=sys.stderr)
        sys.exit(2)


def report(named: Sequence[Path], figure: Path | None = None, folder: Path | None = None) -> None:
    """Compare runs on the screen and in files.

    Args:
        named: Runs and folders of runs.
        figure: The figure of all runs; None: report.png in the first path.
        folder: For Table 1 and Figure 1; None: report/ in the first path, if that is a folder of
            runs.

    Raises:
        ValueError: If no metrics can be read, or `folder` is given and the runs do not differ.
        OSError: If a file cannot be written.
    """
    first = named[0]
    paths = find_runs(named)
    metrics = read_all(paths, named)
    runs = comparable_runs(paths, metrics)
    if folder is not None and not runs:
        raise ValueError("`--folder` needs two or more runs that differ in their config.yaml")
    if folder is None and not is_run(first):
        folder = first / "report"
    figure = figure or first / "report.png"
    evaluated = {label: rows for label, rows in metrics.items() if rows}
    shown = dict(list(evaluated.items())[:MOST_RUNS_ON_SCREEN])
    draw_convergence(evaluated, figure)
    if runs and folder is not None:
        write_report(runs, folder, [path.resolve().name for path in named])
    console = Console(soft_wrap=True, highlight=False)

    def say(line: str) -> None:
        console.print(line, markup=False)

    console.print(comparison_table(shown))
    if len(shown) < len(evaluated):
        where = f": {folder}/runs.csv, and {folder}/table1.csv" if runs and folder else ""
        say(f"and {len(evaluated) - len(shown)} more runs{where}")
    if len(evaluated) < len(metrics):
        say(f"{len(metrics) - len(evaluated)} without an evaluation")
    if runs:
        for table in screen_tables(table1(runs)):
            console.print(table)
        say(
            "--folder FOLDER writes Table 1 and Figure 1 there"
            if folder is None
            else f"Table 1 and Figure 1 in {folder}/report.md"
        )
    if analysed := measured(shown):
        second = figure.with_stem(f"{figure.stem}_stationarity")
        draw_stationarity(analysed, second)
        console.print(stationarity_table(analysed))
        for label, rows in analysed.items():
            say(f"{label}: {verdict(rows)}")
        say(f"stationarity in {second}")
    say(f"figure in {figure}")


if __name__ == "__main__":
    main()
