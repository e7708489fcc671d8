"""From YAML files and a command line to a `Config`, and from what goes wrong there to one line.

Hydra merges the values of configs/ with the types of config.py, so a misspelt key or a wrong type
is refused wherever it stands. `to_config` converts once; nothing below the entry sees a DictConfig.
"""

import difflib
import importlib
import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, NoReturn

from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from consensus.private_api import has_content, hydra_argument_parser
from consensus.run.config import Config, ConfigError, require


def register_schema() -> None:
    """Make the types known to Hydra under the name that configs/train.yaml lists first."""
    ConfigStore.instance().store(name="schema", node=Config)


def config_dir() -> str:
    """Absolute directory of the YAML files: in the installed package, else beside it.

    Raises:
        FileNotFoundError: If they are in neither place; the installation is broken.
    """
    package = Path(__file__).resolve().parents[1]
    for candidate in (package / "configs", package.parent / "configs"):
        if (candidate / "train.yaml").is_file():
            return str(candidate)
    raise FileNotFoundError("no configs/train.yaml inside or beside the consensus package")


def refuse_unknown_switches() -> None:
    """What begins with `-` is read by argparse, which would tell a mistake in several lines.

    Raises:
        ConfigError: If Hydra does not know one of them, or its value.
    """

    def refuse(message: str) -> NoReturn:
        raise ConfigError(f"{message}; --hydra-help lists what Hydra knows besides KEY=VALUE")

    parser = hydra_argument_parser()
    parser.error = refuse  # type: ignore[method-assign]
    parser.parse_args()


def to_config(cfg: DictConfig) -> Config:
    """The typed config of a composed one; imports its plugins first, since names depend on them.

    Raises:
        ConfigError: If a key is unknown, a plugin cannot be imported or a check fails.
    """
    _refuse_added_keys(cfg)
    for plugin in cfg.plugins:
        named = all(part.isidentifier() for part in plugin.split("."))
        require(named, "plugins", repr(plugin), "names of modules on the Python path")
        try:
            importlib.import_module(plugin)
        except (ImportError, SyntaxError, ValueError) as error:
            raise ConfigError(
                f"`plugins` names {plugin}; allowed: modules on the Python path ({error})"
            ) from error
    config = OmegaConf.to_object(cfg)
    assert isinstance(config, Config)
    return config


REFUSALS = (ConfigError, HydraException, OmegaConfBaseException)
"""Everything that is the user's mistake: the entries turn it into one line and exit code 2."""


def explain(error: BaseException) -> str:
    """One line for a refusal: the key, the value, and what is allowed."""
    cause: BaseException | None = error
    while cause is not None:  # Hydra quotes OmegaConf's errors, which say more
        if isinstance(cause, ConfigError):
            return " ".join(str(cause).split())
        if isinstance(cause, MissingConfigException) and cause.options is not None:
            return _explain_choice(cause)
        if full_key(cause) and not isinstance(cause, HydraException):
            return _explain_key(cause)
        cause = cause.__cause__ or cause.__context__
    return " ".join(str(error).split()) or f"Hydra refuses the command line ({error!r})"


def _explain_choice(error: MissingConfigException) -> str:
    group, _, choice = str(error.missing_cfg_file).rpartition("/")
    allowed = ", ".join(sorted(error.options or ()))
    return f"`{group}` is {choice}; allowed: {allowed}"


def full_key(error: BaseException) -> str:
    """The key that OmegaConf names in what it raises, "" if it does not.

    It is an attribute of OmegaConf's own errors alone. Python's, like the OverflowError for a
    number with 400 digits, name it in their text.
    """
    named = re.search(r"^ *full_key: (.+)$", str(error), re.MULTILINE)
    return str(getattr(error, "full_key", None) or (named[1] if named else ""))


def _explain_key(error: BaseException) -> str:
    key = full_key(error)
    if ".options." in key and isinstance(error, ConfigKeyError | ConfigAttributeError):
        return f"unknown key `{key}`; an option that its YAML file does not list takes a +{key}=..."
    return _unknown(key) or f"`{key}`: {str(error).strip().splitlines()[0]}"


def _refuse_added_keys(node: DictConfig, path: str = "") -> None:
    """Hydra's `+key=value` adds a key that no class has; it would be without effect."""
    for name, child in node.items_ex(resolve=False):
        key = ".".join(filter(None, (path, str(name))))
        unknown = _unknown(key)
        if unknown:
            raise ConfigError(unknown)
        if isinstance(child, DictConfig) and has_content(child):
            _refuse_added_keys(child, key)


def _unknown(key: str) -> str | None:
    """The complaint about a key that the class it stands in does not have."""
    parent, _, name = key.rpartition(".")
    allowed = _allowed_keys(parent)
    if not allowed or name in allowed:
        return None
    near = difflib.get_close_matches(name, allowed, n=1)
    hint = f" (did you mean `{near[0]}`?)" if near else ""
    where = f"`{parent}`" if parent else "the top level"
    return f"unknown key `{key}`{hint}; allowed in {where}: {', '.join(allowed)}"


def _allowed_keys(parent: str) -> list[str]:
    """The fields of the dataclass at a dotted path, [] if there is none."""
    node: Any = Config
    for name in parent.split(".") if parent else ():
        types = {field.name: field.type for field in fields(node)} if is_dataclass(node) else {}
        node = types.get(name)
    return [field.name for field in fields(node)] if is_dataclass(node) else []
