"""Consensus logistic regression: M machines with different data, coupled by a potential.

    min over u, z_1, ..., z_M    sum_j  f_j(z_j) + (1 / lam) phi(u - z_j)                       (15)

f_j is the mean logistic loss of machine j plus a ridge. This is model (4) with g = 0 and A u =
(u, ..., u). The first machines have more malignant cases and the last ones more benign cases, so
that the minimizers of the f_j differ. The script prints the gap between the pooled loss
sum_j f_j(u) and its minimum, which SciPy finds from all data. A smaller lam gives a smaller gap and
needs more iterations.

    python examples/consensus_logistic.py --output runs/examples
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from scipy.optimize import minimize
from sklearn.datasets import load_breast_cancer
from torch.nn.functional import softplus

from consensus.core.potentials import POTENTIALS
from consensus.report.style import STYLES
from consensus.theory.composite import Function, LinearMap, Model
from consensus.theory.splitting import alternating_minimization

RIDGE = 0.1


def shards(count, cases):
    """Features x (M, cases, 31) with an intercept and labels y in {-1, 1}, partly sorted by y."""
    x, y = (torch.from_numpy(part).double() for part in load_breast_cancer(return_X_y=True))
    x = torch.cat([(x - x.mean(0)) / x.std(0), torch.ones(len(x), 1, dtype=torch.float64)], 1)
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(y), generator=generator)[: count * cases]
    keys = y[chosen] + 3.0 * torch.rand(len(chosen), generator=generator)
    chosen = chosen[keys.argsort()]
    return x[chosen].view(count, cases, -1), 2 * y[chosen].view(count, cases) - 1


def losses(z, x, y):
    """The losses f_j(z_j). z (M, 31) -> (M,)."""
    margins = y * torch.einsum("mci,mi->mc", x, z)
    return softplus(-margins).mean(1) + 0.5 * RIDGE * z.square().sum(1)


def pooled_minimum(x, y):
    """The minimizer and the minimum of sum_j f_j(u), by SciPy."""

    def loss(u):
        u = torch.from_numpy(u).requires_grad_()
        value = losses(u.expand(len(x), -1), x, y).sum()
        return value.item(), torch.autograd.grad(value, u)[0].numpy()

    options = {"gtol": 1e-9, "ftol": 1e-15, "maxiter": 10000}
    found = minimize(loss, [0.0] * x.shape[-1], jac=True, method="L-BFGS-B", options=options)
    return torch.from_numpy(found.x), found.fun


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/examples"))
    parser.add_argument("--machines", type=int, default=4)
    parser.add_argument("--cases", type=int, default=140, help="number per machine")
    options = parser.parse_args(arguments)
    x, y = shards(options.machines, options.cases)
    u_pooled, best = pooled_minimum(x, y)
    f = Function.smooth(lambda z: losses(z, x, y).sum())
    rows = []
    figure, axis = plt.subplots(figsize=(6, 4))
    print(f"{'':8} {'lam':>5} {'gap':>9} {'|u - u*|':>9} {'max |u-z_j|':>11}  iterations")
    for i, name in enumerate(("quad", "cubic", "tan", "tan_sep", "log", "log_sep")):
        lams, gaps = (100.0, 10.0, 1.0), []
        for lam in lams:
            model = Model(Function.zero(), f, POTENTIALS[name], lam, LinearMap.copies(len(x)))
            result = alternating_minimization(model, torch.zeros_like(u_pooled), relative=1e-4)
            u, status = result.u, result.status.name
            gap = float(losses(u.expand(len(x), -1), x, y).sum()) - best
            apart = float((u - result.z).norm(dim=1).max())
            away = float((u - u_pooled).norm())
            rows.append((name, lam, gap, result.objective[-1], status))
            print(
                f"{name:8} {lam:5.0f} {gap:9.2e} {away:9.2e} {apart:11.3f}  "
                f"{result.iterations} {status}"
            )
            gaps.append(gap)
        # Rings of decreasing size: five of the curves coincide at large lam.
        ring = {"marker": "o", "markersize": 16 - 2.5 * i, "fillstyle": "none"}
        axis.loglog(lams, gaps, label=name, **STYLES[name] | ring)
    axis.set(xlabel="lam", ylabel="pooled loss of u above its minimum (sum)")
    axis.legend(fontsize=8)
    options.output.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.output / "consensus_logistic.png", dpi=100, bbox_inches="tight")
    plt.close(figure)
    return best, rows


if __name__ == "__main__":
    main()
