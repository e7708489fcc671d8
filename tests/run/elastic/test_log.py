"""The membership log: written whole, read back, and refused where it is damaged."""

import json

import pytest

from consensus.run.checks import ConfigError
from consensus.run.elastic.log import (
    MEMBERSHIP,
    Change,
    changes_to_replay,
    read_changes,
    write_changes,
)

CHANGES = [
    Change(0, (0, 1, 2), (0, 1, 2), {}, "57ad731c21b8305f", 1.5, 0.0, 0.1),
    Change(120, (0, 2, 3), (3,), {"1": "killed by SIGKILL"}, "adba41efa0a3e4fa", 2.5, 0.02, 0.1),
    Change(120, (2, 3), (), {"0": "has left"}),
]


def test_it_is_read_as_it_was_written(tmp_path):
    write_changes(tmp_path, CHANGES)
    assert read_changes(tmp_path) == changes_to_replay(str(tmp_path)) == CHANGES
    row = json.loads((tmp_path / MEMBERSHIP).read_text().splitlines()[1])
    assert (row["iteration"], row["workers"], row["new"]) == (120, [0, 2, 3], [3])
    assert row["gone"] == {"1": "killed by SIGKILL"}


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"iteration": 3}', '{"iteration": -1, "workers": [0], "new": []}']
)
def test_a_damaged_log_is_refused(tmp_path, text):
    (tmp_path / MEMBERSHIP).write_text(text)
    with pytest.raises(ValueError, match="is no membership log: "):
        read_changes(tmp_path)
    with pytest.raises(ConfigError, match=r"`group.replay` is .*; allowed: the directory of an"):
        changes_to_replay(str(tmp_path))


def test_iterations_in_another_order_are_refused(tmp_path):
    write_changes(tmp_path, [CHANGES[1], CHANGES[0]])
    with pytest.raises(ValueError, match=r"its iterations are \[120, 0\]"):
        read_changes(tmp_path)


def test_a_replay_needs_the_beginning(tmp_path):
    write_changes(tmp_path, CHANGES[1:])
    with pytest.raises(ConfigError, match="an elastic run that begins at iteration 0"):
        changes_to_replay(str(tmp_path))
    with pytest.raises(ConfigError, match="No such file"):
        changes_to_replay(str(tmp_path / "none"))
