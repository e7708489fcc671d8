"""Training loss at u over `pull`, where each worker sees a few classes only.

Started as `scripts/bench pull`, which starts four processes under torchrun and trains all settings
in them, one after another. Worker j has the digits j, j + 4 and j + 8 of scikit-learn. All workers
begin with the same weights and train a small multilayer perceptron with `Coupling`; then the loss
of u on the images of all workers is computed.

Each optimizer has two learning rates: a small one, with which the loss still falls fast at the end,
and ten times that. Seeds are those of the initial weights and minibatches.
"""

import itertools
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, AdamW, Optimizer

from benchmarks import harness
from benchmarks.harness import BATCH, CPU, table
from consensus import Coupling
from consensus.comm import Group, Launch, open_group
from consensus.report.style import COLOURS, STYLES, house_style, new_figure

STEPS = 321  # call 321 finishes the sum that call 320 begins, for every period that divides 320
CLASSES, WIDTH = 10, 32
PULLS = (0.03, 0.1, 0.3, 1.0)
PERIODS = (1, 8, 32)
POTENTIALS = ("quad", "tan")
OPTIMIZERS: dict[str, tuple[Callable[..., Optimizer], tuple[float, ...]]] = {
    "AdamW": (AdamW, (0.001, 0.01)),
    "SGD": (SGD, (0.03, 0.3)),
    "Nesterov": (partial(SGD, momentum=0.9, nesterov=True), (0.003, 0.03)),
}
COLUMNS = {"optimizer": "<9", "lr": "<6", "potential": "<9", "period": ">6"} | {
    f"pull {pull}": ">14" for pull in PULLS
}


@dataclass(frozen=True)
class Setting:
    """A line of the table."""

    optimizer: str
    lr: float
    potential: str
    period: int


@dataclass(frozen=True)
class Result:
    """The losses of u of a setting, one tuple for each of PULLS, one loss for each seed."""

    setting: Setting
    losses: tuple[tuple[float, ...], ...]

    def cells(self) -> tuple[object, ...]:
        """By COLUMNS: mean and standard deviation, that of a sample."""
        s = self.setting
        pairs = [f"{mean:.3f} ({deviation:.3f})" for mean, deviation in map(summary, self.losses)]
        return s.optimizer, str(s.lr), s.potential, s.period, *pairs


def summary(losses: Sequence[float]) -> tuple[float, float]:
    """Mean, and standard deviation of a sample; 0 for one loss."""
    deviation = statistics.stdev(losses) if len(losses) > 1 else 0.0
    return statistics.mean(losses), deviation


def digits() -> tuple[Tensor, Tensor]:
    """The images (N, 64), in [0, 1], and labels (N,)."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return torch.tensor(bunch.data / 16.0, dtype=torch.float32), torch.tensor(bunch.target)


def classes(worker: int, workers: int) -> list[int]:
    """The classes that a worker sees."""
    return list(range(worker, CLASSES, workers))


def network(seed: int) -> nn.Module:
    """A multilayer perceptron with one hidden layer."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, CLASSES))


def train(
    setting: Setting,
    pull: float,
    seed: int,
    data: tuple[Tensor, Tensor],
    group: Group,
    steps: int = STEPS,
) -> float:
    """The loss of u on all images after so many steps. A collective."""
    x, y = data
    own = torch.isin(y, torch.tensor(classes(group.rank, group.size))).nonzero().flatten()
    model = network(seed)
    optimizer = OPTIMIZERS[setting.optimizer][0](model.parameters(), lr=setting.lr)
    coupling = Coupling(model, optimizer, setting.potential, pull=pull, period=setting.period)
    random = torch.Generator().manual_seed(1000 * seed + group.rank)
    for _ in range(steps):
        batch = own[torch.randint(len(own), (BATCH,), generator=random)]
        cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
        optimizer.zero_grad()
        coupling.step()
    with coupling.consensus(), torch.no_grad():
        loss = cross_entropy(model(x), y)
    coupling.close()
    assert group.gather(loss.double().view(1)).unique().numel() == 1, "the processes differ in u"
    return loss.item()


def measure(settings: Iterable[Setting], seeds: Sequence[int], group: Group) -> list[Result]:
    """All settings with all pulls. A collective."""
    data, results = digits(), []
    for setting in settings:
        losses = tuple(
            tuple(train(setting, pull, seed, data, group) for seed in seeds) for pull in PULLS
        )
        results.append(Result(setting, losses))
        if group.rank == 0:
            head, line = table(COLUMNS, [results[-1].cells()]).splitlines()
            print(line if len(results) > 1 else f"{head}\n{line}", flush=True)
    return results


@house_style()
def draw(results: Sequence[Result], path: str) -> None:
    """Loss over pull: a column of panels for each optimizer, with its learning rates as rows."""
    figure, panels = new_figure(2, len(OPTIMIZERS), sharex=True, sharey=True)
    for result in results:
        setting = result.setting
        rates = OPTIMIZERS[setting.optimizer][1]
        axes = panels[rates.index(setting.lr)][list(OPTIMIZERS).index(setting.optimizer)]
        means, deviations = zip(*map(summary, result.losses), strict=True)
        axes.errorbar(
            PULLS,
            means,
            deviations,
            label=f"{setting.potential}, period {setting.period}",
            color=COLOURS[PERIODS.index(setting.period)],
            marker=STYLES[setting.potential]["marker"],
            linestyle=STYLES[setting.potential]["linestyle"],
        )
        axes.set(title=f"{setting.optimizer}, lr {setting.lr}", xscale="log")
        axes.set_xticks(PULLS, list(map(str, PULLS)))
        axes.minorticks_off()
    panels[0][0].set_ylim(bottom=0.0)
    panels[0][0].legend(fontsize=5.0)
    figure.supxlabel("pull")
    figure.supylabel("loss of u, mean and deviation")
    figure.savefig(path, dpi=150)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, start the ranks, measure, print, write."""
    parser = harness.parser("pull", quick="one setting, one seed", plot=True)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args(arguments)
    harness.start_ranks("pull", 4, arguments)
    settings = [
        Setting(optimizer, lr, potential, period)
        for optimizer, (_, rates) in OPTIMIZERS.items()
        for lr, potential, period in itertools.product(rates, POTENTIALS, PERIODS)
    ]
    if options.quick:
        settings, options.seeds = settings[:1], 1
    group = open_group(Launch.from_environment(), "gloo", CPU, 600.0)
    results = measure(settings, range(options.seeds), group)
    if group.rank == 0:
        content = {"environment": harness.environment(), "pulls": PULLS, "results": results}
        harness.write_json(options.json, content)
        if options.plot:
            draw(results, options.plot)
    group.barrier()
    group.close()


if __name__ == "__main__":
    main()
