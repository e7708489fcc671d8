"""Speed of sums over the group of a run, against the gradients that overlap with them."""

import math
import shutil
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from consensus.algorithm import Consensus
from consensus.comm import Group, RepeatedSum
from consensus.comm.shared_memory import FOLDER, num_bytes
from consensus.doctor.finding import Finding, fault, warning
from consensus.run.build import build_algorithm
from consensus.run.config import Config
from consensus.run.plan import Plan
from consensus.server import digest

SIZES = (1, 1_000, 100_000, 10_000_000)
FEWEST, MOST = 3, 50
EACH_S = 0.5  # time to measure one size
LONGEST_S = 2.0  # larger sizes are skipped when one sum would take longer
SHORT_S = 1e-3  # a gradient too short to overlap with a sum


def check_sums(
    group: Group, own: int | None, config: Config, backend: str
) -> tuple[list[Finding], float]:
    """Time and value of repeated sums of several sizes; seconds of a sum of `own`. A collective.

    `own` is n of this model; None: unknown. All arguments are equal on all ranks.
    """
    dtype = config.dtype_of_u
    like = torch.zeros(1, device=group.device, dtype=dtype)
    rows: list[tuple[str, str, str, str]] = [("n", "", "ms", "MB/s")]
    shortest_s, last_s, last_n, own_s = 0.0, 0.0, 1, 0.0
    way = backend
    for numel in sorted({*SIZES, *(() if own is None else (own,))}):
        room = shutil.disk_usage(FOLDER).free if FOLDER.exists() else math.inf
        fits = num_bytes(group.size, numel, dtype) < 0.1 * room  # others need some of it as well
        expected_s = shortest_s + (last_s - shortest_s) * numel / last_n  # a latency, and a rate
        if numel != own and (expected_s > LONGEST_S or not _on_all(group, fits)):
            continue
        total = group.repeated_sum(numel, like)
        way = "shared memory" if total.in_shared_memory else backend

        def once(total: RepeatedSum = total) -> Tensor:
            total.message.fill_(1.0)
            return total.start().wait()

        # Every partial sum of so many ones is exact; bfloat16 rounds from 257 on, int8 always.
        compress = config.group.compress if way == backend else None
        rounds = compress == "int8" or (compress == "bf16" and group.size > 2**8)
        allowed = group.size**2 / 2**8 if rounds else 0.0
        right = bool(((once() - group.size).abs() <= allowed).all())
        if not _on_all(group, right):
            text = f"the sum of {numel:,} numbers of all ranks is wrong, over {way}"
            remedy = "group=gloo and group.shared_memory=false, to see which way is at fault"
            return [fault("sums", text, remedy)], 0.0
        last_s, last_n = _median(group, once), numel
        shortest_s = min(shortest_s or last_s, last_s)
        if numel == own:
            own_s = last_s
        name = "u of this model" if numel == own else ""
        rate = numel * like.element_size() / last_s / 1e6
        rows.append((f"{numel:,}", name, f"{1e3 * last_s:.3g}", f"{rate:.3g}"))
    text = f"all-reduce over {way}, the slowest rank, median:"
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = ["  ".join(map(str.rjust, row, widths)) for row in rows]
    return [Finding("sums", "\n".join([text, *aligned]))], own_s


def _on_all(group: Group, here: bool) -> bool:
    return bool(group.min_(torch.tensor([int(here)], device=group.device)).item())


def check_iterations(group: Group, plan: Plan, sum_s: float) -> list[Finding]:
    """Bits of u after a few iterations; time of a gradient, against `sum_s`. A collective."""
    algorithm = build_algorithm(plan, group)
    for t in range(3):
        algorithm.step(t)
    digests = group.gather(digest(algorithm.u)).tolist()
    if len(set(digests)) > 1:
        text = "after 3 iterations the ranks hold different bits of u"
        remedy = "the same versions and the same kind of machine on every node; group=gloo"
        return [fault("sums", text, remedy)]
    worker = algorithm.worker
    gradient_s = _median(group, lambda: worker.gradient(worker.draw()))
    text = f"a gradient takes {1e3 * gradient_s:.3g} ms"
    if group.size == 1 or not isinstance(algorithm, Consensus):
        return [Finding("speed", text)]
    text += f", the sum of line 3, which travels meanwhile, {1e3 * sum_s:.3g} ms; "
    text += "after 3 iterations all ranks hold the same bits of u"
    if found := advice(gradient_s, sum_s, plan.config.algorithm.period):
        return [warning("speed", f"{text}. {found[0]}", found[1])]
    return [Finding("speed", text)]


def advice(gradient_s: float, sum_s: float, period: int) -> tuple[str, str] | None:
    """Text and remedy for a sum that takes longer than the gradients it overlaps with, or None."""
    over = sum_s - gradient_s
    if over <= 0 or (waits := over / (period * gradient_s + over)) <= 0.1:
        return None
    text = f"It cannot hide: the run waits {100 * waits:.0f} % of the time"
    if gradient_s < SHORT_S:
        remedy = "a larger algorithm.batch_size, or several workers on fewer processes"
        return f"{text}; gradients this short hide nothing", remedy
    remedy = f"algorithm.period={math.ceil(9.0 * over / gradient_s)} would wait a tenth of it "
    remedy += "(a longer period is another algorithm: look at the error), or group.compress=bf16, "
    return text, f"{remedy}or a larger algorithm.batch_size"


def _median(group: Group, work: Callable[[], Tensor]) -> float:
    """Largest over ranks of the median time of a call, in seconds. A collective."""

    def once() -> float:
        began = time.perf_counter()
        result = work()
        if result.is_cuda:
            torch.cuda.synchronize(result.device)
        return time.perf_counter() - began

    once()
    most = _slowest(group, once())
    repeats = int(min(MOST, max(FEWEST, EACH_S / max(most, 1e-6))))
    return _slowest(group, statistics.median(once() for _ in range(repeats)))


def _slowest(group: Group, seconds: float) -> float:
    times = group.gather(torch.tensor(seconds, device=group.device, dtype=torch.float64))
    return float(times.max())
