"""Code that the benchmarks share: problems, timing, tables, figures and options.

Every benchmark times LeNet-5 or another model on images of noise, takes medians over blocks of
calls, prints a table, and writes the same rows as JSON. It needs torch alone, so that a benchmark
of the GPU runs in an environment without Hydra.
"""

import argparse
import json
import os
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import torch
from torch import nn

from consensus import POTENTIALS, Layerwise
from consensus.algorithm import Algorithm, Consensus
from consensus.comm import Group, Solo
from consensus.core.kernels.plain import Plain
from consensus.problem import Dataset, Minibatches, MinibatchRisk, Risk, build_model
from consensus.server import Server
from consensus.worker import Worker

SIGMA, TAU, LAM, KAPPA, NU, BATCH = 1e-4, 1e-4, 0.1, 0.9, 1e-4, 20
WORKERS = 4  # in one process
TIMEOUT_S = 120.0
CPU = torch.device("cpu")

Call = Callable[[], object]
MakeRisk = Callable[[nn.Module, Literal["sum"]], Risk]


# ---- problems


class Problem:
    """A model and images of noise, the same on every rank.

    Args:
        model: A name in MODELS.
        options: Of the model.
        num_images: N.
        device: Of everything.
        dtype: Of images and parameters.
        make_risk: Computes the gradients.
    """

    def __init__(
        self,
        model: str = "lenet5",
        options: Mapping[str, object] | None = None,
        *,
        num_images: int = 1000,
        device: torch.device = CPU,
        dtype: torch.dtype = torch.float32,
        make_risk: MakeRisk = Risk,
    ) -> None:
        random = torch.Generator().manual_seed(0)
        images = torch.rand(num_images, 1, 28, 28, generator=random)
        labels = torch.randint(10, (num_images,), generator=random)
        data = Dataset((images, labels), (images[:1], labels[:1]), num_classes=10)
        self.dataset = data.to(device, dtype)
        self.name, self.options = model, dict(options or {})
        self.device, self.dtype, self.make_risk = device, dtype, make_risk

    def model(self) -> nn.Module:
        """A new model with the initial weights of seed 0."""
        model = build_model(self.name, 0, self.dtype, num_classes=10, **self.options)
        return model.to(self.device)

    def minibatches(self, workers: Iterable[int], batch_size: int = BATCH) -> list[Minibatches]:
        """The minibatches of these workers, each drawn from all images."""
        everything = torch.arange(len(self.dataset.train), device=self.device)
        return [Minibatches(everything, batch_size, seed=0, worker=j) for j in workers]

    def oracle(self, workers: Iterable[int], batch_size: int = BATCH) -> MinibatchRisk:
        """The gradients of these workers, by a model of its own."""
        risk = self.make_risk(self.model(), "sum")
        return MinibatchRisk(risk, self.dataset, self.minibatches(workers, batch_size))

    def consensus(
        self,
        potential: str,
        workers: Sequence[int],
        group: Group | None = None,
        *,
        period: int = 1,
        eta: float = 1.0,
        fused: bool = True,
        batch_size: int = BATCH,
    ) -> Consensus:
        """Algorithm 1 with these workers in this process, all at the initial weights."""
        oracle = self.oracle(workers, batch_size)
        u = oracle.risk.layout.flatten(oracle.risk.model).to(self.device)
        phi = Layerwise(POTENTIALS[potential], oracle.risk.layout.layers, eta)
        z = u.expand(len(workers), -1)
        return Consensus(
            Server(u, phi, group or Solo(self.device), None if fused else Plain(phi, u)),
            Worker(z, oracle, phi, kappa=KAPPA, nu=NU, kernel=None if fused else Plain(phi, u)),
            tau=TAU,
            sigma=SIGMA,
            lam=LAM,
            period=period,
        )


def require_finite(algorithm: Algorithm) -> None:
    """Fail unless the algorithm that was timed still trains."""
    assert bool(torch.isfinite(algorithm.u).all()), "the run that was timed has diverged"
    algorithm.verify()


# ---- timing


@dataclass(frozen=True)
class Effort:
    """How often something is called: `blocks` blocks of `calls` calls."""

    blocks: int
    calls: int


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all submitted work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def block_ms(call: Call, device: torch.device, calls: int) -> float:
    """Milliseconds of one of `calls` calls in a row.

    On a GPU the time is between two events on its stream. It includes the time in which the device
    waits for the host.
    """
    if device.type == "cuda":
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            call()
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop)) / calls
    started = perf_counter()
    for _ in range(calls):
        call()
    return 1e3 * (perf_counter() - started) / calls


def median_ms(call: Call, device: torch.device, effort: Effort) -> float:
    """Milliseconds of a call: the median over blocks, after a block that does not count."""
    block_ms(call, device, max(1, effort.calls // 2))
    synchronize(device)
    return statistics.median(block_ms(call, device, effort.calls) for _ in range(effort.blocks))


def counted(step: Callable[[int], None]) -> Call:
    """A call without arguments that is the next iteration."""
    t = -1

    def call() -> None:
        nonlocal t
        t += 1
        step(t)

    return call


def slowest_s(step: Callable[[int], object], iterations: range, group: Group) -> float:
    """Seconds of one step, the mean over these iterations on the slowest rank; a collective."""
    group.barrier()
    started = perf_counter()
    for t in iterations:
        step(t)
    mine = (perf_counter() - started) / len(iterations)
    return float(group.gather(torch.tensor([mine], dtype=torch.float64)).amax())


def copy_bytes_per_s(device: torch.device, n: int, effort: Effort) -> float:
    """The bandwidth of a copy of n coordinates, reading and writing."""
    source = torch.ones(n, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / (1e-3 * median_ms(lambda: target.copy_(source), device, effort))


# ---- the machine


def num_cores() -> int:
    """The number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def environment(device: torch.device = CPU) -> dict[str, Any]:
    """Versions and hardware of a measurement."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {
        "torch": torch.__version__,
        "device": name,
        "threads": torch.get_num_threads(),
        "cores": num_cores(),
    }


# ---- options and output


def parser(
    name: str, *, quick: str = "", device: bool = False, plot: bool = False
) -> argparse.ArgumentParser:
    """The options that several benchmarks have.

    Args:
        name: Of the benchmark, after `scripts/bench`.
        quick: Help of `--quick`; none: there is no such option.
        device: Whether there is `--device`.
        plot: Whether there is `--plot`.
    """
    options = argparse.ArgumentParser(prog=f"scripts/bench {name}")
    options.add_argument("--json", metavar="FILE", help="write the results there")
    if quick:
        options.add_argument("--quick", action="store_true", help=quick)
    if device:
        where = "cuda" if torch.cuda.is_available() else "cpu"
        options.add_argument("--device", choices=["cuda", "cpu"], default=where)
    if plot:
        options.add_argument("--plot", metavar="FILE", help="draw them there (PNG, PDF, SVG)")
    return options


def add_methods(options: argparse.ArgumentParser) -> None:
    """The option `--methods` of `chosen`."""
    options.add_argument("--methods", nargs="+", metavar="TEXT", help="those whose name has a TEXT")


def chosen(names: Iterable[str], options: argparse.Namespace) -> list[str]:
    """The names that have one of the texts of `--methods`; without the option all.

    Raises:
        SystemExit: If none has one.
    """
    found = [name for name in names if any(text in name for text in options.methods or [""])]
    if not found:
        raise SystemExit(f"`--methods` is {' '.join(options.methods)}; no name of a method has it")
    return found


def start_ranks(name: str, processes: int, arguments: Sequence[str] | None) -> None:
    """Replace this process by the benchmark `name` under torchrun, unless it is a rank already.

    `arguments` are those of its main: None stands for the command line.
    """
    if "RANK" not in os.environ:
        ranks = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        own = sys.argv[1:] if arguments is None else arguments
        os.execv(sys.executable, [sys.executable, "-m", *ranks, "-m", f"benchmarks.{name}", *own])


def device_of(options: argparse.Namespace, parser: argparse.ArgumentParser) -> torch.device:
    """The device of `--device`; an absent one ends the command with exit code 2."""
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("`--device` is cuda, and torch finds none; allowed here: cpu")
    return torch.device(options.device)


def print_environment(device: torch.device = CPU) -> None:
    """One line with the versions and the hardware."""
    print(", ".join(f"{key} {value}" for key, value in environment(device).items()))


def write_json(path: str | None, content: Mapping[str, Any]) -> None:
    """Write results, dataclasses as objects; do nothing without a path."""
    if path:
        Path(path).write_text(json.dumps(content, indent=2, default=asdict) + "\n")


def table(columns: Mapping[str, str], rows: Iterable[Sequence[object]]) -> str:
    """Rows as aligned text, with a line of heads.

    Args:
        columns: Format by head, with alignment and width: "<10", ">9.3f".
        rows: One value for each column; None leaves a cell empty.
    """

    def cell(value: object, spec: str) -> str:
        if value is None or isinstance(value, str):
            spec = re.match(r"[<>]\d*", spec)[0]
        return format("" if value is None else value, spec)

    lines = [columns.keys(), *rows]
    return "\n".join(" ".join(map(cell, line, columns.values())).rstrip() for line in lines)


def plot_medians(
    axes: Any, xs: Sequence[float], samples: Sequence[Sequence[float]], **style: Any
) -> None:
    """Milliseconds over x: the median of the samples, in seconds, and their range."""
    ms = [1e3 * statistics.median(own) for own in samples]
    below = [m - 1e3 * min(own) for m, own in zip(ms, samples, strict=True)]
    above = [1e3 * max(own) - m for m, own in zip(ms, samples, strict=True)]
    axes.errorbar(xs, ms, (below, above), **{"marker": "o", "linestyle": "none", **style})
    axes.set_ylabel("time of one iteration (ms)")
