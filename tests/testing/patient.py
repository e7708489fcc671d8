"""A plugin that makes an iteration of Algorithm 1 take 50 ms more until a test lets it go on.

It does so while the file in $CONSENSUS_GO does not exist; without the variable, always.
"""

import os
import time
from pathlib import Path

from consensus.algorithm import Consensus

step = Consensus.step
go = Path(os.environ.get("CONSENSUS_GO", "no such file"))


def patient(self: Consensus, t: int) -> None:
    if not go.exists():
        time.sleep(0.05)
    step(self, t)


Consensus.step = patient
