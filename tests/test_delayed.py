"""Sums that are used late, against a plain loop of the equations in consensus/delayed.py."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from consensus import POTENTIALS, Layerwise
from consensus.comm import Solo
from consensus.core.kernels import choose_kernel, worker_kernel
from consensus.core.kernels.outer_step import FlatOptimizerStep
from consensus.core.kernels.reach_step import ReachStep
from consensus.delayed import DelayedConsensus, move_inside
from consensus.server import Server, digest
from consensus.worker import Worker
from tests.test_algorithm import (
    LAYERS,
    M,
    Quadratics,
    block,
    halving,
    layer_gradient,
    shift,
    start_u,
    start_z,
    target,
)

BOUND = {"tan": math.pi / 2, "log": 1.0, "tan_sep": math.pi / 2}


class Resumable(Quadratics):
    """An oracle whose position is a part of the state."""

    def state_dict(self):
        return {"position": torch.full((len(self.workers),), self.t)}

    def load_state_dict(self, state):
        self.t = int(state["position"][0])


def build(
    group, delay, name="quad", eta=1.0, kappa=0.9, outer=None, momentum_on="loss",
    coupling="explicit", **options,
):  # fmt: skip
    workers = block(group)
    phi = Layerwise(POTENTIALS[name], LAYERS, eta)
    u = torch.from_numpy(start_u())
    kernel = choose_kernel(phi, u)
    if phi.bounded:
        kernel = ReachStep(kernel, phi)
    if outer is not None:
        kernel = FlatOptimizerStep(kernel, u, "SGD", outer, cut=phi.bounded)
    z = torch.from_numpy(start_z()[workers.start : workers.stop])
    worker = Worker(
        z, Resumable(workers), phi, kappa=kappa, nu=1e-2, momentum_on=momentum_on,
        kernel=worker_kernel(coupling, phi, z),
    )  # fmt: skip
    options = {"tau": 0.02, "sigma": 0.02, "lam": 0.2} | options
    implicit = coupling == "implicit"
    return DelayedConsensus(
        Server(u, phi, group, kernel), worker, delay=delay, implicit=implicit, **options
    )


def delayed(group, iterations, delay, options):
    algorithm = build(group, delay, **options)
    for t in range(iterations):
        algorithm.step(t)
    algorithm.verify()
    found = algorithm.u.numpy(), algorithm.worker.z.numpy()
    return *found, int(digest(algorithm.u)), algorithm.cuts.tolist()


def lengths(name, w):
    """The distance of w from 0 of each layer, or the largest of all coordinates."""
    if name.endswith("_sep"):
        return np.abs(w).max(keepdims=True)
    return np.array([np.linalg.norm(w[start:stop]) for start, stop in LAYERS])


def step_within(name, eta, points, d):
    """The largest halving s with |w_j| + s |d| below the radius, for every worker and layer."""
    radius = eta * math.sqrt(BOUND.get(name, math.inf))
    reach, s = np.max([lengths(name, w) for w in points], axis=0), 1.0
    while not (reach + s * lengths(name, d) < radius).all():
        s /= 2
    return s


def pulled(name, eta, strength, b, implicit):
    """The step of line 6 for b = u+ - y_j: the force, or b less its prox, by bisection."""
    grad = layer_gradient(name, eta)
    if not implicit:
        return strength * grad(b)
    moved = np.empty_like(b)
    for start, stop in LAYERS:  # w = rho b, rho in (0, 1): rho b + strength grad(rho b) = b
        low, high = 0.0, 1.0
        for _ in range(60):
            rho, w = (low + high) / 2, np.zeros_like(b)
            w[start:stop] = rho * b[start:stop]
            inside = (lengths(name, w) < eta * math.sqrt(BOUND.get(name, math.inf))).all()
            above = not inside or (w + strength * grad(w) - b)[start:stop] @ b[start:stop] > 0
            low, high = (low, rho) if above else (rho, high)
        moved[start:stop] = (1 - low) * b[start:stop]
    return moved


def reference(
    iterations, delay, period, name="quad", eta=1.0, kappa=0.9, nu=1e-2, tau=0.02, sigma=0.02,
    lam=0.2, order="gauss_seidel", u_step_on="coupling", momentum_on="loss", local_pull=0.0,
    outer=None, coupling="explicit",
):  # fmt: skip
    """The equations, worker by worker."""
    grad, halve = layer_gradient(name, eta), halving(name, eta)
    u, z, cuts, momentum_of_u = start_u(), start_z(), [0, 0], 0.0
    v, y = np.zeros_like(z), start_z()
    for t in range(iterations):
        tau_t, sigma_t, lam_t = (h(t) if callable(h) else h for h in (tau, sigma, lam))
        if t % period == 0:
            y = z.copy()
        ends, old = t % period == delay, u
        delta = [z[j] + kappa * v[j] - target(j) - shift(j, t) for j in range(M)]
        cut = np.zeros(M, dtype=bool)
        if ends:
            t_u = tau_t / lam_t if u_step_on == "objective" else tau_t
            d = -t_u * sum(grad(u - y[j]) for j in range(M))
            if outer is not None:
                momentum_of_u = outer["momentum"] * momentum_of_u - d
                d = -outer["lr"] * momentum_of_u
            s = step_within(name, eta, u - y, d)
            cuts[0] += s < 1
            momentum_of_u *= s
            u = u + s * d
            for j in range(M):
                s = halve(np.zeros_like(u), u - z[j])
                if s < 1:
                    z[j], v[j], cut[j] = u - s * (u - z[j]), s * v[j], True
        for j in range(M):
            v[j] = kappa * v[j] - sigma_t * (delta[j] + nu * z[j])
            d = v[j].copy()
            if not ends:
                force = eta**2 / 2 * local_pull * grad(u - z[j])
                d += force
                v[j] += force if momentum_on == "objective" else 0
            s = halve(u - z[j], -d)
            z[j], v[j] = z[j] + s * d, s * v[j]
            cut[j] |= s < 1
            if ends:
                b = (u if order == "gauss_seidel" else old) - y[j]
                d = pulled(name, eta, sigma_t / lam_t, b, coupling == "implicit")
                s = halve(u - z[j], -d)
                z[j] = z[j] + s * d
                v[j] += s * d if momentum_on == "objective" else 0
                cut[j] |= s < 1
        cuts[1] += int(cut.sum())
    return u, z, cuts


CASES = {
    "quad": (3, {"period": 5}),
    "cubic": (1, {"period": 2, "name": "cubic"}),
    "longest": (3, {"period": 4, "name": "cubic", "lam": 0.05}),
    "tan": (2, {"period": 5, "name": "tan", "eta": 3.0}),
    "tan_sep": (2, {"period": 3, "name": "tan_sep", "eta": 2.0}),
    "jacobi": (2, {"period": 4, "order": "jacobi", "u_step_on": "objective"}),
    "momentum on objective": (2, {"period": 3, "momentum_on": "objective", "name": "cubic"}),
    "local pull": (2, {"period": 4, "local_pull": 0.1, "name": "tan", "eta": 3.0}),
    "implicit": (2, {"period": 4, "coupling": "implicit", "name": "tan", "eta": 3.0}),
    "implicit cubic": (1, {"period": 3, "coupling": "implicit", "name": "cubic", "lam": 0.01}),
    "outer": (2, {"period": 4, "outer": {"lr": 0.5, "momentum": 0.7}, "tau": 0.1}),
    "local sgd": (3, {"period": 4, "tau": 0.5 / M, "lam": 0.04}),
    "log, cut": (2, {"period": 4, "name": "log", "eta": 0.5, "sigma": 0.05, "lam": 1.0}),
    "tan, cut": (3, {"period": 5, "name": "tan", "eta": 0.3, "sigma": 0.05, "lam": 4.0}),
    "tan_sep, cut": (1, {"period": 2, "name": "tan_sep", "eta": 0.2, "sigma": 0.1, "lam": 4.0}),
    "implicit, cut": (
        2,
        {"period": 4, "name": "log", "eta": 0.3, "sigma": 0.05, "coupling": "implicit"},
    ),
    "outer, cut": (
        2,
        {
            "period": 3, "name": "log", "eta": 0.3, "sigma": 0.05, "lam": 4.0, "tau": 0.01,
            "outer": {"lr": 1.0, "momentum": 0.8},
        },
    ),
}  # fmt: skip


@pytest.mark.ranks
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("case", CASES)
def test_every_variant_equals_the_plain_loop(ranks, size, case):
    (delay, options), stiff = CASES[case], case.endswith("cut")
    length = 16 if stiff else 60
    answers = ranks(size, delayed, length, delay, options)
    assert len({answer[2] for answer in answers}) == 1, "u differs between ranks"
    u, z, cuts = reference(length, delay, **options)
    tolerance = 1e-9 if stiff else 1e-12
    np.testing.assert_allclose(answers[0][0], u, rtol=0, atol=tolerance)
    found = np.concatenate([answer[1] for answer in answers])
    np.testing.assert_allclose(found, z, rtol=0, atol=tolerance)
    assert [answers[0][3][0], sum(answer[3][1] for answer in answers)] == cuts
    assert not stiff or min(cuts) > 0, "the case is there for its cuts"


# ---- state


def halves(group, options, delay, length, stop):
    """Digests of u of a run, and of one that goes on from the state after `stop` iterations."""
    whole, first, second = (build(group, delay, **options) for _ in range(3))
    for t in range(length):
        whole.step(t)
    for t in range(stop):
        first.step(t)
    second.load_state_dict({key: x.clone() for key, x in first.state_dict().items()})
    for t in range(stop, length):
        first.step(t)  # a checkpoint changes nothing
        second.step(t)
    return [
        (int(digest(own.u)), int(digest(own.worker.z.flatten()))) for own in (whole, first, second)
    ]


@pytest.mark.ranks
@pytest.mark.parametrize("name", ["cubic", "log"])
@pytest.mark.parametrize("stop", range(4, 9))  # before, in, and after the way of a sum
def test_a_run_continues_from_its_state_to_the_same_bits(ranks, name, stop):
    options = {"name": name, "eta": 0.5, "sigma": 0.05, "lam": 1.0, "period": 4}
    found = ranks(2, halves, options, 2, 14, stop)
    assert len({rank[0][0] for rank in found}) == 1, "u differs between ranks"
    for whole, first, second in found:
        assert whole == first == second


def state_of(group, options, delay, steps):
    algorithm = build(group, delay, **options)
    for t in range(steps):
        algorithm.step(t)
    return algorithm.state_dict()


@pytest.mark.ranks
def test_the_state_does_not_depend_on_the_number_of_ranks(ranks):
    options = {"name": "log", "eta": 0.5, "period": 4}
    one, *_ = ranks(1, state_of, options, 2, 6)  # the sum of iteration 4 is on its way
    two = ranks(2, state_of, options, 2, 6)
    assert one["server/late/force"].abs().sum() > 0
    assert (one["server/late/reach"] > 0).all()
    for key, x in one.items():
        parts = [rank[key] for rank in two]
        of_both = torch.cat(parts) if key.startswith("worker/") else parts[0]
        torch.testing.assert_close(of_both, x, rtol=0, atol=1e-12)


# ---- no further collective


class Counting(Solo):
    """A group of one process that counts the minima."""

    minima = 0

    def min_(self, tensor):
        self.minima += tensor.is_floating_point()  # else it is the flag of `raise_together`
        return tensor


def test_no_minimum_follows_a_sum():
    group = Counting()
    options = {"name": "tan", "eta": 0.3, "sigma": 0.05, "lam": 4.0, "period": 3}
    algorithm = build(group, 2, **options)
    for t in range(20):
        algorithm.step(t)
    assert algorithm.cuts.tolist()[0] > 0
    assert group.minima == 0
    plain = build(group, 2, **options)
    plain.server.kernel = choose_kernel(plain.phi, plain.u)  # that of `Consensus`
    for t in range(20):
        plain.step(t)
    assert group.minima > 0, "the line search of Consensus has one"


# ---- steps


def a_block(draw, name):
    """A u, points inside the domain around it, and a direction, all of sizes near the radius."""
    seed = draw(st.integers(0, 2**32))
    generator = torch.Generator().manual_seed(seed)
    eta = draw(st.sampled_from([0.1, 1.0, 30.0]))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    phi = Layerwise(POTENTIALS[name], LAYERS, eta)
    w, d, u = torch.randn(3, 5, 7, generator=generator, dtype=dtype)
    w = w * (draw(st.floats(0.01, 0.999)) * math.sqrt(phi.bound) / phi.reach(w).amax())
    d = d * eta * draw(st.sampled_from([0.0, 1e-3, 1.0, 1e3, 1e15]))
    return phi, w, d[0], u[0] * draw(st.sampled_from([0.0, 1.0, 100.0]))


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from(sorted(BOUND)))
def test_a_step_within_the_reach_is_feasible_and_half_of_the_largest_at_least(data, name):
    phi, w, d, u = a_block(data.draw, name)
    reach = phi.reach(w).amax(0)
    s = phi.step_within(reach, d, u)
    z = u - w
    assert phi.contains(u + s * d - z).all()
    radius = math.sqrt(phi.bound)
    slack = 1e-4 * radius + 40 * torch.finfo(u.dtype).eps * phi.reach(u)
    assert s == 1 or (reach + 2 * s * phi.reach(d) >= radius - slack).any(), "too careful"


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from(sorted(BOUND)))
def test_workers_outside_are_moved_inside_along_their_ray(data, name):
    phi, w, _, u = a_block(data.draw, name)
    w = w * torch.tensor([0.5, 1.5, 4.0, 0.0, 30.0], dtype=w.dtype).unsqueeze(1)
    z, v = u - w, w.clone()
    before, inside = z.clone(), phi.contains(u - z)
    moved = move_inside(z, v, u, phi)
    assert phi.contains(u - z).all()
    assert not (moved & phi.contains(1.01 * (u - before))).any(), "no need to move it"
    assert (moved | inside).all()
    assert torch.equal(z[~moved], before[~moved])
    assert torch.equal(v[~moved], w[~moved])
    for k in moved.nonzero().flatten().tolist():
        ratio = v[k].norm() / w[k].norm()
        assert math.log2(ratio) == pytest.approx(round(math.log2(ratio)), abs=1e-5)
        torch.testing.assert_close(
            u - z[k], ratio * (u - before[k]), rtol=1e-4, atol=float(u.abs().max()) * 1e-5
        )


def test_non_finite_forces_reach_u():
    algorithm = build(Solo(), 1, "log", eta=0.5, period=3)
    algorithm.worker.z[1, 2] = math.nan
    for t in range(3):
        algorithm.step(t)
    assert not algorithm.u.isfinite().all()
