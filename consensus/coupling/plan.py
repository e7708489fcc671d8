"""The division of a model into parts, before any communication.

A part has one `pull` and one time of communication: the parameter groups of the optimizer may have
a `pull` of their own, and with fragments the layers communicate at staggered times (streaming
DiLoCo, Douillard et al. 2025). Most models are one part.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from consensus.core.flat import FlatLayout, local
from consensus.core.kernels.pulls import Pull, choose_pull
from consensus.core.layerwise import Layerwise
from consensus.core.parameters import FlatParameters
from consensus.core.profile_checks import mistake_of
from consensus.core.sharded import ShardedLayerwise, Shards
from consensus.coupling.settings import Settings, check_rate
from consensus.server import digest


class Plan:
    """Parameters, potential and strengths of a part, with its z_j.

    Args:
        parameters: Its parameters.
        phi: Its potential, layer by layer.
        settings: Those of the model.
        pull: Its own.
        offset: It communicates in calls that are `offset` modulo the period.

    Raises:
        ValueError: If the settings do not fit the potential.
    """

    def __init__(
        self,
        parameters: FlatParameters,
        phi: Layerwise,
        settings: Settings,
        pull: float,
        offset: int,
    ) -> None:
        vector = parameters.vector()
        self.parameters, self.settings = parameters, settings
        self.pull, self.offset = pull, offset
        self.phi = phi.to(vector)
        self.z = vector.unsqueeze(0)  # (1, n): a block of one worker
        self.puller: Pull = choose_pull(self.phi, self.z, pull, settings.implicit)


def make_plans(
    model: nn.Module,
    optimizer: Optimizer,
    settings: Settings,
    layers: Sequence[Sequence[str]] | None,
    shards: Shards | None,
) -> list[Plan]:
    """The parts of a model, in the same order on all ranks; a ValueError if there are none such.

    The division is that of the whole parameters, also where a process has `shards` of them.
    """
    layout = FlatLayout.trainable(model, layers)
    potential = settings.make_potential()
    if mistake := mistake_of(potential.profile):
        raise ValueError(f"{potential.label}: {mistake}")
    phi = Layerwise(potential, layout.layers, settings.eta)
    fragments = _fragments(layout, settings.fragments, settings.period)
    pulls = _pulls(model, optimizer, layout, settings.pull)
    keys = list(zip(fragments, pulls, strict=True))
    plans = []
    for fragment, pull in sorted(set(keys)):
        chosen = [i for i, key in enumerate(keys) if key == (fragment, pull)]
        parameters = FlatParameters(model, layout.select(chosen))
        own = phi.select(chosen)
        if shards is not None:
            own = ShardedLayerwise(own, parameters.layout.layers, shards)
        offset = fragment * settings.period // settings.fragments
        plans.append(Plan(parameters, own, settings, pull, offset))
    return plans


def describe(model: nn.Module, plans: list[Plan], buffers: list[Tensor]) -> dict[str, Any]:
    """Values to compare between processes."""
    frozen = [
        f"{name}, digest {int(digest(local(own).detach().double().reshape(-1))):x}"
        for name, own in model.named_parameters()
        if not own.requires_grad
    ]
    parameters = [plan.parameters for plan in plans]
    named = [
        f"{name} {tuple(own.shape)} {own.dtype}"
        for p in parameters
        for name, own in zip(p.layout.parameter_names, p.originals, strict=True)
    ]
    return {
        "parameters": named,
        "layers": [(p.layout, str(p.dtype)) for p in parameters],
        "pull": [plan.pull for plan in plans],
        "shapes of buffers": [str(tuple(buffer.shape)) for buffer in buffers],
        "weights": int(digest(torch.cat([plan.z[0] for plan in plans]))),
        "frozen weights": frozen,
    }


def identity(settings: Settings, plans: list[Plan]) -> dict[str, Any]:
    """Values that a coupling must share with a state in order to continue from it."""
    phi = settings.make_potential()
    return {
        "potential": phi.name or type(phi).__name__,
        "options": str(dict(settings.options or {})),
        "eta": float(settings.eta),
        "parameters": [list(plan.parameters.layout.parameter_names) for plan in plans],
    }


def _fragments(layout: FlatLayout, fragments: int, period: int) -> list[int]:
    """The fragment of each layer: the largest layers first, each to the smallest fragment."""
    most = min(period, len(layout.layers))
    if fragments > most:
        raise ValueError(
            f"`fragments` is {fragments}; allowed: 1 to {most}, "
            f"with {len(layout.layers)} layers and a period of {period}"
        )
    lengths = [stop - start for start, stop in layout.layers]
    sizes, chosen = [0] * fragments, [0] * len(lengths)
    for layer in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        smallest = sizes.index(min(sizes))
        chosen[layer] = smallest
        sizes[smallest] += lengths[layer]
    return chosen


def _pulls(
    model: nn.Module, optimizer: Optimizer, layout: FlatLayout, default: float
) -> list[float]:
    """The pull of each layer: `pull` of its parameter group, or the default."""
    of_parameter: dict[int, float] = {}
    for number, group in enumerate(optimizer.param_groups):
        pull = group.get("pull", default)
        check_rate(f"`pull` of parameter group {number}", pull)
        of_parameter |= {id(parameter): pull for parameter in group["params"]}
    found: list[set[float]] = [set() for _ in layout.layers]
    for layer, names in zip(found, layout.names_by_layer(), strict=True):
        layer |= {of_parameter.get(id(model.get_parameter(name)), default) for name in names}
    for name, layer in zip(layout.layer_names, found, strict=True):
        if len(layer) > 1:
            raise ValueError(
                f"layer `{name}` has the pulls {', '.join(map(str, sorted(layer)))} from several "
                "parameter groups; allowed: one in a layer, see `layers`"
            )
    return [layer.pop() for layer in found]
