"""The YAML files of the configuration: their folder, entries, default values and comments.

The comment beside a key is its description, and the comments at the top of a file describe its
entry. The help of the commands and the configuration reference print both. This module imports no
torch, so that the help takes no seconds.
"""

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf

GROUPS = ("potential", "algorithm", "data", "model", "loss", "group", "output")
OF_ENTRIES = {"name": "the entry; {}=NAME chooses it with its options", "options": "see above"}

OTHER_NAMES = {"lr": "algorithm.sigma", "learning_rate": "algorithm.sigma"}
"""Names that other programs have -> ours."""


class Key(NamedTuple):
    """A key of the configuration, without its type."""

    default: str  # as on the command line
    meaning: str  # one line; "" if its YAML file says nothing


def config_dir() -> str:
    """Absolute directory of the YAML files: in the installed package, else beside it."""
    package = Path(__file__).resolve().parents[1]
    for candidate in (package / "configs", package.parent / "configs"):
        if (candidate / "train.yaml").is_file():
            return str(candidate)
    raise FileNotFoundError("no configs/train.yaml inside or beside the consensus package")


def register_resolvers() -> None:
    """Register the interpolations of the YAML files.

    `${unless:${.other},VALUE}` in a YAML file is a default: VALUE unless the other key is given,
    and null beside it, or the third argument. `${lr:${.optimizer},VALUE}` is the `lr` of a given
    optimizer. A value of the user replaces it, so that both are seen.
    """
    OmegaConf.register_new_resolver("unless", _unless, replace=True)
    OmegaConf.register_new_resolver("lr", _lr, replace=True)


def _unless(other: object, value: object, beside: object = None) -> object:
    return value if other is None else beside


def _lr(optimizer: object, value: object) -> object:
    lr = optimizer.get("lr") if isinstance(optimizer, Mapping) else None
    return lr if isinstance(lr, int | float) else value  # the optimizer is refused without one


def comments(path: Path) -> tuple[dict[str, str], str]:
    """The comments of a YAML file by key, and its introduction, the comments at its top."""
    found: dict[str, str] = {}
    above, stack = [], list[tuple[int, str]]()
    for line in path.read_text(encoding="utf-8").splitlines():
        entry = re.match(r"( *)([\w]+):(.*)", line)
        if line.startswith("#") and not found:
            above.append(line.removeprefix("#").strip())
        if entry is None:
            continue
        depth, key, rest = len(entry[1]), entry[2], entry[3]
        stack = [*(pair for pair in stack if pair[0] < depth), (depth, key)]
        comment = re.search(r"(?:^|\s)#\s+(.*)", rest)
        found[".".join(name for _, name in stack)] = comment[1] if comment else ""
    introduction = " ".join(text for text in above if not text.startswith("@package"))
    return found, introduction


@cache
def entries(group: str) -> dict[str, str]:
    """Name -> introduction of each entry of a group, in the order of their names."""
    files = sorted(Path(config_dir(), group).glob("*.yaml"))
    return {path.stem: comments(path)[1] for path in files}


@cache
def default_of(group: str) -> str:
    """The entry of a group that configs/train.yaml chooses."""
    chosen = OmegaConf.load(Path(config_dir(), "train.yaml")).defaults
    return next(str(entry[group]) for entry in chosen if group in entry)


@cache
def keys_of_runs() -> dict[str, Key]:
    """The keys of configs/train.yaml and of the entries that it chooses."""
    values, said = _read("train")
    last = {key: values.pop(key) for key in list(values) if isinstance(values[key], dict)}
    for group in GROUPS:
        values[group], about = _read(f"{group}/{default_of(group)}")
        said |= {f"{group}.{key}": text for key, text in about.items()}
    register_resolvers()
    resolved = OmegaConf.to_container(OmegaConf.create(values | last), resolve=True)
    found = {}
    for key, value in _leaves(resolved):
        group, _, name = key.partition(".")
        schedule = said["algorithm.schedule"] if key.startswith("algorithm.schedule.") else ""
        meaning = schedule or said.get(key) or OF_ENTRIES.get(name, "").format(group)
        found[key] = Key(shown(value), meaning)
    return found


@cache
def keys_of_sweeps() -> dict[str, Key]:
    """The keys `sweep.*` of configs/sweep.yaml."""
    values, said = _read("sweep")
    return {key: Key(shown(value), said[key]) for key, value in _leaves(values)}


def _read(name: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The values of a YAML file, without what is Hydra's, and its comments."""
    path = Path(config_dir(), f"{name}.yaml")
    values: Any = OmegaConf.to_container(OmegaConf.load(path))
    return {k: v for k, v in values.items() if k not in ("defaults", "hydra")}, comments(path)[0]


def _leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The full keys and values. Options are one value, and a schedule is one key, its name."""
    for name, value in node.items():
        key = f"{path}{name}"
        if isinstance(value, dict) and name != "options":
            yield from _leaves(value, f"{key}.")
        elif not (name == "options" and ".schedule." in path):
            yield key, value


def shown(value: object) -> str:
    """A value as on the command line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {shown(part)}" for key, part in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(shown, value)) + "]"
    words = {"None": "null", "True": "true", "False": "false"}
    return words.get(str(value), str(value))


def did_you_mean(name: str | None) -> str:
    """The hint in a refusal, "" without a name."""
    return f" (did you mean `{name}`?)" if name else ""


def namesake(key: str, known: Iterable[str]) -> str | None:
    """The first full key with the same last part, or with that meaning in other programs."""
    name = key.rpartition(".")[2]
    return OTHER_NAMES.get(name) or next((k for k in known if k.rpartition(".")[2] == name), None)


def nearest(key: str, known: Iterable[str]) -> str | None:
    """A full key whose last part is the same, or else similar; None if there is none."""
    parts: dict[str, str] = {}
    for full in known:
        parts.setdefault(full.rpartition(".")[2], full)
    close = difflib.get_close_matches(key.rpartition(".")[2], parts, n=1)
    return namesake(key, parts.values()) or (parts[close[0]] if close else None)
