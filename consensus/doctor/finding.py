"""What the doctor finds, and how a person reads it."""

from collections.abc import Iterable, Sequence
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


def worst(findings: Iterable[Finding]) -> Level:
    """The level of the worst."""
    return max((finding.level for finding in findings), default=Level.FINE)


def print_report(places: Sequence[str], found: Sequence[Sequence[Finding]]) -> None:
    """Say what was found, each thing once, with the places where it was.

    Args:
        places: Names of the members that looked.
        found: What each of them found.
    """
    console = Console(soft_wrap=True, highlight=False)
    where: dict[Finding, list[str]] = {}
    for place, findings in zip(places, found, strict=True):
        for finding in findings:
            where.setdefault(finding, []).append(place)
    topics = sorted({finding.topic for finding in where}, key=_place_of)
    width = max(map(len, topics), default=0)
    for topic in topics:
        for finding, at in where.items():
            if finding.topic != topic:
                continue
            everywhere = len(at) == len(places)
            text = finding.text if everywhere else f"{_named(at)}: {finding.text}"
            first, *others = text.splitlines()
            level = (
                finding.level.name if finding.level == Level.FAULT else finding.level.name.lower()
            )
            head = (f"{topic:<{width}}  ", (f"{level:<7}", STYLES[finding.level]), f"  {first}")
            console.print(Text.assemble(*head))
            indent = " " * (width + 11)
            for line in others:
                console.print(Text(indent + line))
            if finding.remedy:
                console.print(Text(f"{indent}remedy: {finding.remedy}"))
    number = {level: sum(f.level == level for f in where) for level in Level}
    console.print(
        f"{_count(number[Level.FAULT], 'fault')}, {_count(number[Level.WARNING], 'warning')}"
    )


def _place_of(topic: str) -> tuple[int, str]:
    """In a report. What is not listed is a part of the config, and comes in the middle."""
    order = FIRST.index(topic) if topic in FIRST else len(FIRST)
    return order + (1 + LAST.index(topic) if topic in LAST else 0), topic


def _named(places: Sequence[str]) -> str:
    more = len(places) - MOST_PLACES
    shown = ", ".join(places[: MOST_PLACES if more > 0 else None])
    return f"{shown} and {more} more" if more > 0 else shown


def _count(number: int, noun: str) -> str:
    return f"{number or 'no'} {noun}{'' if number == 1 else 's'}"


def table(rows: Sequence[Sequence[Any]]) -> list[str]:
    """Rows of words as lines with aligned columns."""
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(f"{word!s:>{w}}" for word, w in zip(row, widths, strict=True)) for row in rows
    ]
