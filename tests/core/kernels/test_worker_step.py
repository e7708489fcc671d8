"""The step of the workers by an optimizer of torch, against `Coupling` with it and by hand."""

import numpy as np
import pytest
import torch

from consensus import POTENTIALS, Coupling, Layerwise
from consensus.algorithm import Consensus
from consensus.core.kernels import Block, Hyperparameters, LineSearch, choose_kernel
from consensus.core.kernels.worker_step import WorkerOptimizerStep, clip_norms
from consensus.server import Server, digest
from consensus.worker import Worker
from tests.testing.tape import Tape
from tests.testing.two_layers import LAYERS, backward, shift, start, two_layers, vector

STEPS, LR, PAPER = 50, 0.05, {"lam": 1.0, "tau": 0.02}
KICK, KICKED = 40.0, 44  # near the end: rounding is amplified after cuts
OPTIMIZERS = {
    "SGD": {"weight_decay": 0.01},
    "momentum": {"momentum": 0.8, "nesterov": True},
    "AdamW": {"weight_decay": 0.1, "amsgrad": True},
    "RMSprop": {"alpha": 0.9, "momentum": 0.5},
    "Adagrad": {},
    "NAdam": {},
}
CASES = [  # optimizer, potential, period, eta, the largest norm of a gradient
    *(("SGD", name, period, 0.5, None) for name in ("quad", "tan_sep") for period in (1, 5)),
    *(("momentum", name, period, 0.6, None) for name in ("quad", "tan") for period in (1, 5)),
    *(("AdamW", name, period, 0.5, None) for name in ("quad", "tan") for period in (1, 5)),
    *((name, "cubic", 1, 1.0, None) for name in ("RMSprop", "Adagrad", "NAdam")),
    *(("RMSprop", "log", 5, 0.7, None), ("Adagrad", "quad", 5, 1.0, 0.5)),
    *(("momentum", "quad", 1, 1.0, 1.5), ("AdamW", "pseudo_huber", 1, 1.0, None)),
]


def kicked(j, t):
    return shift(j, t) + (KICK * (-1) ** j if t == KICKED else 0.0)


class Oracle:
    """The gradients of one worker."""

    def __init__(self, j):
        self.j, self.t = j, -1

    def draw(self):
        self.t += 1
        return self.t

    def gradient(self, points, batch):
        return points - torch.from_numpy(kicked(self.j, batch))

    def state_dict(self):
        return {}


def beside_coupling(group):
    """The largest difference over all steps, the cuts of both, the digest of u; by case."""
    found = []
    for name, potential, period, eta, clip in CASES:
        kind, options = {"momentum": "SGD"}.get(name, name), OPTIMIZERS[name]
        phi, u = Layerwise(POTENTIALS[potential], LAYERS, eta), torch.from_numpy(start())
        line_6 = choose_kernel(phi, u)
        line_6 = WorkerOptimizerStep(line_6, u[None], kind, {"lr": 9.0, **options}, cut=phi.bounded)
        worker = Worker(u[None], Oracle(group.rank), phi, kappa=0.0, kernel=line_6, clip=clip)
        algorithm = Consensus(Server(u, phi, group), worker, sigma=LR, period=period, **PAPER)
        model = two_layers()
        optimizer = getattr(torch.optim, kind)(model.parameters(), lr=LR, **options)
        numbers = {"eta": eta, "period": period, "sigma": LR, **PAPER}
        coupling = Coupling.from_paper(model, optimizer, potential, **numbers)
        apart = 0.0
        for t in range(STEPS):
            algorithm.step(t)
            backward(model, group.rank, t, shift=kicked)
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            coupling.step()
            with coupling.consensus():
                of_u = np.abs(vector(model) - algorithm.u.numpy()).max()
            of_z = np.abs(vector(model) - algorithm.worker.z[0].numpy()).max()
            apart = max(apart, of_u, of_z)
        cuts = coupling.stats()["cuts"]
        state = coupling.state_dict()
        coupling.close()
        found.append((apart, [cuts["u"], cuts["z"]], algorithm.cuts.tolist(), digest(state["u"])))
    return found


@pytest.mark.ranks
def test_the_trainers_step_is_that_of_coupling(ranks):
    answers = ranks(2, beside_coupling)
    cut = set()
    for i, case in enumerate(CASES):
        assert len({int(answer[i][3]) for answer in answers}) == 1, f"u differs: {case}"
        for apart, cuts, wanted, _ in (answer[i] for answer in answers):
            assert apart < 1e-12, case
            assert cuts == wanted, case
            if cuts[1]:
                cut.add(case[:2])
    assert {("SGD", "tan_sep"), ("momentum", "tan")} <= cut


def moved(potential, z, delta, name, options, steps=1, **numbers):
    """z and the kernel after some steps with constant gradients and u = 0; the cuts, the step."""
    phi = Layerwise(POTENTIALS[potential], [(0, z.shape[1])], 1.0)
    u, z, v = torch.zeros_like(z[0]), z.clone(), torch.full_like(z, 7.0)
    kernel = WorkerOptimizerStep(choose_kernel(phi, u), z, name, options, cut=phi.bounded)
    search = LineSearch(torch.ones((), dtype=z.dtype), torch.zeros(len(z), dtype=torch.int64))
    sizes = Hyperparameters(kappa=3.0, nu=5.0, **numbers)
    for _ in range(steps):
        kernel.move_workers(Block(z, v, delta.clone()), u, u, sizes, search)
    return z, kernel, search


def test_the_momentum_of_each_worker_has_its_own_cut():
    """log, u = 0, n = 1: z = 0.5 - 2 is outside |z| < 1 and is halved once, 0.5 - 1/8 is inside."""
    z, delta = torch.tensor([[0.5], [0.5]]).double(), torch.tensor([[2.0], [0.125]]).double()
    numbers = {"sigma": 1.0, "pull": None}
    z, kernel, search = moved("log", z, delta, "SGD", {"lr": 1.0, "momentum": 0.5}, **numbers)
    assert z.flatten().tolist() == [-0.5, 0.375]
    assert search.cuts.tolist() == [1, 0]
    assert float(search.step) == 0.5, "the smallest"
    assert kernel.state_dict()["momentum_buffer"].flatten().tolist() == [1.0, 0.125]


def test_the_rate_is_that_of_the_call():
    """SGD from 1 with gradient 1: sigma counts, and neither lr, kappa nor nu."""
    one = torch.ones(1, 1).double()
    z, _, _ = moved("quad", one, one, "SGD", {"lr": 99.0}, sigma=0.25, pull=None)
    assert z.item() == 0.75
    z, _, _ = moved("quad", one, one, "SGD", {"lr": 99.0}, sigma=0.25, pull=0.125)
    assert z.item() == 0.5, "grad phi(u - z) = -2"


def test_workers_do_not_share_state():
    """AdamW of two workers in one block is AdamW of each alone, before and after a restore."""
    generator = torch.Generator().manual_seed(0)
    z, delta = (torch.randn(2, 5, generator=generator) for _ in range(2))
    numbers = {"sigma": 0.1, "pull": 0.01}
    own = ("AdamW", {"lr": 0.1}, 4)
    both, kernel, _ = moved("tan", 0.1 * z, delta, *own, **numbers)
    rows = kernel.state_dict()
    for k in range(2):
        alone, of_one, _ = moved("tan", 0.1 * z[k : k + 1], delta[k : k + 1], *own, **numbers)
        assert torch.equal(alone[0], both[k])
        for key, row in of_one.state_dict().items():
            assert torch.equal(row[0], rows[key][k]), key
    assert rows["step"].tolist() == [4, 4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_clipping_is_that_of_torch(dtype):
    rows = torch.randn(4, 7, dtype=dtype, generator=torch.Generator().manual_seed(0))
    rows[1] *= 0.01
    rows[3] = 0.0
    clipped = rows.clone()
    clip_norms(clipped, 1.5)
    for row, found in zip(rows, clipped, strict=True):
        pieces = [torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(4))]
        for piece, gradient in zip(pieces, row.split([3, 4]), strict=True):
            piece.data = piece.to(dtype)
            piece.grad = gradient.clone()
        torch.nn.utils.clip_grad_norm_(pieces, 1.5)
        wanted = torch.cat([piece.grad for piece in pieces])
        torch.testing.assert_close(found, wanted, rtol=4 * torch.finfo(dtype).eps, atol=0)
    assert torch.equal(clipped[1], rows[1])
    with Tape():  # raises if a number is read on the host
        clip_norms(clipped, 1.5)
    assert rows[0].norm() > 1.5 > clipped[0].norm()
