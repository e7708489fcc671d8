"""Stored configurations: the text of a config.yaml, and its content as plain data.

A run, each of its checkpoints and the store of an elastic run have one. What is read is checked
against no schema, so that runs of other versions stay readable.
"""

import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from omegaconf import OmegaConf

from consensus.private_api import omegaconf_yaml_dumper, omegaconf_yaml_loader


def to_text(config: Any) -> str:
    """A `Config` as YAML, the text of `OmegaConf.to_yaml`."""
    how = {"default_flow_style": False, "allow_unicode": True, "sort_keys": False}
    text: str = yaml.dump(plain(config), Dumper=omegaconf_yaml_dumper(), **how)
    return text


def read_config(path: Path) -> dict[str, Any]:
    """The content of a file. OSError, or ValueError if it holds no configuration."""
    return parse_config(path.read_text(encoding="utf-8"))


def parse_config(text: str) -> dict[str, Any]:
    """The content of a text, as OmegaConf reads it. ValueError if it holds no configuration."""
    try:
        found = yaml.load(text, Loader=_loader())
        json.dumps(found)  # neither a set, nor a list that holds itself
        if "${" in text:
            OmegaConf.create(found)  # the interpolations can be parsed
    except Exception as error:  # PyYAML raises many kinds
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error
    if not isinstance(found, dict):
        raise ValueError("it holds no config")
    return {str(key): value for key, value in found.items()}


def plain(node: Any) -> Any:
    """A `Config`, or a part of it, as `parse_config` would read it."""
    if is_dataclass(node):
        return {entry.name: plain(getattr(node, entry.name)) for entry in fields(node)}
    if isinstance(node, Mapping):
        return {key: plain(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [plain(value) for value in node]
    return node


@cache
def _loader() -> type:
    """OmegaConf's loader; with the parser of libyaml, where there is one, ten times as fast."""
    own = omegaconf_yaml_loader()
    if not yaml.__with_libyaml__:
        return own

    class Loader(yaml.cyaml.CParser, own):  # type: ignore[misc, valid-type]
        def __init__(self, stream: str) -> None:
            yaml.cyaml.CParser.__init__(self, stream)
            yaml.constructor.SafeConstructor.__init__(self)
            yaml.resolver.Resolver.__init__(self)

    return Loader
