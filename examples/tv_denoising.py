"""Total variation denoising of salt-and-pepper noise, with a truncated quadratic data term.

    min over u    sum_i min((u_i - y_i)^2 / 2, c)  +  e_lam f (D u),    f(z) = alpha sum_i |z_i|

g is the nonconvex data term, given by its proximal operator. f is the total variation, with A = D,
finite differences in two directions. phi couples z to D u in each pixel. PALM solves model (4).

    python examples/tv_denoising.py --output runs/examples
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from consensus.core.layerwise import Layerwise
from consensus.core.potentials import POTENTIALS
from consensus.theory.composite import Function, LinearMap, Model
from consensus.theory.splitting import palm

LAM, ETA = 1000.0, 0.02


def picture(size):
    """A piecewise constant image of a disc and two rectangles."""
    x, y = torch.meshgrid(*2 * [torch.linspace(0, 1, size, dtype=torch.float64)], indexing="ij")
    image = torch.full_like(x, 0.2)
    image[(x > 0.55) & (x < 0.9) & (y > 0.1) & (y < 0.6)] = 0.5
    image[(x > 0.1) & (x < 0.8) & (y > 0.7) & (y < 0.85)] = 0.35
    image[(x - 0.3) ** 2 + (y - 0.35) ** 2 < 0.05] = 0.8
    return image


def differences():
    """The map D: (H, W) -> (H, W, 2), with differences 0 across the border."""

    def apply(u):
        z = u.new_zeros(*u.shape, 2)
        z[:-1, :, 0], z[:, :-1, 1] = u.diff(dim=0), u.diff(dim=1)
        return z

    def adjoint(z):
        u = torch.zeros_like(z[..., 0])
        for step, part in ((z[:-1, :, 0], u), (z[:, :-1, 1].T, u.T)):
            part[:-1] -= step
            part[1:] += step
        return u

    return LinearMap(apply, adjoint)


def data_term(noisy, height):
    """The sum of min((u - noisy)^2 / 2, height); height = inf gives least squares."""

    def cost(u):
        return (0.5 * (u - noisy) ** 2).clamp(max=height)

    def prox(x, step):
        near = (x + step * noisy) / (1 + step)  # the minimizer of the parabola, or x on the plateau
        return torch.where(cost(near) + (near - x) ** 2 / (2 * step) < height, near, x)

    return Function(lambda u: cost(u).sum(), prox=prox)


def total_variation(alpha):
    """Alpha times the sum over pixels of |z_i|; the prox shrinks |z_i| by alpha step."""

    def prox(x, step):
        return x * (1 - alpha * step / x.norm(dim=-1, keepdim=True).clamp(min=alpha * step))

    return Function(lambda z: alpha * z.norm(dim=-1).sum(), prox=prox)


def psnr(u, clean):
    return float(-10 * torch.log10((u - clean).square().mean()))


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/examples"))
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--budget", type=int, default=1000)
    options = parser.parse_args(arguments)
    clean, generator = picture(options.size), torch.Generator().manual_seed(0)
    chance = torch.rand(clean.shape, generator=generator)
    noise = 0.03 * torch.randn(clean.shape, generator=generator, dtype=torch.float64)
    noisy = torch.where(chance < 0.1, 0.0, torch.where(chance > 0.9, 1.0, clean + noise))

    images, rows = {"clean": clean, "noisy": noisy}, [("noisy", psnr(noisy, clean), 0, "")]
    squares, truncated = (data_term(noisy, float("inf")), 0.3), (data_term(noisy, 0.005), 0.05)
    methods = [("least squares", "quad", *squares)]
    methods += [("truncated", name, *truncated) for name in ("quad", "cubic", "tan", "log")]
    for data, name, g, alpha in methods:
        phi = Layerwise(POTENTIALS[name], [(0, 2)], ETA)
        model = Model(g, total_variation(alpha), phi, LAM, differences())
        result = palm(model, noisy, relative=1e-3, budget=options.budget)
        images[f"{data}, {name}"] = u = result.u
        rows.append((f"{data}, {name}", psnr(u, clean), result.iterations, result.status.name))
    for label, ratio, iterations, status in rows:
        print(f"{label:22} PSNR {ratio:6.2f} dB {iterations:6} iterations {status}")
    figure, axes = plt.subplots(1, len(images), figsize=(3 * len(images), 3.3))
    for axis, (label, image) in zip(axes, images.items(), strict=True):
        axis.imshow(image.numpy(), vmin=0, vmax=1, cmap="gray")
        axis.set_title(label, fontsize=10)
        axis.axis("off")
    options.output.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.output / "tv_denoising.png", dpi=100, bbox_inches="tight")
    plt.close(figure)
    return rows


if __name__ == "__main__":
    main()
