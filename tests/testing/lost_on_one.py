"""A plugin: the write of the first checkpoint is reported as lost on one member alone.

A member that dies as it sends the last message of a write may have sent it to some and not to
others. The process with LOST_ON_ONE is one that did not get it.
"""

import os

from consensus.run.checkpoint.writer import CheckpointWriter, Facts

write = CheckpointWriter._work
loses = "LOST_ON_ONE" in os.environ


def lose(self: CheckpointWriter, facts: Facts) -> None:
    global loses
    write(self, facts)
    if loses and self.problem is None:
        loses = False
        self.problem, self.lost = "pretended", True


CheckpointWriter._work = lose
