"""Atomic writes: old or new content, never a part."""

import errno
import os
from pathlib import Path

import pytest

from consensus.atomic_files import sync, write_whole


def test_write_whole(tmp_path):
    path = tmp_path / "model.pt"
    write_whole(path, b"old")
    write_whole(path, b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["model.pt"]


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_an_interrupted_write_leaves_the_old_content(tmp_path, monkeypatch, broken):
    path = tmp_path / "summary.json"
    path.write_bytes(b"old and whole")

    def no_space(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    owner = os if broken == "fsync" else Path
    monkeypatch.setattr(owner, broken, no_space)
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old and whole"
    visible = [name for name in os.listdir(tmp_path) if not name.startswith(".")]
    assert visible == ["summary.json"]


def test_sync_takes_files_and_directories_and_closes_them(tmp_path):
    (tmp_path / "a").touch()
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    sync(tmp_path / "a")
    sync(tmp_path)
    with pytest.raises(FileNotFoundError):
        sync(tmp_path / "absent")
    assert (len(os.listdir("/proc/self/fd")) if before else 0) == before
