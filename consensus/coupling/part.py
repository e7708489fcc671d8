"""Part: layers of a model that are summed over the processes together, with their z_j and u."""

import time
import warnings
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from consensus.comm import Group, Pending
from consensus.core.kernels import ConsensusKernel
from consensus.core.kernels.optimizers import scale_momentum
from consensus.core.kernels.outer_step import OptimizerStep
from consensus.core.kernels.pulls import Copy
from consensus.core.kernels.together import Together
from consensus.coupling.plan import Plan
from consensus.server import Server

LOOK = 100  # communications between two looks at the numbers on the device


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

    _make_server: type[Server] = Server
    _fuses = True  # whether both lines may be taken together

    def __init__(self, plan: Plan, optimizer: Optimizer, group: Group) -> None:
        self.parameters, self.z, self._phi = plan.parameters, plan.z, plan.phi
        self._puller, self._optimizer, self.offset = plan.puller, optimizer, plan.offset
        settings = plan.settings
        self._pull, self._local_pull = plan.pull, settings.local_pull
        self._strength = plan.puller.strength(plan.pull)
        kernel: ConsensusKernel = plan.puller.kernel
        rate, self._outer, cut = settings.outer, None, plan.puller.cuts_steps
        if callable(rate):
            views_of = self.parameters.views
            kernel = self._outer = OptimizerStep(kernel, rate, plan.z[0], views_of, cut=cut)
            rate = 1.0  # its gradient is the whole way to the mean
        self._t_u = plan.puller.t_u(rate, group.size)
        self._server = self._make_server(plan.z[0], plan.phi, group, kernel)
        self.u = self._server.u
        self._copy = Copy(self.parameters, self.z[0], lambda: self._server.memory)
        jacobi = settings.order == "jacobi"
        self._before = torch.empty_like(self.u) if jacobi else None
        own = self.parameters, self.u, self.z[0], group.min_
        apart = jacobi or not self._fuses
        self._together: Together | None = None if apart else plan.puller.together(*own)
        # Whether the total of line 3 is one of `together` alone.
        self._whole = self._outer is None and plan.pull != 1.0
        if self._together is not None and self._whole:
            self._together.summed_by(self._server.sum)
        self.pending: Pending | None = None
        self.waited_s = 0.0
        self._finished = self._moves = 0  # communications; moves since the last look at the cuts
        self._seen = torch.stack(self.cuts)
        # Whether an iteration without communication changes what the optimizer did.
        self._moves_between = settings.local_pull > 0 or plan.puller.cuts_steps
        # Whether z_j is needed after a communication, before it is set to the parameters again.
        again = settings.overlap and settings.delay == settings.period - 1  # in the same call
        self._keeps = self._moves_between or again
        self._stale = False  # whether its values are lost until then

    @property
    def outer(self) -> Optimizer | None:
        """The optimizer over u, if there is one."""
        return None if self._outer is None else self._outer.optimizer

    @property
    def cuts(self) -> tuple[Tensor, Tensor]:
        """Numbers of steps of u and of z_j that were cut, on the device. Each is ()."""
        return self._server.cuts, self._puller.search.cuts[0]

    def restart(self) -> None:
        """Begin at u = z_j, without a sum on its way."""
        self._stale = False
        self.u.copy_(self.z[0])
        for count in self.cuts:
            count.zero_()
        self._seen = torch.stack(self.cuts)
        if self._outer is not None:
            self._outer.restart()
        self.pending = None

    def start(self, settled: bool = True) -> None:
        """Begin the sum over processes of the forces at z_j.

        Before, z_j is set to the parameters unless it is `settled`; they are then z_j rounded to
        their type.
        """
        settled = settled or self._moves_between  # they are z_j
        if self._together is not None:
            self._together.start(self._server.sum.message, not settled or self._stale)
            self._stale = False
            self.pending = self._server.sum.start()
            return
        if not settled:
            self._settle()
        self.pending, _ = self._server.start(self.z)

    def wait(self) -> None:
        """Wait for the sum on its way, if any; it can still be finished."""
        if self.pending is not None:
            started = time.perf_counter()
            total = self.pending.wait()
            self.waited_s += time.perf_counter() - started
            self.pending = Pending(lambda: total)

    def finish(self, displaced: bool) -> None:
        """Finish the sum on its way: move u, and pull z_j; `displaced` as in `_move`."""
        assert self.pending is not None
        started = time.perf_counter()
        total = self.pending.wait()
        self.waited_s += time.perf_counter() - started
        self.pending = None
        if self._together is not None and self._whole:
            self._together.move(total, self._t_u, self._strength, self._keeps)
            self._stale = not self._keeps
            return
        anchor = self.u if self._before is None else self._before.copy_(self.u)
        self._server.finish((Pending(lambda: total), self.z), self._t_u)
        self._move(self._pull, displaced, anchor)
        self._finished += 1
        if self._puller.cuts_steps and self._finished % LOOK == 0:
            self._look_at_cuts()

    def move_between(self) -> None:
        """An iteration without communication: the local pull, and the line search."""
        if self._moves_between:
            self._move(self._local_pull, True, self.u)

    def _settle(self) -> None:
        z = self.z[0]
        if self.parameters.exact:
            self.parameters.read(z)
        else:
            z += self.parameters.displacement(z, out=self._server.memory)
            self.parameters.write(z)

    @torch.no_grad()
    def refresh(self) -> None:
        """Set z_j to the parameters if its values are lost."""
        if self._stale:
            self.parameters.read(self.z[0])
            self._stale = False

    def measure(self) -> dict[str, tuple[float, float]]:
        """|u - z_j| and |q(u - z_j)| of each layer by its name, read on the host."""
        self.refresh()
        w = self.u - self.z[0]
        norms = [self._phi.distance(x).tolist() for x in (w, self._puller.force(w))]
        return dict(zip(self.parameters.layout.layer_names, zip(*norms, strict=True), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Copies of `u` (n,), `z` (n,) and `cuts` (2,); `outer` of an outer optimizer."""
        self.refresh()
        state: dict[str, Any] = {
            "u": self.u.clone(),
            "z": self.z[0].clone(),
            "cuts": torch.stack(self.cuts),
        }
        if self.outer is not None:
            state["outer"] = deepcopy(self.outer.state_dict())
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`, without a sum on its way."""
        self._stale = False
        self.u.copy_(state["u"])
        self.z[0].copy_(state["z"])
        for own, count in zip(self.cuts, state["cuts"], strict=True):
            own.copy_(count)
        self._seen = torch.stack(self.cuts)
        if self.outer is not None:
            self.outer.load_state_dict(deepcopy(state["outer"]))
        self.pending = None

    def _move(self, pull: float, displaced: bool, anchor: Tensor) -> None:
        """Move z_j by its displacement, if it was `displaced`, and to `anchor`; write it."""
        if self._together is not None:
            if pull == 1.0:
                self._together.replace(displaced)
            else:
                self._together.move(None, 0.0, self._puller.strength(pull), keep=True)
            return
        self._moves += 1
        self._puller.move(self._copy, self.u, anchor, pull, displaced)
        if self._puller.cuts_steps:
            self._scale_momentum()

    def _look_at_cuts(self) -> None:
        """Warn if a tenth of the last steps were cut; seldom, since it waits for the device."""
        cuts = torch.stack(self.cuts)
        of_u, of_z = (cuts - self._seen).tolist()
        share = max(of_u / LOOK, of_z / self._moves)
        self._seen, self._moves = cuts, 0
        if share >= 0.1:
            warnings.warn(
                f"{share:.0%} of the steps of the last {LOOK} communications were cut at the "
                "boundary of the domain, which slows training; remedies: a larger `eta`, a smaller "
                "`pull`, `implicit=True`",
                stacklevel=4,
            )

    def _scale_momentum(self) -> None:
        """Scale the velocity of SGD by s_j."""
        step, states = self._puller.search.step, self._optimizer.state
        if step.device.type == "cpu" and step == 1:
            return  # as nearly always; on another device the question would wait for it
        scale_momentum([states[p] for p in self.parameters.originals if p in states], step)


def states_of(parts: Sequence[Part]) -> dict[str, Any]:
    """The states of some parts as one: `u` and `z` (n,), `cuts` (parts, 2), `outer` a list."""
    states = [part.state_dict() for part in parts]
    state: dict[str, Any] = {key: torch.cat([own[key] for own in states]) for key in ("u", "z")}
    state["cuts"] = torch.stack([own["cuts"] for own in states])
    outers = [own["outer"] for own in states if "outer" in own]
    return state | {"outer": outers} if outers else state


def load_states(parts: Sequence[Part], state: Mapping[str, Any]) -> None:
    """Load what `states_of` has returned."""
    sizes = [part.u.numel() for part in parts]
    pieces = zip(*(state[key].split(sizes) for key in ("u", "z")), strict=True)
    others = state["cuts"], state.get("outer", [None] * len(sizes))
    for part, (u, z), cuts, outer in zip(parts, pieces, *others, strict=True):
        part.load_state_dict({"u": u, "z": z, "cuts": cuts, "outer": outer})


def problem_of_state(
    state: Mapping[str, Any], parts: Sequence[Part], identity: Mapping[str, Any]
) -> str | None:
    """Why a state is not one of a coupling with these parts; None if it is one.

    States of before version 0.1 have no identity.
    """
    for key in ("u", "z", "cuts", "calls", "communications"):
        if key not in state:
            return f"the state has no `{key}`; allowed: a state_dict() of a Coupling"
    n = sum(part.u.numel() for part in parts)
    for key, shape in (("u", (n,)), ("z", (n,)), ("cuts", (len(parts), 2))):
        if tuple(state[key].shape) != shape:
            return f"`{key}` has shape {tuple(state[key].shape)}; allowed: {shape}"
    found, wanted = len(state.get("outer", [])), sum(part.outer is not None for part in parts)
    if found != wanted:
        return f"the state has {found} outer optimizers; allowed: {wanted}"
    for key, own in identity.items():
        if (other := state.get("coupling", identity).get(key, own)) != own:
            if key == "parameters":
                return "the state has other parameters, or in another order; allowed: the same"
            return f"`{key}` of the state is {other}; allowed: {own}, as in this coupling"
    return None
