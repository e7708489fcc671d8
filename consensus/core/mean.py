"""The phi-mean of some points: the u that minimizes sum_j phi(u - z_j), equation (14a) of (15).

For `quad` it is the mean; for `pseudo_huber` with a small eta it is nearly the median of each
coordinate. The sum is convex, and its groups of coordinates are independent:

    separable   a monotone scalar equation for each coordinate, by Newton's method inside a bracket
                that starts as [min_j z_j, max_j z_j] and is bisected where Newton's steps do not
                shrink fast enough
    radial      Newton's method for each layer, with a line search that brackets the zero of the
                slope. Every iterate stays in the box of the coordinates of the z_j: projection on
                it moves u towards all z_j, so it never increases the sum

Each evaluation is one sum over ranks, of 3 n numbers or fewer, and all ranks decide from the sums.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from consensus.core.layerwise import Layerwise
from consensus.core.sizes import Radial, Separable, Size
from consensus.tree_sum import tree_sum

Reduce = Callable[[Tensor], Tensor]  # a sum or minimum over ranks; may work in place

MOST_STEPS, MOST_CG, MOST_TRIALS = 200, 40, 80
MOST_ROUNDING = 8.0  # units of rounding of u and u - z_j that a converged residual may contain
FLATTER = 0.5  # the line search ends where the slope is at most this part of the first


@dataclass(frozen=True)
class Mean:
    """The phi-mean u (n,), or the last iterate of a method that failed."""

    u: Tensor
    residual: float
    """The largest of |sum_j grad phi(u - z_j)| / sum_j |grad phi(u - z_j)| over all groups, the
    denominator with an allowance for rounding. Coordinates with no number left between their
    bounds count as 0. nan where a z_j or a force is not finite."""
    converged: bool  # whether the residual is within the tolerance
    iterations: int


def phi_mean(
    phi: Layerwise,
    z: Tensor,
    u: Tensor,
    *,
    total: Reduce = lambda x: x,
    smallest: Reduce = lambda x: x,
    tolerance: float = 1e-6,
) -> Mean:
    """The minimizer over u of sum_j phi(u - z_j), for the points z (K, n) of each rank.

    The start u (n,) is the same on all ranks, with every u - z_j inside dom phi. `total` and
    `smallest` are the sum and the minimum over ranks, which branch on the same totals. `tolerance`
    is that of the residual, and at least a few units of rounding of the dtype.
    """
    if phi.profile.slope is not None:  # weights, the same for all points, cancel
        summed = total(torch.cat([tree_sum(z.unbind()), z.new_tensor([float(len(z))])]))
        return Mean(summed[:-1] / summed[-1], 0.0, True, 0)
    low, high = smallest(torch.cat([z.amin(0), -z.amax(0)])).tensor_split(2)
    high = -high
    u = torch.minimum(torch.maximum(u, low), high)
    problem = _Problem(phi, z, total, max(tolerance, 8.0 * torch.finfo(z.dtype).eps))
    if isinstance(phi.size, Separable):
        return _by_coordinate(problem, u, low, high)
    return _by_layer(problem, u, low, high)


@dataclass(frozen=True)
class _Problem:
    phi: Layerwise
    z: Tensor  # (K, n)
    total: Reduce
    tolerance: float

    def rounding(self, stiffness: Tensor, x: Tensor) -> Tensor:
        """Allowance for the rounding of x in denominators of residuals. (..., n) -> (..., G)."""
        units = MOST_ROUNDING * torch.finfo(x.dtype).eps / self.tolerance
        return units * stiffness * _norm(self.phi.size, x)


def _norm(size: Size, x: Tensor) -> Tensor:
    """`size.norm` of x, whose squares may overflow or underflow. (..., n) -> (..., G)."""
    if isinstance(size, Separable):
        return x.abs()
    largest = _largest(size, x)
    return size.norm(size.scale(1.0 / largest, x)) * largest


def _largest(size: Radial, x: Tensor) -> Tensor:
    """The largest |x_i| of each layer, at least the smallest normal number. -> (..., L)."""
    assert size.layers is not None
    pieces = [x[..., start:stop].abs().amax(-1) for start, stop in size.layers]
    return torch.stack(pieces, -1).clamp(min=torch.finfo(x.dtype).tiny)


# ---- separable sizes


def _by_coordinate(problem: _Problem, u: Tensor, low: Tensor, high: Tensor) -> Mean:
    """Newton's method in a bracket, for the coordinates that have not converged."""
    eps = torch.finfo(u.dtype).eps
    u = u.clone()
    # Near 0 floating point has numbers without end; this distance means nothing.
    nothing = eps * eps * (high - low)
    index = (low != high).nonzero().squeeze(-1)  # nan as well
    x, low, high, nothing = (a[index] for a in (u, low, high, nothing))
    before = last = high - low  # the last two changes of x
    smallest = torch.full_like(x, torch.inf)  # |force| at the best x so far, which is in u
    residual, worst = torch.zeros_like(x), 0.0
    for iteration in range(MOST_STEPS):
        if not len(index):
            return Mean(u, worst, bool(worst <= problem.tolerance), iteration)
        force, slope, strength = _scalar_equations(problem, x, index)
        better = (force.abs() < smallest) | force.isnan()
        u[index] = torch.where(better, x, u[index])
        smallest = torch.where(better, force.abs(), smallest)
        low, high = torch.where(force < 0, x, low), torch.where(force > 0, x, high)
        middle = low + 0.5 * (high - low)
        alone = (middle <= low) | (middle >= high) | (high - low <= nothing)
        residual = torch.where(alone | (force == 0), 0.0, force.abs() / strength)
        ended = (residual <= problem.tolerance) | force.isnan()
        newton = x - force / slope
        fast = (newton > low) & (newton < high) & ((newton - x).abs() <= 0.5 * before)
        new = torch.where(fast, newton, middle)
        if bool(ended.any()):
            worst = _worst(worst, residual[ended])
            going = (~ended).nonzero().squeeze(-1)
            kept = (index, x, new, low, high, nothing, last, smallest, residual)
            index, x, new, low, high, nothing, last, smallest, residual = (a[going] for a in kept)
        before, last, x = last, (new - x).abs(), new
    return Mean(u, _worst(worst, residual), False, MOST_STEPS)


def _worst(residual: float, others: Tensor) -> float:
    return float(torch.cat([others.new_tensor([residual]), others]).amax())  # nan if one is nan


def _scalar_equations(problem: _Problem, x: Tensor, index: Tensor) -> Tensor:
    """Force, its derivative and the strength of some coordinates at x (m,). -> (3, m).

    Outside the domain the force is infinite and points inwards.
    """
    phi = problem.phi.part(index)
    w = x - problem.z[:, index]
    forces, slopes = phi.grad(w), phi.stiffness(w)
    forces = torch.where(forces.isnan() & ~w.isnan(), w.sign() * torch.inf, forces)
    strengths = forces.abs() + problem.rounding(slopes, w)
    return problem.total(tree_sum(torch.stack([forces, slopes, strengths], 1).unbind()))


# ---- radial sizes


def _spread(size: Radial, layers: Tensor, like: Tensor) -> Tensor:
    """The coordinates of some layers. bool (L,) -> (n,)."""
    return size.scale(layers.to(like), torch.ones_like(like)) > 0


def _only(size: Radial, layers: Tensor, x: Tensor) -> Tensor:
    """The coordinates of x in some layers, and 0 in place of the others, nan as well. (n,)."""
    return torch.where(_spread(size, layers, x), x, 0.0)


@dataclass(frozen=True)
class _Sums:
    """Sums over all points at some u, and what follows from them."""

    force: Tensor  # (n,), nan in a layer that is outside the domain
    direction: Tensor  # to the mean of the z_j with weights psi'(s_j), which is in their hull (n,)
    largest: Tensor  # the unit of the force in each layer (L,)
    value: Tensor  # of each layer (L,)
    residual: Tensor  # (L,)
    rounded: Tensor  # the residual with the rounding of u in the denominator (L,)


def _by_layer(problem: _Problem, u: Tensor, low: Tensor, high: Tensor) -> Mean:
    """Newton's method with a line search for each layer."""
    size, tolerance, eps = problem.phi.size, problem.tolerance, torch.finfo(u.dtype).eps
    assert isinstance(size, Radial)
    diagonal = _norm(size, high - low)
    at = _sums(problem, u)
    failed = torch.zeros_like(at.value, dtype=torch.bool)  # Newton's direction, at this u
    stuck = failed
    iterations = 0
    while iterations < MOST_STEPS:
        going = ~(at.residual <= tolerance) & ~stuck
        if not bool(going.any()) or bool(at.residual.isnan().any()):
            break
        d = _newton(problem, u, at, going & ~failed)
        # No two points of the box are further apart; the curvature may vanish.
        d = size.scale((diagonal / _norm(size, d)).nan_to_num(nan=1.0).clamp(max=1.0), d)
        usable = (size.inner(d, size.scale(1.0 / at.largest, at.force)) < 0) & ~failed
        d = _only(size, usable, d) + _only(size, going & ~usable, at.direction)
        new, at = _search(problem, u, d, at, going)
        inside = torch.minimum(torch.maximum(new, low), high)
        if not torch.equal(new, inside):
            new, at = inside, _sums(problem, inside)
        still = going & (_norm(size, new - u) <= 2.0 * eps * _norm(size, u))
        u, stuck, failed = new, stuck | (still & ~usable), still
        iterations += 1
    # Where no nearer point can be stored, the residual contains the rounding of u.
    worst = _worst(0.0, torch.where(stuck, at.rounded, at.residual))
    return Mean(u, worst, worst <= tolerance, iterations)


def _sums(problem: _Problem, u: Tensor) -> _Sums:
    phi, size = problem.phi, problem.phi.size
    assert isinstance(size, Radial)
    w = u - problem.z
    forces, stiffness = phi.grad(w), phi.stiffness(w)
    strengths = _norm(size, forces) + problem.rounding(stiffness, w)
    of_u = torch.maximum(problem.rounding(stiffness, u), _of_kinks(problem, u, w))
    of_layers = torch.cat([phi.weights(w), phi.values(w), strengths, of_u], 1)
    summed = problem.total(tree_sum(torch.cat([forces, of_layers], 1).unbind()))
    force, (weight, value, strength, of_u) = summed[: len(u)], summed[len(u) :].view(4, -1)
    length = _norm(size, force)
    residual, rounded = (
        torch.where(length == 0, 0.0, length / allowed) for allowed in (strength, strength + of_u)
    )
    scale = phi.to(u).scale
    weight = torch.where(weight > 0, weight, 1.0)  # psi' is stored as 0 where it is infinite
    direction = size.scale(-1.0 / weight, force) / (scale * scale)
    return _Sums(force, direction, _largest(size, force), value, residual, rounded)


def _of_kinks(problem: _Problem, u: Tensor, w: Tensor) -> Tensor:
    """Allowance for the rounding of u at points that equal u up to it; w = u - z. -> (K, L).

    `rounding` takes the curvature, which may be infinite there, as that of |w|^1.2 at 0. The force
    at that distance is finite.
    """
    phi, size = problem.phi, problem.phi.size
    assert isinstance(size, Radial)
    ones = torch.ones_like(u)
    near = MOST_ROUNDING * torch.finfo(u.dtype).eps * _norm(size, u)
    most = _norm(size, phi.grad(size.scale(near / size.norm(ones), ones))) / problem.tolerance
    return torch.where(_norm(size, w) <= near, most.nan_to_num(nan=0.0), 0.0)


def _newton(problem: _Problem, u: Tensor, at: _Sums, going: Tensor) -> Tensor:
    """-H^-1 force in the layers that are `going`, H the Hessian of the sum; else 0. (n,).

    In each layer H is a multiple of the identity and one direction for each point: conjugate
    gradients need as many steps as there are points. Solved as accurately as Newton needs it.
    """
    phi, size = problem.phi, problem.phi.size
    assert isinstance(size, Radial)
    w = u - problem.z
    r = size.scale(going / -at.largest, at.force)
    d, p, rr = torch.zeros_like(r), r, size.inner(r, r)
    enough = rr * at.residual.clamp(max=0.1).square()
    for _ in range(MOST_CG):
        going = going & (rr > enough)
        if not bool(going.any()):
            break
        hp = problem.total(tree_sum(phi.hvp(w, p).unbind()))
        bend = size.inner(p, hp)
        going = going & (bend > 0) & bend.isfinite()  # next to a kink psi'' overflows
        alpha = rr / bend
        d = d + _only(size, going, size.scale(alpha, p))
        r = torch.where(_spread(size, going, r), r - size.scale(alpha, hp), r)
        new = size.inner(r, r)
        p = _only(size, going, r + size.scale(new / rr, p))
        rr = new
    return size.scale(at.largest, d)


def _search(
    problem: _Problem, u: Tensor, d: Tensor, at: _Sums, going: Tensor
) -> tuple[Tensor, _Sums]:
    """A step t <= 1 along d in each layer. -> u + t d and the sums there.

    The slope along d is monotone: a step where it is small is sought by bisection, in a bracket
    that begins with the whole step. Outside the domain the slope is infinite.
    """
    size, eps = problem.phi.size, torch.finfo(u.dtype).eps
    unit = 1.0 / at.largest
    first = size.inner(d, size.scale(unit, at.force))
    low, high = torch.zeros_like(first), torch.ones_like(first)
    t = going.to(u)
    seeking = going
    for left in reversed(range(MOST_TRIALS)):
        trial = u + size.scale(t, d)
        new = _sums(problem, trial)
        slope = size.inner(d, size.scale(unit, new.force)).nan_to_num(nan=torch.inf)
        rises = (slope > -FLATTER * first) | ~(new.value <= at.value + 8.0 * eps * at.value.abs())
        good = ~rises & ((slope >= FLATTER * first) | (t == 1.0))
        seeking = seeking & ~good
        high = torch.where(seeking & rises, t, high)
        low = torch.where(seeking & ~rises, t, low)
        middle = 0.5 * (low + high)
        # A bracket that is narrower than the rounding of u: the lower end, where the sum is less.
        narrow = seeking & (_norm(size, d) * (high - low) <= eps * _norm(size, u))
        narrow |= seeking & ((middle <= low) | (middle >= high) | (left == 1))
        t = torch.where(narrow, low, torch.where(seeking, middle, t))
        seeking = seeking & ~narrow
        if not bool(seeking.any() | narrow.any()):
            break
    return trial, new
