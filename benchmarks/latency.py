"""The cost of network latency per iteration, over the period.

Started as `scripts/bench latency`, as root: the hosts are network namespaces
(tests/testing/hosts.py), and a switch in user space adds the latency and the loss
(tests/testing/switch.py). `latency` is one way.

Runs are started by launch/multinode.sh: torchrun on every host, one process of one worker each,
Gloo over TCP, LeNet-5 on digits. A run has one period. The latency changes during the run, so that
all latencies are measured under the same load of the machine. A segment is the iterations from one
evaluation to the next. After one segment to warm up, each latency has one segment in which it
starts, and SEGMENTS that count. Periods take turns, `--rounds` times, and the latencies there and
back. A point is the median of its segments: iterations over the time that the run reports for them
(`samples_per_s`, without evaluations). The bits must not depend on the network: the digests of runs
with the same period are compared, and the trainer compares those of the ranks.

The expected time of an iteration:

    t = g + (max(0, a - (1 + d) g) + q m) / H,    and b max(1 / E, t / 1 s) on top

g is an iteration without communication, and a the all-reduce of line 3, which overlaps with the
gradients of 1 + d iterations, d = `algorithm.delay`; with a delay nobody waits for the check of a
second. m is the minimum that may follow it where the domain is bounded. b is the cross-rank check
(run/health.py), once a second and at the end of a segment of E iterations. a, m and b are measured
in separate ranks on the same hosts. g is the time of an iteration at the longest period and the
smallest latency, so that this point is no test of the formula. q is the share of sums that a
minimum follows, counted in a run of the same seed in one process.
"""

import argparse
import json
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
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from torch import Tensor

from benchmarks import harness
from benchmarks.harness import BATCH, CPU, TIMEOUT_S, Effort, median_ms
from benchmarks.latency_report import (
    SEGMENTS,
    Costs,
    Found,
    Plan,
    Row,
    Run,
    content,
    draw,
    tables,
)
from consensus.comm import Group, Launch, Solo, open_group
from consensus.run.compose import config_dir, register_schema, to_config
from consensus.run.plan import make_plan
from consensus.run.trainer import Trainer
from tests.testing.hosts import Hosts, available

ROOT = Path(__file__).resolve().parents[1]
COORDINATES = 33_580  # of LeNet-5
REPEATS = 8  # of a collective
STUCK_S = 600.0  # without a row from a run
POLL_S = 0.005
BULK_BYTES = 400 << 20


# ---- the runs


def run_once(hosts: Hosts, plan: Plan, period: int, latencies: Sequence[float]) -> list[Any]:
    """The rows of metrics.jsonl of a run under these latencies, one after another.

    Raises:
        SystemExit: If the run fails; its output is on stderr.
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
        # A file, since nothing reads a pipe during the run, and it would fill.
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
                raise SystemExit(f"scripts/bench latency: a run with period {period} has failed")
        return rows


def follow(
    process: subprocess.Popen[bytes], metrics: Path, hosts: Hosts, latencies: Sequence[float]
) -> list[Any]:
    """Read the rows of a run to its end, and set the next latency after the rows of the last one.

    A latency starts shortly after the row that ends the previous segment. The first segment of each
    latency therefore does not count.
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


# ---- the parts of the expected time


class Counting(Solo):
    """A group of one process that counts the minima of line 3."""

    minima = 0

    def min_(self, tensor: Tensor) -> Tensor:
        """Return the argument."""
        self.minima += tensor.is_floating_point()  # else it is the flag of `raise_together`
        return tensor


def share_of_minima(plan: Plan, period: int) -> float:
    """q, counted in a run in this process."""
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


def start_on(hosts: Hosts, words: Sequence[str], talk: bool = False) -> list[subprocess.Popen[str]]:
    """Start one rank on each host, Python with these words; rank 0's output is a pipe.

    `talk`: so is its input.
    """
    here = str(ROOT), os.environ.get("PYTHONPATH", "")
    ranks = []
    for rank, name in enumerate(hosts.names):
        environment = os.environ | {
            "RANK": str(rank),
            "WORLD_SIZE": str(len(hosts.names)),
            "LOCAL_RANK": "0",
            "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": hosts.addresses[0],
            "MASTER_PORT": "29500",
            "GLOO_SOCKET_IFNAME": "eth0",
            "PYTHONPATH": ":".join(filter(None, here)),
            "TORCH_CPP_LOG_LEVEL": "ERROR",  # no warnings about addresses without names
        }
        command = f"exec {shlex.join([sys.executable, *words])}"
        process = subprocess.Popen(
            [hosts.remote, name, command], env=environment, text=True,
            stdin=subprocess.PIPE if talk and rank == 0 else subprocess.DEVNULL,
            stdout=subprocess.PIPE if rank == 0 else None,
        )  # fmt: skip
        ranks.append(process)
    return ranks


def costs_of(hosts: Hosts, plan: Plan) -> dict[float, Costs]:
    """The times of the collectives at every latency, measured by one rank on each host.

    Raises:
        SystemExit: If the ranks fail; their messages are on stderr.
    """
    hosts.set_latency(0.0)
    ranks = start_on(hosts, ["-m", "benchmarks.latency", "--child", str(len(plan.latencies))])
    found: dict[float, Costs] = {}
    try:
        assert ranks[0].stdout is not None
        for latency in plan.latencies:
            ranks[0].stdout.readline()  # the block in which the latency starts
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
        raise SystemExit("scripts/bench latency: the ranks that measure collectives have failed")
    return found


def serve(latencies: int) -> None:
    """One rank: measure three blocks for each latency; rank 0 prints them."""
    group = open_group(Launch.from_environment(), "gloo", CPU, TIMEOUT_S)
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
    """The median time of a call on this rank, all ranks at once. Seconds."""
    group.barrier()
    return 1e-3 * median_ms(call, CPU, Effort(repeats, 1))


# ---- the overhead of the switch


def floor(latency: float | None, folder: Path) -> tuple[float, float]:
    """A round trip in seconds, and the throughput of one TCP connection in bytes per second."""
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
    """The throughput of a TCP connection. Bytes per second."""
    piece = bytes(1 << 20)

    def send() -> None:
        for _ in range(BULK_BYTES // len(piece)):
            sender.sendall(piece)

    thread = threading.Thread(target=send)
    started = time.perf_counter()
    thread.start()
    there, buffer = 0, bytearray(1 << 20)
    while there < BULK_BYTES:
        there += receiver.recv_into(buffer)
    seconds = time.perf_counter() - started
    thread.join()
    return BULK_BYTES / seconds


# ---- the whole benchmark


def measure_all(plan: Plan) -> Found:
    """Measure everything in turn, with progress on stderr."""
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
                    log(f"round {i + 1} of {plan.rounds}, period {period}")
                    rows = run_once(hosts, plan, period, latencies)
                    seen = segments(rows, plan.hosts, latencies)
                    for latency, own in zip(latencies, seen, strict=True):
                        samples.setdefault((latency, period), []).extend(own)
                    end = rows[-1]["test_error"], rows[-1]["digest"]
                    if ends.setdefault(period, end) != end:
                        raise SystemExit("scripts/bench latency: the bits depend on the network")
    costs = {latency: typical_costs(own) for latency, own in blocks.items()}
    log("counting the minima")
    runs = [Run(H, *ends[H], share_of_minima(plan, H)) for H in plan.periods]
    alone = statistics.median(samples[min(plan.latencies), max(plan.periods)])
    rows = [
        Row(latency, run.period, samples[latency, run.period],
            costs[latency].expected(
                alone, run.period, run.share, plan.segment, plan.delay_of(run.period)))
        for latency in plan.latencies
        for run in runs
    ]  # fmt: skip
    return Found(plan, floors, costs, rows, runs)


def typical_costs(blocks: Sequence[Costs]) -> Costs:
    """The median of each part."""
    parts = [asdict(block) for block in blocks]
    return Costs(**{name: statistics.median(part[name] for part in parts) for name in parts[0]})


def log(text: str) -> None:
    """Print progress and the load of the machine on stderr."""
    print(f"{text}; load {os.getloadavg()[0]:.1f}", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, measure, print, write."""
    parser = harness.parser("latency", plot=True)
    parser.add_argument("--latencies", nargs="+", type=float, default=[0.0, 10.0, 50.0],
                        metavar="MS", help="one way")  # fmt: skip
    parser.add_argument("--periods", nargs="+", type=int, default=[1, 4, 16, 64], metavar="H")
    parser.add_argument("--hosts", type=int, default=2, help="of one process each")
    parser.add_argument("--loss", type=float, default=0.0, help="probability of a packet")
    parser.add_argument("--potential", default="tan")
    parser.add_argument("--delay", type=int, default=0, metavar="D",
                        help="algorithm.delay, where the period is longer")  # fmt: skip
    parser.add_argument("--segment", type=int, default=64, metavar="E",
                        help="iterations from one evaluation to the next, at least")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=3, help="runs of each period")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.child:
        return serve(options.child)
    if not available():
        parser.error("the hosts are network namespaces, which root makes, with `ip`")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that hosts and runs end too
    plan = Plan(
        tuple(options.latencies), tuple(options.periods), options.rounds, options.hosts,
        options.loss, options.potential, options.seed, options.delay, options.segment,
    )  # fmt: skip
    found = measure_all(plan)
    print(tables(found))
    harness.write_json(options.json, content(found))
    if options.plot:
        draw(found, options.plot)
    return None


if __name__ == "__main__":
    main()
