"""What an iteration of many configurations costs, as separate runs and as one population.

    scripts/bench_population --configurations 72 --potentials quad tan --json population.json
    python -m benchmarks.population ...          the same with the torch that is there already

S configurations of M = 4 workers, batch 20, on images of noise. For each potential:

    separate    one run's step times S, as it is when they run one after another in processes that
                have started; on a GPU a replayed CUDA graph
    one_by_one, grouped, products
                a population's step, by how its gradients are computed (`sweep.gradients`); of the
                numbers of models in one pass, the fastest. On a GPU a replayed CUDA graph, with
                the passes of one_by_one side by side, as in a sweep
    floor       what the device cannot go below: the larger of two times. Operations of the matrix
                products and convolutions of forward and backward passes, as torch counts them, over
                the rate of one large product of matrices, in the precision that convolutions have
                (TF32 on a GPU, where torch's default allows it). Bytes of lines 3, 5 and 6, each
                vector read and written as often as in core/kernels/triton.py, without activations,
                over the bandwidth of a copy.

Data flow: one problem for all; `Population` or `Consensus` of it is stepped by `median_ms` of
gpu.py; rows go to the screen and to a file.
"""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu import (
    BATCH,
    KAPPA,
    LAM,
    NU,
    SIGMA,
    TABLE_2,
    TAU,
    WORKERS,
    Effort,
    copy_bytes_per_s,
    counted,
    environment,
    median_ms,
    vectors_moved,
)
from consensus import POTENTIALS, Layerwise
from consensus.algorithm import Consensus
from consensus.comm import Solo
from consensus.population import Population
from consensus.problem import (
    WAYS,
    Dataset,
    Minibatches,
    MinibatchRisk,
    PopulationRisk,
    Risk,
    Way,
    build_model,
)
from consensus.replay import Replay, cuda_graph
from consensus.server import Server
from consensus.worker import Worker


class Problem:
    """A model and images of noise, on a device.

    Args:
        device: Of everything.
        model: A name in MODELS.
        num_images: N.
    """

    def __init__(self, device: torch.device, model: str, num_images: int) -> None:
        random = torch.Generator().manual_seed(0)
        images = torch.rand(num_images, 1, 28, 28, generator=random)
        labels = torch.randint(10, (num_images,), generator=random)
        data = Dataset(images, labels, images[:1], labels[:1], num_classes=10)
        self.dataset = data.to(device, torch.float32)
        self.device = device
        self.risk = Risk(build_model(model, 0, torch.float32, num_classes=10).to(device), "sum")
        self.u = self.risk.layout.flatten(self.risk.model).to(device)

    def minibatches(self) -> list[Minibatches]:
        """Of the M workers."""
        everything = torch.arange(len(self.dataset.train_labels), device=self.device)
        return [Minibatches(everything, BATCH, seed=0, worker=j) for j in range(WORKERS)]

    def phi(self, potential: str, eta: float | Tensor) -> Layerwise:
        """The potential of that name."""
        return Layerwise(POTENTIALS[potential], self.risk.layout.layers, eta)

    def run(self, potential: str) -> Consensus:
        """A separate run."""
        oracle = MinibatchRisk(self.risk, self.dataset, self.minibatches())
        phi = self.phi(potential, 1.0)
        return Consensus(
            Server(self.u, phi, Solo(self.device)),
            Worker(self.u.expand(WORKERS, -1), oracle, phi, kappa=KAPPA, nu=NU),
            tau=TAU,
            sigma=SIGMA,
            lam=LAM,
        )

    def population(self, potential: str, configurations: int, way: Way) -> Population:
        """So many of them, with numbers of their own."""
        s = configurations
        risk = Risk(self.risk.model, "sum")  # not the one whose gradients a replay puts on streams
        oracle = PopulationRisk(risk, self.dataset, [0] * s, {0: self.minibatches()}, way)
        return Population(
            self.u.expand(s, -1),
            WORKERS,
            oracle,
            lambda eta: self.phi(potential, eta),
            eta=[1.0 + i / s for i in range(s)],
            tau=[TAU] * s,
            sigma=[SIGMA] * s,
            lam=[LAM] * s,
            kappa=[KAPPA] * s,
            nu=[NU] * s,
            record=cuda_graph if self.device.type == "cuda" else None,
        )


@dataclass
class Floor:
    """What the device can do, and what an iteration of one configuration asks of it."""

    operations_per_s: float
    bytes_per_s: float
    operations: float
    bytes: float

    @property
    def ms(self) -> float:
        """Of one configuration."""
        return 1e3 * max(self.operations / self.operations_per_s, self.bytes / self.bytes_per_s)


@dataclass
class PopulationRow:
    """An iteration of all configurations."""

    model: str
    potential: str
    configurations: int
    method: str
    at_once: int
    ms: float
    over_separate: float
    over_floor: float


def operations_per_s(device: torch.device, side: int, effort: Effort) -> float:
    """Of a product of two square matrices, a multiplication and an addition each counted."""
    a, b = (torch.rand(side, side, device=device) for _ in range(2))
    out = torch.empty_like(a)
    precision = torch.get_float32_matmul_precision()
    if torch.backends.cudnn.allow_tf32:  # then convolutions may round so, and go faster
        torch.set_float32_matmul_precision("high")
    try:
        return 2.0 * side**3 / (1e-3 * median_ms(lambda: torch.mm(a, b, out=out), device, effort))
    finally:
        torch.set_float32_matmul_precision(precision)


def operations_of_gradients(problem: Problem) -> float:
    """Of the forward and backward passes of M workers, as torch counts them."""
    points = problem.u.repeat(WORKERS, 1)
    oracle = MinibatchRisk(problem.risk, problem.dataset, problem.minibatches())
    batch = oracle.draw()
    with FlopCounterMode(display=False) as counter:
        problem.risk.gradient(points, *batch)
    return float(counter.get_total_flops())


def bytes_of_lines(problem: Problem, phi: Layerwise) -> float:
    """Of lines 3 and 6, of the look-ahead points, and of the gradients at them."""
    vectors = vectors_moved(phi, "line 3", WORKERS) + vectors_moved(phi, "line 6", WORKERS)
    vectors += 3 * WORKERS + 2 * WORKERS
    return float(vectors * problem.u.nbytes)


def rows(
    problem: Problem, model: str, potential: str, configurations: int, floor: Floor, effort: Effort
) -> list[PopulationRow]:
    """Separate runs, then a population in each way."""
    run = problem.run(potential)
    step = Replay(run).step if problem.device.type == "cuda" else run.step
    separate = configurations * median_ms(counted(step), problem.device, effort)
    times = {"separate": (separate, 1)}
    for name in WAYS:
        population = problem.population(potential, configurations, Way())
        oracle = population.oracle
        assert isinstance(oracle, PopulationRisk)
        record = cuda_graph if problem.device.type == "cuda" else None
        oracle.risk.side_by_side = record is not None
        oracle.way = oracle.fastest_way(population.z.flatten(0, 1), (name,), record)
        ms = median_ms(counted(population.step), problem.device, effort)
        assert not bool(population.diverged().any()), "what was timed must have been training"
        times[name] = (ms, oracle.way.at_once)
    least = configurations * floor.ms
    return [
        PopulationRow(
            model, potential, configurations, name, at_once, ms, ms / separate, ms / least
        )
        for name, (ms, at_once) in times.items()
    ]


def show(floor: Floor, found: Sequence[PopulationRow]) -> None:
    """The table of one potential."""
    row = found[0]
    print(
        f"\n{row.model}, {row.potential}, {row.configurations} configurations of {WORKERS} workers:"
        f" floor {row.configurations * floor.ms:.3f} ms"
        f" ({floor.operations / 1e6:.1f} million operations and {floor.bytes / 1e6:.1f} MB each)"
    )
    print(f"{'':12}{'at once':>8}{'ms':>10}{'/ separate':>12}{'/ floor':>9}{'30,000 in min':>15}")
    for row in found:
        print(
            f"{row.method:12}{row.at_once:8}{row.ms:10.3f}{row.over_separate:12.3f}"
            f"{row.over_floor:9.1f}{row.ms / 2:15.1f}"
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(prog="scripts/bench_population")
    where = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=["cuda", "cpu"], default=where)
    parser.add_argument("--quick", action="store_true", help="tiny: shows that it runs")
    parser.add_argument("--configurations", type=int, help="72 on a GPU, 8 on a CPU")
    parser.add_argument("--potentials", nargs="+", choices=TABLE_2, default=["quad", "tan"])
    parser.add_argument("--models", nargs="+", default=["lenet5", "logistic"])
    parser.add_argument("--json", metavar="FILE", help="write the rows there")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    on_gpu, quick = device.type == "cuda", options.quick
    if on_gpu and not torch.cuda.is_available():
        parser.error("`--device` is cuda, and torch finds none; allowed here: cpu")
    configurations = options.configurations
    if configurations is None:
        configurations = 2 if quick else 72 if on_gpu else 8
    if configurations < 1:
        parser.error(f"`--configurations` is {configurations}; allowed: at least 1")
    effort = Effort(1, 2) if quick else Effort(7, 20 if on_gpu else 5)
    about = environment(device)
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    peak = operations_per_s(device, 128 if quick else 8192 if on_gpu else 2048, effort)
    bandwidth = copy_bytes_per_s(device, 10**5 if quick else 10**8 if on_gpu else 10**7, effort)
    print(f"{peak / 1e9:,.0f} billion operations/s (float32), {bandwidth / 1e9:,.0f} GB/s")
    content = {"environment": about, "floors": {}, "rows": []}
    for model in options.models:
        problem = Problem(device, model, 200 if quick else 60_000 if on_gpu else 2_000)
        operations = operations_of_gradients(problem)
        for potential in options.potentials:
            moved = bytes_of_lines(problem, problem.phi(potential, 1.0))
            floor = Floor(peak, bandwidth, operations, moved)
            found = rows(problem, model, potential, configurations, floor, effort)
            show(floor, found)
            content["floors"] |= {f"{model} {potential}": asdict(floor)}
            content["rows"] += [asdict(row) for row in found]
            assert all(math.isfinite(row.ms) for row in found)
    if options.json:
        Path(options.json).write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
