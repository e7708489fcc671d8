"""Standard streams that never fail, and signals during imports, in processes without torch."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from consensus.startup import announce
from tests.testing import ROOT

PROGRAM = """
import json, os, sys
from consensus.startup import protect_streams
protect_streams("a.command")
protect_streams("a.command")
for i in range(3):
    print("line", i, "\\udc80", flush=i < 2)
opened = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)
os.write(opened, json.dumps([opened, sys.stdout.isatty()]).encode())
sys.stderr.write("the end\\n")
"""


def run(tmp_path, redirection):
    words = [sys.executable, "-c", PROGRAM, str(tmp_path / "file")]
    script = f'"$@" {redirection}; echo "code $?" >&2'
    done = subprocess.run(
        ["bash", "-c", script, "bash", *words],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    opened, terminal = json.loads((tmp_path / "file").read_text())
    assert opened > 2, "a file took the place of a standard stream"
    assert not terminal
    return done.stdout, done.stderr.splitlines()


LINES = "".join(f"line {i} \\udc80\n" for i in range(3))


@pytest.mark.parametrize(
    ("redirection", "out", "err"),
    [
        ("", LINES, ["the end"]),
        (">/dev/full", "", ["a.command: no more output (No space left on device); ", "the end"]),
        (">&-", "", ["the end"]),
        ("2>&-", LINES, []),
        ("2>/dev/full", LINES, []),
        (">&- 2>&- <&-", "", []),
    ],
)
def test_no_output_is_no_failure(tmp_path, redirection, out, err):
    found_out, (*found_err, code) = run(tmp_path, redirection)
    assert code == "code 0"
    assert found_out == out
    assert len(found_err) == len(err)
    assert all(line.startswith(start) for line, start in zip(found_err, err, strict=True))


# ---- signals during the imports


@pytest.fixture
def slow_torch(tmp_path):
    """A folder for PYTHONPATH with a module `torch` whose import waits for ever."""
    module = "import gc, pathlib, time\n"
    module += "pathlib.Path('written').write_text(str(gc.isenabled()))\n"
    module += "pathlib.Path('written').rename('importing')\ntime.sleep(300)\n"
    (tmp_path / "torch.py").write_text(module)
    return tmp_path


@pytest.mark.parametrize(
    ("module", "number", "environment", "said"),
    [
        ("consensus.train", signal.SIGTERM, {}, True),
        ("consensus.train", signal.SIGINT, {"RANK": "0"}, True),
        ("consensus.train", signal.SIGHUP, {"RANK": "1"}, False),
        ("consensus.sweep", signal.SIGINT, {}, True),
        ("consensus.doctor", signal.SIGUSR1, {}, True),
    ],
)
def test_a_signal_during_the_imports_is_one_line(slow_torch, module, number, environment, said):
    process = subprocess.Popen(
        [sys.executable, "-m", module],
        cwd=slow_torch,
        env=os.environ | {"PYTHONPATH": f"{slow_torch}:{ROOT}"} | environment,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 60
    while not (slow_torch / "importing").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    line = f"{module}: {number.name}: stopped outside of the training; nothing was to be saved\n"
    assert err == (line if said else "")
    assert (slow_torch / "importing").read_text() == "False", "garbage is collected in imports"


PAUSES = """
import gc, sys
from consensus.startup import begin_imports, end_imports
found = []
for program in "-c", "/bin/consensus-train":
    sys.argv[0] = program
    begin_imports("consensus.train", "consensus.train")
    found.append(gc.isenabled())
    end_imports()
    found += [gc.isenabled(), gc.get_freeze_count() > 0]
print(*found)
"""


def test_garbage_is_collected_after_the_imports():
    done = subprocess.run(
        [sys.executable, "-c", PAUSES],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    # Of a program that imports the command, nothing changes.
    assert done.stdout.split() == ["True", "True", "False", "False", "True", "True"]


@pytest.mark.parametrize(
    ("module", "terminal", "environment", "said"),
    [
        ("__main__", True, {}, True),
        ("__main__", True, {"RANK": "0"}, True),
        ("__main__", True, {"RANK": "1"}, False),
        ("__main__", False, {}, False),  # a log needs no such line
        ("consensus.train", True, {}, False),  # imported by another program
    ],
)
def test_a_terminal_is_not_blank_during_the_imports(
    monkeypatch, capsys, module, terminal, environment, said
):
    monkeypatch.delenv("RANK", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["program"])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    announce(module, "consensus.train")
    line = "consensus.train: loading torch and the config ...\n"
    assert capsys.readouterr() == ("", line if said else "")


def test_the_package_itself_imports_no_torch(slow_torch):
    program = "import consensus, sys; assert 'Coupling' in dir(consensus); consensus.__version__"
    program += "; assert not hasattr(consensus, 'no_such_name'); assert 'torch' not in sys.modules"
    environment = os.environ | {"PYTHONPATH": f"{slow_torch}:{ROOT}"}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, timeout=60)
