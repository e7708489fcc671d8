import errno
import fcntl
import os

import pytest

from consensus.doctor import folder
from consensus.doctor.finding import (
    Level,
)


def test_one_folder(together, tmp_path):
    found = together(3, lambda exchange: folder.check_folder(exchange, tmp_path / "a" / "b"))
    assert [len(findings) for findings in found] == [1, 1, 1]
    assert "all see it, write there, and respect a lock" in found[0][0].text
    assert found[0] == found[1] == found[2]
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_created(together, tmp_path):
    (tmp_path / "file").write_text("")
    found = together(2, lambda exchange: folder.check_folder(exchange, tmp_path / "file" / "runs"))
    assert found[1] == []
    assert [f.text for f in found[0] if f.level == Level.FAULT] == [
        f"cannot write 16 MiB to {tmp_path}/file/runs: Not a directory"
    ]


@pytest.mark.parametrize(
    ("error", "expected"),
    [(None, "has locks of each node for itself"), (errno.ENOLCK, "has no locks (No locks avail")],
)
def test_a_folder_whose_locks_do_not_hold(together, monkeypatch, tmp_path, error, expected):
    def lock(file, kind):
        if error is not None:
            raise OSError(error, os.strerror(error))

    monkeypatch.setattr(fcntl, "flock", lock)
    first, second = together(2, lambda exchange: folder.check_folder(exchange, tmp_path))
    assert [finding.level for finding in second] == [Level.WARNING, Level.FINE]
    assert expected in second[0].text
    assert "respect a lock" not in first[0].text
