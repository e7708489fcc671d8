"""Numerical checks of a profile: its derivatives, its domain and the assumptions that it claims.

They compare numbers at some sizes, so they find mistakes and prove nothing.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from consensus.core.profiles import LOG, QUAD, TAN, Profile, power_profile

TOLERANCE = 0.01  # relative, of a derivative: differences of float32 formulas reach it
STEP = 1e-3  # of differences, relative to the distance from 0 and from the boundary
SAME = 1e-6  # relative, of a cheaper form that replaces psi'

KERNELS = {"quad": QUAD, "cube": power_profile(3.0), "tan": TAN, "log": LOG}
"""The profile that each kernel of a GPU computes."""


def mistake_of(profile: Profile) -> str | None:
    """The first mistake that is found in a profile, as a clause; None if there is none."""
    try:
        return next(_mistakes(profile), None)
    except Exception as error:  # a user's function may do anything
        return f"one of its functions fails: {type(error).__name__}: {error}"


def _mistakes(profile: Profile) -> Iterator[str]:
    claimed, bound = profile.assumptions, profile.bound
    if not bound > 0:
        yield f"its bound is {bound}; allowed: a number > 0, or inf"
        return
    radius = math.sqrt(bound)
    part = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    rho = radius * part if radius < math.inf else torch.logspace(-2, 1, 50, dtype=torch.float64)
    s = rho.square()
    for name, function in (("psi", profile.psi), ("psi'", profile.dpsi), ("psi''", profile.d2psi)):
        if not isinstance(found := function(s), Tensor) or found.shape != s.shape:
            kind = f"of shape {tuple(getattr(found, 'shape', ()))}"
            kind = kind if isinstance(found, Tensor) else f"a {type(found).__name__}"
            yield f"{name} of a tensor s of shape {tuple(s.shape)} is {kind}; allowed: its shape"
            return
        if not bool((finite := function(s).isfinite()).all()):
            domain = f"its domain s < {bound:g}" if bound < math.inf else "its domain, all s"
            yield f"{name} is not finite at s = {_first(s, ~finite)}, inside {domain}: its `bound`"
            return
    yield from _derivatives(profile, s, bound)
    yield from _shortcuts(profile, s[::5])
    if "A5" in claimed and abs(zero := float(profile.psi(s.new_zeros(())))) > 1e-9:
        yield f"psi(0) is {zero:g} and not 0, against (A5)"

    def slope(x: Tensor) -> Tensor:
        """The derivative of psi(rho^2) by rho."""
        return 2.0 * profile.dpsi(x.square()) * x

    yield from _convexity(claimed, slope, rho)
    yield from _limits(profile, slope, radius)


def _derivatives(profile: Profile, s: Tensor, bound: float) -> Iterator[str]:
    """Mistakes in psi' and psi'' against differences, and in the forms that replace psi'."""
    h = STEP * torch.minimum(s, bound - s)
    scale = profile.dpsi(s).abs()
    for name, function, found, unit in (
        ("psi'", profile.psi, profile.dpsi(s), scale),
        ("psi''", profile.dpsi, profile.d2psi(s), profile.d2psi(s).abs() + scale / s),
    ):
        expected = (function(s + h) - function(s - h)) / (2.0 * h)
        wrong = ~((found - expected).abs() <= TOLERANCE * torch.maximum(unit, expected.abs()))
        if bool(wrong.any()):
            values = f"{_first(found, wrong)} and not {_first(expected, wrong)}"
            yield f"{name} is {values} at s = {_first(s, wrong)}, by differences"
    if profile.slope is not None:
        wrong = (profile.dpsi(s) - profile.slope).abs() > TOLERANCE * scale
        if bool(wrong.any()):
            yield f"psi' is no constant {profile.slope:g} (`slope`) at s = {_first(s, wrong)}"
    if profile.radius is not None:
        rho = s.sqrt()
        again = profile.radius(2.0 * profile.dpsi(s) * rho)
        if "A1" not in profile.assumptions:  # several points may have the same gradient
            again = torch.where(_slopes_agree(profile, again, rho), rho, again)
        wrong = ~((again - rho).abs() <= TOLERANCE * rho)
        if bool(wrong.any()):
            yield f"`radius` does not invert 2 psi'(rho^2) rho at rho = {_first(rho, wrong)}"


def _shortcuts(profile: Profile, s: Tensor) -> Iterator[str]:
    """Mistakes in the forms that stand for psi' where they take less time.

    `dataclasses.replace` keeps those of the profile that it changes.
    """
    dpsi, d2psi = profile.dpsi(s), profile.d2psi(s)
    for end, form in profile.near_zero:
        small = end * torch.linspace(0.1, 1.0, 10, dtype=torch.float64)
        right = profile.dpsi(small)
        found = form(small) if callable(form) else torch.full_like(small, form)
        if bool((wrong := ~_same(found, right)).any()):
            yield f"`near_zero` up to {end:g} is not psi' at s = {_first(small, wrong)}"
    if profile.numbers is not None:
        for name, function, right, unit in zip(
            ("psi'", "psi''"), profile.numbers, (dpsi, d2psi), (dpsi, dpsi / s), strict=True
        ):
            found = torch.tensor([function(x) for x in s.tolist()], dtype=torch.float64)
            if bool((wrong := ~_same(found + unit, right + unit)).any()):
                yield f"`numbers` is not {name} at s = {_first(s, wrong)}"
    if profile.shrunk is not None and profile.numbers is None:
        yield "`shrunk` is given without `numbers`"
    yield from _proximal_steps(profile, s.sqrt())
    if profile.kernel is not None:
        if (of_kernel := KERNELS.get(profile.kernel)) is None:
            yield f"`kernel` is {profile.kernel}; allowed: {', '.join(KERNELS)} or None"
        elif bool((wrong := ~_same(of_kernel.dpsi(s), dpsi)).any()):
            yield f"the psi' of `kernel` {profile.kernel} is another at s = {_first(s, wrong)}"


def _proximal_steps(profile: Profile, r: Tensor) -> Iterator[str]:
    """Mistakes in the closed forms of the rho with rho + 2 c psi'(rho^2) rho = r."""
    for c in (0.1, 10.0):
        found = {}
        if (shrunk := profile.shrunk) is not None:
            found["shrunk"] = torch.tensor([shrunk(x, c) for x in r.tolist()], dtype=torch.float64)
        if profile.removed is not None:
            found["removed"] = r * (1.0 - profile.removed(r, c))
        for name, rho in found.items():
            again = rho * (1.0 + 2.0 * c * profile.dpsi(rho.square()))
            if bool((wrong := ~_same(again, r)).any()):
                place = f"r = {_first(r, wrong)}, c = {c:g}"
                yield f"`{name}` does not solve rho + 2 c psi'(rho^2) rho = r at {place}"


def _same(found: Tensor, right: Tensor) -> Tensor:
    return (found - right).abs() <= SAME * right.abs()


def _slopes_agree(profile: Profile, a: Tensor, b: Tensor) -> Tensor:
    slopes = [profile.dpsi(rho.square()) * rho for rho in (a, b)]
    return (slopes[0] - slopes[1]).abs() <= TOLERANCE * slopes[1]


def _convexity(
    claimed: frozenset[str], slope: Callable[[Tensor], Tensor], rho: Tensor
) -> Iterator[str]:
    values = slope(rho)
    falling = values.diff() <= -1e-9 * values[1:].abs()
    falling |= (values.diff() <= 0) & (rho[1:] < 5.0)  # beyond, a difference may be rounding
    if "A1" in claimed and bool(falling.any() or (values <= 0).any()):
        at = _first(rho[1:], falling) if bool(falling.any()) else _first(rho, values <= 0)
        yield f"it is not strictly convex near |x| = {at}, against (A1)"


def _limits(profile: Profile, slope: Callable[[Tensor], Tensor], radius: float) -> Iterator[str]:
    """Mistakes in the limits at 0, at the boundary and at infinity."""

    def at(*places: float) -> list[float]:
        return [abs(float(x)) for x in slope(torch.tensor(places, dtype=torch.float64))]

    claimed, unit = profile.assumptions, min(1.0, radius)
    tiny, small = at(1e-12 * unit, 1e-2 * unit)
    if claimed & {"A2", "A5"} and tiny > 0.9 * small:
        yield "its gradient does not vanish at 0, against (A2) and (A5)"
    near, nearer = (
        float(profile.dpsi(torch.tensor((x * unit) ** 2, dtype=torch.float64)))
        for x in (1e-3, 1e-6)
    )
    if "A3" in claimed and not (0 < nearer < math.inf and 0.5 < nearer / near < 2.0):
        yield "its Hessian at 0 is singular or infinite, against (A3)"
    if radius < math.inf:
        close, closer = at(radius * (1 - 1e-6), radius * (1 - 1e-12))
        if "A2" in claimed and closer < 1.2 * close:
            yield "its gradient stays bounded at the boundary of its domain, against (A2)"
    else:
        far, farther = at(1e3, 1e6)
        if "A4" in claimed and farther < 1.05 * far < math.inf:
            yield "its slope stays bounded, against (A4)"


def _first(x: Tensor, where: Tensor) -> str:
    return f"{float(x[where][0]):.4g}"
