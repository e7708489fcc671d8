"""Entry that draws runs from their metrics files: python -m consensus.report RUN_DIR..."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from consensus.records import NoEvaluationError, Row, read_rows
from consensus.report.page import write_report
from consensus.report.runs import (
    comparison_table,
    draw,
    find_runs,
    is_run,
)
from consensus.report.stationarity import (
    draw_stationarity,
    measured,
    stationarity_table,
    verdict,
)
from consensus.report.table1 import (
    Run,
    chosen_keys,
    make_lines,
    make_run,
    read_configs,
    screen_tables,
    varying,
)

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
        help="where Table 1, Figure 1 and report.md go, if two or more runs differ in their config "
        "[RUN_DIR/report of the first, if that is a folder of runs]",
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
        figure: Of all runs; None: report.png in the first of them.
        folder: For Table 1 and Figure 1; None: report/ in the first, if that is a folder of runs.

    Raises:
        ValueError: If they hold no metrics that can be read, or there is nothing for the folder.
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
    draw(evaluated, figure)
    if runs and folder is not None:
        write_report(runs, folder, [path.resolve().name for path in named])
    console = Console(soft_wrap=True, highlight=False)
    shown = dict(list(evaluated.items())[:MOST_RUNS_ON_SCREEN])
    console.print(comparison_table(shown))
    if len(shown) < len(evaluated):
        where = f": {folder}/runs.csv, and {folder}/table1.csv" if runs and folder else ""
        console.print(f"and {len(evaluated) - len(shown)} more runs{where}", markup=False)
    if len(evaluated) < len(metrics):
        console.print(f"{len(metrics) - len(evaluated)} without an evaluation", markup=False)
    if runs:
        for table in screen_tables(make_lines(runs), chosen_keys(runs)):
            console.print(table)
        if folder is None:
            console.print("--folder FOLDER writes Table 1 and Figure 1 there", markup=False)
        else:
            console.print(f"Table 1 and Figure 1 in {folder}/report.md", markup=False)
    analysed = measured(shown)
    if analysed:
        second = figure.with_stem(f"{figure.stem}_stationarity")
        draw_stationarity(analysed, second)
        console.print(stationarity_table(analysed))
        for label, rows in analysed.items():
            console.print(f"{label}: {verdict(rows)}", markup=False)
        console.print(f"stationarity in {second}", markup=False)
    console.print(f"figure in {figure}", markup=False)


def read_all(paths: Sequence[Path], named: Sequence[Path]) -> dict[str, list[Row]]:
    """Label -> the evaluations of each run.

    A sweep goes on while it is looked at, and some of its runs diverge before their first
    evaluation: found in a folder beside others, they have none.

    Args:
        paths: The run directories.
        named: What was asked for by name; a run among it must have evaluations.

    Raises:
        ValueError: If metrics cannot be read, or no run has an evaluation.
    """
    metrics: dict[str, list[Row]] = {}
    missing: NoEvaluationError | None = None
    for label, path in zip(labels(paths, named), paths, strict=True):
        try:
            metrics[label] = read_rows(path)
        except NoEvaluationError as error:
            if path in named:
                raise
            missing = missing or error
            metrics[label] = []
    if missing is not None and not any(metrics.values()):
        raise missing
    return metrics


def comparable_runs(paths: Sequence[Path], metrics: Mapping[str, Sequence[Row]]) -> list[Run]:
    """The runs with their configs, if there are two or more that differ; otherwise none.

    Raises:
        ValueError: If a config.yaml is missing beside others, or damaged.
    """
    configs = read_configs(paths) if len(paths) > 1 else None
    if configs is None:
        return []
    runs = [
        make_run(label, path, config, rows)
        for path, config, (label, rows) in zip(paths, configs, metrics.items(), strict=True)
    ]
    return runs if varying(runs) else []


def labels(paths: Sequence[Path], folders: Sequence[Path] = ()) -> list[str]:
    """The name of each run directory; of those that coincide more of the path.

    Args:
        paths: The run directories.
        folders: Where they were looked for: a path below the first that holds it may suffice.
    """
    names = [path.resolve().name for path in paths]
    inside = [
        next((str(path.relative_to(f)) for f in folders if f in path.parents), str(path))
        for path in paths
    ]
    return [
        name if names.count(name) == 1 else below if inside.count(below) == 1 else str(path)
        for name, below, path in zip(names, inside, paths, strict=True)
    ]


if __name__ == "__main__":
    main()
