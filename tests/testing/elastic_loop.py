"""A training loop of a user with ElasticCoupling, which notes who took part in each call.

The data of worker j in iteration t follow from (j, t). A process kills itself or leaves where it is
asked to, before its optimizer step in an iteration.
"""

import argparse
import json
import os
import signal
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from consensus import ElasticCoupling
from consensus.server import digest

LR = 0.02


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(6, 3).double()


def samples(j: int, t: int) -> tuple[Tensor, Tensor]:
    """Inputs (8, 6) and targets (8, 3)."""
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(1000 * j + t)).double()
    return x, (1.0 + j) * x[:, :3]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("settings", type=json.loads, help="arguments of ElasticCoupling")
    parser.add_argument("--steps", type=int, default=100000)
    parser.add_argument("--lr", type=float, default=LR)
    parser.add_argument("--kill", type=int, default=-1, help="the iteration before which to die")
    parser.add_argument("--leave", type=int, default=-1)
    parser.add_argument("--pause", type=float, default=0.0)
    options = parser.parse_args()
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=options.lr)
    coupling = ElasticCoupling(model, optimizer, timeout_s=60.0, **options.settings)
    first, rows = coupling.calls, []
    t = first
    while t < options.steps:
        x, y = samples(coupling.number, t)
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        if t == options.kill:
            note(coupling, first, rows)
            os.kill(os.getpid(), signal.SIGKILL)
        if t == options.leave:
            note(coupling, first, rows)
            coupling.leave()
            return
        optimizer.step()
        coupling.step()
        t += 1
        state = coupling.state_dict()
        rows.append([t, coupling.numbers, state["u"].tolist(), int(digest(state["u"]))])
        time.sleep(options.pause)
    note(coupling, first, rows)
    coupling.close()


def note(coupling: ElasticCoupling, first: int, rows: list) -> None:
    """Write what this process has seen: its number, first iteration, and a row for each call."""
    content = {"number": coupling.number, "first": first, "rows": rows}
    Path(f"seen{os.getpid()}.json").write_text(json.dumps(content))
