"""What a latency of the network costs an iteration, over the period.

Run by scripts/bench_latency, as root: the hosts are network namespaces (tests/testing/hosts.py),
the latency and the loss those of a switch in user space (tests/testing/switch.py). `latency` is one
way.

Runs are those of launch/multinode.sh: torchrun on every host, one process of one worker each, Gloo
over TCP, LeNet-5 on digits. A run has one period; the latency changes while it goes on, so that all
of them are measured at the same moment of the machine: after a segment (the iterations from one
evaluation to the next) to warm up, each latency has a segment in which it begins to hold, and
SEGMENTS that count. Periods take turns, `--rounds` times, and the latencies there and back. A point
is the median of its segments: iterations over the time that the run itself gives for them
(`samples_per_s`, without evaluations). The bits must not depend on any of it: the digests of runs
with the same period are compared, and the trainer compares those of the ranks.

What is expected of an iteration:

    t = g + (max(0, a - g) + q m) / H,    and b max(1 / E, t / 1 s) on top

g is an iteration without communication, a the sum of line 3, which travels while the gradient is
computed, m the minimum that may follow it where the domain is bounded, b the look at the other
ranks (run/watch.py) once a second and at the end of a segment of E iterations. a, m and b are
measured in ranks of their own, on the same hosts. g is what an iteration of the runs takes at the
longest period and the smallest latency, which is thus no test of the formula: cores that are shared
are as fast then as for the rest. q is how many sums are followed by a minimum, counted in a run of
the same seed in one process.
"""

import argparse
import json
import math
import os
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from torch import Tensor

from benchmarks.scaling import num_cores
from consensus.comm import Group, Launch, Solo, open_group
from consensus.run.compose import config_dir, register_schema, to_config
from consensus.run.health import Watch
from consensus.run.plan import make_plan
from consensus.run.trainer import Trainer
from tests.testing.hosts import Hosts, available

ROOT = Path(__file__).resolve().parents[1]
COORDINATES = 33_580  # of LeNet-5
BATCH = 20
SEGMENTS = 2  # that count, of each latency in each run
LEAST_SEGMENT = 64  # iterations
REPEATS = 8  # of a collective
TIMEOUT_S = 120.0
STUCK_S = 600.0  # without a word from a run
POLL_S = 0.005
BULK_BYTES = 400 << 20


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        latencies: One way. Milliseconds.
        periods: Values of H.
        rounds: Runs of each.
        hosts: With one process each.
        loss: The probability that a packet is lost.
        potential: By name.
        seed: Of the runs, and of the losses.
    """

    latencies: tuple[float, ...]
    periods: tuple[int, ...]
    rounds: int
    hosts: int
    loss: float
    potential: str
    seed: int

    @property
    def segment(self) -> int:
        """E, a multiple of all periods. Iterations."""
        return math.lcm(*self.periods) * -(-LEAST_SEGMENT // math.lcm(*self.periods))

    @property
    def iterations(self) -> int:
        """Of a run."""
        return self.segment * (1 + len(self.latencies) * (1 + SEGMENTS))

    def overrides(self, period: int, run_dir: Path) -> list[str]:
        """Of the run with this period, whatever starts it."""
        return [
            *("device=cpu", f"seed={self.seed}", f"workers={self.hosts}"),
            *(f"potential={self.potential}", f"algorithm.period={period}"),
            *(f"algorithm.batch_size={BATCH}", f"algorithm.iterations={self.iterations}"),
            *(f"output.run_dir={run_dir}", f"output.eval_every={self.segment}"),
            *(f"output.log_every={self.segment}", "output.checkpoint_every=null"),
            "output.tensorboard=false",
        ]


@dataclass
class Costs:
    """What the collectives take, at one latency. Seconds.

    Attributes:
        total: a, the sum of line 3.
        minimum: m.
        gather: b.
    """

    total: float
    minimum: float
    gather: float

    def expected(self, alone: float, period: int, share: float, segment: int) -> float:
        """Of one iteration, where this share of the sums is followed by a minimum.

        Args:
            alone: g.
            period: H.
            share: q.
            segment: E.
        """
        t = alone + (max(0.0, self.total - alone) + share * self.minimum) / period
        return t + self.gather * max(1.0 / segment, t / Watch.LOOK_EVERY_S)


@dataclass
class Row:
    """What was measured at one latency and one period.

    Attributes:
        latency: One way. Milliseconds.
        period: H.
        samples: One iteration, for each segment. Seconds.
        expected: Seconds.
    """

    latency: float
    period: int
    samples: list[float]
    expected: float

    @property
    def seconds(self) -> float:
        """Of one iteration."""
        return statistics.median(self.samples)


@dataclass
class Run:
    """What runs of one period have in common, whatever the network.

    Attributes:
        period: H.
        test_error: Of u after the last iteration. Percent.
        digest: Of the same u.
        share: q, of the sums that are followed by a minimum.
    """

    period: int
    test_error: float
    digest: str
    share: float


# ---- the runs


def run_once(hosts: Hosts, plan: Plan, period: int, latencies: Sequence[float]) -> list[Any]:
    """The rows of metrics.jsonl of a run that sees these latencies one after another.

    Raises:
        SystemExit: If it fails; what it says is on stderr.
    """
    environment = os.environ | {
        "REMOTE": str(hosts.remote),
        "ADDRESS": hosts.addresses[0],
        "INTERFACE": "eth0",
        "NPROC": "1",
        "CONSENSUS_VENV": sys.prefix,
    }
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder, "run")
        script = str(ROOT / "launch" / "multinode.sh")
        command = [script, ",".join(hosts.names), *plan.overrides(period, run_dir)]
        hosts.set_latency(0.0)
        # In a file: nobody reads while the run goes on, and a pipe would fill.
        with Path(folder, "output").open("w+") as output:
            process = subprocess.Popen(
                command, cwd=folder, env=environment, stdin=subprocess.DEVNULL,
                stdout=output, stderr=subprocess.STDOUT,
            )  # fmt: skip
            try:
                rows = follow(process, run_dir / "metrics.jsonl", hosts, latencies)
            finally:
                process.terminate()
                process.wait()
            if len(rows) * plan.segment != plan.iterations:
                output.seek(0)
                print(output.read(), file=sys.stderr)
                raise SystemExit(f"scripts/bench_latency: a run with period {period} has failed")
        return rows


def follow(
    process: subprocess.Popen[bytes], metrics: Path, hosts: Hosts, latencies: Sequence[float]
) -> list[Any]:
    """The rows as they come, to the end; the next latency begins when those of the last are there.

    The latency of a segment begins a moment after its row: that is what the segment that does not
    count is for.
    """
    rows: list[str] = []
    heard = time.monotonic()
    while True:
        ended = process.poll() is not None
        text = metrics.read_text() if metrics.exists() else ""
        if text.count("\n") > len(rows):
            rows = text.splitlines()[: text.count("\n")]
            heard = time.monotonic()
            visit, rest = divmod(len(rows) - 1, 1 + SEGMENTS)
            if rest == 0 and visit < len(latencies):
                hosts.set_latency(latencies[visit])
        if ended or time.monotonic() > heard + STUCK_S:
            return [json.loads(row) for row in rows]
        time.sleep(POLL_S)


def segments(rows: Sequence[Any], workers: int, latencies: Sequence[float]) -> list[list[float]]:
    """Seconds of one iteration, for each segment that counts, by latency."""
    seconds = [BATCH * workers / row["samples_per_s"] for row in rows]
    step = 1 + SEGMENTS
    starts = [1 + step * visit for visit in range(len(latencies))]
    return [seconds[start + 1 : start + step] for start in starts]


# ---- what the expected time is made of


class Counting(Solo):
    """One process, which counts the minima of line 3."""

    minima = 0

    def min_(self, tensor: Tensor) -> Tensor:
        """The argument."""
        self.minima += tensor.is_floating_point()  # else it is the flag of `raise_together`
        return tensor


def share_of_minima(plan: Plan, period: int) -> float:
    """q, of a run in this process."""
    register_schema()
    group = Counting()
    with tempfile.TemporaryDirectory() as folder:
        words = plan.overrides(period, Path(folder, "run"))
        with initialize_config_dir(config_dir(), version_base="1.3"):
            config = to_config(compose("train", overrides=words))
        trainer = Trainer(make_plan(config, Launch()), group)
        for t in range(plan.iterations):
            trainer.algorithm.step(t)
        trainer.directory.close()
    return group.minima / (plan.iterations // period)


def costs_of(hosts: Hosts, plan: Plan) -> dict[float, Costs]:
    """What one rank on each host measures, at every latency.

    Raises:
        SystemExit: If they fail; what they say is on stderr.
    """
    hosts.set_latency(0.0)
    words = [sys.executable, __file__, "--child", str(len(plan.latencies))]
    here = str(ROOT), os.environ.get("PYTHONPATH", "")
    ranks = []
    for rank, name in enumerate(hosts.names):
        environment = os.environ | {
            "RANK": str(rank),
            "WORLD_SIZE": str(plan.hosts),
            "LOCAL_RANK": "0",
            "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": hosts.addresses[0],
            "MASTER_PORT": "29500",
            "GLOO_SOCKET_IFNAME": "eth0",
            "PYTHONPATH": ":".join(filter(None, here)),
            "TORCH_CPP_LOG_LEVEL": "ERROR",  # it warns that the addresses have no names
        }
        process = subprocess.Popen(
            [hosts.remote, name, f"exec {shlex.join(words)}"], env=environment, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE if rank == 0 else None,
        )  # fmt: skip
        ranks.append(process)
    found: dict[float, Costs] = {}
    try:
        assert ranks[0].stdout is not None
        for latency in plan.latencies:
            ranks[0].stdout.readline()  # the block in which it begins to hold
            hosts.set_latency(latency)
            ranks[0].stdout.readline()
            found[latency] = Costs(**json.loads(ranks[0].stdout.readline() or "{}"))
        codes = [rank.wait(timeout=TIMEOUT_S) for rank in ranks]
    except (TypeError, subprocess.TimeoutExpired):
        codes = [1]
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    if any(codes):
        raise SystemExit("scripts/bench_latency: the ranks that measure collectives have failed")
    return found


def serve(latencies: int) -> None:
    """A rank: three blocks for each latency; rank 0 prints them."""
    group = open_group(Launch.from_environment(), "gloo", torch.device("cpu"), TIMEOUT_S)
    try:
        total = group.repeated_sum(COORDINATES, torch.empty(()))
        total.message.zero_()
        step, four = torch.ones(()), torch.ones(4, dtype=torch.int64)  # as the run sends them
        for _ in range(3 * latencies):
            costs = Costs(
                total=typical(lambda: total.start().wait(), group),
                minimum=typical(lambda: group.min_(step), group),
                gather=typical(lambda: group.gather(four), group),
            )
            if group.rank == 0:
                print(json.dumps(asdict(costs)), flush=True)
        group.barrier()
    finally:
        group.close()


def typical(call: Callable[[], object], group: Group, repeats: int = REPEATS) -> float:
    """The median on this rank, all ranks at once. Seconds."""
    group.barrier()
    call()
    times = []
    for _ in range(repeats):
        started = perf_counter()
        call()
        times.append(perf_counter() - started)
    return statistics.median(times)


# ---- the floor of the switch


def floor(latency: float | None, folder: Path) -> tuple[float, float]:
    """A round trip in seconds, and what one connection of TCP carries in bytes per second."""
    with Hosts(2, folder, latency) as hosts:
        round_trip = statistics.median(hosts.round_trips(500))
        kind = socket.SOCK_STREAM
        with hosts.socket("host1", kind) as listener, hosts.socket("host0", kind) as sender:
            listener.listen()
            sender.connect(listener.getsockname())
            receiver, _ = listener.accept()
            with receiver:
                return round_trip, bulk(sender, receiver)


def bulk(sender: socket.socket, receiver: socket.socket) -> float:
    """Bytes per second."""
    piece = bytes(1 << 20)

    def send() -> None:
        for _ in range(BULK_BYTES // len(piece)):
            sender.sendall(piece)

    thread = threading.Thread(target=send)
    started = perf_counter()
    thread.start()
    there, buffer = 0, bytearray(1 << 20)
    while there < BULK_BYTES:
        there += receiver.recv_into(buffer)
    seconds = perf_counter() - started
    thread.join()
    return BULK_BYTES / seconds


# ---- all of it


@dataclass
class Found:
    """All that was measured.

    Attributes:
        plan: What was asked for.
        floors: By "bridge" and "switch": seconds of a round trip, bytes per second.
        costs: By latency, medians over rounds.
        rows: By latency and period.
        runs: By period.
    """

    plan: Plan
    floors: dict[str, tuple[float, float]]
    costs: dict[float, Costs]
    rows: list[Row]
    runs: list[Run]


def measure_all(plan: Plan) -> Found:
    """Everything, in turn; a word on stderr about each part."""
    samples: dict[tuple[float, int], list[float]] = {}
    blocks: dict[float, list[Costs]] = {latency: [] for latency in plan.latencies}
    ends: dict[int, tuple[float, str]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        floors = {"bridge": floor(None, folder), "switch": floor(0.0, folder)}
        with Hosts(plan.hosts, folder, 0.0, plan.loss, plan.seed) as hosts:
            for i in range(plan.rounds):
                there = i % 2 == 0
                latencies = plan.latencies if there else plan.latencies[::-1]
                for latency, costs in costs_of(hosts, plan).items():
                    blocks[latency].append(costs)
                for period in plan.periods if there else plan.periods[::-1]:
                    say(f"round {i + 1} of {plan.rounds}, period {period}")
                    rows = run_once(hosts, plan, period, latencies)
                    seen = segments(rows, plan.hosts, latencies)
                    for latency, own in zip(latencies, seen, strict=True):
                        samples.setdefault((latency, period), []).extend(own)
                    end = rows[-1]["test_error"], rows[-1]["digest"]
                    if ends.setdefault(period, end) != end:
                        raise SystemExit("scripts/bench_latency: the bits depend on the network")
    costs = {latency: typical_costs(own) for latency, own in blocks.items()}
    say("how often a minimum follows")
    runs = [Run(H, *ends[H], share_of_minima(plan, H)) for H in plan.periods]
    alone = statistics.median(samples[min(plan.latencies), max(plan.periods)])
    rows = [
        Row(latency, run.period, samples[latency, run.period],
            costs[latency].expected(alone, run.period, run.share, plan.segment))
        for latency in plan.latencies
        for run in runs
    ]  # fmt: skip
    return Found(plan, floors, costs, rows, runs)


def typical_costs(blocks: Sequence[Costs]) -> Costs:
    """The median of each part."""
    parts = [asdict(block) for block in blocks]
    return Costs(**{name: statistics.median(part[name] for part in parts) for name in parts[0]})


def say(text: str) -> None:
    """On stderr, with the load of the machine: it may not be ours alone."""
    print(f"{text}; load {os.getloadavg()[0]:.1f}", file=sys.stderr, flush=True)


# ---- what is shown


def tables(found: Found) -> str:
    """Markdown."""
    plan = found.plan
    lines = ["| | round trip, ms | TCP, MB/s |", "| --- | --- | --- |"]
    lines += [
        f"| {name} | {1e3 * s:.3f} | {b / 1e6:.0f} |" for name, (s, b) in found.floors.items()
    ]
    lines += ["", "| latency, ms | sum of line 3, ms | minimum, ms | gather, ms |"]
    lines += ["| --- | --- | --- | --- |"]
    for latency, costs in found.costs.items():
        parts = (costs.total, costs.minimum, costs.gather)
        lines.append(f"| {latency:g} | {' | '.join(f'{1e3 * part:.1f}' for part in parts)} |")
    heads = " | ".join(f"{latency:g} ms" for latency in plan.latencies)
    lines += ["", f"| period | {heads} | minima | test error |"]
    lines += ["| --- " * (3 + len(plan.latencies)) + "|"]
    for run in found.runs:
        own = [row for row in found.rows if row.period == run.period]
        cells = " | ".join(f"{1e3 * row.seconds:.1f} ({1e3 * row.expected:.1f})" for row in own)
        end = f"{100 * run.share:.0f} % | {run.test_error:.2f} %"
        lines.append(f"| {run.period} | {cells} | {end} |")
    return "\n".join(lines)


def content(found: Found) -> dict[str, Any]:
    """All that was found, for a JSON file."""
    environment = {"torch": torch.__version__, "cores": num_cores(), "device": "cpu"}
    return asdict(found) | {"environment": environment, "iterations": found.plan.iterations}


def draw(found: Found, path: str) -> None:
    """Time over period, points as measured and curves as expected; and what the period costs."""
    from matplotlib.figure import Figure

    plan = found.plan
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    times, errors = figure.subplots(1, 2, width_ratios=(3, 2))
    for i, latency in enumerate(plan.latencies):
        own = [row for row in found.rows if row.latency == latency]
        ms = [1e3 * row.seconds for row in own]
        below = [m - 1e3 * min(row.samples) for m, row in zip(ms, own, strict=True)]
        above = [1e3 * max(row.samples) - m for m, row in zip(ms, own, strict=True)]
        label = f"{latency:g} ms"
        times.errorbar(plan.periods, ms, (below, above), fmt="o", color=f"C{i}", label=label)
        expected = [1e3 * row.expected for row in own]
        times.plot(plan.periods, expected, "--", color=f"C{i}", linewidth=1)
    loss = f", {100 * plan.loss:g} % lost" if plan.loss else ""
    times.set_title(f"LeNet-5, {plan.potential}, {plan.hosts} hosts{loss}: dashed as expected")
    times.set_ylabel("ms for one iteration, median and range")
    times.legend(title="latency, one way", fontsize="small")
    errors.plot(plan.periods, [run.test_error for run in found.runs], "o-", color="C7")
    errors.set_title(f"The same number of iterations, {plan.iterations}")
    errors.set_ylabel("test error, %")
    for axes in (times, errors):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(plan.periods, [str(H) for H in plan.periods])
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}" if axes is errors else "")
        axes.set_xlabel("period H, iterations to a communication")
    figure.savefig(path)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="scripts/bench_latency")
    parser.add_argument("--latencies", nargs="+", type=float, default=[0.0, 10.0, 50.0],
                        metavar="MS", help="one way")  # fmt: skip
    parser.add_argument("--periods", nargs="+", type=int, default=[1, 4, 16, 64], metavar="H")
    parser.add_argument("--hosts", type=int, default=2, help="of one process each")
    parser.add_argument("--loss", type=float, default=0.0, help="probability of a packet")
    parser.add_argument("--potential", default="tan")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each period")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", help="write what was found there")
    parser.add_argument("--plot", metavar="FILE", help="draw it there (PNG, PDF, SVG)")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.child:
        return serve(options.child)
    if not available():
        parser.error("the hosts are network namespaces, which root makes, with `ip`")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # hosts and runs go with it
    plan = Plan(
        tuple(options.latencies), tuple(options.periods), options.rounds, options.hosts,
        options.loss, options.potential, options.seed,
    )  # fmt: skip
    found = measure_all(plan)
    print(tables(found))
    if options.json:
        Path(options.json).write_text(json.dumps(content(found), indent=2) + "\n")
    if options.plot:
        draw(found, options.plot)
    return None


if __name__ == "__main__":
    main()
