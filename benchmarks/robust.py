"""Test error of u while some of ten workers send garbage, beside the aggregators of byzfl.

Started as `scripts/bench robust`. Ten workers in one process have a tenth of the training images
each and train a perceptron of one hidden layer with Nesterov momentum. From the first
iteration on, the gradients of the first F workers are wrong:

    garbage   normal numbers of standard deviation 1 in place of the gradient
    sign      the gradient times -1
    label     the gradient of images with label 9 - y in place of y

A method is Algorithm 1 with a potential, or an aggregator of byzfl 0.0.11: there the workers step
from u with a velocity of their own, and u becomes the aggregate of their copies. `MultiKrum` and
`TrMean` are told F. Both communicate in each iteration. The step size, the momentum and the number
of iterations are the same; pull, outer and eta are those of SETTINGS. An error is that of u after
the last iteration, in percent of the test images.
"""

import functools
import itertools
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks import harness
from benchmarks.harness import BATCH
from consensus import DATASETS, POTENTIALS, Dataset, Layerwise
from consensus.algorithm import Consensus, half_square
from consensus.comm import Solo
from consensus.report.style import house_style, legend_below, new_figure, series_style
from consensus.server import Server
from consensus.worker import Worker

WORKERS, WIDTH, STEPS = 10, 32, 300
SIGMA, KAPPA = 0.1, 0.9
PULL, OUTER = 0.3, 1.0
FAULTS = ("garbage", "sign", "label")
COUNTS = (0, 1, 2, 3, 4)


@dataclass(frozen=True)
class Setting:
    """A potential, its width and its options; or an aggregator of byzfl and its options."""

    label: str
    name: str
    eta: float | None = None  # None: an aggregator
    options: tuple[tuple[str, object], ...] = ()
    outer: float = OUTER


SETTINGS = (
    Setting("quad", "quad", 1.0),
    Setting("huber", "huber", 1.0, outer=2.0),
    Setting("huber, eta 0.3", "huber", 0.3, outer=2.0),
    Setting("huber, separable", "huber", 0.03, (("separable", True),), 2.0),
    Setting("pseudo_huber, radial", "pseudo_huber", 1.0, (("separable", False),), 2.0),
    Setting("pseudo_huber", "pseudo_huber", 0.03, outer=2.0),
    Setting("log_cosh", "log_cosh", 0.03, outer=2.0),
    Setting("pseudo_huber, eta 0.003", "pseudo_huber", 0.003, outer=2.0),
    Setting("byzfl Average", "Average"),
    Setting("byzfl CenteredClipping", "CenteredClipping", options=(("tau", 0.3),)),
    Setting("byzfl Median", "Median"),
    Setting("byzfl TrMean", "TrMean"),
    Setting("byzfl GeometricMedian", "GeometricMedian"),
    Setting("byzfl MultiKrum", "MultiKrum"),
)


# ---- the problem


@functools.cache
def load(name: str, root: str) -> Dataset:
    return DATASETS.make(name, **DATASETS.completed(name, {}, root=root))


class Perceptrons:
    """Gradients of ten perceptrons on their images at once, of which the first few are wrong.

    Args:
        name: The data set.
        root: Its folder.
        seed: Of the weights, the shards, the minibatches and the garbage.
        fault: A name in FAULTS.
        count: F.
    """

    def __init__(self, name: str, root: str, seed: int, fault: str, count: int) -> None:
        assert fault in FAULTS, fault
        data = load(name, root)
        self.train, self.test = data.train, data.test
        self.fault, self.count = fault, count
        self.random = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.train), generator=self.random)
        self.shards = order[: len(order) // WORKERS * WORKERS].view(WORKERS, -1)
        self.shapes = [(self.inputs(self.test)[:1].numel(), WIDTH), (WIDTH,), (WIDTH, 10), (10,)]
        self.sizes = [torch.Size(shape).numel() for shape in self.shapes]
        parts = []
        inputs = [self.shapes[0][0]] * 2 + [WIDTH] * 2
        for size, incoming in zip(self.sizes, inputs, strict=True):
            bound = incoming**-0.5  # as in torch.nn.Linear
            parts.append(bound * (2.0 * torch.rand(size, generator=self.random) - 1.0))
        self.start = torch.cat(parts)

    def layers(self) -> list[tuple[int, int]]:
        """Weight and bias together."""
        first = self.sizes[0] + self.sizes[1]
        return [(0, first), (first, sum(self.sizes))]

    @staticmethod
    def inputs(samples) -> Tensor:
        return samples.inputs.flatten(1)

    def outputs(self, points: Tensor, x: Tensor) -> Tensor:
        """(K, n), (K, B, d) -> (K, B, 10)."""
        parts = points.split(self.sizes, 1)
        w, b, w2, b2 = (
            part.reshape(-1, *shape) for part, shape in zip(parts, self.shapes, strict=True)
        )
        hidden = torch.relu(torch.baddbmm(b.unsqueeze(1), x, w))
        return torch.baddbmm(b2.unsqueeze(1), hidden, w2)

    def draw(self) -> Tensor:
        """The indices of a minibatch for each worker. (K, B)."""
        place = torch.randint(self.shards.shape[1], (WORKERS, BATCH), generator=self.random)
        return self.shards.gather(1, place)

    def gradient(self, points: Tensor, batch: Tensor) -> Tensor:
        """Of the mean loss of each minibatch, with the faults."""
        x, y = self.inputs(self.train)[batch], self.train.targets[batch]
        if self.fault == "label":
            y[: self.count] = 9 - y[: self.count]
        with torch.enable_grad():
            points = points.detach().requires_grad_()
            loss = cross_entropy(
                self.outputs(points, x).flatten(0, 1), y.flatten(), reduction="sum"
            )
            (delta,) = torch.autograd.grad(loss / BATCH, points)
        if self.fault == "garbage":
            delta[: self.count].normal_(generator=self.random)
        if self.fault == "sign":
            delta[: self.count] *= -1.0
        return delta

    def error(self, u: Tensor) -> float:
        """Percent of the test images that u (n,) classifies wrongly."""
        if not bool(u.isfinite().all()):
            return 90.0
        found = self.outputs(u.unsqueeze(0), self.inputs(self.test).unsqueeze(0))[0].argmax(1)
        return 100.0 * (found != self.test.targets).double().mean().item()

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        del state


# ---- methods


def by_consensus(setting: Setting, oracle: Perceptrons, steps: int) -> Tensor:
    """U of Algorithm 1. (n,)."""
    assert setting.eta is not None
    potential = POTENTIALS.make(setting.name, **dict(setting.options))
    phi = Layerwise(potential, oracle.layers(), setting.eta)
    half = half_square(setting.eta)
    worker = Worker(oracle.start.repeat(WORKERS, 1), oracle, phi, kappa=KAPPA, on_nonfinite="drop")
    server = Server(oracle.start, phi, Solo())
    tau, lam = setting.outer * half / WORKERS, SIGMA / (PULL * half)
    algorithm = Consensus(server, worker, tau=tau, sigma=SIGMA, lam=lam)
    for t in range(steps):
        algorithm.step(t)
    return algorithm.u


def by_aggregator(setting: Setting, oracle: Perceptrons, steps: int) -> Tensor:
    """U of workers that step from u, whose copies are aggregated. (n,)."""
    import byzfl

    options = dict(setting.options)
    if setting.name in ("MultiKrum", "TrMean"):
        options["f"] = oracle.count
    aggregate = getattr(byzfl, setting.name)(**options)
    u, v = oracle.start.clone(), torch.zeros(WORKERS, len(oracle.start))
    if setting.name == "CenteredClipping":
        aggregate.m = u
    for _ in range(steps):
        v = KAPPA * v - SIGMA * oracle.gradient(u + KAPPA * v, oracle.draw())
        wild = ~v.sum(1).isfinite()  # begins again at u, as with on_nonfinite=drop
        v[wild] = 0.0
        u = aggregate(u + v)
    return u


@dataclass(frozen=True)
class Result:
    """The errors of a setting with F workers that have a fault, one for each seed."""

    setting: Setting
    fault: str
    count: int
    errors: tuple[float, ...]


def measure(
    settings: Iterable[Setting],
    cases: Sequence[tuple[str, int]],
    seeds: Sequence[int],
    make: Callable[[int, str, int], Perceptrons],
    steps: int,
) -> list[Result]:
    """All settings in all cases; prints a line for each setting."""
    results = []
    print(line(["method", *(f"{fault} {n}" if n else "none" for fault, n in cases)]))
    print(line(["---"] * (1 + len(cases))))
    for setting in settings:
        run = by_aggregator if setting.eta is None else by_consensus
        own = []
        for fault, count in cases:
            found = []
            for seed in seeds:
                oracle = make(seed, fault, count)
                found.append(oracle.error(run(setting, oracle, steps)))
            own.append(Result(setting, fault, count, tuple(found)))
        print(line([setting.label, *map(cell, own)]), flush=True)
        results += own
    return results


def line(cells: Iterable[str]) -> str:
    """A line of a table in Markdown."""
    return f"| {' | '.join(cells)} |"


def cell(result: Result) -> str:
    """Mean, and the largest."""
    return f"{statistics.mean(result.errors):.1f} ({max(result.errors):.1f})"


@house_style()
def draw(results: Sequence[Result], path: str) -> None:
    """Mean error over F, a panel for each fault."""
    figure, ((*panels,),) = new_figure(1, len(FAULTS), 3.4, sharey=True)
    settings = list(dict.fromkeys(result.setting for result in results))
    for fault, axis in zip(FAULTS, panels, strict=True):
        lines = []
        for i, setting in enumerate(settings):
            own = [r for r in results if r.setting == setting and (r.fault == fault or not r.count)]
            means = [statistics.mean(r.errors) for r in own]
            (drawn,) = axis.plot([r.count for r in own], means, **series_style(i))
            lines.append(drawn)
        axis.set(title=fault, xlabel="wrong workers of ten", ylim=(0, 40), xticks=COUNTS)
    panels[0].set_ylabel("test error of u, %")
    legend_below(figure, lines, [setting.label for setting in settings])
    figure.savefig(path, dpi=150)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, measure, print, write."""
    parser = harness.parser("robust", quick="two methods, one case, 20 iterations", plot=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--data", default="digits", help="a data set of images (default: digits)")
    parser.add_argument("--root", default="data", help="its folder")
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args(arguments)
    settings, cases = SETTINGS, [("label", 0), *itertools.product(FAULTS, COUNTS[1:])]
    if options.quick:
        settings, cases, options.seeds, options.steps = SETTINGS[:2], [("garbage", 4)], 1, 20

    def make(seed: int, fault: str, count: int) -> Perceptrons:
        return Perceptrons(options.data, options.root, seed, fault, count)

    results = measure(settings, cases, range(options.seeds), make, options.steps)
    harness.write_json(options.json, {"environment": harness.environment(), "results": results})
    if options.plot:
        draw(results, options.plot)


if __name__ == "__main__":
    main()
