"""Character GPT on the source text of Python's standard library, with consensus or with DDP.

    torchrun --standalone --nproc-per-node=4 examples/char_gpt.py [--ddp]

Both see the same samples. Consensus sums the parameters once in 16 steps, DDP sums the gradients
in each. The script prints the loss on held-out text and the bytes of these sums.
"""

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from consensus import Coupling

SIZES = {"steps": 2400, "batch": 8, "context": 32, "width": 48, "period": 16, "every": 240}
RATES = {"lr": 0.02, "pull": 1.0, "outer": 0.7, "momentum": 0.6, "seed": 0}


class GPT(nn.Module):
    def __init__(self, width, context):
        super().__init__()
        self.token, self.place = nn.Embedding(128, width), nn.Embedding(context, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, "gelu", 1e-5, True, True)
        self.blocks = nn.TransformerEncoder(layer, 2, nn.LayerNorm(width), False)
        self.out = nn.Linear(width, 128)

    def forward(self, window):  # (B, context + 1); the loss of predicting each next character
        mask = nn.Transformer.generate_square_subsequent_mask(window.shape[1] - 1)
        x = self.blocks(self.token(window[:, :-1]) + self.place.weight, mask, is_causal=True)
        return nn.functional.cross_entropy(self.out(x).flatten(0, 1), window[:, 1:].flatten())


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ddp", action="store_true", help="DistributedDataParallel instead")
    for name, value in (SIZES | RATES).items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    o = parser.parse_args(arguments)
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    source = b"".join(map(Path.read_bytes, sorted(Path(argparse.__file__).parent.glob("*.py"))))
    text = torch.frombuffer(bytearray(source), dtype=torch.uint8).clamp(max=127).long()
    test, train = text.unfold(0, o.context + 1, 1).tensor_split([len(text) // 10])  # windows
    torch.manual_seed(o.seed)  # equal weights at the start
    model = GPT(o.width, o.context)
    torch.manual_seed(1000 * o.seed + dist.get_rank())  # own samples
    optimizer = torch.optim.AdamW(model.parameters(), o.lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, o.lr, o.steps)
    if o.ddp:
        run = nn.parallel.DistributedDataParallel(model)
    else:  # outer steps as in DiLoCo
        run, outer = model, lambda u: torch.optim.SGD(u, o.outer, o.momentum, nesterov=True)
        coupling = Coupling(model, optimizer, pull=o.pull, outer=outer, period=o.period)
    losses, size = [], sum(parameter.nbytes for parameter in model.parameters()) / 1e6
    for t in range(1, o.steps + 1):
        run(train[torch.randint(len(train), (o.batch,))]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if not o.ddp:
            coupling.step()
        if t % o.every == 0:
            u = model.state_dict() if o.ddp else coupling.consensus_state_dict()
            losses.append(torch.func.functional_call(model, u, test[:: len(test) // 256]).item())
            sums = t if o.ddp else coupling.stats()["communications"]
            if dist.get_rank() == 0:
                print(f"step {t}  loss {losses[-1]:.4f}  {sums * size:.1f} MB", flush=True)
    if not o.ddp:
        coupling.close()
    return losses, u


if __name__ == "__main__":
    main()
    dist.destroy_process_group()
