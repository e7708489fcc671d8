"""What the doctor finds, and how a person reads it."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from enum import IntEnum
from typing import Any

from rich.console import Console
from rich.text import Text


class Level(IntEnum):
    """How bad it is."""

    FINE = 0
    WARNING = 1
    FAULT = 2


STYLES = {Level.FINE: "green", Level.WARNING: "yellow", Level.FAULT: "bold red"}
MOST_PLACES = 4
FIRST = ("versions", "cores", "devices", "limits")
OF_NODES = ("cores", "limits", "memory", "disk", "network", "clock", "folder")
"""Topics of a whole node, whichever of its ranks has looked."""
LAST = ("memory", "disk", "rendezvous", "network", "clock", "folder", "sums", "speed")


@dataclass(frozen=True)
class Finding:
    """One sentence about one thing.

    Attributes:
        topic: What it is about, in one word.
        text: What was seen; its first line is a sentence, others may follow.
        level: FAULT: a run would fail, or not be what it seems. WARNING: it would suffer.
        remedy: What to do about it; "" if there is nothing to do.
    """

    topic: str
    text: str
    level: Level = Level.FINE
    remedy: str = ""

    def to_json(self) -> dict[str, Any]:
        """For the other ranks."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Finding":
        """From another rank."""
        return cls(**value | {"level": Level(value["level"])})


def fault(topic: str, text: str, remedy: str) -> Finding:
    """What makes a run fail."""
    return Finding(topic, text, Level.FAULT, remedy)


def warning(topic: str, text: str, remedy: str) -> Finding:
    """What a run suffers from."""
    return Finding(topic, text, Level.WARNING, remedy)


class FaultError(Exception):
    """A fault after which there is nothing more to look at.

    Attributes:
        finding: It.
    """

    def __init__(self, topic: str, text: str, remedy: str) -> None:
        super().__init__(text)
        self.finding = fault(topic, text, remedy)


def looked(topic: str, check: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """What a check finds. One that fails in a way nobody thought of is a finding as well."""
    findings: list[Finding] = []
    try:
        findings += check()
    except FaultError as error:
        findings.append(error.finding)
    except Exception as error:
        findings.append(unexpected(topic, error))
    return findings


def unexpected(topic: str, error: Exception) -> Finding:
    """What fails in a way nobody thought of."""
    text = (str(error).strip() or "no message").splitlines()[0]
    return fault(topic, f"{type(error).__name__}: {text}", "as it says; a run would fail alike")


def worst(findings: Iterable[Finding]) -> Level:
    """The level of the worst."""
    return max((finding.level for finding in findings), default=Level.FINE)


def print_report(places: Sequence[str], found: Sequence[Sequence[Finding]]) -> None:
    """Say what was found, each thing once, with the places where it was.

    What is fine and differs from place to place in its numbers alone is said of the first.

    Args:
        places: Names of the members that looked: "NODE", or "NODE rank RANK".
        found: What each of them found.
    """
    console = Console(soft_wrap=True, highlight=False)
    where: dict[Finding, list[str]] = {}
    shapes: dict[tuple[str, str], Finding] = {}
    for place, findings in zip(places, found, strict=True):
        for finding in findings:
            if finding.level == Level.FINE:
                shape = re.sub(r"[\d.,]+", "#", finding.text)
                finding = shapes.setdefault((finding.topic, shape), finding)
            where.setdefault(finding, []).append(place)
    topics = sorted({finding.topic for finding in where}, key=_place_of)
    width = max(map(len, topics), default=0)
    for topic in topics:
        for finding, at in where.items():
            if finding.topic != topic:
                continue
            prefix = "" if finding.level == Level.FINE else _named(topic, at, places)
            first, *others = f"{prefix}{finding.text}".splitlines()
            name = finding.level.name
            level = name if finding.level == Level.FAULT else name.lower()
            head = (f"{topic:<{width}}  ", (f"{level:<7}", STYLES[finding.level]), f"  {first}")
            console.print(Text.assemble(*head))
            indent = " " * (width + 11)
            for line in others:
                console.print(Text(indent + line))
            if finding.remedy:
                console.print(Text(f"{indent}remedy: {finding.remedy}"))


def print_verdict(findings: Iterable[Finding]) -> None:
    """How many faults and warnings there are, each counted once."""
    levels = [finding.level for finding in set(findings)]
    faults, warnings = levels.count(Level.FAULT), levels.count(Level.WARNING)
    print(f"{_count(faults, 'fault')}, {_count(warnings, 'warning')}", flush=True)


def _place_of(topic: str) -> tuple[int, str]:
    """In a report. What is not listed is a part of the config, and comes in the middle."""
    order = FIRST.index(topic) if topic in FIRST else len(FIRST)
    return order + (1 + LAST.index(topic) if topic in LAST else 0), topic


def _named(topic: str, at: Sequence[str], places: Sequence[str]) -> str:
    """The nodes, and where it is not all of them the ranks, in front of what was found there."""
    everyone, here = _by_node(places), _by_node(at)
    whole = topic in OF_NODES
    if here.keys() == everyone.keys() and (whole or len(at) == len(places)):
        return ""
    names = []
    for node, ranks in here.items():
        some = not whole and ranks != everyone[node]
        which = f"rank {', '.join(ranks)}" if some else ""
        names.append(" ".join(filter(None, (node if len(everyone) > 1 else "", which))))
    more = len(names) - MOST_PLACES
    shown = "; ".join(names[: MOST_PLACES if more > 0 else None])
    return f"{shown}; and {more} more: " if more > 0 else f"{shown}: "


def _by_node(places: Sequence[str]) -> dict[str, list[str]]:
    nodes: dict[str, list[str]] = {}
    for place in places:
        node, _, rank = place.partition(" rank ")
        nodes.setdefault(node, []).append(rank)
    return nodes


def _count(number: int, noun: str) -> str:
    return f"{number or 'no'} {noun}{'' if number == 1 else 's'}"


def table(rows: Sequence[Sequence[Any]]) -> list[str]:
    """Rows of words as lines with aligned columns."""
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(f"{word!s:>{w}}" for word, w in zip(row, widths, strict=True)) for row in rows
    ]
