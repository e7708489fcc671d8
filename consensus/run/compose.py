"""Composition of the config from YAML files and a command line, and its errors in one line.

Hydra merges the values in configs/ with the types of config.py, so it refuses a misspelt key or a
wrong type in any file. `to_config` converts once; no module below the entries sees a DictConfig.
"""

import difflib
import re
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, NoReturn, get_args, get_origin
from weakref import WeakKeyDictionary

from hydra import compose, initialize_config_dir
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobRuntime
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    MissingConfigException,
    OverrideParseException,
)
from hydra.version import VersionBase
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    MissingMandatoryValue,
    OmegaConfBaseException,
    ValidationError,
)

from consensus.private_api import (
    add_config_source,
    has_content,
    hydra_argument_parser,
    names_in_group,
    own_keys,
)
from consensus.run.checks import ConfigError, Section, allowed_by, require
from consensus.run.config import Config
from consensus.run.overrides import for_shell, override
from consensus.run.plugins import (
    TABLES,
    choices,
    files_of_names,
    import_plugin,
    require_chosen,
)
from consensus.run.yaml_files import (
    config_dir,
    did_you_mean,
    namesake,
    nearest,
    register_resolvers,
)

NAMING = ("plugins", "defaults")
"""The keys of an experiment by which it may name plugins: its own, or those of another config."""

REFUSALS = (ConfigError, HydraException, OmegaConfBaseException)
"""The errors that are mistakes of the user: the entries print one line and exit with code 2."""


def register_schema() -> None:
    """Store the types in Hydra under the name that configs/train.yaml lists first."""
    ConfigStore.instance().store(name="schema", node=Config)
    register_resolvers()


_ONE_AT_A_TIME = threading.RLock()  # Hydra is global


@contextmanager
def composing(command: str, arguments: Sequence[str]) -> Iterator[tuple[list[str], list[str]]]:
    """Hydra, initialized for `compose` with all that a command line names beside the configs.

    These are folders of YAML files, and the names that its plugins register. Yields the arguments
    without `--config-dir=FOLDER` and `hydra.searchpath=[...]`, and these two, for another command.
    ConfigError if there is no such folder or plugin. A Hydra of the caller is set aside meanwhile.
    """
    initialized = initialize_config_dir
    with _own_hydra(), initialized(config_dir(), version_base="1.3", job_name=command):
        register_schema()
        others, searched, words = [], [], iter(arguments)
        for word in words:
            switch, _, folder = word.partition("=")
            if switch in ("--config-dir", "-cd"):
                folder = str(Path(folder or next(words, "")).absolute())
                _search("--config-dir", folder)
                searched.append(f"--config-dir={folder}")
            elif word.lstrip("+").startswith("hydra.searchpath="):
                places = OverridesParser.create().parse_override(word).value()
                for place in places if isinstance(places, list) else [places]:
                    _search("hydra.searchpath", str(place))
                searched.append(word)
            else:
                others.append(word)
        import_plugins(others)
        yield others, searched


@contextmanager
def _own_hydra() -> Iterator[None]:
    """Set aside the state of Hydra, which belongs to the caller, and restore it at the end."""
    with _ONE_AT_A_TIME:
        of_hydra, store = GlobalHydra.instance(), ConfigStore.instance()
        runtime, base = JobRuntime.instance(), VersionBase.instance()
        hydra, repo, name = of_hydra.hydra, store.repo, runtime.get("name")
        version = base.getbase()
        of_hydra.clear()
        store.repo = repo | {group: {} for group in TABLES}
        try:
            yield
        finally:
            GlobalHydra.set_instance(of_hydra)
            of_hydra.hydra, store.repo, base.version_base = hydra, repo, version
            runtime.set("name", name)


_EXPERIMENTS: "WeakKeyDictionary[ConfigLoader, set[str]]" = WeakKeyDictionary()


def import_plugins(overrides: Sequence[str]) -> None:
    """Import the plugins of overrides and of their experiments, and offer the registered names.

    `potential=NAME` then works without a YAML file. Hydra must be initialized with the configs; an
    experiment is composed once as long as it is. ConfigError if there is no such plugin.
    """
    for found in choices(overrides, "plugins"):
        _import_all(found)
    offer_names()
    # The experiment may name an entry of its plugins, which is not there yet.
    others = [f"{group}={min(Path(config_dir(), group).glob('*.yaml')).stem}" for group in TABLES]
    known = _EXPERIMENTS.setdefault(GlobalHydra.instance().config_loader(), set())
    for experiment in choices(overrides, "experiment"):
        keys = own_keys(f"experiment/{experiment}")
        if str(experiment) in known or (keys is not None and keys.isdisjoint(NAMING)):
            continue
        plugins = None
        with suppress(*REFUSALS):  # explained when the whole command line is composed
            cfg = compose("train", overrides=[f"experiment={experiment}", *others])
            plugins = OmegaConf.to_container(cfg.plugins)
            known.add(str(experiment))
        _import_all(plugins)
        offer_names()


def _import_all(plugins: object) -> None:
    for name in plugins if isinstance(plugins, list) else ():
        if isinstance(name, str):
            import_plugin(name)


def offer_names() -> None:
    """Give Hydra a file for each registered name without one. Hydra must be initialized."""
    known = {group: names_in_group(group) for group in TABLES}
    for group, name, content in files_of_names(known):
        ConfigStore.instance().store(name=name, node=content, group=group)


def register_for_main(arguments: Sequence[str]) -> None:
    """Register with Hydra what `composing` would, for `@hydra.main`, which initializes its own."""
    with composing("train", arguments):
        offered = {group: ConfigStore.instance().repo[group] for group in TABLES}
    register_schema()
    ConfigStore.instance().repo |= offered


def _search(key: str, place: str) -> None:
    path = place if "://" in place else f"file://{Path(place).absolute()}"
    require(add_config_source(path), key, place, "a folder of YAML files, such as configs/")


def refuse_unknown_switches() -> None:
    """Check the arguments that begin with `-`, whose errors argparse prints in several lines."""

    def refuse(message: str) -> NoReturn:
        raise ConfigError(f"{message}; --hydra-help lists Hydra's switches beside KEY=VALUE")

    parser = hydra_argument_parser()
    parser.error = refuse  # type: ignore[method-assign]
    parser.parse_args()


def to_config(cfg: DictConfig, overrides: Sequence[str] = ()) -> Config:
    """The typed form of a composed config. Imports its plugins first: they may register names.

    Choices of files among the overrides, which Hydra has applied, must be those of the config.
    """
    _refuse_added_keys(cfg)
    require_chosen(cfg, overrides)
    plugins = [import_plugin(name) for name in cfg.plugins]
    config = OmegaConf.to_object(cfg)
    assert isinstance(config, Config)
    config.plugins = plugins
    return config


def is_refusal(error: BaseException) -> bool:
    """Whether an error is a mistake of the user, such as `explain` puts into one line.

    Hydra passes a few errors on, as for `algorithm=3` or a YAML file that it cannot parse.
    """
    if isinstance(error, REFUSALS):
        return True
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    package = str(frames[-1].f_globals.get("__name__", "")).partition(".")[0] if frames else ""
    return package in ("hydra", "yaml") or full_key(error) != ""


def explain(error: BaseException) -> str:
    """One line for a refusal: the key, the value, and the allowed values."""
    cause: BaseException | None = error
    while cause is not None:  # Hydra quotes OmegaConf's errors, which are more precise
        if isinstance(cause, ConfigError):
            return " ".join(str(cause).split())
        if isinstance(cause, OverrideParseException) and "=" in cause.override:
            key, _, value = cause.override.partition("=")
            problem = " ".join(cause.message.partition("See https://")[0].split())
            quoted = for_shell([override(key, value)])
            return f"`{key}` is {value}; Hydra cannot read it ({problem}); as text: {quoted}"
        if isinstance(cause, MissingConfigException) and cause.options is not None:
            group, _, choice = str(cause.missing_cfg_file).rpartition("/")
            near = difflib.get_close_matches(choice, cause.options, n=1)
            hint = f"; did you mean `{near[0]}`?" if near else ""
            return f"`{group}` is {choice}; allowed: {', '.join(sorted(cause.options))}{hint}"
        if isinstance(cause, ConfigCompositionException) and "override 'grid'" in str(cause):
            return "unknown key `grid`; a grid is run by `python -m consensus.sweep grid=NAME`"
        if (key := full_key(cause)) and not isinstance(cause, HydraException):
            if ".options." in key and isinstance(cause, ConfigKeyError | ConfigAttributeError):
                parent, _, name = key.rpartition(".")
                known = getattr(cause, "parent_node", None)
                listed = [str(option) for option in known] if isinstance(known, DictConfig) else []
                if near := difflib.get_close_matches(name, listed, n=1):
                    hint = did_you_mean(f"{parent}.{near[0]}")
                    return f"unknown key `{key}`{hint}; allowed in `{parent}`: {', '.join(listed)}"
                hint = "an option that its YAML file does not list takes a +"
                return f"unknown key `{key}`; {hint}{key}=..."
            if ".options." in key and isinstance(cause, MissingMandatoryValue):
                return f"`{key}` has no default; set {key}=VALUE"
            return unknown_key(key) or _refused_value(key, cause)
        cause = cause.__cause__ or cause.__context__
    return " ".join(str(error).split()) or f"Hydra refuses the command line ({error!r})"


def _refused_value(key: str, error: BaseException) -> str:
    """The line about a value that the type of its key excludes, or that cannot be found."""
    allowed = _allowed(key)
    value, problem = getattr(error, "value", None), str(error).strip().splitlines()[0]
    known = value is not None or "not Optional" in problem
    if allowed and known and isinstance(error, ValidationError):
        shown = {None: "null", True: "true", False: "false"}
        text = shown[value] if value is None or isinstance(value, bool) else repr(value)
        return f"`{key}` is {text}; allowed: {allowed}"
    return f"`{key}`: {problem}" + (f"; allowed: {allowed}" if allowed else "")


def _allowed(key: str) -> str:
    """The allowed values of a key, by the rule of its field or else by its type."""
    section, _, name = key.partition(".")
    inside = bool(name) and section in Section.classes  # others than those of Config, too
    kind: Any = Section.classes[section] if inside else Config
    entry = None
    for part in (name if inside else key).split("."):
        own = {field.name: field for field in fields(kind)} if is_dataclass(kind) else {}
        if (entry := own.get(part)) is None:
            return ""
        kind = entry.type
    assert entry is not None
    if entry.metadata and get_origin(kind) is not dict:
        return allowed_by(entry.metadata)
    if is_dataclass(kind):
        return f"a section with {', '.join(field.name for field in fields(kind))}"
    kinds = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    return ", or ".join(_TYPES.get(get_origin(one) or one, "any value") for one in kinds)


_TYPES = {
    float: "a number",
    int: "a whole number",
    bool: "true or false",
    str: "text",
    list: "a list, as [NAME,NAME]",
    dict: "options, as {NAME: VALUE}",
    NoneType: "null",
}


def full_key(error: BaseException) -> str:
    """The key that OmegaConf names in an error, "" if there is none.

    Its own errors have it as an attribute, Python's (OverflowError of 400 digits) in their text.
    """
    named = re.search(r"^ *full_key: (.+)$", str(error), re.MULTILINE)
    return str(getattr(error, "full_key", None) or (named[1] if named else ""))


def _refuse_added_keys(node: DictConfig, path: str = "") -> None:
    """Refuse keys that no class has; `+key=value` adds them, and they would have no effect."""
    for name, child in node.items_ex(resolve=False):
        key = ".".join(filter(None, (path, str(name))))
        if message := unknown_key(key):
            raise ConfigError(message)
        if isinstance(child, DictConfig) and has_content(child):
            _refuse_added_keys(child, key)


def _keys(node: Any = Config, path: str = "") -> Iterator[str]:
    """The full keys of the config, without options."""
    for entry in fields(node) if is_dataclass(node) else ():
        yield f"{path}{entry.name}"
        yield from _keys(entry.type, f"{path}{entry.name}.")


def unknown_key(key: str) -> str | None:
    """The message about a key that its class does not have; None if the class has it."""
    parent, _, name = key.rpartition(".")
    node: Any = Config
    for part in parent.split(".") if parent else ():
        types = {field.name: field.type for field in fields(node)} if is_dataclass(node) else {}
        node = types.get(part)
    allowed = [field.name for field in fields(node)] if is_dataclass(node) else []
    if not allowed or name in allowed:
        return None
    here = difflib.get_close_matches(name, allowed, n=1)
    near = namesake(name, _keys()) or (here[0] if here else nearest(name, _keys()))
    hint = did_you_mean(near)
    where = f"`{parent}`" if parent else "the top level"
    return f"unknown key `{key}`{hint}; allowed in {where}: {', '.join(allowed)}"
