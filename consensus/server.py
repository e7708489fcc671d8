"""The consensus server: u, and line 3 of Algorithm 1 over a group.

Data flow of one iteration: every rank sums grad phi(u - z_j) over its own workers, one all-reduce
adds the sums of all ranks (hidden by the minibatch gradients), and every rank applies the same
update to its replica of u. Rank 0's replica is evaluated and saved; the others are compared with it
bit for bit.

With a bounded domain the ranks also agree on the smallest feasible step. On the CPU the all-reduce
carries the reach of each rank's u - z_j, which decides nearly every step. A second collective is
left for steps near the boundary.
"""

import torch
from torch import Tensor

from consensus.comm import Group, GroupError, Pending
from consensus.core.flat import Scalar, ViewsOf, part_of
from consensus.core.kernels import ConsensusKernel, LineSearch, TotalForce, choose_kernel
from consensus.core.kernels.outer_step import FlatOptimizerStep
from consensus.core.layerwise import Layerwise
from consensus.core.scalar_equation import NotConvergedError

PendingForce = tuple[Pending, Tensor]
"""The sum of line 3 on its way, (n,) with the reach of each rank on the CPU; and z (K, n)."""


class Server:
    """Replicated u.

    Args:
        u: The start, equal on all ranks; a copy is taken. (n,)
        phi: The layer-wise potential (18).
        group: The processes of the run.
        kernel: Line 3; None: the fastest implementation.
        summed_by: The group that adds up the forces given to `start`; None: `group`.

    Attributes:
        u: The consensus variable. (n,)
        step: s_u of the last iteration, a tensor () on the device; 1 unless phi is bounded.
        cuts: The number of iterations with s_u < 1, likewise.
        sum: The sum of `start`, for callers that form the force themselves.
    """

    def __init__(
        self,
        u: Tensor,
        phi: Layerwise,
        group: Group,
        kernel: ConsensusKernel | None = None,
        summed_by: Group | None = None,
    ) -> None:
        self.u = u.clone()
        self.phi = phi
        self.group = group
        self.kernel = choose_kernel(phi, u, smallest=group.min_) if kernel is None else kernel
        self.step = u.new_ones(())
        self.cuts = torch.zeros((), dtype=torch.int64, device=u.device)
        self._over = group if summed_by is None else summed_by
        self._search = LineSearch(self.step, self.cuts, self._over.min_)
        reaches = self._over.size * self.kernel.reach_size
        self.sum = self._over.repeated_sum(self.kernel.force_size + reaches, u, exact=reaches)
        self._parts = ViewsOf(self._split)

    @property
    def memory(self) -> Tensor:
        """Memory (n,) that may be overwritten from `finish` to `start`."""
        message = self.sum.message
        return message if len(message) == len(self.u) else message[: len(self.u)]

    def start(self, z: Tensor, scratch: Tensor | None = None) -> PendingForce:
        """Line 3, first half: begin the all-reduce of sum_j grad phi(u - z_j).

        Args:
            z: (K, n)
            scratch: Memory like z that may be overwritten.
        """
        message = self.sum.message
        if self.kernel.reach_size == 0:
            self.kernel.forces(self.u, z, message, scratch)
        else:
            force, reaches, own = self._parts(message)
            reach = self.kernel.forces(self.u, z, force, scratch)
            assert reach is not None
            # A sum of one rank's numbers and the others' zeros: every rank gets every reach.
            if self._over.size > 1:
                reaches.zero_()
            torch.amax(reach, 0, out=own)
        return self.sum.start(), z

    def finish(self, pending: PendingForce, t_u: Scalar) -> Tensor:
        """Line 3, second half: wait, then u -= s_u t_u force in place. Returns u+ (n,).

        Args:
            pending: The result of `start`; neither u nor z has changed since.
            t_u: tau or tau / lam.

        Raises:
            GroupError: On every rank, if the kernel solves for u and has not converged.
        """
        total, z = pending
        force, reach, out = total.wait(), None, self.sum.message
        if self.kernel.reach_size:
            # The total is a message in small sums; then its views are at hand.
            force, reach, _ = (self._parts if force is out else self._split)(force)
            if self._over.size > 1:
                reach = reach.view(self._over.size, -1).amax(0)
            out = self._parts(out)[0]
        try:
            self.kernel.move_consensus(self.u, z, TotalForce(force, reach), t_u, self._search, out)
        except NotConvergedError as error:  # on all ranks, which decide from the same sums
            raise GroupError(f"rank {self.group.rank}: {error}") from error
        return self.u

    def _split(self, message: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The force in a message, (n,), the reaches of all ranks, and that of this one, (G,)."""
        force, reaches = message.tensor_split([self.kernel.force_size])
        return force, reaches, reaches.view(self._over.size, -1)[self._over.rank]

    def state_dict(self) -> dict[str, Tensor]:
        """The state that survives an iteration: `u` (n,), `step` () and `cuts` ().

        And `outer/...`, the state of an optimizer over u.
        """
        own = {"u": self.u, "step": self.step, "cuts": self.cuts}
        if isinstance(self.kernel, FlatOptimizerStep):
            own |= {f"outer/{key}": value for key, value in self.kernel.state_dict().items()}
        return own

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from copies of a `state_dict`, on any device."""
        for key, own in {"u": self.u, "step": self.step, "cuts": self.cuts}.items():
            own.copy_(state[key])
        if isinstance(self.kernel, FlatOptimizerStep):
            self.kernel.load_state_dict(part_of(state, "outer"))

    def verify_replicas(self) -> int:
        """`verify_replicas` of u."""
        return verify_replicas(self.u, self.group)


def verify_replicas(u: Tensor, group: Group) -> int:
    """Check that all ranks hold the same bits of u (n,); return their digest. A collective.

    Raises:
        GroupError: On every rank, naming the ranks whose u differs from rank 0's.
    """
    digests = group.gather(digest(u)).tolist()
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
        x = x ^ (index * _GOLDEN)
        for shift, factor in _MIX:
            shifted = (x >> shift) & ((1 << (64 - shift)) - 1)  # >> alone would copy the sign bit
            x = (x ^ shifted) * factor
        total += x.sum()
    return total


_CHUNK = 1 << 22
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # 2^64 over the golden ratio, as int64
_MIX = ((30, 0xBF58476D1CE4E5B9 - (1 << 64)), (27, 0x94D049BB133111EB - (1 << 64)), (31, 1))
