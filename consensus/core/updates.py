"""Lines 3 to 6 of Algorithm 1 and the objective (15) as pure functions on blocks (..., n).

One iteration, for every worker j:

    line 3   u+  = u - s_u t_u sum_j grad phi(u - z_j)                t_u = tau or tau / lam
    line 5   delta_j = gradient of the data loss at z_j + kappa v_j   equation (16)
    line 6   v_j+ = kappa v_j - sigma (delta_j + nu z_j)
             z_j+ = z_j + s_j (v_j+ + (sigma / lam) grad phi(u+ - z_j)),  v_j+ scaled by s_j

The steps s_u and s_j are `Potential.feasible_step`. Hyperparameters are numbers, or tensors that
broadcast over the leading axes of the block. Results go to `out` where it is given, which may be an
argument: a model may be so large that its vectors have to be written in place.
"""

from torch import Tensor

from consensus.core.flat import Scalar, add_scaled, scaled
from consensus.core.layerwise import Layerwise


def consensus_direction(total_force: Tensor, t_u: Scalar, out: Tensor | None = None) -> Tensor:
    """Line 3: -t_u sum_j grad phi(u - z_j). (..., n) -> (..., n)."""
    return scaled(-t_u, total_force, out)


def look_ahead(z: Tensor, v: Tensor, kappa: Scalar, out: Tensor | None = None) -> Tensor:
    """Nesterov's look-ahead point z + kappa v, where (16) takes the loss gradient. (..., n)."""
    return add_scaled(z, kappa, v, out)


def velocity(
    v: Tensor,
    delta: Tensor,
    z: Tensor,
    kappa: Scalar,
    sigma: Scalar,
    nu: Scalar,
    out: Tensor | None = None,
) -> Tensor:
    """Line 6: kappa v - sigma (delta + nu z). (..., n) -> (..., n).

    The regularizer is taken at z and only the loss at the look-ahead point, as (16) prints it. With
    `out`, delta holds delta + nu z afterwards.
    """
    gradient = add_scaled(delta, nu, z, None if out is None else delta)
    return add_scaled(scaled(kappa, v, out), -sigma, gradient, out)


def worker_direction(v: Tensor, force: Tensor, pull: Scalar, out: Tensor | None = None) -> Tensor:
    """Line 6: v + pull grad phi(u - z), pull = sigma / lam. (..., n) -> (..., n)."""
    return add_scaled(v, pull, force, out)


def regularizer(z: Tensor, nu: Scalar) -> Tensor:
    """R(z) = (nu / 2) |z|^2. (..., n) -> (...)."""
    return z.square().sum(-1) * (nu * 0.5)


def coupling(phi: Layerwise, u: Tensor, z: Tensor, lam: Scalar) -> Tensor:
    """(1 / lam) phi(u - z_j) of (15), for each worker. (..., n) -> (...)."""
    return phi.value(u - z) / lam


def objective(
    losses: Tensor, phi: Layerwise, u: Tensor, z: Tensor, lam: Scalar, nu: Scalar
) -> Tensor:
    """F(u, z) of (15): the sum over workers of loss + R + coupling.

    Args:
        losses: The data loss of each worker at its z_j. (..., M)
        phi: The layer-wise potential.
        u: The consensus variable. (..., 1, n) or (n,)
        z: The workers. (..., M, n)
        lam: The coupling parameter.
        nu: The weight of R.
    """
    return (losses + regularizer(z, nu) + coupling(phi, u, z, lam)).sum(-1)
