"""A plugin that makes an iteration of Algorithm 1 take 10 ms more, so that tests can disturb it."""

import time

from consensus.algorithm import Consensus

step = Consensus.step


def slow(self: Consensus, t: int) -> None:
    time.sleep(0.01)
    step(self, t)


Consensus.step = slow
