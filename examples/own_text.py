"""Plugin of the trainer: a recurrent model of the characters of a text.

The text is a file, or the source of Python's standard library, of which every tenth module is for
tests. The second command trains eight workers with AdamW in half a minute on a CPU.

python -m consensus.train workers=4 'plugins=[own_text]' data=own_text data.root=my.txt \
    model=char_gru loss=token_cross_entropy
python -m consensus.train workers=8 'plugins=[own_text]' data=standard_library \
    model=char_gru loss=token_cross_entropy 'algorithm.optimizer={optimizer: AdamW, lr: 0.01}' \
    algorithm.pull=0.3 algorithm.outer=1 algorithm.batch_size=8 algorithm.iterations=300
"""

import argparse
from pathlib import Path

import torch
from torch import nn

from consensus import DATASETS, MODELS, Dataset, Samples


def windows(text: bytes, length: int, most: int) -> Samples:
    """At most this many windows, each with the characters that follow its own."""
    codes = torch.frombuffer(bytearray(text), dtype=torch.uint8).clamp(max=127).long()
    rows = codes.unfold(0, length + 1, length + 1)
    rows = rows[:: -(-len(rows) // most)]
    return Samples(rows[:, :-1], rows[:, 1:])


@DATASETS.register("own_text")
def own_text(root: str, length: int = 32) -> Dataset:
    samples = windows(Path(root).read_bytes(), length, 10**9)
    test = len(samples) // 10
    return Dataset(samples[test:], samples[:test], num_classes=128)


@DATASETS.register("standard_library")
def standard_library(length: int = 32, rows: int = 20_000) -> Dataset:
    modules = sorted(Path(argparse.__file__).parent.glob("*.py"))
    text = [module.read_bytes() for module in modules]
    train = windows(b"".join(text[i] for i in range(len(text)) if i % 10), length, rows)
    return Dataset(train, windows(b"".join(text[::10]), length, rows // 10), num_classes=128)


@MODELS.register("char_gru")
class CharGru(nn.Module):
    def __init__(self, num_classes: int, width: int = 64):
        super().__init__()
        self.embedding = nn.Embedding(num_classes, width)
        self.gru = nn.GRU(width, width, batch_first=True)
        self.out = nn.Linear(width, num_classes)

    def forward(self, tokens):  # (B, T) -> (B, T, classes)
        return self.out(self.gru(self.embedding(tokens))[0])
