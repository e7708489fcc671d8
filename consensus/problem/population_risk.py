"""The stochastic gradients of many configurations at once, in the way that is fastest here.

Data flow: `draw` asks the minibatches of each seed for indices, which go to memory on the device
that stays; `gradient` gathers the samples from there and passes them through the models, as many at
once as the way says. So `gradient` can be recorded as a CUDA graph, with `draw` outside of it.

# S configurations, A of them active, M workers each, B samples in a minibatch, n parameters
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from consensus.problem.batched import BatchedRisk, Convolutions
from consensus.problem.data import Dataset
from consensus.problem.minibatches import Minibatches
from consensus.problem.risk import MinibatchRisk, Risk
from consensus.problem.streams import stream_seed

WAYS = ("one_by_one", "grouped", "products")
"""Model by model; or many in one pass, their convolutions as grouped ones or as products.

States hold the place of a name: new ones go to the end.
"""

SIZES = (8, 32, 128, 512)
"""Models in one pass that `fastest_way` tries."""

Call = Callable[[], object]

LARGEST = 1 << 26
"""Coordinates of the models in one pass: above, nothing is left to gain."""


@dataclass(frozen=True)
class Way:
    """How the gradients of many models are computed.

    Attributes:
        name: Of WAYS.
        at_once: The number of models in one pass.
    """

    name: str = "one_by_one"
    at_once: int = 1

    def __post_init__(self) -> None:
        """Check the fields."""
        if self.name not in WAYS or self.at_once < 1:
            raise ValueError(f"{self} is no way; allowed: {', '.join(WAYS)}, at least 1 at once")

    def __str__(self) -> str:
        return self.name if self.name == "one_by_one" else f"{self.name}, {self.at_once} at once"


class PopulationRisk:
    """The gradients of the workers of many configurations: lines 4 and 5.

    Configurations with one seed draw the same minibatches, as separate runs do; once for all.

    Args:
        risk: What is minimized.
        dataset: Its training images are drawn from.
        seeds: Of the configurations. (S,)
        minibatches: One for each of the M workers, for each seed; one batch size for all.
        way: How; may be changed until `gradient` has been recorded. A model that draws random
            numbers goes one by one.

    Attributes:
        model_draws: Whether the model draws random numbers in a forward pass.
    """

    def __init__(
        self,
        risk: Risk,
        dataset: Dataset,
        seeds: Sequence[int],
        minibatches: Mapping[int, Sequence[Minibatches]],
        way: Way | None = None,
    ) -> None:
        self.seeds = tuple(seeds)
        self.sources = {seed: tuple(minibatches[seed]) for seed in dict.fromkeys(seeds)}
        every = [source for sources in self.sources.values() for source in sources]
        self._all = MinibatchRisk(risk, dataset, every)
        self.model_draws = self._all.model_draws
        self.risk = risk
        self.way = Way() if way is None else way
        self._risks: dict[str, Risk] = {"one_by_one": risk}
        self.select(torch.arange(len(self.seeds)))

    def select(self, active: Tensor) -> None:
        """Draw for these configurations from now on. (A,) int64."""
        self._own = [self.seeds[i] for i in active.tolist()]
        self._drawing = list(dict.fromkeys(self._own))
        device = self._all.dataset.train_images.device
        rows = [self._drawing.index(seed) for seed in self._own]
        self._rows = torch.tensor(rows, dtype=torch.int64, device=device)
        number = sum(len(self.sources[seed]) for seed in self._drawing)
        self._index = torch.zeros(number * self._all.batch_size, dtype=torch.int64, device=device)
        self._random: list[int] | None = None

    def draw(self) -> None:
        """Line 4: which samples each worker of the active configurations is to take next."""
        sources = [source for seed in self._drawing for source in self.sources[seed]]
        if not sources:
            return
        torch.cat([source.draw() for source in sources], out=self._index)
        if self.model_draws:
            self._random = [
                stream_seed(source.seed, "model", source.worker, source.position)
                for seed in self._own
                for source in self.sources[seed]
            ]

    def gradient(self, points: Tensor) -> Tensor:
        """Lines 4 and 5: the gradients (A M, n) at the points (A M, n), in their memory."""
        index = self._index.view(len(self._drawing), -1).index_select(0, self._rows)  # (A, M B)
        images, labels = self._all.gather(index.view(-1))
        if self.model_draws:
            return self.risk.gradient(points, images, labels, seeds=self._random, out=points)
        risk = self.risk_for(self.way.name)
        if self.way.name == "one_by_one":
            return risk.gradient(points, images, labels, out=points)
        parts = (torch.split(x, self.way.at_once) for x in (points, images, labels))
        for some, x, y in zip(*parts, strict=True):
            risk.gradient(some, x, y, out=some)
        return points

    def evaluate(self, points: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        """`Risk.evaluate` of several points. (A, n) -> float64 (A, 2)."""
        risk = self.risk_for("one_by_one" if self.model_draws else self.way.name)
        parts = torch.split(points, self.way.at_once)
        return torch.cat([risk.evaluate_each(some, images, labels) for some in parts])

    def risk_for(self, name: str) -> Risk:
        """The risk that computes in the way of that name."""
        if name not in self._risks:
            convolutions: Convolutions = "products" if name == "products" else "grouped"
            self._risks[name] = BatchedRisk(self.risk.model, self.risk.reduction, convolutions)
        return self._risks[name]

    def fastest_way(
        self,
        points: Tensor,
        names: Sequence[str] = WAYS,
        record: Callable[[Call], Call] | None = None,
    ) -> Way:
        """The way that takes least time for a model, measured on samples of the data.

        Two measurements need not find the same. Nothing is drawn.

        Args:
            points: Of all workers. (K, n)
            names: The ways that may be chosen.
            record: What `gradient` will be recorded with, if it will.

        Raises:
            ValueError: If none of them is possible, with what the first of them said: a model may
                do what `vmap` cannot, and the memory may be too small.
        """
        if self.model_draws or set(names) == {"one_by_one"}:
            return Way()
        number, data = len(points), self._all.dataset
        seconds: dict[Way, float] = {}
        said: list[str] = []
        for way in _candidates(number, points.shape[1], names):
            some = points[: max(way.at_once, min(number, SIZES[0]))]
            index = torch.arange(len(some) * self._all.batch_size, device=points.device)
            batch = self._all.gather(index.remainder_(len(data.train_labels)))
            risk = self.risk_for(way.name)
            try:
                limit = 3.0 * min(seconds.values(), default=float("inf")) * len(some)
                seconds[way] = _seconds_of(risk, some, *batch, limit, record) / len(some)
            except RuntimeError as error:  # out of memory, too
                said.append(str(error).strip().partition("\n")[0])
            if said and points.device.type == "cuda":
                torch.cuda.empty_cache()  # not where the error still holds on to tensors
        if not seconds:
            raise ValueError(said[0] if said else "the models are too large for it")
        return min(seconds, key=seconds.__getitem__)

    def state_dict(self) -> dict[str, Tensor]:
        """How many minibatches each worker of each seed has drawn (seeds, M), int64; and the way.

        A run that continues in another way continues to other last bits.
        """
        rows = [[source.position for source in sources] for sources in self.sources.values()]
        way = [WAYS.index(self.way.name), self.way.at_once]
        return {"position": torch.tensor(rows), "way": torch.tensor(way)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue after that many draws."""
        for sources, row in zip(self.sources.values(), state["position"].tolist(), strict=True):
            for source, position in zip(sources, row, strict=True):
                source.position = position
        name, at_once = state["way"].tolist()
        self.way = Way(WAYS[name], at_once)


def _candidates(number: int, n: int, names: Sequence[str]) -> list[Way]:
    """Ways for so many models of n coordinates."""
    sizes = [size for size in SIZES if size < number] + [min(number, SIZES[-1])]
    found = [Way()] if "one_by_one" in names else []  # works everywhere: sets a limit to the rest
    for name in (name for name in names if name != "one_by_one"):
        found += [Way(name, size) for size in sizes if size * n <= LARGEST]
    return found


def _seconds_of(
    risk: Risk,
    points: Tensor,
    images: Tensor,
    labels: Tensor,
    limit: float,
    record: Callable[[Call], Call] | None,
    times: int = 3,
) -> float:
    """The least time of some calls once libraries are set up; one call, if that is too long."""
    out = torch.empty_like(points)

    def call() -> None:
        risk.gradient(points, images, labels, out=out)

    def timed(call: Call) -> float:
        began = time.perf_counter()
        call()
        if points.device.type == "cuda":
            torch.cuda.synchronize(points.device)
        return time.perf_counter() - began

    timed(call)
    measured: Call = call
    if record is not None:
        timed(call)
        measured = record(call)
    least = timed(measured)
    if least > limit:
        return least
    return min(least, *(timed(measured) for _ in range(times - 1)))
