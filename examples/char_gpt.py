"""Character GPT on the source text of Python's standard library, with consensus or with DDP.

    torchrun --standalone --nproc-per-node=4 examples/char_gpt.py
    torchrun --standalone --nproc-per-node=4 examples/char_gpt.py --ddp

Both see the same samples. Consensus sums the parameters once in 16 steps, DDP sums the gradients
in each. The script prints the bytes of these sums and the loss on held-out text.
"""

import argparse
import contextlib
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy

from consensus import Coupling

SIZES = {"steps": 800, "batch": 8, "context": 32, "width": 48, "period": 16, "every": 80}


class GPT(nn.Module):
    def __init__(self, width, context):
        super().__init__()
        self.token, self.place = nn.Embedding(128, width), nn.Embedding(context, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, "gelu", 1e-5, True, True)
        self.blocks = nn.TransformerEncoder(layer, 2, nn.LayerNorm(width), False)
        self.out = nn.Linear(width, 128)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(context))

    def forward(
        self, window
    ):  # the loss of predicting each next character; window (B, context + 1)
        x = self.token(window[:, :-1]) + self.place.weight
        x = self.out(self.blocks(x, mask=self.mask, is_causal=True))
        return cross_entropy(x.flatten(0, 1), window[:, 1:].flatten())


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ddp", action="store_true", help="DistributedDataParallel instead")
    for name, value in (SIZES | {"seed": 0, "lr": 3e-3, "pull": 1.0}).items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    o = parser.parse_args(arguments)
    dist.init_process_group("gloo")
    source = b"".join(map(Path.read_bytes, sorted(Path(os.__file__).parent.glob("*.py"))))
    text = torch.frombuffer(bytearray(source), dtype=torch.uint8).clamp(max=127).long()
    test, train = text.tensor_split([len(text) // 10])

    def draw(text, size, random):
        starts = torch.randint(len(text) - o.context, (size, 1), generator=random)
        return text[starts + torch.arange(o.context + 1)]

    torch.manual_seed(o.seed)
    model = GPT(o.width, o.context)
    optimizer = torch.optim.AdamW(model.parameters(), o.lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, o.lr, o.steps)
    coupling = None if o.ddp else Coupling(model, optimizer, pull=o.pull, period=o.period)
    run = nn.parallel.DistributedDataParallel(model) if o.ddp else model
    random, losses = torch.Generator().manual_seed(1000 * o.seed + dist.get_rank()), []
    held_out = draw(test, 256, torch.Generator().manual_seed(0))
    size = sum(parameter.nbytes for parameter in model.parameters()) / 1e6
    for t in range(1, o.steps + 1):
        run(draw(train, o.batch, random)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if coupling:
            coupling.step()
        if t % o.every == 0:
            with coupling.consensus() if coupling else contextlib.nullcontext(), torch.no_grad():
                losses.append(model(held_out).item())
            sums = coupling.stats()["communications"] if coupling else t
            if dist.get_rank() == 0:
                print(f"step {t}  loss {losses[-1]:.4f}  {sums * size:.1f} MB", flush=True)
    if not coupling:
        return losses, model.state_dict()
    coupling.close()
    return losses, coupling.consensus_state_dict()


if __name__ == "__main__":
    main()
    dist.destroy_process_group()
