"""View: the members of an elastic run between two changes, and the places of their processes."""

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from consensus.comm.launch import stat_of


@dataclass(frozen=True)
class View:
    """The members from one change to the next.

    Attributes:
        number: 0 for the first.
        members: Their names, by seniority; the rank of a member is its place.
        workers: The numbers j of the workers of each.
        new: Those that this view has admitted.
        gone: Name -> why, for members of the view before that are missing.
        stop: Why the run stops here; "": it goes on.
    """

    number: int
    members: tuple[str, ...]
    workers: tuple[tuple[int, ...], ...]
    new: tuple[str, ...] = ()
    gone: dict[str, str] = field(default_factory=dict)
    stop: str = ""

    def to_json(self) -> str:
        """The text in the store."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "View":
        """The view of a text in the store."""
        found = json.loads(text)
        workers = tuple(tuple(numbers) for numbers in found.pop("workers"))
        members, new = tuple(found.pop("members")), tuple(found.pop("new"))
        return cls(members=members, workers=workers, new=new, **found)

    @property
    def numbers(self) -> tuple[int, ...]:
        """The numbers j of all workers, in the order of ranks."""
        return tuple(j for own in self.workers for j in own)


def place_of(pid: int) -> dict[str, str]:
    """Host, process and its start in clock ticks, as far as Linux tells."""
    place = {"pid": str(pid)}
    with suppress(OSError, IndexError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        place["host"] = f"{boot} {os.readlink('/proc/self/ns/pid')}"
        place["started"] = stat_of(pid)[19]
    return place


def has_ended(place: Mapping[str, str]) -> bool:
    """Whether a process of this host has ended; False for one of another host."""
    if "started" not in place or place["host"] != place_of(os.getpid()).get("host"):
        return False
    try:
        state, *others = stat_of(int(place["pid"]))
    except (OSError, ValueError):
        return True
    return state in "ZX" or others[18] != place["started"]
