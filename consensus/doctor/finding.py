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
    WARNING = 1  # a run would be slower or less safe
    FAULT = 2  # it would fail or compute something else


LABELS = (("fine   ", "green"), ("warning", "yellow"), ("FAULT  ", "bold red"))  # by level
MOST_PLACES = 4
FIRST = ("versions", "cores", "devices", "limits")
LAST = ("memory", "disk", "rendezvous", "network", "clock", "folder", "sums", "speed")
ORDER = (*FIRST, "", *LAST)  # of topics; "" stands for the parts of the config
OF_NODES = ("cores", "limits", "memory", "disk", "network", "clock", "folder")
"""Topics of a whole node, checked by one of its ranks."""


@dataclass(frozen=True)
class Finding:
    """Result of one check. `topic` is one word; a table may follow the first line of `text`."""

    topic: str
    text: str
    remedy: str = ""
    level: Level = Level.FINE


fault = partial(Finding, level=Level.FAULT)
warning = partial(Finding, level=Level.WARNING)


def run_check(topic: str, check: Callable[..., Iterable[Finding]], *args: Any) -> list[Finding]:
    """Findings of check(*args). An unexpected exception becomes the last one."""
    findings: list[Finding] = []
    try:
        findings.extend(check(*args))
    except Exception as error:
        findings.append(unexpected(topic, error))
    return findings


def unexpected(topic: str, error: Exception) -> Finding:
    """The fault for an unexpected exception."""
    text = first_line(error) if str(error).strip() else "no message"
    return fault(topic, f"{type(error).__name__}: {text}", "as it says; a run would fail alike")


def faults(findings: Iterable[Finding]) -> list[Finding]:
    """Those that are faults."""
    return [finding for finding in findings if finding.level == Level.FAULT]


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
    for finding, at in sorted(where.items(), key=lambda item: _order(item[0])):
        prefix = "" if finding.level == Level.FINE else _named(finding.topic, at, places)
        first, *others = f"{prefix}{finding.text}".splitlines()
        label = LABELS[finding.level]
        console.print(Text.assemble(f"{finding.topic:<{width}}  ", label, f"  {first}"))
        if finding.remedy:
            others.append(f"remedy: {finding.remedy}")
        for line in others:
            console.print(Text(" " * (width + 11) + line))


def print_verdict(findings: Iterable[Finding]) -> None:
    """Print the number of distinct faults and warnings."""
    levels = [finding.level for finding in set(findings)]
    number, warnings = levels.count(Level.FAULT), levels.count(Level.WARNING)
    print(f"{count(number, 'fault')}, {count(warnings, 'warning')}", flush=True)


def _order(finding: Finding) -> tuple[int, str]:
    return ORDER.index(finding.topic if finding.topic in ORDER else ""), finding.topic


def _named(topic: str, at: Sequence[str], places: Sequence[str]) -> str:
    """Prefix of a finding: its nodes, and its ranks unless all ranks of the node have it."""
    everyone, here = _by_node(places), _by_node(at)
    whole = topic in OF_NODES
    if here.keys() == everyone.keys() and (whole or len(at) == len(places)):
        return ""
    names = []
    for node, ranks in here.items():
        words = [node] if len(everyone) > 1 else []
        if not whole and ranks != everyone[node]:
            words.append(f"rank {', '.join(ranks)}")
        names.append(" ".join(words))
    if len(names) > MOST_PLACES:
        names[MOST_PLACES:] = [f"and {len(names) - MOST_PLACES} more"]
    return f"{'; '.join(names)}: "


def _by_node(places: Sequence[str]) -> dict[str, list[str]]:
    nodes: dict[str, list[str]] = {}
    for place in places:
        node, _, rank = place.partition(" rank ")
        nodes.setdefault(node, []).append(rank)
    return nodes


def amount(num_bytes: float) -> str:
    """A number of bytes, with a decimal unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.2g} {unit}" if num_bytes < 99.5 else f"{num_bytes:.0f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"


def count(number: int, noun: str) -> str:
    """A number with its noun."""
    plural = "es" if noun.endswith("s") else "s"
    return f"{number or 'no'} {noun}{'' if number == 1 else plural}"
