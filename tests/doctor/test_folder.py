import errno
import fcntl
import os
import subprocess
from contextlib import contextmanager

import pytest

from consensus.doctor import folder
from consensus.doctor.finding import Level


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


@contextmanager
def small_disk(path, num_bytes):
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(path)]
    subprocess.run(command, check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


@pytest.mark.hosts
def test_a_full_disk(examine, tmp_path):
    with small_disk(tmp_path / "full", 1 << 20) as path:
        with pytest.raises(OSError, match="No space left"):
            (path / "fill").write_bytes(bytes(2 << 20))
        code, report = examine(f"output.root={path}/runs")
        assert code == 1
        (line, _) = [line for line in report.splitlines() if "FAULT" in line]
        assert line.startswith("disk ")
        assert f"{path} has 0 B free" in line
        assert "the disk is full" in line
        assert sorted(os.listdir(path)) == ["fill"]


@pytest.mark.hosts
def test_a_disk_with_room_but_not_for_the_checkpoints(examine, tmp_path):
    # 4 workers: u, z and v are 9 vectors of 7,850 numbers of 8 bytes, 565,200 B; 3 checkpoints.
    with small_disk(tmp_path / "small", 1 << 20) as path:
        code, report = examine(f"output.root={path}", "workers=4", "dtype=float64")
        assert code == 1
        assert "the checkpoints of this run take 1.7 MB: the disk is full" in report


def test_a_directory_in_use_by_another_run(examine, tmp_path):
    (tmp_path / "mine").mkdir()
    with (tmp_path / "mine" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        code, report = examine(f"output.run_dir={tmp_path}/mine")
    assert code == 1
    assert f"{tmp_path}/mine is in use by a run that goes on" in report
    assert examine(f"output.run_dir={tmp_path}/mine")[0] == 0
