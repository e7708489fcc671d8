"""What Hydra does again and again while it composes a config is done once, or where it is needed.

It parses all YAML files of a config for each config, and each `${...}` wherever it is read, copies
all stored configs first, prepares for `${...}` in every list of defaults, and merges twenty files
one by one: two thirds of the time. The tests compose thousands. A file is parsed again once it is
another: its name, its place, its size or the time of its last change. The same files in the same
order are merged once; overrides of values come after that, as without this.
"""

import functools
import inspect
import os
import pickle
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

from hydra._internal import defaults_list
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult, ConfigSource
from omegaconf import DictConfig, _utils, base

# Pickled, since to load them takes a quarter of the time of a deep copy.
_parsed: dict[tuple[Any, ...], bytes] = {}
_merged: dict[tuple[Any, ...], bytes] = {}
_stored: dict[tuple[Any, ...], tuple[Any, ...]] = {}


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
    ConfigStore.store = _forgetting(ConfigStore.store)
    merge = ConfigLoaderImpl._compose_config_from_defaults_list
    ConfigLoaderImpl._compose_config_from_defaults_list = _remembering_merge(merge)
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
            _parsed[key] = pickle.dumps(load(source, config_path))
        result = pickle.loads(_parsed[key])
        result.remembered = key
        return result

    return load_config


def _remembering_merge(merge: Callable[..., DictConfig]) -> Callable[..., DictConfig]:
    def merge_defaults(loader: ConfigLoaderImpl, defaults: Any, repo: Any) -> DictConfig:
        key = tuple(
            (default.config_path, default.package, default.primary, _state(repo, default))
            for default in defaults
        )
        if key not in _merged:
            found = merge(loader, defaults=defaults, repo=repo)
            if any(state is None for *_, state in key):
                return found
            _merged[key] = pickle.dumps(found)
        return pickle.loads(_merged[key])

    return merge_defaults


def _state(repo: Any, default: Any) -> object:
    """Equal for equal content of a config; None if that is not known."""
    found = repo.load_config(config_path=default.config_path)
    if found is None:
        return None
    if found.path == "structured://":
        return found.provider  # a change of the store forgets what was merged
    return getattr(found, "remembered", None)


def _forgetting(store: Callable[..., None]) -> Callable[..., None]:
    signature = inspect.signature(store)

    def store_config(*given: Any, **named: Any) -> None:
        call = signature.bind(*given, **named)
        call.apply_defaults()
        own = call.arguments
        place, content = (own["group"], own["name"]), (own["node"], own["package"], own["provider"])
        if _stored.get(place) != content:
            _merged.clear()
            _stored[place] = content
        store(*given, **named)

    return store_config
