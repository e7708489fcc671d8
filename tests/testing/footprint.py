"""Peak memory of a piece of code, measured in a process of its own, on Linux."""

import os
import subprocess
import sys

from tests.testing import ROOT

PROGRAM = """
from pathlib import Path
def peak():  # not getrusage, whose peak starts at that of the parent process
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(fields["VmHWM"].split()[0])
{before}
at_first = peak()
{codes}
"""


def growth(before: str, code: str) -> int:
    """The growth of a process's peak memory while it runs `code`, after `before`. Bytes."""
    return growths(before, code)[0]


def growths(before: str, *codes: str) -> list[int]:
    """The growth of a process's peak memory since `before`, after each of these codes. Bytes."""
    # Freed memory returns at once; malloc would otherwise keep some of it.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"}
    parts = "\n".join(f"{code}\nprint(peak() - at_first)" for code in codes)
    command = [sys.executable, "-c", PROGRAM.format(before=before, codes=parts)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return list(map(int, done.stdout.split()))
