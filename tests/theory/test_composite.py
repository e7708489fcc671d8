"""Linear maps, functions and model (4), against formulas in numpy."""

import math

import numpy as np
import pytest
import torch

from consensus.core.potentials import POTENTIALS
from consensus.theory.composite import Function, LinearMap, Model
from tests.testing.composite import LAM, U0, Z0, A, B, C, N, square, tensor

MATRIX = LinearMap.matrix(tensor(A))


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 4)])
def test_the_norm_of_a_map(shape):
    a = np.random.default_rng(1).normal(size=shape)
    norm = LinearMap.matrix(tensor(a)).norm(torch.zeros(shape[1], dtype=torch.float64), 500)
    assert norm == pytest.approx(np.linalg.norm(a, 2), rel=1e-6)
    zero = LinearMap.matrix(torch.zeros(shape, dtype=torch.float64))
    assert zero.norm(torch.zeros(shape[1], dtype=torch.float64)) == 0.0


def test_the_consensus_map():
    copies = LinearMap.copies(4)
    u = tensor(U0)
    np.testing.assert_array_equal(copies.apply(u), np.stack([U0] * 4))
    np.testing.assert_array_equal(copies.adjoint(copies.apply(u)), 4 * U0)
    assert copies.norm(u) == pytest.approx(2.0)


def test_a_smooth_function_is_differentiated():
    function = Function.smooth(lambda x: x.pow(3).sum())
    value, gradient = function.gradient(tensor(U0))
    assert float(value) == pytest.approx((U0**3).sum())
    np.testing.assert_allclose(gradient, 3 * U0**2)


def test_the_zero_function():
    zero, x = Function.zero(), tensor(U0)
    assert float(zero.value(x)) == 0.0
    np.testing.assert_array_equal(zero.gradient(x)[1], np.zeros(N))
    assert zero.prox(x, 0.3) is x


def test_terms_and_residuals_of_the_model():
    model = Model(square(C, 2.0, "prox"), square(B, 3.0, "prox"), POTENTIALS["quad"], LAM, MATRIX)
    w = A @ U0 - Z0
    expected = ((U0 - C) ** 2).sum(), 1.5 * ((Z0 - B) ** 2).sum(), (w**2).sum() / LAM
    assert model.terms(tensor(U0), tensor(Z0)) == pytest.approx(expected)
    assert model.objective(tensor(U0), tensor(Z0)) == pytest.approx(sum(expected))
    y = 2 * w / LAM
    np.testing.assert_allclose(model.force(tensor(U0), tensor(Z0)), y)
    found = model.residuals(tensor(U0), tensor(Z0), tensor(C), tensor(B))
    assert found == pytest.approx((np.linalg.norm(C + A.T @ y), np.linalg.norm(B - y)))


@pytest.mark.parametrize("lam", [0.0, -1.0, math.nan, math.inf])
def test_a_bad_lam_is_refused(lam):
    zero = Function.zero()
    with pytest.raises(ValueError, match=f"`lam` is {lam}; allowed: a finite number > 0"):
        Model(zero, zero, POTENTIALS["quad"], lam)
