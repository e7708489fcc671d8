"""Ways to add up a vector over hosts, in alternation, over the latency between them.

Started as `scripts/bench sums`, as root: the hosts are those of benchmarks/latency.py, with one
process each. Sums follow one another, and nothing hides them. Medians over `--rounds` blocks of
REPEATS sums, on rank 0: milliseconds of a sum, and CPU milliseconds of the process.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import harness
from benchmarks.harness import CPU, TIMEOUT_S, table
from benchmarks.latency import COORDINATES, start_on
from consensus.comm import Launch, Pending, ProcessGroup, RepeatedSum, open_group, sent_sum
from consensus.comm.exchanged_sum import ExchangedSum
from consensus.comm.int8_sum import Int8Sum
from consensus.comm.sums import TreeSum
from tests.testing.hosts import Hosts, available

REPEATS = 6
COLUMNS = {"latency": ">7.0f", "n": ">11,", "sum": "<24", "ms": ">9.2f", "CPU ms": ">8.2f"}


class AllToAllSum(RepeatedSum):
    """Rank r adds piece r of all messages; its total goes to all by a second collective."""

    def __init__(self, group: ProcessGroup, message: Tensor, gather: bool) -> None:
        self._handle, self._size, self._gather = group.handle, group.size, gather
        padded = message.new_zeros(-(-len(message) // group.size) * group.size)
        self._padded, self._received = padded, torch.empty_like(padded)
        self.message = padded[: len(message)]

    def start(self) -> Pending:
        """Begin the first phase; the second one is begun by `wait`."""
        work = dist.all_to_all_single(
            self._received, self._padded, group=self._handle, async_op=True
        )

        def wait() -> Tensor:
            work.wait()
            total = self._received.view(self._size, -1).sum(0)
            if self._gather:
                dist.all_gather_into_tensor(self._padded, total, group=self._handle)
            else:
                every = total.repeat(self._size)
                dist.all_to_all_single(self._padded, every, group=self._handle)
            return self.message

        return Pending(wait)


def sums(group: ProcessGroup, numel: int) -> dict[str, RepeatedSum]:
    """The ways, by the name in the table."""
    makers: dict[str, Callable[[Tensor], RepeatedSum]] = {
        "all-reduce": lambda x: sent_sum(group, x),
        "all-reduce in bf16": lambda x: sent_sum(group, x, "bf16"),
        "all-gather": lambda x: TreeSum(group, x),
        "int8": lambda x: Int8Sum(group, x, 0),
    }
    if group.size == 2:
        exchange = partial(ExchangedSum, group)
        makers["exchange"] = exchange
        makers["exchange in bf16"] = lambda x: sent_sum(group, x, "bf16", exchange)
    else:
        makers["all-to-all, all-gather"] = lambda x: AllToAllSum(group, x, gather=True)
        makers["all-to-all twice"] = lambda x: AllToAllSum(group, x, gather=False)
    return {name: make(torch.zeros(numel)) for name, make in makers.items()}


def serve(latencies: int, numbers: Sequence[int], rounds: int) -> None:
    """One rank: all ways, once for each latency; rank 0 prints a line of medians for each n."""
    group = open_group(Launch.from_environment(), "gloo", CPU, TIMEOUT_S)
    assert isinstance(group, ProcessGroup)
    for _ in range(latencies):
        if group.rank == 0:
            sys.stdin.readline()  # the latency is set
        group.barrier()
        for numel in numbers:
            ways = list(sums(group, numel).items())
            found: dict[str, list[tuple[float, float]]] = {name: [] for name, _ in ways}
            for i in range(rounds):
                for name, total in ways if i % 2 == 0 else reversed(ways):
                    total.message.fill_(1.0)
                    total.start().wait()
                    cpu, wall = time.process_time(), time.perf_counter()
                    for _ in range(REPEATS):
                        total.message.fill_(1.0)
                        total.start().wait()
                    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
                    found[name].append((1e3 * wall / REPEATS, 1e3 * cpu / REPEATS))
            medians = {
                name: [statistics.median(column) for column in zip(*times, strict=True)]
                for name, times in found.items()
            }
            if group.rank == 0:
                print(json.dumps(medians), flush=True)
            del ways
    group.barrier()
    group.close()


def measure(
    hosts: Hosts, latencies: Sequence[float], numbers: Sequence[int], rounds: int
) -> list[tuple[object, ...]]:
    """The rows of the table.

    Raises:
        SystemExit: If the ranks fail; their messages are on stderr.
    """
    words = ["-m", "benchmarks.sums", "--child", "--rounds", str(rounds)]
    words += ["--latencies", *map(str, latencies), "--numbers", *map(str, numbers)]
    ranks, rows = start_on(hosts, words, talk=True), []
    try:
        first = ranks[0]
        assert first.stdin is not None
        assert first.stdout is not None
        for latency in latencies:
            hosts.set_latency(latency)
            first.stdin.write("\n")
            first.stdin.flush()
            for numel in numbers:
                medians = json.loads(first.stdout.readline() or "{}")
                if not medians:
                    raise SystemExit("scripts/bench sums: the ranks have failed")
                rows += [(latency, numel, name, *times) for name, times in medians.items()]
        for rank in ranks:
            rank.wait(timeout=TIMEOUT_S)
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, measure, print, write."""
    parser = harness.parser("sums")
    parser.add_argument("--latencies", nargs="+", type=float, default=[0.0, 10.0, 50.0],
                        metavar="MS", help="one way")  # fmt: skip
    parser.add_argument("--numbers", nargs="+", type=int, default=[COORDINATES], metavar="N")
    parser.add_argument("--hosts", type=int, default=2, help="of one process each")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.child:
        return serve(len(options.latencies), options.numbers, options.rounds)
    if not available():
        parser.error("the hosts are network namespaces, which root makes, with `ip`")
    with tempfile.TemporaryDirectory() as folder, Hosts(options.hosts, Path(folder), 0.0) as hosts:
        rows = measure(hosts, options.latencies, options.numbers, options.rounds)
    print(table(COLUMNS, rows))
    harness.write_json(options.json, {"environment": harness.environment(), "rows": rows})
    return None


if __name__ == "__main__":
    main()
