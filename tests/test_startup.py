"""Standard streams that never fail, in processes without torch."""

import json
import os
import subprocess
import sys

import pytest

PROGRAM = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
from importlib.util import module_from_spec, spec_from_file_location
spec = spec_from_file_location("startup", sys.argv[1] + "/consensus/startup.py")
startup = module_from_spec(spec)
spec.loader.exec_module(startup)
startup.protect_streams("a.command")
startup.protect_streams("a.command")
for i in range(3):
    print("line", i, "\\udc80", flush=i < 2)
opened = os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT)
os.write(opened, json.dumps([opened, sys.stdout.isatty()]).encode())
sys.stderr.write("the end\\n")
"""


def run(tmp_path, redirection):
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    words = [sys.executable, "-c", PROGRAM, root, str(tmp_path / "file")]
    script = f'"$@" {redirection}; echo "code $?" >&2'
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", script, "bash", *words], capture_output=True, text=True
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
