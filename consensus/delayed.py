"""Algorithm 1 with sums that are used some iterations late: `algorithm.delay`, for slow networks.

A sum of forces that begins in iteration t, a multiple of the period, is used in iteration t + d. It
is on its way during d + 1 gradients, where `Consensus` hides it behind one. With y_j = z_j^t:

    line 3   u+   = u - s_u t_u sum_j grad phi(u - y_j)
    line 6   z_j+ = z_j + s_j v_j+,   then + s_j (sigma / lam) grad phi(u+ - y_j)

The forces are those at y_j, so what a worker has learned since then is not pulled back; with d = 0
this is Algorithm 1. Where the domain is bounded, the step s_u follows from numbers in the sum
(core/kernels/reach_step.py), since a minimum over ranks would not be hidden. A z_j that has left
the domain around u+ meanwhile is moved towards u+.
"""

from typing import Any

import torch
from torch import Tensor

from consensus.algorithm import Consensus, value_at
from consensus.comm import Pending
from consensus.core.layerwise import Layerwise
from consensus.server import Server
from consensus.worker import Worker


class DelayedConsensus(Consensus):
    """`Consensus` whose sum of iteration t is used in iteration t + delay.

    Args:
        server: u; where the domain is bounded, with a `ReachStep` as its kernel.
        worker: The z_j of this process.
        delay: d, from 1 to period - 1, so that one sum is on its way at a time.
        implicit: The pull of line 6 is the proximal step from u+ - y_j in place of the force there.
        options: As in `Consensus`.
    """

    def __init__(
        self, server: Server, worker: Worker, *, delay: int, implicit: bool = False, **options: Any
    ) -> None:
        super().__init__(server, worker, **options)
        assert 0 < delay < self.period, (delay, self.period)
        self.delay, self._implicit = delay, implicit
        self._points = worker.z.clone()  # the y_j
        self._pending: Pending | None = None  # the sum on its way

    def step(self, t: int) -> None:
        """Iteration t of Algorithm 1, with the sum of iteration t - delay."""
        if t % self.period == 0:
            self._points.copy_(self.worker.z)
            self._pending = self.server.start(self._points, self.worker.scratch)[0]  # line 3
        if t % self.period != self.delay:
            return self.step_alone(t)
        assert self._pending is not None
        tau, sigma, lam = (value_at(size, t) for size in (self.tau, self.sigma, self.lam))  # line 2
        t_u = tau / lam if self.u_step_on == "objective" else tau
        before = self.server.u.clone() if self.order == "jacobi" else None
        delta = self.worker.gradient(self.worker.draw())  # lines 4 and 5
        u = self.server.finish((self._pending, self._points), t_u)  # line 3
        self._pending = None
        if self.phi.bounded:
            cut = move_inside(self.worker.z, self.worker.v, u, self.phi)
        else:
            cut = torch.zeros_like(self.worker.cuts, dtype=torch.bool)
        earlier = self.worker.cuts.clone()
        self.worker.update(delta, sigma, None, u, u)  # line 6, the loss
        cut |= self.worker.cuts > earlier
        cut |= self._pull(sigma / lam, u, u if before is None else before)  # line 6, the coupling
        self.worker.cuts.copy_(earlier).add_(cut)
        return None

    def _pull(self, strength: float | Tensor, u: Tensor, anchor: Tensor) -> Tensor:
        """Move every z_j by the force at y_j; return whether its step was cut, bool (K,).

        One worker at a time: the bits of a block may depend on the number of its workers.
        """
        worker, cut = self.worker, torch.zeros_like(self.worker.cuts, dtype=torch.bool)
        for k, (z, v, y) in enumerate(zip(worker.z, worker.v, self._points, strict=True)):
            b = torch.sub(anchor, y, out=worker.scratch[k])
            if self._implicit:
                d = b - self.phi.prox(b, strength, anchor)
            else:
                d = self.phi.grad_(b).mul_(strength)
            if self.phi.bounded:
                s = self.phi.feasible_step(z - u, d, u)
                torch.minimum(worker.step, s, out=worker.step)
                cut[k] = s < 1
                d *= s
            z += d
            if worker.momentum_on == "objective":
                v += d
        return cut

    def state_dict(self) -> dict[str, Tensor]:
        """As in `Algorithm`, with the sum on its way, which is waited for, and the y_j."""
        u, kernel = self.server.u, self.server.kernel
        force, reach = u.new_zeros(kernel.force_size), u.new_zeros(kernel.reach_size)
        if self._pending is not None:
            self._take(self._pending.wait().clone())
            total = self._pending.wait()
            force, reach = total[: len(force)], total[len(force) :]
            reach = reach.view(self.server.group.size, -1).amax(0) if len(reach) else reach
        late = {"server/late/force": force, "server/late/reach": reach, "worker/late": self._points}
        return super().state_dict() | late

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """As in `Algorithm`."""
        super().load_state_dict(state)
        force, reach = (state[f"server/late/{name}"].to(self.u) for name in ("force", "reach"))
        self._take(torch.cat([force, reach.repeat(self.server.group.size)]))
        self._points.copy_(state["worker/late"])

    def _take(self, total: Tensor) -> None:
        """Take a sum that has arrived as the one on its way."""
        self._pending = Pending(lambda: total)


def move_inside(z: Tensor, v: Tensor, u: Tensor, phi: Layerwise) -> Tensor:
    """Move every z_j outside the domain around u towards u, in place; bool (K,), which were.

    u - z_j becomes the largest of 1/2, 1/4, ... of itself that is inside, and the velocity is
    scaled alike. z, v: (K, n), u: (n,).
    """
    outside = torch.zeros(len(z), dtype=torch.bool, device=z.device)
    for k, (own, velocity) in enumerate(zip(z, v, strict=True)):  # as in `_pull`
        w = u - own
        s = phi.feasible_step(torch.zeros_like(w), w, u)
        outside[k] = s < 1
        own.copy_(torch.where(s < 1, u - s * w, own))
        velocity *= s
    return outside
