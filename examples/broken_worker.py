"""One worker whose gradients are noise: the mean of the copies, and two robust means.

    torchrun --standalone --nproc-per-node=4 examples/broken_worker.py

All workers have the digits of scikit-learn. The gradients of the last one are noise; for comparison
there is a training without noise. On two x86-64 cores, with torch 2.15.0 and seed 0, it printed:

    potential      eta  test error  with a broken worker  |u - z| of worker 0
    quad           1.0       3.6 %                31.1 %                 9.65
    pseudo_huber  0.03       3.6 %                 4.7 %                 0.60
    log_cosh      0.03       3.6 %                 4.4 %                 0.58

The last two grow linearly beyond eta, so the force of a distant copy on u is bounded. With a pull
of 1 every copy is put at u, and all potentials are the mean.
"""

import argparse

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

from consensus import Coupling

SETTINGS = [("quad", 1.0), ("pseudo_huber", 0.03), ("log_cosh", 0.03)]


def train(potential, eta, broken, o):
    """Test error of u in percent, the largest |u - z| of a layer of this worker, and u."""
    rank, digits = dist.get_rank(), load_digits()
    x, y = torch.tensor(digits.data / 16).float(), torch.tensor(digits.target)
    test = torch.rand(len(y), generator=torch.Generator().manual_seed(0)) < 0.2
    own, random = (~test).nonzero().flatten(), torch.Generator().manual_seed(1000 * o.seed + rank)
    torch.manual_seed(o.seed)  # equal weights on all workers
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    coupling = Coupling(model, optimizer, potential, eta=eta, pull=o.pull, period=o.period)
    for _ in range(o.steps):
        batch = own[torch.randint(len(own), (20,), generator=random)]
        cross_entropy(model(x[batch]), y[batch]).backward()
        if broken:
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=random)
        optimizer.step()
        optimizer.zero_grad()
        coupling.step()
    with coupling.consensus(), torch.no_grad():
        error = (model(x[test]).argmax(1) != y[test]).float().mean()
    apart, state = coupling.stats()["distance"], coupling.consensus_state_dict()
    coupling.close()
    return 100 * error.item(), max(apart.values()), state


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=321)
    parser.add_argument("--period", type=int, default=8)
    parser.add_argument("--pull", type=float, default=0.3)
    parser.add_argument("--seed", type=int, default=0)
    o = parser.parse_args(arguments)
    dist.init_process_group("gloo")
    rank, last, rows = dist.get_rank(), dist.get_world_size() - 1, []
    if rank == 0:
        print("potential      eta  test error  with a broken worker  |u - z| of worker 0")
    for potential, eta in SETTINGS:
        good, _, _ = train(potential, eta, False, o)
        error, apart, state = train(potential, eta, rank == last, o)
        rows.append((potential, good, error, apart))
        if rank == 0:
            print(f"{potential:13} {eta:4} {good:9.1f} % {error:19.1f} % {apart:20.2f}", flush=True)
    dist.destroy_process_group()
    return rows, state


if __name__ == "__main__":
    main()
