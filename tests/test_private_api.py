"""The contracts of private names that the package relies on."""

import argparse
import subprocess
import sys

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import HydraContext
from omegaconf import OmegaConf

from consensus.private_api import (
    expand_sweep,
    has_content,
    hydra_argument_parser,
    hydra_callbacks,
)


def test_the_parser_accepts_overrides_and_the_switches_of_hydra():
    parser = hydra_argument_parser()
    found = parser.parse_args(["seed=1", "+new=2", "--cfg", "job"])
    assert (found.overrides, found.cfg) == (["seed=1", "+new=2"], "job")
    assert found.multirun is False


@pytest.mark.parametrize("argv", [["--foo"], ["--cfg"], ["--cfg", "nope"]])
def test_the_parser_reports_an_unknown_switch_through_error(argv):
    class RefusedError(Exception):
        pass

    def error(message):
        raise RefusedError(message)

    parser = hydra_argument_parser()
    parser.error = error
    with pytest.raises(RefusedError):
        parser.parse_args(argv)
    # The replaced method is that of one parser.
    assert hydra_argument_parser().error.__func__ is argparse.ArgumentParser.error


def test_callbacks_of_a_config_without_any_fit_a_hydra_context():
    config = OmegaConf.create({"hydra": {"callbacks": {}}})
    context = HydraContext(config_loader=None, callbacks=hydra_callbacks(config))
    context.callbacks.on_job_start(config=config, task_function=None)


def test_a_sweep_is_expanded_in_the_order_of_a_nested_loop():
    overrides = OverridesParser.create().parse_overrides(["a=1,2", "b=x", "c=range(3)"])
    assert expand_sweep(overrides) == [
        [f"a={a}", "b=x", f"c={c}"] for a in (1, 2) for c in range(3)
    ]


def test_which_nodes_have_content():
    config = OmegaConf.create({"full": {"a": 1}, "empty": {}, "text": "${full}", "name": "x"})
    assert has_content(config)
    assert has_content(config.full)
    assert has_content(config.empty)
    assert not has_content(OmegaConf.create({"none": None})._get_node("none"))
    assert not has_content(OmegaConf.create({"missing": "???"})._get_node("missing"))


EXIT = """
import atexit, sys
sys.path[:0] = {path!r}
from consensus.private_api import run_exit_handlers
for name in "first", "second":
    atexit.register(print, name)
run_exit_handlers()
print("end")
assert "hydra" not in sys.modules
"""


def test_exit_handlers_run_once_and_nothing_heavy_is_imported():
    ended = subprocess.run(
        [sys.executable, "-c", EXIT.format(path=sys.path)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert ended.stdout.split() == ["second", "first", "end"]
