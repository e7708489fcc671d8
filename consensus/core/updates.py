"""Line 5 of Algorithm 1 and the objective (15) as pure functions on blocks (..., n).

    line 5   delta_j = gradient of the data loss at z_j + kappa v_j   equation (16)

Lines 3 and 6 are in kernels/plain.py. Hyperparameters are numbers, or tensors that broadcast over
the leading axes of the block.
"""

from torch import Tensor

from consensus.core.flat import Scalar, add_scaled
from consensus.core.layerwise import Layerwise


def look_ahead(z: Tensor, v: Tensor, kappa: Scalar, out: Tensor | None = None) -> Tensor:
    """Nesterov's look-ahead point z + kappa v, where (16) takes the loss gradient. (..., n)."""
    return add_scaled(z, kappa, v, out)


def regularizer(z: Tensor, nu: Scalar) -> Tensor:
    """R(z) = (nu / 2) |z|^2. (..., n) -> (...)."""
    return z.square().sum(-1) * (nu * 0.5)


def coupling(phi: Layerwise, u: Tensor, z: Tensor, lam: Scalar) -> Tensor:
    """(1 / lam) phi(u - z_j) of (15), for each worker. (..., n) -> (...)."""
    return phi.value(u - z) / lam


def objective(
    losses: Tensor, phi: Layerwise, u: Tensor, z: Tensor, lam: Scalar, nu: Scalar
) -> Tensor:
    """F(u, z) of (15), from the data losses (..., M) at z (..., M, n); u (..., 1, n) or (n,)."""
    return (losses + regularizer(z, nu) + coupling(phi, u, z, lam)).sum(-1)
