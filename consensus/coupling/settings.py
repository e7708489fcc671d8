"""Settings: the arguments of `Coupling` that are the same on all processes."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from consensus.core.kernels.optimizers import MakeOptimizer
from consensus.core.potentials import POTENTIALS, Potential

CHOICES: dict[str, tuple[str | bool | None, ...]] = {
    "buffers": ("local", "mean"),
    "order": ("gauss_seidel", "jacobi"),
    "implicit": (True, False, None),
    "overlap": (True, False),
}


@dataclass(frozen=True)
class Settings:
    """The arguments of `Coupling` with these names; a ValueError if one is out of its range."""

    potential: str | Potential
    options: Mapping[str, Any] | None
    eta: float
    pull: float
    outer: float | MakeOptimizer
    local_pull: float
    period: int
    fragments: int
    implicit: bool | None
    order: str
    overlap: bool
    delay: int
    buffers: str

    def __post_init__(self) -> None:
        check_positive("eta", self.eta)
        if self.options is not None and not isinstance(self.options, Mapping):
            raise ValueError(f"`options` is {self.options!r}; allowed: a dict or None")
        check_rate("`pull`", self.pull)
        check_rate("`local_pull`", self.local_pull)
        if not callable(self.outer) and not 0.0 <= number("`outer`", self.outer) < math.inf:
            raise ValueError(f"`outer` is {self.outer}; allowed: a finite number >= 0")
        for name in ("period", "fragments"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"`{name}` is {value}; allowed: a whole number >= 1")
        last = self.period - 1 if self.overlap else 0
        if not isinstance(self.delay, int) or not 0 <= self.delay <= last:
            text = "0 to period - 1" if self.overlap else "0 with overlap=False"
            raise ValueError(f"`delay` is {self.delay}; allowed: {text}")
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                values = ", ".join(map(str, allowed))
                raise ValueError(f"`{name}` is {getattr(self, name)}; allowed: {values}")

    def make_potential(self) -> Potential:
        """The potential from its name and options, or as given."""
        if isinstance(self.potential, str):
            return POTENTIALS.make(self.potential, **(self.options or {}))
        if not isinstance(self.potential, Potential):
            raise ValueError(f"`potential` is {self.potential!r}; allowed: a name or a Potential")
        if self.options:
            raise ValueError(f"`options` is {self.options}; allowed: none with a Potential")
        return self.potential

    def describe(self) -> dict[str, Any]:
        """Values to compare between processes; functions and potentials by a text."""
        texts = {
            "potential": self.potential
            if isinstance(self.potential, str)
            else repr(self.potential),
            "outer": "a function" if callable(self.outer) else self.outer,
            "options": dict(self.options or {}),
        }
        return {name: getattr(self, name) for name in self.__dataclass_fields__} | texts


def rates_of_paper(
    lam: float, tau: float, sigma: float, eta: float, workers: int
) -> dict[str, float]:
    """`pull` and `outer` of Algorithm 1 with t_u = tau; ValueError unless all are positive."""
    for name, value in {"lam": lam, "tau": tau, "sigma": sigma, "eta": eta}.items():
        check_positive(name, value)
    return {"pull": 2.0 * sigma / (lam * eta**2), "outer": 2.0 * workers * tau / eta**2}


def check_rate(name: str, value: object) -> None:
    """Raise a ValueError if a rate is not in [0, 1]."""
    if not 0.0 <= number(name, value) <= 1.0:
        raise ValueError(f"{name} is {value}; allowed: a number from 0 to 1")


def check_positive(name: str, value: object) -> None:
    """Raise a ValueError if a number is not positive and finite."""
    if not 0.0 < number(f"`{name}`", value) < math.inf:
        raise ValueError(f"`{name}` is {value}; allowed: a finite number > 0")


def number(name: str, value: object) -> float:
    """`value`, or a ValueError that names it."""
    if not isinstance(value, int | float):
        raise ValueError(f"{name} is {value!r}; allowed: a number")
    return float(value)
