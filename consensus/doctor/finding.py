"""Findings of the preflight check, and their report."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from typing import Any

from rich.console import Console
from rich.text import Text

from consensus.comm.rendezvous import first_line


class Level(IntEnum):
    """Severity of a finding."""

    FINE = 0
    WARNING = 1
    FAULT = 2


STYLES = {Level.FINE: "green", Level.WARNING: "yellow", Level.FAULT: "bold red"}
MOST_PLACES = 4
FIRST = ("versions", "cores", "devices", "limits")
OF_NODES = ("cores", "limits", "memory", "disk", "network", "clock", "folder")
"""Topics of a whole node, checked by one of its ranks."""
LAST = ("memory", "disk", "rendezvous", "network", "clock", "folder", "sums", "speed")


@dataclass(frozen=True)
class Finding:
    """Result of one check.

    Attributes:
        topic: Subject, in one word.
        text: Observation. The first line is a sentence; a table may follow.
        remedy: Advice; "" if there is none.
        level: FAULT: a run would fail or compute something else. WARNING: it would be slower or
            less safe.
    """

    topic: str
    text: str
    remedy: str = ""
    level: Level = Level.FINE

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Finding":
        """The finding whose `dataclasses.asdict` was sent as JSON."""
        return cls(**value | {"level": Level(value["level"])})


fault = partial(Finding, level=Level.FAULT)
warning = partial(Finding, level=Level.WARNING)


class FaultError(Exception):
    """A fault that makes further checks impossible.

    Attributes:
        finding: The fault.
    """

    def __init__(self, topic: str, text: str, remedy: str) -> None:
        super().__init__(text)
        self.finding = fault(topic, text, remedy)


def run_check(topic: str, check: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """Findings of a check. An unexpected exception becomes a finding."""
    findings: list[Finding] = []
    try:
        findings += check()
    except FaultError as error:
        findings.append(error.finding)
    except Exception as error:
        findings.append(unexpected(topic, error))
    return findings


def unexpected(topic: str, error: Exception) -> Finding:
    """The fault for an unexpected exception."""
    text = first_line(error) if str(error).strip() else "no message"
    return fault(topic, f"{type(error).__name__}: {text}", "as it says; a run would fail alike")


def worst(findings: Iterable[Finding]) -> Level:
    """Highest level among findings."""
    return max((finding.level for finding in findings), default=Level.FINE)


def print_report(places: Sequence[str], found: Sequence[Sequence[Finding]]) -> None:
    """Print each finding once, with its places: names of members, "NODE" or "NODE rank RANK".

    Of fine findings that differ only in their numbers the first is printed.
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
    width = max((len(finding.topic) for finding in where), default=0)
    indent = " " * (width + 11)
    for finding, at in sorted(where.items(), key=lambda item: _order(item[0].topic)):
        prefix = "" if finding.level == Level.FINE else _named(finding.topic, at, places)
        first, *others = f"{prefix}{finding.text}".splitlines()
        level = finding.level.name
        level = level if finding.level == Level.FAULT else level.lower()
        styled = (f"{level:<7}", STYLES[finding.level])
        console.print(Text.assemble(f"{finding.topic:<{width}}  ", styled, f"  {first}"))
        if finding.remedy:
            others.append(f"remedy: {finding.remedy}")
        for line in others:
            console.print(Text(indent + line))


def print_verdict(findings: Iterable[Finding]) -> None:
    """Print the number of distinct faults and warnings."""
    levels = [finding.level for finding in set(findings)]
    faults, warnings = levels.count(Level.FAULT), levels.count(Level.WARNING)
    print(f"{count(faults, 'fault')}, {count(warnings, 'warning')}", flush=True)


def _order(topic: str) -> tuple[int, str]:
    """Sort key of a topic. Topics that are not listed are parts of the config, in the middle."""
    order = FIRST.index(topic) if topic in FIRST else len(FIRST)
    return order + (1 + LAST.index(topic) if topic in LAST else 0), topic


def _named(topic: str, at: Sequence[str], places: Sequence[str]) -> str:
    """Prefix of a finding: its nodes, and its ranks unless all ranks of the node have it."""
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


def count(number: int, noun: str) -> str:
    """A number with its noun."""
    plural = "es" if noun.endswith("s") else "s"
    return f"{number or 'no'} {noun}{'' if number == 1 else plural}"
