"""The config of a run that `resume=auto` continues: its own, where the command sets nothing else.

`resume=auto output.run_dir=RUN` is therefore a whole command. Keys that the command sets keep the
values of the command; resume.py refuses those that may not differ.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra import compose
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from consensus.run.checkpoint.manifest import DamagedError
from consensus.run.checkpoint.reader import inspect, list_checkpoints
from consensus.run.checkpoint.resume import flat, state_of
from consensus.run.checks import ConfigError
from consensus.run.compose import unknown_key
from consensus.stored_config import read_config


def continued(cfg: DictConfig, overrides: Sequence[str], processes: int) -> DictConfig:
    """A composed config, completed by that of the run in `output.run_dir` if it is continued.

    `overrides` are those of the command. Hydra must be initialized with the configs.
    """
    try:
        auto, where = cfg.resume == "auto", cfg.output.run_dir
        run_dir = Path(where).expanduser() if auto and where is not None else None
        before = _config_of(run_dir) if run_dir is not None and state_of(run_dir) else None
    except (OmegaConfBaseException, OSError, RuntimeError, ValueError):
        return cfg  # its own checks explain it
    if run_dir is None or before is None:
        return cfg
    cfg = completed(cfg, overrides, before, {"resume", "output.run_dir", "output.stop_at"})
    if cfg.workers is None and (workers := _workers_of(run_dir)) not in (None, processes):
        cfg.workers = workers
    return cfg


def as_replayed(cfg: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """A composed config, completed by that of the run in `group.replay`, if there is one."""
    where = OmegaConf.select(cfg, "group.replay")
    before = None if not isinstance(where, str) else _config_of(Path(where).expanduser())
    if before is None:
        return cfg  # its own checks explain it
    own = {"group.elastic", "group.replay", "group.min_workers", "group.workers_per_process"}
    return completed(cfg, overrides, before, own | {"resume", "output.run_dir", "output.name"})


def completed(
    cfg: DictConfig, overrides: Sequence[str], before: dict[Any, Any], keep: set[str]
) -> DictConfig:
    """A composed config with the values of an earlier one for all keys that nothing sets.

    `overrides` set keys, and so does `keep`.
    """
    given = {*keep, *_given(overrides)}
    cfg = cfg.copy()
    with open_dict(cfg):
        for key, value in _entries(before):
            named = key.removesuffix(".options") + ".name" in given  # options of another entry
            if not _within(key, given) and not named:
                if isinstance(value, dict):
                    value = _options(cfg, key, value, given)
                OmegaConf.update(cfg, key, value, merge=False, force_add=True)
    return cfg


def _config_of(run_dir: Path) -> dict[Any, Any] | None:
    """The config of a run, from its directory or its newest readable checkpoint."""
    for path in (run_dir, *list_checkpoints(run_dir)):
        with suppress(OSError, ValueError):
            return read_config(path / "config.yaml")
    return None


def _workers_of(run_dir: Path) -> int | None:
    """The number of workers in the newest readable checkpoint; None if there is none."""
    for checkpoint in list_checkpoints(run_dir):
        with suppress(DamagedError, ConfigError):
            return inspect(checkpoint)[0].num_workers
    return None


def _given(overrides: Sequence[str]) -> Iterator[str]:
    """The keys that overrides set; a group stands for all of its keys."""
    parser = OverridesParser.create()
    for override in overrides:
        key = parser.parse_override(override).key_or_group
        if key != "experiment":
            yield key
            continue
        default, chosen = (flat(_values(compose("train", overrides=o))) for o in ([], [override]))
        yield from (k for k, value in chosen.items() if k not in default or default[k] != value)


def _values(cfg: DictConfig) -> Any:
    return OmegaConf.to_container(cfg, resolve=False)


def _entries(node: dict[Any, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """The keys of a config that a class has, with their values; `options` is one value."""
    for name, value in node.items():
        key = f"{path}.{name}" if path else str(name)
        if unknown_key(key) is not None:  # of another version
            continue
        if isinstance(value, dict) and name != "options":
            yield from _entries(value, key)
        else:
            yield key, value


def _within(key: str, given: set[str]) -> bool:
    parts = key.split(".")
    return any(".".join(parts[:i]) in given for i in range(1, len(parts) + 1))


def _options(cfg: DictConfig, key: str, before: dict[Any, Any], given: set[str]) -> dict[Any, Any]:
    """The options of the run, with those that the command sets or deletes."""
    options = OmegaConf.select(cfg, key)
    now = _values(options) if isinstance(options, DictConfig) else {}
    kept = {name: value for name, value in before.items() if f"{key}.{name}" not in given}
    return kept | {name: value for name, value in now.items() if f"{key}.{name}" in given}
