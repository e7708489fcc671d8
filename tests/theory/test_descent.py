"""L-BFGS on blocks of independent problems: quadratics, a barrier, and the memory it needs."""

import sys

import numpy as np
import pytest
import torch

from consensus.theory.descent import VECTORS, descend
from tests.testing.footprint import growth

F64 = torch.float64


def no_boundary(z, d):
    return z.new_full(z.shape[:-1], torch.inf)


def test_quadratics_of_different_rows():
    """z^T H_r z / 2 - b_r^T z has its minimum at the solution of H_r z = b_r."""
    random = np.random.default_rng(0)
    root, b = random.normal(size=(4, 6, 6)), random.normal(size=(4, 6))
    h = root @ root.transpose(0, 2, 1) + 0.1 * np.eye(6)
    matrices, vectors = torch.from_numpy(h), torch.from_numpy(b)

    def function(z):
        hz = torch.einsum("rij,rj->ri", matrices, z)
        return (z * hz).sum(-1) / 2 - (z * vectors).sum(-1), hz - vectors

    found = descend(
        function,
        torch.zeros(4, 6, dtype=F64),
        lambda _, first: 1e-10 * first,
        max_step=no_boundary,
        budget=500,
    )
    assert bool(found.converged.all())
    np.testing.assert_allclose(found.point, np.linalg.solve(h, b[..., None])[..., 0], rtol=1e-7)
    value, gradient = function(found.point)
    torch.testing.assert_close(found.value, value)
    torch.testing.assert_close(found.residual, gradient.norm(dim=-1))


def test_a_barrier_is_not_crossed():
    """-log(1 - z) - 100 z: the minimum 0.99 is near the boundary 1, and full steps would cross."""

    def function(z):
        assert bool((z < 1).all())
        return (-torch.log1p(-z) - 100 * z)[..., 0], 1 / (1 - z) - 100

    found = descend(
        function,
        torch.zeros(2, 1, dtype=F64),
        lambda _, first: 1e-8 * first,
        max_step=lambda z, d: torch.where(d > 0, (1 - z) / d, torch.inf)[..., 0],
        budget=200,
    )
    assert bool(found.converged.all())
    np.testing.assert_allclose(found.point, 0.99, rtol=1e-6)


def test_the_budget_counts_every_call_of_the_function():
    calls = []

    def function(z):
        calls.append(1)
        return (z**4).sum(-1), 4 * z**3

    found = descend(
        function, torch.ones(1, 2, dtype=F64), lambda _, first: 0 * first,
        max_step=no_boundary, budget=7,
    )  # fmt: skip
    assert found.evaluations == len(calls) == 7
    assert not bool(found.converged.any())


QUADRATIC = """
import torch
from consensus import POTENTIALS, Layerwise
from consensus.theory.stationarity import prox
n = SIZE
curvature, u = torch.linspace(0.5, 3, n), torch.zeros(n)
def f(z):
    d = z - 1e-3
    gradient = curvature * d
    return 0.5 * torch.dot(d, gradient), gradient
phi = Layerwise(POTENTIALS["tan_sep"], [(0, n // 2), (n // 2, n)])
"""
PROX = """
found = prox(f, phi, u, 1.0, tolerance=1e-12, budget=24)
assert found.evaluations == 24, "the L-BFGS memory must be full"
"""
SIZE = 1_000_000


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak memory is read from /proc")
def test_the_memory_of_a_descent_is_bounded():
    grown = growth(QUADRATIC.replace("SIZE", str(SIZE)), PROX)
    assert VECTORS - 8 < grown / (4 * SIZE) <= VECTORS
