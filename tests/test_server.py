"""The server alone: line 3 against closed forms, its collectives, and the digest of u."""

import numpy as np
import pytest
import torch

from consensus import POTENTIALS, Layerwise
from consensus.comm import Solo
from consensus.core.potentials import scaled_quad
from consensus.server import Server, digest

N, LAYERS = 7, [(0, 3), (3, 7)]


def start_u():
    return np.linspace(-0.2, 0.2, N)


def start_z():
    return np.stack([start_u() + 0.05 * np.cos(np.arange(N) * (j + 2.0)) for j in range(4)])


@pytest.mark.parametrize("weight", [0.5, [1.0, 2.0], [1.0, 2.0, 3.0, 1.0, 2.0, 3.0, 4.0]])
def test_the_scaled_quadratic_pulls_each_coordinate_with_its_weight(weight):
    q = np.broadcast_to(weight, N) if np.size(weight) in (1, N) else np.repeat(weight, [3, 4])
    phi = Layerwise(scaled_quad(weight), LAYERS)
    server = Server(torch.from_numpy(start_u()), phi, Solo())
    u = server.finish(server.start(torch.from_numpy(start_z())), 0.01)
    expected = start_u() - 0.01 * sum(2.0 * q * (start_u() - z) for z in start_z())
    np.testing.assert_allclose(u, expected, rtol=0, atol=1e-15)


def test_pseudo_huber_at_a_small_scale_converges_to_the_componentwise_median():
    rng = np.random.default_rng(0)
    z = rng.normal(size=(5, N))
    z[4] += 100.0  # a broken worker
    eta = 1e-3
    server = Server(
        torch.zeros(N, dtype=torch.float64),
        Layerwise(POTENTIALS["pseudo_huber"], LAYERS, eta),
        Solo(),
    )
    # The gradient of each term is at most 1 / eta, its slope at most 1 / eta^2 within eta of a z_j.
    for t in range(40_000):
        server.finish(server.start(torch.from_numpy(z)), eta * 5e-3 * 0.9997**t)
    np.testing.assert_allclose(server.u, np.median(z, axis=0), rtol=0, atol=5 * eta)
    assert np.abs(server.u.numpy() - z.mean(0)).max() > 10.0, "the mean is spoilt"


def test_its_state_is_u_the_step_and_the_cuts():
    phi = Layerwise(POTENTIALS["log"], LAYERS, 0.1)
    servers = [Server(torch.from_numpy(start_u()), phi, Solo()) for _ in range(2)]
    z = torch.from_numpy(start_u() + 0.01 * np.ones((4, N)))
    servers[0].finish(servers[0].start(z), 1.0)  # far too long: cut
    assert int(servers[0].cuts) == 1
    assert float(servers[0].step) < 1
    servers[1].load_state_dict({k: v.clone() for k, v in servers[0].state_dict().items()})
    for server in servers:
        server.finish(server.start(z), 1e-4)
    assert torch.equal(servers[0].u, servers[1].u)
    assert int(servers[1].cuts) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_digest_sees_every_single_bit_and_the_order(dtype):
    """Also the reference of splitmix64's finalizer in Python integers."""
    u = torch.linspace(-1, 1, 50, dtype=dtype)
    first = int(digest(u))
    width = 8 * u.element_size()
    integer = torch.int32 if width == 32 else torch.int64
    for coordinate in (0, 17, 49):
        for bit in range(width):
            other = u.clone()
            one = torch.tensor(1, dtype=integer) << bit
            other.view(integer)[coordinate] ^= one
            assert int(digest(other)) != first
    assert int(digest(u.flip(0))) != first
    assert int(digest(-u)) != first, "sign bits of an even number of coordinates do not cancel"
    assert int(digest(u.clone())) == first
    mask = 2**64 - 1
    total = 0
    for i, b in enumerate(u.view(integer).tolist()):
        x = (b ^ (i * 0x9E3779B97F4A7C15)) & mask
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        total = (total + (x ^ (x >> 31))) & mask
    assert first & mask == total
