"""A potential of one's own, in five lines, that ties workers with different data.

    torchrun --standalone --nproc-per-node=4 examples/custom_potential.py

Each worker sees one part of the interval and learns sin(3 x) there. The potential
phi(w) = |w|^2 + |w|^4 / 2 pulls like `quad` near u and more strongly far from u.
"""

import argparse

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import mse_loss

from consensus import POTENTIALS, Coupling, Potential, Profile, Radial


@POTENTIALS.register("firm")
def firm(strength: float = 1.0) -> Potential:
    """psi and its derivatives as functions of s = |w|^2, for each layer (`Radial`)."""
    c = strength
    psi, slope = lambda s: s + c * s**2 / 2, lambda s: 1 + c * s
    return Potential(Profile(psi, slope, lambda s: torch.full_like(s, c)), Radial())


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--strength", type=float, default=1.0)
    parser.add_argument("--pull", type=float, default=0.1)
    o = parser.parse_args(arguments)
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 64), nn.Tanh(), nn.Linear(64, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    options = {"strength": o.strength}
    coupling = Coupling(model, optimizer, "firm", options=options, eta=0.1, pull=o.pull)
    random, grid = torch.Generator().manual_seed(rank), torch.linspace(-2, 2, 201)[:, None]
    losses = []
    for t in range(o.steps):
        x = -2 + 4 * (rank + torch.rand(32, 1, generator=random)) / size
        mse_loss(model(x), (3 * x).sin()).backward()
        optimizer.step()
        optimizer.zero_grad()
        coupling.step()
        if (t + 1) % (o.steps // 10) == 0:
            with coupling.consensus(), torch.no_grad():
                losses.append(mse_loss(model(grid), (3 * grid).sin()).item())
            if rank == 0:
                apart = max(coupling.stats()["distance"].values())
                print(f"step {t + 1}  loss of u {losses[-1]:.4f}  |u - z| {apart:.3f}", flush=True)
    state = coupling.consensus_state_dict()
    coupling.close()
    dist.destroy_process_group()
    return losses, state


if __name__ == "__main__":
    main()
