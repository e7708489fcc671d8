"""The stochastic gradients of many configurations at once.

Data flow: `draw` copies the indices of the next minibatches to static memory on the device.
`gradient` gathers the samples by these indices and evaluates `Way.at_once` models per pass. A CUDA
graph can therefore record `gradient`; `draw` stays outside.

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
"""One model per pass; or many, with grouped convolutions or with convolutions as matrix products.

Checkpoints hold the index of a name: append new names.
"""

SIZES = (8, 32, 128, 512)
"""The numbers of models per pass that `fastest_way` measures."""

Call = Callable[[], object]

LARGEST = 1 << 26
"""The number of coordinates in one pass at most. Larger passes are no faster."""


@dataclass(frozen=True)
class Way:
    """A method of computing the gradients of many models.

    Attributes:
        name: An entry of WAYS.
        at_once: The number of models per pass.
    """

    name: str = "one_by_one"
    at_once: int = 1

    def __post_init__(self) -> None:
        """Check the fields."""
        if self.name not in WAYS or self.at_once < 1:
            raise ValueError(
                f"`name` is {self.name} and `at_once` is {self.at_once}; allowed: "
                f"{', '.join(WAYS)}, and a number >= 1"
            )

    def __str__(self) -> str:
        return self.name if self.name == "one_by_one" else f"{self.name}, {self.at_once} at once"


class PopulationRisk:
    """The gradients of the workers of many configurations: lines 4 and 5.

    Configurations with the same seed share their minibatches, which equal those of separate runs.

    Args:
        risk: The loss.
        dataset: Contains the training images.
        seeds: The seed of each configuration. (S,)
        minibatches: For each seed, the sources of the M workers; one batch size for all.
        way: The method; may be changed until `gradient` is recorded. Models that draw random
            numbers are always evaluated one by one.

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
        """Set the active configurations. (A,) int64."""
        self._own = [self.seeds[i] for i in active.tolist()]
        self._drawing = list(dict.fromkeys(self._own))
        device = self._all.dataset.train_images.device
        rows = [self._drawing.index(seed) for seed in self._own]
        self._rows = torch.tensor(rows, dtype=torch.int64, device=device)
        number = sum(len(self.sources[seed]) for seed in self._drawing)
        self._index = torch.zeros(number * self._all.batch_size, dtype=torch.int64, device=device)
        self._random: list[int] | None = None

    def draw(self) -> None:
        """Line 4: draw the next minibatch of every worker of the active configurations."""
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
        """Line 5, (16): the gradients (A M, n) at the points (A M, n), which they overwrite."""
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
        """`Risk.evaluate` at several points. (A, n) -> float64 (A, 2)."""
        risk = self.risk_for("one_by_one" if self.model_draws else self.way.name)
        parts = torch.split(points, self.way.at_once)
        return torch.cat([risk.evaluate_each(some, images, labels) for some in parts])

    def risk_for(self, name: str) -> Risk:
        """The risk that implements the method of that name."""
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
        """Measure the methods on samples of the data, and return the fastest per model.

        Repeated measurements may differ. No minibatch is drawn.

        Args:
            points: The points of all workers. (K, n)
            names: The candidates.
            record: The function that will record `gradient`, if any.

        Raises:
            ValueError: If all candidates fail, with the error of the first: `vmap` may not support
                the model, or the memory may be too small.
        """
        if self.model_draws or set(names) == {"one_by_one"}:
            return Way()
        number, data = len(points), self._all.dataset
        seconds: dict[Way, float] = {}
        errors: list[str] = []
        for way in _candidates(number, points.shape[1], names):
            some = points[: max(way.at_once, min(number, SIZES[0]))]
            index = torch.arange(len(some) * self._all.batch_size, device=points.device)
            batch = self._all.gather(index.remainder_(len(data.train_labels)))
            risk = self.risk_for(way.name)
            try:
                limit = 3.0 * min(seconds.values(), default=float("inf")) * len(some)
                seconds[way] = _seconds_of(risk, some, *batch, limit, record) / len(some)
            except RuntimeError as error:  # includes out of memory
                errors.append(str(error).strip().partition("\n")[0])
            if errors and points.device.type == "cuda":
                torch.cuda.empty_cache()  # not inside `except`, where the traceback holds tensors
        if not seconds:
            raise ValueError(errors[0] if errors else "the models are too large")
        return min(seconds, key=seconds.__getitem__)

    def state_dict(self) -> dict[str, Tensor]:
        """The number of draws of each worker and seed, (seeds, M) int64; and the method.

        The method is part of the state because another one gives other last bits.
        """
        rows = [[source.position for source in sources] for sources in self.sources.values()]
        way = [WAYS.index(self.way.name), self.way.at_once]
        return {"position": torch.tensor(rows), "way": torch.tensor(way)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the positions and the method."""
        for sources, row in zip(self.sources.values(), state["position"].tolist(), strict=True):
            for source, position in zip(sources, row, strict=True):
                source.position = position
        name, at_once = state["way"].tolist()
        self.way = Way(WAYS[name], at_once)


def _candidates(number: int, n: int, names: Sequence[str]) -> list[Way]:
    """The methods to measure for `number` models of n coordinates."""
    sizes = [size for size in SIZES if size < number] + [min(number, SIZES[-1])]
    found = [Way()] if "one_by_one" in names else []  # first: it sets the time limit of the rest
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
    """The least time of several calls after a warm-up; of one call, if it exceeds the limit."""
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
