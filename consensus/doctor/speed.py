"""How fast sums are over the group of a run, against the gradients that they hide behind."""

import math
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from consensus.algorithm import Consensus
from consensus.comm import Group
from consensus.doctor.finding import Finding, fault, table, warning
from consensus.run.plan import Plan
from consensus.run.trainer import build_algorithm
from consensus.server import digest

SIZES = (1, 1_000, 100_000, 10_000_000)
FEWEST, MOST = 3, 50
EACH_S = 0.5  # about as long as one size is measured
LONGEST_S = 2.0  # a larger size is left out when a sum of it would take longer


def check_sums(group: Group, plan: Plan | None, dtype: torch.dtype) -> list[Finding]:
    """Sums of several sizes as line 3 forms them, measured, and compared with their value."""
    like = torch.zeros(1, device=group.device, dtype=dtype)
    own = () if plan is None else (plan.risk.layout.size,)
    rows: list[tuple[str, str, str, str]] = [("n", "", "ms", "MB/s")]
    last_s, last_n = 0.0, 1
    for numel in sorted({*SIZES, *own}):
        if numel not in own and last_s * numel / last_n > LONGEST_S:
            break
        seconds = _measure_sum(group, numel, like)
        if seconds is None:
            return [
                fault(
                    "sums",
                    f"the sum of {numel:,} numbers of all ranks is wrong",
                    "group=gloo and group.shared_memory=false, to see which way is at fault",
                )
            ]
        name = "u of this model" if numel in own else ""
        rate = numel * like.element_size() / seconds / 1e6
        rows.append((f"{numel:,}", name, f"{1e3 * seconds:.3g}", f"{rate:.3g}"))
        last_s, last_n = seconds, numel
    return [Finding("sums", "\n".join(["all-reduce, the slowest rank, median:", *table(rows)]))]


def _measure_sum(group: Group, numel: int, like: Tensor) -> float | None:
    """Seconds of one sum, on the slowest rank; None if what comes out is wrong."""
    total = group.repeated_sum(numel, like)

    def once() -> Tensor:
        total.message.fill_(group.rank + 1.0)
        began.append(time.perf_counter())
        result = total.start().wait()
        _finish(result)
        took.append(time.perf_counter() - began[-1])
        return result

    began: list[float] = []
    took: list[float] = []
    result = once()
    right = bool((result == group.size * (group.size + 1) / 2).all())  # exact in any dtype
    if int(group.min_(torch.tensor([int(right)], device=group.device))) == 0:
        return None
    once()
    for _ in range(_repetitions(group, took[-1])):
        once()
    return _slowest(group, statistics.median(took[2:]))


def check_iterations(group: Group, plan: Plan) -> list[Finding]:
    """A few iterations of the run itself: the same u everywhere, and how long each part takes."""
    algorithm = build_algorithm(plan, group)
    for t in range(3):
        algorithm.step(t)
    digests = group.gather(digest(algorithm.u)).tolist()
    if len(set(digests)) > 1:
        return [
            fault(
                "sums",
                "after 3 iterations the ranks hold different bits of u",
                "the same versions and the same kind of machine on every node; group=gloo",
            )
        ]
    worker = algorithm.worker
    gradient_s = _median(group, lambda: worker.gradient(worker.draw()))
    if group.size == 1 or not isinstance(algorithm, Consensus):
        return [Finding("speed", f"a gradient takes {1e3 * gradient_s:.3g} ms")]
    total = group.repeated_sum(plan.risk.layout.size, plan.start)
    sum_s = _median(group, lambda: total.start().wait())
    text = (
        f"a gradient takes {1e3 * gradient_s:.3g} ms, the sum of line 3, which travels meanwhile, "
        f"{1e3 * sum_s:.3g} ms; after 3 iterations all ranks hold the same bits of u"
    )
    over = sum_s - gradient_s
    period = plan.config.algorithm.period
    enough = max(1, math.ceil(over / (0.1 * gradient_s)))
    if over > 0.1 * gradient_s and period < enough:
        return [
            warning(
                "speed",
                f"{text}. It cannot hide: the run waits {100 * over / sum_s:.0f} % of the time",
                f"algorithm.period={enough}, which waits 10 % of the time; or a larger "
                "algorithm.batch_size, group.compress=bf16, more workers on fewer processes",
            )
        ]
    return [Finding("speed", text)]


def _median(group: Group, work: Callable[[], Tensor]) -> float:
    """Seconds, the slowest rank's median."""
    took = []

    def once() -> None:
        began = time.perf_counter()
        _finish(work())
        took.append(time.perf_counter() - began)

    once()
    once()
    for _ in range(_repetitions(group, took[-1])):
        once()
    return _slowest(group, statistics.median(took[2:]))


def _repetitions(group: Group, seconds: float) -> int:
    """As many on all ranks."""
    return int(min(MOST, max(FEWEST, EACH_S / max(_slowest(group, seconds), 1e-6))))


def _slowest(group: Group, seconds: float) -> float:
    times = group.gather(torch.tensor(seconds, device=group.device, dtype=torch.float64))
    return float(times.max())


def _finish(result: Tensor) -> None:
    if result.is_cuda:
        torch.cuda.synchronize(result.device)
