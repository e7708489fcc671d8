"""Measurement of one evaluation: every rank on its share, and all sums in one all-reduce."""

import torch
from torch import Tensor

from consensus.algorithm import StepSize, value_at
from consensus.comm import Group
from consensus.core.layerwise import Layerwise
from consensus.core.updates import coupling, regularizer
from consensus.records import Row
from consensus.run.plan import Plan


def measure(
    u: Tensor,
    z: Tensor,
    phi: Layerwise,
    lam: StepSize,
    cuts: Tensor,
    plan: Plan,
    group: Group,
    t: int,
    evaluated: tuple[Tensor, Tensor] | None = None,
) -> Row:
    """Evaluate u (n,) and the coupling to this rank's z (K, n) after t iterations.

    A collective, with the same row on all ranks. `cuts` are the step-size cuts of line 3, and of
    line 6 on this rank, int64 (2,). `evaluated` are results of `Risk.evaluate` of u on this rank's
    shares of the training and the test set; None: computed here.
    """

    def share(x: Tensor) -> Tensor:
        return torch.tensor_split(x, group.size)[group.rank]

    data, cuts = plan.dataset, cuts.double()
    if group.rank > 0:
        cuts[0] = 0.0  # s_u is the same on all ranks: count it once
    if evaluated is None:
        evaluated = (
            plan.risk.evaluate(u, share(data.train_images), share(data.train_labels)),
            plan.risk.evaluate(u, share(data.test_images), share(data.test_labels)),
        )
    parts = [
        *evaluated,
        coupling(phi, u, z, value_at(lam, max(0, t - 1))).double().sum().unsqueeze(0),
        cuts,
        phi.distance(u - z).double().sum(0),
    ]
    total = group.sum_(torch.cat(parts)).tolist()
    train_loss, train_wrong, test_loss, test_wrong, coupling_sum, cuts_u, cuts_z = total[:7]
    mean_coupling = coupling_sum / plan.num_workers
    r = float(regularizer(u.double(), plan.config.algorithm.weight_decay))
    return {
        "iteration": t,
        "epoch": plan.epochs(t),
        "objective": train_loss + r + mean_coupling,
        "train_loss": train_loss,
        "train_error": 100.0 * train_wrong / len(data.train_labels),
        "test_loss": test_loss,
        "test_error": 100.0 * test_wrong / len(data.test_labels),
        "regularizer": r,
        "coupling": mean_coupling,
        "distance": [sum_j / plan.num_workers for sum_j in total[7:]],
        "cuts_u": int(cuts_u),
        "cuts_z": int(cuts_z),
    }
