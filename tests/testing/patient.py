"""A plugin that slows the iterations of Algorithm 1 down until a test lets them go on.

An iteration takes 200 ms more while the file in $CONSENSUS_GO does not exist; without the variable,
always 50 ms.
"""

import os
import time
from pathlib import Path

from consensus.algorithm import Consensus

step = Consensus.step
go = os.environ.get("CONSENSUS_GO")


def patient(self: Consensus, t: int) -> None:
    if go is None or not Path(go).exists():
        time.sleep(0.05 if go is None else 0.2)
    step(self, t)


Consensus.step = patient
