"""How much memory a piece of code needs at most: in a process of its own, on Linux."""

import os
import subprocess
import sys

from tests.testing import ROOT

PROGRAM = """
from pathlib import Path
def peak():  # not getrusage: there a process starts with the peak of the one that started it
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(fields["VmHWM"].split()[0])
{before}
at_first = peak()
{code}
print(peak() - at_first)
"""


def growth(before: str, code: str) -> int:
    """What the peak of a process grows by while it runs `code`, after `before`. Bytes."""
    # Memory that is freed goes back at once: malloc would keep some of it, and grow for nothing.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"}
    command = [sys.executable, "-c", PROGRAM.format(before=before, code=code)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)
