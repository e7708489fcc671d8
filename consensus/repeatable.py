"""Line 3 and line 5 for members that may be lost in the middle: both can be repeated.

u is intact on every rank until line 3 has finished. If a member is lost, the others sum again
without it. If some of them had finished already, the others take the result from one of these.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from consensus.comm import Group, PeerLostError, Pending
from consensus.core.flat import Scalar, ViewsOf
from consensus.core.kernels import LineSearch
from consensus.core.kernels.outer_step import FlatOptimizerStep
from consensus.server import PendingForce, Server
from consensus.worker import Oracle


class RepeatableServer(Server):
    """`Server` over a group that changes.

    Attributes:
        finished: The number of times that line 3 has finished, the same for all once they agree.
    """

    finished = 0
    _take: Callable[[], None] | None = None

    def regroup(self, group: Group) -> None:
        """Go on over other processes, which have the same u. A collective."""
        self.group = self._over = group
        self._search = LineSearch(self.step, self.cuts, group.min_)
        size = self.kernel.force_size + group.size * self.kernel.reach_size
        self.sum = group.repeated_sum(size, self.u)
        self._parts = ViewsOf(self._split)

    def take(self, load: Callable[[], None]) -> None:
        """Let the next line 3 only load the state of a rank that has finished it."""
        self._take = load

    def start(self, z: Tensor, scratch: Tensor | None = None) -> PendingForce:
        """As in `Server`."""
        if self._take is not None:
            return Pending(lambda: self.u), z
        return super().start(z, scratch)

    def finish(self, pending: PendingForce, t_u: Scalar) -> Tensor:
        """As in `Server`. Without effect on the state if a member is lost."""
        if self._take is not None:
            self._take()
            self._take, self.finished = None, self.finished + 1
            return self.u
        before = None
        if isinstance(self.kernel, FlatOptimizerStep) and self.phi.bounded:
            before = {key: x.clone() for key, x in self.state_dict().items()}  # see outer_step.py
        try:
            super().finish(pending, t_u)
        except PeerLostError:
            if before is not None:
                self.load_state_dict(before)
            raise
        self.finished += 1
        return self.u


class RepeatableOracle:
    """An oracle that repeats its last minibatch and gradient until the iteration has finished.

    Its state is that at the start of the iteration: `position` is not yet advanced.
    """

    def __init__(self, oracle: Oracle) -> None:
        self.oracle = oracle
        self._batch: Any = None
        self._gradient: Tensor | None = None
        self._memory: Tensor | None = None

    def draw(self) -> Any:
        """As in `Oracle`."""
        if self._batch is None:
            self._batch = self.oracle.draw()
        return self._batch

    def gradient(self, points: Tensor, batch: Any) -> Tensor:
        """As in `Oracle`."""
        if self._gradient is None:
            found = self.oracle.gradient(points, batch)
            if self._memory is None:
                self._memory = torch.empty_like(found)
            self._gradient = self._memory.copy_(found)  # `found` may be in `points`
        return self._gradient

    def release(self) -> None:
        """Let the next iteration begin."""
        self._batch = self._gradient = None

    def state_dict(self) -> dict[str, Tensor]:
        """As in `Oracle`."""
        state = self.oracle.state_dict()
        if self._batch is not None:
            state["position"] = state["position"] - 1
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """As in `Oracle`."""
        self.release()
        self.oracle.load_state_dict(state)


def begin_at_consensus(state: dict[str, Tensor], k: int, t: int) -> None:
    """Let row k in a state of `Consensus` begin at u after t iterations, whatever it was."""
    for key, rows in state.items():
        if key.startswith("worker/"):
            rows[k] = torch.zeros_like(rows[k])
    state["worker/z"][k] = state["server/u"]
    state["worker/oracle/position"][k] = t
