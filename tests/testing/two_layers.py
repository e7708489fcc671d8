"""Workers with noisy quadratic losses: two layers, in a Coupling and as vectors.

The loss of worker j at iteration t is a noisy quadratic, so that a loop needs its gradient only.
"""

import numpy as np
import torch
from torch import nn

from consensus import Coupling

LAYERS, N = [(0, 3), (3, 7)], 7
F64 = torch.float64


class Part(nn.Module):
    def __init__(self, numel):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(numel, dtype=F64))


def start():
    return np.linspace(-0.2, 0.2, N)


def two_layers():
    """Parameters of two layers with 3 and 4 coordinates."""
    model = nn.Sequential(Part(3), Part(4))
    nn.utils.vector_to_parameters(torch.from_numpy(start()), model.parameters())
    return model


def vector(model):
    return nn.utils.parameters_to_vector(model.parameters()).detach().double().numpy().copy()


def shift(j, t):
    return np.cos(np.arange(N) * (j + 2.0)) + 0.3 * np.sin(np.arange(1, N + 1) * (j + 1) + 0.7 * t)


def gradient(j, t, z):
    return z - shift(j, t)


def backward(model, j, t, quadratic=True, shift=shift):
    """The gradients of worker j at iteration t, of a quadratic or a linear loss."""
    parameters = list(model.parameters())
    wanted = torch.from_numpy(shift(j, t)).split([p.numel() for p in parameters])
    for parameter, piece in zip(parameters, wanted, strict=True):
        parameter.grad = parameter.detach() - piece if quadratic else -0.2 * piece


def trained(j, steps, lr, skipped=(), make=None, **options):
    """u and z_j after every call of `step`, and the stats. (steps, n), (steps, n).

    `make` makes the optimizer of the model; None: SGD with step size `lr`.
    """
    model = two_layers()
    optimizer = make(model) if make else torch.optim.SGD(model.parameters(), lr=lr)
    coupling, us, zs = Coupling(model, optimizer, **options), [], []
    for t in range(steps):
        backward(model, j, t)
        if t not in skipped:
            optimizer.step()
        coupling.step()
        zs.append(vector(model))
        with coupling.consensus():
            us.append(vector(model))
    stats = coupling.stats()
    coupling.close()
    return np.stack(us), np.stack(zs), stats


def on_ranks(ranks, size, steps, lr, **options):
    """u (steps, n), z (steps, M, n) and the stats of each rank."""
    answers = ranks(size, train_on_rank, steps, lr, options)
    assert all(np.array_equal(answers[0][0], answer[0]) for answer in answers), "u differs"
    return answers[0][0], np.stack([answer[1] for answer in answers], 1), answers[0][2]


def train_on_rank(group, steps, lr, options):
    return trained(group.rank, steps, lr, **options)
