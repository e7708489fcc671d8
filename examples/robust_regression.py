"""Robust regression with a third of outliers: envelope losses, least squares and Huber.

    min over x    (nu / 2) |x|^2  +  e_lam f (A x),    f(z) = sum_i loss(z_i - b_i)

The loss is |r|, whose envelope with phi = w^2 is the Huber loss, or min(r^2 / 2, c), which bounds
the cost of an outlier by c. f and g are given by their proximal operators, and alternating
minimization solves model (4). The truncated loss is not convex; its start is the solution for |r|.

    python examples/robust_regression.py --output runs/examples
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from sklearn.linear_model import HuberRegressor

from consensus.core.potentials import POTENTIALS
from consensus.report.style import series_style
from consensus.theory.composite import Function, LinearMap, Model
from consensus.theory.splitting import alternating_minimization

NU, LAM, HEIGHT = 1e-6, 0.5, 0.5


def data(size, outliers, generator):
    """b = A x + noise with A = (1, t); the last `outliers` entries of b are outliers."""
    t = torch.rand(size, generator=generator, dtype=torch.float64) * 4 - 2
    t[-outliers:] = t[-outliers:].abs()  # on one side, so that they tilt the fitted line
    truth = torch.tensor([1.0, 2.0], dtype=torch.float64)
    a = torch.stack([torch.ones_like(t), t], 1)
    b = a @ truth + 0.2 * torch.randn(size, generator=generator, dtype=torch.float64)
    b[-outliers:] = -4.0 + torch.randn(outliers, generator=generator, dtype=torch.float64)
    return a, b, truth


def absolute(b):
    """The sum of |z_i - b_i|."""
    return Function(
        lambda z: (z - b).abs().sum(),
        prox=lambda x, step: b + (x - b).sign() * ((x - b).abs() - step).clamp(min=0),
    )


def truncated(b):
    """The sum of min((z_i - b_i)^2 / 2, HEIGHT)."""

    def cost(z):
        return (0.5 * (z - b) ** 2).clamp(max=HEIGHT)

    def prox(x, step):
        near = (x + step * b) / (1 + step)  # the minimizer of the parabola, or x on the plateau
        return torch.where(cost(near) + (near - x) ** 2 / (2 * step) < HEIGHT, near, x)

    return Function(lambda z: cost(z).sum(), prox=prox)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/examples"))
    parser.add_argument("--size", type=int, default=90)
    options = parser.parse_args(arguments)
    a, b, truth = data(options.size, options.size // 3, torch.Generator().manual_seed(0))
    ridge = Function(lambda x: 0.5 * NU * (x * x).sum(), prox=lambda x, step: x / (1 + step * NU))

    huber = HuberRegressor(alpha=NU, fit_intercept=False).fit(a.numpy(), b.numpy())
    fits = {
        "least squares": (torch.linalg.lstsq(a, b).solution, ""),
        "Huber (scikit-learn)": (torch.from_numpy(huber.coef_), ""),
    }
    for name in ("quad", "tan_sep", "log_sep"):
        phi = POTENTIALS.make("power", p=2, separable=True) if name == "quad" else POTENTIALS[name]
        x = fits["least squares"][0]
        for label, f in (("|r|", absolute(b)), ("truncated", truncated(b))):
            model = Model(ridge, f, phi, LAM, LinearMap.matrix(a))
            result = alternating_minimization(model, x, relative=1e-4)
            x = result.u
            fits[f"envelope of {label}, {name}"] = (x, f"{result.iterations} {result.status.name}")
    rows = [(label, x, float((x - truth).norm()), note) for label, (x, note) in fits.items()]
    print(f"{'':30} {'x_0':>7} {'x_1':>7} {'error':>7}  iterations")
    for label, x, error, note in rows:
        print(f"{label:30} {x[0]:7.3f} {x[1]:7.3f} {error:7.3f}  {note}")
    figure, axis = plt.subplots(figsize=(6, 4))
    axis.scatter(a[:, 1].numpy(), b.numpy(), s=8, color="gray")
    ends = torch.tensor([-2.0, 2.0])
    # Some lines coincide: the truth is broad and below, and the others have gaps.
    line = (truth[0] + truth[1] * ends).numpy()
    axis.plot(ends.numpy(), line, color="0.8", linewidth=6, label="truth", zorder=0)
    for i, (label, x, _, _) in enumerate((*rows[:2], *rows[-2:])):
        look = series_style(i) | {"marker": ""}
        axis.plot(ends.numpy(), (x[0] + x[1] * ends).numpy(), label=label, **look)
    axis.set(xlabel="a", ylabel="b")
    axis.legend(fontsize=8)
    options.output.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.output / "robust_regression.png", dpi=100, bbox_inches="tight")
    plt.close(figure)
    return rows


if __name__ == "__main__":
    main()
