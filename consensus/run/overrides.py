"""Overrides `key=text` of keys whose values are paths or names, quoted for Hydra and for a shell.

Hydra's grammar gives a meaning to `=`, `,`, brackets, quotes and digits such as 991_2. Paths and
names have none of these meanings.
"""

import re
import shlex
from collections.abc import Iterable, Sequence
from functools import cache

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException

TEXTS = ("output.run_dir", "output.root", "output.name", "resume", "data.root", "sweep.dir")
"""The keys whose values on a command line are taken as text."""

_QUOTED = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\""""
_CHOICE = re.compile(rf"\s*({_QUOTED}|[^,]*?)\s*,", re.DOTALL)
_FUNCTION = re.compile(r"\w+\(.*\)", re.DOTALL)


def override(key: str, text: str) -> str:
    """The override that sets a key to this text, whatever characters it has."""
    literal = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)  # no interpolation
    return f"{key}={literal if _read(literal) == text else _quote(literal)}"


def for_shell(overrides: Iterable[str]) -> str:
    """Overrides as words of a POSIX shell, to paste."""
    # shlex alone would write '"'"' for each of Hydra's quotes.
    plain = re.compile(r"""[^"$`!\\]*'[^"$`!\\]*""")
    return " ".join(f'"{w}"' if plain.fullmatch(w) else shlex.quote(w) for w in overrides)


def before_switches(words: Sequence[str]) -> list[str]:
    """The words with those of the form KEY=VALUE first, where Hydra's parser looks for them all.

    Values of switches, as in `--config-dir FOLDER`, stay behind them.
    """
    return sorted(words, key=lambda word: word[:1] == "-" or not ("=" in word or word[:1] == "~"))


def take_as_text(arguments: Sequence[str], sweeping: bool = False) -> list[str]:
    """A command line in which Hydra reads the values of `TEXTS` as text.

    null, interpolations and values that are quoted or escaped for Hydra keep their meaning. If
    `sweeping`, commas separate values, except in `sweep.dir`, and functions such as `glob` remain.
    """
    return [_take_as_text(argument, sweeping) for argument in arguments]


def _take_as_text(argument: str, sweeping: bool) -> str:
    key, equals, value = argument.partition("=")
    if not equals or key.lstrip("+") not in TEXTS:
        return argument
    if sweeping and key != "sweep.dir":
        if _FUNCTION.fullmatch(value.strip()) and _read(value) is not None:
            return argument
        return f"{key}={','.join(map(_literal, _CHOICE.findall(f'{value},')))}"
    return f"{key}={_literal(value)}"


def _literal(value: str) -> str:
    meant = re.fullmatch(_QUOTED, value, re.DOTALL) or value.lower() == "null"
    read = _read(value)
    escaped = isinstance(read, str) and "\\" in value
    return value if meant or escaped or read == value else _quote(value)


def _quote(text: str) -> str:
    return QuotedString(text, Quote.single).with_quotes()


def _read(value: str) -> object:
    """The value that Hydra reads; None if it refuses it."""
    try:
        return _parser().parse_override(f"key={value}").value()
    except HydraException:
        return None


@cache
def _parser() -> OverridesParser:
    return OverridesParser.create()
