"""Part: layers of a model that are summed over the processes together, with their z_j and u."""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from consensus.comm import Group, Pending
from consensus.core.flat import FlatParameters
from consensus.core.kernels.pulls import Pull, choose_pull
from consensus.core.layerwise import Layerwise
from consensus.server import PendingForce, Server


@dataclass(frozen=True)
class Rates:
    """Strengths of the coupling, see `Coupling`."""

    pull: float
    outer: float
    local_pull: float


class Plan:
    """What a part is made of, before any communication.

    Args:
        parameters: Its parameters.
        phi: Its potential, layer by layer.
        rates: Its strengths.
        implicit: As in `choose_pull`, whose ValueError is raised.
    """

    def __init__(
        self, parameters: FlatParameters, phi: Layerwise, rates: Rates, implicit: bool | None
    ) -> None:
        vector = parameters.vector()
        self.parameters, self.rates, self.phi = parameters, rates, phi.to(vector)
        self.z = vector.unsqueeze(0)  # (1, n): a block of one worker
        self.puller: Pull = choose_pull(self.phi, self.z, rates.pull, implicit)


class Part:
    """z_j and u of some layers, and lines 3 and 6 for them.

    Args:
        plan: The same on all ranks but for the values of z_j.
        optimizer: Optimizer of the parameters.
        group: The processes.

    Attributes:
        parameters: The parameters that `z` is written to.
        u: The consensus variable, replicated. (n,)
        z: The copy of this process. (1, n)
        pending: The sum on its way, or None.
        waited_s: Seconds spent waiting for sums.
    """

    def __init__(self, plan: Plan, optimizer: Optimizer, group: Group) -> None:
        self.parameters, self.z, self._phi = plan.parameters, plan.z, plan.phi
        self._rates, self._puller, self._optimizer = plan.rates, plan.puller, optimizer
        self._t_u = plan.puller.t_u(plan.rates.outer, group.size)
        self._server = Server(plan.z[0], plan.phi, group, plan.puller.kernel)
        self.u = self._server.u
        self.pending: PendingForce | None = None
        self.waited_s = 0.0
        # Whether an iteration without communication changes what the optimizer did.
        self._moves_between = plan.rates.local_pull > 0 or plan.puller.cuts_steps

    @property
    def cuts(self) -> tuple[Tensor, Tensor]:
        """Numbers of steps of u and of z_j that were cut, on the device. Each is ()."""
        return self._server.cuts, self._puller.search.cuts[0]

    def restart(self) -> None:
        """Begin at u = z_j, without a sum on its way."""
        self.u.copy_(self.z[0])
        for count in self.cuts:
            count.zero_()
        self.pending = None

    def start(self) -> None:
        """Begin the sum over processes of the forces at z_j."""
        self.pending = self._server.start(self.z)

    def wait(self) -> None:
        """Wait for the sum on its way, if any; it can still be finished."""
        if self.pending is not None:
            pending, z = self.pending
            started = time.perf_counter()
            total = pending.wait()
            self.waited_s += time.perf_counter() - started
            self.pending = Pending(lambda: total), z

    def finish(self, displaced: bool) -> None:
        """Finish the sum on its way: move u, and pull z_j; `displaced` as in `_move`."""
        self.wait()
        assert self.pending is not None
        self._server.finish(self.pending, self._t_u)
        self.pending = None
        self._move(self._rates.pull, displaced)

    def move_between(self) -> None:
        """An iteration without communication: the local pull, and the line search."""
        if self._moves_between:
            self._move(self._rates.local_pull, displaced=True)

    def settle(self) -> None:
        """Set z_j to the parameters, which are then z_j rounded to their type."""
        if self._moves_between:
            return  # they are z_j
        z = self.z[0]
        if self.parameters.exact:
            self.parameters.read(z)
        else:
            z += self.parameters.displacement(z, out=self._server.memory)
            self.parameters.write(z)

    def distance(self) -> dict[str, float]:
        """|u - z_j| of each layer by its name, read on the host."""
        distances = self._phi.distance(self.u - self.z[0]).tolist()
        return dict(zip(self.parameters.layout.layer_names, distances, strict=True))

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of `u` (n,), `z` (n,) and `cuts` (2,)."""
        return {"u": self.u.clone(), "z": self.z[0].clone(), "cuts": torch.stack(self.cuts)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a `state_dict`, without a sum on its way."""
        self.u.copy_(state["u"])
        self.z[0].copy_(state["z"])
        for own, count in zip(self.cuts, state["cuts"], strict=True):
            own.copy_(count)
        self.pending = None

    def _move(self, pull: float, displaced: bool) -> None:
        """Move z_j by its displacement, if it was `displaced`, and by the pull; write it."""
        z, memory = self.z, self._server.memory
        d = self.parameters.displacement(z[0], memory) if displaced else memory.zero_()
        self._puller.move(z, d.view_as(z), self.u, pull)
        if self._puller.cuts_steps:
            self._scale_momentum()
        self.parameters.write(z[0])

    def _scale_momentum(self) -> None:
        """Scale the velocity of SGD by s_j."""
        step, states = self._puller.search.step, self._optimizer.state
        if step.device.type == "cpu" and step == 1:
            return  # as nearly always; on another device the question would wait for it
        found = [states[p].get("momentum_buffer") for p in self.parameters.tensors if p in states]
        if velocities := [velocity for velocity in found if velocity is not None]:
            torch._foreach_mul_(velocities, step)
