"""Consensus training: M workers, one model, and a Legendre potential that couples them.

Train as on the command line, from Python:

    import consensus

    result = consensus.train("experiment=digits", "workers=4", "algorithm.lam=0.05")
    result.best, result.rows, result.model

    train       overrides KEY=VALUE, or a Config -> Result
    load        the directory of a finished run -> Result
    compose     overrides -> Config, to look at, change and pass to `train`

Couple the models of a training loop of your own, one call per iteration:

    coupling = consensus.Coupling(model, optimizer, potential="tan")

Tables of names -> entries, as the configuration uses them. `TABLE[name]` is an entry with its
default options, `TABLE.make(name, option=value)` one with others:

    POTENTIALS  phi: quad, tan, log_sep, ...
    MODELS, DATASETS, LOSSES, PARTITIONS, SCHEDULES, SINKS

`@MODELS.register("mine")` above a function adds an entry. With `plugins=[my_module]` the trainer
imports the module that has it. A mistake in the configuration is a ConfigError of one line.

Commands: consensus-train, consensus-sweep, consensus-report, consensus-doctor, consensus-elastic.
Guides: docs/.
"""

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from consensus.comm import GroupError
    from consensus.core.layerwise import Layerwise
    from consensus.core.potentials import POTENTIALS, Potential
    from consensus.core.profiles import Profile
    from consensus.core.schedules import SCHEDULES
    from consensus.core.sizes import Radial, Separable
    from consensus.coupling import Coupling, ElasticCoupling
    from consensus.problem import (
        DATASETS,
        LOSSES,
        MODELS,
        PARTITIONS,
        Dataset,
        Loss,
        Metric,
        Samples,
    )
    from consensus.records import Row
    from consensus.run.api import Result, compose, load, train
    from consensus.run.checks import ConfigError
    from consensus.run.config import Config
    from consensus.run.signals import RunStopped
    from consensus.run.sinks import SINKS, RunInfo, Sink

    __version__: str

__all__ = [
    "DATASETS",
    "LOSSES",
    "MODELS",
    "PARTITIONS",
    "POTENTIALS",
    "SCHEDULES",
    "SINKS",
    "Config",
    "ConfigError",
    "Coupling",
    "Dataset",
    "ElasticCoupling",
    "GroupError",
    "Layerwise",
    "Loss",
    "Metric",
    "Potential",
    "Profile",
    "Radial",
    "Result",
    "Row",
    "RunInfo",
    "RunStopped",
    "Samples",
    "Separable",
    "Sink",
    "__version__",
    "compose",
    "load",
    "train",
]

# Names are imported when they are used: torch takes seconds, in which a command could not answer
# a signal.
_HOMES = {
    "DATASETS": "consensus.problem",
    "LOSSES": "consensus.problem",
    "MODELS": "consensus.problem",
    "PARTITIONS": "consensus.problem",
    "POTENTIALS": "consensus.core.potentials",
    "SCHEDULES": "consensus.core.schedules",
    "SINKS": "consensus.run.sinks",
    "Config": "consensus.run.config",
    "ConfigError": "consensus.run.checks",
    "Coupling": "consensus.coupling",
    "ElasticCoupling": "consensus.coupling",
    "Dataset": "consensus.problem",
    "GroupError": "consensus.comm",
    "Layerwise": "consensus.core.layerwise",
    "Loss": "consensus.problem",
    "Metric": "consensus.problem",
    "Potential": "consensus.core.potentials",
    "Profile": "consensus.core.profiles",
    "Radial": "consensus.core.sizes",
    "Result": "consensus.run.api",
    "Row": "consensus.records",
    "RunInfo": "consensus.run.sinks",
    "RunStopped": "consensus.run.signals",
    "Samples": "consensus.problem",
    "Separable": "consensus.core.sizes",
    "Sink": "consensus.run.sinks",
    "compose": "consensus.run.api",
    "load": "consensus.run.api",
    "train": "consensus.run.api",
}

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """A public name, imported at its first use."""
        from importlib import import_module

        if name == "__version__":
            from consensus.startup import version

            value = version()
        elif name in _HOMES:
            value = getattr(import_module(_HOMES[name]), name)
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value
        return value

    class _Package(ModuleType):
        """This module, in which the function `train` outlasts the module of its name.

        `python -m consensus.train` and the script consensus-train run the module. Its import would
        replace the function: Python sets each module as an attribute of its package.
        """

        def __setattr__(self, name: str, value: Any) -> None:
            if not (name in _HOMES and isinstance(value, ModuleType)):
                super().__setattr__(name, value)

    sys.modules[__name__].__class__ = _Package


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
