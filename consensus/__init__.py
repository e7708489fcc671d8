"""Consensus training: M workers, one model, and a Legendre potential that couples them."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from consensus.core.layerwise import Layerwise
    from consensus.core.potentials import POTENTIALS, Potential
    from consensus.core.profiles import Profile
    from consensus.core.schedules import SCHEDULES
    from consensus.core.sizes import Radial, Separable
    from consensus.coupling import Coupling
    from consensus.problem import DATASETS, MODELS, PARTITIONS, Dataset
    from consensus.records import Row
    from consensus.run.checks import ConfigError
    from consensus.run.config import Config
    from consensus.run.sinks import SINKS, RunInfo, Sink

    __version__: str

__all__ = [
    "DATASETS",
    "MODELS",
    "PARTITIONS",
    "POTENTIALS",
    "SCHEDULES",
    "SINKS",
    "Config",
    "ConfigError",
    "Coupling",
    "Dataset",
    "Layerwise",
    "Potential",
    "Profile",
    "Radial",
    "Row",
    "RunInfo",
    "Separable",
    "Sink",
    "__version__",
]

# Names are imported when they are used: torch takes seconds, in which a command could not answer
# a signal.
_HOMES = {
    "DATASETS": "consensus.problem",
    "MODELS": "consensus.problem",
    "PARTITIONS": "consensus.problem",
    "POTENTIALS": "consensus.core.potentials",
    "SCHEDULES": "consensus.core.schedules",
    "SINKS": "consensus.run.sinks",
    "Config": "consensus.run.config",
    "ConfigError": "consensus.run.checks",
    "Coupling": "consensus.coupling",
    "Dataset": "consensus.problem",
    "Layerwise": "consensus.core.layerwise",
    "Potential": "consensus.core.potentials",
    "Profile": "consensus.core.profiles",
    "Radial": "consensus.core.sizes",
    "Row": "consensus.records",
    "RunInfo": "consensus.run.sinks",
    "Separable": "consensus.core.sizes",
    "Sink": "consensus.run.sinks",
}

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """A public name, imported at its first use."""
        from importlib import import_module

        if name == "__version__":
            value = _version()
        elif name in _HOMES:
            value = getattr(import_module(_HOMES[name]), name)
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("consensus-training")
    except PackageNotFoundError:  # a checkout that is not installed
        return "0+unknown"
