"""ElasticCoupling: a `Coupling` whose processes join and leave while the others go on.

A sum over processes fails on all of them if one is lost. They agree on who is left, as in
comm/members.py, and sum again. A process that had the result before is asked for it by those that
had not. Where a communication begins, a process that waits to join is admitted: it gets u, and its
copy begins there.

In each communication the processes add up who wants a change, beside the sum of forces, so all of
them make it in the same call of `step`.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from consensus.comm import (
    LOST,
    PLANNED,
    Group,
    GroupError,
    Members,
    PeerLostError,
    Solo,
    connect_to_launcher,
    open_view,
)
from consensus.core.potentials import Potential
from consensus.coupling.coupling import Coupling
from consensus.coupling.elastic_part import ChangeRequest, ElasticPart, Report
from consensus.coupling.part import Part
from consensus.server import digest, verify_replicas


class ElasticCoupling(Coupling):
    """A `Coupling` whose processes may be lost, leave and join without a restart of the others.

    Each process is started by `python -m consensus.elastic --script FILE`, or has MASTER_ADDR and
    MASTER_PORT of the store that this launcher keeps. torch.distributed need not be initialized.

        coupling = ElasticCoupling(model, optimizer, potential="tan", period=10)
        for t in range(coupling.calls, STEPS):
            ...
            coupling.step()
        coupling.close()

    A process that joins waits in the constructor until it is admitted. Its parameters are u then,
    the options of the optimizer's parameter groups, such as the learning rate, are those of the
    others, and `calls` says how often these have called `step`: set schedules accordingly.

    Args:
        model: As in `Coupling`, as are optimizer and potential.
        min_workers: With fewer processes `step` raises a GroupError.
        timeout_s: Longest wait for a process that is alive, in seconds.
        settings: The other arguments of `Coupling`, except `group`.

    Raises:
        ValueError: As in `Coupling`; also if MASTER_ADDR is not set, or a setting needs a fixed set
            of processes.
        GroupError: If there is no store, or the run is complete or has gone on without this
            process.
    """

    _make_part: type[Part] = ElasticPart
    _parts: list[ElasticPart]  # type: ignore[assignment]

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        potential: str | Potential = "quad",
        *,
        min_workers: int = 1,
        timeout_s: float = 600.0,
        **settings: Any,
    ) -> None:
        _refuse_fixed(settings)
        self._members = _members(min_workers, timeout_s)
        self._optimizer, self._wanted = optimizer, False
        try:
            self._members.join()
            while True:
                try:
                    super().__init__(model, optimizer, potential, timeout_s=timeout_s, **settings)
                    break
                except PeerLostError:
                    self._members.change(LOST)
        except BaseException:
            self._members.close()
            raise

    def _open_group(self, group: None, device: torch.device, timeout_s: float) -> Group:
        """The members of the current view; this process alone if it joins a run."""
        del group
        self._device, self._timeout_s = device, timeout_s
        self._view = open_view(self._members, device, timeout_s)
        self._reports: list[Report | None] = self._view.gather_objects(None)
        return self._view if self._reports == [None] * self._view.size else Solo(device)

    def _couple(self, plans: Any, described: dict[str, Any], *others: Any) -> None:
        self._described = described
        self._request = ChangeRequest(Solo(self._device))
        super()._couple(plans, described, *others)
        if self._processes.inside.size > 1:
            raise ValueError("`model` is one of several processes of a worker; allowed: one each")

    @torch.no_grad()
    def _restart(self) -> None:
        """Begin at u = z_j, or at u of a run that goes on."""
        if self._processes.workers is self._view:
            self._request.regroup(self._view)
            super()._restart()
            return
        calls, communications = self._adopt(self._view, self._reports)
        due = [part for part in self._parts if calls % self._period == part.offset]
        self._begin(calls, communications)
        if not self._overlap and due:
            self._start(due, due)
            self._finish(due, displaced=False)

    @property
    def calls(self) -> int:
        """How often the processes have called `step`."""
        return self._calls

    @property
    def workers(self) -> int:
        """M, the number of processes now."""
        return self._processes.workers.size

    @property
    def first(self) -> bool:
        """Whether this process is the first by seniority, for instance to print and to save."""
        return self._members.rank == 0

    @property
    def number(self) -> int:
        """The number j of this worker, for instance to divide data; the lowest that was free."""
        view = self._members.view
        assert view is not None
        return view.workers[self._members.rank][0]

    @property
    def numbers(self) -> tuple[int, ...]:
        """The numbers j of all workers now, by seniority."""
        assert self._members.view is not None
        return self._members.view.numbers

    def leave(self) -> None:
        """Leave the run, which goes on without this process; the model stays as it is."""
        self._closed = True
        self._processes.close()
        self._members.close("has left")

    def close(self) -> None:
        """Wait for the sum on its way and end the run, which nobody can join any more."""
        if self._closed:
            return
        self._closed = True
        with suppress(GroupError):  # nobody needs the sum any more
            for part in self._parts:
                part.wait()
        self._members.await_end()
        self._processes.close()
        self._members.close(finished=True)

    def restart(self) -> NoReturn:
        """Not offered: a process that joins later could not take part."""
        raise RuntimeError("`restart` of an ElasticCoupling; allowed: a new run")

    def _start(self, parts: Sequence[Part], settled: Sequence[Part]) -> None:
        """Begin the sums of some parts, after a change that was wanted."""
        while parts:
            try:
                if self._wanted:
                    self._change(PLANNED)
                for part in parts:
                    if part.pending is None:
                        part.start(part in settled)
                if self._request.pending is None:
                    self._request.start(self._members.requests_change)
                return
            except PeerLostError:
                self._change(LOST)

    def _finish(self, parts: Sequence[Part], displaced: bool) -> None:
        for part in parts:
            self._repeat(partial(part.finish, displaced))
        view = self._members.view
        wanted = self._repeat(self._request.finish)
        self._wanted = wanted and self._members.view is view
        self._count()

    def _wait(self) -> None:
        for part in self._parts:
            self._repeat(part.wait)

    def _repeat(self, work: Callable[[], Any]) -> Any:
        """Do a part of a communication until no member is lost in it."""
        while True:
            try:
                return work()
            except PeerLostError:
                self._change(LOST)

    def _change(self, ready: str) -> None:
        """Agree on the next view and go on in it. A collective of its members."""
        while True:
            view = self._members.change(ready)
            self._processes.workers.close()
            self._wanted = False
            if view.stop:
                for part in self._parts:
                    part.pending = None
                raise GroupError(f"after {self._calls} calls of `step`: {view.stop}")
            try:
                group = open_view(self._members, self._device, self._timeout_s)
                finished = (*(part.server.finished for part in self._parts), self._request.finished)
                report = Report(self._calls, self._communications, finished)
                self._adopt(group, group.gather_objects(report))
                return
            except PeerLostError:
                ready = LOST

    def _adopt(self, group: Group, reports: list[Report | None]) -> tuple[int, int]:
        """Meet the members of a view. Returns the largest calls and communications of all."""
        joins = reports[group.rank] is None
        known = [(rank, found) for rank, found in enumerate(reports) if found is not None]
        groups = self._optimizer.param_groups
        options = [{k: v for k, v in own.items() if k != "params"} for own in groups]
        described, theirs = group.share((self._described, options), known[0][0])
        if joins:
            self._require_same(described)
            for own, given in zip(groups, theirs, strict=True):
                own.update(given)
        bits = []
        for i, part in enumerate(self._parts):
            source, most = max(((r, x.finished[i]) for r, x in known), key=lambda pair: pair[1])
            u: Tensor = part.u
            if any(x is None or x.finished[i] < most for x in reports):
                state = group.share(part.consensus_state(), source)
                u = state["u"]
                if joins:
                    part.begin(state, most)
                elif part.server.finished < most:
                    part.take(state)
            bits.append(u)
        most = max(x.finished[-1] for _, x in known)
        late = self._request.finished < most and not joins
        self._processes.workers = group
        verify_replicas(torch.cat([digest(u).view(1) for u in bits]), group)
        for part in self._parts:
            part.regroup(group)
        self._request.regroup(group)
        for part in self._parts:
            if part.pending is not None:
                part.start()
        if self._request.pending is not None:
            if late:
                self._request.take()
            else:
                self._request.start(self._members.requests_change)
        if joins:
            self._request.finished = most
        return max(x.calls for _, x in known), max(x.communications for _, x in known)

    def _require_same(self, others: Mapping[str, Any]) -> None:
        """Raise a ValueError if this process has other settings than the run that it joins."""
        for key, value in others.items():
            if self._described[key] != value:
                own = self._described[key]
                raise ValueError(f"`{key}` is {own}; allowed: {value}, as in the run that it joins")


def _refuse_fixed(settings: Mapping[str, Any]) -> None:
    """Refuse settings that need a fixed set of processes."""
    if settings.get("group") is not None:
        raise ValueError("`group` is given; allowed: none, the members are the processes")
    if settings.get("delay", 0) != 0:
        raise ValueError(f"`delay` is {settings['delay']}; allowed: 0, where members change")
    if settings.get("buffers", "local") != "local":
        raise ValueError(
            f"`buffers` is {settings['buffers']}; allowed: local, where members change"
        )


def _members(min_workers: int, timeout_s: float) -> Members:
    """This process as one of those that the launcher has started."""
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing or os.environ.get("WORLD_SIZE", "1") != "1":
        raise ValueError(
            "an ElasticCoupling needs MASTER_ADDR and MASTER_PORT of a store, and no torchrun, "
            "which ends all its processes with the first; allowed: the launcher consensus.elastic"
        )
    store = connect_to_launcher(timedelta(seconds=timeout_s))
    return Members.of_launcher(store, least=min_workers, timeout_s=timeout_s)
