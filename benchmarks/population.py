"""An iteration of many configurations, as separate runs and as one population.

    scripts/bench population --configurations 72 --potentials quad tan --json population.json
    python -m benchmarks.population ...          the same in the current environment

S configurations of M = 4 workers, batch 20, on images of noise. For each potential:

    separate    the step time of one run times S, for runs that execute one after another in
                processes that have started; on a GPU a replayed CUDA graph
    one_by_one, grouped, products
                the step of a population, by the computation of its gradients (`sweep.gradients`);
                of the numbers of models in one pass, the fastest. On a GPU a replayed CUDA graph,
                with the passes of one_by_one side by side, as in a sweep
    floor       a lower bound of the device: the larger of two times. Operations of the matrix
                products and convolutions of forward and backward passes, as torch counts them, over
                the rate of one large product of matrices, in the precision of convolutions (TF32 on
                a GPU, where torch's default allows it). Bytes of lines 3, 5 and 6, each vector read
                and written as often as by the fused kernels and activations not counted, over the
                bandwidth of a copy.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import harness
from benchmarks.gpu_vectors import TABLE_2, vectors_moved
from benchmarks.harness import (
    KAPPA,
    LAM,
    NU,
    SIGMA,
    TAU,
    WORKERS,
    Effort,
    Problem,
    copy_bytes_per_s,
    counted,
    median_ms,
    table,
)
from consensus import POTENTIALS, Layerwise
from consensus.algorithm import Consensus
from consensus.population import Population
from consensus.problem import WAYS, PopulationRisk, Risk, Way
from consensus.replay import Replay, cuda_graph

COLUMNS = {
    "": "<11", "at once": ">7", "ms": ">9.3f", "/ separate": ">11.3f", "/ floor": ">8.1f",
    "30,000 in min": ">14.1f",
}  # fmt: skip


def population(problem: Problem, potential: str, configurations: int, way: Way) -> Population:
    """A population of that many configurations, each with its own eta."""
    s = configurations
    risk = Risk(problem.model(), "sum")
    oracle = PopulationRisk(
        risk, problem.dataset, [0] * s, {0: problem.minibatches(range(WORKERS))}, way
    )
    return Population(
        risk.layout.flatten(risk.model).to(problem.device).expand(s, -1),
        WORKERS,
        oracle,
        lambda eta: Layerwise(POTENTIALS[potential], risk.layout.layers, eta),
        eta=[1.0 + i / s for i in range(s)],
        tau=[TAU] * s,
        sigma=[SIGMA] * s,
        lam=[LAM] * s,
        kappa=[KAPPA] * s,
        nu=[NU] * s,
        record=cuda_graph if problem.device.type == "cuda" else None,
    )


@dataclass
class Floor:
    """The rates of the device, and the operations and bytes of one configuration's iteration."""

    operations_per_s: float
    bytes_per_s: float
    operations: float
    bytes: float

    @property
    def ms(self) -> float:
        """Milliseconds of one configuration."""
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
    """The rate of a product of two square matrices; multiplications and additions count."""
    a, b = (torch.rand(side, side, device=device) for _ in range(2))
    out = torch.empty_like(a)
    precision = torch.get_float32_matmul_precision()
    if torch.backends.cudnn.allow_tf32:  # then convolutions may use TF32 and be faster
        torch.set_float32_matmul_precision("high")
    try:
        return 2.0 * side**3 / (1e-3 * median_ms(lambda: torch.mm(a, b, out=out), device, effort))
    finally:
        torch.set_float32_matmul_precision(precision)


def operations_of_gradients(problem: Problem) -> float:
    """The operations of the forward and backward passes of M workers, as torch counts them."""
    oracle = problem.oracle(range(WORKERS))
    u = oracle.risk.layout.flatten(oracle.risk.model).to(problem.device)
    batch = oracle.draw()
    with FlopCounterMode(display=False) as counter:
        oracle.risk.gradient(u.repeat(WORKERS, 1), *batch)
    return float(counter.get_total_flops())


def bytes_of_lines(algorithm: Consensus) -> float:
    """The bytes of lines 3 and 6, of the look-ahead points, and of the gradients at them."""
    vectors = sum(vectors_moved(algorithm.phi, line, WORKERS) for line in ("line 3", "line 6"))
    return float((vectors + 3 * WORKERS + 2 * WORKERS) * algorithm.u.nbytes)


def rows(
    problem: Problem, potential: str, configurations: int, floor: Floor, effort: Effort
) -> list[PopulationRow]:
    """Separate runs, then a population in each way."""
    device = problem.device
    record = cuda_graph if device.type == "cuda" else None
    run = problem.consensus(potential, range(WORKERS))
    step = Replay(run).step if record else run.step
    separate = configurations * median_ms(counted(step), device, effort)
    times = {"separate": (separate, 1)}
    for name in WAYS:
        together = population(problem, potential, configurations, Way())
        oracle = together.oracle
        assert isinstance(oracle, PopulationRisk)
        oracle.risk.side_by_side = record is not None
        oracle.way = oracle.fastest_way(together.z.flatten(0, 1), (name,), record)
        ms = median_ms(counted(together.step), device, effort)
        assert not bool(together.diverged().any()), "the population that was timed has diverged"
        times[name] = (ms, oracle.way.at_once)
    least = configurations * floor.ms
    return [
        PopulationRow(
            problem.name, potential, configurations, name, at_once, ms, ms / separate, ms / least
        )
        for name, (ms, at_once) in times.items()
    ]


def show(floor: Floor, found: Sequence[PopulationRow]) -> None:
    """Print the table of one potential."""
    row = found[0]
    print(
        f"\n{row.model}, {row.potential}, {row.configurations} configurations of {WORKERS} workers:"
        f" floor {row.configurations * floor.ms:.3f} ms"
        f" ({floor.operations / 1e6:.1f} million operations and {floor.bytes / 1e6:.1f} MB each)"
    )
    cells = [(r.method, r.at_once, r.ms, r.over_separate, r.over_floor, r.ms / 2) for r in found]
    print(table(COLUMNS, cells))


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, measure, print, write."""
    parser = harness.parser("population", quick="tiny sizes, on any machine", device=True)
    parser.add_argument("--configurations", type=int, help="72 on a GPU, 8 on a CPU")
    parser.add_argument("--potentials", nargs="+", choices=TABLE_2, default=["quad", "tan"])
    parser.add_argument("--models", nargs="+", default=["lenet5", "logistic"])
    options = parser.parse_args(arguments)
    device, quick = harness.device_of(options, parser), options.quick
    on_gpu = device.type == "cuda"
    configurations = options.configurations
    if configurations is None:
        configurations = 2 if quick else 72 if on_gpu else 8
    if configurations < 1:
        parser.error(f"`--configurations` is {configurations}; allowed: at least 1")
    effort = Effort(1, 2) if quick else Effort(7, 20 if on_gpu else 5)
    harness.print_environment(device)
    peak = operations_per_s(device, 128 if quick else 8192 if on_gpu else 2048, effort)
    bandwidth = copy_bytes_per_s(device, 10**5 if quick else 10**8 if on_gpu else 10**7, effort)
    print(f"{peak / 1e9:,.0f} billion operations/s (float32), {bandwidth / 1e9:,.0f} GB/s")
    floors: dict[str, Floor] = {}
    measured: list[PopulationRow] = []
    for model in options.models:
        images = 200 if quick else 60_000 if on_gpu else 2_000
        problem = Problem(model, num_images=images, device=device)
        operations = operations_of_gradients(problem)
        for potential in options.potentials:
            moved = bytes_of_lines(problem.consensus(potential, range(WORKERS)))
            floor = Floor(peak, bandwidth, operations, moved)
            found = rows(problem, potential, configurations, floor, effort)
            show(floor, found)
            floors[f"{model} {potential}"] = floor
            measured += found
            assert all(math.isfinite(row.ms) for row in found)
    about = harness.environment(device)
    harness.write_json(options.json, {"environment": about, "floors": floors, "rows": measured})


if __name__ == "__main__":
    main()
