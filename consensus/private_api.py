"""Private names of Hydra, OmegaConf, torch and Python, in one place.

Nothing outside this module reads a name that its owner marks as private. Each function states a
contract, and tests/test_private_api.py checks it, so an upgrade that breaks it fails there. Hydra
is imported by the functions, because not every caller needs it.
"""

import argparse
import atexit
from collections.abc import Iterator, Sequence
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hydra._internal.callbacks import Callbacks
    from hydra.core.override_parser.types import Override
    from omegaconf import DictConfig
    from torch import Tensor


def loader_processes(found: Iterator[object] | None) -> list[BaseProcess]:
    """The processes of an iterator of torch's DataLoader, also those that have ended."""
    return list(getattr(found, "_workers", ()))


def omegaconf_yaml_loader() -> type:
    """The class by which OmegaConf reads YAML, a `yaml.SafeLoader`.

    It reads 1e-4 as a number and dates as text, and refuses a key that is there twice.
    """
    from omegaconf._utils import get_yaml_loader

    found: type = get_yaml_loader()
    return found


def omegaconf_yaml_dumper() -> type:
    """The class by which OmegaConf writes YAML, a `yaml.Dumper`.

    It quotes text that OmegaConf would read as a number.
    """
    from omegaconf._utils import get_omega_conf_dumper

    found: type = get_omega_conf_dumper()
    return found


def hydra_argument_parser() -> argparse.ArgumentParser:
    """The parser of Hydra's own switches, such as `--cfg job`; KEY=VALUE are its positionals.

    `@hydra.main` builds an equal parser for itself, so `error` of this one can be replaced.
    """
    from hydra._internal.utils import get_args_parser

    return get_args_parser()


def hydra_callbacks(config: "DictConfig") -> "Callbacks":
    """The callbacks that a composed config declares, as a `HydraContext` requires them."""
    from hydra._internal.callbacks import Callbacks

    return Callbacks(config)


def add_config_source(path: str) -> bool:
    """Search a folder or `pkg://` module as well for configs; False if there is no such source.

    It comes after all others, as that of `--config-dir`. Hydra must be initialized.
    """
    from hydra.core.config_search_path import SearchPathQuery
    from hydra.core.global_hydra import GlobalHydra

    loader = GlobalHydra.instance().config_loader()
    found = loader.get_search_path()
    found.prepend("command-line", path, SearchPathQuery(provider="schema"))
    loader.repository.initialize_sources(found)  # type: ignore[attr-defined]
    return all(s.available() for s in loader.get_sources() if s.provider == "command-line")


def names_in_group(group: str) -> list[str]:
    """The names that Hydra offers in a group of configs, sorted. Hydra must be initialized.

    `get_group_options` of the loader copies all stored configs first, in milliseconds.
    """
    from hydra.core.global_hydra import GlobalHydra

    loader = GlobalHydra.instance().config_loader()
    found: list[str] = loader.repository.get_group_options(group)  # type: ignore[attr-defined]
    return found


def is_group(key: str) -> bool:
    """Whether a key of an override chooses a file, as `potential`. Hydra must be initialized."""
    from hydra.core.global_hydra import GlobalHydra

    loader = GlobalHydra.instance().config_loader()
    return bool(loader.repository.group_exists(key))  # type: ignore[attr-defined]


def apply_overrides(config: "DictConfig", overrides: Sequence["Override"]) -> None:
    """Set, add and delete values of a composed config, as `compose` does with those it is given.

    Raises:
        HydraException: If a value cannot be set, with the error of OmegaConf as its cause.
    """
    from hydra._internal.config_loader_impl import ConfigLoaderImpl

    ConfigLoaderImpl._apply_overrides_to_config(list(overrides), config)


def own_keys(name: str) -> set[str] | None:
    """The keys at the top of one config, "defaults" if it lists other configs; None: no such file.

    Nothing is composed, which takes a fifth of a second. Hydra must be initialized.
    """
    from hydra.core.global_hydra import GlobalHydra

    loader = GlobalHydra.instance().config_loader()
    found = loader.repository.load_config(name)  # type: ignore[attr-defined]
    if found is None or not hasattr(found.config, "keys"):
        return None
    return {str(key) for key in found.config} | ({"defaults"} if found.defaults_list else set())


def expand_sweep(overrides: Sequence["Override"]) -> list[list[str]]:
    """All combinations of overrides such as `seed=1,2`, the last one varying fastest."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    (combinations,) = BasicSweeper.split_arguments(list(overrides), None)
    return [list(combination) for combination in combinations]


def has_content(node: "DictConfig") -> bool:
    """Whether a config node is neither null nor missing (`???`); interpolations stay unresolved."""
    return not node._is_none() and not node._is_missing()


def changes_of(tensor: "Tensor") -> int:
    """How often operations have changed a tensor in place, or another one in its memory.

    Not through `.data`, which has a count of its own, and not in inference mode.
    """
    return tensor._version


def run_exit_handlers() -> None:
    """Call the functions registered with `atexit` now, the last one first, and forget them."""
    atexit._run_exitfuncs()
