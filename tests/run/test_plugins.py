"""Plugins: modules and files that are imported, and the names that they register in every entry."""

import importlib
import json
import re
import sys
from dataclasses import asdict

import pytest
import torch
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from consensus.comm import Launch
from consensus.core.potentials import POTENTIALS
from consensus.report.__main__ import report
from consensus.run import continued as continued_module
from consensus.run.api import _config_of
from consensus.run.checks import ConfigError
from consensus.run.compose import composing
from consensus.run.plugins import place_in_user_code
from consensus.sweep.grid import check, read_sweep, register_sweep_schema
from tests.testing.plugins import MINE, forget, plugin_in


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with the plugin mine.py."""
    with plugin_in(tmp_path, monkeypatch):
        yield tmp_path


# ---- names


def test_a_registered_name_works_as_one_with_a_file(folder, make_config):
    config = make_config("plugins=[mine]", "potential=quartic")
    assert asdict(config.potential) == {"name": "quartic", "eta": 1.0, "options": {"weight": 1.0}}
    named = ["potential.name=quartic", "+potential.options.weight=3.0", "potential.eta=2.0"]
    again = ["potential=quartic", "potential.options.weight=3.0", "potential.eta=2.0"]
    one, other = (make_config("plugins=[mine]", *own) for own in (named, again))
    assert asdict(one) == asdict(other)
    x = torch.tensor([0.6, 0.8], dtype=torch.float64)
    assert float(other.potential.make().value(2 * x)) == pytest.approx(3.0 * 2.0**4, rel=1e-12)


def test_models_and_data_sets_by_name(folder, make_config):
    own = ["plugins=[mine]", "model=tiny", "data=stripes", "model.options.depth=2"]
    config = make_config(*own, "data.options.count=30", "data.partition=sharded")
    assert config.model.name == "tiny"
    # No default, plain data as YAML holds them, and a function, which stays the factory's own.
    assert config.model.options == {"depth": 2, "width": 8, "shape": [28, 28]}
    assert config.data.name == "stripes"
    assert config.data.partition == "sharded"
    assert config.data.options == {"count": 30}


def test_refusals_list_the_names_of_plugins(folder, refusal):
    line = refusal("plugins=[mine]", "potential=quartik")
    assert line.startswith("`potential` is quartik; allowed: cubic, huber, ")
    assert "quad, quartic, scaled_quad" in line
    assert "tiny" in refusal("plugins=[mine]", "model=tinny")
    assert "stripes" in refusal("plugins=[mine]", "data=stripe")
    line = refusal("plugins=[mine]", "model=tiny")
    assert line == "`model.options.depth` has no default; set model.options.depth=VALUE"
    line = refusal("plugins=[mine]", "potential=quartic", "potential.options.wait=2")
    assert line.startswith("unknown key `potential.options.wait` (did you mean `potential.options.")


def test_a_name_is_offered_as_long_as_it_is_registered(folder, make_config, refusal, monkeypatch):
    before = {group: dict(ConfigStore.instance().repo.get(group, {})) for group in ("potential",)}
    make_config("plugins=[mine]", "potential=quartic")
    make_config("potential=quartic")  # as in a notebook, which has registered it
    monkeypatch.setattr(POTENTIALS, "_factories", {"tan": POTENTIALS._factories["tan"]})
    assert "quartic" not in refusal("potential=quartic").partition("allowed:")[2]
    assert ConfigStore.instance().repo.get("potential", {}) == before["potential"]


def test_a_yaml_file_of_the_user_comes_first(folder, recwarn):
    (folder / "own" / "potential").mkdir(parents=True)
    (folder / "own" / "potential" / "quartic.yaml").write_text(
        "name: quartic\neta: 0.5\noptions: {weight: 7.0}\n"
    )
    with composing("test", ["--config-dir=own", "plugins=[mine]"]) as (others, _):
        cfg = continued_module.compose("train", overrides=[*others, "potential=quartic"])
    assert (cfg.potential.eta, cfg.potential.options.weight) == (0.5, 7.0)
    assert not recwarn.list


def test_an_experiment_names_its_plugin(folder, make_config, refusal):
    (folder / "own" / "experiment").mkdir(parents=True)
    for name, plugin in (("mine", "mine"), ("lost", "lost")):
        (folder / "own" / "experiment" / f"{name}.yaml").write_text(
            "# @package _global_\ndefaults:\n  - smoke\n  - override /potential: quartic\n"
            f"  - _self_\nplugins: [{plugin}]\n"
        )
    others = {"heir": "defaults: [mine]\n", "short": "plugins: [mine]\n"}
    for name, content in others.items():
        file = folder / "own" / "experiment" / f"{name}.yaml"
        file.write_text(f"# @package _global_\n{content}")
    for experiment, potential in (("mine", []), ("heir", []), ("short", ["potential=quartic"])):
        forget(folder)
        config = make_config("--config-dir=own", f"experiment={experiment}", *potential)
        assert (config.potential.name, config.plugins) == ("quartic", ["mine"])
        assert config.algorithm.iterations == (30_000 if experiment == "short" else 20)
    line = refusal("--config-dir=own", "experiment=lost")
    assert line.startswith("`plugins` is lost; allowed: a module on the Python path ")


# ---- modules and files


def test_a_plugin_is_a_file(folder, make_config, monkeypatch, tmp_path):
    (folder / "mine.py").rename(folder / "by_path.py")
    (folder / "by_path.py").write_text("import beside\n" + MINE)
    (folder / "beside.py").touch()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    config = make_config("plugins=[../by_path.py]", "potential=quartic")
    assert config.plugins == [str(folder / "by_path.py")], "from any folder"
    assert sys.modules["by_path"].tiny.__module__ == "by_path", "can be pickled"
    assert make_config(f"plugins=[{folder}/by_path.py]").plugins == config.plugins


def test_a_file_with_the_name_of_another_module(folder, refusal):
    (folder / "json.py").write_text(MINE)
    line = refusal("plugins=[json.py]")
    assert line == (
        f"`plugins` is {folder}/json.py; allowed: a file of another name: there is a module json "
        f"already ({json.__file__})"
    )
    assert importlib.import_module("json") is json


def test_a_plugin_that_fails_is_named_with_the_line(folder, refusal):
    (folder / "broken.py").write_text("import math\n\nmath.sqrt(-1)\n")
    line = refusal("plugins=[broken]")
    found = "`plugins` is broken, which fails: ValueError: "
    assert line.startswith(found)
    assert line.endswith(f"({folder}/broken.py, line 3)")
    (folder / "needs.py").write_text("import no_such_module_of_mine\n")
    line = refusal("plugins=[needs.py]")
    assert line == (
        "`plugins` is needs.py, which fails: ModuleNotFoundError: No module named "
        f"'no_such_module_of_mine' ({folder}/needs.py, line 1)"
    )
    (folder / "twice.py").write_text(
        "from consensus import POTENTIALS\n\n@POTENTIALS.register('tan')\ndef tan(): ...\n"
    )
    line = refusal("plugins=[twice]")
    assert "ValueError: potential `tan` is already registered by <function tan at" in line


# ---- a run, its continuation and its report

RUN = ["plugins=[mine]", "potential=quartic", "model=tiny", "data=stripes", "model.options.depth=1"]


def test_a_run_of_a_plugin_is_continued_and_reported(folder, train):
    run = train(*RUN, "algorithm.iterations=6", f"output.run_dir={folder}/run")
    saved = OmegaConf.load(folder / "run" / "config.yaml")
    assert saved.potential == {"name": "quartic", "eta": 1.0, "options": {"weight": 1.0}}
    assert saved.plugins == ["mine"]
    longer = train(*RUN, "algorithm.iterations=12", f"output.run_dir={folder}/run", "resume=auto")
    assert longer.rows[: len(run.rows)] == run.rows
    assert longer.rows[-1]["iteration"] == 12
    forget(folder)  # the report needs no plugin
    report([folder / "run"])
    assert (folder / "run" / "report.png").exists()


def test_the_config_of_the_run_suffices_to_continue_it(folder, make_config, train):
    train(*RUN, "algorithm.iterations=6", f"output.run_dir={folder}/run")
    forget(folder)
    overrides = [f"output.run_dir={folder}/run", "resume=auto"]
    with composing("test", overrides) as (own, _):
        cfg = continued_module.compose("train", overrides=own)
        cfg = continued_module.continued(cfg, own, 1)
        assert (cfg.potential.name, cfg.model.name, cfg.data.name) == ("quartic", "tiny", "stripes")
        config = importlib.import_module("consensus.run.compose").to_config(cfg)
    assert config.potential.make().name == "quartic"


def test_a_plugin_that_is_no_name_is_refused(refusal):
    with pytest.raises(ConfigError, match=r"`plugins` is 3x; allowed: a module on the Python path"):
        importlib.import_module("consensus.run.plugins").import_plugin("3x")


# ---- choices beside an experiment


EXPERIMENT = """# @package _global_
workers: 2
potential: {name: tan}
algorithm: {name: consensus, batch_size: 7}
output: {name: other}
"""


@pytest.mark.parametrize(
    ("choice", "line"),
    [
        ("potential=log", "log; allowed: tan, which the experiment sets; potential.name=log rep"),
        ("algorithm=easgd", "easgd; allowed: consensus, which the experiment sets"),
        ("potential=mine", "mine; allowed: tan, which the experiment sets; potential.name=log re"),
    ],
)
def test_a_choice_that_an_experiment_replaces_is_refused(folder, choice, line):
    """Hydra merges an experiment last; `defaults: [override /potential: tan]` would be replaced."""
    for path, text in (("experiment/own", EXPERIMENT), ("potential/mine", "name: log\neta: 2.0\n")):
        (folder / path).parent.mkdir()
        (folder / f"{path}.yaml").write_text(text)
    own = [f"--config-dir={folder}", "experiment=own"]
    refused = re.escape(f"`{choice.partition('=')[0]}` is {line}")
    with pytest.raises(ConfigError, match=f"^{refused}"):
        _config_of((*own, choice), Launch())
    with composing("sweep", [*own, choice, "seed=1,2"]) as (others, _):
        register_sweep_schema()
        with pytest.raises(ConfigError, match=f"^{refused}"):
            check(read_sweep(others))
    for more in ["potential=tan", "potential.name=log"], ["group=gloo", "output=default"]:
        config = _config_of((*own, *more), Launch())
        assert (config.algorithm.batch_size, config.output.name) == (7, "other")


def test_a_choice_beside_an_experiment_with_defaults_is_taken(folder):
    config = _config_of(("experiment=digits", "potential=log", "model=mlp"), Launch())
    assert (config.potential.name, config.model.name) == ("log", "mlp")


# ---- failures


def test_the_line_of_a_failure_is_the_innermost_one_of_the_user(tmp_path):
    """torch raises the error, and `consensus` calls the plugin."""
    source = "def outer():\n    inner()\n\ndef inner():\n    torch.zeros(2).view(3)\n"
    exec(compile(source, "/plugins/mine.py", "exec"), names := {"__name__": "mine", "torch": torch})
    exec("def call(own):\n    own()", ours := {"__name__": "consensus.run.trainer"})
    for function, error, expected in (
        (names["outer"], RuntimeError, "/plugins/mine.py, line 5"),
        (None, TypeError, None),
    ):
        with pytest.raises(error) as failure:
            ours["call"](function)
        inside = failure.value.with_traceback(failure.tb.tb_next)  # without the frame of the test
        assert place_in_user_code(inside) == expected


def test_a_plugin_that_ends_the_process_is_refused(folder, refusal):
    (folder / "quits.py").write_text("import sys\n\nsys.exit(0)\n")
    line = refusal("plugins=[quits]")
    assert line == f"`plugins` is quits, which fails: SystemExit: 0 ({folder}/quits.py, line 3)"
