"""Pages that are generated at each build: configuration, potentials, modules.

The configuration comes from the schema (consensus/run/config.py), the values in configs/, and their
comments; the potentials from POTENTIALS; the modules from their docstrings. So these pages cannot
go stale.
"""

import ast
import io
import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_args, get_type_hints

import matplotlib
import torch

import consensus
from consensus.core import potentials
from consensus.core.potentials import POTENTIALS
from consensus.core.schedules import SCHEDULES
from consensus.core.sizes import Separable
from consensus.problem import DATASETS, LOSSES, MODELS
from consensus.report.style import STYLES, house_style, new_figure
from consensus.run.config import Config
from consensus.run.config_algorithm import ScheduleConfig
from consensus.run.yaml_files import GROUPS, entries, keys_of_runs, keys_of_sweeps, shown
from consensus.sweep.grid import SweepConfig

PACKAGE = Path(consensus.__file__).parent
TABLES = {"potential": POTENTIALS, "data": DATASETS, "model": MODELS, "loss": LOSSES}
TYPES = {
    "bool": "true or false",
    "str": "text",
    "str | None": "text or null",
    "list[str]": "a list of names",
    "dict[str, Any]": "the options of the entry",
    "int": "a whole number",
}
SHOWN = {"scaled_quad": {"weight": 2.0}, "cubic": {}, "power": {"p": 1.5}}  # options of the plots


# ---- configuration


def leaves(section, prefix=""):
    """(key, field, type) of every key of a schema. A schedule is one key, its name."""
    hints = get_type_hints(section)
    for entry in fields(section):
        key, kind = prefix + entry.name, hints[entry.name]
        if kind is ScheduleConfig:
            yield f"{key}.name", entry, kind
        elif is_dataclass(kind):
            yield from leaves(kind, f"{key}.")
        else:
            yield key, entry, kind


def allowed(entry, kind):
    """The values that a key takes, as text."""
    if kind is ScheduleConfig:
        return ", ".join(SCHEDULES)
    names = entry.metadata.get("allowed")
    if names is None:
        plain = isinstance(kind, type) and not get_args(kind)
        text = kind.__name__ if plain else str(kind).replace("typing.", "")
        return TYPES.get(text, text)
    return names if isinstance(names, str) else ", ".join(sorted(names))


def cell(text):
    """Text in a cell of a table."""
    return re.sub(r"([|*<])", r"\\\1", str(text))


def table(rows):
    """A table of keys."""
    lines = ["| key | default | allowed | |", "| --- | --- | --- | --- |"]
    for key, default, values, meaning in rows:
        lines.append(f"| `{key}` | `{default}` | {cell(values)} | {cell(meaning)} |")
    return "\n".join(lines) + "\n"


def rows_of_runs():
    """(key, default, allowed, meaning) of every key of configs/train.yaml."""
    known = keys_of_runs()
    for key, entry, kind in leaves(Config):
        yield key, known[key].default, allowed(entry, kind), known[key].meaning


def rows_of_sweeps():
    """The same of configs/sweep.yaml."""
    choices = {
        "sweep.engine": "separate, population",
        "sweep.gradients": "auto, measure, or a method by which a population computes gradients",
        "sweep.halving": "a list of increasing numbers below algorithm.iterations, or null",
        "sweep.keep": "a share in (0, 1), a whole number >= 1, or a list of them",
        "sweep.metric": "objective, train_loss, test_error and others, or null",
        "sweep.within": "a key that varies over the sweep, a list of them, or null",
        "sweep.screening_seeds": "a number >= 1, or null",
    }
    known = keys_of_sweeps()
    for key, entry, kind in leaves(SweepConfig):
        if key.startswith("sweep."):
            values_of = choices.get(key, allowed(entry, kind))
            yield key, known[key].default, values_of, known[key].meaning


def listed(group):
    """A list of the files of a group, with their introductions and options."""
    lines = []
    for entry, introduction in entries(group).items():
        line = f"- `{group}={entry}`"
        if introduction:
            line += f": {cell(introduction.rstrip('.'))}."
        names = TABLES.get(group)
        if names is not None and entry in names:
            own = {k: v for k, v in names.options(entry).items() if k not in ("root",)}
            own.pop("num_classes", None)
            if own:
                options = ", ".join(f"`{k}={shown(v)}`" for k, v in own.items())
                line += f" Options: {options}."
        lines.append(line)
    return "\n".join(lines) + "\n"


def configuration():
    """The page: all keys by section, the entries of the groups, experiments and grids."""
    rows = list(rows_of_runs())
    sections = ["## The run\n", table(row for row in rows if "." not in row[0])]
    for name in [*GROUPS, "stationarity"]:
        sections.append(f"## {name}\n")
        if name in GROUPS and name != "output":
            sections.append(listed(name))
        sections.append(table(row for row in rows if row[0].startswith(f"{name}.")))
    schedules = ", ".join(
        f"`{name}` ({', '.join(f'{k}={v}' for k, v in SCHEDULES.options(name).items()) or 'none'})"
        for name in SCHEDULES
    )
    sections += [
        f"Schedules and their options, under `algorithm.schedule.*.options`: {schedules}.\n"
    ]
    sections += ["## Experiments\n", listed("experiment"), "## Sweeps\n", listed("grid")]
    sections.append(table(rows_of_sweeps()))
    return "\n".join(sections)


# ---- potentials


def figure(name):
    """Profile and force of a potential along a ray, beside those of quad, as SVG."""
    phi = POTENTIALS.make(name, **SHOWN.get(name, {}))
    end = min(2.0, phi.bound**0.5)
    rho = torch.linspace(0.0, end * (1.0 - 1e-9), 400, dtype=torch.float64).unsqueeze(1)
    quad = POTENTIALS["quad"]
    with house_style(), matplotlib.rc_context({"svg.hashsalt": name, "axes.grid": False}):
        picture, ((*axes,),) = new_figure(1, 2)
        for axis, function, label in (
            (axes[0], lambda p: p.value(rho), "potential $p(x)$"),
            (axes[1], lambda p: p.grad(rho)[:, 0], "force $dp/dx$"),
        ):
            if name != "quad":
                axis.plot(rho, function(quad), color="0.5", linestyle="--", label="quad")
            axis.plot(rho, function(phi), color=STYLES[name]["color"], label=name)
            if end < 2.0:
                axis.axvline(end, ls=":", color="0.2", label="end of the domain")
            axis.set(xlabel=r"$x = w / \eta$, one coordinate", ylabel=label, xlim=(0, 2))
            axis.set_ylim(0, 8)
        axes[0].legend()
        file = io.StringIO()
        picture.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def gallery():
    """A section with facts and plots for each potential."""
    sections = []
    for name in POTENTIALS:
        phi, options = POTENTIALS[name], POTENTIALS.options(name)
        about = getattr(potentials, name).__doc__.splitlines()[0].rstrip(".")
        missing = sorted({"A1", "A2", "A3", "A4", "A5"} - phi.assumptions)
        domain = f"|x| < {phi.bound**0.5:.4g}" if phi.bounded else "all x"
        of = "each coordinate" if isinstance(phi.size, Separable) else "each layer"
        facts = {
            "Measures": of,
            "Domain": domain,
            "Assumptions": "all" if not missing else "all but " + ", ".join(missing),
            "Inverse gradient": "Newton's method" if phi.profile.radius is None else "closed form",
            "Options": ", ".join(f"`{k}={shown(v)}`" for k, v in options.items()) or "none",
        }
        plotted = ", ".join(f"{k}={v}" for k, v in SHOWN.get(name, {}).items())
        caption = f"{name}: profile and force" + (f" for {plotted}" if plotted else "")
        lines = [f"### `{name}`", "", cell(about) + ".", ""]
        lines += [f"- {key}: {cell(value)}" for key, value in facts.items()]
        lines += ["", f"![{caption}](_generated/{name}.svg)", ""]
        sections.append("\n".join(lines))
    return "\n".join(sections)


# ---- modules


def modules():
    """The tree of modules, each with the first line of its docstring."""
    lines = ["```text", "consensus/"]
    for path in sorted(PACKAGE.rglob("*.py"), key=place):
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        about = text.partition("\n\n")[0].replace("\n", " ").rstrip(".:")
        parts = path.relative_to(PACKAGE).parts
        folder = path.stem == "__init__"
        if folder and len(parts) == 1:
            continue
        name = f"{parts[-2]}/" if folder else parts[-1]
        indent = "  " * (len(parts) - folder)
        lines.append(f"{indent + name:<26} {about}".rstrip())
    return "\n".join([*lines, "```", ""])


def place(path):
    """The place of a module in the tree: the modules of a folder, then its folders."""
    *folders, name = path.relative_to(PACKAGE).parts
    return [(1, folder) for folder in folders] + [(0, "" if name == "__init__.py" else name)]


def write_pages(folder):
    """Write all of them; files that would not change are left alone."""
    folder.mkdir(exist_ok=True)
    files = {
        "configuration.md": configuration(),
        "potentials.md": gallery(),
        "modules.md": modules(),
    }
    files |= {f"{name}.svg": figure(name) for name in POTENTIALS}
    for name, text in files.items():
        path = folder / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
