"""Plugin of the trainer: a recurrent model of the characters of a text file.

python -m consensus.train workers=4 'plugins=[own_text]' data=own_text data.root=my.txt \
    model=char_gru loss=token_cross_entropy
"""

from pathlib import Path

import torch
from torch import nn

from consensus import DATASETS, MODELS, Dataset, Samples


@DATASETS.register("own_text")
def own_text(root: str, length: int = 32) -> Dataset:
    codes = torch.tensor(list(Path(root).read_bytes())).clamp(max=127)
    rows = codes[: len(codes) // (length + 1) * (length + 1)].view(-1, length + 1)
    samples, test = Samples(rows[:, :-1], rows[:, 1:]), len(rows) // 10
    return Dataset(samples[test:], samples[:test], num_classes=128)


@MODELS.register("char_gru")
class CharGru(nn.Module):
    def __init__(self, num_classes: int, width: int = 64):
        super().__init__()
        self.embedding = nn.Embedding(num_classes, width)
        self.gru = nn.GRU(width, width, batch_first=True)
        self.out = nn.Linear(width, num_classes)

    def forward(self, tokens):  # (B, T) -> (B, T, classes)
        return self.out(self.gru(self.embedding(tokens))[0])
