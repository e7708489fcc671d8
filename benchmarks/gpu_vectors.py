"""Lines 3 and 6 of Algorithm 1 alone, on vectors of n coordinates: part of benchmarks/gpu.py.

Each potential of Table 2 is timed with the operations of torch, with the fused kernels, and with
the result of torch.compile. Bytes per second are compared with those of a copy.

Bytes. The table has the bytes that the fused kernels read and write, over the measured time, also
where the operations of torch do the same in more passes. Vectors that fit into a cache can exceed
100 % of the copy.
"""

import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from benchmarks.harness import KAPPA, LAM, NU, SIGMA, TAU, Call, Effort, median_ms, table
from benchmarks.profiler import save_trace
from consensus import POTENTIALS, Layerwise, Radial
from consensus.comm import Solo
from consensus.core.kernels.plain import Plain
from consensus.server import Server
from consensus.worker import Oracle, Worker

TABLE_2 = ("quad", "cubic", "tan", "tan_sep", "log", "log_sep")
MODES = ("eager", "fused", "compiled")
COLUMNS = {
    "potential": "<9", "line": "<7", "mode": "<9", "ms": ">8.3f", "MB": ">9.1f", "GB/s": ">7.1f",
    "/ copy": ">7.0%", "": "<",
}  # fmt: skip


def compiled(call: Call) -> tuple[Call | None, str]:
    """The call compiled as one graph and called once; or None and the reason in one line."""
    torch.compiler.reset()
    fused = torch.compile(call, fullgraph=True, dynamic=False)
    try:
        fused()
    except (RuntimeError, ImportError, OSError) as error:  # no compiler, or one that fails
        return None, (str(error).strip() or repr(error)).splitlines()[0]
    return fused, ""


class Unbranched(Layerwise):
    """The same potential without branches on the host, for the compiler.

    On a CPU the line search first compares |x| + |d| with the radius and branches on the result. A
    call that is compiled as one graph must not branch. Where the comparison would have given 1, the
    boundary step is far above 1, so the numbers are the same.
    """

    def surely_feasible(self, reach: Tensor, d: Tensor, u: Tensor) -> bool:
        """Always false."""
        del reach, d, u
        return False

    def surely_inside(self, s: Tensor) -> bool:
        """Always false."""
        del s
        return False

    def dpsi_within(self, reach: Tensor) -> Callable[[Tensor], Tensor] | float:
        """The derivative for the whole domain."""
        del reach
        return self.profile.dpsi


class Coupling:
    """Lines 3 and 6 of one worker, with a vector of noise in place of the minibatch gradient.

    Args:
        device: Of everything.
        potential: A name in POTENTIALS.
        n: The number of coordinates, in layers of equal size.
        kind: `Layerwise` as in a run, or `Unbranched` where no number may go to the host.
        num_layers: L.
        fused: Whether kernels of the device are used where it has some: Triton, or native.c.

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
        """Compute the force and the step of u."""
        self.server.finish(self.server.start(self.worker.z, self.worker.scratch), TAU)

    def line_6(self) -> None:
        """Step z and v. The gradient is overwritten by numbers of its size or smaller."""
        u = self.server.u
        self.worker.update(self.delta, SIGMA, SIGMA / LAM, u, u)


def vectors_moved(phi: Layerwise, line: str, num_workers: int = 1) -> int:
    """The number of vectors of n coordinates that the fused kernels read or write."""
    k = num_workers
    norms = isinstance(phi.size, Radial) and phi.profile.slope is None
    if line == "line 3":
        return k + 2 + 3 + (k + 1 if norms else 0) + (k + 2 if phi.bounded else 0)
    return 5 * k + 1 + (3 * k + 1 if phi.bounded else k + 1 if norms else 0)


@dataclass
class VectorRow:
    """A line on vectors of n coordinates; times and rates are None where `absent` has a reason."""

    potential: str
    line: str
    mode: str
    bytes: int
    ms: float | None
    bytes_per_s: float | None
    share_of_copy: float | None
    absent: str

    def cells(self) -> tuple[object, ...]:
        """By COLUMNS."""
        absent = f"  absent: {self.absent}" if self.absent else ""
        rate = None if self.bytes_per_s is None else self.bytes_per_s / 1e9
        megabytes = None if self.absent else self.bytes / 1e6
        times = (self.ms, megabytes, rate, self.share_of_copy)
        return self.potential, self.line, self.mode, *times, absent


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
    """One line of one potential; `copy` is the bandwidth of a copy, in bytes per second."""
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
                torch.compiler.reset()  # frees the vectors before new ones are made,
                gc.collect()  # and so does this: a Coupling refers to itself
    return rows


def show(rows: list[VectorRow], n: int, copy: float) -> None:
    """Print the table."""
    print(f"\nn = {n:,}, one worker; a copy moves {copy / 1e9:.0f} GB/s")
    print(table(COLUMNS, [row.cells() for row in rows]))
