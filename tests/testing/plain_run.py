"""Algorithm 1 in NumPy and float64, an independent implementation for tests.

It is written from the formulas of the paper and of the README, and imports nothing of the package.
A potential is a function h(rho) = psi(rho^2) of the length of a group of coordinates, its equations
are solved by bisection, and a line search tries 1, 1/2, 1/4, ... in turn.

Several runs are one block: u (P, n), z and v (P, M, n). The first of them is the run itself. The
others start one rounding away from it, and every iterate is moved by one rounding: they tell how
far the roundings of another implementation may carry it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

Array = np.ndarray

HALVINGS, BISECTIONS, NEWTON_STEPS = 1080, 100, 200


# ---- Table 2, and the potentials beyond it


@dataclass(frozen=True)
class Shape:
    """h(rho), h'(rho) and h''(rho), and the end of the domain of rho^2."""

    h: Callable[[Array], Array]
    slope: Callable[[Array], Array]
    curvature: Callable[[Array], Array]
    bound: float = math.inf


def power(p: float, eps: float) -> Shape:
    """|x|^p + eps |x|^2."""
    return Shape(
        lambda r: r**p + eps * r * r,
        lambda r: p * r ** (p - 1) + 2 * eps * r,
        lambda r: p * (p - 1) * r ** (p - 2) + 2 * eps,
    )


TAN = Shape(
    lambda r: np.tan(r * r),
    lambda r: 2 * r / np.cos(r * r) ** 2,
    lambda r: (2 + 8 * r * r * np.tan(r * r)) / np.cos(r * r) ** 2,
    math.pi / 2,
)
LOG = Shape(
    lambda r: -np.log(1 - r * r),
    lambda r: 2 * r / (1 - r * r),
    lambda r: 2 * (1 + r * r) / (1 - r * r) ** 2,
    1.0,
)
PSEUDO_HUBER = Shape(
    lambda r: r * r / (1 + np.sqrt(1 + r * r)),  # sqrt(1 + r^2) - 1 without cancellation
    lambda r: r / np.sqrt(1 + r * r),
    lambda r: (1 + r * r) ** -1.5,
)
HUBER = Shape(
    lambda r: np.where(r <= 1, r * r / 2, r - 0.5),
    lambda r: np.minimum(r, 1),
    lambda r: np.where(r <= 1, 1.0, 0.0),
)
LOG_COSH = Shape(
    lambda r: np.where(
        r < 1, np.log1p(2 * np.sinh(np.minimum(r, 1) / 2) ** 2), np.logaddexp(r, -r) - math.log(2)
    ),
    np.tanh,
    lambda r: 1 / np.cosh(np.minimum(r, 300)) ** 2,
)


def shape_of(name: str, options: dict) -> tuple[Shape, bool]:
    """The function h, and whether every coordinate is a group of its own."""
    p, eps = options.get("p", 4.0), options.get("eps", 0.0)
    return {
        "quad": (power(2, 0), False),
        "scaled_quad": (power(2, 0), False),
        "cubic": (power(3, eps), False),
        "power": (power(p, eps), options.get("separable", False)),
        "tan": (TAN, False),
        "tan_sep": (TAN, True),
        "log": (LOG, False),
        "log_sep": (LOG, True),
        "pseudo_huber": (PSEUDO_HUBER, options.get("separable", True)),
        "huber": (HUBER, options.get("separable", False)),
        "log_cosh": (LOG_COSH, options.get("separable", True)),
    }[name]


class Phi:
    """phi(w) = sum of h(|x|) over the groups, x = k w, k = sqrt(Q) / eta, equation (18)."""

    def __init__(self, shape: Shape, separable: bool, k: Array, lengths: Sequence[int]) -> None:
        self.shape, self.separable, self.k = shape, separable, k
        self.lengths = [1] * len(k) if separable else list(lengths)
        self.starts = np.cumsum([0, *self.lengths[:-1]])

    @staticmethod
    def of(name: str, options: dict, eta: float, lengths: Sequence[int]) -> "Phi":
        """By the names of the README, over layers of some lengths."""
        shape, separable = shape_of(name, options)
        weight = np.broadcast_to(np.asarray(options.get("weight", 1.0), float), len(lengths))
        return Phi(shape, separable, np.repeat(np.sqrt(weight), lengths) / eta, lengths)

    @property
    def bounded(self) -> bool:
        return self.shape.bound < math.inf

    def sizes(self, w: Array) -> Array:
        """|x|^2 of the groups. (..., n) -> (..., G)."""
        return np.add.reduceat((self.k * w) ** 2, self.starts, axis=-1)

    def lengths_of(self, w: Array) -> Array:
        """|x| of the group of each coordinate. (..., n) -> (..., n)."""
        return np.repeat(np.sqrt(self.sizes(w)), self.lengths, axis=-1)

    def inside(self, w: Array) -> Array:
        return (self.sizes(w) < self.shape.bound).all(-1)

    def value(self, w: Array) -> Array:
        return self.shape.h(np.sqrt(self.sizes(w))).sum(-1)

    def grad(self, w: Array) -> Array:
        """The force of a group is h' along x. (..., n) -> (..., n)."""
        rho = self.lengths_of(w)
        unit = np.where(rho > 0, self.k * w / np.where(rho > 0, rho, 1), 0)
        return self.k * self.shape.slope(rho) * unit

    def prox(self, b: Array, step: Array) -> Array:
        """The minimizer of |w - b|^2 / 2 + step phi(w), by bisection along the ray of b."""
        r, step = self.lengths_of(b), step * self.k**2
        low, high = np.zeros_like(r), np.minimum(r, math.sqrt(self.shape.bound))
        for _ in range(BISECTIONS):
            rho = (low + high) / 2
            beyond = rho + step * self.shape.slope(rho) > r
            low, high = np.where(beyond, low, rho), np.where(beyond, rho, high)
        return b * np.where(r > 0, low / np.where(r > 0, r, 1), 0)


# ---- the minimizer over u of sum_j phi(u - z_j), equation (14a)


def mean_of(phi: Phi, z: Array, start: Array, noise: Array, error: float) -> Array:
    """The phi-mean of z (P, M, n), from a start (P, n) in the domain; nan where it is not found.

    The sum of the forces of a group is not 0 but has the direction of the noise (P, n), and the
    part `error` of the sum of their lengths: a u that another solver may return.
    """
    means = np.where((z == z[:, :1]).all((1, 2))[:, None], z[:, 0], math.nan)
    rows = np.isnan(means).any(1)
    if phi.separable and rows.any():
        u = _by_bisection(phi, z[rows], np.zeros_like(start[rows]))
        strength = np.abs(phi.grad(u[:, None] - z[rows])).sum(1)
        means[rows] = _by_bisection(phi, z[rows], error * np.sign(noise[rows]) * strength)
        return means
    for row in np.flatnonzero(rows):
        for begin, length in zip(phi.starts, phi.lengths, strict=True):
            group = slice(begin, begin + length)
            own, points = Phi(phi.shape, False, phi.k[group], [length]), z[row, :, group]
            target = np.zeros(length)
            u = _by_newton(own, points, start[row, group], target)
            if noise[row].any():
                strength = np.linalg.norm(own.grad(u - points), axis=1).sum()
                target = noise[row, group] / np.linalg.norm(noise[row, group])
                u = _by_newton(own, points, u, error * strength * target)
            means[row, group] = u
    return means


def _by_bisection(phi: Phi, z: Array, target: Array) -> Array:
    """The u (P, n) at which the force of each coordinate is the target, between the z_j."""
    low, high = z.min(1), z.max(1)
    for _ in range(BISECTIONS):
        u = (low + high) / 2
        w = u[:, None] - z
        inside = (phi.k * w) ** 2 < phi.shape.bound
        above = np.where(inside, phi.grad(w), np.sign(w) * math.inf).sum(1) > target
        low, high = np.where(above, low, u), np.where(above, u, high)
    return (low + high) / 2


def _by_newton(phi: Phi, z: Array, start: Array, target: Array) -> Array:
    """The u (m,) at which the force of one radial group is the target, for points z (M, m).

    Newton's method, or steps towards a weighted mean of the z_j, halved until |force| falls.
    """

    def force(u: Array) -> Array:
        return phi.grad(u - z).sum(0) - target if phi.inside(u - z).all() else target * math.nan

    u = z.mean(0) if phi.inside(z.mean(0) - z).all() else start
    for _ in range(NEWTON_STEPS):
        f = force(u)
        rho = np.sqrt(phi.sizes(u - z))  # (M, 1)
        x, slope, along = phi.k * (u - z), phi.shape.slope(rho), phi.shape.curvature(rho)
        if np.linalg.norm(f) <= 1e-14 * (phi.k * slope).sum():
            break
        across = slope / rho
        hessian = across.sum() * np.eye(len(u)) + ((along - across) / rho**2 * x).T @ x
        directions = [-f / (phi.k**2 * across.sum())]
        if np.isfinite(hessian).all():
            newton = np.linalg.lstsq(hessian * np.outer(phi.k, phi.k), f, rcond=None)[0]
            directions.insert(0, -newton)
        trials = (u + 0.5**i * d for d in directions for i in range(50))
        new = next((x for x in trials if np.linalg.norm(force(x)) < np.linalg.norm(f)), None)
        if new is None:
            break
        u = new
    forces = np.linalg.norm(phi.grad(u - z), axis=1)
    found = np.linalg.norm(force(u)) <= 1e-11 * forces.sum()
    return u if found else np.full_like(u, math.nan)


# ---- multinomial logistic regression, whose weights are several layers


@dataclass(frozen=True)
class Logistic:
    """Labels (N,) of features x (N, d); layer l has the columns of `widths[l]` and a bias."""

    x: Array
    labels: Array
    classes: int
    widths: Sequence[int]

    @property
    def lengths(self) -> list[int]:
        """The sizes of the layers in a flat vector: weights (classes, width), then the bias."""
        return [self.classes * (width + 1) for width in self.widths]

    def _logits(self, point: Array, x: Array) -> Array:
        """Of points (..., n) and features (..., B, d). -> (..., B, classes)."""
        logits, at, column = 0.0, 0, 0
        for width in self.widths:
            weight = point[..., at : at + self.classes * width]
            weight = weight.reshape(*point.shape[:-1], self.classes, width)
            at += self.classes * width
            own = x[..., column : column + width]
            logits = logits + own @ np.swapaxes(weight, -1, -2)
            logits = logits + point[..., None, at : at + self.classes]
            at, column = at + self.classes, column + width
        return logits

    def gradient(self, point: Array, chosen: Array, mean: bool) -> Array:
        """Of the loss over the samples `chosen` (M, B), at points (P, M, n)."""
        x = self.x[chosen]
        logits = self._logits(point, x)
        p = np.exp(logits - logits.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        p = p - np.eye(self.classes)[self.labels[chosen]]
        if mean:
            p = p / chosen.shape[-1]
        parts, column = [], 0
        for width in self.widths:
            weight = np.swapaxes(p, -1, -2) @ x[..., column : column + width]
            parts += [weight.reshape(*weight.shape[:-2], -1), p.sum(-2)]
            column += width
        return np.concatenate(parts, -1)

    def loss(self, point: Array) -> Array:
        """Summed over all samples, at points (P, n)."""
        logits = self._logits(point, self.x)
        top = logits.max(-1)
        of_label = np.take_along_axis(logits, np.tile(self.labels, (len(point), 1))[..., None], -1)
        return (top + np.log(np.exp(logits - top[..., None]).sum(-1)) - of_label[..., 0]).sum(-1)


# ---- line 2


def factor(name: str, options: dict, t: int, iterations: int) -> float:
    """The factor of a step size at iteration t = 0, 1, ..."""
    if name == "constant":
        return 1.0
    if name == "step":
        return options.get("factor", 0.1) ** (t // options.get("every", 10_000))
    final, warmup = options.get("final", 0.0), options.get("warmup", 0)
    if t < warmup:
        return (t + 1) / warmup
    done = (t - warmup) / max(1, iterations - warmup)
    left = 1 - done if name == "linear" else math.cos(done * math.pi / 2) ** 2
    return final + (1 - final) * left


# ---- the run


@dataclass
class State:
    """u (P, n), z and v (P, M, n), the cuts of s_u (P,) and s_j (P, M), the objective (P,)."""

    u: Array
    z: Array
    v: Array
    cuts_u: Array
    cuts_z: Array
    objective: Array = field(default_factory=lambda: np.zeros(0))


def first_feasible(inside: Callable[[Array], Array], shape: tuple[int, ...]) -> Array:
    """The largest of 1, 1/2, 1/4, ... for which `inside` holds, for each entry; 0 if none."""
    s = np.ones(shape)
    for _ in range(HALVINGS):
        outside = ~inside(s)
        if not outside.any():
            return s
        s = np.where(outside, s / 2, s)
    return np.where(inside(s), s, 0)


class PlainRun:
    """The iterations of one config, from starts (P, n).

    Args:
        config: The values of the keys of a run, as attributes.
        data: The training set.
        start: The start of u and of all z_j (n,), in the type whose roundings matter.
        workers: M.
        error: The relative residual that a solver for u may leave; the runs but the first leave it.
        others: P - 1.
    """

    def __init__(
        self, config, data: Logistic, start: Array, workers: int, error: float, others: int
    ) -> None:
        self.config, self.data, self.error, self.dtype = config, data, error, start.dtype
        self.random = np.random.default_rng(1)
        starts = self.rounded(np.tile(start.astype(float), (1 + others, 1)))
        of = config.potential
        self.phi = Phi.of(of.name, of.options, of.eta, data.lengths)
        self.workers = workers
        z = np.repeat(starts[:, None], workers, 1)
        counts = np.zeros((len(starts), workers), int)
        self.state = State(starts.copy(), z, np.zeros_like(z), counts[:, 0].copy(), counts)
        self.noise = self.random.standard_normal(starts.shape)
        self.noise[0] = 0
        self.momentum = np.zeros_like(starts)  # of an optimizer over u
        self.points = z.copy()  # whose forces are summed: of an earlier iteration, with a delay
        self.set_objective(0)

    def _scheduled(self, name: str, t: int) -> float:
        algorithm = self.config.algorithm
        schedule = getattr(algorithm.schedule, name)
        return getattr(algorithm, name) * factor(
            schedule.name, schedule.options, t, algorithm.iterations
        )

    def strength(self, t: int) -> float:
        """sigma / lam in a communication: the coefficient of grad phi in line 6."""
        algorithm, eta = self.config.algorithm, self.config.potential.eta
        if algorithm.name == "msgd":
            return 0.0
        if algorithm.pull is not None:
            return algorithm.pull * eta**2 / 2
        return self._scheduled("sigma", t) / self._scheduled("lam", t)

    def set_objective(self, t: int) -> None:
        """(15) at u divided by M: the loss of u, R(u), and the mean of the couplings."""
        state, nu = self.state, self.config.algorithm.weight_decay
        state.objective = self.data.loss(state.u) + nu / 2 * (state.u**2).sum(-1)
        if self.strength(t) > 0:
            phi = self.phi.value(state.u[:, None] - state.z).mean(-1)
            state.objective += phi * self.strength(t) / self._scheduled("sigma", t)

    def step(self, t: int, chosen: Array) -> State:
        """Iteration t on the samples `chosen` (M, B)."""
        algorithm, phi, state = self.config.algorithm, self.phi, self.state
        communicates = t % algorithm.period == algorithm.delay
        u, z, v = state.u, state.z, state.v
        if t % algorithm.period == 0:
            self.points = z.copy()
        ahead = z + algorithm.momentum * v
        delta = self.data.gradient(ahead, chosen, algorithm.loss_reduction == "mean")
        if communicates and algorithm.name != "msgd":
            state.u = self.line_3(t)
        center = (u if algorithm.order == "jacobi" else state.u)[:, None]
        sigma = self._scheduled("sigma", t)
        inner = np.ones(v.shape[:-1])
        if communicates and algorithm.delay:
            z, v, inner = self.moved_inside(z, v)
        v = algorithm.momentum * v - sigma * (delta + algorithm.weight_decay * z)
        if communicates and algorithm.delay:
            self.late_line_6(t, center, z, v, inner)
        elif communicates and algorithm.coupling == "implicit":
            w = phi.prox(center - (z + v), np.array(self.strength(t)))
            state.v = center - w - z if algorithm.momentum_on == "objective" else v
            state.z = center - w
        else:
            eta = self.config.potential.eta
            strength = self.strength(t) if communicates else algorithm.local_pull * eta**2 / 2
            force = strength * phi.grad(center - z) if strength else 0.0
            v = v + force if algorithm.momentum_on == "objective" else v
            d = v if algorithm.momentum_on == "objective" else v + force
            s = self.cut(lambda s: phi.inside(state.u[:, None] - (z + s[..., None] * d)), d)
            state.cuts_z = state.cuts_z + (s < 1)
            state.z, state.v = z + s[..., None] * d, s[..., None] * v
        if algorithm.name != "msgd":
            state.u, u = self.rounded(state.u), state.u
        # An exact agreement is kept: roundings have no part in it.
        state.z = np.where(state.z == u[:, None], state.u[:, None], self.rounded(state.z))
        if algorithm.name == "msgd":
            state.u = state.z[:, 0]
        state.v = self.rounded(state.v)
        self.set_objective(t)
        return state

    def moved_inside(self, z: Array, v: Array) -> tuple[Array, Array, Array]:
        """z and v after those outside the domain around u are moved towards it; the factors."""
        w = self.state.u[:, None] - z
        s = self.cut(lambda s: self.phi.inside(s[..., None] * w), w)
        moved = s[..., None] < 1
        return np.where(moved, self.state.u[:, None] - s[..., None] * w, z), s[..., None] * v, s

    def late_line_6(self, t: int, center: Array, z: Array, v: Array, inner: Array) -> None:
        """The step by the loss, then that by the force at `points`; each has a line search."""
        algorithm, phi, state = self.config.algorithm, self.phi, self.state
        u = state.u[:, None]
        first = self.cut(lambda s: phi.inside(u - (z + s[..., None] * v)), v)
        z, v = z + first[..., None] * v, first[..., None] * v
        b = center - self.points
        if algorithm.coupling == "implicit":
            d = b - phi.prox(b, np.array(self.strength(t)))
        else:
            d = self.strength(t) * phi.grad(b)
        s = self.cut(lambda s: phi.inside(u - (z + s[..., None] * d)), d)
        state.cuts_z = state.cuts_z + (np.minimum(np.minimum(first, inner), s) < 1)
        state.z = z + s[..., None] * d
        state.v = v + s[..., None] * d if algorithm.momentum_on == "objective" else v

    def within_reach(self, w: Array, d: Array) -> Array:
        """The step of u that the distances of u - z_j = w (P, M, n) allow in any direction."""
        reach, length = (np.sqrt(self.phi.sizes(x)) for x in (w, d))
        reach = reach.max(1)
        if self.phi.separable:
            reach, length = reach.max(-1, keepdims=True), length.max(-1, keepdims=True)
        radius = math.sqrt(self.phi.shape.bound)
        return self.cut(lambda s: (reach + s[:, None] * length < radius).all(-1), d)

    def rounded(self, x: Array) -> Array:
        """x (P, ...), which in all runs but the first is moved by one rounding or not at all."""
        unit = np.spacing(np.abs(x).astype(self.dtype)).astype(float)
        moves = self.random.integers(-1, 2, x.shape)
        moves[0] = 0
        return x + moves * unit

    def cut(self, inside: Callable[[Array], Array], d: Array) -> Array:
        """The line search along d (..., n); without one where phi has no boundary."""
        if not self.phi.bounded or not np.isfinite(d).all():
            return np.ones(d.shape[:-1])
        return first_feasible(inside, d.shape[:-1])

    def line_3(self, t: int) -> Array:
        """u+."""
        algorithm, phi, state = self.config.algorithm, self.phi, self.state
        u, z = state.u, self.points
        if algorithm.u_update == "exact":
            return mean_of(phi, z, u, self.noise, self.error)
        outer, eta = algorithm.outer, self.config.potential.eta
        optimizer = outer if isinstance(outer, dict) else None
        if outer is None:
            t_u = self._scheduled("tau", t)
            if algorithm.u_step_on == "objective":
                t_u *= self.strength(t) / self._scheduled("sigma", t)
        else:
            t_u = (1.0 if optimizer else outer) * eta**2 / (2 * self.workers)
        d = -t_u * phi.grad(u[:, None] - z).sum(1)
        if optimizer:  # SGD of torch, for the gradient -d
            kappa = optimizer.get("momentum", 0.0)
            self.momentum = kappa * self.momentum - d
            nesterov = optimizer.get("nesterov", False)
            d = -optimizer["lr"] * (kappa * self.momentum - d if nesterov else self.momentum)
        if algorithm.delay:
            s = self.within_reach(u[:, None] - z, d)
        else:
            s = self.cut(lambda s: phi.inside((u + s[:, None] * d)[:, None] - z).all(-1), d)
        state.cuts_u = state.cuts_u + (s < 1)
        self.momentum = s[:, None] * self.momentum
        return u + s[:, None] * d
