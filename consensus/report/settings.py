"""Methods side by side in several settings of a problem, such as partitions of the data.

A setting is a combination of the values of some keys. In each of them a method, or a potential, has
its best configuration, as in Table 1.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from consensus.report.runs import Run, canonical, varying
from consensus.report.style import (
    ACROSS,
    axis_label,
    fit_axis,
    house_style,
    panel_grid,
    printable,
    save,
    styles,
)
from consensus.report.table1 import Record, heading, on_test_set, show, show_mean, table1

FIGURE = "settings.png"
CAPTION = (
    "Each method at its best in each setting, with one sample standard deviation over its seeds"
)


@dataclass(frozen=True)
class Setting:
    """The runs with the same values of some keys."""

    label: str  # `partition=label_skew, alpha=0.1`
    records: Mapping[
        str, Record
    ]  # by their labels: the method, and its problem if there are several

    @property
    def column(self) -> str:
        """The metric of the test set that belongs to the column that decides."""
        record = next(iter(self.records.values()))
        return on_test_set(record.column)


def settings(runs: Sequence[Run], keys: Sequence[str]) -> list[Setting]:
    """The settings that differ in some keys, in the order of their values.

    Raises:
        ValueError: If no run has a key.
    """
    for key in keys:
        if not any(key in run.config for run in runs):
            allowed = f"a key of the runs, such as those that vary: {', '.join(varying(runs))}"
            raise ValueError(f"`--by` is {key}; allowed: {allowed}")
    groups: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        groups.setdefault(tuple(canonical(run.config.get(key)) for key in keys), []).append(run)
    ordered = sorted(groups.values(), key=lambda own: [_place(own[0].config.get(k)) for k in keys])
    found = []
    for own in ordered:
        label = ", ".join(_labels(own[0], keys, runs))
        found.append(Setting(label, {record.label: record for record in table1(own)}))
    return found


def _place(value: object) -> tuple[bool, float, str]:
    """The sort key of a value: numbers by their size, before words."""
    if isinstance(value, int | float):
        return False, float(value), ""
    return True, 0.0, canonical(value)


def _labels(run: Run, keys: Sequence[str], runs: Sequence[Run]) -> list[str]:
    """`last part of the key=value`; of those that vary among the runs with the values before."""
    every, found = [], []
    for key in keys:
        every.append(f"{key.rpartition('.')[2]}={show(run.config.get(key))}")
        if len({canonical(other.config.get(key)) for other in runs}) > 1:
            found.append(every[-1])
        runs = [other for other in runs if other.config.get(key) == run.config.get(key)]
    return found or every


def names(found: Sequence[Setting]) -> list[str]:
    """The methods of all settings, in the order of the first that has each."""
    return list(dict.fromkeys(name for setting in found for name in setting.records))


def numbers_table(found: Sequence[Setting]) -> list[list[str]]:
    """A row for each method: its number on the test set in each setting, at its best."""
    column = found[0].column
    rows = [[heading(column), *(setting.label for setting in found)]]
    for name in names(found):
        records = [setting.records.get(name) for setting in found]
        cells = [show_mean(r.at_best.get(column), column) if r else "" for r in records]
        rows.append([name, *cells])
    return rows


def choices_table(found: Sequence[Setting]) -> list[list[str]]:
    """A row for each method: the keys that its configurations differ in, at its best."""
    rows = [["with", *(setting.label for setting in found)]]
    for name in names(found):
        records = [setting.records.get(name) for setting in found]
        rows.append([name, *(_choice(record) if record else "" for record in records)])
    return rows


def _choice(record: Record) -> str:
    """`pull=0.3 sigma=0.1`: the values at the best configuration; "" where there is none."""
    every = [run for configuration in record.configurations for run in configuration.runs]
    own = {key for key in varying(every) if key != "seed"}
    chosen = record.chosen.items() if record.best else ()
    return " ".join(f"{key.rpartition('.')[2]}={value}" for key, value in chosen if key in own)


def tables(found: Sequence[Setting]) -> list[list[list[str]]]:
    """Both tables."""
    return [numbers_table(found), choices_table(found)]


@house_style()
def draw_settings(found: Sequence[Setting], folder: Path) -> dict[str, str]:
    """A panel for each setting, with the number of each method. Returns PNG -> caption."""
    methods, column = names(found), found[0].column
    figure, axes = panel_grid(len(found), sharey=True, height=_height(len(found), len(methods)))
    known = [record for setting in found for record in setting.records.values()]
    style = styles(record.name for record in known)
    for axis, setting in zip(axes, found, strict=True):
        values = []
        for place, name in enumerate(methods):
            record = setting.records.get(name)
            mean = record.at_best.get(column) if record else None
            if record is None or mean is None:
                continue
            look = {key: style[record.name][key] for key in ("color", "marker")}
            axis.errorbar(mean.mean, place, xerr=mean.std or 0.0, elinewidth=0.8, ls="", **look)
            values.append(mean.mean)
        far = min(values, default=0.0) > 0.0 and max(values) > 5 * min(values)
        fit_axis(axis, values, log=far, along="x")
        axis.set_title(printable(setting.label), parse_math=False)
        axis.set_yticks(range(len(methods)), [printable(name) for name in methods])
        axis.grid(axis="y", visible=False)
    axes[0].set_ylim(len(methods) - 0.5, -0.5)
    for axis in axes[-ACROSS:]:
        axis.set_xlabel(axis_label(column))
    save(figure, folder / FIGURE)
    return {FIGURE: CAPTION}


def _height(panels: int, methods: int) -> float:
    """Inches: a line of text for each method in each row of panels."""
    return -(-panels // min(ACROSS, panels)) * (0.16 * methods + 0.45) + 0.3
