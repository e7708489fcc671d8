"""The counts of the benchmark of Coupling, by arithmetic."""

import pytest
import torch

from benchmarks import harness
from benchmarks.coupling import COLUMNS, Count, Row, measure, storages

N = 33_580
NAMES = ["coupling quad, period 10", "averager, period 1", "like local sgd, period 10"]


def rows_of(group) -> list[Row]:
    return measure("lenet5", NAMES, group, 1, 0.001)


@pytest.mark.ranks
def test_the_vectors_and_ratios_of_methods(ranks):
    rows, _ = ranks(2, rows_of, timeout=300.0)
    lines = harness.table(COLUMNS, [row.cells() for row in rows]).splitlines()
    assert [line.split()[0] for line in lines] == ["workload"] + ["lenet5"] * len(rows)
    assert [row.method for row in rows] == NAMES
    coupled, averager, local_sgd = rows
    # u, z_j, and two slots for the messages of this process, in pages of shared memory.
    assert coupled.vectors == pytest.approx(4.0, abs=0.2)
    assert averager.vectors == pytest.approx(0.0, abs=0.2)
    assert averager.temporary == pytest.approx(1.0, abs=0.1)  # the flat parameters
    assert 0.74 < local_sgd.temporary < 1.0  # a copy of each, at least of the largest
    assert 2 <= averager.operations <= 100  # of every call, so at least a copy and a sum
    assert 0.5 <= local_sgd.operations <= 30  # in one call of ten
    for row in rows:
        assert (row.workload, row.parameters, row.processes, row.rounds) == ("lenet5", N, 2, 1)
        assert row.cpu_ms > 0
        assert 0 < row.call < row.cpu_ratio


def test_operations_and_bytes_are_counted():
    x, total = torch.ones(100), torch.empty(100)
    with Count() as count:
        y = x + x  # 400 bytes
        z = y[:50] + y[50:]  # two views, and 200 bytes
        del y
        z = z + z  # 200 bytes while 200 are there
        torch.add(x, x, out=total)
        x.mul_(2.0)
    assert (count.operations, count.most) == (7, 600)


def test_storages_count_once_and_mapped_files_by_a_share(tmp_path):
    (tmp_path / "shared").write_bytes(bytes(4096))
    before = set(storages(0.5))
    x = torch.ones(100)
    y = x[10:].view(9, 10)
    mapped = torch.from_file(str(tmp_path / "shared"), shared=True, size=1024)
    new = {place: size for place, size in storages(0.5).items() if place not in before}
    assert new[y.untyped_storage().data_ptr()] == 400
    assert new[mapped.untyped_storage().data_ptr()] == 2048
