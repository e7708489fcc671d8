"""The best configuration of a report, as an experiment that `consensus.train` takes."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from shlex import quote

from omegaconf import OmegaConf

from consensus.report.table1 import Configuration, Record, of_held_out, show_mean, words


def best_of_each(records: Sequence[Record]) -> dict[str, tuple[Record, Configuration]]:
    """Experiment -> the best configuration of all potentials and methods, for each problem.

    There is one, `best`, unless the runs have several problems, which cannot be compared.
    """
    groups: dict[tuple[str, ...], list[tuple[Record, Configuration]]] = {}
    for r in records:
        if r.best is not None:
            groups.setdefault(r.problem, []).append((r, r.best))
    found = {}
    for problem, of in groups.items():
        name = "_".join(["best", *(re.sub(r"\W+", "-", word) for word in problem)])
        found[name if len(groups) > 1 else "best"] = min(of, key=lambda one: one[1].sort_key())
    return found


def best_files(records: Sequence[Record], folder: Path) -> dict[str, str]:
    """File -> text of the experiments, to be written in the folder of a report.

    Each has every key of the first seed of its configuration, but where the run wrote its files. A
    run without a whole config has none.
    """
    files = {}
    for name, (record, best) in best_of_each(records).items():
        run = next(iter(best.kept.values()))
        if run.settings:
            settings = {**run.settings, "workers": run.config.get("workers")}
            about = "".join(
                f"# {' '.join(line.split())}\n"
                for line in (sentence(record, best), command(name, folder))
            )
            head = f"# @package _global_\n{about}"
            files[f"experiment/{name}.yaml"] = head + OmegaConf.to_yaml(OmegaConf.create(settings))
    return files


def sentence(record: Record, best: Configuration) -> str:
    """The number that decides, its spread over the seeds, and the configuration."""
    chosen = " ".join(f"{k}={v}" for k, v in record.chosen.items() if v is not None)
    seeds = f"seed{'s' * (best.seeds != '1')}"
    return (
        f"Best in {words(record.column)}{of_held_out(record.column)}: {record.label}, "
        f"{show_mean(best.mean(record.column), record.column)} ({best.seeds} {seeds})"
        + f", with {chosen}"
        * bool(chosen)
    )


def command(name: str, folder: Path) -> str:
    """The command that trains an experiment of the folder of a report."""
    return f"python -m consensus.train --config-dir={quote(str(folder))} experiment={name}"


def best_lines(records: Sequence[Record], folder: Path | None) -> Mapping[str, str]:
    """Sentence -> command for each best configuration; no command without a folder or a config."""
    files = best_files(records, folder) if folder is not None else {}
    return {
        sentence(*found): command(name, folder)
        if folder is not None and f"experiment/{name}.yaml" in files
        else ""
        for name, found in best_of_each(records).items()
    }
