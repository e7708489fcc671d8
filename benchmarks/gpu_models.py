"""The overhead of the coupling on large models: part of benchmarks/gpu.py.

One worker with a model as large as ResNet-50 or GPT-2 small: its step without coupling, and with
quad and tan. In float32 with torch's defaults: in lower precision the gradients take less time, and
the coupling a larger share of it. Then the loop of a user with Nesterov SGD, alone and with
`Coupling`, with parameters in float32 and in bfloat16 (u and z are in float32 in both).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu

from benchmarks.harness import (
    KAPPA,
    LAM,
    NU,
    SIGMA,
    TAU,
    Effort,
    counted,
    median_ms,
    require_finite,
    table,
)
from consensus import POTENTIALS, Coupling, Layerwise
from consensus.algorithm import Algorithm, Consensus, Msgd
from consensus.comm import Solo
from consensus.problem import Batch, Risk
from consensus.server import Server
from consensus.worker import Worker

COLUMNS = {
    "model": "<9", "parameters": ">12,", "layers": ">7", "dtype": "<9", "method": "<14",
    "ms": ">9.2f", "/ first": ">8.3f",
}  # fmt: skip


class Gpt(nn.Module):
    """GPT-2 small, with an output matrix of its own and half the vocabulary.

    GPT-2 ties its output to its embedding, and equation (18) needs each parameter in exactly one
    layer. Two matrices for 25,152 tokens are as large as one for GPT-2's 50,257.

    Args:
        vocabulary: Number of tokens.
        context: T, the longest sequence.
        width: d.
        heads: Of each block.
        depth: Number of blocks.
    """

    def __init__(
        self,
        vocabulary: int = 25_152,
        context: int = 1024,
        width: int = 768,
        heads: int = 12,
        depth: int = 12,
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        block = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.0, activation=partial(gelu, approximate="tanh"),
            batch_first=True, norm_first=True,
        )  # fmt: skip
        norm = nn.LayerNorm(width)
        self.blocks = nn.TransformerEncoder(block, depth, norm, enable_nested_tensor=False)
        self.output = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B T, vocabulary) of the next tokens after tokens (B, T) int64."""
        length = tokens.shape[1]
        x = self.tokens(tokens) + self.positions(torch.arange(length, device=tokens.device))
        mask = nn.Transformer.generate_square_subsequent_mask(length, tokens.device)
        logits: Tensor = self.output(self.blocks(x, mask, is_causal=True)).flatten(0, 1)
        return logits


@dataclass
class Workload:
    """A model and random minibatches for it.

    Attributes:
        model: Maps inputs[i] to logits, one row for each label.
        inputs: (P, B, ...)
        labels: (P, number of rows) int64
    """

    model: nn.Module
    inputs: Tensor
    labels: Tensor

    def to(self, dtype: torch.dtype) -> "Workload":
        """With parameters, and inputs that are no tokens, of a type."""
        real = self.inputs.is_floating_point()
        inputs = self.inputs.to(dtype) if real else self.inputs
        return Workload(self.model.to(dtype), inputs, self.labels)


def resnet50(device: torch.device, quick: bool) -> Workload:
    """32 images of 224 x 224; quick: a small model of the same kind, for a test.

    ResNet-50 has GroupNorm in place of BatchNorm, so that a worker's state is its parameters alone.
    """
    from torchvision.models.resnet import Bottleneck, ResNet

    blocks, batch, side, classes = ([1] * 4, 2, 32, 10) if quick else ([3, 4, 6, 3], 32, 224, 1000)
    norm = partial(nn.GroupNorm, 32)
    model = ResNet(Bottleneck, blocks, num_classes=classes, norm_layer=norm).to(device)
    images = torch.rand(2, batch, 3, side, side, device=device)
    return Workload(model, images, torch.randint(classes, (2, batch), device=device))


def gpt2(device: torch.device, quick: bool) -> Workload:
    """8 sequences of 1,024 tokens; quick: a small model of the same kind, for a test."""
    model = Gpt(vocabulary=64, context=16, width=32, heads=4, depth=2) if quick else Gpt()
    batch, context = (2, 16) if quick else (8, 1024)
    text = torch.randint(model.tokens.num_embeddings, (2, batch, context + 1), device=device)
    return Workload(model.to(device), text[..., :-1], text[..., 1:].flatten(1))


MODELS: dict[str, Callable[[torch.device, bool], Workload]] = {"resnet50": resnet50, "gpt2": gpt2}
"""By the name on the command line."""


class ResidentBatches:
    """The oracle of one worker that cycles through minibatches on the device."""

    def __init__(self, workload: Workload) -> None:
        self.risk = Risk(workload.model, "mean")
        self.workload = workload
        self.position = 0

    def draw(self) -> Batch:
        """Inputs (1, B, ...) and labels (1, rows)."""
        i = self.position % len(self.workload.inputs)
        self.position += 1
        return self.workload.inputs[i : i + 1], self.workload.labels[i : i + 1]

    def gradient(self, points: Tensor, batch: Batch) -> Tensor:
        """(1, n) -> (1, n), in the same memory."""
        return self.risk.gradient(points, *batch, out=points)

    def state_dict(self) -> dict[str, Tensor]:
        """The `position`. (1,)."""
        return {"position": torch.tensor([self.position])}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue after that many draws."""
        self.position = int(state["position"])


def one_worker(workload: Workload, potential: str | None) -> Algorithm:
    """Algorithm 1 with one worker; without a potential, the same worker without coupling."""
    oracle = ResidentBatches(workload)
    layout = oracle.risk.layout
    u = layout.flatten(workload.model)
    phi = Layerwise(POTENTIALS[potential or "quad"], layout.layers)
    worker = Worker(u.unsqueeze(0), oracle, phi, kappa=KAPPA, nu=NU)
    group = Solo(u.device)
    if potential is None:
        return Msgd(worker, group, sigma=SIGMA)
    return Consensus(Server(u, phi, group), worker, tau=TAU, sigma=SIGMA, lam=LAM)


class UserLoop:
    """A plain PyTorch loop, with `Coupling` if there is a potential."""

    def __init__(self, workload: Workload, potential: str | None) -> None:
        self.workload, self.model = workload, workload.model
        parameters = self.model.parameters()
        self.optimizer = torch.optim.SGD(parameters, SIGMA, momentum=KAPPA, nesterov=True)
        self.coupling = None
        if potential is not None:
            self.coupling = Coupling(self.model, self.optimizer, potential)

    def step(self, t: int) -> None:
        """One iteration; no wait for the device."""
        i = t % len(self.workload.inputs)
        self.optimizer.zero_grad()
        logits = self.model(self.workload.inputs[i])
        cross_entropy(logits.float(), self.workload.labels[i]).backward()
        self.optimizer.step()
        if self.coupling is not None:
            self.coupling.step()


@dataclass
class ModelRow:
    """The step of one worker with a large model; the ratio is that to the first of its kind."""

    model: str
    parameters: int
    layers: int
    dtype: str
    method: str
    ms: float
    ratio: float


def model_rows(device: torch.device, name: str, quick: bool, effort: Effort) -> list[ModelRow]:
    """By Algorithm 1 and in a loop of a user, each without coupling, then with."""
    workload = MODELS[name](device, quick)
    rows: list[ModelRow] = []
    for potential in (None, "quad", "tan"):
        algorithm = one_worker(workload, potential)
        ms = median_ms(counted(algorithm.step), device, effort)
        require_finite(algorithm)
        n, layers = algorithm.u.numel(), len(algorithm.phi.layers)
        first = rows[0].ms if rows else ms
        rows.append(ModelRow(name, n, layers, "float32", potential or "local", ms, ms / first))
    del algorithm
    for dtype in (torch.float32, torch.bfloat16):
        first = 0.0
        for potential in (None, "quad", "tan"):
            loop = UserLoop(MODELS[name](device, quick).to(dtype), potential)
            ms = median_ms(counted(loop.step), device, effort)
            finite = all(bool(p.isfinite().all()) for p in loop.model.parameters())
            assert finite, f"{name} in {dtype} with {potential}"
            first, method = first or ms, f"Coupling {potential}" if potential else "loop"
            kind = str(dtype).removeprefix("torch.")
            rows.append(ModelRow(name, n, layers, kind, method, ms, ms / first))
            del loop
    return rows


def show(rows: list[ModelRow]) -> None:
    """Print the table."""
    cells = [(r.model, r.parameters, r.layers, r.dtype, r.method, r.ms, r.ratio) for r in rows]
    print("\n" + table(COLUMNS, cells))
