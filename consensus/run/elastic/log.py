"""The membership log of an elastic run: which workers took part in which iterations.

    {"iteration": 120, "workers": [0, 2, 3], "new": [3], "gone": {"1": "has left"}, ...}

in membership.jsonl means that from iteration 120 on (counted from 0) line 3 is summed over the
workers 0, 2 and 3, in this order, and that worker 3 begins there at z_j = u with velocity 0.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from consensus.atomic_files import write_whole
from consensus.run.checks import ConfigError, require

MEMBERSHIP = "membership.jsonl"


@dataclass(frozen=True)
class Change:
    """One change of the members."""

    iteration: int  # the first with these workers
    workers: tuple[int, ...]  # their numbers j, in the order of ranks
    new: tuple[int, ...] = ()  # those that begin at u
    gone: dict[str, str] = field(default_factory=dict)  # numbers j of those that are missing -> why
    digest: str = ""  # of u, equal on all members
    noticed: float = 0.0  # Unix time at which the first member stopped for it, or lost a peer
    agree_s: float = 0.0  # until the members had agreed on the next view
    heal_s: float = 0.0  # until all were connected and had the same u


def write_changes(run_dir: Path, changes: Sequence[Change]) -> None:
    """Write the log."""
    lines = "".join(json.dumps(asdict(change)) + "\n" for change in changes)
    write_whole(run_dir / MEMBERSHIP, lines.encode())


def read_changes(run_dir: Path) -> list[Change]:
    """The changes of a run, in order.

    Raises:
        ValueError: If there is no log, or it is damaged.
    """
    path = run_dir / MEMBERSHIP
    try:
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        found = [
            Change(**row | {"workers": tuple(row["workers"]), "new": tuple(row["new"])})
            for row in rows
        ]
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise ValueError(f"{path} is no membership log: {error}") from error
    starts = [change.iteration for change in found]
    if not found or starts != sorted(starts) or starts[0] < 0:
        raise ValueError(f"{path} is no membership log: its iterations are {starts}")
    return found


def changes_to_replay(run_dir: str) -> list[Change]:
    """The changes of the run in `group.replay`, from iteration 0 on; ConfigError without them."""
    try:
        changes = read_changes(Path(run_dir))
    except ValueError as error:
        allowed = f"the directory of an elastic run ({error})"
        raise ConfigError(f"`group.replay` is {run_dir}; allowed: {allowed}") from error
    begins = changes[0].iteration == 0
    require(begins, "group.replay", run_dir, "an elastic run that begins at iteration 0")
    return changes
