"""Plugins: modules of the user that register potentials, models, data sets and other entries.

Hydra chooses `potential=NAME` among the YAML files of the group. For a registered name without a
file, `file_of` makes what the file would hold.
"""

import importlib
import inspect
import json
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any
from weakref import WeakKeyDictionary

from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from consensus.core.potentials import POTENTIALS
from consensus.problem import DATASETS, LOSSES, MODELS
from consensus.registry import Registry
from consensus.run.checks import ConfigError, absolute, require
from consensus.run.yaml_files import GROUPS

TABLES: dict[str, Registry[Any]] = {
    "potential": POTENTIALS,
    "data": DATASETS,
    "model": MODELS,
    "loss": LOSSES,
}
"""The groups of the config whose names are those of a table."""

_KEYS: dict[str, dict[str, Any]] = {
    "potential": {"eta": 1.0},
    "data": {
        "root": "data",
        "partition": "full",
        "alpha": 0.5,
        "validation": 0.0,
        "loader_workers": 0,
    },
    "model": {},
    "loss": {},
}
"""The keys of a file of each group beside `name` and `options`, with their defaults."""

_OFFERED = {"data": ("root",), "model": ("num_classes",)}
"""Arguments of factories that are no options: a key of the config or the data determine them."""

_LIBRARIES = ("consensus", "__main__", "torch", "torchvision", "numpy", "hydra", "omegaconf")
"""Packages, beside those of Python, in whose frames an error is none of the user's code."""

MUST = inspect.Parameter.empty  # the default of an option without one

ALLOWED = "a module on the Python path or in the current folder, or the path of a file NAME.py"


def import_plugin(name: str) -> str:
    """Import a module, or a file NAME.py as the module NAME. Returns its name for any folder.

    A module of the current folder is found as well. ConfigError if there is none, or it fails.
    """
    module, file = name, None
    if name.endswith(".py"):
        file = Path(absolute("plugins", name))
        require(file.is_file() and "." not in file.stem, "plugins", name, ALLOWED)
        module = file.stem
    else:
        named = all(part.isidentifier() for part in name.split("."))
        require(named, "plugins", name or "''", ALLOWED)
    folder = str(file.parent if file is not None else Path.cwd())
    if folder not in sys.path:  # last, so that it hides no other module
        sys.path.append(folder)
    importlib.invalidate_caches()  # the file may be new
    try:
        found = importlib.import_module(module)
    except (Exception, SystemExit) as error:  # a script that ends itself is no plugin
        if _is_absent(error, module):
            raise ConfigError(f"`plugins` is {name}; allowed: {ALLOWED} ({error})") from error
        raise ConfigError(f"`plugins` is {name}, which fails: {_described(error)}") from error
    if file is None:
        return name
    other = _file_of(found)
    allowed = f"a file of another name: there is a module {module} already ({other})"
    require(other == file, "plugins", file, allowed)
    return str(file)


def _is_absent(error: BaseException, module: str) -> bool:
    """Whether an error says that there is no such module, and not one that the module imports."""
    absent = error.name if isinstance(error, ModuleNotFoundError) else None
    return absent is not None and f"{module}.".startswith(f"{absent}.")


def place_in_user_code(error: BaseException) -> str | None:
    """File and line of the user's code where an error began; None if it has not passed there.

    A library that the user's code calls may have raised it: the innermost line of the user counts.
    """
    known, found = {*_LIBRARIES, *sys.stdlib_module_names}, None
    for frame, line in traceback.walk_tb(error.__traceback__):
        if str(frame.f_globals.get("__name__")).partition(".")[0] not in known:
            found = f"{frame.f_code.co_filename}, line {line}"
    return found


def _described(error: BaseException) -> str:
    """The error, and the innermost line outside of the import system."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename != __file__]
    where = [f"{f.filename}, line {f.lineno}" for f in frames if "importlib" not in f.filename]
    return f"{type(error).__name__}: {error}" + (f" ({where[-1]})" if where else "")


def _file_of(module: ModuleType) -> Path | None:
    name = getattr(module, "__file__", None)
    return None if name is None else Path(name).resolve()


_NAMES: "WeakKeyDictionary[Any, dict[str, str]]" = WeakKeyDictionary()  # of files, by loader


def require_chosen(cfg: DictConfig, overrides: Sequence[str]) -> None:
    """Refuse a choice such as `potential=log` that an experiment has replaced by its own `name`.

    An experiment is merged after the files of its command. Hydra must be initialized.
    """
    given = {text.lstrip("+").partition("=")[0] for text in overrides}
    if "experiment" not in given:
        return
    names = _NAMES.setdefault(GlobalHydra.instance().config_loader(), {})
    for group in (g for g in GROUPS if g != "output"):  # output.name is that of the run
        found = OmegaConf.select(cfg, f"{group}.name")
        for choice in choices(overrides, group) if f"{group}.name" not in given else ():
            if choice == found or not isinstance(choice, str):
                continue
            if (text := f"{group}={choice}") not in names:
                names[text] = compose("train", overrides=[text])[group].name
            allowed = f"{found}, which the experiment sets"
            if group in TABLES:  # an algorithm is all of its keys
                allowed += f"; {group}.name={names[text]} replaces it"
            require(names[text] == found, group, choice, allowed)


def choices(overrides: Sequence[str], key: str) -> Iterator[Any]:
    """The values of a key in overrides, which may sweep over several. Hydra must be initialized.

    Overrides that cannot be read are left to Hydra, which explains them.
    """
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    for text in overrides:
        if text.lstrip("+").partition("=")[0] != key:
            continue
        with suppress(HydraException):
            override = parser.parse_override(text)
            if not override.is_sweep_override():
                yield override.value()
            elif override.is_discrete_sweep():
                yield from override.sweep_iterator()


def files_of_names(known: Mapping[str, Sequence[str]]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Group, name and content of a file for each registered name without one.

    `known` are the names of each group that have a file.
    """
    for group, table in TABLES.items():
        for name in table:
            if name not in known[group]:
                yield group, name, {"name": name, **_KEYS[group], "options": _options(group, name)}


def _options(group: str, name: str) -> dict[str, Any]:
    """The options of a factory with their defaults; `???` where the user has to choose.

    A default that is no plain data is left out, and stays that of the factory.
    """
    found = {}
    for key, value in TABLES[group].options(name).items():
        if key not in _OFFERED.get(group, ()):
            with suppress(TypeError, ValueError):
                plain = json.loads(json.dumps(value if value is not MUST else "???"))
                found[key] = plain
    return found
