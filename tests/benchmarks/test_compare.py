"""The bytes and errors of the compared methods, by arithmetic."""

import pytest

from benchmarks import harness
from benchmarks.compare import COLUMNS, Row, compare, draw
from benchmarks.methods import methods

N = 33_580


def rows_of(group) -> list[Row]:
    return compare("lenet5", methods(), group, 1, 0.001)


@pytest.mark.ranks
def test_the_bytes_and_errors_of_all_methods(ranks, tmp_path):
    rows, _ = ranks(2, rows_of, timeout=300.0)
    lines = harness.table(COLUMNS, [row.cells() for row in rows]).splitlines()
    assert [line.split()[0] for line in lines] == ["workload"] + ["lenet5"] * len(rows)
    sent = {row.method: row.bytes_per_iteration for row in rows}
    layers = 3
    assert sent == {
        "local": 0,
        "plain loop": 0,
        "consensus quad, period 1": 4 * N,
        "consensus cubic, period 1": 4 * N,
        "consensus tan, period 1": 4 * (N + 2 * layers),  # two ranks send how far they are from 0
        "consensus log, period 1": 4 * (N + 2 * layers),
        "consensus tan_sep, period 1": 4 * (N + 2),
        "consensus quad, period 10": pytest.approx(4 * N / 10),
        "consensus tan, period 10": pytest.approx(4 * (N + 2 * layers) / 10),
        "coupling quad, period 1": 4 * N,
        "coupling tan, period 1": 4 * (N + layers),  # the weights of the mean
        "coupling quad, period 10": pytest.approx(4 * N / 10),
        "coupling tan, period 10": pytest.approx(4 * (N + layers) / 10),
        "consensus quad over Gloo": 4 * N,
        "  the same in bf16": 2 * N,
        "  in int8": N + 4 * -(-N // 256),  # and a scale for each block of 256
        "  in a fixed order": 4 * N,
        "ddp": 4 * N,
        "postlocal, period 1": 4 * N,
        "postlocal, period 10": pytest.approx(4 * N / 10),
        "naive easgd": 4 * N,
    }
    for row in rows:
        assert (row.workload, row.parameters, row.processes) == ("lenet5", N, 2)
        assert row.ms > 0
        assert row.cpu_ms > 0
        error = {"consensus quad over Gloo": 2.0**-23, "  the same in bf16": 2.0**-7}
        error["  in a fixed order"] = 2.0**-23
        error["  in int8"] = 16 / 254  # |x - rounded x| <= max |x| / 254 in a block of 256
        if row.method in error:  # two numbers rounded, and their sum, of unknown signs
            assert 0 < row.error < error[row.method]
        else:
            assert row.error is None
        assert row.samples_per_s == pytest.approx(2 * 20 * 1e3 / row.ms)
    assert rows[0].ratio_to_local == rows[0].cpu_ratio == 1.0
    draw(rows, str(tmp_path / "bars.png"))
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")
