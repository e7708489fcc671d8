"""The scaling benchmark: its fit, its timing by hand, and its output."""

import json
import math
import sys
import time
import weakref

import pytest
import torch
from matplotlib.figure import Figure

from benchmarks import harness, scaling, scaling_laws, scaling_subjects
from benchmarks.scaling import Point
from benchmarks.scaling_laws import Line, Passes, Row, SharedCores
from consensus.comm import GroupError, Solo
from consensus.core.layerwise import Layerwise
from consensus.problem import build_model
from consensus.server import digest
from tests.testing.footprint import growths

N = 33_580
SIZES = [10.0**k for k in (4, 4.5, 5, 5.5, 6, 6.5, 7, 7.5, 8)]


# ---- the fit


def test_the_fit_recovers_a_known_law():
    a, b = scaling_laws.fit(SIZES, [2e-5 + 1.5e-9 * n for n in SIZES])
    assert a == pytest.approx(2e-5, rel=1e-9)
    assert b == pytest.approx(1.5e-9, rel=1e-9)


def test_the_fit_minimizes_the_relative_error():
    # Times that are 5 % off, to and fro. An absolute error would only see the largest n, whose 5 %
    # are a thousand times a.
    seconds = [(2e-5 + 1.5e-9 * n) * (1.05 if i % 2 else 0.95) for i, n in enumerate(SIZES)]

    def error(a: float, b: float) -> float:
        return sum(((a + b * n) / t - 1) ** 2 for n, t in zip(SIZES, seconds, strict=True))

    a, b = scaling_laws.fit(SIZES, seconds)
    assert a == pytest.approx(2e-5, rel=0.1)
    assert b == pytest.approx(1.5e-9, rel=0.1)
    around = [error(a * p, b * q) for p in (0.99, 1, 1.01) for q in (0.99, 1, 1.01)]
    assert min(around) == around[4]


def test_laws_by_hand():
    def rows(panel: str, series: str, times: dict[int, float]) -> list[Row]:
        return [Row(panel, series, x, [t]) for x, t in times.items()]

    found = [
        *rows("n", "copy", {10: 10e-9, 1000: 1000e-9}),
        *rows("n", "quad", {10: 1e-6 + 120e-9, 1000: 1e-6 + 12000e-9}),
        *rows("workers", "tan", {2: 0.5 + 4.0, 8: 0.5 + 16.0}),
        *rows("processes", "alone", {1: 3.0, 2: 3.3, 8: 12.0}),
        *rows("period", "quad", {1: 5.0, 2: 4.0, 4: 3.5}),
        *rows("workers", "quad", {4: 1.0}),  # a single point has no line
    ]
    copy, quad, in_copies, tan, alone, period = scaling.laws_of(found, cores=2)
    assert copy.b == pytest.approx(1e-9)
    assert (quad.a, quad.b) == pytest.approx((1e-6, 12e-9))
    assert (in_copies.a, in_copies.passes) == pytest.approx((1e-6, 12.0))
    assert in_copies.at(1000) == pytest.approx(13e-6)
    assert (tan.a, tan.b) == pytest.approx((0.5, 2.0))
    assert [alone.at(p) for p in (1, 2, 4, 8)] == [3.0, 3.0, 6.0, 12.0]
    assert (period.a, period.b) == pytest.approx((3.0, 2.0))
    assert period.at(64) == pytest.approx(3.0 + 2.0 / 64)
    assert scaling_laws.deviation(alone, found) == pytest.approx(0.1)
    assert str(quad) == "0.001 ms + 12 ns n"
    assert str(in_copies) == "0.001 ms + 12.0 copies"
    assert "/ H" in str(period)
    assert "max(1, P / 2)" in str(alone)


# ---- timing


class Clock:
    """Time that passes only where a subject says so."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class Clocked:
    """Steps of a known duration, and a note of each."""

    cuts = torch.tensor([1, 2])

    def __init__(self, clock: Clock, seconds: float, log: list, name: str) -> None:
        self.clock, self.seconds, self.log, self.name = clock, seconds, log, name

    def step(self, t: int) -> None:
        self.clock.now += self.seconds
        self.log.append((self.name, t))

    def verify(self) -> int:
        return 17


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(harness, "perf_counter", clock)
    return clock


def test_points_are_visited_there_and_back_and_the_median_counts(clock):
    log: list = []

    class Disturbed(Clocked):
        def step(self, t: int) -> None:  # 2 + 4 steps to a visit; the second one is disturbed
            self.seconds = 50.0 if 6 <= sum(name == "a" for name, _ in log) < 12 else 1.0
            super().step(t)

    points = [
        Point("n", "a", 1, lambda: Disturbed(clock, 1.0, log, "a")),
        Point("n", "b", 2, lambda: Clocked(clock, 2.0, log, "b")),
    ]
    a, b = scaling.measure(points, Solo(), 3, seconds=4.0)
    changes = [name for i, (name, _) in enumerate(log) if i == 0 or log[i - 1][0] != name]
    assert changes == ["a", "b", "a", "b"]  # a b, b a, a b
    assert (a.steps, a.samples, a.seconds) == (4, [1.0, 50.0, 1.0], 1.0)
    assert (b.steps, b.samples, b.seconds) == (2, [2.0, 2.0, 2.0], 2.0)
    assert (a.panel, a.series, a.x, a.cuts, a.digest) == ("n", "a", 1, 3, 17)


def test_the_samples_of_all_starts_are_joined():
    def row(x: int, samples: list[float]) -> Row:
        return Row("processes", "quad", x, samples, cuts=1)

    one, two = scaling.joined([row(1, [1.0, 2.0]), row(2, [4.0]), row(1, [3.0]), row(2, [5.0])])
    assert (one.x, one.samples, one.cuts) == (1, [1.0, 2.0, 3.0], 2)
    assert (two.x, two.samples, two.cuts) == (2, [4.0, 5.0], 2)


def test_a_point_stays_in_memory_only_if_it_is_kept(clock):
    alive: weakref.WeakSet = weakref.WeakSet()
    most = []

    def make():
        subject = Clocked(clock, 1.0, [], "")
        alive.add(subject)
        most.append(len(alive))
        return subject

    scaling.measure([Point("n", "a", x, make, keep=False) for x in range(3)], Solo(), 2, 1.0)
    assert most == [1] * 6
    most.clear()
    scaling.measure([Point("n", "a", x, make, keep=True) for x in range(3)], Solo(), 2, 1.0)
    assert most == [1, 2, 3]


@pytest.mark.parametrize("seconds", [0.5, 4.0, 9.0])
def test_a_block_holds_whole_periods(clock, seconds):
    log: list = []
    point = Point("period", "a", 4, lambda: Clocked(clock, 1.0, log, "a"), multiple=4)
    (row,) = scaling.measure([point], Solo(), 1, seconds)
    assert row.steps == {0.5: 4, 4.0: 4, 9.0: 12}[seconds]
    block = [t for _, t in log[scaling.WARM_UP :]]
    assert block == list(range(4, 4 + row.steps))
    assert sum(t % 4 == 0 for t in block) == row.steps / 4


class Sleeper(Clocked):
    def step(self, t: int) -> None:
        time.sleep(self.seconds)


def measure_sleepers(group) -> list[float]:
    sleeper = Sleeper(Clock(), 0.02 * group.rank, [], "")
    (row,) = scaling.measure([Point("period", "a", 1, lambda: sleeper)], group, 2, 0.05)
    return [*row.samples, row.steps]


@pytest.mark.ranks
def test_a_block_takes_as_long_as_its_slowest_rank(ranks):
    first, second = ranks(2, measure_sleepers)
    assert first == second
    assert min(first[:2]) >= 0.02


# ---- what is timed


def test_the_quadratic_gradient_is_that_of_its_loss():
    points = torch.randn(2, 7, dtype=torch.float64, requires_grad=True)
    (0.5 * scaling_subjects.Quadratic.CURVATURE * points.square().sum()).backward()
    oracle = scaling_subjects.Quadratic()
    gradient = oracle.gradient(points.detach(), oracle.draw())
    assert torch.equal(gradient, points.grad)
    assert gradient.data_ptr() != points.data_ptr()  # the step writes into both


def test_an_iteration_on_the_quadratic_is_algorithm_1():
    algorithm = scaling.on_quadratic("quad", 1000)
    u, z = algorithm.u.clone(), algorithm.worker.z[0].clone()
    assert torch.linalg.vector_norm(u - z).item() == pytest.approx(0.1, rel=1e-5)
    algorithm.step(0)
    next_u = u - harness.TAU * 2 * (u - z)
    v = -harness.SIGMA * (scaling_subjects.Quadratic.CURVATURE * z + harness.NU * z)
    next_z = z + v + harness.SIGMA / harness.LAM * 2 * (next_u - z)
    torch.testing.assert_close(algorithm.u, next_u)
    torch.testing.assert_close(algorithm.worker.z[0], next_z)


@pytest.mark.parametrize("potential", ["tan", "tan_sep"])
def test_the_usual_way_of_the_line_search_is_timed(potential, monkeypatch):
    def boundary_step(*_):
        raise AssertionError("the boundary is near")

    monkeypatch.setattr(Layerwise, "_boundary_step", boundary_step)
    algorithm = scaling.on_quadratic(potential, 10_000)
    for t in range(20):
        algorithm.step(t)
    assert algorithm.cuts.tolist() == [0, 0]


def test_a_copy_goes_from_vector_to_vector():
    copy = scaling.Copy(5)
    for t in range(scaling.Copy.LENGTH):
        copy.step(t)
    assert all(torch.equal(vector, torch.zeros(5)) for vector in copy._ring)
    assert copy.verify() == int(digest(torch.zeros(5)))


def test_the_workers_of_a_process_draw_for_themselves():
    algorithm = scaling.on_lenet5("quad", range(3), Solo())
    assert algorithm.worker.z.shape == (3, N)
    algorithm.step(0)
    assert len({int(digest(z)) for z in algorithm.worker.z}) == 3


def test_what_is_alone_never_moves_u():
    algorithm = scaling.on_lenet5("quad", [0], Solo())
    u, z = algorithm.u.clone(), algorithm.worker.z.clone()
    alone = scaling.Alone(algorithm)
    for t in range(2):  # at t = 0 all workers are at u, which no step would move
        alone.step(t)
    assert torch.equal(algorithm.u, u)
    assert not torch.equal(algorithm.worker.z, z)


def measure_diverging(group, wrong_rank: int | None) -> str:
    subject = scaling.on_lenet5("tan", [group.rank], group)
    if group.rank == wrong_rank:
        subject.u[7] += 1e-6
    try:
        (row,) = scaling.measure([Point("period", "tan", 1, lambda: subject)], group, 1, 1e-3)
    except GroupError as error:
        return str(error)
    return str(row.digest)


@pytest.mark.ranks
def test_times_of_ranks_that_diverged_do_not_count(ranks):
    first, second = ranks(2, measure_diverging, None)
    assert first == second == str(int(first))
    assert set(ranks(2, measure_diverging, 1)) == {
        "u on rank [1] differs from u on rank 0: the replicas diverged"
    }


# ---- memory and cores


def test_the_available_memory_is_read(tmp_path):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       24684092 kB\nMemAvailable:       1024 kB\nHugePages:  0\n")
    assert scaling.available_memory(meminfo) == 2**20
    assert scaling.available_memory(tmp_path / "absent") == math.inf


def test_what_does_not_fit_is_left_out_with_a_line(monkeypatch):
    monkeypatch.setattr(scaling, "available_memory", lambda: 2.0**30)
    values, lines = scaling.affordable("n", [10, 1 << 28, 1 << 29], lambda n: 4 * n)
    assert values == [10, 1 << 28]
    assert lines == [
        "n = 536,870,912 is left out: it needs 2.0 GiB of memory, 1.0 GiB are available"
    ]


POINT_OF_TAN_SEP = """
from benchmarks import scaling
def point(n):
    (_, _, _, last) = scaling.points_of_n([n])
    assert last.series == "tan_sep"
    return last
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says how large a process was")
def test_the_memory_of_a_point_is_known():
    ballast = torch.ones(1 << 28)  # 1 GiB that are this process's own, and not the measured one's
    n, small = 10_000_000, 4_000_000  # of the second, the digests take most of the memory
    steps = f"a = point({n}).make(); a.step(0); a.step(1); a.require_feasible(); del a"
    vectors, whole = growths(
        POINT_OF_TAN_SEP, steps, f"scaling.measure([point({small})], scaling.Solo(), 2, 1e-9)"
    )
    assert 5 < vectors / (4 * n) <= scaling.VECTORS
    assert vectors < whole <= scaling.bytes_of_size(small)
    del ballast


def test_cores_are_those_that_this_process_may_use(monkeypatch):
    monkeypatch.setattr(harness.os, "sched_getaffinity", lambda pid: {3, 5, 6}, raising=False)
    assert harness.num_cores() == 3


# ---- output


def test_a_panel_shows_medians_ranges_and_the_law():
    rows = [Row("processes", "quad", p, [t, 1.5 * t, 0.9 * t]) for p, t in ((1, 2.0), (4, 5.0))]
    rows.append(Row("n", "quad", 10, [1.0]))  # of another panel
    axes = Figure().add_subplot()
    scaling_laws.draw_panel(axes, "processes", rows, [SharedCores("processes", "quad", 2.0, 2)])
    points, law = axes.lines
    assert points.get_xydata().tolist() == [[1.0, 2000.0], [4.0, 5000.0]]
    (bars,) = axes.collections
    low_and_high = [bar[:, 1].tolist() for bar in bars.get_segments()]
    assert low_and_high == [pytest.approx([1800, 3000]), pytest.approx([4500, 7500])]
    xs, ms = law.get_data()
    assert (xs[0], xs[-1]) == pytest.approx((1.0, 4.0))
    assert (ms[0], ms[-1]) == pytest.approx((2000.0, 4000.0))
    at_2 = min(range(len(xs)), key=lambda i: abs(xs[i] - 2.0))
    assert ms[at_2] == pytest.approx(2000.0, rel=0.01)  # the corner, at P = c
    assert axes.get_legend_handles_labels()[1] == ["quad: 2e+03 ms max(1, P / 2)"]


def test_the_table_compares_each_point_with_its_law(capsys):
    rows = [
        Row("n", "copy", 1000, [1e-6]),
        Row("n", "quad", 1000, [12e-6]),
        Row("processes", "tan", 1, [2e-3]),
        Row("processes", "tan", 4, [5e-3]),
    ]
    laws = [
        Line("n", "quad", 0.0, 10e-9),
        Passes("n", "quad", 1e-6, 8.0, {1000: 1e-6}),
        SharedCores("processes", "tan", 2e-3, 2),
    ]
    scaling.show(rows, laws)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[1:] == [
        "n copy n = 1,000 0.001 1.00 ns a coordinate",
        "n quad n = 1,000 0.012 0.010 1.20 12.00 ns a coordinate, 12.0 copies",
        "processes tan P = 1 2.000 2.000 1.00 +0.000 ms beyond the law",
        "processes tan P = 4 5.000 4.000 1.25 +1.000 ms beyond the law",
        "law: n quad 0 ms + 10 ns n, at most 20 % off",
        "law: n quad 0.001 ms + 8.0 copies, at most 33 % off",
        "law: processes tan 2 ms max(1, P / 2), at most 25 % off",
    ]


# ---- the command


def test_panels_can_be_chosen_and_large_points_are_left_out(monkeypatch, tmp_path, capsys):
    file = tmp_path / "found.json"
    room = scaling.bytes_of_size(10**5)
    monkeypatch.setattr(scaling, "available_memory", lambda: room)
    scaling.main(["--quick", "--panels", "n", "--json", str(file)])
    found = json.loads(file.read_text())
    assert [(row["series"], row["x"]) for row in found["rows"]] == [
        (series, n) for n in (10**4, 10**5) for series in ("copy", "quad", "tan", "tan_sep")
    ]
    assert found["left_out"][0].startswith("n = 1,000,000 is left out")
    assert found["left_out"][0] in capsys.readouterr().out.splitlines()


def test_ranks_that_fail_end_the_command(monkeypatch):
    monkeypatch.setattr(scaling.sys, "executable", "false")
    with pytest.raises(SystemExit, match="2 ranks failed in processes and period"):
        scaling.in_processes(2, ["processes", "period"], scaling.QUICK)


PANELS_OF_RANKS = (["processes", "period"], scaling.QUICK)


@pytest.mark.ranks
def test_the_panels_of_ranks(ranks):
    found, _ = ranks(2, scaling_rows, *PANELS_OF_RANKS)
    rows = {(row.panel, row.series, row.x): row for row in found}
    assert list(rows) == [
        *(("processes", s, 2) for s in ("alone", "quad", "tan")),
        *(("period", s, h) for h in (1, 2, 4) for s in ("quad", "tan")),
    ]
    for (panel, _, x), row in rows.items():
        assert len(row.samples) == 3
        assert min(row.samples) > 0
        assert row.cuts == 0
        assert row.steps % (x if panel == "period" else 1) == 0
    start = build_model("lenet5", 0, torch.float32, num_classes=10).state_dict().values()
    still = int(digest(torch.cat([parameter.flatten() for parameter in start])))
    assert [row.digest == still for row in found] == [row.series == "alone" for row in found]


def scaling_rows(group, panels, plan):
    return scaling.rows_of_ranks(panels, plan, group)


def test_rows_of_ranks_are_joined_and_shown(monkeypatch, tmp_path, capsys):
    def in_processes(p, panels, plan):
        one = [Row(panel, "quad", p if panel == "processes" else 1, [1e-3 * p]) for panel in panels]
        return one if p < 8 else []

    monkeypatch.setattr(scaling, "in_processes", in_processes)
    files = [str(tmp_path / name) for name in ("found.json", "found.png")]
    command = ["--panels", "processes", "period", "--json", files[0], "--plot", files[1]]
    scaling.main(command)
    found = json.loads((tmp_path / "found.json").read_text())
    rows = [(row["panel"], row["x"], row["samples"]) for row in found["rows"]]
    assert rows == [
        *(("processes", p, [1e-3 * p] * scaling.FULL.starts) for p in (1, 2, 4)),
        ("period", 1, [2e-3] * scaling.FULL.starts),
    ]
    assert [law["panel"] for law in found["laws"]] == ["processes"]
    assert found["left_out"] == []
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(rows) + len(found["laws"])
    assert (tmp_path / "found.png").read_bytes().startswith(b"\x89PNG")
