"""Measurement of the stationarity of a run, section 4 of the paper.

    f_j(z) = (B / |S_j|) sum over i in S_j of loss_i(z)  +  R(z)

is the function that line 5 descends, with dropout off: the expected loss of a minibatch (B is its
size; 1 if the loss is its mean) over the shard S_j of worker j, or over `stationarity.samples`
fixed samples of it. u and the z_j come to rest at stationary points of (15) for the lam of
`Consensus.lam_at_rest`. That lam is used here, unless `stationarity.lam` is set:

    envelope_gradient    |sum_j grad e f_j (u)|, the measure of the paper, by (13) at the phi-prox
    accuracy             residual of the proxes: the sum over j of |grad f_j(p_j) - (13)|
    envelope_gradients   |grad e f_j (u)|, for each j
    consensus_residual   (5a): |sum_j grad phi(u - z_j)| / lam
    worker_residual      (5b): |grad f_j(z_j) - grad phi(u - z_j) / lam|, for each j
    translation_gap      |grad phi(u - z_j) / lam - grad e f_j (u)|, for each j: 0 where z_j is the
                         phi-prox of u, the translation of stationarity (9)
    force                |grad phi(u - z_j)| / lam, for each j
    consensus_gap        |u - z_j|, for each j and each layer
    layers               the same of each layer

If all workers have all the data, all f_j are one function. Then rank 0 solves one prox: it
broadcasts each point of evaluation, and all ranks sum their shares of the data. Otherwise every
rank solves the proxes of its own workers. In both cases all ranks synchronize at every evaluation
of f, so that a stop signal of any rank ends the measurement, and a rank that has finished waits for
at most one evaluation of another. Finally each f_j is differentiated once more, at z_j.

Training pauses meanwhile, because both would share the device. A measurement changes no number of
the run, and samples_per_s excludes its time. A prox needs `VECTORS` of descent.py, (n,) each, on
rank 0 or on all ranks.
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from consensus.algorithm import Consensus
from consensus.comm import Group
from consensus.core.updates import regularizer
from consensus.problem.streams import stream
from consensus.records import Measurement
from consensus.run.plan import Plan
from consensus.theory.stationarity import consensus_residual, prox, worker_residual
from consensus.tree_sum import tree_sum

Pair = tuple[Tensor, Tensor]
Function = Callable[[Tensor], Pair]
"""A point (n,) -> value () and gradient (n,)."""

EVALUATE, DONE = 0.0, 1.0


class _StopRequestedError(Exception):
    """Raised on all ranks at the same evaluation of f."""


class Stationarity:
    """The measurements of one run. Every method is a collective."""

    def __init__(self, plan: Plan, group: Group) -> None:
        self.plan, self.group, self.phi = plan, group, plan.phi
        self.options = plan.config.stationarity
        algorithm = plan.config.algorithm
        self.batch = algorithm.batch_size if algorithm.loss_reduction == "sum" else 1
        self.nu = algorithm.weight_decay
        self.one_for_all = plan.config.data.partition == "full"
        self.samples = [
            self._sample(source.indices, 0 if self.one_for_all else source.worker)
            for source in plan.oracle.minibatches
        ]

    def _sample(self, shard: Tensor, worker: int) -> Tensor:
        """The samples of f_j, which are the same in all measurements."""
        most = self.options.samples
        if most is None or most >= len(shard):
            return shard
        generator = stream(self.plan.config.seed, "stationarity", worker)
        chosen = torch.randperm(len(shard), generator=generator)[:most]
        return shard[chosen.to(shard.device)]

    def measure(
        self, algorithm: Consensus, t: int, asked_to_stop: Callable[[], bool] = lambda: False
    ) -> Measurement | None:
        """Measure after t iterations; the algorithm is only read.

        The same on all ranks, except for `seconds`; None if `asked_to_stop` holds on some rank.
        """
        began = time.perf_counter()
        phi, u, z = self.phi, algorithm.u, algorithm.worker.z
        lam = self.options.lam or float(algorithm.lam_at_rest(max(0, t - 1)))
        solve = self._prox_of_all if self.one_for_all else self._prox_of_each
        try:
            envelopes, numbers = solve(u, lam, asked_to_stop)
        except _StopRequestedError:
            return None
        mine = torch.cat([self._norms_at(u, z, lam, envelopes), numbers], 1)
        everyone = self.group.gather(mine).flatten(0, 1).cpu()  # (M, 5 L + 4)
        of_layers = everyone[:, :-4].reshape(len(everyone), 5, -1).transpose(0, 1)  # (5, M, L)
        of_envelopes, force, residual, gap, apart = of_layers
        value, accuracy, evaluations, converged = everyone[:, -4:].T  # (M,) each
        residuals = [consensus_residual(phi, u, z_j.unsqueeze(0), lam) for z_j in z]
        sums = torch.stack([tree_sum(envelopes.unbind()), tree_sum(residuals)])
        envelope, residual_u = phi.distance(self.group.sum_(sums)).double().cpu()
        return {
            "lam": lam,
            "envelope_gradient": float(envelope.norm()),
            "accuracy": float(accuracy.sum()),
            "converged": bool(converged.all()),
            "envelope_gradients": of_envelopes.norm(dim=-1).tolist(),
            "consensus_residual": float(residual_u.norm()),
            "worker_residual": residual.norm(dim=-1).tolist(),
            "translation_gap": gap.norm(dim=-1).tolist(),
            "force": force.norm(dim=-1).tolist(),
            "consensus_gap": apart.tolist(),
            "layers": {
                "envelope_gradient": envelope.tolist(),
                "consensus_residual": residual_u.tolist(),
                "worker_residual": residual.tolist(),
                "translation_gap": gap.tolist(),
            },
            "envelope": float(value.sum()),
            "u_norm": float(u.double().norm()),
            "evaluations": int(evaluations.max()),
            "samples": [min(self.options.samples or size, size) for size in self.plan.shard_sizes],
            "seconds": time.perf_counter() - began,
        }

    def _norms_at(self, u: Tensor, z: Tensor, lam: float, envelopes: Tensor) -> Tensor:
        """Layer norms of grad e f_j, force, (5b), gap (9) and u - z_j. -> float64 (K, 5 L)."""
        phi, rows = self.phi, []
        for z_j, envelope, sample in zip(z, envelopes, self.samples, strict=True):
            _, gradient = self._f(z_j, sample)
            force = phi.grad(u - z_j) / lam
            residual = worker_residual(gradient.unsqueeze(0), phi, u, z_j.unsqueeze(0), lam)[0]
            of_worker = (envelope, force, residual, force - envelope, u - z_j)
            rows.append(torch.cat([phi.distance(x) for x in of_worker]).double())
        return torch.stack(rows)

    def _total(self, z: Tensor, sample: Tensor) -> Pair:
        return self.plan.oracle.total(z, sample, self.options.batch_size)

    def _f(self, z: Tensor, sample: Tensor, total: Pair | None = None) -> Pair:
        """f_j(z) and its gradient. `total` are the sums over its samples; None: computed here."""
        loss, gradient = total or self._total(z, sample)
        factor = self.batch / len(sample)
        value = factor * loss.double() + regularizer(z.double(), self.nu)
        return value.to(z), torch.add(self.nu * z, gradient, alpha=factor)

    # ---- the prox: one for all workers, or those of its own workers on each rank
    #      -> grad e f_j (u) (K, n), and value, accuracy, evaluations, converged, float64 (K, 4)

    def _prox_of_all(self, u: Tensor, lam: float, asked_to_stop: Callable[[], bool]) -> Pair:
        sample = self.samples[0]
        share_of, mine = self.plan.evaluation_shares
        shares = [torch.tensor_split(sample, share_of)[i] for i in mine]
        n = len(u)

        def order(command: float, z: Tensor) -> Tensor:
            """A vector and a command, from rank 0."""
            return self.group.broadcast_(torch.cat([z, z.new_tensor([command])]))

        def add_up(z: Tensor) -> Pair:
            totals = [self._total(z, share) for share in shares]
            gradient = tree_sum([of_share for _, of_share in totals])
            loss = tree_sum([of_share.to(gradient) for of_share, _ in totals])
            stop = loss.new_tensor(float(asked_to_stop()))
            summed = self.group.sum_(torch.cat([gradient, torch.stack([loss, stop])]))
            if summed[-1] > 0:
                raise _StopRequestedError
            return summed[n], summed[:n]

        def f(z: Tensor) -> Pair:
            order(EVALUATE, z)
            return self._f(z, sample, add_up(z))

        if self.group.rank == 0:
            gradient, numbers = self._prox(f, u, lam)
            order(DONE, gradient)
        else:
            numbers = torch.zeros(4, dtype=torch.float64, device=u.device)
            while (received := order(EVALUATE, u))[n] == EVALUATE:
                add_up(received[:n])
            gradient = received[:n]
        self.group.broadcast_(numbers)
        workers = len(self.samples)
        return gradient.expand(workers, n), numbers.expand(workers, 4)

    def _prox_of_each(self, u: Tensor, lam: float, asked_to_stop: Callable[[], bool]) -> Pair:
        def others(working: bool) -> bool:
            """Whether a rank is still working; all ranks synchronize here at each evaluation."""
            mine = torch.tensor([float(working), float(asked_to_stop())], device=u.device)
            at_work, stops = self.group.sum_(mine).tolist()
            if stops:
                raise _StopRequestedError
            return bool(at_work)

        def in_step(sample: Tensor) -> Function:
            def f(z: Tensor) -> Pair:
                others(True)
                return self._f(z, sample)

            return f

        found = [self._prox(in_step(sample), u, lam) for sample in self.samples]
        while others(False):
            pass
        gradients, numbers = zip(*found, strict=True)
        return torch.stack(gradients), torch.stack(numbers)

    def _prox(self, f: Function, u: Tensor, lam: float) -> Pair:
        """The phi-prox from z = u. -> (n,), (4,)."""
        options = self.options
        found = prox(f, self.phi, u, lam, tolerance=options.tolerance, budget=options.budget)
        numbers = [found.value, found.accuracy, found.converged]
        value, accuracy, converged = (number.double() for number in numbers)
        evaluations = value.new_tensor(float(found.evaluations))
        # If f is not finite there is no result: u itself, without a force, would look stationary.
        gradient = torch.where(accuracy.isfinite(), found.gradient, torch.nan)
        return gradient, torch.stack([value, accuracy, evaluations, converged])
