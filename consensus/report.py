"""Entry that draws runs from their metrics files: python -m consensus.report RUN_DIR..."""

import argparse
import sys
from pathlib import Path

from rich.console import Console

from consensus.run.report import comparison_table, draw, find_runs, read_metrics


def main() -> None:
    """Print a table of the runs and draw them in one figure."""
    parser = argparse.ArgumentParser(
        prog="python -m consensus.report", description="Compare runs from their metrics files."
    )
    parser.add_argument(
        "paths", nargs="+", type=Path, metavar="RUN_DIR", help="a run, or a folder of runs"
    )
    parser.add_argument(
        "--output", type=Path, default=None, help="the figure [RUN_DIR/report.png of the first]"
    )
    arguments = parser.parse_args()
    try:
        paths = find_runs(arguments.paths)
        runs = {label: read_metrics(path) for label, path in zip(labels(paths), paths, strict=True)}
        figure = arguments.output or arguments.paths[0] / "report.png"
        draw(runs, figure)
    except (ValueError, OSError) as error:
        print(f"consensus.report: {error}", file=sys.stderr)
        sys.exit(2)
    console = Console(soft_wrap=True, highlight=False)
    console.print(comparison_table(runs))
    console.print(f"figure in {figure}", markup=False)


def labels(paths: list[Path]) -> list[str]:
    """The name of each run directory; the whole path where names coincide."""
    names = [path.resolve().name for path in paths]
    return [
        str(path) if names.count(name) > 1 else name
        for name, path in zip(names, paths, strict=True)
    ]


if __name__ == "__main__":
    main()
