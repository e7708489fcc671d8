"""The run directory and the lock on it."""

import fcntl
import json
import os
import socket
import time

import pytest

from consensus.comm import Group, GroupError, Launch, Solo
from consensus.run.checkpoint.directory import LOCK, Origin, RunDirectory
from tests.testing import fork_server
from tests.testing.small_runs import SMALL


def hold(path, started):
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        started.set()
        time.sleep(60.0)


def test_a_second_run_into_a_directory_is_refused_until_the_holder_dies(make_config, tmp_path):
    config = make_config(*SMALL, f"output.run_dir={tmp_path}/a")
    origin = Origin(tmp_path / "a")
    first = RunDirectory(origin, config, Launch(name="x"), Solo())
    note = json.loads((tmp_path / "a" / LOCK).read_text())
    assert note == {"pid": os.getpid(), "host": socket.gethostname(), "launch": "x"}
    before = (tmp_path / "a" / "config.yaml").stat().st_mtime_ns
    with pytest.raises(GroupError) as caught:
        RunDirectory(origin, config, Launch(name="y"), Solo())
    assert str(caught.value) == (
        f"rank 0: {tmp_path}/a is in use by another run, begun by process {os.getpid()} on "
        f"{socket.gethostname()}, or by ranks left of it"
    )
    assert (tmp_path / "a" / "config.yaml").stat().st_mtime_ns == before
    first.close()

    # A rank that outlives its launcher and rank 0 holds the lock as well as they did.
    context = fork_server.context()
    started = context.Event()
    orphan = context.Process(target=hold, args=(tmp_path / "a" / LOCK, started), daemon=True)
    orphan.start()
    assert started.wait(60.0)
    with pytest.raises(GroupError, match="is in use by another run"):
        RunDirectory(origin, config, Launch(name="y"), Solo())
    orphan.kill()
    orphan.join()
    RunDirectory(origin, config, Launch(name="y"), Solo()).close()


def open_and_probe(group: Group, config, path):
    directory = RunDirectory(Origin(path), config, Launch(group.rank, group.size), group)
    free = True
    group.barrier()
    with (path / LOCK).open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            free = False
    group.barrier()
    directory.close()
    return free, directory.path


@pytest.mark.ranks
def test_every_rank_holds_the_lock(ranks, make_config, tmp_path):
    config = make_config(*SMALL)
    assert ranks(4, open_and_probe, config, tmp_path / "a") == [(False, tmp_path / "a")] * 4


def test_a_file_system_without_locks_is_reported(make_config, tmp_path, monkeypatch):
    def unsupported(*args):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    directory = RunDirectory(Origin(tmp_path / "a"), make_config(*SMALL), Launch(), Solo())
    assert directory.warning == (
        f"{tmp_path}/a/{LOCK} cannot be locked here: start no second run in it"
    )
    directory.close()
