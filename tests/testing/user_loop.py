"""A training loop of a user: Coupling, torch.save of each rank, and a SIGKILL where it is asked.

Each rank saves model, optimizer, coupling and random numbers every third iteration, and keeps two
files. A start continues from the last iteration that all ranks have saved.
"""

import argparse
import os
import signal
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import mse_loss

from consensus import Coupling

STEPS, EVERY = 20, 3


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Dropout(0.2), nn.Tanh(), nn.Linear(16, 3)
    return nn.Sequential(*layers)


def saved_iteration(folder: Path, rank: int) -> int:
    """The last iteration after which all ranks have saved, or 0. A collective."""
    saved = [int(path.suffixes[0][1:]) for path in folder.glob(f"worker{rank}.*.pt")]
    last = torch.tensor(max(saved, default=0))
    dist.all_reduce(last, dist.ReduceOp.MIN)
    return int(last)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kill", type=int, help="the rank that dies")
    parser.add_argument("--at", type=int, help="the iteration at which it dies")
    options = parser.parse_args()
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    coupling = Coupling(model, optimizer, "tan", eta=0.1, pull=0.3, period=2, timeout_s=20.0)
    torch.manual_seed(rank)
    first = saved_iteration(options.folder, rank)
    if first:
        states = torch.load(options.folder / f"worker{rank}.{first}.pt")
        for part, state in zip((model, optimizer, coupling), states, strict=False):
            part.load_state_dict(state)
        torch.set_rng_state(states[3])
    print(f"rank {rank} continues from iteration {first}", flush=True)
    for t in range(first, STEPS):
        x = torch.randn(8, 6)
        optimizer.zero_grad()
        mse_loss(model(x), (1.0 + rank) * x[:, :3]).backward()
        if (options.kill, options.at) == (rank, t):
            os.kill(os.getpid(), signal.SIGKILL)
        optimizer.step()
        coupling.step()
        if (t + 1) % EVERY == 0:
            states = [part.state_dict() for part in (model, optimizer, coupling)]
            path = options.folder / f"worker{rank}.{t + 1}.pt"
            torch.save([*states, torch.get_rng_state()], path.with_suffix(".new"))
            path.with_suffix(".new").rename(path)
            (options.folder / f"worker{rank}.{t + 1 - 2 * EVERY}.pt").unlink(missing_ok=True)
    state = coupling.state_dict()
    result = {"u": state["u"], "z": state["z"], **model.state_dict()}
    torch.save(result, options.folder / f"result{rank}.pt")
    coupling.close()
    dist.destroy_process_group()
