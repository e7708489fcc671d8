"""Coupling: consensus training of any model with any optimizer, in the user's own loop.

    coupling = Coupling(model, optimizer, potential="tan", period=10)
    for x, y in loader:
        loss_fn(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        coupling.step()
    with coupling.consensus():
        evaluate(model)

The parameters of each process are a copy z_j, and u is replicated. With d_j, the displacement of
the parameters by the optimizer, and q(w) = (eta^2 / 2) grad phi(w), a communication is

    explicit   u+   = u - s_u outer mean_j q(u - z_j)              s: the line search of section 6
               z_j+ = z_j + s_j (d_j + pull q(u+ - z_j))
    implicit   the weighted proximal steps of core/kernels/weighted.py

Data flow with `overlap`: a call of `step` begins the sum of the z_j, which forward, backward and
optimizer step hide. The next call, or with a `delay` a later one, moves u and z_j (part.py).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from consensus.comm import Group, PeerLostError, group_of_user, num_ranks
from consensus.core.kernels.optimizers import MakeOptimizer
from consensus.core.potentials import Potential
from consensus.coupling import checks
from consensus.coupling.part import LOOK, Part, load_states, problem_of_state, states_of
from consensus.coupling.plan import Plan, describe, identity, make_plans
from consensus.coupling.processes import Processes, device_of
from consensus.coupling.settings import Settings, rates_of_paper
from consensus.server import digest


class Coupling:
    """Couples the copies of a model on several processes through a consensus variable u.

    `step` looks at the parameters only: accumulation of gradients, clipping, closures, and a
    `GradScaler` that skips a step need nothing else. All processes call it equally often.

    Args:
        model: The model, on its device, with equal weights on all processes. Its trainable
            parameters are coupled; frozen ones are compared at the start and left alone.
        optimizer: Their optimizer. Its `momentum_buffer` is scaled where a step of z_j is cut.
        potential: A name in `POTENTIALS`, or a potential.
        eta: Width of the potential, in units of the parameters.
        options: Options of a potential given by name.
        pull: Strength of the pull towards u in a communication, in [0, 1]; 1 replaces z_j by u if
            the potential is quadratic or `implicit`. A parameter group of the optimizer may have a
            `pull` of its own.
        outer: Step of u; 1 for the (weighted) mean of the copies. Or a function that makes an
            optimizer of torch for a list of parameters, which are u: with pull = 1 and
            `lambda u: torch.optim.SGD(u, lr=0.7, momentum=0.9, nesterov=True)` this is DiLoCo.
        local_pull: Strength between communications, with u fixed.
        period: Calls of `step` between two communications.
        fragments: Number of groups of layers that communicate at staggered times, once each in a
            period.
        implicit: Proximal steps, stable for any strength; False for the steps of Algorithm 1. None:
            True unless the potential is quadratic.
        order: "gauss_seidel" pulls z_j towards u+, as Algorithm 1; "jacobi" towards u, as (17).
        overlap: Hide the sum over processes behind the next iteration. Otherwise it is formed of
            the parameters after the optimizer step, and finished in the same call.
        delay: Hide it behind so many iterations more, below the period, for slow networks. There is
            no local pull while it is on its way.
        group: Processes that are coupled: a process group or one-dimensional device mesh of torch;
            None: the default group, or this process alone if there is none. If a worker is several
            processes by fully_shard or DistributedDataParallel: one process of each worker.
        layers: Lists of parameter names, the layers of (18); None: a layer is a module with its own
            parameters.
        buffers: "local", or "mean": the average of float buffers at each communication. In either
            case `torch.optim.swa_utils.update_bn` recomputes them for u inside `consensus()`.
        timeout_s: Longest wait for another process, in seconds.

    Raises:
        ValueError: On all processes alike, if an argument is not allowed or the models differ.
        RuntimeError: In `step`, on all processes alike, if u is found not to be finite.
    """

    _swapped = _closed = False
    _make_part: type[Part] = Part
    _open_group: Callable[[Any, torch.device, float], Group] = staticmethod(group_of_user)

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        potential: str | Potential = "quad",
        *,
        eta: float = 1.0,
        options: Mapping[str, Any] | None = None,
        pull: float = 0.5,
        outer: float | MakeOptimizer = 1.0,
        local_pull: float = 0.0,
        period: int = 1,
        fragments: int = 1,
        implicit: bool | None = None,
        order: str = "gauss_seidel",
        overlap: bool = True,
        delay: int = 0,
        group: Any = None,
        layers: Sequence[Sequence[str]] | None = None,
        buffers: str = "local",
        timeout_s: float = 600.0,
    ) -> None:
        self._model, self._overlap, self._period, self._delay = model, overlap, period, delay
        workers = self._open_group(group, device_of(model), timeout_s)
        self._processes = Processes(workers, model, timeout_s)
        try:
            plans, described, self._identity, problem = [], {}, {}, None
            try:
                own = (potential, options, eta, pull, outer, local_pull, period, fragments)
                settings = Settings(*own, implicit, order, overlap, delay, buffers)
                checks.check_model(model, optimizer, group)
                plans = make_plans(model, optimizer, settings, layers, self._processes.shards)
                described, self._identity = settings.describe(), identity(settings, plans)
            except ValueError as error:
                problem = str(error)  # the other processes wait for this one
            self._processes.raise_together(problem)
            self._couple(plans, described, optimizer, buffers)
        except BaseException:
            self._processes.close()
            raise

    @classmethod
    def from_paper(
        cls,
        model: nn.Module,
        optimizer: Optimizer,
        potential: str | Potential = "quad",
        *,
        lam: float,
        tau: float,
        sigma: float,
        eta: float = 1.0,
        group: Any = None,
        **others: Any,
    ) -> "Coupling":
        """Algorithm 1 in the letters of the paper, with t_u = tau, for as many workers as ranks.

        The optimizer is SGD with step size sigma. `others` are arguments of `Coupling`.
        """
        rates = rates_of_paper(lam, tau, sigma, eta, num_ranks(group))
        others = rates | {"implicit": False} | others
        return cls(model, optimizer, potential, eta=eta, group=group, **others)

    def _couple(
        self, plans: list[Plan], described: dict[str, Any], optimizer: Optimizer, buffers: str
    ) -> None:
        """Compare the processes, and make the parts."""
        shared = self._model.buffers() if buffers == "mean" else ()
        self._buffers = [own for own in shared if own.is_floating_point()]
        self._watch = checks.Watch(self._model)
        self._processes.require_equal(described, describe(self._model, plans, self._buffers))
        self._parts = [self._make_part(plan, optimizer, self._processes.workers) for plan in plans]
        if outers := checks.describe_optimizers(self.outer_optimizers):
            self._processes.require_equal({"outer": outers}, {})
        self._restart()

    def step(self) -> None:
        """One iteration, after the optimizer step or in its place. A collective."""
        if self._closed or self._swapped:
            self._refuse("step")
        if self._processes.shards is not None:
            self._processes.reshard()
        try:
            with torch.set_grad_enabled(False):  # in less time than the decorator no_grad
                for part in self._parts:
                    if part.pending is None:
                        part.move_between()
                on_way = [part for part in self._parts if part.pending is not None]
                moved = [part for part in on_way if self._age(part) == self._delay]
                if moved:
                    self._finish(moved, displaced=True)
                self._calls += 1
                due = [part for part in self._parts if self._age(part) == 0]
                if due:
                    self._watch.check()
                self._start(due, moved)  # where the parameters are z_j already
                if due and not self._overlap:
                    self._finish(due, displaced=False)
        except PeerLostError as error:
            hint = f"after {self._calls} calls of `step`: do all processes call it equally often?"
            raise PeerLostError(f"{error}; {hint}") from error

    @contextmanager
    def consensus(self) -> Iterator[None]:
        """Context in which the model's parameters are u.

        Afterwards parameters and buffers are what they were: inside, `update_bn` of
        torch.optim.swa_utils may recompute running statistics for u. No collective. `step`,
        `load_state_dict` and another `consensus` are refused inside.
        """
        self._refuse("consensus")
        before = [tensor.detach().clone() for tensor in self._tensors()]
        self._swapped = True
        try:
            for part in self._parts:
                part.refresh()
                part.parameters.write(part.u)
            yield
        finally:
            with torch.no_grad():
                for tensor, old in zip(self._tensors(), before, strict=True):
                    tensor.copy_(old)
            self._swapped = False

    def consensus_state_dict(self) -> dict[str, Any]:
        """`model.state_dict()` with u in place of the coupled parameters, as independent tensors.

        Sharded parameters are DTensors. No collective; `full_tensor()` of a DTensor is one of the
        processes of a worker. Frozen parameters and buffers are those of this process.
        """
        state: dict[str, Any] = self._model.state_dict(keep_vars=True)
        copies = {key: u for p in self._parts for key, u in p.parameters.copies(p.u).items()}
        for name, value in state.items():
            if isinstance(value, Tensor):
                own = copies.get(id(value))
                state[name] = value.detach().clone() if own is None else own
        return state

    def state_dict(self) -> dict[str, Any]:
        """Copies of what this process holds beside model and optimizer. Waits for the sum."""
        self._refuse("state_dict")
        self._wait()
        counts = {"calls": self._calls, "communications": self._communications}
        return states_of(self._parts) | counts | {"coupling": self._identity}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`. A collective.

        The user loads the states of model and optimizer as well, before or after. With as many
        processes and the same arguments, the run then has the bits of one that was not interrupted.
        A ValueError on all processes if the state has another potential, eta or order of the
        parameters, or if the processes have states of different calls of `step`.
        """
        self._refuse("load_state_dict")
        self._processes.raise_together(problem_of_state(state, self._parts, self._identity))
        counts = {f"state['{key}']": int(state[key]) for key in ("calls", "communications")}
        self._processes.require_equal(counts, {"state['u']": (int(digest(state["u"])),)})
        self._wait()
        load_states(self._parts, state)
        self._begin(int(state["calls"]), int(state["communications"]))

    @torch.no_grad()
    def restart(self) -> None:
        """Start anew from the model's parameters, for instance after they were loaded.

        A collective. A ValueError on all processes if the weights differ.
        """
        self._refuse("restart")
        self._wait()
        self._processes.reshard()
        z = torch.cat([part.parameters.read(part.z[0]) for part in self._parts])
        self._processes.require_equal({}, {"weights": int(digest(z))})
        self._restart()

    def stats(self) -> dict[str, Any]:
        """Numbers of this worker, read on the host. A collective of its processes if sharded.

        `distance`: |u - z_j| by layer, with z_j as it was last set here; `force`: |q(u - z_j)|
        likewise; `cuts`: of u and of z_j; `calls` of `step`; `communications`; `waited_s`.
        """
        norms = {name: pair for part in self._parts for name, pair in part.measure().items()}
        cuts = torch.tensor([part.cuts for part in self._parts]).sum(0).tolist()
        return {
            "distance": {name: distance for name, (distance, _) in norms.items()},
            "force": {name: force for name, (_, force) in norms.items()},
            "cuts": dict(zip("uz", cuts, strict=True)),
            "calls": self._calls,
            "communications": self._communications,
            "waited_s": sum(part.waited_s for part in self._parts),
        }

    @property
    def outer_optimizers(self) -> list[Optimizer]:
        """The optimizers that `outer` has made, one for each part; for schedules and the like."""
        return [part.outer for part in self._parts if part.outer is not None]

    def close(self) -> None:
        """Wait for the sum on its way and leave the group; the model stays as it is."""
        if self._closed:
            return
        self._closed = True
        with checks.warning_of_a_lost_sum(self._calls):
            self._wait()
        self._processes.close()

    def _restart(self) -> None:
        """Begin at u = z_j."""
        for part in self._parts:
            part.restart()
        self._begin(0, 0)

    def _begin(self, calls: int, communications: int) -> None:
        """Begin the sums that are on their way after so many calls."""
        self._calls, self._communications = calls, communications
        if self._overlap:
            self._start([p for p in self._parts if self._age(p) <= self._delay], self._parts)

    def _age(self, part: Part) -> int:
        """How many calls of `step` ago the last sum of a part was due, below the period."""
        return (self._calls - part.offset) % self._period

    def _start(self, parts: Sequence[Part], settled: Sequence[Part]) -> None:
        """Begin the sums of some parts; of the `settled` ones the parameters are z_j."""
        for part in parts:
            part.start(part in settled)

    def _tensors(self) -> list[Tensor]:
        """The memory of the coupled parameters and the buffers."""
        self._processes.reshard()
        parameters = [own for part in self._parts for own in part.parameters.tensors]
        return [*parameters, *self._model.buffers()]

    def _wait(self) -> None:
        for part in self._parts:
            part.wait()

    def _finish(self, parts: Sequence[Part], displaced: bool) -> None:
        """Finish sums on their way; `displaced`: whether the optimizer has moved since."""
        for part in parts:
            part.finish(displaced)
        self._count()
        if self._communications % LOOK == 0:
            checks.check_replicas(self._processes, self._parts, self._calls)
        if self._buffers:  # only here: a late mean could make a variance negative
            self._processes.mean_(self._buffers)

    def _count(self) -> None:
        """Count a communication, and look now and then whether u is finite."""
        self._communications += 1
        if self._communications % LOOK == 0:  # seldom, since it waits for the device
            checks.check_finite(self._parts, self._calls)

    def __reduce__(self) -> NoReturn:
        """Refuse copies, which would share the sum on its way."""
        raise TypeError("a Coupling cannot be copied or pickled; allowed: its state_dict()")

    def _refuse(self, name: str) -> None:
        if self._closed or self._swapped:
            place = "after `close`" if self._closed else "inside `consensus()`"
            raise RuntimeError(f"`{name}` of a Coupling {place}")
