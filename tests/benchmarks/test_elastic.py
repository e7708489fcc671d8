"""The elastic benchmark: what it does to a run, and what it says of it."""

import random

from benchmarks.elastic import KINDS, LEAST, MOST, Event, act, print_times, spread
from consensus.run.elastic.log import Change


class Quiet:
    """A run that notes what was done to its processes."""

    def __init__(self, count):
        self.names, self.done = [f"p{i}" for i in range(count)], []
        self.processes = {name: self for name in self.names}

    def members(self):
        return list(self.names)

    def start(self):
        self.done.append("start")

    @property
    def pid(self):
        self.done.append("signal")
        return None  # no process has it

    def await_members(self, count, seen):
        self.count = count
        return [Change(seen, tuple(range(count)))]


def test_the_number_of_members_stays_in_its_bounds(monkeypatch):
    monkeypatch.setattr("benchmarks.elastic.os.kill", lambda *_: None)
    monkeypatch.setattr("benchmarks.elastic.time.sleep", lambda _: None)
    rng = random.Random(0)
    for count in range(LEAST, MOST + 1):
        for kind in dict.fromkeys(KINDS):
            run = Quiet(count)
            event = act(run, kind, 5, rng)
            lost = 2 if kind == "kill two" else 1 if kind.startswith(("kill", "leave")) else 0
            new = 2 if kind == "join two" else int("join" in kind)
            if event is None:
                assert run.done == []
                continue
            assert LEAST <= run.count == count - lost + new <= MOST
            assert (run.done.count("signal"), run.done.count("start")) == (lost, new)
            assert event.changes[0].iteration == 5


def test_the_table_has_medians_and_the_largest(capsys):
    first = Change(1, (0,), agree_s=0.1, heal_s=0.3)
    second = Change(2, (0,), agree_s=0.2, heal_s=0.7)
    rows = print_times([Event("kill", [first], 0.05), Event("kill", [second], 0.15)])
    assert rows == [
        {
            "event": "kill",
            "events": 2,
            "changes": 2,
            "detect s": "0.10 (0.15)",
            "agree s": "0.15 (0.20)",
            "heal s": "0.50 (0.70)",
        }
    ]
    assert "kill" in capsys.readouterr().out
    assert spread([]) == ""
