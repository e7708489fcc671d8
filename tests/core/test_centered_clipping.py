"""Line 3 with `huber` is centered clipping, in the implementation of byzfl."""

import numpy as np
import pytest
import torch

from consensus import POTENTIALS, Layerwise
from consensus.comm import Solo
from consensus.server import Server

M, N = 7, 20


@pytest.mark.parametrize("radius", [0.1, 3.0, 1e4])  # all, some and none are clipped
def test_line_3_is_centered_clipping(radius):
    """With tau = eta^2 / M, which is outer = 2, several iterations from the same center."""
    import byzfl  # with torchvision and torch._dynamo: 4 s, in each process that collects tests

    random = torch.Generator().manual_seed(0)
    u = torch.randn(N, generator=random, dtype=torch.float64)
    z = u + torch.logspace(-1, 2, M, dtype=torch.float64)[:, None] * torch.randn(
        M, N, generator=random, dtype=torch.float64
    ) / np.sqrt(N)
    clipping = byzfl.CenteredClipping(L=1, tau=radius)
    clipping.m = u.numpy().copy()  # its constructor refuses every m
    phi = Layerwise(POTENTIALS["huber"], [(0, N)], radius)
    server = Server(u, phi, Solo())
    for _ in range(3):
        moved = server.finish(server.start(z), radius**2 / M)
        np.testing.assert_allclose(moved.numpy(), clipping(z.numpy()), rtol=1e-12, atol=1e-14)
