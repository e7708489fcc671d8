"""Lines 3 and 6 by native.c against the formulas of plain.py, in float64.

`tan_sep` is in C for float32 alone, and compared with the formulas in float64.
"""

import math

import pytest
import torch

from consensus.core.kernels import (
    Block,
    Hyperparameters,
    LineSearch,
    TotalForce,
    choose_kernel,
)
from consensus.core.kernels.native_kernel import Native
from consensus.core.kernels.plain import Plain
from consensus.core.kernels.tiled import Tiled
from consensus.core.layerwise import Layerwise
from consensus.core.potentials import POTENTIALS

F64 = torch.float64
NAMES = ["quad", "cubic", "tan", "log", "log_sep", "huber", "power", "pseudo_huber", "log_cosh"]
LAYERS = [(0, 3), (3, 1030), (1030, 3101)]
N = LAYERS[-1][1]


pytestmark = pytest.mark.usefixtures("library")


def layerwise(name, layers=LAYERS, eta=0.7):
    options = {"separable": False} if name in ("pseudo_huber", "log_cosh") else {}
    return Layerwise(POTENTIALS.make(name, **options), layers, eta)


def pair(name, layers=LAYERS, smallest=None):
    """The same lines by native.c and by operations of torch."""
    phi, like = layerwise(name, layers), torch.zeros(layers[-1][1], dtype=F64)
    kernel = choose_kernel(phi, like, smallest=smallest)
    assert type(kernel) is Native
    return kernel, Plain(phi, like)


class Vectors:
    """u and K workers. In each layer |u - z_k| is `reach`, and |v_k| is `speed`."""

    def __init__(self, workers, reach=0.3, speed=0.1, layers=LAYERS):
        n, random = layers[-1][1], torch.Generator().manual_seed(workers)

        def normal():
            return torch.randn(workers, n, generator=random, dtype=F64)

        self.u = normal()[0]
        w, self.v, self.delta = normal(), normal(), normal()
        for a, b in layers:
            w[:, a:b] *= reach / w[:, a:b].norm(dim=1, keepdim=True)
            self.v[:, a:b] *= speed / self.v[:, a:b].norm(dim=1, keepdim=True)
        self.z = self.u - w
        self.workers, self.n = workers, n

    def block(self):
        """A copy of the workers."""
        return Block(self.z.clone(), self.v.clone(), self.delta.clone(), torch.empty_like(self.z))

    def search(self, rows):
        cuts = torch.zeros((self.workers,) if rows else (), dtype=torch.int64)
        return LineSearch(torch.full((), 7.0, dtype=F64), cuts)


def close(found, wanted, tolerance=1e-14):
    scale = float(wanted.abs().nan_to_num().max())
    torch.testing.assert_close(
        found, wanted, rtol=tolerance, atol=tolerance * scale, equal_nan=True
    )


def agreeing(own):
    """The minimum over ranks that all have the library."""
    return own


def disagreeing(own):
    """The minimum over ranks of which one has none."""
    return own.clamp_(max=0)


@pytest.mark.parametrize("smallest", [None, agreeing, disagreeing])
@pytest.mark.parametrize(("t_u", "size"), [(0.01, 0.3), (0.3, 0.3), (3.0, 0.3), (3.0, 0.1)])
@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_line_3(name, workers, t_u, size, smallest):
    """Long steps are cut where phi is bounded, after the ranks have agreed."""
    vectors = Vectors(workers, size)
    found = []
    for kernel in pair(name, smallest=smallest):
        u, asked = vectors.u.clone(), []
        search = vectors.search(rows=False)
        search = LineSearch(search.step, search.cuts, lambda s, asked=asked: asked.append(s) or s)
        out = torch.full((vectors.n,), 7.0, dtype=F64)
        reach = kernel.forces(u, vectors.z, out, torch.empty_like(vectors.z))
        force, total = out.clone(), None if reach is None else reach.amax(0)
        kernel.move_consensus(u, vectors.z, TotalForce(out, total), t_u, search, out)
        found.append((force, reach, u, search, len(asked)))
    (force, reach, u, search, asked), (plain_force, plain_reach, plain_u, plain, others) = found
    close(force, plain_force)
    close(u, plain_u)
    assert search.cuts == plain.cuts
    assert asked == others
    if reach is not None:
        assert search.step == plain.step
        close(reach, plain_reach)


@pytest.mark.parametrize("smallest", [None, agreeing, disagreeing])
def test_u_is_moved_by_torch_unless_all_ranks_have_the_library(smallest, monkeypatch):
    kernel, _ = pair("quad", smallest=smallest)
    moved = []
    monkeypatch.setattr(kernel.fallback, "move_consensus", lambda *given: moved.append(given))
    u = torch.ones(N, dtype=F64)
    search = LineSearch(torch.ones(()), torch.zeros(()))
    kernel.move_consensus(u, u[None], TotalForce(torch.ones(N, dtype=F64)), 0.5, search, u)
    assert bool(moved) == (smallest is not agreeing)
    assert float(u[0]) == (0.5 if smallest is agreeing else 1.0)


@pytest.mark.parametrize("eta", [1e-30, 1e-20, 1e-18, 1e-10])
@pytest.mark.parametrize("name", [*NAMES, "tan_sep"])
def test_a_scale_whose_square_is_no_number_of_float32(name, eta):
    """No force at u = z_j, and elsewhere that of the formulas, however small eta is."""
    phi, like = layerwise(name, LAYERS, eta), torch.zeros(N)
    kernels = choose_kernel(phi, like, smallest=agreeing), Plain(phi, like)
    assert type(kernels[0]) is Native
    for apart in (0.0, 0.01 * eta):
        z = torch.linspace(-1.0, 1.0, N).mul(apart)[None]
        found = []
        for kernel in kernels:
            u, force = like.clone(), torch.empty_like(like)
            kernel.forces(u, z, force, torch.empty_like(z))
            block = Block(z.clone(), torch.zeros_like(z), torch.zeros_like(z), torch.empty_like(z))
            numbers = Hyperparameters(0.9, 0.1, 0.0, 1e-9)
            search = LineSearch(torch.ones(()), torch.zeros(1, dtype=torch.int64))
            kernel.move_workers(block, u, u, numbers, search)
            found.append((force, block.z))
        (force, moved), (plain_force, plain_moved) = found
        assert plain_force.isfinite().all()
        close(force, plain_force, 1e-5)
        close(moved, plain_moved, 1e-5)


NUMBERS = [(0.9, 0.1, 0.01), (0.0, 0.3, 0.0), (1.0, 0.0, 0.0)]  # kappa, sigma, nu


@pytest.mark.parametrize("pull", [None, 0.05])
@pytest.mark.parametrize("through", [False, True])
@pytest.mark.parametrize("numbers", NUMBERS, ids=str)
@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_line_6(name, workers, numbers, through, pull):
    vectors = Vectors(workers)
    vectors.delta *= 0.01
    found = []
    for kernel in pair(name):
        block, search = vectors.block(), vectors.search(rows=True)
        given = Hyperparameters(*numbers, pull, through)
        kernel.move_workers(block, vectors.u, vectors.u, given, search)
        found.append((block, search))
    (block, search), (plain, plain_search) = found
    close(block.z, plain.z)
    close(block.v, plain.v)
    assert search.step == plain_search.step
    assert torch.equal(search.cuts, plain_search.cuts)


@pytest.mark.parametrize("name", ["tan", "log"])
@pytest.mark.parametrize("speed", [0.01, 0.1, 0.3, 0.6, 1.0, 3.0])
@pytest.mark.parametrize("reach", [0.05, 0.3, 0.6])
def test_the_line_search_is_that_of_the_formulas(name, speed, reach):
    """Steps, cuts and rows as by plain.py, also where a step is cut."""
    vectors = Vectors(2, reach, speed)
    found = []
    for kernel in pair(name):
        block, search = vectors.block(), vectors.search(rows=True)
        given = Hyperparameters(1.0, 1e-3, 0.0, 0.02)
        kernel.move_workers(block, vectors.u, vectors.u, given, search)
        found.append((block, search))
    (block, search), (plain, plain_search) = found
    assert search.step == plain_search.step
    assert torch.equal(search.cuts, plain_search.cuts)
    close(block.z, plain.z)
    close(block.v, plain.v)
    assert bool(layerwise(name).contains(vectors.u - block.z).all())


@pytest.mark.parametrize("name", ["quad", "cubic", "tan"])
def test_jacobi_order(name):
    """The coupling is around the u before line 3."""
    vectors = Vectors(2)
    anchor = vectors.u + 0.01
    found = []
    for kernel in pair(name):
        block, search = vectors.block(), vectors.search(rows=True)
        kernel.move_workers(block, vectors.u, anchor, Hyperparameters(0.9, 0.01, 0.0, 0.05), search)
        found.append(block)
    close(found[0].z, found[1].z)
    close(found[0].v, found[1].v)


ALONE = Hyperparameters(0.9, 0.1, 1e-4, None)  # between two communications


@pytest.mark.parametrize("speed", [0.001, 0.02, 0.2])
@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("name", ["tan", "log", "log_sep"])
def test_steps_alone_are_those_of_the_formulas(name, workers, speed):
    """Whether bounds from an earlier step decide or norms do, to the boundary of the domain."""
    vectors = Vectors(workers, 0.1, speed)
    push, blocks, kernels = vectors.v.clone(), [vectors.block(), vectors.block()], pair(name)
    cut = 0
    for t in range(12):
        searches = [vectors.search(rows=True) for _ in kernels]
        given = ALONE if t % 5 else Hyperparameters(0.9, 0.1, 1e-4, 0.05)
        for kernel, block, search in zip(kernels, blocks, searches, strict=True):
            block.delta.copy_(push).mul_(-1.0)
            kernel.move_workers(block, vectors.u, vectors.u, given, search)
        (block, plain), (search, plain_search) = blocks, searches
        assert search.step == plain_search.step
        assert torch.equal(search.cuts, plain_search.cuts)
        close(block.z, plain.z, 1e-11)
        close(block.v, plain.v, 1e-11)
        cut += int(search.cuts.sum())
    assert bool(layerwise(name).contains(vectors.u - blocks[0].z).all())
    assert (cut > 0) == (speed == 0.2)


def test_a_step_alone_reads_no_u_where_bounds_decide():
    kernel, _ = pair("tan")
    vectors = Vectors(2, 0.1, 0.01)
    u, block = vectors.u.clone(), vectors.block()
    block.delta.mul_(0.01)
    kernel.move_workers(block, u, u, ALONE, vectors.search(rows=True))  # measures the norms
    wanted = vectors.block()
    for own, of_block in zip(
        (wanted.z, wanted.v, wanted.delta), (block.z, block.v, block.delta), strict=True
    ):
        own.copy_(of_block)
    pair("tan")[0].move_workers(wanted, u, u, ALONE, vectors.search(rows=True))
    u.data.fill_(math.nan)  # behind the back of torch
    search = vectors.search(rows=True)
    kernel.move_workers(block, u, u, ALONE, search)
    assert search.step == 1
    assert torch.equal(block.z, wanted.z)
    assert torch.equal(block.v, wanted.v)


CHANGES = {
    "u by torch": lambda u, block, kernel: u.add_(0.55 * direction(u)),
    "u by line 3": lambda u, block, kernel: kernel.move_consensus(
        u,
        block.z,
        TotalForce(direction(u), torch.zeros(len(LAYERS), dtype=F64)),
        -0.55,
        LineSearch(torch.ones((), dtype=F64), torch.zeros((), dtype=torch.int64)),
        torch.empty_like(u),
    ),
    "z": lambda u, block, kernel: block.z.sub_(0.55 * direction(u)),
    "one row of z": lambda u, block, kernel: block.z[1].sub_(0.55 * direction(u)),
    "v": lambda u, block, kernel: block.v.sub_(0.6 * direction(u)),
}


def direction(u):
    """A vector whose norm is 1 in each layer."""
    return torch.cat([torch.full((b - a,), (b - a) ** -0.5, dtype=F64) for a, b in LAYERS])


@pytest.mark.parametrize("change", CHANGES)
def test_bounds_are_not_used_after_a_change(change):
    """A vector that others have changed is measured again: the steps are those of the formulas."""
    kernel, plain = pair("tan", smallest=agreeing)
    vectors, found = Vectors(2, 0.01, 0.01), []
    for own in (kernel, plain):
        u, block = vectors.u.clone(), vectors.block()
        for t in range(4):
            if t == 2:
                CHANGES[change](u, block, kernel)
            block.delta.copy_(direction(u)).mul_(0.1 if t < 2 else 4.0)
            search = vectors.search(rows=True)
            own.move_workers(block, u, u, ALONE, search)
        found.append((u, block.z, block.v, search.step, search.cuts))
    (u, z, v, step, cuts), (plain_u, plain_z, plain_v, plain_step, plain_cuts) = found
    assert torch.equal(u, plain_u)
    assert step == plain_step < 1
    assert torch.equal(cuts, plain_cuts)
    close(z, plain_z)
    close(v, plain_v)


def test_bounds_of_one_worker_are_not_those_of_its_block():
    """Its vectors begin at the same address and have been changed as often."""
    kernel, plain = pair("tan")
    vectors, found = Vectors(2, 0.01, 0.01), []
    for own in (kernel, plain):
        block = vectors.block()
        for size, speed in ((1, 0.1), (2, 4.0), (2, 0.1), (1, 4.0)):
            part = block if size == 2 else block.row(0)
            part.delta.copy_(direction(vectors.u)).mul_(speed)
            search = LineSearch(torch.ones((), dtype=F64), torch.zeros(size, dtype=torch.int64))
            own.move_workers(part, vectors.u, vectors.u, ALONE, search)
        found.append((block.z, search.step))
    (z, step), (plain_z, plain_step) = found
    assert step == plain_step < 1
    close(z, plain_z)


def test_steps_alone_in_inference_mode():
    """Torch does not count changes there: norms are measured."""
    with torch.inference_mode():
        vectors, (kernel, plain) = Vectors(2, 0.1, 0.01), pair("tan")
        blocks = [vectors.block(), vectors.block()]
        for own, block in zip((kernel, plain), blocks, strict=True):
            for _ in range(3):
                block.delta.copy_(vectors.delta).mul_(0.01)
                own.move_workers(block, vectors.u, vectors.u, ALONE, vectors.search(rows=True))
        close(blocks[0].z, blocks[1].z)


@pytest.mark.parametrize(("name", "speed"), [("tan", 0.7), ("log", 0.5)])
def test_the_line_search_of_jacobi_order_is_around_the_new_u(name, speed):
    vectors = Vectors(1, 0.6, speed)
    found = []
    for kernel in pair(name):
        block, search = vectors.block(), vectors.search(rows=True)
        given = Hyperparameters(1.0, 0.0, 0.0, 0.01)
        kernel.move_workers(block, vectors.u, vectors.z[0].clone(), given, search)
        found.append((block.z, search.step))
    (z, step), (plain_z, plain_step) = found
    assert step == plain_step < 1
    close(z, plain_z)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", NAMES)
def test_values_that_are_not_finite(name, value):
    """They spread as by the formulas: where these give a finite number, so does native.c."""
    vectors = Vectors(2)
    vectors.z[1, 1500] = value
    found = []
    for kernel in pair(name):
        block, search = vectors.block(), vectors.search(rows=True)
        out = torch.empty_like(vectors.u)
        kernel.forces(vectors.u, vectors.z, out, None)
        kernel.move_workers(
            block, vectors.u, vectors.u, Hyperparameters(0.9, 0.01, 0.0, 0.05), search
        )
        found.append((out, block.z, block.v, search.step, search.cuts.double()))
    for own, plain in zip(*found, strict=True):
        assert torch.equal(own.isfinite(), plain.isfinite())
        close(own.nan_to_num(0.0, 0.0, 0.0), plain.nan_to_num(0.0, 0.0, 0.0))


@pytest.mark.parametrize("speed", [0.1, 9.0])
@pytest.mark.parametrize("name", NAMES)
def test_a_worker_has_the_same_bits_in_any_block(name, speed):
    """Also beside a worker whose step is cut, and which is left to torch."""
    kernel, _ = pair(name)
    vectors = Vectors(3)
    vectors.v[1] *= speed / 0.1
    given = Hyperparameters(0.9, 0.01, 0.1, 0.05)
    block, together = vectors.block(), vectors.search(rows=True)
    kernel.move_workers(block, vectors.u, vectors.u, given, together)
    steps = []
    for k in range(3):
        row = vectors.block().row(k)
        search = LineSearch(torch.ones((), dtype=F64), torch.zeros(1, dtype=torch.int64))
        kernel.move_workers(row, vectors.u, vectors.u, given, search)
        steps.append(float(search.step))
        assert search.cuts == together.cuts[k] == (steps[k] < 1)
        assert torch.equal(row.z[0], block.z[k])
        assert torch.equal(row.v[0], block.v[k])
    if layerwise(name).bounded:
        assert float(together.step) == min(steps)
        assert steps[0] == steps[2] == 1.0
        assert (steps[1] < 1) == (speed > 1)


def moved(name, dtype, edit, pull=0.05):
    """The force, reach, u and rows after both lines by `choose_kernel`, and what torch took."""
    vectors, phi = Vectors(2, 0.1), layerwise(name)
    edit(vectors)
    numbers = vectors.u, vectors.z, vectors.v, vectors.delta
    u, z, v, delta = (x.float().to(dtype) for x in numbers)  # the same for both types
    kernel, taken = choose_kernel(phi, u, smallest=agreeing), []
    if type(kernel) is Native:
        for line in ("forces", "move_consensus", "move_workers"):
            own = getattr(kernel.fallback, line)
            setattr(
                kernel.fallback,
                line,
                lambda *given, own=own, line=line: taken.append(line) or own(*given),
            )
    out, block = torch.empty_like(u), Block(z, v, delta, torch.empty_like(z))
    reach = kernel.forces(u, z, out, torch.empty_like(z))
    search = LineSearch(u.new_zeros(()), torch.zeros(2, dtype=torch.int64))
    force, total = out.clone(), TotalForce(out, reach.amax(0))
    kernel.move_consensus(u, z, total, 0.01, LineSearch(search.step, search.cuts[:1]), out)
    kernel.move_workers(block, u, u, Hyperparameters(0.9, 0.01, 0.1, pull), search)
    return [x.double() for x in (force, reach, u, z, v, search.step)], taken


@pytest.mark.parametrize("pull", [None, 0.05])
@pytest.mark.parametrize("name", ["tan_sep", "log_sep"])
@pytest.mark.parametrize("size", [0.0, 0.01, 0.05, 0.1, 0.15])
def test_separable_potentials_near_0(name, size, pull):
    """psi' in C, within rounding of float32: of tan_sep by a polynomial up to |w| = 0.156."""

    def edit(vectors):
        vectors.z[0, 5] = vectors.u[5] - size
        vectors.z[1, 2000] = vectors.u[2000] + size

    found, taken = moved(name, torch.float32, edit, pull)
    wanted, _ = moved(name, F64, edit, pull)
    assert taken == []
    for own, plain in zip(found, wanted, strict=True):
        close(own, plain, 1e-6)
    assert float(found[1].max()) >= size / 0.7 - 1e-6


@pytest.mark.parametrize("size", [0.17, -0.3, 0.9, 1.5, math.nan, math.inf])
def test_a_coordinate_away_from_0_is_left_to_torch(size):
    """Of tan_sep, which has no cosine in C; also of one that has left the domain."""

    def edit(vectors):
        vectors.z[1, 2000] = vectors.u[2000] + size

    found, taken = moved("tan_sep", torch.float32, edit)
    wanted, _ = moved("tan_sep", F64, edit)
    assert taken[0] == "forces"
    assert taken[-1] == "move_workers"
    for own, plain in zip(found, wanted, strict=True):
        assert torch.equal(own.isfinite(), plain.isfinite())
        close(own.nan_to_num(0.0, 0.0, 0.0), plain.nan_to_num(0.0, 0.0, 0.0), 1e-5)


@pytest.mark.parametrize("place", [0, 1023, 1024, N - 1])
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_the_largest_coordinate_decides_wherever_it_is(place, sign):
    """A log_sep whose one coordinate is near the boundary: steps are cut as by the formulas."""
    vectors = Vectors(1, 0.1, 0.01)
    vectors.z[0, place] = vectors.u[place] - sign * 0.65
    vectors.v[0, place] = -sign * 0.2
    found = []
    for kernel in pair("log_sep"):
        block, search = vectors.block(), vectors.search(rows=True)
        given = Hyperparameters(1.0, 0.0, 0.0, None)
        kernel.move_workers(block, vectors.u, vectors.u, given, search)
        found.append((block.z, search.step))
    (z, step), (plain_z, plain_step) = found
    assert step == plain_step < 1
    close(z, plain_z)


@pytest.mark.parametrize("name", ["tan", "log", "log_sep"])
def test_a_pull_beyond_the_domain_is_cut(name):
    """At rest at |x| = 0.64, and pulled by several times u - z, beyond the other side."""
    vectors = Vectors(1, 0.01, 0.0)
    for a, _ in LAYERS:
        vectors.z[0, a] = vectors.u[a] - 0.45
    found = []
    for kernel in pair(name):
        block, search = vectors.block(), vectors.search(rows=True)
        given = Hyperparameters(0.0, 0.0, 0.0, 0.8)
        kernel.move_workers(block, vectors.u, vectors.u, given, search)
        found.append((block.z, search.step))
    (z, step), (plain_z, plain_step) = found
    assert step == plain_step < 1
    close(z, plain_z)


def test_rows_with_gaps_are_left_to_torch():
    kernel, plain = pair("tan")
    vectors = Vectors(2)
    found = []
    for own in (kernel, plain):
        wide = torch.zeros(2, 2 * vectors.n, dtype=F64)
        wide[:, ::2] = vectors.z
        block = vectors.block()
        block = Block(wide[:, ::2], block.v, block.delta, block.scratch)
        out = torch.empty_like(vectors.u)
        own.forces(vectors.u, block.z, out, block.scratch.clone())
        own.move_workers(
            block, vectors.u, vectors.u, Hyperparameters(0.9, 0.01, 0.0, 0.1), vectors.search(True)
        )
        found.append((out, block.z))
    for own, wanted in zip(*found, strict=True):
        assert torch.equal(own, wanted)


def test_one_coordinate_in_a_layer():
    layers = [(0, 1), (1, 2)]
    vectors = Vectors(1, layers=layers)
    found = []
    for kernel in pair("tan", layers):
        out = torch.empty_like(vectors.u)
        kernel.forces(vectors.u, vectors.z, out, torch.empty_like(vectors.z))
        found.append(out)
    close(*found)


def test_what_is_left_to_torch(monkeypatch):
    like = torch.zeros(N)
    assert type(choose_kernel(layerwise("tan_sep"), like)) is Native
    assert type(choose_kernel(layerwise("tan_sep"), like.double())) is Plain
    assert type(choose_kernel(layerwise("tan"), like.bfloat16())) is Plain
    for name in ("pseudo_huber", "log_cosh", "power"):
        separable = Layerwise(POTENTIALS.make(name, separable=True), LAYERS)
        assert type(choose_kernel(separable, like)) is Plain
    large = [(0, 1 << 18)]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert type(choose_kernel(layerwise("tan", large), torch.zeros(1 << 18))) is Native
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert type(choose_kernel(layerwise("tan"), like)) is Native
    assert type(choose_kernel(layerwise("tan", large), torch.zeros(1 << 18))) is Tiled
