"""CNN with BatchNorm on images of gratings, with a checkpoint of each worker.

    torchrun --standalone --nproc-per-node=4 examples/batchnorm_cnn.py --folder runs/batchnorm

A second start continues from the checkpoint. The class of an image is the direction of its grating.
`buffers="mean"` averages BatchNorm's statistics. The model is evaluated inside `consensus()`, as u.
"""

import argparse
import math
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy

from consensus import Coupling

CLASSES, SIDE = 6, 12


def images(count, seed):
    """Gratings in noise with random wavelengths and phases, (B, 1, SIDE, SIDE), and classes."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=random)
    angle = labels[:, None, None] * math.pi / CLASSES
    rate, phase = 0.8 + torch.rand(2, count, 1, 1, generator=random)
    row, column = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    wave = (rate * (angle.cos() * row + angle.sin() * column) + 2 * math.pi * phase).sin()
    return (wave + torch.randn(count, SIDE, SIDE, generator=random))[:, None], labels


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/batchnorm_cnn"))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--every", type=int, default=50, help="steps between two checkpoints")
    o = parser.parse_args(arguments)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 16, 5), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(16 * 16, CLASSES)),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    coupling = Coupling(model, optimizer, "tan", period=5, buffers="mean")
    parts, first, losses = (model, optimizer, coupling), 0, []
    path = o.folder / f"worker{rank}.pt"  # each worker has its own copy, and its own checkpoint
    if path.exists():
        states, first = torch.load(path)
        for part, state in zip(parts, states, strict=True):
            part.load_state_dict(state)
    x_test, y_test = images(500, seed=2**31)
    for t in range(first, o.steps):
        x, y = images(32, seed=t * dist.get_world_size() + rank)
        cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        coupling.step()
        if (t + 1) % o.every == 0:
            model.eval()
            with coupling.consensus(), torch.no_grad():
                out = model(x_test)
            model.train()
            losses.append(cross_entropy(out, y_test).item())
            if rank == 0:
                accuracy = (out.argmax(1) == y_test).float().mean()
                print(f"step {t + 1}  loss {losses[-1]:.4f}  accuracy {accuracy:.3f}", flush=True)
            o.folder.mkdir(parents=True, exist_ok=True)
            torch.save(([part.state_dict() for part in parts], t + 1), path)
    coupling.close()
    dist.destroy_process_group()
    return losses, coupling.consensus_state_dict()


if __name__ == "__main__":
    main()
