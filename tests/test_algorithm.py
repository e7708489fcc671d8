"""Algorithm 1 against references written here from the paper's formulas, in float64.

The reference is a plain loop over workers with numpy vectors; the code under test runs on real
ranks. Problems are noisy quadratics f_j(z) = |z - a_j|^2 / 2 whose "minibatch" is a fixed sequence
of shifts, so that the answer is known and the same for every layout.
"""

import functools
import math

import numpy as np
import pytest
import scipy.optimize
import torch

from consensus import POTENTIALS, Layerwise
from consensus.algorithm import Consensus, Msgd
from consensus.comm import GroupError, Launch, Solo
from consensus.core.kernels import consensus_kernel, worker_kernel
from consensus.core.kernels.outer_step import FlatOptimizerStep
from consensus.run.build import build_algorithm
from consensus.run.plan import make_plan
from consensus.server import Server, digest
from consensus.worker import Worker

M, N, LAYERS = 4, 7, [(0, 3), (3, 7)]


def shift(worker, t):
    """The noise of worker j's minibatch number t: any fixed bounded sequence will do."""
    return 0.3 * np.sin(np.arange(1, N + 1) * (worker + 1) + 0.7 * t)


def target(worker):
    return np.cos(np.arange(N) * (worker + 2.0))


class Quadratics:
    """Oracle of a block of workers: gradient z - a_j + noise."""

    def __init__(self, workers):
        self.workers = workers
        self.t = 0

    def draw(self):
        self.t += 1
        return self.t - 1

    def gradient(self, points, batch):
        wanted = np.stack([target(j) + shift(j, batch) for j in self.workers])
        return points - torch.from_numpy(wanted)


def start_u():
    return np.linspace(-0.2, 0.2, N)


def start_z():
    return np.stack([start_u() + 0.05 * target(j) for j in range(M)])


def block(group):
    size = M // group.size
    return range(group.rank * size, (group.rank + 1) * size)


def build(
    group,
    name="quad",
    eta=1.0,
    kappa=0.9,
    nu=1e-2,
    momentum_on="loss",
    coupling="explicit",
    u_update="gradient",
    outer=None,
    **options,
):
    workers = block(group)
    phi = Layerwise(POTENTIALS[name], LAYERS, eta)
    u = torch.from_numpy(start_u())
    line_3 = consensus_kernel(u_update, phi, u, group.sum_)
    if outer is not None:
        line_3 = FlatOptimizerStep(line_3, u, "SGD", outer, cut=phi.bounded)
    server = Server(u, phi, group, line_3)
    z = torch.from_numpy(start_z()[workers.start : workers.stop])
    worker = Worker(
        z, Quadratics(workers), phi, kappa=kappa, nu=nu, momentum_on=momentum_on,
        kernel=worker_kernel(coupling, phi, z),
    )  # fmt: skip
    options = {"tau": 0.02, "sigma": 0.02, "lam": 0.2} | options
    return Consensus(server, worker, **options)


def trajectory(group, iterations, kwargs):
    """Run, and bring back u, this rank's z, and the digest that all ranks must share."""
    algorithm = build(group, **kwargs)
    for t in range(iterations):
        algorithm.step(t)
    algorithm.verify()
    u, z = algorithm.u.numpy(), algorithm.worker.z.numpy()
    return u, z, int(digest(algorithm.u)), algorithm.cuts.tolist()


def run(ranks, size, iterations, **kwargs):
    answers = ranks(size, trajectory, iterations, kwargs)
    assert len({answer[2] for answer in answers}) == 1, "u differs between ranks"
    return answers[0][0], np.concatenate([answer[1] for answer in answers])


def layer_gradient(name, eta):
    """Grad phi of one w, from Table 2, layer by layer, without the code under test."""
    slopes = {
        "quad": lambda s: 1.0,
        "cubic": lambda s: 1.5 * np.sqrt(s),
        "tan": lambda s: 1.0 / np.cos(s) ** 2,
        "log": lambda s: 1.0 / (1.0 - s),
        "tan_sep": lambda s: 1.0 / np.cos(s) ** 2,
        "log_sep": lambda s: 1.0 / (1.0 - s),
    }

    def grad(w):
        pieces = []
        for start, stop in LAYERS:
            x = w[start:stop] / eta
            s = x * x if name.endswith("_sep") else float(x @ x)
            pieces.append(2.0 / eta * slopes[name](s) * x)
        return np.concatenate(pieces)

    return grad


def halving(name, eta):
    """The step by trial: 1, 1/2, 1/4, ... until w + s d is inside."""
    bound = {"tan": math.pi / 2, "log": 1.0}.get(name.removesuffix("_sep"), math.inf)

    def sizes(w):
        x = w / eta
        if name.endswith("_sep"):
            return x * x
        return np.array([x[start:stop] @ x[start:stop] for start, stop in LAYERS])

    def step(w, d):
        s = 1.0
        while not (sizes(w + s * d) < bound).all():
            s /= 2
        return s

    return step


def reference(
    iterations,
    name="quad",
    eta=1.0,
    kappa=0.9,
    nu=1e-2,
    tau=0.02,
    sigma=0.02,
    lam=0.2,
    order="gauss_seidel",
    u_step_on="coupling",
    momentum_on="loss",
    period=1,
    local_pull=0.0,
    outer=None,
):
    """Algorithm 1, worker by worker; the line search by trial, as the paper has it.

    With `outer`, u moves by SGD with momentum, and the momentum is cut as u is.
    """
    momentum_of_u = 0.0
    grad = layer_gradient(name, eta)
    halve = halving(name, eta)
    cuts = [0, 0]
    u, z = start_u(), start_z()
    v = np.zeros_like(z)
    for t in range(iterations):
        tau_t, sigma_t, lam_t = (h(t) if callable(h) else h for h in (tau, sigma, lam))
        coupled = t % period == 0
        old = u
        if coupled:
            t_u = tau_t / lam_t if u_step_on == "objective" else tau_t
            d = -t_u * sum(grad(u - z[j]) for j in range(M))
            if outer is not None:
                momentum_of_u = outer["momentum"] * momentum_of_u - d
                d = -outer["lr"] * momentum_of_u
            s = min(halve(u - z[j], d) for j in range(M))
            cuts[0] += s < 1
            momentum_of_u = s * momentum_of_u
            u = u + s * d
        for j in range(M):
            delta = z[j] + kappa * v[j] - target(j) - shift(j, t)
            strength = sigma_t / lam_t if coupled else eta**2 / 2 * local_pull
            force = strength * grad((u if order == "gauss_seidel" else old) - z[j])
            v_new = kappa * v[j] - sigma_t * (delta + nu * z[j])
            if momentum_on == "objective":
                v_new = v_new + force
                d = v_new
            else:
                d = v_new + force
            s = halve(u - z[j], -d)
            cuts[1] += s < 1
            z[j] = z[j] + s * d
            v[j] = s * v_new
    return u, z, cuts


CASES = {
    "to the letter": {},
    "cubic": {"name": "cubic"},
    "tan": {"name": "tan", "eta": 3.0},
    "log": {"name": "log", "eta": 3.0},
    "tan_sep": {"name": "tan_sep", "eta": 2.0},
    "log_sep": {"name": "log_sep", "eta": 3.0},
    "jacobi": {"order": "jacobi"},
    "u on objective": {"u_step_on": "objective"},
    "momentum on objective": {"momentum_on": "objective", "name": "cubic"},
    "period": {"period": 3, "name": "tan", "eta": 3.0},
    "local pull": {"period": 3, "name": "tan", "eta": 3.0, "local_pull": 0.02},
    "local pull, jacobi": {"period": 2, "order": "jacobi", "local_pull": 0.3},
    "optimizer of u": {"outer": {"lr": 0.5, "momentum": 0.7}, "period": 2, "tau": 0.1},
    "optimizer of u, cut": {
        "name": "log",
        "eta": 0.3,
        "sigma": 0.05,
        "lam": 4.0,
        "tau": 0.01,
        "outer": {"lr": 1.0, "momentum": 0.8},
    },
    "no momentum, no R": {"kappa": 0.0, "nu": 0.0},
    "log, cut": {"name": "log", "eta": 0.5, "sigma": 0.05, "lam": 1.0},
    "tan, cut": {"name": "tan", "eta": 0.3, "tau": 0.05, "lam": 1.0, "order": "jacobi"},
    "tan_sep, cut": {"name": "tan_sep", "eta": 0.2, "sigma": 0.1, "lam": 4.0, "period": 2},
    "local pull, cut": {
        "name": "log",
        "eta": 0.3,
        "sigma": 0.05,
        "lam": 2.0,
        "period": 3,
        "local_pull": 0.3,
    },
    "log_sep, cut": {
        "name": "log_sep",
        "eta": 0.3,
        "sigma": 0.05,
        "tau": 0.05,
        "lam": 2.0,
        "momentum_on": "objective",
    },
}


@pytest.mark.ranks
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("case", CASES)
def test_every_variant_equals_the_plain_loop(ranks, size, case):
    # A coupling stiff enough to be cut is unstable: it amplifies rounding a hundredfold or more in
    # each few iterations, so only the beginning of such a run can be compared.
    iterations = {"log, cut": 16, "tan, cut": 5, "tan_sep, cut": 12, "log_sep, cut": 12}
    iterations |= {"local pull, cut": 12, "optimizer of u, cut": 12}
    length = iterations.get(case, 60)
    answers = ranks(size, trajectory, length, CASES[case])
    assert len({answer[2] for answer in answers}) == 1, "u differs between ranks"
    z = np.concatenate([answer[1] for answer in answers])
    expected_u, expected_z, cuts = reference(length, **CASES[case])
    np.testing.assert_allclose(
        answers[0][0], expected_u, rtol=0, atol=1e-9 if case in iterations else 1e-12
    )
    np.testing.assert_allclose(z, expected_z, rtol=0, atol=1e-9 if case in iterations else 1e-12)
    assert answers[0][3][0] == cuts[0]
    assert sum(answer[3][1] for answer in answers) == cuts[1]
    if case.endswith("cut"):
        assert sum(cuts) > 5, "the case is there for its cuts"


def schedule_of(base):
    return lambda t: base / (1.0 + 0.1 * t)


def scheduled_trajectory(group, iterations):
    kwargs = {"tau": schedule_of(0.03), "sigma": schedule_of(0.02), "lam": schedule_of(0.4)}
    return trajectory(group, iterations, kwargs)


@pytest.mark.ranks
def test_tau_sigma_and_lam_may_be_schedules(ranks):
    answers = ranks(2, scheduled_trajectory, 40)
    assert answers[0][2] == answers[1][2]
    expected_u, *_ = reference(
        40, tau=schedule_of(0.03), sigma=schedule_of(0.02), lam=schedule_of(0.4)
    )
    np.testing.assert_allclose(answers[0][0], expected_u, rtol=0, atol=1e-12)


# ----------------------------------------------------------------------------- synchronous EASGD


def easgd(iterations, eta, rho, momentum):
    """Zhang, Choromanska, LeCun 2015: synchronous EASGD, and mEASGD where momentum > 0.

    x_i+ = x_i + v_i+ - alpha (x_i - x~),  v_i+ = momentum v_i - eta g(x_i + momentum v_i),
    x~+ = x~ + alpha sum_i (x_i - x~),     alpha = eta rho, everything from the old iterates.
    """
    alpha = eta * rho
    center, x = start_u(), start_z()
    v = np.zeros_like(x)
    for t in range(iterations):
        difference = x - center
        gradient = np.stack([x[i] + momentum * v[i] - target(i) - shift(i, t) for i in range(M)])
        v = momentum * v - eta * gradient
        x = x + v - alpha * difference
        center = center + alpha * difference.sum(0)
    return center, x


@pytest.mark.ranks
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_easgd_equals_a_hand_written_one(ranks, size, momentum):
    # phi = |w|^2 has the gradient 2 w, so (sigma / lam) 2 = alpha = eta rho: rho = 2 / lam.
    sigma, lam = 0.05, 0.8
    u, z = run(
        ranks,
        size,
        100,
        kappa=momentum,
        nu=0.0,
        tau=sigma,
        sigma=sigma,
        lam=lam,
        order="jacobi",
        u_step_on="objective",
    )
    center, x = easgd(100, sigma, 2.0 / lam, momentum)
    np.testing.assert_allclose(u, center, rtol=0, atol=1e-12)
    np.testing.assert_allclose(z, x, rtol=0, atol=1e-12)


def test_the_easgd_config_is_that_algorithm(make_config):
    config = make_config("algorithm=easgd", "algorithm.sigma=0.02").algorithm
    assert (config.order, config.u_step_on, config.momentum_on) == ("jacobi", "objective", "loss")
    assert config.tau == config.sigma == 0.02


# ------------------------------------------------------------------------------------ closed forms


@pytest.mark.ranks
@pytest.mark.parametrize("size", [1, 2, 4])
def test_quad_with_tau_one_over_two_m_gives_the_mean_of_the_workers(ranks, size):
    """U+ = u - (1 / 2M) sum_j 2 (u - z_j) = mean of the z_j before the step."""
    u, _ = run(ranks, size, 1, tau=1.0 / (2 * M))
    np.testing.assert_allclose(u, start_z().mean(0), rtol=0, atol=1e-15)
    before = reference(30, tau=1.0 / (2 * M))[1]
    u, _ = run(ranks, size, 31, tau=1.0 / (2 * M))
    np.testing.assert_allclose(u, before.mean(0), rtol=0, atol=1e-13)


def test_without_coupling_a_worker_is_torchs_nesterov_sgd():
    """torch keeps the look-ahead point: its parameter is z + kappa v, with v = -lr buf."""
    kappa, sigma = 0.9, 0.05
    for algorithm in (
        build(Solo(), kappa=kappa, nu=0.0, sigma=sigma, lam=math.inf),
        build(Solo(), kappa=kappa, nu=0.0, sigma=sigma, lam=math.inf, momentum_on="objective"),
    ):
        points = [torch.nn.Parameter(torch.from_numpy(z.copy())) for z in start_z()]
        optimizers = [
            torch.optim.SGD([point], lr=sigma, momentum=kappa, nesterov=True) for point in points
        ]
        for t in range(100):
            algorithm.step(t)
            for j, (point, optimizer) in enumerate(zip(points, optimizers, strict=True)):
                wanted = torch.from_numpy(target(j) + shift(j, t))
                optimizer.zero_grad()
                (0.5 * (point - wanted).square().sum()).backward()
                optimizer.step()
            look_ahead = algorithm.worker.z + kappa * algorithm.worker.v
            torch.testing.assert_close(
                look_ahead, torch.stack([p.detach() for p in points]), rtol=0, atol=1e-12
            )


def test_msgd_is_one_uncoupled_worker_and_u_is_its_model():
    phi = Layerwise(POTENTIALS["quad"], LAYERS)
    worker = Worker(torch.from_numpy(start_z()[:1]), Quadratics([0]), phi, kappa=0.9, nu=1e-2)
    algorithm = Msgd(worker, Solo(), sigma=0.02)
    for t in range(50):
        algorithm.step(t)
    expected = reference(50, lam=math.inf)[1][0]  # workers do not see each other
    np.testing.assert_allclose(algorithm.u, expected, rtol=0, atol=1e-13)


# ------------------------------------------------------------------------- communication, failures


class Recorder(Solo):
    """A group of one that notes its collectives."""

    def __init__(self):
        super().__init__()
        self.log = []

    def start_sum(self, tensor):
        self.log.append("start sum")
        pending = super().start_sum(tensor)
        wait = pending.wait

        def noted():
            self.log.append("wait")
            return wait()

        pending.wait = noted
        return pending

    def min_(self, tensor):
        self.log.append("min")
        return super().min_(tensor)


@pytest.mark.parametrize("order", ["gauss_seidel", "jacobi"])
def test_the_sum_travels_while_the_gradient_is_computed(order):
    group = Recorder()
    algorithm = build(group, order=order)
    gradient = algorithm.worker.oracle.gradient
    algorithm.worker.oracle.gradient = lambda *a: group.log.append("gradient") or gradient(*a)
    algorithm.step(0)
    assert group.log == ["start sum", "gradient", "wait"], "and there is no other collective"


@pytest.mark.parametrize(("reach", "asked"), [(0.2, []), (0.95, ["min"])])
def test_a_bounded_domain_costs_a_minimum_near_its_boundary_alone(reach, asked):
    w = start_u() - start_z()
    farthest = max(np.linalg.norm(w[:, a:b], axis=1).max() for a, b in LAYERS)
    group = Recorder()
    eta = farthest / (reach * math.sqrt(math.pi / 2))
    algorithm = build(group, name="tan", eta=eta, period=2, tau=1e-6, sigma=1e-6)
    group.log.clear()
    algorithm.step(0)
    assert group.log == ["start sum", "wait", *asked]
    algorithm.step(1)
    assert group.log == ["start sum", "wait", *asked], "between communications nothing is sent"


def flip_a_bit(group, where):
    algorithm = build(group)
    for t in range(5):
        algorithm.step(t)
    algorithm.verify()
    if group.rank in where:
        bits = algorithm.server.u.view(torch.int64)
        bits[3] ^= 1
    try:
        algorithm.verify()
    except GroupError as error:
        return str(error)
    return None


@pytest.mark.ranks
@pytest.mark.parametrize("size", [2, 4])
def test_one_flipped_bit_in_one_replica_is_caught_by_all_ranks(ranks, size):
    wrong = [size - 1]
    answers = ranks(size, flip_a_bit, wrong)
    assert answers == [f"u on rank {wrong} differs from u on rank 0: the replicas diverged"] * size
    assert ranks(size, flip_a_bit, []) == [None] * size


def infeasible(group):
    workers = block(group)
    z = torch.from_numpy(start_z()[workers.start : workers.stop].copy())
    if 2 in workers:
        z[2 - workers.start] += 5.0
    phi = Layerwise(POTENTIALS["log"], LAYERS)
    worker = Worker(z, Quadratics(workers), phi)
    server = Server(torch.from_numpy(start_u()), phi, group)
    try:
        Consensus(server, worker, tau=0.1, sigma=0.1, lam=0.1)
    except GroupError as error:
        return str(error)
    return None


@pytest.mark.ranks
@pytest.mark.parametrize("size", [1, 2, 4])
def test_an_infeasible_start_is_an_error_on_all_ranks(ranks, size):
    message = (
        f"rank {2 // (M // size)}: u - z_j is outside the domain of the potential for worker [2]"
    )
    assert ranks(size, infeasible) == [message] * size


# -------------------------------------------------------------------------------- staying feasible


STIFF = 75  # iterations


def feasible_run(group, name, dtype, period, compress):
    """Stiff iterations; how far inside the domain the stored iterates are, and the cuts."""
    if compress is not None:
        group._shared_memory, group._compress = False, compress
    workers = block(group)
    torch.manual_seed(0)
    phi = Layerwise(POTENTIALS[name], LAYERS, 0.5)
    u = torch.from_numpy(start_u()).to(dtype)

    class Rough(Quadratics):
        def gradient(self, points, batch):  # steep enough to hit the boundary again and again
            return 40.0 * super().gradient(points.double(), batch).to(dtype)

    worst, asked, smallest = 0.0, 0, group.min_

    def counting(step):
        nonlocal asked
        asked += 1
        return smallest(step)

    group.min_ = counting
    worker = Worker(u.repeat(len(workers), 1), Rough(workers), phi, kappa=0.9)
    algorithm = Consensus(
        Server(u, phi, group), worker, tau=0.005, sigma=0.005, lam=0.1, period=period
    )
    asked = 0  # without that of the start
    for t in range(STIFF):
        algorithm.step(t)
        w = algorithm.u.double() - worker.z.double()  # exact differences of the stored numbers
        x = (w / 0.5).square()
        layers = [x[:, a:b].sum(1) for a, b in LAYERS]
        sizes = x if name.endswith("_sep") else torch.stack(layers)
        worst = max(worst, float(sizes.max()))
    group.min_ = smallest
    algorithm.verify()
    return worst, algorithm.cuts.tolist(), int(digest(algorithm.u)), asked


@pytest.mark.ranks
@pytest.mark.parametrize("name", ["tan", "tan_sep", "log", "log_sep"])
@pytest.mark.parametrize(
    ("size", "dtype", "period", "compress"),
    [
        (1, torch.float32, 1, None),
        (2, torch.float32, 1, None),
        (2, torch.float32, 1, "bf16"),
        (2, torch.float32, 1, "int8"),
        (4, torch.float32, 5, "int8"),
        (2, torch.float64, 1, None),
        (4, torch.float32, 5, None),
    ],
)
def test_every_stored_iterate_is_strictly_feasible(ranks, name, size, dtype, period, compress):
    answers = ranks(size, feasible_run, name, dtype, period, compress)
    assert len({answer[2] for answer in answers}) == 1
    bound = 1.0 if name.startswith("log") else math.pi / 2
    assert max(answer[0] for answer in answers) < bound
    assert sum(answer[1][1] for answer in answers) > 10, "the boundary was never met: no test"
    assert len({answer[1][0] for answer in answers}) == 1, "s_u is the same on all ranks"
    (asked,) = {answer[3] for answer in answers}
    if size > 1:  # the second collective: where u may have to be cut, and nowhere else
        assert answers[0][1][0] <= asked < STIFF // period


# ------------------------------------------------------------------ implicit coupling, exact u


def prox_by_bisection(name, eta, b, step):
    """The w with w + step grad phi(w) = b: along b in each layer, or coordinate, by bisection."""
    grad = layer_gradient(name, eta)
    parts = LAYERS if not name.endswith("_sep") else [(i, i + 1) for i in range(N)]
    w = np.zeros(N)
    for start, stop in parts:
        ray = np.zeros(N)
        ray[start:stop] = b[start:stop]
        low, high = 0.0, 1.0
        for _ in range(60):  # to 2^-60 of the ray
            middle = 0.5 * (low + high)
            inside = halving(name, eta)(np.zeros(N), middle * ray) == 1.0
            short = inside and (middle * ray + step * grad(middle * ray) - ray) @ ray < 0
            low, high = (middle, high) if short else (low, middle)
        w += low * ray
    return w


def exact_u(name, eta, z, u):
    """The root of sum_j grad phi(u - z_j), by SciPy."""
    grad = layer_gradient(name, eta)
    found = scipy.optimize.root(lambda u: sum(grad(u - zj) for zj in z), u, tol=1e-14)
    return found.x


@functools.cache
def implicit_reference(iterations, name, eta, lam, u_update="gradient", momentum_on="loss"):
    kappa, nu, sigma, tau = 0.9, 1e-2, 0.02, 0.02
    grad = layer_gradient(name, eta)
    u, z = start_u(), start_z()
    v = np.zeros_like(z)
    for t in range(iterations):
        if u_update == "exact":
            u = exact_u(name, eta, z, u)
        else:
            u = u - tau * sum(grad(u - z[j]) for j in range(M))
        for j in range(M):
            delta = z[j] + kappa * v[j] - target(j) - shift(j, t)
            v[j] = kappa * v[j] - sigma * (delta + nu * z[j])
            moved = u - prox_by_bisection(name, eta, u - z[j] - v[j], sigma / lam)
            if momentum_on == "objective":
                v[j] = moved - z[j]
            z[j] = moved
    return u, z


IMPLICIT = {
    "quad, stiff": {"name": "quad", "eta": 1.0, "lam": 1e-4, "u_update": "exact"},
    "cubic": {"name": "cubic", "eta": 1.0, "lam": 0.2},
    "tan, stiff": {"name": "tan", "eta": 0.5, "lam": 2.5e-3, "u_update": "exact"},
    "log_sep, stiff": {"name": "log_sep", "eta": 0.5, "lam": 2.5e-3, "u_update": "exact"},
    "tan_sep, through the momentum": {
        "name": "tan_sep",
        "eta": 2.0,
        "lam": 0.1,
        "momentum_on": "objective",
    },
}


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("case", "size"),
    [*((case, 1) for case in IMPLICIT), ("tan, stiff", 2), ("log_sep, stiff", 4)],
)
def test_implicit_coupling_equals_the_plain_loop(ranks, size, case):
    own = IMPLICIT[case]
    answers = ranks(size, trajectory, 30, own | {"coupling": "implicit"})
    assert len({answer[2] for answer in answers}) == 1, "u differs between ranks"
    z = np.concatenate([answer[1] for answer in answers])
    expected_u, expected_z = implicit_reference(30, **own)
    np.testing.assert_allclose(answers[0][0], expected_u, rtol=0, atol=1e-8)
    np.testing.assert_allclose(z, expected_z, rtol=0, atol=1e-8)
    assert answers[0][3] == [0, 0], "an implicit step is never cut"


@pytest.mark.parametrize("name", ["quad", "tan", "log"])
def test_where_the_explicit_step_diverges_the_implicit_one_does_not(name):
    """A stiffness of 2 sigma / lam = 16 per worker, far beyond what an explicit step bears."""
    stiff = {"name": name, "lam": 2.5e-3, "kappa": 0.0}
    explicit = build(Solo(), **stiff)
    implicit = build(Solo(), **stiff, coupling="implicit", u_update="exact")
    middle = np.mean([target(j) for j in range(M)], 0)  # about where quadratics agree
    way = []
    for t in range(200):
        explicit.step(t)
        implicit.step(t)
        if t % 40 == 39:  # a period of the noise or more
            way.append(float(np.abs(implicit.u.numpy() - middle).max()))
    assert way == sorted(way, reverse=True)
    assert implicit.cuts.tolist() == [0, 0]
    far = np.abs(explicit.u.numpy() - middle).max()
    assert not far < 10 or explicit.cuts.sum() > 100


# ---------------------------------------------------------- one run, however it is laid out (M = 4)


def layout(group, config):
    """U after the run, and the indices that worker j drew first and last."""
    plan = make_plan(config, Launch(group.rank, group.size, group.rank, group.size))
    algorithm = build_algorithm(plan, group)
    for t in range(config.algorithm.iterations):
        algorithm.step(t)
    drawn = [source.draw().tolist() for source in plan.oracle.minibatches]
    algorithm.verify()
    return algorithm.u.numpy(), drawn, int(digest(algorithm.u)), algorithm.cuts.tolist()


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        # Mild couplings: where the explicit step is unstable, rounding is amplified without bound.
        ["model=lenet5", "algorithm.iterations=20", "potential=tan", "data.partition=label_skew"],
        [
            *("model=logistic", "algorithm.iterations=200", "algorithm.period=3"),
            *("potential=log_sep", "data.partition=sharded"),
        ],
    ],
)
def test_four_workers_are_one_run_on_one_two_or_four_processes(ranks, make_config, overrides):
    config = make_config("workers=4", "dtype=float64", *overrides)
    runs = {size: ranks(size, layout, config, timeout=300.0) for size in (1, 2, 4)}
    for answers in runs.values():
        assert len({answer[2] for answer in answers}) == 1
    drawn = {size: [d for a in answers for d in a[1]] for size, answers in runs.items()}
    assert drawn[1] == drawn[2] == drawn[4], "worker j draws the same minibatches everywhere"
    for size in (2, 4):
        np.testing.assert_allclose(runs[size][0][0], runs[1][0][0], rtol=0, atol=1e-9)
    start = make_plan(config, Launch()).start
    assert np.abs(runs[1][0][0] - start.numpy()).max() > 1e-2, "nothing was trained"


# ---- where it comes to rest


class NoiselessQuadratics(Quadratics):
    def gradient(self, points, batch):
        return points - torch.from_numpy(np.stack([target(j) for j in self.workers]))


@pytest.mark.parametrize(
    ("potential", "kwargs", "factor"),
    [
        ("log", {"momentum_on": "loss"}, 10.0),
        ("log", {"momentum_on": "objective"}, 1.0),
        ("tan", {"momentum_on": "loss", "kappa": 0.0}, 1.0),
        ("quad", {"momentum_on": "loss", "order": "jacobi", "u_step_on": "objective"}, 10.0),
        ("tan", {"momentum_on": "loss", "coupling": "implicit", "u_update": "exact"}, 10.0),
        ("quad", {"momentum_on": "loss", "period": 3}, 30.0),
        ("quad", {"momentum_on": "objective", "period": 3}, 3.0),
        # sigma / lam = 0.06 once and local_pull / 2 = 0.03 twice: twice the pull of one period
        ("quad", {"momentum_on": "loss", "period": 3, "local_pull": 0.06}, 15.0),
    ],
    ids=[
        *("mEASGD", "objective", "plain", "jacobi", "implicit", "period", "objective-period"),
        "local_pull",
    ],
)
def test_it_rests_where_15_is_stationary_for_lam_at_rest(potential, kwargs, factor):
    """grad f_j(z_j) = grad phi(u - z_j) / lam_at_rest, with momentum not the lam that was given."""
    lam, nu, periodic = 0.5 / factor, 1e-2, "period" in kwargs
    # The error of a period is proportional to the step; an implicit step may be long.
    step = 2e-3 if periodic else 2e-2 if "coupling" in kwargs else 6e-3
    algorithm = build(Solo(), potential, lam=lam, nu=nu, sigma=step, tau=step, **kwargs)
    worker = algorithm.worker
    worker.oracle = NoiselessQuadratics(range(M))
    # The implicit step takes the longest: after 240 of them u moves by less than 1e-6 in 20.
    for t in range(250 if "coupling" in kwargs else round(12.0 / step)):
        algorithm.step(t)
    assert algorithm.lam_at_rest(0) == pytest.approx(0.5, rel=1e-12)
    z = worker.z.numpy()
    # Between two communications the z_j move; else they rest, at the gradients of (16).
    ahead = 0.0 if periodic else worker.kappa * worker.v.numpy()
    own = z + ahead - np.stack([target(j) for j in range(M)]) + nu * z
    force = algorithm.phi.grad(algorithm.u - worker.z).numpy() / 0.5
    assert np.abs(own).max() > 0.5, "the targets differ, so that the forces do not vanish"
    tolerance = 0.01 if periodic else 1e-3
    np.testing.assert_allclose(force, own, rtol=0, atol=tolerance * np.abs(own).max())
    assert np.abs(force.sum(0)).max() < tolerance * np.abs(own).max()
