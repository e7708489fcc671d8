"""Linters, formatter and type checker find nothing; beside the other tests they take no time of
their own.
"""

import os
import subprocess
import sys

import pytest

from tests.testing import ROOT


@pytest.mark.slow
def test_the_checkout_passes_scripts_check():
    done = subprocess.run(
        [ROOT / "scripts" / "check"], env=os.environ | {"CONSENSUS_VENV": sys.prefix},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for tool in ("ruff check .", "ruff format --check .", "mypy", "hadolint Dockerfile"):
        assert f"== {tool}\n" in done.stdout
