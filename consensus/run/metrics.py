"""Measurement of one evaluation: every rank on its share, and all sums in one all-reduce."""

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from consensus.algorithm import StepSize, value_at
from consensus.comm import Group
from consensus.core.layerwise import Layerwise
from consensus.core.updates import coupling, regularizer
from consensus.records import Row, number
from consensus.run.plan import Plan
from consensus.tree_sum import tree_sum

Best = dict[str, float] | None
"""The best evaluation: its iteration, and the number that decides."""


def share_buffers(plan: Plan, group: Group) -> None:
    """Make the means of the workers' running buffers those of u. A collective, if there are any."""
    running = plan.oracle.running
    if running:
        mean = group.sum_(running.sums()) / plan.num_workers
        plan.risk.buffers = running.unflatten(mean)


def measure(
    u: Tensor,
    z: Tensor,
    phi: Layerwise,
    lam: StepSize,
    cuts: Tensor,
    plan: Plan,
    group: Group,
    t: int,
    evaluated: Sequence[Tensor] | None = None,
) -> Row:
    """Evaluate u (n,) and the coupling to this rank's z (K, n) after t iterations.

    A collective, with the same row on all ranks. `cuts` are the step-size cuts of line 3, and of
    line 6 on this rank, int64 (2,). `evaluated` are results of `Risk.evaluate` of u on this rank's
    share of each set of samples; None: computed here.
    """
    splits, cuts, lam_t = plan.dataset.splits, cuts.double(), value_at(lam, max(0, t - 1))
    if group.rank > 0:
        cuts[0] = 0.0  # s_u is the same on all ranks: count it once
    share_of, shares = plan.evaluation_shares
    if evaluated is None:
        share_buffers(plan, group)
        evaluated = [
            tree_sum([plan.risk.evaluate(u, samples.share(i, share_of)) for i in shares])
            for samples in splits.values()
        ]
    of_workers = []
    forces = torch.zeros(plan.num_workers, dtype=torch.float64, device=u.device)
    for j, z_j in zip(plan.local_workers, z, strict=True):  # one at a time: n may be large
        w = u - z_j
        pair = coupling(phi, u, z_j, lam_t).view(1), phi.distance(w)
        of_workers.append(torch.cat(pair).double())
        forces[j] = torch.linalg.vector_norm(phi.grad(w))
    parts = [*evaluated, cuts, forces, tree_sum(of_workers)]
    sizes = [len(part) for part in parts]
    *of_splits, (cuts_u, cuts_z), influences, (coupling_sum, *distances) = (
        part.tolist() for part in group.sum_(torch.cat(parts)).split(sizes)
    )
    numbers: dict[str, float] = {}
    for (name, samples), (loss, *metrics) in zip(splits.items(), of_splits, strict=True):
        numbers[f"{name}_loss"] = loss
        means = zip(plan.risk.loss.metrics, metrics, strict=True)
        numbers |= {f"{name}_{metric}": value / len(samples) for metric, value in means}
    mean_coupling = coupling_sum / plan.num_workers
    r = float(regularizer(u.double(), plan.config.algorithm.weight_decay))
    row = {
        "iteration": t,
        "epoch": plan.epochs(t),
        "objective": numbers["train_loss"] + r + mean_coupling,
        **numbers,
        "regularizer": r,
        "coupling": mean_coupling,
        "distance": [sum_j / plan.num_workers for sum_j in distances],
        "workers": plan.num_workers,
        "influence": influences,
        "cuts_u": int(cuts_u),
        "cuts_z": int(cuts_z),
    }
    if plan.members is not None:
        row["members"] = list(plan.members)
    return cast(Row, row)


def selection(plan: Plan) -> tuple[str, str]:
    """The column that decides which evaluation is the best, and its goal, min or max."""
    name, goal = plan.risk.loss.best
    return f"{'test' if plan.dataset.validation is None else 'validation'}_{name}", goal


def better(best: Best, row: Row, plan: Plan) -> Best:
    """The best evaluation after that of a row: its iteration and the number that decides."""
    key, goal = selection(plan)
    sign = 1.0 if goal == "min" else -1.0
    value = number(row, key)
    old = math.nan if best is None else best.get(key, math.nan)
    if best is None or math.isnan(old) or sign * value < sign * old:
        return {"iteration": row["iteration"], key: value}
    return best
