"""Notes when a process has started, for benchmarks/startup.py, which copies this file.

As a plugin of consensus.train it does so when the first iteration begins; as a program, after the
import of torch, which is all that the program does. The note is RANK.json beside this file: the
monotonic clock, which all processes of the machine share, and the CPU time of the process.
"""

import json
import os
import time
from pathlib import Path


def note() -> None:
    """Write the clock and the CPU time of this process."""
    times = {"clock": time.monotonic(), "cpu_s": time.process_time()}
    Path(__file__).with_name(f"{os.environ.get('RANK', '0')}.json").write_text(json.dumps(times))


if __name__ == "__main__":
    import torch  # noqa: F401

    note()
else:
    from consensus.algorithm import Consensus

    original = Consensus.step

    def first(self: Consensus, t: int) -> None:
        Consensus.step = original  # type: ignore[method-assign]
        note()
        original(self, t)

    Consensus.step = first  # type: ignore[method-assign]
