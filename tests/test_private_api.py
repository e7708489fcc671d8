"""The contracts of private names that the package relies on."""

import argparse
import multiprocessing
import subprocess
import sys

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import HydraContext
from omegaconf import OmegaConf
from torch.autograd.graph import increment_version
from torch.utils.data import DataLoader

from consensus.private_api import (
    add_config_source,
    apply_overrides,
    changes_of,
    expand_sweep,
    has_content,
    hydra_argument_parser,
    hydra_callbacks,
    is_group,
    loader_processes,
    names_in_group,
    omegaconf_yaml_dumper,
    omegaconf_yaml_loader,
    own_keys,
)
from consensus.run.compose import config_dir


def test_the_yaml_loader_is_a_class_of_pyyaml():
    loader = omegaconf_yaml_loader()
    assert issubclass(loader, yaml.SafeLoader)
    assert yaml.load("{a: 1e-4, b: 2026-11-30}", Loader=loader) == {"a": 1e-4, "b": "2026-11-30"}


def test_the_yaml_dumper_quotes_numbers():
    dumper = omegaconf_yaml_dumper()
    assert issubclass(dumper, yaml.Dumper)
    assert yaml.dump({"a": "1e-4", "b": 1e-4}, Dumper=dumper) == "a: '1e-4'\nb: 0.0001\n"


def test_changes_of_a_tensor_are_those_of_its_memory():
    whole = torch.zeros(2, 3)
    row, before = whole[1], changes_of(whole)
    row.add_(1.0)
    assert changes_of(whole) == changes_of(row) == before + 1
    torch.sub(row, row, out=row)
    increment_version(whole)
    assert changes_of(row) == before + 3
    assert changes_of(whole + 1.0) == 0


def test_loader_processes_that_have_ended_are_still_known():
    found = iter(DataLoader(range(4), num_workers=2))
    processes = loader_processes(found)
    assert len(processes) == 2
    for process in processes:
        process.kill()
        process.join()
    assert not set(processes) & set(multiprocessing.active_children())
    assert [process.exitcode for process in loader_processes(found)] == [-9, -9]
    assert loader_processes(iter(DataLoader(range(4)))) == []


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


def test_a_source_of_configs_is_searched_after_the_others(tmp_path):
    (tmp_path / "model").mkdir()
    for name in ("mine", "mlp"):
        (tmp_path / "model" / f"{name}.yaml").write_text("name: of_mine\noptions: {}\n")
    with initialize_config_dir(config_dir(), version_base="1.3"):
        assert not add_config_source("file:///none")
    with initialize_config_dir(config_dir(), version_base="1.3"):
        assert add_config_source(f"file://{tmp_path}")
        loader = GlobalHydra.instance().config_loader()
        assert {"mine", "lenet5"} <= set(loader.get_group_options("model"))
        names = [compose(f"model/{name}").model.name for name in ("mine", "mlp")]
    assert names == ["of_mine", "mlp"]


def test_the_names_in_a_group_are_those_of_the_loader(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("name: of_mine\noptions: {}\n")
    with initialize_config_dir(config_dir(), version_base="1.3"):
        add_config_source(f"file://{tmp_path}")
        ConfigStore.instance().store(name="stored_here", node={"name": "x"}, group="model")
        try:
            options = GlobalHydra.instance().config_loader().get_group_options
            for group in ("model", "potential", "hydra/launcher", "nothing"):
                assert names_in_group(group) == options(group)
            assert {"lenet5", "mine", "stored_here"} <= set(names_in_group("model"))
        finally:
            del ConfigStore.instance().repo["model"]["stored_here.yaml"]


def test_the_own_keys_of_a_config_are_those_of_its_file(tmp_path):
    folder = tmp_path / "experiment"
    folder.mkdir()
    (folder / "plain.yaml").write_text("# @package _global_\nseed: 1\nplugins: [json]\n")
    (folder / "other.yaml").write_text("# @package _global_\ndefaults:\n  - plain\n  - _self_\n")
    (folder / "empty.yaml").write_text("")
    with initialize_config_dir(config_dir(), version_base="1.3"):
        assert own_keys("experiment/plain") is None
        add_config_source(f"file://{tmp_path}")
        assert own_keys("experiment/plain") == {"seed", "plugins"}
        assert own_keys("experiment/other") == {"defaults"}
        assert own_keys("experiment/empty") == set()
        assert own_keys("experiment/smoke") == {"algorithm", "output"}
        assert own_keys("experiment/nothing") is own_keys("experiment/[smoke]") is None


def test_a_sweep_is_expanded_in_the_order_of_a_nested_loop():
    overrides = OverridesParser.create().parse_overrides(["a=1,2", "b=x", "c=range(3)"])
    assert expand_sweep(overrides) == [
        [f"a={a}", "b=x", f"c={c}"] for a in (1, 2) for c in range(3)
    ]


def test_overrides_set_add_and_delete_in_their_order():
    config = OmegaConf.create({"a": {"b": 1}, "old": 2})
    OmegaConf.set_struct(config, True)
    texts = ["a.b=5", "a.b=6", "+a.new=${old}", "~old"]
    apply_overrides(config, OverridesParser.create().parse_overrides(texts))
    assert OmegaConf.to_container(config, resolve=False) == {"a": {"b": 6, "new": "${old}"}}
    with pytest.raises(HydraException, match=r"Could not override 'c'"):
        apply_overrides(config, OverridesParser.create().parse_overrides(["c=1"]))


def test_which_keys_choose_a_file():
    with initialize_config_dir(config_dir(), version_base="1.3"):
        found = [is_group(key) for key in ("potential", "experiment", "seed", "potential.eta")]
    assert found == [True, True, False, False]


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
assert "hydra" not in sys.modules and "torch.distributed.checkpoint" not in sys.modules
"""


def test_exit_handlers_run_once_and_nothing_heavy_is_imported():
    ended = subprocess.run(
        [sys.executable, "-c", EXIT.format(path=sys.path)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert ended.stdout.split() == ["second", "first", "end"]
