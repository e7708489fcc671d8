"""Grids: from a YAML file and the command line to the jobs of a sweep.

A grid is a list of parts. A part maps keys of configs/train.yaml to a value or a list of values,
and stands for all combinations. Keys on the command line override those of the parts:
`grid=table1 potential=quad,tan` is a third of Table 1. Hydra's parser reads the values, so that its
ranges, choices and globs work.
"""

import hashlib
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from hydra import compose
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import OmegaConf

from consensus.private_api import expand_sweep
from consensus.problem import WAYS
from consensus.run.checks import COUNT, ConfigError, Section, one_of, require, rule
from consensus.run.compose import import_plugins, to_config
from consensus.run.config import Config
from consensus.run.overrides import take_as_text
from consensus.run.plan import require_memory_for_many
from consensus.run.yaml_files import did_you_mean, nearest
from consensus.sweep.composer import Composer

GRADIENTS = ("auto", "measure", *WAYS)
"""The methods by which a population computes gradients.

`measure` selects the fastest at the start; repeated measurements may differ, and so may last bits.
`auto` measures on a GPU without `deterministic`, and is `one_by_one` otherwise.
"""

OWN_KEYS = (
    "output.run_dir",
    "output.root",
    "output.stop_at",
    "resume",
)  # set by the sweep in each of its runs
LONGEST_NAME = 200  # of a run directory, in bytes; file systems allow 255


@dataclass
class GridConfig:
    """The schema of configs/grid/*.yaml."""

    name: str = "sweep"
    parts: list[dict[str, Any]] = field(default_factory=lambda: [{}])


@dataclass
class SweepOptions(Section, key="sweep"):
    """The options `sweep.*`, explained in configs/sweep.yaml."""

    dir: str | None = field(metadata=rule(lambda x: x is None or x.strip(), "a path or null"))
    jobs: int = field(metadata=COUNT)
    processes: int = field(metadata=COUNT)
    engine: str = field(metadata=one_of(("separate", "population")))
    gradients: str = field(metadata=one_of(GRADIENTS))
    halving: Any  # a number of iterations, or a list of them; made a list
    keep: Any  # a number, or a list with one for each entry of `halving`
    metric: str | None
    within: Any  # a key, or a list of keys
    screening_seeds: int | None = field(
        metadata=rule(lambda x: x is None or x >= 1, "null, or a number >= 1")
    )

    def __post_init__(self) -> None:
        """Check the fields."""
        super().__post_init__()
        if self.engine == "separate":
            allowed = "auto with sweep.engine=separate"
            require(self.gradients == "auto", "sweep.gradients", self.gradients, allowed)
        else:
            allowed = "1 with sweep.engine=population"
            require(self.processes == 1, "sweep.processes", self.processes, allowed)
        self._check_halving()

    def _check_halving(self) -> None:
        """Refuse rungs and numbers that suit no grid."""
        rungs = self.halving
        if rungs is not None and not isinstance(rungs, list):
            rungs = self.halving = [rungs]
        for key in ("metric", "within", "screening_seeds"):
            alone = rungs is not None or getattr(self, key) is None
            require(alone, f"sweep.{key}", _text(getattr(self, key)), "null without sweep.halving")
        if rungs is None:
            return
        whole = all(type(rung) is int for rung in rungs)
        rising = whole and all(low < high for low, high in itertools.pairwise([0, *rungs]))
        allowed = "null, or increasing numbers of iterations such as [500,1500]"
        require(rising and len(rungs) > 0, "sweep.halving", _text(self.halving), allowed)
        fits = not isinstance(self.keep, list) or len(self.keep) == len(rungs)
        allowed = f"one number, or a list of {len(rungs)}, as many as sweep.halving has"
        require(fits, "sweep.keep", _text(self.keep), allowed)
        for keep in self.keeps():
            known = isinstance(keep, int | float) and not isinstance(keep, bool)
            allowed = "a share of the configurations below 1, or a whole number of them >= 1"
            good = known and (0 < keep < 1 or (keep >= 1 and keep == keep // 1))
            require(good, "sweep.keep", _text(self.keep), allowed)

    def keys_within(self) -> tuple[str, ...]:
        """The keys of `within`."""
        keys = [] if self.within is None else self.within
        return tuple(map(str, keys if isinstance(keys, list) else [keys]))

    def keeps(self) -> list[Any]:
        """The numbers of `keep`, one for each entry of `halving`."""
        return self.keep if isinstance(self.keep, list) else [self.keep] * len(self.halving or [])


@dataclass
class SweepConfig:
    """The schema of configs/sweep.yaml."""

    sweep: SweepOptions
    grid: GridConfig = field(default_factory=GridConfig)


def register_sweep_schema() -> None:
    """Register the schema with Hydra under the name that configs/sweep.yaml lists first."""
    ConfigStore.instance().store(name="sweep_schema", node=SweepConfig)


@dataclass(frozen=True)
class Job:
    """One run of a sweep."""

    name: str  # of its directory: the keys that vary over the sweep, with their values
    overrides: tuple[str, ...]  # of configs/train.yaml


@dataclass(frozen=True)
class Sweep:
    """A parsed command line."""

    path: Path  # the directory of the sweep
    options: SweepOptions
    jobs: tuple[Job, ...]
    launcher: tuple[str, ...]  # overrides for Hydra itself, such as `hydra/launcher=...`
    _configs: dict[Job, Config] = field(default_factory=dict, compare=False)
    _composer: Composer = field(default_factory=Composer, compare=False)

    def config(self, job: Job) -> Config:
        """The config of a run, composed once; raises REFUSALS. Hydra must be initialized."""
        if job not in self._configs:
            cfg = self._composer.compose(job.overrides)
            self._configs[job] = to_config(cfg, job.overrides)
        return self._configs[job]

    def composed(self) -> Mapping[Job, Config]:
        """The configs that are composed so far."""
        return self._configs


def read_sweep(arguments: Sequence[str]) -> Sweep:
    """Parse a command line; raises REFUSALS. Hydra must be initialized with the configs."""
    arguments = take_as_text(arguments, sweeping=True)
    own = [text for text in arguments if re.match(r"(grid=|sweep\.)", text)]
    launcher = tuple(text for text in arguments if re.match(r"\+*hydra[/.]", text))
    others = [text for text in arguments if text not in own and text not in launcher]
    for text in others:
        if text.startswith("-"):
            allowed = "KEY=VALUE and --config-dir=FOLDER, --dry-run, --help"
            raise ConfigError(f"`{text}` is no argument of a sweep; allowed: {allowed}")
        key, equals, value = text.lstrip("+~").partition("=")
        require(key not in OWN_KEYS, key, "set", "nothing here: every run of a sweep has its own")
        # Hydra has no clear error for `key=` and `key=a,,b`.
        empty = equals and re.search(r"^$|^,|,\s*,|,$", value.strip())
        require(not empty, key, value.strip() or "nothing", "a value, or values between commas")
    known = [f"sweep.{option.name}" for option in fields(SweepOptions)]
    for text in own:
        key = text.partition("=")[0]
        if key.startswith("sweep.") and key not in known:
            hint = did_you_mean(nearest(key, known))
            raise ConfigError(f"unknown key `{key}`{hint}; allowed in `sweep`: {', '.join(known)}")
    config = compose("sweep", overrides=own)
    options = OmegaConf.to_object(config.sweep)
    assert isinstance(options, SweepOptions)
    # Not resolved: each run resolves references such as ${algorithm.sigma}.
    grid = OmegaConf.to_container(config.grid, resolve=False)
    assert isinstance(grid, dict)
    parts = [_overrides_of(part) for part in grid["parts"]]
    require(len(parts) > 0, "grid.parts", "[]", "at least one part")
    import_plugins([*itertools.chain(*parts), *others])
    path = Path(f"runs/{grid['name']}" if options.dir is None else options.dir)
    return Sweep(path, options, tuple(_jobs([[*part, *others] for part in parts])), launcher)


def _overrides_of(part: dict[str, Any]) -> list[str]:
    overrides = []
    for key, values in part.items():
        choices = values if isinstance(values, list) else [values]
        require(len(choices) > 0, f"grid: {key}", "[]", "at least one value")
        texts = take_as_text([f"{key}={_text(choice)}" for choice in choices])
        overrides.append(f"{key}={','.join(text.partition('=')[2] for text in texts)}")
    return overrides


def _text(value: object) -> str:
    """A value in Hydra's grammar."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(map(_text, value))}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_text(one)}" for key, one in value.items()) + "}"
    return "null" if value is None else str(value)


def _jobs(parts: Sequence[Sequence[str]]) -> list[Job]:
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    parsed = [parser.parse_overrides(list(part)) for part in parts]
    for override in (override for part in parsed for override in part):
        _require_values(override)
    runs = list(dict.fromkeys(tuple(run) for part in parsed for run in expand_sweep(part)))
    jobs = [Job("", run) for run in runs]
    keys = varying(map(values_of, jobs))
    return [
        Job(name_of({key: own[key] for key in keys if key in own}), job.overrides)
        for job, own in zip(jobs, map(values_of, jobs), strict=True)
    ]


def values_of(job: Job) -> dict[str, str]:
    """Key -> value of the overrides of a job, as on the command line."""
    pairs = (text.partition("=") for text in job.overrides)
    return {key.lstrip("+"): value for key, _, value in pairs}


def varying(values: Iterable[Mapping[str, str]]) -> list[str]:
    """The keys whose values differ between the jobs of a sweep."""
    of_jobs = list(values)
    keys = dict.fromkeys(key for own in of_jobs for key in own)
    return [key for key in keys if len({own.get(key) for own in of_jobs}) > 1]


def _require_values(override: Override) -> None:
    """Refuse values that cannot be listed, and a range or a glob without any."""
    if not override.is_sweep_override():
        return
    key, text = override.get_key_element(), str(override.input_line).partition("=")[2]
    allowed = "values between commas, choice(...) or range(START, STOP, STEP), which can be listed"
    require(override.is_discrete_sweep(), key, text, allowed)
    if not any(True for _ in override.sweep_iterator()):
        loader = GlobalHydra.instance().config_loader()
        names = loader.get_group_options(override.key_or_group)
        allowed = f"names or patterns among {', '.join(names)}" if names else "at least one value"
        raise ConfigError(f"`{key}` is {text}, which stands for no value; allowed: {allowed}")


def name_of(varying: Mapping[str, str]) -> str:
    """A name such as `potential=tan,lam=0.1`, from the last part of each key; a valid file name."""
    lasts = [key.rpartition(".")[2] for key in varying]
    pairs = zip(varying, lasts, strict=True)
    short = [last if lasts.count(last) == 1 else key for key, last in pairs]
    text = ",".join(f"{key}={value}" for key, value in zip(short, varying.values(), strict=True))
    name = re.sub(r"[^\w.,=+-]", "-", text, flags=re.ASCII) or "run"
    if len(name) > LONGEST_NAME or name != (text or "run"):  # a hash keeps names distinct
        name = f"{name[: LONGEST_NAME - 9]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    return name


def check(sweep: Sweep) -> None:
    """Preflight check: compose enough configs to cover each value of each key; raises REFUSALS.

    Conflicts between the values of several keys remain for the runs, which then fail without
    stopping the sweep. Likewise memory on the machines of a cluster.
    """
    processes = sweep.options.processes
    seen: set[str] = set()
    for job in sweep.jobs:
        if seen.issuperset(job.overrides):
            continue
        seen.update(job.overrides)
        config = sweep.config(job)
        for key in ("elastic", "replay"):
            value = getattr(config.group, key)
            require(not value, f"group.{key}", value, "with consensus.train alone, in no sweep")
        workers = config.workers
        divides = workers is None or workers % processes == 0
        require(divides, "sweep.processes", processes, f"a divisor of workers={workers}")
        if not any(text.startswith("hydra/launcher=submitit") for text in sweep.launcher):
            require_memory_for_many(config, processes, sweep.options.jobs)
