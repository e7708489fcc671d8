"""The consensus server: u, and line 3 of Algorithm 1 over a group.

Data flow of one iteration: every rank sums grad phi(u - z_j) over its own workers, one all-reduce
adds the ranks up (while the minibatch gradients are computed), every rank applies the same update
to its own copy of u. Rank 0's copy is the one that is evaluated and saved; the others are checked
against it, bit for bit.

With a bounded domain the ranks also agree on the smallest feasible step. On the CPU the all-reduce
carries how far each rank's u - z_j are from 0, which settles it nearly always; a second collective
is left for the times near the boundary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from consensus.comm import Group, GroupError, Pending
from consensus.core.flat import Scalar
from consensus.core.layerwise import Layerwise
from consensus.core.lines import lines_for, shared_by_all
from consensus.core.mean import phi_mean
from consensus.core.updates import consensus_direction

U_UPDATES = ("gradient", "exact")
EXACT = {torch.float32: 1e-5, torch.float64: 1e-9}
"""How far the forces may be from their balance, as a part of their sum, in an exact update."""


@dataclass
class PendingForce:
    """sum_j grad phi(u - z_j) on its way, and the z_j it belongs to.

    Attributes:
        force: Its handle; a tensor (n,), with the reach of each rank behind it on the CPU. None
            where u is not moved by it.
        z: (K, n) for the line search.
    """

    force: Pending | None
    z: Tensor


class Server:
    """Replicated u.

    Args:
        u: The start, equal on all ranks; a copy is taken. (n,)
        phi: The layer-wise potential (18).
        group: The processes of the run.
        update: "gradient": line 3; "exact": the minimizer (14a) in its place, which costs several
            sums that nothing hides, and needs no tau.
        fused: Whether large vectors, and those on a GPU, go the ways of core/lines.py, equal up to
            rounding.

    Attributes:
        u: The consensus variable. (n,)
        step: s_u of the last iteration, a tensor () on the device; 1 unless phi is bounded.
        cuts: How often s_u was below 1, likewise.
    """

    def __init__(
        self,
        u: Tensor,
        phi: Layerwise,
        group: Group,
        *,
        update: str = "gradient",
        fused: bool = True,
    ) -> None:
        assert update in U_UPDATES, update
        self.u = u.clone()
        self.phi = phi
        self.group = group
        self.update = update
        self.step = u.new_ones(())
        self.cuts = torch.zeros((), dtype=torch.int64, device=u.device)
        # On the CPU a branch is free and a collective is not; on a GPU it is the other way round.
        branches = phi.bounded and u.device.type == "cpu"
        self._slot = len(phi.reach(u)) if branches else 0  # numbers that tell a rank's reach
        self._sum = group.repeated_sum(len(u) + group.size * self._slot, u)
        self._lines = lines_for(phi, u) if fused else None

    def start(self, z: Tensor, scratch: Tensor | None = None) -> PendingForce:
        """Line 3, first half: begin the all-reduce of sum_j grad phi(u - z_j).

        Args:
            z: (K, n)
            scratch: Memory like z that may be overwritten.
        """
        if self.update == "exact":
            return PendingForce(None, z)
        n = len(self.u)
        message = self._sum.message
        if self._lines is not None:
            reach = self._lines.forces(self.u, z, out=message[:n])
        else:
            w, reach = torch.sub(self.u, z, out=scratch), None
            if self._slot:
                force, reach = self.phi.grad_and_reach_(w)
            else:
                force = self.phi.grad_(w)
            torch.sum(force, 0, out=message[:n])
        if self._slot:
            # A sum of one rank's numbers and the others' zeros: everyone learns everyone's reach.
            assert reach is not None
            slots = message[n:].zero_().view(self.group.size, self._slot)
            slots[self.group.rank] = reach.amax(0)
        return PendingForce(self._sum.start(), z)

    def finish(self, pending: PendingForce, t_u: Scalar) -> Tensor:
        """Line 3, second half: wait, cut the step, move u in place. Returns u+ (n,).

        Args:
            pending: What `start` returned; neither u nor z has changed since.
            t_u: tau or tau / lam.
        """
        if pending.force is None:
            tolerance = EXACT[self.u.dtype]
            self.u.copy_(
                phi_mean(
                    self.phi,
                    pending.z,
                    self.u,
                    total=self.group.sum_,
                    smallest=self.group.min_,
                    tolerance=tolerance,
                ).u
            )
            self.step.fill_(1.0)
            return self.u
        force, reaches = pending.force.wait().tensor_split([len(self.u)])
        if self._lines is not None and shared_by_all(t_u):
            if self.phi.bounded:
                reach = reaches.view(-1, self._slot).amax(0) if self._slot else None
                agreed = self._lines.consensus_step(self.u, pending.z, force, t_u, self.step, reach)
                if not agreed:
                    self.group.min_(self.step)
            self._lines.move_consensus(self.u, force, t_u, self.step, self.cuts)
            return self.u
        d = consensus_direction(force, t_u, out=self._sum.message[: len(self.u)])
        if self.phi.bounded and not self._sure_of(reaches, d):
            # The smallest s_u over all workers: safe for each of them, since dom phi is convex.
            s = self.phi.feasible_step(self.u - pending.z, d, self.u).amin()
            self.step.copy_(self.group.min_(s))
            self.cuts += self.step < 1
            d *= self.step
        self.u += d
        return self.u

    def _sure_of(self, reaches: Tensor, d: Tensor) -> bool:
        """Whether s_u is 1, which then is set. All ranks know the same, and answer the same."""
        if not self._slot:
            return False
        reach = reaches.view(-1, self._slot).amax(0)
        sure = self.phi.surely_feasible(reach, d, self.u)
        if sure:
            self.step.fill_(1.0)
        return sure

    def state_dict(self) -> dict[str, Tensor]:
        """What survives an iteration: `u` (n,), `step` () and `cuts` ()."""
        return {"u": self.u, "step": self.step, "cuts": self.cuts}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from copies of what `state_dict` returned, on any device."""
        self.u.copy_(state["u"])
        self.step.copy_(state["step"])
        self.cuts.copy_(state["cuts"])

    def verify_replicas(self) -> int:
        """Check that all ranks hold the same bits of u; return their digest.

        Raises:
            GroupError: On every rank, naming the ranks whose u differs from rank 0's.
        """
        digests = self.group.gather(digest(self.u)).tolist()
        wrong = [rank for rank, value in enumerate(digests) if value != digests[0]]
        if wrong:
            raise GroupError(f"u on rank {wrong} differs from u on rank 0: the replicas diverged")
        return int(digests[0])


def digest(u: Tensor) -> Tensor:
    """A 64-bit digest of the bits of u (n,), computed on its device. -> int64 ().

    The sum over i of mix(bits of u_i xor i c) modulo 2^64. `mix` (the finalizer of splitmix64) is a
    bijection, so a change of any single coordinate always changes the digest, and it leaves no bit
    linear, so changes of several coordinates do not cancel but by chance, once in 2^64.
    """
    bits = u.contiguous().view(torch.int32 if u.element_size() == 4 else torch.int64)
    total = torch.zeros((), dtype=torch.int64, device=u.device)
    for start in range(0, bits.numel(), _CHUNK):  # 64-bit temporaries must not outweigh u
        x = bits[start : start + _CHUNK].to(torch.int64)
        index = torch.arange(start, start + x.numel(), dtype=torch.int64, device=u.device)
        total += _mix(x ^ (index * _GOLDEN)).sum()
    return total


_CHUNK = 1 << 22
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # 2^64 over the golden ratio, as int64
_FACTORS = (0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64))


def _mix(x: Tensor) -> Tensor:
    for shift, factor in zip((30, 27), _FACTORS, strict=True):
        x = (x ^ _shift_right(x, shift)) * factor
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # >> alone would copy the sign bit
