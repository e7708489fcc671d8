"""The parts of an `ElasticCoupling`: sums that can be repeated, or taken from another process."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer

from consensus.comm import Group, PeerLostError, Pending
from consensus.coupling.part import Part
from consensus.coupling.plan import Plan
from consensus.repeatable import RepeatableServer


@dataclass(frozen=True)
class Report:
    """Progress of a process that has taken part, for the processes of the next view."""

    calls: int
    communications: int
    finished: tuple[int, ...]  # sums that it has finished: of each part, of the request


class ElasticPart(Part):
    """`Part` whose sum can be repeated with other processes, or its result taken from one."""

    _make_server = RepeatableServer
    _fuses = False  # u moves apart from the server

    def __init__(self, plan: Plan, optimizer: Optimizer, group: Group) -> None:
        if callable(plan.settings.outer) and plan.puller.cuts_steps:
            raise ValueError(
                "`outer` is an optimizer and steps are cut; allowed: a number, or implicit=True, "
                "where members change: its momentum could not be taken back"
            )
        super().__init__(plan, optimizer, group)
        assert isinstance(self._server, RepeatableServer)
        self.server: RepeatableServer = self._server
        self._outer_rate = 1.0 if callable(plan.settings.outer) else plan.settings.outer

    def finish(self, displaced: bool) -> None:
        """As in `Part`; the sum stays on its way if a process is lost."""
        pending = self.pending
        try:
            super().finish(displaced)
        except PeerLostError:
            self.pending = pending
            raise

    def regroup(self, group: Group) -> None:
        """Go on over other processes. A collective."""
        self.server.regroup(group)
        self._t_u = self._puller.t_u(self._outer_rate, group.size)

    def consensus_state(self) -> dict[str, Any]:
        """`state_dict` without z_j."""
        return {key: value for key, value in self.state_dict().items() if key != "z"}

    def take(self, state: Mapping[str, Any]) -> None:
        """Let the sum on its way result in this state."""

        def load() -> None:
            z, count = self.z[0].clone(), self.cuts[1].clone()
            self.load_state_dict({**state, "z": z})
            self.cuts[1].copy_(count)

        self.server.take(load)

    def begin(self, state: Mapping[str, Any], finished: int) -> None:
        """Begin at z_j = u of this state, after so many sums."""
        self.load_state_dict({**state, "z": state["u"]})
        self.cuts[1].zero_()
        self.server.finished = finished
        self.parameters.write(self.z[0])


class ChangeRequest:
    """The number of processes that want a change, summed beside the forces."""

    def __init__(self, group: Group) -> None:
        self.finished = 0
        self.pending: Pending | None = None
        self.regroup(group)

    def regroup(self, group: Group) -> None:
        """Go on over other processes. A collective."""
        self._sum = group.repeated_sum(1, torch.zeros(1))

    def start(self, wants: bool) -> None:
        """Begin the sum."""
        self._sum.message.fill_(float(wants))
        self.pending = self._sum.start()

    def take(self) -> None:
        """Let the sum on its way be 0: it was that of an earlier view."""
        self.pending = Pending(lambda: torch.zeros(1))

    def finish(self) -> bool:
        """Whether a process wants a change."""
        assert self.pending is not None
        wanted = float(self.pending.wait()[0]) > 0
        self.pending, self.finished = None, self.finished + 1
        return wanted
