"""Random runs against an independent plain implementation of Algorithm 1, iteration by iteration.

Each case is a command line of legal values for a tiny problem, logistic regression in two layers.
It is composed and checked as those of users are, and stepped without a trainer. u, every z_j and
v_j, the cuts and the evaluated numbers are compared with tests/testing/plain_run.py.

How far two correct implementations may differ is measured and not assumed: the plain run is
repeated with its start and its iterates moved by one rounding. `FACTOR` times its largest deviation
so far is allowed. A case in which that is no longer small, or the cuts differ, is ill-conditioned:
it is compared up to there.

    CONSENSUS_CASES=5000 CONSENSUS_FIRST_CASE=1000 pytest -n 0 -s tests/test_differential.py
"""

import math
import multiprocessing
import os
import shlex
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import nn

from consensus.comm import Launch, Solo
from consensus.core import kernels, sizes
from consensus.core.kernels import native
from consensus.core.kernels.tiled import Tiled
from consensus.problem import DATASETS, MODELS, Dataset, Minibatches
from consensus.run.build import build_algorithm
from consensus.run.compose import config_dir, register_schema, to_config
from consensus.run.metrics import measure
from consensus.run.plan import make_plan
from tests.testing.plain_run import Logistic, PlainRun

CASES = int(os.environ.get("CONSENSUS_CASES", "150"))
FIRST = int(os.environ.get("CONSENSUS_FIRST_CASE", "0"))
PARTS = 3  # for workers of pytest-xdist
ON_RANKS = 24  # cases on two processes

FACTOR = 30.0  # of the deviation of the perturbed plain runs
LOST = 1e-4  # a relative deviation that is allowed: beyond, the case is ill-conditioned
PERTURBED = 3
COMPARED = ("u", "z", "v", "objective")

WIDTHS, CLASSES, SAMPLES = (3, 4), 3, 32  # 12 + 15 parameters
TILE = 8  # coordinates that a cache holds, in the cases with a large vector


# ---- the problem


class TwoParts(nn.Module):
    """Logistic regression whose weights are two layers, each for some of the features."""

    def __init__(self, num_classes: int = CLASSES) -> None:
        super().__init__()
        self.first, self.second = (nn.Linear(width, num_classes) for width in WIDTHS)

    def forward(self, images):
        left, right = images.flatten(1).split(WIDTHS, 1)
        return self.first(left) + self.second(right)


def samples(seed):
    random = np.random.default_rng(seed)
    x = random.standard_normal((SAMPLES, sum(WIDTHS))).astype(np.float32)
    return x, random.integers(0, CLASSES, SAMPLES)


def tiny(root: str = "") -> Dataset:
    x, labels = (torch.from_numpy(part) for part in samples(7))
    return Dataset((x[:, None, None], labels), (x[:9, None, None], labels[:9]), CLASSES)


ENTRIES = ((MODELS, "two_parts", TwoParts), (DATASETS, "tiny", tiny))
if multiprocessing.parent_process() is not None:  # a rank; others look at the tables as they are
    for table, name, factory in ENTRIES:
        table.register(name)(factory)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    for table, name, factory in ENTRIES:
        monkeypatch.setitem(table._factories, name, factory)


# ---- random command lines


POTENTIALS = {
    "quad": {},
    "cubic": {"eps": [0.0, 0.5]},
    "tan": {},
    "tan_sep": {},
    "log": {},
    "log_sep": {},
    "scaled_quad": {"weight": [0.5, 2.0, [0.5, 3.0]]},
    "pseudo_huber": {"separable": [True, False]},
    "huber": {"separable": [True, False]},
    "log_cosh": {"separable": [True, False]},
    "power": {"p": [1.5, 2, 2.5, 4.0], "eps": [0.0, 0.7], "separable": [True, False]},
}
BOUNDED = ("tan", "tan_sep", "log", "log_sep")
SCHEDULES = {
    "linear": {"final": [0.3, 2.0], "warmup": [0, 2]},
    "cosine": {"final": [0.1, 1.5], "warmup": [0, 3]},
    "step": {"every": [1, 3], "factor": [0.5, 1.2]},
}
METHODS = ("easgd", "msgd", "local_sgd", "fedprox", "lookahead", "diloco")


class Draw:
    """A random command line; the same for a seed."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.says: dict[str, object] = {}
        self.large = self.now_and_then(3)  # through the code for vectors beyond a cache
        self.method = self.one(METHODS) if self.now_and_then(4) else "consensus"
        often = [*POTENTIALS, *BOUNDED]
        self.potential = self.one(often) if self.method == "consensus" else "quad"
        self.potential_options()
        free = self.method == "consensus"
        self.says |= {
            "workers": self.one([1, 2, 2, 3, 4]),
            "seed": int(self.random.integers(1000)),
            "dtype": self.one(["float64"] * 3 + ["float32"]),
            "data.partition": self.one(["full", "sharded"]),
            "algorithm.iterations": self.one(range(3, 10)),
            "algorithm.batch_size": self.one(range(1, 7)),
            "algorithm.momentum": self.one([0, 0.5, 0.9]),
            "algorithm.weight_decay": self.one([0, 1e-4, 0.1]),
            "algorithm.loss_reduction": self.one(["sum", "mean"]),
            "algorithm.sigma": self.between(1e-3, 0.1),
        }
        if free:
            self.says |= {
                "algorithm.order": self.one(["gauss_seidel", "jacobi"]),
                "algorithm.momentum_on": self.one(["loss", "objective"]),
            }
        if self.method != "msgd":
            self.says["algorithm.period"] = self.one([1, 1, 2, 3])
        self.coupling()
        last = self.says.get("algorithm.period", 1) - 1
        if last and "algorithm.u_update" not in self.says and self.now_and_then(2):
            self.says["algorithm.delay"] = self.one(range(1, last + 1))
        for name in ("sigma", "tau", "lam"):
            rate = {"lam": "pull", "tau": "outer"}.get(name, "")
            theirs = self.method in METHODS and name != "sigma"
            if self.now_and_then(4) and not theirs and f"algorithm.{rate}" not in self.says:
                self.schedule(name)

    def one(self, values):
        values = list(values)
        return values[self.random.integers(len(values))]

    def now_and_then(self, odds):
        return self.random.random() < 1 / odds

    def between(self, low, high):
        return float(f"{math.exp(self.random.uniform(math.log(low), math.log(high))):.4g}")

    def potential_options(self):
        narrow = self.potential in BOUNDED and not self.now_and_then(4)  # steps reach the boundary
        width = self.between(0.01, 0.15) if narrow else self.between(0.1, 3.0)
        self.says["potential.eta"] = 1.0 if self.now_and_then(6) else width
        for option, values in POTENTIALS[self.potential].items():
            if self.now_and_then(2):
                self.says[f"potential.options.{option}"] = self.one(values)

    def schedule(self, name):
        kind = self.one(SCHEDULES)
        self.says[f"algorithm.schedule.{name}.name"] = kind
        for option, values in SCHEDULES[kind].items():
            self.says[f"+algorithm.schedule.{name}.options.{option}"] = self.one(values)

    def coupling(self):
        """The strengths, in letters or as rates, mostly where a quadratic coupling is stable."""
        says, workers = self.says, self.says["workers"]
        half = says["potential.eta"] ** 2 / 2
        pull, outer = self.between(0.01, 1.2), self.between(0.05, 1.5)
        lam = float(f"{says['algorithm.sigma'] / (half * pull):.4g}")
        tau = float(f"{outer * half / workers:.4g}")
        optimizer = f"{{optimizer: SGD, lr: {self.between(0.1, 1)}, momentum: 0.6}}"
        nesterov = optimizer.replace("}", ", nesterov: true}")
        if self.method == "consensus":
            self.free_coupling(min(pull, 1), outer, lam, tau, self.one([optimizer, nesterov]))
        elif self.method == "easgd":
            says |= {"algorithm.lam": lam} if self.now_and_then(2) else {"algorithm.pull": pull % 1}
        elif self.method == "fedprox":
            says["algorithm.local_pull"] = pull % 1
        elif self.method == "lookahead":
            says["algorithm.outer"] = outer
        elif self.method == "diloco":
            says["algorithm.outer"] = self.one([optimizer, nesterov])

    def free_coupling(self, pull, outer, lam, tau, optimizer):
        says, kind = self.says, self.one(["letters", "letters", "rates", "implicit", "exact"])
        rates = {"algorithm.pull": pull, "algorithm.local_pull": self.one([0, 0.2, pull])}
        says |= {"algorithm.lam": self.one([lam] * 9 + [math.inf]), "algorithm.tau": tau}
        says["algorithm.u_step_on"] = self.one(["coupling", "coupling", "objective"])
        if kind == "rates":
            says |= rates
            del says["algorithm.lam"]
            if self.now_and_then(2):
                says["algorithm.outer"] = self.one([outer, optimizer])
                del says["algorithm.tau"], says["algorithm.u_step_on"]
        if kind == "implicit":
            says |= {"algorithm.coupling": "implicit", "algorithm.order": "gauss_seidel"}
        if kind == "exact" or (kind == "implicit" and self.now_and_then(2)):
            says["algorithm.u_update"] = "exact"

    @property
    def groups(self):
        return {"algorithm": self.method, "potential": self.potential}

    @property
    def overrides(self):
        """As on a command line."""
        values = [f"{key}={text(value)}" for key, value in (self.groups | self.says).items()]
        return [*values, "model.name=two_parts", "data.name=tiny", "device=cpu"]


def text(value):
    return str(value).lower() if isinstance(value, bool) else str(value)


BASES: dict[tuple[str, ...], object] = {}


def config_of(draw):
    """The checked config of a command line.

    Hydra composes each choice of files once, and the values are set as it sets them: to compose
    takes 0.1 s.
    """
    files = tuple(f"{group}={name}" for group, name in draw.groups.items())
    if files not in BASES:
        register_schema()
        with initialize_config_dir(config_dir(), version_base="1.3"):
            own = ["model.name=two_parts", "data.name=tiny", "device=cpu"]
            BASES[files] = compose("train", overrides=[*files, *own])
    cfg = BASES[files].copy()
    for key, value in draw.says.items():
        if isinstance(value, str) and value.startswith("{"):
            value = OmegaConf.create(value)
        OmegaConf.update(cfg, key.removeprefix("+"), value, force_add=key.startswith("+"))
    return to_config(cfg)


# ---- both runs


@dataclass
class Seen:
    """One state, with the workers of all ranks: of the code, or of the plain runs (P, ...)."""

    u: np.ndarray
    z: np.ndarray
    v: np.ndarray
    cuts: np.ndarray  # of s_u, then of every s_j
    objective: np.ndarray


def through_the_code(plan, group):
    """The states after each iteration, and the digest of u that ranks share."""
    algorithm = build_algorithm(plan, group)
    states = [state_of(algorithm, plan, group, 0)]
    for t in range(plan.config.algorithm.iterations):
        algorithm.step(t)
        states.append(state_of(algorithm, plan, group, t + 1))
    return states, algorithm.verify()


def on_a_rank(group, configs):
    launch = Launch(group.rank, group.size, group.rank, group.size)
    return [through_the_code(make_plan(config, launch), group) for config in configs]


def state_of(algorithm, plan, group, t):
    worker, u, z = algorithm.worker, algorithm.u, algorithm.worker.z
    row = measure(u, z, plan.phi, algorithm.lam, algorithm.cuts, plan, group, t)
    cuts = torch.cat([algorithm.cuts[:1], worker.cuts])
    arrays = [x.numpy().copy() for x in (u, z, worker.v, cuts)]
    return Seen(*arrays, np.array(row["objective"]))


def plainly(plan):
    """The states (P, ...) of the plain runs, for a plan of one process."""
    config, workers = plan.config, plan.num_workers
    sources = [
        Minibatches(own.indices, own.batch_size, own.seed, own.worker)
        for own in plan.oracle.minibatches
    ]
    x, labels = samples(7)
    data = Logistic(x.astype(float), labels, CLASSES, WIDTHS)
    error = 1e-9 if config.dtype == "float64" else 1e-5
    run = PlainRun(config, data, plan.start.numpy(), workers, error, PERTURBED)
    states = [copy_of(run.state)]
    for t in range(config.algorithm.iterations):
        chosen = np.stack([source.draw().numpy() for source in sources])
        with np.errstate(all="ignore"):
            states.append(copy_of(run.step(t, chosen)))
    return states


def copy_of(state):
    cuts = np.concatenate([state.cuts_u[:, None], state.cuts_z], 1)
    return Seen(state.u.copy(), state.z.copy(), state.v.copy(), cuts, state.objective.copy())


# ---- the comparison


@dataclass
class Outcome:
    """How far a comparison got, and its end: equal, ill-conditioned, not finite or DIFFERENT."""

    kind: str = "equal"
    iterations: int = 0
    worst: float = 0.0  # the largest difference in units of that of the plain runs
    cut: bool = False
    difference: str = ""


def compare(states, plain):
    """The states of the code with those of the plain runs, until they are ill-conditioned."""
    outcome, units = Outcome(), dict.fromkeys(COMPARED, 0.0)
    for state, runs in zip(states, plain, strict=True):
        outcome.kind, outcome.difference = judge(state, runs, units, outcome)
        if outcome.kind != "equal":
            break
        outcome.iterations += 1
        outcome.cut |= bool(state.cuts.any())
    return outcome


def judge(state, runs, units, outcome):
    """Of one iteration: the kind of its outcome, and a difference. Updates `units`."""
    found = [(name, getattr(state, name), getattr(runs, name)) for name in COMPARED]
    number = np.finfo(state.u.dtype)
    if not all(np.abs(x).max() < math.sqrt(number.max) for _, _, x in found):
        return "not finite", ""
    for name, _, x in found:
        size = np.abs(x).max()
        if name == "v":  # which is added to z, and may be a difference of them
            size = max(size, np.abs(runs.z).max())
        units[name] = max(units[name], np.abs(x[1:] - x[0]).max(), number.eps * size)
        if FACTOR * units[name] > LOST * size > 0:
            return "ill-conditioned", ""
    if (runs.cuts != runs.cuts[0]).any():
        return "ill-conditioned", ""
    if (state.cuts != runs.cuts[0]).any():
        return "DIFFERENT", f"cuts {state.cuts} and not {runs.cuts[0]}"
    for name, own, x in found:
        error = np.abs(own - x[0]).max()
        if not error <= FACTOR * units[name]:
            return "DIFFERENT", f"{name} {own} and not {x[0]}"
        outcome.worst = max(outcome.worst, error / max(units[name], number.tiny))
    return "equal", ""


# ---- the tests


@pytest.fixture
def lines(monkeypatch):
    """A context for lines 3 and 6.

    `large`: 27 numbers are a large vector, in tiles. `compiled`: with native.c where it compiles.
    """

    @contextmanager
    def context(large, compiled):
        with monkeypatch.context() as patch:
            if not compiled:
                patch.setattr(native, "library", lambda: None)
            if large:
                patch.setattr(kernels, "CHUNK", TILE)
                patch.setattr(sizes, "CHUNK", TILE)
                patch.setattr(Tiled.__init__, "__defaults__", (TILE,))
            yield

    return context


def report(first, outcomes):
    """The counts of a group of cases, and a command line for each that is wrong."""
    wrong = [
        f"case {first + i}, iteration {outcome.iterations}: {outcome.difference}\n"
        f"    {shlex.join(draw.overrides)}"
        for i, (draw, outcome) in enumerate(outcomes)
        if outcome.kind == "DIFFERENT"
    ]
    kinds = Counter(outcome.kind for _, outcome in outcomes)
    cut, worst = sum(o.cut for _, o in outcomes), max(o.worst for _, o in outcomes)
    print(f"{dict(kinds)}, {cut} with cuts; largest deviation {worst:.3g} of {FACTOR:g} allowed")
    return wrong


@pytest.mark.parametrize("part", range(PARTS))
def test_runs_are_the_equations(part, lines):
    share = range(FIRST + part * CASES // PARTS, FIRST + (part + 1) * CASES // PARTS)
    outcomes = []
    for seed in share:
        draw = Draw(seed)
        plan = make_plan(config_of(draw), Launch())
        with lines(draw.large, compiled=seed % 2 == 0):
            states, _ = through_the_code(plan, Solo())
        outcomes.append((draw, compare(states, plainly(plan))))
    wrong = report(share[0], outcomes)
    assert not wrong, "\n".join(wrong)
    kinds = Counter(outcome.kind for _, outcome in outcomes)
    assert kinds["equal"] > 0.85 * len(share)
    assert sum(outcome.cut for _, outcome in outcomes) > 0.05 * len(share)


@pytest.mark.ranks
def test_runs_on_two_ranks_are_the_equations(ranks):
    even = (seed for seed in range(10**6) if Draw(seed).says["workers"] % 2 == 0)
    draws = [Draw(seed) for seed in islice(even, 10 * ON_RANKS)]
    draws = [draw for draw in draws if draw.method != "msgd"][:ON_RANKS]
    configs = [config_of(draw) for draw in draws]
    answers = zip(*ranks(2, on_a_rank, configs), strict=True)
    outcomes = []
    for draw, config, ((states, digest), (others, its)) in zip(
        draws, configs, answers, strict=True
    ):
        assert digest == its, f"u differs between ranks: {shlex.join(draw.overrides)}"
        plain = plainly(make_plan(config, Launch()))
        outcomes.append((draw, compare(joined(states, others), plain)))
    wrong = report(0, outcomes)
    assert not wrong, "\n".join(wrong)


def joined(states, others):
    """The states of all workers, from those on two ranks."""
    return [
        replace(
            one,
            z=np.concatenate([one.z, other.z]),
            v=np.concatenate([one.v, other.v]),
            cuts=np.concatenate([one.cuts, other.cuts[1:]]),
        )
        for one, other in zip(states, others, strict=True)
    ]


@pytest.mark.parametrize("seed", range(3))
def test_the_config_is_that_of_the_command_line(seed):
    """`config_of` sets values in a composed config; here Hydra composes them."""
    draw = Draw(seed)
    config = config_of(draw)
    with initialize_config_dir(config_dir(), version_base="1.3"):
        assert to_config(compose("train", overrides=draw.overrides)) == config
