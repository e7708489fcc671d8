"""Small composite problems (1) and (4), with potentials and solutions written in numpy.

Expected values of the theory tests come from here and not from `consensus.core`.
"""

import math

import numpy as np
import pytest
import torch

from consensus.core.potentials import POTENTIALS
from consensus.theory.composite import Function, LinearMap, Model
from consensus.theory.splitting import alternating_minimization, palm

RNG = np.random.default_rng(0)
N, M = 3, 5
A, B, C = RNG.normal(size=(M, N)), RNG.normal(size=M), RNG.normal(size=N)
U0, Z0 = RNG.normal(size=N), RNG.normal(size=M)
LAM = 0.4
# F = (alpha / 2) |u - C|^2 + (beta / 2) |z - B|^2 + |A u - z|^2 / LAM
ALPHA, BETA = 0.5, 1.5


def log1m(s):
    return -np.log1p(-s)


PHI = {  # name -> phi of a row as a function of numpy arrays (..., n) -> (...); end of s; separable
    "quad": (lambda w: (w**2).sum(-1), math.inf, False),
    "cubic": (lambda w: (w**2).sum(-1) ** 1.5, math.inf, False),
    "tan": (lambda w: np.tan((w**2).sum(-1)), math.pi / 2, False),
    "tan_sep": (lambda w: np.tan(w**2).sum(-1), math.pi / 2, True),
    "log": (lambda w: log1m((w**2).sum(-1)), 1.0, False),
    "log_sep": (lambda w: log1m(w**2).sum(-1), 1.0, True),
}


def inside(name, w):
    _, bound, separable = PHI[name]
    s = w**2 if separable else (w**2).sum(-1)
    return bool((s < bound).all())


def tensor(x):
    return torch.tensor(x, dtype=torch.float64)


def l1(centre, weight=1.0):
    """weight |x - centre|_1 by its prox."""
    c = tensor(centre)

    def prox(x, step):
        return c + (x - c).sign() * ((x - c).abs() - weight * step).clamp(min=0.0)

    return Function(lambda x: weight * (x - c).abs().sum(), prox=prox)


def truncated(centre, height=0.3):
    """sum_i min((x_i - c_i)^2, height), nonconvex, by its prox."""
    c = tensor(centre)

    def cost(x):
        return (x - c).square().clamp(max=height)

    def prox(x, step):
        near = (x + 2 * step * c) / (1 + 2 * step)
        at_near = (near - c).square() + (near - x).square() / (2 * step)
        return torch.where(at_near < height, near, x)

    return Function(lambda x: cost(x).sum(), prox=prox)


def lorentz(centre):
    """sum_i log(1 + (x_i - c_i)^2), nonconvex, by its gradient."""
    c = tensor(centre)
    return Function.smooth(lambda x: (x - c).square().log1p().sum())


def square(centre, weight, way):
    """(weight / 2) |x - centre|^2, known by one `way` alone."""
    c = tensor(centre)

    def value(x):
        return 0.5 * weight * (x - c).square().sum()

    if way == "gradient":
        return Function(value, gradient=lambda x: (value(x), weight * (x - c)))
    return Function(value, prox=lambda x, step: (x + step * weight * c) / (1.0 + step * weight))


RUNS = {
    "exact": alternating_minimization,
    "regularized": lambda *args, **options: alternating_minimization(
        *args, prox_weight=0.7, **options
    ),
    "palm": palm,
}
every_run = pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
every_phi = pytest.mark.parametrize("name", PHI)


def linear_solution():
    """The point at which the gradient of F vanishes."""
    k = 2.0 / LAM
    h = np.block([[ALPHA * np.eye(N) + k * A.T @ A, -k * A.T], [-k * A, (BETA + k) * np.eye(M)]])
    x = np.linalg.solve(h, np.concatenate([ALPHA * C, BETA * B]))
    return x[:N], x[N:]


def linear_model(g_way, f_way):
    g, f = square(C, ALPHA, g_way), square(B, BETA, f_way)
    return Model(g, f, POTENTIALS["quad"], LAM, LinearMap.matrix(tensor(A)))


def half_steps(weight):
    """(14a) and then (14b) at u+, each a linear system."""
    k = 2.0 / LAM
    left = (ALPHA + weight) * np.eye(N) + k * A.T @ A
    u = np.linalg.solve(left, ALPHA * C + weight * U0 + k * A.T @ Z0)
    z = (BETA * B + weight * Z0 + k * A @ u) / (BETA + weight + k)
    return u, z


def closed_form_model(**wrong):
    k = 2.0 / LAM
    left = ALPHA * np.eye(N) + k * A.T @ A
    sign = wrong.get("sign", 1.0)
    g = Function(
        square(C, ALPHA, "prox").value,
        coupled=lambda z: tensor(np.linalg.solve(left, ALPHA * C + sign * k * A.T @ z.numpy())),
    )
    f = Function(
        square(B, BETA, "prox").value, coupled=lambda v: (BETA * tensor(B) + k * v) / (BETA + k)
    )
    return Model(g, f, POTENTIALS["quad"], LAM, LinearMap.matrix(tensor(A)))
