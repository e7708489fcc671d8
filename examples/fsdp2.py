"""Two workers of two processes each: FSDP2 inside a worker, Coupling between the workers.

    torchrun --standalone --nproc-per-node=4 examples/fsdp2.py --output runs/examples

A worker has the parameters, gradients and optimizer state of one copy in shards; u is sharded
alike. Each process sees a quarter of a sine; u learns all of it. `--device cuda` is for four GPUs.
The script prints the loss of u and writes u as a plain state_dict, `fsdp2.pt`.
"""

import argparse
import os
from pathlib import Path

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from consensus import Coupling


def network(width):
    torch.manual_seed(0)  # equal weights at the start
    hidden = [nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(2)]
    return nn.Sequential(nn.Linear(1, width), nn.Tanh(), *hidden, nn.Linear(width, 1))


def batch(process, size, generator, device):
    """Points of a part of [-1, 1] that only this process sees."""
    x = 0.5 * (torch.rand(size, 1, generator=generator) + process) - 1.0
    return x.to(device), torch.sin(3.0 * x).to(device)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/examples"))
    parser.add_argument("--iterations", type=int, default=400)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args(arguments)
    device = options.device
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    mesh = init_device_mesh(device, (2, 2), mesh_dim_names=("worker", "shard"))
    model = network(options.width).to(device)
    for block in model[2:4]:
        fully_shard(block, mesh=mesh["shard"])
    fully_shard(model, mesh=mesh["shard"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    coupling = Coupling(model, optimizer, "tan", period=8, pull=0.3, group=mesh["worker"])
    generator = torch.Generator().manual_seed(dist.get_rank())
    for _ in range(options.iterations):
        x, y = batch(dist.get_rank(), 32, generator, device)
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        coupling.step()
    x = torch.linspace(-1.0, 1.0, 201, device=device).unsqueeze(1)
    with coupling.consensus(), torch.no_grad():
        loss = float(nn.functional.mse_loss(model(x), torch.sin(3.0 * x)))
    # All processes of a worker gather; rank 0 writes.
    u = {name: own.full_tensor().cpu() for name, own in coupling.consensus_state_dict().items()}
    coupling.close()
    if dist.get_rank() == 0:
        print(f"loss of u {loss:.2e} after {options.iterations} iterations")
        options.output.mkdir(parents=True, exist_ok=True)
        torch.save(u, options.output / "fsdp2.pt")
    return loss


if __name__ == "__main__":
    main()
    dist.destroy_process_group()
