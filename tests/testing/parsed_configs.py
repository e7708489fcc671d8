"""What Hydra does again and again while it composes a config is done once, or where it is needed.

It parses all YAML files of a config for each config, and each `${...}` wherever it is read, copies
all stored configs first, and prepares for `${...}` in every list of defaults: half of the time. The
tests compose thousands. A file is parsed again once it is another: its name, its place, its size or
the time of its last change.
"""

import copy
import functools
import os
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

from hydra._internal import defaults_list
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult, ConfigSource
from omegaconf import _utils, base

_parsed: dict[tuple[Any, ...], ConfigResult] = {}


def remember() -> None:
    """Change Hydra in this process and its forks; a second call does nothing."""
    if "__deepcopy__" in vars(ConfigStore):
        return
    Plugins.instance()  # it loads the classes of the sources, which only the registry knows
    for scheme, folder in (("file", Path), ("pkg", resources.files)):
        source = SourcesRegistry.instance().resolve(scheme)
        source.load_config = _remembering(source.load_config, folder)
    for module in (_utils, base):  # a parsed `${...}` is only read
        module.parse = functools.lru_cache(module.parse)
    # Composing reads the store and hands out copies of what is in it.
    ConfigStore.__deepcopy__ = lambda store, memo: store
    prepare = defaults_list._create_interpolation_map
    defaults_list._create_interpolation_map = lambda overrides, defaults, self_added: (
        prepare(overrides, defaults, self_added) if any(map(_interpolates, defaults)) else None
    )


def _interpolates(default: Any) -> bool:
    return not default.is_self() and not default.is_override() and default.is_interpolation()


def _remembering(
    load: Callable[[Any, str], ConfigResult], folder: Callable[[Any], Any]
) -> Callable[[Any, str], ConfigResult]:
    def load_config(source: ConfigSource, config_path: str) -> ConfigResult:
        try:
            name = source._normalize_file_name(config_path)
            found = os.stat(folder(source.path).joinpath(name))
        except (OSError, TypeError, ValueError):
            return load(source, config_path)  # which explains it
        state = found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
        key = (type(source), source.provider, source.path, config_path, *state)
        if key not in _parsed:
            _parsed[key] = load(source, config_path)
        return copy.deepcopy(_parsed[key])

    return load_config
