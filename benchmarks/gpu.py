"""What an iteration costs on one GPU: launches, memory traffic, and what large models pay.

    scripts/bench_gpu --json gpu.json --trace traces --models resnet50 gpt2
    python -m benchmarks.gpu ...          the same with the torch that is there already

Three questions, each with a table:

    lenet5   4 workers on one device, LeNet-5, batch 20: a step is some hundred small kernels, and
             launching them costs more than running them. `Consensus.step` as it is, and the same
             step recorded as a CUDA graph and replayed (consensus/replay.py), as a run does it. The
             gradients worker by worker; side by side, each worker on a stream of its own; or
             of all workers in one pass, the convolutions grouped or as products of matrices,
             which sums in another order.
    vector   lines 3 and 6 alone on vectors of n coordinates, each potential of Table 2, by the
             operations of torch, by those of core/kernels/triton.py, and by what torch.compile
             makes of those operations: bytes per second beside those of a copy.
    models   --models: one worker with a model as large as ResNet-50 or GPT-2 small; its step
             without coupling, and with quad and tan. In float32 with torch's defaults: in lower
             precision the gradients take less time, and the coupling a larger share of it.

All of it runs on the CPU as well (--device cpu). There are no CUDA graphs there: the step that
would be captured runs eagerly, from the same fixed memory.

Data flow: a function per table builds the problem, hands a callable to `median_ms`, and returns
rows. Times are medians over blocks of calls; on a GPU between two events on its stream, which hold
the time in which the device waits for the host.

Bytes. The table has what the kernels of core/kernels/triton.py read and write, counted there, over
the measured time, also where the operations of torch do the same in more passes. What fits into a
cache can surpass 100 % of the copy.
"""

import argparse
import gc
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, max_pool2d, relu, scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

from consensus import POTENTIALS, Layerwise, Radial
from consensus.algorithm import Algorithm, Consensus, Msgd
from consensus.comm import Solo
from consensus.core.kernels.plain import Plain
from consensus.problem import (
    Batch,
    BatchedRisk,
    Dataset,
    Minibatches,
    MinibatchRisk,
    Risk,
    build_model,
)
from consensus.replay import Replay, cuda_graph
from consensus.server import Server
from consensus.worker import Oracle, Worker

SIGMA, TAU, LAM, KAPPA, NU = 1e-4, 1e-4, 0.1, 0.9, 1e-4
WORKERS, BATCH = 4, 20
ITERATIONS = 30_000  # of the paper's runs
TABLE_2 = ("quad", "cubic", "tan", "tan_sep", "log", "log_sep")

MODES = ("eager", "fused", "compiled")

Call = Callable[[], object]


# ---- how it is timed


@dataclass(frozen=True)
class Effort:
    """How often something is called: once not timed, then blocks of `calls`."""

    blocks: int
    calls: int


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def block_ms(call: Call, device: torch.device, calls: int) -> float:
    """Milliseconds of one of `calls` calls in a row."""
    if device.type == "cuda":
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            call()
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop)) / calls
    started = time.perf_counter()
    for _ in range(calls):
        call()
    return 1e3 * (time.perf_counter() - started) / calls


def median_ms(call: Call, device: torch.device, effort: Effort) -> float:
    """Milliseconds of a call: the median over blocks, after one block that does not count."""
    block_ms(call, device, max(1, effort.calls // 2))
    synchronize(device)
    return statistics.median(block_ms(call, device, effort.calls) for _ in range(effort.blocks))


def host_syncs(call: Call, device: torch.device) -> int | None:
    """How often a call makes the host wait for the device, as far as torch tells; None on a CPU."""
    if device.type != "cuda":
        return None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing CUDA operation" in str(w.message) for w in caught)


def compiled(call: Call) -> tuple[Call | None, str]:
    """The call, compiled as one graph and called once; or None, and a line that says why not."""
    torch.compiler.reset()
    fused = torch.compile(call, fullgraph=True, dynamic=False)
    try:
        fused()
    except (RuntimeError, ImportError, OSError) as error:  # no compiler, or one that fails
        return None, (str(error).strip() or repr(error)).splitlines()[0]
    return fused, ""


def save_trace(call: Call, device: torch.device, path: Path, calls: int = 5) -> None:
    """Write a chrome trace of some calls; print where the time went."""
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    call()
    synchronize(device)
    with profile(activities=activities, acc_events=True) as profiler:
        for _ in range(calls):
            call()
        synchronize(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(path))
    key = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    print(f"\n{path}: {calls} calls")
    print(profiler.key_averages().table(sort_by=key, row_limit=12, max_name_column_width=60))


# ---- lenet5: the whole step, replayed


GRADIENTS: dict[str, Callable[[nn.Module, Literal["sum"]], Risk]] = {
    "loop": Risk,
    "streams": Risk,
    "grouped": partial(BatchedRisk, convolutions="grouped"),
    "products": partial(BatchedRisk, convolutions="products"),
}
"""How the K gradients are computed: worker by worker, each on its own stream, or batched."""

VARIANTS = (
    ("loop", "plain"),
    ("loop", "eager"),
    ("loop", "graph"),
    ("streams", "graph"),
    ("grouped", "graph"),
    ("products", "graph"),
)
"""Gradients and mode: without the kernels of core/kernels/triton.py, with them, and replayed."""


def lenet5(
    device: torch.device,
    potential: str,
    gradients: str,
    *,
    num_images: int,
    fused: bool = True,
    batch_size: int = BATCH,
    dtype: torch.dtype = torch.float32,
    eta: float = 1.0,
) -> Consensus:
    """Algorithm 1 with 4 workers in one process on random images that lie on the device.

    Args:
        device: Of everything.
        potential: A name in POTENTIALS.
        gradients: A name in GRADIENTS.
        num_images: N.
        fused: Whether a GPU uses the kernels of core/kernels/triton.py.
        batch_size: B.
        dtype: Of images and parameters.
        eta: Width of the potential.
    """
    random = torch.Generator().manual_seed(0)
    images = torch.rand(num_images, 1, 28, 28, generator=random)
    labels = torch.randint(10, (num_images,), generator=random)
    dataset = Dataset(images, labels, images[:1], labels[:1], num_classes=10).to(device, dtype)
    everything = torch.arange(num_images, device=device)
    minibatches = [Minibatches(everything, batch_size, seed=0, worker=j) for j in range(WORKERS)]
    risk = GRADIENTS[gradients](build_model("lenet5", 0, dtype, num_classes=10), "sum")
    oracle = MinibatchRisk(risk, dataset, minibatches)
    u = risk.layout.flatten(risk.model).to(device)
    phi = Layerwise(POTENTIALS[potential], risk.layout.layers, eta)
    z = u.expand(WORKERS, -1)
    return Consensus(
        Server(u, phi, Solo(device), None if fused else Plain(phi, u)),
        Worker(z, oracle, phi, kappa=KAPPA, nu=NU, kernel=None if fused else Plain(phi, u)),
        tau=TAU,
        sigma=SIGMA,
        lam=LAM,
    )


@dataclass
class StepRow:
    """The step of 4 workers with LeNet-5."""

    potential: str
    gradients: str
    mode: str
    ms: float
    steps_per_s: float
    seconds_for_30000: float
    host_syncs: int | None


def step_rows(
    device: torch.device,
    potentials: Sequence[str],
    effort: Effort,
    num_images: int,
    trace: Path | None,
) -> list[StepRow]:
    """Eager and replayed, worker by worker and batched."""
    rows = []
    on_gpu = device.type == "cuda"
    for potential in potentials:
        for gradients, mode in VARIANTS:
            algorithm = lenet5(
                device, potential, gradients, num_images=num_images, fused=mode != "plain"
            )
            step = algorithm.step
            if mode == "graph":
                record = cuda_graph if on_gpu else as_it_is
                step = Replay(algorithm, record=record, side_by_side=gradients == "streams").step
                mode = "graph" if on_gpu else "static"
            call = counted(step)
            fewer = Effort(effort.blocks, max(1, effort.calls // 5))
            ms = median_ms(call, device, effort if mode == "graph" else fewer)
            syncs = host_syncs(call, device)
            if trace and potential == potentials[-1]:
                save_trace(call, device, trace / f"lenet5-{potential}-{gradients}-{mode}.json")
            require_finite(algorithm)
            rows.append(
                StepRow(potential, gradients, mode, ms, 1e3 / ms, ITERATIONS * ms / 1e3, syncs)
            )
    return rows


def counted(step: Callable[[int], None]) -> Call:
    """A call that is the next iteration."""
    t = -1

    def call() -> None:
        nonlocal t
        t += 1
        step(t)

    return call


def as_it_is(call: Call) -> Call:
    """In place of a record: the step runs anew, from the same memory."""
    return call


def require_finite(algorithm: Algorithm) -> None:
    """What was timed must have been training: nan and inf are not."""
    assert bool(torch.isfinite(algorithm.u).all()), "the run that was timed has diverged"
    algorithm.verify()


# ---- vector: lines 3 and 6 alone


class Unbranched(Layerwise):
    """The same potential, which never asks the host: for the compiler.

    On a CPU the line search first compares |x| + |d| with the radius, and branches on the answer;
    what is compiled as one graph must not. Where it would have found 1 at once, the boundary step
    is far above 1: the same numbers.
    """

    def surely_feasible(self, reach: Tensor, d: Tensor, u: Tensor) -> bool:
        """Never sure."""
        del reach, d, u
        return False

    def surely_inside(self, s: Tensor) -> bool:
        """Never sure."""
        del s
        return False

    def dpsi_within(self, reach: Tensor) -> Callable[[Tensor], Tensor] | float:
        """The one that serves everywhere."""
        del reach
        return self.profile.dpsi


class Coupling:
    """Lines 3 and 6 of one worker, with a vector of noise in place of the minibatch gradient.

    Args:
        device: Of everything.
        potential: A name in POTENTIALS.
        n: The number of coordinates, in layers of equal size.
        kind: `Layerwise` as a run has it, or `Unbranched` where no number may go to the host.
        num_layers: L.
        fused: Whether a GPU uses the kernels of core/kernels/triton.py.

    Attributes:
        lines: "line 3" and "line 6", each a call without arguments.
    """

    def __init__(
        self,
        device: torch.device,
        potential: str,
        n: int,
        kind: type[Layerwise] = Layerwise,
        num_layers: int = 16,
        *,
        fused: bool = True,
    ) -> None:
        random = torch.Generator(device).manual_seed(0)
        ends = [i * n // num_layers for i in range(num_layers + 1)]
        phi = kind(POTENTIALS[potential], list(pairwise(ends)))
        u = torch.randn(n, generator=random, device=device).mul_(0.1)
        # |u - z| of a layer is near 0.3: inside every domain, and where the potentials differ
        z = torch.randn(1, n, generator=random, device=device).mul_(0.3 * math.sqrt(num_layers / n))
        z += u
        self.phi = phi
        self.server = Server(u, phi, Solo(device), None if fused else Plain(phi, u))
        oracle = cast(Oracle, None)  # nothing is drawn
        self.worker = Worker(
            z, oracle, phi, kappa=KAPPA, nu=NU, kernel=None if fused else Plain(phi, u)
        )
        self.delta = torch.randn(1, n, generator=random, device=device).mul_(1e-3)
        self.lines: dict[str, Call] = {"line 3": self.line_3, "line 6": self.line_6}

    def line_3(self) -> None:
        """Force and step of u."""
        self.server.finish(self.server.start(self.worker.z, self.worker.scratch), TAU)

    def line_6(self) -> None:
        """Step of z and v. The gradient is overwritten, by numbers of its size or smaller."""
        u = self.server.u
        self.worker.update(self.delta, SIGMA, SIGMA / LAM, u, u)


def vectors_moved(phi: Layerwise, line: str, num_workers: int = 1) -> int:
    """n-vectors that the kernels read or write; counted in core/kernels/triton.py."""
    k = num_workers
    norms = isinstance(phi.size, Radial) and phi.profile.slope is None
    if line == "line 3":
        return k + 2 + 3 + (k + 1 if norms else 0) + (k + 2 if phi.bounded else 0)
    return 5 * k + 1 + (3 * k + 1 if phi.bounded else k + 1 if norms else 0)


def copy_bytes_per_s(device: torch.device, n: int, effort: Effort) -> float:
    """The bandwidth of a copy of n coordinates, reading and writing."""
    source = torch.ones(n, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / (1e-3 * median_ms(lambda: target.copy_(source), device, effort))


@dataclass
class VectorRow:
    """A line on vectors of n coordinates; ms and what follows from it are None if absent."""

    potential: str
    line: str
    mode: str
    bytes: int
    ms: float | None
    bytes_per_s: float | None
    share_of_copy: float | None
    absent: str


def vector_row(
    device: torch.device,
    n: int,
    potential: str,
    line: str,
    mode: str,
    effort: Effort,
    copy: float,
    trace: Path | None,
) -> VectorRow:
    """One line of one potential. `copy` is the bandwidth to compare with, in bytes per second."""
    kind = Unbranched if mode == "compiled" else Layerwise
    coupling = Coupling(device, potential, n, kind, fused=mode == "fused")
    size = vectors_moved(coupling.phi, line) * coupling.server.u.nbytes
    call: Call | None = coupling.lines[line]
    if mode == "compiled":
        call, why = compiled(coupling.lines[line])
        if call is None:
            return VectorRow(potential, line, mode, size, None, None, None, why)
    assert call is not None
    ms = median_ms(call, device, effort)
    assert bool(torch.isfinite(coupling.worker.z).all()), "what was timed has diverged"
    if trace:
        name = f"vector-{potential}-{line.replace(' ', '')}-{mode}.json"
        save_trace(call, device, trace / name)
    rate = size / (1e-3 * ms)
    return VectorRow(potential, line, mode, size, ms, rate, rate / copy, "")


def vector_rows(
    device: torch.device,
    n: int,
    potentials: Sequence[str],
    effort: Effort,
    copy: float,
    trace: Path | None,
    modes: Sequence[str],
) -> list[VectorRow]:
    """Both lines in each mode; traces of two potentials, one without and one with norms."""
    rows = []
    for potential in potentials:
        traced = trace if potential in ("quad", "tan") else None
        for line in ("line 3", "line 6"):
            for mode in modes:
                rows.append(vector_row(device, n, potential, line, mode, effort, copy, traced))
                torch.compiler.reset()  # lets go of the vectors before there are new ones,
                gc.collect()  # and so does this: a Coupling refers to itself
    return rows


# ---- models: what the coupling adds to a large model


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions around a shortcut, (B, c, h, w) -> (B, 4 width, h', w')."""

    def __init__(self, channels: int, width: int, stride: int, groups: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.norm1 = nn.GroupNorm(groups, width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(groups, width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.norm3 = nn.GroupNorm(groups, 4 * width)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != 4 * width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels, 4 * width, 1, stride, bias=False),
                nn.GroupNorm(groups, 4 * width),
            )

    def forward(self, x: Tensor) -> Tensor:
        """(B, c, h, w) -> (B, 4 width, h / stride, w / stride)."""
        y = relu(self.norm1(self.conv1(x)))
        y = relu(self.norm2(self.conv2(y)))
        return relu(self.norm3(self.conv3(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """ResNet-50 with GroupNorm in place of BatchNorm: a worker's state is its parameters alone.

    Args:
        width: Of the first stage; it doubles from stage to stage.
        blocks: In each stage.
        num_classes: Number of logits.
        groups: Of each GroupNorm.
    """

    def __init__(
        self,
        width: int = 64,
        blocks: Sequence[int] = (3, 4, 6, 3),
        num_classes: int = 1000,
        groups: int = 32,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 7, 2, padding=3, bias=False)
        self.norm = nn.GroupNorm(groups, width)
        stages: list[nn.Module] = []
        channels = width
        for stage, depth in enumerate(blocks):
            for block in range(depth):
                stride = 2 if stage > 0 and block == 0 else 1
                stages.append(Bottleneck(channels, width << stage, stride, groups))
                channels = 4 * (width << stage)
        self.stages = nn.Sequential(*stages)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes) of images (B, 3, h, w)."""
        x = max_pool2d(relu(self.norm(self.conv(images))), 3, 2, padding=1)
        logits: Tensor = self.fc(self.stages(x).mean((2, 3)))
        return logits


class Block(nn.Module):
    """Causal self-attention and a perceptron, both around a shortcut, (B, T, d) -> (B, T, d)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.mix = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, d) -> (B, T, d); a position sees itself and what is before it."""
        heads = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))  # (B, T, 3, heads, c)
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # each (B, heads, T, c)
        seen: Tensor = scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.mix(seen.transpose(1, 2).flatten(2))
        change: Tensor = self.down(gelu(self.up(self.norm2(x)), approximate="tanh"))
        return x + change


class Gpt(nn.Module):
    """GPT-2 small, with an output matrix of its own and half the vocabulary.

    GPT-2 ties its output to its embedding, and equation (18) needs each parameter in exactly one
    layer. Two matrices for 25,152 tokens are as large as one for GPT-2's 50,257.

    Args:
        vocabulary: Number of tokens.
        context: T, the longest sequence.
        width: d.
        heads: Of each block.
        depth: Number of blocks.
    """

    def __init__(
        self,
        vocabulary: int = 25_152,
        context: int = 1024,
        width: int = 768,
        heads: int = 12,
        depth: int = 12,
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B T, vocabulary) of the next tokens after tokens (B, T) int64."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.blocks(self.tokens(tokens) + self.positions(positions))
        logits: Tensor = self.output(self.norm(x)).flatten(0, 1)
        return logits


@dataclass
class Workload:
    """A model and random minibatches for it, all in one place.

    Attributes:
        model: Maps inputs[i] to logits, one row for each label.
        inputs: (P, B, ...)
        labels: (P, number of rows) int64
    """

    model: nn.Module
    inputs: Tensor
    labels: Tensor


def resnet50(device: torch.device, quick: bool) -> Workload:
    """32 images of 224 x 224; quick: a model of the same kind that a test can afford."""
    model = ResNet(width=8, blocks=(1, 1, 1, 1), num_classes=10, groups=4) if quick else ResNet()
    batch, side, classes = (2, 32, 10) if quick else (32, 224, 1000)
    images = torch.rand(2, batch, 3, side, side, device=device)
    return Workload(model.to(device), images, torch.randint(classes, (2, batch), device=device))


def gpt2(device: torch.device, quick: bool) -> Workload:
    """8 sequences of 1,024 tokens; quick: a model of the same kind that a test can afford."""
    model = Gpt(vocabulary=64, context=16, width=32, heads=4, depth=2) if quick else Gpt()
    batch, context = (2, 16) if quick else (8, 1024)
    text = torch.randint(model.tokens.num_embeddings, (2, batch, context + 1), device=device)
    return Workload(model.to(device), text[..., :-1], text[..., 1:].flatten(1))


MODELS: dict[str, Callable[[torch.device, bool], Workload]] = {"resnet50": resnet50, "gpt2": gpt2}
"""By the name on the command line."""


class ResidentBatches:
    """The oracle of one worker that goes round minibatches on the device, by `Risk.gradient`."""

    def __init__(self, workload: Workload) -> None:
        self.risk = Risk(workload.model, "mean")
        self.workload = workload
        self.position = 0

    def draw(self) -> Batch:
        """Inputs (1, B, ...) and labels (1, rows)."""
        i = self.position % len(self.workload.inputs)
        self.position += 1
        return self.workload.inputs[i : i + 1], self.workload.labels[i : i + 1]

    def gradient(self, points: Tensor, batch: Batch) -> Tensor:
        """(1, n) -> (1, n), in the same memory."""
        return self.risk.gradient(points, *batch, out=points)

    def state_dict(self) -> dict[str, Tensor]:
        """The `position`. (1,)."""
        return {"position": torch.tensor([self.position])}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue after that many draws."""
        self.position = int(state["position"])


def one_worker(workload: Workload, potential: str | None) -> Algorithm:
    """Algorithm 1 with one worker, or with None the same worker without coupling."""
    oracle = ResidentBatches(workload)
    layout = oracle.risk.layout
    u = layout.flatten(workload.model)
    phi = Layerwise(POTENTIALS[potential or "quad"], layout.layers)
    worker = Worker(u.unsqueeze(0), oracle, phi, kappa=KAPPA, nu=NU)
    group = Solo(u.device)
    if potential is None:
        return Msgd(worker, group, sigma=SIGMA)
    return Consensus(Server(u, phi, group), worker, tau=TAU, sigma=SIGMA, lam=LAM)


@dataclass
class ModelRow:
    """The step of one worker with a large model."""

    model: str
    parameters: int
    layers: int
    method: str
    ms: float
    ratio_to_local: float


def model_rows(device: torch.device, name: str, quick: bool, effort: Effort) -> list[ModelRow]:
    """Without coupling, then with."""
    workload = MODELS[name](device, quick)
    rows: list[ModelRow] = []
    for method in ("local", "quad", "tan"):
        algorithm = one_worker(workload, None if method == "local" else method)
        ms = median_ms(counted(algorithm.step), device, effort)
        require_finite(algorithm)
        n, layers = algorithm.u.numel(), len(algorithm.phi.layers)
        local = rows[0].ms if rows else ms
        rows.append(ModelRow(name, n, layers, method, ms, ms / local))
    return rows


# ---- what is printed


def show_steps(rows: list[StepRow]) -> None:
    """The table of lenet5."""
    print(f"\nLeNet-5, {WORKERS} workers on one device, batch {BATCH}")
    head = f"{'potential':10}{'gradients':10}{'mode':8}{'ms':>9}{'steps/s':>9}{'30,000 in s':>13}"
    print(f"{head}  syncs")
    for row in rows:
        syncs = "" if row.host_syncs is None else row.host_syncs
        print(
            f"{row.potential:10}{row.gradients:10}{row.mode:8}{row.ms:9.3f}{row.steps_per_s:9.0f}"
            f"{row.seconds_for_30000:13.1f}  {syncs}"
        )


def show_vectors(rows: list[VectorRow], n: int, copy: float) -> None:
    """The table of vector."""
    print(f"\nn = {n:,}, one worker; a copy moves {copy / 1e9:.0f} GB/s")
    print(f"{'potential':10}{'line':8}{'mode':10}{'ms':>9}{'MB':>10}{'GB/s':>8}{'/ copy':>8}")
    for row in rows:
        head = f"{row.potential:10}{row.line:8}{row.mode:10}"
        if row.ms is None or row.bytes_per_s is None or row.share_of_copy is None:
            print(f"{head}   absent: {row.absent}")
            continue
        print(
            f"{head}{row.ms:9.3f}{row.bytes / 1e6:10.1f}{row.bytes_per_s / 1e9:8.1f}"
            f"{100 * row.share_of_copy:6.0f} %"
        )


def show_models(rows: list[ModelRow]) -> None:
    """The table of models."""
    print(f"\n{'model':10}{'parameters':>12}{'layers':>8}  {'method':8}{'ms':>9}{'/ local':>9}")
    for row in rows:
        print(
            f"{row.model:10}{row.parameters:12,}{row.layers:8}  {row.method:8}{row.ms:9.2f}"
            f"{row.ratio_to_local:9.3f}"
        )


def environment(device: torch.device) -> dict[str, Any]:
    """What the numbers belong to."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {"torch": torch.__version__, "device": name, "threads": torch.get_num_threads()}


def whole_number(text: str) -> int:
    """1e8 as well as 100000000."""
    value = float(text)
    if not value.is_integer() or value < 16:
        raise argparse.ArgumentTypeError(f"{text}; allowed: a whole number, at least 16")
    return int(value)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(prog="scripts/bench_gpu")
    where = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=["cuda", "cpu"], default=where)
    parser.add_argument("--quick", action="store_true", help="tiny: shows that it runs")
    parser.add_argument(
        "--parts", nargs="*", choices=["lenet5", "vector"], default=["lenet5", "vector"]
    )
    parser.add_argument("--models", nargs="*", choices=list(MODELS), default=[])
    parser.add_argument("--potentials", nargs="+", choices=TABLE_2, default=list(TABLE_2))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="of vector")
    parser.add_argument("--n", type=whole_number, help="of vector: 1e8 on a GPU, 1e6 on a CPU")
    parser.add_argument("--json", metavar="FILE", help="write the rows there")
    parser.add_argument(
        "--trace", metavar="DIR", help="write chrome traces there, print the kernels"
    )
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    on_gpu, quick = device.type == "cuda", options.quick
    if on_gpu and not torch.cuda.is_available():
        parser.error("`--device` is cuda, and torch finds none; allowed here: cpu")
    n = options.n or (100_000 if quick else 100_000_000 if on_gpu else 1_000_000)
    trace = Path(options.trace) if options.trace else None
    found = environment(device)
    print(", ".join(f"{key} {value}" for key, value in found.items()))
    content: dict[str, Any] = {"environment": found}

    def write() -> None:  # after each part: the next may not fit into the memory
        if options.json:
            Path(options.json).write_text(json.dumps(content, indent=2) + "\n")

    if "lenet5" in options.parts:
        effort = Effort(3, 5) if quick else Effort(5, 100 if on_gpu else 20)
        steps = step_rows(device, options.potentials, effort, 1_000 if quick else 60_000, trace)
        show_steps(steps)
        content["lenet5"] = [asdict(row) for row in steps]
        write()
    if "vector" in options.parts:
        effort = Effort(3, 5) if quick else Effort(7, 10)
        copy = copy_bytes_per_s(device, n, effort)
        vectors = vector_rows(device, n, options.potentials, effort, copy, trace, options.modes)
        show_vectors(vectors, n, copy)
        content["vector"] = {
            "n": n,
            "copy_bytes_per_s": copy,
            "rows": [asdict(row) for row in vectors],
        }
        write()
    if options.models:
        effort = Effort(2, 2) if quick else Effort(5, 10)
        models = [row for name in options.models for row in model_rows(device, name, quick, effort)]
        show_models(models)
        content["models"] = [asdict(row) for row in models]
        write()


if __name__ == "__main__":
    main()
