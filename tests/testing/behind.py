"""A plugin with which a process with BEHIND=N loses a peer in its N-th communication, it thinks.

The others have finished that sum by then, and go on to the next.
"""

import os

from consensus.comm import PeerLostError
from consensus.repeatable import RepeatableServer

finish = RepeatableServer.finish
at = int(os.environ.get("BEHIND", "-1"))


def finish_behind(self: RepeatableServer, pending, t_u):
    global at
    if self.finished == at:
        at = -1
        pending[0].wait()  # all others have what they need of this process
        raise PeerLostError("pretended")
    return finish(self, pending, t_u)


RepeatableServer.finish = finish_behind
