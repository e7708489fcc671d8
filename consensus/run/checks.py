"""Checks of config values. Each refusal is one line: the key, the value and the allowed values."""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from consensus.registry import Registry

T = TypeVar("T")


class ConfigError(ValueError):
    """A mistake of the user, in one line that names the key, the value and the allowed values."""


Rule = Mapping[str, Any]
"""Metadata of a field: `test` of a value, and the text or the names that are `allowed`."""


def rule(test: Callable[[Any], bool], allowed: str) -> Rule:
    """A condition on a value."""
    return {"test": test, "allowed": allowed}


def one_of(names: Collection[str]) -> Rule:
    """Membership in a tuple or a table, which plugins may extend later."""
    return {"test": lambda value: value in names, "allowed": names}


def or_null(other: Rule, meaning: str = "") -> Rule:
    """A condition that null satisfies too; `meaning` is the effect of null."""
    allowed = f"{other['allowed']}, or null{meaning and f' for {meaning}'}"
    return rule(lambda value: value is None or other["test"](value), allowed)


POSITIVE = rule(lambda x: 0 < x < math.inf, "a finite number > 0")
RATE = rule(lambda x: 0 <= x <= 1, "a number in [0, 1]")
COUNT = rule(lambda x: x >= 1, "a whole number >= 1")


def require(condition: bool, key: str, value: object, allowed: str) -> None:
    """Raise ConfigError unless the condition holds."""
    if not condition:
        raise ConfigError(f"`{key}` is {value}; allowed: {allowed}")


def require_one_of(key: str, value: str, names: Collection[str]) -> None:
    """Refuse a word that is not among the names."""
    require(value in names, key, value, ", ".join(sorted(names)))


def check_fields(section: Any, path: str = "") -> None:
    """Refuse the first field of a dataclass that breaks its rule; `path` precedes its name."""
    for entry in fields(section):
        if entry.metadata:
            value, good = getattr(section, entry.name), entry.metadata["test"]
            require(good(value), f"{path}{entry.name}", value, allowed_by(entry.metadata))


def allowed_by(metadata: Rule) -> str:
    """The allowed values of a rule as text."""
    allowed = metadata["allowed"]
    return allowed if isinstance(allowed, str) else ", ".join(sorted(allowed))


class Section:
    """A part of the config; its fields are checked when it is made."""

    path: ClassVar[str]
    classes: ClassVar[dict[str, type["Section"]]] = {}  # of all sections, by key

    def __init_subclass__(cls, key: str) -> None:
        cls.path = f"{key}."
        cls.classes[key] = cls

    def __post_init__(self) -> None:
        check_fields(self, self.path)


def made(key: str, table: Registry[T], name: str, options: dict[str, Any]) -> T:
    """An entry of a table. ConfigError if there is none, or it refuses the options."""
    require_one_of(f"{key}.name", name, table)
    try:
        return table.make(name, **options)
    except (ValueError, TypeError, OverflowError) as error:
        raise ConfigError(f"`{key}.options` is {options}: {error}") from error


def absolute(key: str, path: str) -> str:
    """The absolute form of a path, which a later chdir does not affect."""
    require(path != "", key, "''", "the path of a file or folder")  # a variable that is not set
    try:
        found = Path(path).expanduser().resolve()
        found.exists()  # raises what a later access would, such as a name that is too long
    except (OSError, RuntimeError, ValueError) as error:
        cause = error.strerror if isinstance(error, OSError) else error
        allowed = f"the path of a file or folder ({cause})"
        raise ConfigError(f"`{key}` is {path}; allowed: {allowed}") from error
    return str(found)
