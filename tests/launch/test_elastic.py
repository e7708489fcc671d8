"""The launcher of elastic runs: real processes, signals, and the store that it keeps."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from consensus import elastic
from consensus.run.elastic.log import MEMBERSHIP, read_changes
from tests.test_elastic import RUN
from tests.testing import ROOT
from tests.testing.small_runs import rows_of

PATIENT = "plugins=[tests.testing.patient]"
LONG = [*RUN, PATIENT, "algorithm.iterations=100000", "output.eval_every=10"]
WAIT_S = 90.0


class Launched:
    """A launcher in a session of its own; the end of the block kills it and its processes."""

    def __init__(self, folder, *words):
        self.folder, self.log = folder, folder / f"{len(list(folder.glob('*.log')))}.log"
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "consensus.elastic", *words],
                cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
            )  # fmt: skip

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    @property
    def said(self):
        return self.log.read_text()

    @property
    def place(self):
        """--store of further members, once it is known."""
        self.until(lambda: "further members" in self.said)
        return re.search(r"further members: (--store) (\S+)", self.said).groups()

    @property
    def children(self):
        return [int(pid) for pid in children_of(self.process.pid)]

    def until(self, condition):
        deadline = time.monotonic() + WAIT_S
        while not condition():
            assert time.monotonic() < deadline, self.said
            time.sleep(0.02)

    def workers(self, count):
        """Wait until so many workers take part."""
        path = self.folder / "run" / MEMBERSHIP
        self.until(lambda: path.exists() and len(read_changes(path.parent)[-1].workers) == count)

    def wait(self):
        try:
            return self.process.wait(WAIT_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(self.said) from None


def children_of(pid):
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def left(group):
    """Processes of the process group of a launcher."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, owner, *_ = path.read_text().rpartition(")")[2].split()
        except (OSError, ValueError):
            continue
        if int(owner) == group and state not in "ZX":
            found.append(path.parent.name)
    return found


def last_checkpoint(folder):
    names = [path.name for path in (folder / "run" / "checkpoints").glob("*")]
    return max((int(name) for name in names if name.isdecimal()), default=0)


@pytest.mark.slow
def test_processes_are_lost_replaced_join_and_leave_and_ctrl_c_stops_the_run(tmp_path):
    run = [*LONG, "output.run_dir=run"]
    with Launched(tmp_path, "--processes", "2", *run) as first:
        first.workers(2)
        os.kill(first.children[0], signal.SIGKILL)
        first.workers(1)
        first.until(lambda: "a process is lost (killed by SIGKILL)" in first.said)
        assert len(first.children) == 1, "no other is started unless --restarts says so"
        with Launched(tmp_path, "--restarts", "1", *first.place) as second:
            first.workers(2)
            (pid,) = second.children
            os.kill(pid, signal.SIGKILL)
            first.workers(1)
            first.workers(2)
            assert pid not in second.children
            assert len(second.children) == 1
            second.process.terminate()
            assert second.wait() == 75, second.said
            first.workers(1)
        assert first.process.poll() is None
        os.killpg(first.process.pid, signal.SIGINT)  # as a terminal does
        assert first.wait() == 75, first.said
        assert left(first.process.pid) == []
    assert first.said.count("with a checkpoint; to continue: python -m consensus.elastic") == 1
    done = last_checkpoint(tmp_path)
    changes = read_changes(tmp_path / "run")
    assert [len(change.workers) for change in changes] == [2, 1, 2, 1, 2, 1]
    assert f"SIGINT: stopped at iteration {done} with a checkpoint" in first.said


@pytest.mark.slow
def test_a_run_goes_on_after_the_loss_of_all_members_and_not_without_its_launcher(tmp_path):
    run = [*LONG, "output.run_dir=run", "output.checkpoint_every=10"]
    with Launched(tmp_path, "--processes", "2", "--restarts", "2", *run) as launched:
        launched.workers(2)
        launched.until(lambda: last_checkpoint(tmp_path) >= 10)
        launched.process.send_signal(signal.SIGSTOP)  # both are lost before it starts another
        for pid in launched.children:
            os.kill(pid, signal.SIGKILL)
        launched.process.send_signal(signal.SIGCONT)
        launched.until(lambda: len(read_changes(tmp_path / "run")) == 2)
        launched.process.kill()
        launched.process.wait()
        launched.until(lambda: left(launched.process.pid) == [])
    last = read_changes(tmp_path / "run")[-1]
    assert len(last.workers) == 2
    assert last.iteration >= 10, "from the checkpoint"
    assert last_checkpoint(tmp_path) >= last.iteration
    (line,) = [line for line in launched.said.splitlines() if line.startswith("consensus.train:")]
    assert " with a checkpoint: the store of the members is lost" in line


@pytest.mark.slow
def test_a_launcher_that_only_keeps_the_store(tmp_path):
    run = [*LONG, "output.run_dir=run", "output.checkpoint_every=10000"]
    serve = ["--processes", "0", "--serve", "--store", "localhost:0"]
    with Launched(tmp_path, *serve) as store, Launched(tmp_path, *run, *store.place) as member:
        member.workers(1)
        store.process.kill()
        assert member.wait() == 75, member.said
    assert "the store at localhost:" in member.said
    done = last_checkpoint(tmp_path)
    more = [*run, f"algorithm.iterations={done + 60}", "resume=auto"]
    with Launched(tmp_path, *serve) as store, Launched(tmp_path, *more, *store.place) as member:
        member.until(lambda: len(read_changes(tmp_path / "run")) == 2)
        store.process.terminate()  # it waits for the member
        assert member.wait() == 0, member.said
        assert store.wait() == 0, store.said
    assert read_changes(tmp_path / "run")[-1].iteration == done
    assert rows_of(tmp_path / "run")[-1]["iteration"] == done + 60


# ---- exit codes, with a stand-in for the members

# What each of the processes does, by their place, and the exit code of the launcher.
ENDS = {
    "exit 0; exit 75": 0,
    "exit 0; sleep 0.3 && kill -KILL $$": 0,
    "exit 75; exit 75": 75,
    "kill -KILL $$; sleep 0.3 && exit 75": 75,  # the others stopped with a checkpoint
    "exit 75; sleep 0.3 && exit 1": 1,  # the one left, and the other failed
    "exit 75; sleep 0.3 && kill -KILL $$": 137,
    "sleep 0.3 && exit 2; exec sleep 60; exec sleep 60": 2,  # the others have the same arguments
}
PROGRAM = """
import json, sys
from consensus import elastic
found = {}
for ends in json.loads(sys.argv[1]):
    elastic.sys.executable, words = sys.argv[2], ["--processes", str(ends.count(";") + 1)]
    elastic.os.environ["ENDS"] = ends
    found[ends] = elastic.main(words)
    for number in elastic.signal.SIGTERM, elastic.signal.SIGINT:
        elastic.signal.signal(number, elastic.signal.SIG_DFL)
print(json.dumps(found))
"""
MEMBER = """#!/usr/bin/env bash
IFS=';' read -r -a ends <<<"$ENDS"
eval "${ends[LOCAL_RANK]}"
"""


def test_the_exit_code_is_that_of_the_run(tmp_path):
    member = tmp_path / "member"
    member.write_text(MEMBER)
    member.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(list(ENDS)), str(member)],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert json.loads(done.stdout) == ENDS, done.stderr
    lost = [line for line in done.stderr.splitlines() if " a process is lost " in line]
    assert len(lost) == 4, "none of those that end with a refused one"


# ---- arguments and the store, in this process


@pytest.fixture
def refusal(monkeypatch, capsys):
    """`refusal(word, ...)`: exit code and standard error of the launcher."""

    def call(*words):
        code = elastic.main(words)
        out, err = capsys.readouterr()
        assert out == ""
        assert err.count("\n") == 1
        return code, err.removeprefix("consensus.elastic: ").rstrip()

    return call


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--processes", "two"], "`--processes` is two; allowed: a whole number >= 0"),
        (["--processes", "-1"], "`--processes` is -1; allowed: a whole number >= 0"),
        (["--processes", "0"], "`--processes` is 0; allowed: 1 or more, or 0 with --serve"),
        (["--expected", "0"], "`--expected` is 0; allowed: a whole number >= 1"),
        (["--restarts", "1.5"], "`--restarts` is 1.5; allowed: a whole number >= 0"),
        (["--wait", "0"], "`--wait` is 0; allowed: a whole number >= 1"),
        (["--serve"], "`--serve` needs --store HOST:PORT"),
        (["--store"], "argument --store: expected one argument"),
        *(
            (["--store", place], f"`--store` is {place}; allowed: HOST:PORT, [ADDRESS]:PORT")
            for place in ("node1", ":29400", "node1:port", "node1:0", "node1:65536", "::1:29400")
        ),
        (["--proc", "2"], "`--proc` is no option and no override"),
        (["-n", "2"], "`-n` is no option and no override"),
        (["potential"], "`potential` is no option and no override"),
    ],
)
def test_a_wrong_argument_is_one_line(refusal, words, line):
    code, said = refusal(*words)
    assert code == 2
    assert said.removesuffix("; --help lists the options") == line


def test_a_port_that_is_taken_is_one_line(refusal):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        code, said = refusal("--serve", "--store", f"localhost:{port}")
    assert code == 1
    assert said == f"no store at localhost:{port}: Address already in use"


def test_a_store_that_nobody_keeps_is_one_line(refusal):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # it does not listen
        port = unused.getsockname()[1]
        code, said = refusal("--store", f"127.0.0.1:{port}", "--wait", "1")
    assert code == 1
    problem = "nothing answers within 1 s (Connection refused)"
    assert said == f"no store at 127.0.0.1:{port}: {problem}"


def test_another_program_at_the_port_of_the_store_is_one_line(refusal):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        code, said = refusal("--store", f"127.0.0.1:{port}", "--wait", "1")
    assert code == 1
    problem = "another program answers there, or none within 1 s"
    assert said.startswith(f"no store at 127.0.0.1:{port}: {problem}")
