"""The composite models (1) and (4): functions g and f, a linear map A, a potential phi.

    min over u     g(u) + e_lam f (A u)                                                          (1)
    min over u, z  F(u, z) = g(u) + f(z) + (1 / lam) phi(A u - z)                                (4)

e_lam f is the phi-envelope (2): minimizing (4) over z gives (1). u and z have any shape. phi acts
along the last axis of z, and phi(A u - z) is the sum over the other axes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from consensus.core.potentials import Potential


@dataclass(frozen=True)
class Function:
    """A function g or f, smooth or not, convex or not, given by its oracles.

    `coupled` is the minimizer of the function plus the coupling, in closed form: (14a) as a
    function of z for g, (14b) as a function of A u for f.
    """

    value: Callable[[Tensor], Tensor]  # x -> the number g(x), which may be inf
    gradient: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None  # x -> value and gradient
    prox: Callable[[Tensor, float], Tensor] | None = None  # argmin of g(y) + |y - x|^2 / (2 step)
    coupled: Callable[[Tensor], Tensor] | None = None

    @staticmethod
    def smooth(value: Callable[[Tensor], Tensor]) -> "Function":
        """A smooth function, with its gradient by autograd."""

        def gradient(x: Tensor) -> tuple[Tensor, Tensor]:
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                y = value(x)
                return y.detach(), torch.autograd.grad(y, x)[0]

        return Function(value, gradient)

    @staticmethod
    def zero() -> "Function":
        """The function 0."""
        return Function(
            lambda x: x.new_zeros(()),
            lambda x: (x.new_zeros(()), torch.zeros_like(x)),
            lambda x, step: x,
        )


@dataclass(frozen=True)
class LinearMap:
    """The linear map A: `apply` is u -> A u, `adjoint` is z -> A^T z."""

    apply: Callable[[Tensor], Tensor]
    adjoint: Callable[[Tensor], Tensor]

    @staticmethod
    def identity() -> "LinearMap":
        """The identity, A u = u."""
        return LinearMap(lambda u: u, lambda z: z)

    @staticmethod
    def matrix(a: Tensor) -> "LinearMap":
        """The matrix a (m, n), on vectors."""
        return LinearMap(lambda u: a @ u, lambda z: a.mT @ z)

    @staticmethod
    def copies(count: int) -> "LinearMap":
        """The consensus map, A u = (u, ..., u). (n,) -> (count, n)."""
        return LinearMap(lambda u: u.expand(count, *u.shape), lambda z: z.sum(0))

    def norm(self, like: Tensor, iterations: int = 50) -> float:
        """|A| by power iteration on A^T A, a lower bound. `like` has the shape of u."""
        x = noise(like)
        squared = 0.0
        for _ in range(iterations):
            x = x / x.norm().clamp(min=torch.finfo(x.dtype).tiny)
            x = self.adjoint(self.apply(x))
            squared = float(x.norm())
        return math.sqrt(squared)


def noise(like: Tensor, seed: int = 0) -> Tensor:
    """Standard normal numbers of the shape of `like`, equal on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(like.shape, generator=generator, dtype=like.dtype).to(like.device)


@dataclass(frozen=True)
class Model:
    """Model (4), F(u, z) = g(u) + f(z) + (1 / lam) phi(A u - z), for a finite lam > 0."""

    g: Function
    f: Function
    phi: Potential
    lam: float
    linear: LinearMap = field(default_factory=LinearMap.identity)  # A

    def __post_init__(self) -> None:
        if not 0.0 < self.lam < math.inf:
            raise ValueError(f"`lam` is {self.lam}; allowed: a finite number > 0")

    def terms(self, u: Tensor, z: Tensor) -> tuple[float, float, float]:
        """g(u), f(z) and (1 / lam) phi(A u - z)."""
        coupling = self.phi.value(self.linear.apply(u) - z).sum() / self.lam
        return float(self.g.value(u)), float(self.f.value(z)), float(coupling)

    def objective(self, u: Tensor, z: Tensor) -> float:
        """F(u, z)."""
        return sum(self.terms(u, z))

    def force(self, u: Tensor, z: Tensor) -> Tensor:
        """The force y = (1 / lam) grad phi(A u - z). Shape of z."""
        return self.phi.grad(self.linear.apply(u) - z) / self.lam

    def residuals(self, u: Tensor, z: Tensor, a: Tensor, b: Tensor) -> tuple[float, float]:
        """(5a) |a + A^T y| and (5b) |b - y| for a in dg(u), b in df(z) and the force y."""
        y = self.force(u, z)
        return float((a + self.linear.adjoint(y)).norm()), float((b - y).norm())
