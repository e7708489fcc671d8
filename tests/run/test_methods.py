"""The named averaging methods against loops that are written here, in float64.

The loops differ from those of the textbooks by one displacement. There a worker moves by v_j, then
all are averaged. In Algorithm 1 the mean is that of the z_j before this move, so that its sum can
be formed while the gradients are computed, and every worker makes its move from the new center.
EASGD is published with this order. The model is logistic regression, whose gradient has a closed
form.
"""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from consensus.comm import Launch, Solo
from consensus.run.build import build_algorithm
from consensus.run.plan import make_plan
from consensus.sweep.__main__ import can_be_member

SIGMA, KAPPA, NU, H, LENGTH = 0.004, 0.8, 1e-3, 4, 30
SMALL = [
    *("model=logistic", "device=cpu", "dtype=float64", "algorithm.batch_size=4"),
    *(f"algorithm.sigma={SIGMA}", f"algorithm.momentum={KAPPA}", f"algorithm.weight_decay={NU}"),
    *(f"algorithm.iterations={LENGTH}", f"algorithm.period={H}"),
]
STRIDES = [1, 2, 3, 7]  # with H = 4, workers at rest also take part in communications
SLOW = f"algorithm.step_every={STRIDES}"
HEAVY_BALL = f"{{optimizer: SGD, lr: {SIGMA}, momentum: {KAPPA}, weight_decay: {NU}}}"
METHODS = {  # overrides, M
    "local_sgd": (["algorithm=local_sgd"], 4),
    "fedprox": (["algorithm=fedprox", "algorithm.local_pull=0.05"], 4),
    "lookahead": (["algorithm=lookahead"], 1),
    "lookahead of a mean": (["algorithm=lookahead", "algorithm.outer=0.3"], 4),
    "diloco": (["algorithm=diloco", "algorithm.outer.lr=0.6", "algorithm.outer.momentum=0.8"], 4),
    "adam": (["algorithm.outer={optimizer: Adam, lr: 0.01}", "algorithm.pull=1"], 4),
    "momentum": (
        ["algorithm.outer={optimizer: SGD, lr: 0.6, momentum: 0.8}", "algorithm.pull=1"],
        4,
    ),
    "one-sided data": (["algorithm=local_sgd", "data.partition=label_skew"], 4),
    "a class each": (["algorithm=local_sgd", "data.partition=by_label"], 10),
    "easgd": (["algorithm=easgd", "algorithm.pull=0.1", "algorithm.momentum=0"], 4),
    "measgd": (["algorithm=easgd", "algorithm.pull=0.1"], 4),
    "measgd, heavy ball": (
        [
            *("algorithm=easgd", "algorithm.pull=0.1", f"algorithm.optimizer={HEAVY_BALL}"),
            *("algorithm.momentum=0", "algorithm.weight_decay=0"),
        ],
        4,
    ),
    "local_sgd, stragglers": (["algorithm=local_sgd", SLOW], 4),
    "fedprox, stragglers": (["algorithm=fedprox", "algorithm.local_pull=0.05", SLOW], 4),
    "diloco, stragglers": (
        ["algorithm=diloco", "algorithm.outer.lr=0.6", "algorithm.outer.momentum=0.8", SLOW],
        4,
    ),
    "measgd, stragglers": (["algorithm=easgd", "algorithm.pull=0.1", SLOW], 4),
    "heavy ball, stragglers": (
        [
            *("algorithm=easgd", "algorithm.pull=0.1", f"algorithm.optimizer={HEAVY_BALL}"),
            *("algorithm.momentum=0", "algorithm.weight_decay=0", SLOW),
        ],
        4,
    ),
}


class Mean:
    """Local SGD and FedProx: the center is the mean of the copies."""

    def __call__(self, u, mean):
        return mean


class Part:
    """Lookahead: the center moves by a part of the way."""

    def __init__(self, part):
        self.part = part

    def __call__(self, u, mean):
        return u + self.part * (mean - u)


class Momentum:
    """DiLoCo and FedAvgM: SGD with momentum, as torch defines it, of Nesterov's form or not."""

    buffer = 0.0

    def __init__(self, nesterov):
        self.nesterov = nesterov

    def __call__(self, u, mean):
        self.buffer = 0.8 * self.buffer + (u - mean)
        return u - 0.6 * (u - mean + 0.8 * self.buffer if self.nesterov else self.buffer)


class Adam:
    """FedAdam (Reddi et al. 2021), with the defaults of torch."""

    steps, first, second = 0, 0.0, 0.0

    def __call__(self, u, mean):
        self.steps += 1
        self.first = 0.9 * self.first + 0.1 * (u - mean)
        self.second = 0.999 * self.second + 0.001 * (u - mean) ** 2
        root = np.sqrt(self.second / (1 - 0.999**self.steps)) + 1e-8
        return u - 0.01 * self.first / (1 - 0.9**self.steps) / root


def averaging(plan, center_of=Mean, local=0.0, strides=()):
    """u and the copies after LENGTH iterations, where the copies continue from u.

    Worker j makes a step in every `strides[j]`-th iteration, by default in each.
    """
    move_center, gradient = center_of(), gradients(plan)
    u = plan.start.numpy().copy()
    z = np.tile(u, (plan.num_workers, 1))
    v = np.zeros_like(z)
    for t in range(LENGTH):
        communicate = t % H == 0
        if communicate:
            u = move_center(u, z.mean(0))
        for j in range(plan.num_workers):
            if strides and t % strides[j]:
                z[j] = u if communicate else z[j]
                continue
            g = gradient(j, z[j] + KAPPA * v[j])
            v[j] = KAPPA * v[j] - SIGMA * (g + NU * z[j])
            z[j] = (u if communicate else z[j] + local * (u - z[j])) + v[j]
    return u, z


def elastic(plan, kappa=KAPPA, nesterov=True, strides=(1,) * 4):
    """The center and the copies of EASGD and EAMSGD (Zhang, Choromanska, LeCun 2015)."""
    alpha, gradient = 0.1, gradients(plan)
    center = plan.start.numpy().copy()
    x = np.tile(center, (plan.num_workers, 1))
    v = np.zeros_like(x)
    for t in range(LENGTH):
        elastic_force = alpha * (x - center) if t % H == 0 else np.zeros_like(x)
        moved = np.zeros_like(x)
        for i in range(plan.num_workers):
            if t % strides[i] == 0:
                g = gradient(i, x[i] + kappa * v[i] if nesterov else x[i])
                moved[i] = v[i] = kappa * v[i] - SIGMA * (g + NU * x[i])
        x = x + moved - elastic_force
        center = center + elastic_force.sum(0)
    return center, x


LOOPS = {
    "local_sgd": averaging,
    "fedprox": partial(averaging, local=0.05),
    "lookahead": partial(averaging, center_of=lambda: Part(0.5)),
    "lookahead of a mean": partial(averaging, center_of=lambda: Part(0.3)),
    "diloco": partial(averaging, center_of=lambda: Momentum(nesterov=True)),
    "adam": partial(averaging, center_of=Adam),
    "momentum": partial(averaging, center_of=lambda: Momentum(nesterov=False)),
    "one-sided data": averaging,
    "a class each": averaging,
    "easgd": partial(elastic, kappa=0.0),
    "measgd": elastic,
    "measgd, heavy ball": partial(elastic, nesterov=False),
    "local_sgd, stragglers": partial(averaging, strides=STRIDES),
    "fedprox, stragglers": partial(averaging, local=0.05, strides=STRIDES),
    "diloco, stragglers": partial(
        averaging, center_of=lambda: Momentum(nesterov=True), strides=STRIDES
    ),
    "measgd, stragglers": partial(elastic, strides=STRIDES),
    "heavy ball, stragglers": partial(elastic, nesterov=False, strides=STRIDES),
}


def one_draw_a_step(config):
    """The plan for a loop, which draws a minibatch in a step of a worker only."""
    algorithm = replace(config.algorithm, step_every=None)
    return make_plan(replace(config, algorithm=algorithm), Launch())


def gradients(plan):
    """The function (j, point) -> gradient at the point, of the next minibatch of worker j."""
    train = plan.dataset.train
    images, labels = train.inputs.flatten(1).numpy(), train.targets.numpy()

    def gradient(j, point):
        chosen = plan.oracle.minibatches[j].draw().numpy()
        return of_logistic(point, images[chosen], labels[chosen])

    return gradient


def of_logistic(point, x, labels):
    """The gradient of the cross entropy, summed over images x (B, 784)."""
    weight, bias = point[:7840].reshape(10, 784), point[7840:]
    logits = x @ weight.T + bias
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    p[np.arange(len(labels)), labels] -= 1.0
    return np.concatenate([(p.T @ x).ravel(), p.sum(0)])


def through_the_trainer(group, configs):
    """U, this rank's copies, and the digest that all ranks share, for each config."""
    found = []
    for config in configs:
        plan = make_plan(config, Launch(group.rank, group.size, group.rank, group.size))
        algorithm = build_algorithm(plan, group)
        for t in range(LENGTH):
            algorithm.step(t)
        found.append((algorithm.u.numpy(), algorithm.worker.z.numpy(), algorithm.verify()))
    return found


def config_of(make_config, method):
    overrides, workers = METHODS[method]
    return make_config(*SMALL, f"workers={workers}", *overrides)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_its_loop(make_config, method):
    config = config_of(make_config, method)
    u, z = LOOPS[method](one_draw_a_step(config))
    ((found_u, found_z, _),) = through_the_trainer(Solo(), [config])
    np.testing.assert_allclose(found_u, u, rtol=0, atol=1e-12)
    np.testing.assert_allclose(found_z, z, rtol=0, atol=1e-12)
    assert np.abs(u - make_plan(config, Launch()).start.numpy()).max() > 0.01


@pytest.mark.ranks
def test_methods_on_two_ranks(make_config, ranks):
    alike = {"adam", "momentum", "one-sided data", "easgd"}  # as another of them, over ranks
    alike |= {"local_sgd, stragglers", "diloco, stragglers"}
    methods = [name for name, (_, workers) in METHODS.items() if workers > 1 and name not in alike]
    configs = [config_of(make_config, method) for method in methods]
    first, second = ranks(2, through_the_trainer, configs)
    for method, config, one, other in zip(methods, configs, first, second, strict=True):
        assert one[2] == other[2], "u differs between ranks"
        u, z = LOOPS[method](one_draw_a_step(config))
        np.testing.assert_allclose(one[0], u, rtol=0, atol=1e-12)
        np.testing.assert_allclose(np.concatenate([one[1], other[1]]), z, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", ["local_sgd", "fedprox", "lookahead", "diloco"])
def test_a_method_continues_to_the_same_bits(train, tmp_path, method):
    own = [f"algorithm={method}", "potential=quad", "algorithm.period=4", "output.eval_every=30"]
    whole = train(*own, f"output.run_dir={tmp_path}/whole")
    train(*own, "algorithm.iterations=6", f"output.run_dir={tmp_path}/a")
    again = train(*own, "resume=auto", f"output.run_dir={tmp_path}/a")
    assert torch.equal(again.algorithm.u, whole.algorithm.u)
    assert torch.equal(again.algorithm.worker.z, whole.algorithm.worker.z)
    if method == "diloco":
        (state,) = again.algorithm.server.kernel.optimizer.state.values()
        assert state["momentum_buffer"].norm() > 0


def test_a_name_refuses_what_is_another_method(make_config, refusal):
    free = "(algorithm=consensus is free)"
    for overrides, key, value, allowed in [
        (["algorithm=local_sgd", "algorithm.pull=0.5"], "pull", "0.5", "1 for algorithm=local_sgd"),
        (["algorithm=fedprox", "algorithm.outer=0.5"], "outer", "0.5", "1 for algorithm=fedprox"),
        (
            ["algorithm=lookahead", "algorithm.local_pull=0.1"],
            *("local_pull", "0.1", "0 for algorithm=lookahead"),
        ),
        (
            ["algorithm=local_sgd", "algorithm.order=jacobi"],
            *("order", "jacobi", "gauss_seidel for algorithm=local_sgd"),
        ),
        (
            ["algorithm=lookahead", "algorithm.outer=null"],
            *("tau", "0.005", "null for algorithm=lookahead"),
        ),
        (
            ["algorithm=diloco", "algorithm.outer=1"],
            *("outer", "1.0", "{optimizer: NAME, OPTION: VALUE} for algorithm=diloco"),
        ),
        (
            ["algorithm=local_sgd", "algorithm.outer={optimizer: SGD}"],
            *("outer", "{'optimizer': 'SGD'}", "a number for algorithm=local_sgd"),
        ),
    ]:
        assert refusal(*overrides) == f"`algorithm.{key}` is {value}; allowed: {allowed} {free}"
    assert refusal("algorithm=local_sgd", "potential=tan").startswith("`potential` is tan; ")
    assert "algorithm.pull = 1.0" in refusal("algorithm=local_sgd", "algorithm.lam=0.1")
    assert make_config("algorithm=lookahead", "algorithm.outer=0.8").algorithm.outer == 0.8


def test_optimizers_of_u_that_cannot_be_made(refusal):
    for outer, line in {
        "{optimizer: Nope}": "`optimizer` is Nope; allowed: the name of a class in torch.optim",
        "{optimizer: SGD, lr: -1}": "SGD refuses its options: Invalid learning rate: -1",
        "{optimizer: LBFGS}": "LBFGS cannot step over one flat vector (",
        "{optimizer: Muon}": "Muon refuses its options: ",
    }.items():
        if "Muon" in outer and not hasattr(torch.optim, "Muon"):
            continue  # torch before 2.9
        found = refusal(f"algorithm.outer={outer}")
        assert found.startswith("`algorithm.outer` is {'optimizer': ")
        assert f"}}: {line}" in found
    assert refusal("algorithm.outer={lr: 1}").startswith(
        "`algorithm.outer` is {'lr': 1}; allowed: "
    )


def test_a_population_leaves_optimizers_of_u_to_separate_runs(make_config):
    assert can_be_member(make_config("algorithm=local_sgd"))
    assert not can_be_member(make_config("algorithm=diloco"))


def test_the_plan_shows_the_optimizer(make_config):
    line = make_plan(config_of(make_config, "diloco"), Launch()).description()
    assert line.endswith(
        "30 iterations, pull 1, outer SGD(lr=0.6, momentum=0.8, nesterov=True), period 4"
    )
