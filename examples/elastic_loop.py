"""ElasticCoupling in a plain loop: processes may be killed and started while it runs.

Each process fits a sine on points of its own. The one with number j draws them from a generator
with seed j. Kill one of the processes, or add others with the command that the first launcher
prints: the rest goes on, and a new one begins at u.

    python -m consensus.elastic --processes 4 --script examples/elastic_loop.py --steps 20000
"""

import argparse
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import mse_loss

from consensus import ElasticCoupling


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 1))


def target(x):
    return torch.sin(3.0 * x)


def main(arguments=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--output", type=Path, default=Path("runs/examples"))
    options = parser.parse_args(arguments)
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    coupling = ElasticCoupling(model, optimizer, potential="tan", eta=2.0, period=5)
    generator = torch.Generator().manual_seed(coupling.number)
    for step in range(coupling.calls, options.steps):  # a process that joins begins later
        x = 2.0 * torch.rand(16, 1, generator=generator) - 1.0
        optimizer.zero_grad()
        mse_loss(model(x), target(x)).backward()
        optimizer.step()
        coupling.step()
        if step % 500 == 0 and coupling.first:
            print(f"step {step}: {coupling.workers} workers, {coupling.numbers}", flush=True)
    with coupling.consensus(), torch.no_grad():
        x = torch.linspace(-1.0, 1.0, 201).unsqueeze(1)
        loss = float(mse_loss(model(x), target(x)))
    if coupling.first:
        options.output.mkdir(parents=True, exist_ok=True)
        torch.save(coupling.consensus_state_dict(), options.output / "elastic_loop.pt")
        print(f"mean squared error of u: {loss:.2g}", flush=True)
    coupling.close()
    return loss


if __name__ == "__main__":
    main()
