"""examples/char_gpt.py with consensus and with DistributedDataParallel, for several seeds.

Started as `scripts/bench char_gpt`, which starts four processes under torchrun and trains all runs
in them, one after another. Both methods have the default options of the example, which were tuned
for each. It prints the losses on held-out text at the end and draws them over the steps.
"""

import statistics
from collections.abc import Sequence

import torch.distributed as dist

from benchmarks import harness
from benchmarks.harness import table
from consensus.report.style import STYLES, house_style, panel_grid, series_style
from examples import char_gpt

METHODS = {"DDP": ["--ddp"], "consensus": []}
QUICK = ["--steps=40", "--every=20", "--width=16"]
COLUMNS = {"seed": "<9", "DDP": ">9.4f", "consensus": ">9.4f", "above DDP": ">9.1%"}


def rows(curves: dict[str, list[list[float]]]) -> list[tuple[object, ...]]:
    """By COLUMNS: the last losses of each seed, their means and their standard deviations."""
    ends = {name: [losses[-1] for losses in own] for name, own in curves.items()}
    pairs = list(zip(ends["DDP"], ends["consensus"], strict=True))
    found = [(str(seed), a, b, b / a - 1) for seed, (a, b) in enumerate(pairs)]
    a, b = (statistics.mean(own) for own in ends.values())
    found.append(("mean", a, b, b / a - 1))
    if len(pairs) > 1:
        found.append(("deviation", *map(statistics.stdev, ends.values()), None))
    return found


@house_style()
def draw(curves: dict[str, list[list[float]]], every: int, path: str) -> None:
    """Loss over steps: the mean over seeds, and the range."""
    figure, (axes,) = panel_grid(1, height=3.0)
    for i, (name, runs) in enumerate(curves.items()):
        style = STYLES.get(name) or series_style(i)
        points = list(zip(*runs, strict=True))
        steps = [every * (i + 1) for i in range(len(points))]
        axes.plot(steps, list(map(statistics.mean, points)), label=name, **style)
        low, high = list(map(min, points)), list(map(max, points))
        axes.fill_between(steps, low, high, color=style["color"], alpha=0.2, linewidth=0)
    axes.set(xlabel="steps", ylabel="loss on held-out text (nats per character)")
    axes.legend()
    figure.savefig(path, dpi=150)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, start the ranks, train, print, write."""
    parser = harness.parser("char_gpt", quick="few steps of a small model, one seed", plot=True)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args(arguments)
    harness.start_ranks("char_gpt", 4, arguments)
    quick, every = (QUICK, 20) if options.quick else ([], char_gpt.SIZES["every"])
    seeds = 1 if options.quick else options.seeds
    curves: dict[str, list[list[float]]] = {name: [] for name in METHODS}
    for seed in range(seeds):
        for name, chosen in METHODS.items():
            losses, _ = char_gpt.main([f"--seed={seed}", *chosen, *quick])
            curves[name].append(losses)
            if dist.get_rank() == 0:
                print(f"{name}, seed {seed}: {losses[-1]:.4f}", flush=True)
                content = {"environment": harness.environment(), "every": every, "losses": curves}
                harness.write_json(options.json, content)
    if dist.get_rank() == 0:
        print(table(COLUMNS, rows(curves)))
        if options.plot:
            draw(curves, every, options.plot)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
