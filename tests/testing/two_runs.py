"""A script of a user that trains twice, in directories that the runs name."""

import json
import os
import sys
from pathlib import Path

import consensus


def main() -> None:
    """Write the names and the seeds of the runs."""
    found = [str(consensus.train(*sys.argv[1:], f"seed={seed}").run_dir) for seed in (1, 2)]
    attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
    Path(f"attempt{attempt}.json").write_text(json.dumps(found))
