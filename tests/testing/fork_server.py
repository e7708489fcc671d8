"""The process that forks the ranks of tests, after it has imported and prepared everything once.

Starting a rank from nothing costs 5 s of CPU for imports, and its first composed config and first
figure two more. multiprocessing's forkserver pays that once per worker of pytest. Forking a process
with threads would be unsound; this one has none, and `check` makes sure of it in every rank.
"""

import functools
import multiprocessing
import os
import sys
from multiprocessing import forkserver
from typing import Any

PRELOAD = [
    "tests.testing.paused",
    "consensus.core.kernels.native_kernel",
    "consensus.core.kernels.tiled",
    "consensus.train",
    "encodings.idna",  # a host name is looked up
    "hydra.core.override_parser.overrides_parser",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "pytest",  # the modules of tests import it
    "rich._emoji_codes",
    "torch._inductor",  # torch.use_deterministic_algorithms imports it
    "torch.distributed.checkpoint",
    "torch.utils.serialization.config",
    "torch.utils.tensorboard",
    "tests.testing.warm",
]


@functools.cache
def context() -> Any:
    """Start the fork server. Returns its multiprocessing context."""
    chosen = multiprocessing.get_context("forkserver")
    chosen.set_forkserver_preload(PRELOAD)
    # It reads its path and its number of threads from the environment at its start.
    born = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    before = {name: os.environ.get(name) for name in born}
    os.environ |= born
    try:
        forkserver.ensure_running()
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
    return chosen


def check() -> None:
    """In a rank: assert that its server was sound to fork and complete."""
    threads = os.listdir(f"/proc/{os.getppid()}/task")
    assert len(threads) == 1, f"the server has {len(threads)} threads: forks of it are unsound"
    assert set(sys.modules) >= set(PRELOAD), "the server has not imported what it should have"
