"""Schedules for tau, sigma and lam (line 2 of Algorithm 1): factors as functions of t.

A schedule multiplies the base value of its hyperparameter. Registered functions take options and
return `factor(t, iterations)`, with t counted from 0.
"""

import math
from collections.abc import Callable

from consensus.registry import Registry

Schedule = Callable[[int, int], float]

SCHEDULES: Registry[Schedule] = Registry(
    "schedule", Callable, "a function (t, iterations) -> factor"
)


@SCHEDULES.register("constant")
def constant() -> Schedule:
    """1 throughout."""
    return lambda t, iterations: 1.0


@SCHEDULES.register("linear")
def linear(final: float = 0.0, warmup: int = 0) -> Schedule:
    """From 1 to `final`, linearly, after `warmup` iterations that climb from 0 to 1."""
    return _decay(lambda progress: 1.0 - progress, final, warmup)


@SCHEDULES.register("cosine")
def cosine(final: float = 0.0, warmup: int = 0) -> Schedule:
    """From 1 to `final` along half a cosine, after `warmup` iterations that climb from 0 to 1."""
    return _decay(lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)), final, warmup)


@SCHEDULES.register("step")
def step(every: int = 10_000, factor: float = 0.1) -> Schedule:
    """Multiplied by `factor` > 0 after each `every` >= 1 iterations."""
    if every < 1:
        raise ValueError(f"`every` is {every}; allowed: a whole number >= 1")
    if not 0.0 < factor < math.inf:
        raise ValueError(f"`factor` is {factor}; allowed: a finite number > 0")

    def power(t: int, iterations: int) -> float:
        try:
            return factor ** (t // every)
        except OverflowError:
            return math.inf

    return power


def _decay(shape: Callable[[float], float], final: float, warmup: int) -> Schedule:
    if not 0.0 <= final < math.inf:
        raise ValueError(f"`final` is {final}; allowed: a finite number >= 0")
    if warmup < 0:
        raise ValueError(f"`warmup` is {warmup}; allowed: a whole number >= 0")

    def factor(t: int, iterations: int) -> float:
        if t < warmup:
            return (t + 1) / warmup
        progress = (t - warmup) / max(1, iterations - warmup)
        return final + (1.0 - final) * shape(progress)

    return factor
