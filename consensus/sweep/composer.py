"""The configs of many runs that differ in values: the YAML files of all of them are merged once."""

import pickle
from collections.abc import Sequence

from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig

from consensus.private_api import apply_overrides, is_group


class Composer:
    """Composes configs of configs/train.yaml; those that choose the same files merge them once.

    Hydra selects and merges twenty files for each config, in a fifth of a second: a minute or more
    for the 432 runs of Table 1. Here this happens once for each set of choices such as
    `potential=tan`, and the values of a run, such as `algorithm.lam=0.1`, are applied to a copy, in
    their order and by Hydra's own function. The files must not change meanwhile.
    """

    def __init__(self) -> None:
        self._parsed: dict[str, tuple[Override, bool]] = {}  # by text; whether it chooses a file
        # A pickled config is copied in a quarter of the time of a deep copy.
        self._merged: dict[tuple[str, ...], bytes] = {}

    def compose(self, overrides: Sequence[str]) -> DictConfig:
        """Equal to `hydra.compose("train", overrides)`, and raises what that raises.

        Hydra must be initialized.
        """
        parsed = [self._parse(text) for text in overrides]
        choices = [override for override, chooses in parsed if chooses]
        values = [override for override, chooses in parsed if not chooses]
        # `potential={eta: 2}` chooses no file, the part for Hydra itself is not kept, and several
        # values are refused.
        simple = not any(isinstance(choice.value(), dict) for choice in choices)
        if not simple or any(o.is_hydra_override() or o.is_sweep_override() for o, _ in parsed):
            return compose("train", overrides=list(overrides))
        files = tuple(str(choice.input_line) for choice in choices)
        if files not in self._merged:
            self._merged[files] = pickle.dumps(compose("train", overrides=list(files)))
        config: DictConfig = pickle.loads(self._merged[files])
        apply_overrides(config, values)
        return config

    def _parse(self, text: str) -> tuple[Override, bool]:
        if text not in self._parsed:
            parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
            (override,) = parser.parse_overrides([text])  # its errors name the override
            self._parsed[text] = override, is_group(override.key_or_group)
        return self._parsed[text]
