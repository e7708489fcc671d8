"""A sharded potential equals the potential of the whole vectors. Shards are threads here."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from consensus.core.kernels import Block, Hyperparameters, LineSearch, TotalForce, choose_kernel
from consensus.core.kernels.plain import Plain
from consensus.core.kernels.weighted import WeightedProximal
from consensus.core.layerwise import Layerwise
from consensus.core.potentials import POTENTIALS
from consensus.core.sharded import ShardedLayerwise, Shards
from consensus.core.sizes import Radial
from tests.testing import proximal

torch.set_num_threads(1)
F32, F64 = torch.float32, torch.float64
LAYERS = [(0, 3), (3, 4), (4, 9)]
PLACES = {  # coordinates of each shard, and its layers
    "uneven": [
        ([0, 1, 3, 4, 5, 6], [(0, 2), (2, 3), (3, 6)]),
        ([2, 7, 8], [(0, 1), (1, 1), (1, 3)]),
    ],
    "empty": [(list(range(9)), LAYERS), ([], [(0, 0)] * 3)],
    "three": [
        ([3, 4], [(0, 0), (0, 1), (1, 2)]),
        ([0, 1, 2], [(0, 3), (3, 3), (3, 3)]),
        ([5, 6, 7, 8], [(0, 0), (0, 0), (0, 4)]),
    ],
}
NAMES = ["quad", "cubic", "tan", "tan_sep", "log", "log_sep", "pseudo_huber", "scaled_quad"]
ALONE = Shards(lambda x: x, lambda x: x)
every = pytest.mark.parametrize("name", NAMES)
everywhere = pytest.mark.parametrize("place", PLACES)


class Meeting:
    """Sums and minima over threads, which must ask for the same ones in the same order."""

    def __init__(self, size):
        self.barrier, self.given = threading.Barrier(size), [None] * size
        self.calls = 0

    def shards(self, own):
        def reduce(kind, tensor):
            self.given[own] = (kind, tensor.clone())
            if self.barrier.wait(5.0) == 0:
                self.calls += 1
            kinds = {(kind, given.shape, given.dtype) for kind, given in self.given}
            together = torch.stack([given for _, given in self.given])
            self.barrier.wait(5.0)
            assert len(kinds) == 1, kinds
            return tensor.copy_(together.sum(0) if kind == "sum" else together.amin(0))

        return Shards(lambda x: reduce("sum", x), lambda x: reduce("min", x))


def on_shards(place, function):
    """function(layers, part, shards) on each shard, part(x) its coordinates; the number of sums."""
    meeting = Meeting(len(PLACES[place]))

    def run(own):
        try:
            index, layers = PLACES[place][own]
            return function(layers, lambda x: x[..., index].clone(), meeting.shards(own))
        except BaseException:
            meeting.barrier.abort()
            raise

    with ThreadPoolExecutor(len(PLACES[place])) as pool:
        return list(pool.map(run, range(len(PLACES[place])))), meeting.calls


def whole(place, parts):
    """The vector (..., 9) of the parts (..., n) of all shards."""
    x = torch.full((*parts[0].shape[:-1], 9), math.nan, dtype=parts[0].dtype)
    for (index, _), part in zip(PLACES[place], parts, strict=True):
        x[..., index] = part
    return x


def blocks(*shape, seed=0, size=0.3, dtype=F64):
    generator = torch.Generator().manual_seed(seed)
    return ((torch.rand(*shape, generator=generator, dtype=F64) - 0.5) * 2 * size).to(dtype)


def make(name):
    weights = {"weight": [0.5, 2.0, 1.0]} if name == "scaled_quad" else {}
    return POTENTIALS.make(name, **weights)


@every
@everywhere
def test_every_method(name, place):
    phi = Layerwise(make(name), LAYERS, 0.7)
    w, d, u = blocks(4, 9), blocks(4, 9, seed=1, size=2.0), blocks(9, seed=2)
    out = w.clone()
    out[1, 8] = 5.0

    def methods(layers, part, shards):
        own = ShardedLayerwise(phi, layers, shards).to(part(u))
        vectors = [own.grad(part(w)), own.grad_(part(w)), own.hvp(part(w), part(d))]
        vectors += [own.conjugate_grad(own.grad(part(w))), own.grad_and_reach_(part(w))[0]]
        vectors.append(own.prox(part(d), 0.4))
        points = [own.value(part(w)), own.max_step(part(w), part(d)), own.distance(part(w))]
        steps = [own.feasible_step(part(w), part(x), part(u)) for x in (d, 1e-3 * d, d[:1])]
        return vectors, [*points, own.contains(part(out)), *steps]

    found, _ = on_shards(place, methods)
    vectors = [phi.grad(w), phi.grad(w), phi.hvp(w, d), w, phi.grad(w), phi.prox(d, 0.4)]
    for i, expected in enumerate(vectors):
        torch.testing.assert_close(whole(place, [vectors[i] for vectors, _ in found]), expected)
    points = [phi.value(w), phi.max_step(w, d), phi.distance(w), phi.contains(out)]
    points += [phi.feasible_step(w, x, u) for x in (d, 1e-3 * d, d[:1])]
    assert phi.contains(out).tolist() == [True, not phi.bounded, True, True]
    assert ((points[4] < 1).any(), (points[5] < 1).any()) == (phi.bounded, False)
    for i, expected in enumerate(points):
        for _, own in found:
            torch.testing.assert_close(own[i], expected)
            assert torch.equal(own[i], found[0][1][i])


EXPLICIT = {  # sums in line 3, its step, line 6 with its step, the next line 6 without a pull
    "cubic": (1, 0, 1, 0),
    "tan": (1, 1, 2, 1),
    "tan_sep": (0, 1, 1, 1),
    "quad": (0, 0, 0, 0),
}


@pytest.mark.parametrize("name", EXPLICIT)
@everywhere
def test_lines_3_and_6_with_cuts(name, place):
    """Three workers as one block: one small sum for all of them."""
    z, v, u = blocks(3, 9), blocks(3, 9, seed=1, size=0.9), blocks(9, seed=2)

    def lines(phi, part):
        kernel = Plain(phi, part(u))
        own_u, own_z, d = part(u), part(z), part(v)
        force = torch.empty_like(own_u)
        step, cuts = torch.ones((), dtype=F64), torch.zeros((), dtype=torch.int64)
        search = LineSearch(step, cuts)
        reach = kernel.forces(own_u, own_z, force, None)
        reach = None if reach is None else reach.amax(0)
        yield force.clone()
        kernel.move_consensus(own_u, own_z, TotalForce(force, reach), 0.3, search, force)
        yield own_u
        of_z = LineSearch(torch.ones((), dtype=F64), torch.zeros(3, dtype=torch.int64))
        for pull in (0.3, None):
            numbers = Hyperparameters(1.0, 0.0, 0.0, pull)
            block = Block(own_z, d, torch.zeros_like(d))
            kernel.move_workers(block, own_u, own_u, numbers, of_z)
            yield own_z.clone()
        yield torch.stack([step, *of_z.cuts.double(), cuts.double()])

    whole_phi = Layerwise(make(name), LAYERS, 0.7)
    expected = list(lines(whole_phi, lambda x: x.clone()))

    def sharded(layers, part, shards):
        calls = []

        def counted(reduce):
            return lambda x: calls.append(x.shape) or reduce(x)

        shards = Shards(counted(shards.total), counted(shards.smallest))
        results, counts = [], []
        for result in lines(ShardedLayerwise(whole_phi, layers, shards), part):
            results.append(result)
            counts.append(len(calls))
            calls.clear()
        assert tuple(counts[:4]) == EXPLICIT[name]
        return results

    found, _ = on_shards(place, sharded)
    for i in range(4):
        torch.testing.assert_close(whole(place, [own[i] for own in found]), expected[i])
    assert all(torch.equal(own[4], expected[4]) for own in found)
    assert (expected[4][1:4].sum() > 0) == math.isfinite(make(name).bound)


@pytest.mark.parametrize("name", NAMES[:-1])
@everywhere
@pytest.mark.parametrize("dtype", [F32, F64])
def test_proximal_pulls(name, place, dtype):
    z, d, u = (blocks(1, 9, seed=s, dtype=dtype) for s in range(3))

    def pulled(phi, part):
        kernel, center = WeightedProximal(phi, part(u[0]), 0.4), part(u[0])
        total = torch.empty(kernel.force_size, dtype=dtype)
        kernel.forces(center, part(z), total, None)
        search = LineSearch(torch.ones((), dtype=dtype), torch.zeros((), dtype=torch.int64))
        kernel.move_consensus(center, part(z), TotalForce(total), 0.5, search, total.clone())
        return center, proximal.pulled(kernel, part(z)[0], part(d)[0], center, 0.4)[None]

    phi = Layerwise(make(name), LAYERS, 0.7)
    expected = pulled(phi, lambda x: x.clone())
    found, calls = on_shards(
        place, lambda layers, part, s: pulled(ShardedLayerwise(phi, layers, s), part)
    )
    for i in range(2):
        torch.testing.assert_close(whole(place, [own[i] for own in found]), expected[i])
    assert calls == (2 if isinstance(make(name).size, Radial) else 0)


def test_sharded_vectors_have_plain_kernels():
    """The others decide by values of this process, or take norms in pieces."""
    layers = [(0, 1 << 18)]
    phi = ShardedLayerwise(Layerwise(make("tan"), layers), layers, ALONE)
    kernel = choose_kernel(phi, torch.empty(1 << 18))
    assert type(kernel) is Plain
    assert kernel.reach_size == 0


def test_norms_of_large_shards_are_one_sum(monkeypatch):
    monkeypatch.setattr("consensus.core.sizes.CHUNK", 2)
    x = blocks(9)

    def norms(layers, part, shards):
        size = ShardedLayerwise(Layerwise(make("cubic"), LAYERS), layers, shards).size
        return size.norm(part(x)), size.length(part(x))

    found, calls = on_shards("uneven", norms)
    assert calls == 2
    size = Radial(LAYERS)
    for own in found:
        torch.testing.assert_close(own[0], size.norm(x))
        torch.testing.assert_close(own[1], x.norm(dim=-1, keepdim=True))


def test_weights_are_those_of_layers():
    """A part of the layers in a shard keeps their weights; with one a coordinate it is refused."""
    layers = [(0, 1), (1, 3), (3, 4)]
    phi = Layerwise(POTENTIALS.make("scaled_quad", weight=[1.0, 4.0, 9.0]), layers).select([2, 1])
    own = ShardedLayerwise(phi, [(0, 0), (0, 3)], ALONE)
    assert own.grad(torch.ones(3)).tolist() == [8.0, 8.0, 8.0]
    with pytest.raises(ValueError, match="several weights"):
        own.fraction(torch.ones(3), 1.0)
    phi = Layerwise(POTENTIALS.make("scaled_quad", weight=[1.0, 4.0, 9.0, 9.0]), layers)
    with pytest.raises(ValueError, match=r"`weight` has .* allowed .*: 1, or 3 \(one a layer\)$"):
        ShardedLayerwise(phi, layers, ALONE)
