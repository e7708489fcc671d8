"""What Hydra does again and again while it composes a config is done once, or where it is needed.

It parses all YAML files of a config for each config, and each `${...}` wherever it is read, copies
all stored configs first, prepares for `${...}` in every list of defaults, finds out which twenty
files a config consists of, and merges them one by one: nine tenths of the time. The tests compose
thousands. While all files and stored configs are the same, each choice of files is made once and
merged once; overrides of values come after that, as without this. A file is another if its name,
its place, its size or the time of its last change is.
"""

import functools
import inspect
import itertools
import os
import pickle
from collections.abc import Callable, Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from hydra._internal import config_loader_impl, defaults_list
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult, ConfigSource
from omegaconf import DictConfig, _utils, base

# Pickled, since to load them takes a quarter of the time of a deep copy.
_parsed: dict[tuple[Any, ...], bytes] = {}
_merged: dict[tuple[Any, ...], bytes] = {}
_chosen: dict[tuple[Any, ...], tuple[Any, ...]] = {}
_stored: dict[tuple[Any, ...], tuple[Any, ...]] = {}  # place -> content and its number
_numbers = itertools.count()


def remember() -> None:
    """Change Hydra in this process and its forks; a second call does nothing."""
    if "__deepcopy__" in vars(ConfigStore):
        return
    Plugins.instance()  # it loads the classes of the sources, which only the registry knows
    for scheme in ("file", "pkg"):
        source = SourcesRegistry.instance().resolve(scheme)
        source.load_config = _remembering(source.load_config)
    for module in (_utils, base):  # a parsed `${...}` is only read
        module.parse = functools.lru_cache(module.parse)
    # Composing reads the store and hands out copies of what is in it.
    ConfigStore.__deepcopy__ = lambda store, memo: store
    ConfigStore.store = _numbering(ConfigStore.store)
    choose = config_loader_impl.create_defaults_list
    config_loader_impl.create_defaults_list = _remembering_choices(choose)
    merge = ConfigLoaderImpl._compose_config_from_defaults_list
    ConfigLoaderImpl._compose_config_from_defaults_list = _remembering_merge(merge)
    prepare = defaults_list._create_interpolation_map
    defaults_list._create_interpolation_map = lambda overrides, defaults, self_added: (
        prepare(overrides, defaults, self_added) if any(map(_interpolates, defaults)) else None
    )


def _interpolates(default: Any) -> bool:
    return not default.is_self() and not default.is_override() and default.is_interpolation()


def _folder(source: ConfigSource) -> Path:
    return Path(source.path if source.scheme() == "file" else str(resources.files(source.path)))


def _of_file(path: Path | str) -> tuple[int, ...]:
    found = os.stat(path)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _remembering(
    load: Callable[[Any, str], ConfigResult],
) -> Callable[[Any, str], ConfigResult]:
    def load_config(source: ConfigSource, config_path: str) -> ConfigResult:
        try:
            state = _of_file(_folder(source) / source._normalize_file_name(config_path))
        except (OSError, TypeError, ValueError, ModuleNotFoundError):
            return load(source, config_path)  # which explains it
        key = (type(source), source.provider, source.path, config_path, *state)
        if key not in _parsed:
            _parsed[key] = pickle.dumps(load(source, config_path))
        return pickle.loads(_parsed[key])

    return load_config


def _state(repo: Any) -> tuple[Any, ...]:
    """Equal while all files and stored configs that Hydra may read are the same."""
    if not hasattr(repo, "remembered"):  # there is one for each config that is composed
        repo.remembered = (
            tuple(map(_state_of_source, repo.get_sources())),
            tuple(_numbers_of_stored(ConfigStore.instance().repo)),
        )
    return repo.remembered


def _state_of_source(source: ConfigSource) -> tuple[Any, ...]:
    own = (source.scheme(), source.provider, source.path)
    if source.scheme() not in ("file", "pkg") or not source.available():
        return own
    folder = _folder(source)
    found = [os.path.join(at, name) for at, _, names in os.walk(folder) for name in names]
    return (*own, str(folder), *((path, *_of_file(path)) for path in found if path.endswith("ml")))


def _numbers_of_stored(repo: Mapping[str, Any], group: str = "") -> Iterator[tuple[str, Any]]:
    for name, entry in repo.items():
        path = f"{group}/{name}"
        if isinstance(entry, dict):
            yield from _numbers_of_stored(entry, path)
        else:
            yield path, _stored.get(path, (None, None))[1]


def _remembering_choices(choose: Callable[..., Any]) -> Callable[..., Any]:
    def create_defaults_list(
        repo: Any, config_name: Any, overrides_list: Any, prepend_hydra: bool, skip_missing: bool
    ) -> Any:
        given = (repo, config_name, overrides_list, prepend_hydra, skip_missing)
        choices = (o.input_line for o in overrides_list if repo.group_exists(o.key_or_group))
        key = (config_name, prepend_hydra, skip_missing, *choices, _state(repo))
        if key not in _chosen:
            made = choose(*given)
            _chosen[key] = made.defaults, made.defaults_tree, made.overrides.known_choices
            return made
        defaults, tree, known = _chosen[key]
        overrides = defaults_list.Overrides(repo=repo, overrides_list=overrides_list)
        overrides.known_choices = dict(known)
        return defaults_list.DefaultsList(
            defaults=defaults,
            config_overrides=overrides.config_overrides,
            defaults_tree=tree,
            overrides=overrides,
        )

    return create_defaults_list


def _remembering_merge(merge: Callable[..., DictConfig]) -> Callable[..., DictConfig]:
    def merge_defaults(loader: ConfigLoaderImpl, defaults: Any, repo: Any) -> DictConfig:
        files = ((own.config_path, own.package, own.primary) for own in defaults)
        key = (*files, _state(repo))
        if key not in _merged:
            _merged[key] = pickle.dumps(merge(loader, defaults=defaults, repo=repo))
        return pickle.loads(_merged[key])

    return merge_defaults


def _numbering(store: Callable[..., None]) -> Callable[..., None]:
    signature = inspect.signature(store)

    def store_config(*given: Any, **named: Any) -> None:
        call = signature.bind(*given, **named)
        call.apply_defaults()
        own = call.arguments
        name = own["name"] if own["name"].endswith(".yaml") else f"{own['name']}.yaml"
        place = f"/{own['group']}/{name}" if own["group"] else f"/{name}"
        content = (own["node"], own["package"], own["provider"])
        if place not in _stored or _stored[place][0] != content:
            _stored[place] = content, next(_numbers)
        store(*given, **named)

    return store_config
