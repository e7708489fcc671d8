"""`resume=auto output.run_dir=RUN` alone: the config is that of the run."""

import shutil

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from consensus.run.compose import config_dir, register_schema, to_config
from consensus.run.continued import continued
from consensus.run.signals import RunStopped
from tests.testing.small_runs import PACE, SMALL

OTHER = [
    *("potential=tan_sep", "potential.eta=0.5", "seed=3", "algorithm.momentum=0.8", "model=mlp"),
    *("model.options.hidden=[8]", "+algorithm.schedule.sigma.options.final=0.5", "workers=2"),
    *("algorithm.schedule.sigma.name=cosine", "output.eval_every=6", "output.tensorboard=false"),
]


@pytest.fixture
def command():
    """`command("seed=1", ...)`: the config of a command of some processes, as nested dicts."""
    register_schema()

    def call(*overrides: str, processes: int = 1) -> dict:
        with initialize_config_dir(config_dir(), version_base="1.3"):
            cfg = compose("train", overrides=list(overrides))
            config = to_config(continued(cfg, overrides, processes))
        return OmegaConf.to_container(OmegaConf.structured(config))

    return call


@pytest.fixture
def began(train, command, tmp_path):
    """A finished run that differs from the defaults in many keys; its config."""
    train(*OTHER, f"output.run_dir={tmp_path}/a")
    return OmegaConf.to_container(OmegaConf.load(tmp_path / "a" / "config.yaml"))


def test_the_config_is_that_of_the_run(began, command, tmp_path):
    where = f"output.run_dir={tmp_path}/a"
    as_it_began = began | {"resume": "auto"}
    assert command("resume=auto", where) == as_it_began
    assert command("resume=auto", where, *SMALL, *PACE, *OTHER) == as_it_began
    moved = tmp_path / "moved,here"
    shutil.move(tmp_path / "a", moved)
    output = began["output"] | {"run_dir": str(moved), "eval_every": 2}
    given = ["output.eval_every=2", f"output.run_dir='{moved}'", "group.timeout_s=9"]
    found = command("resume=auto", *given)
    assert found["output"] == output
    assert found["group"] == began["group"] | {"timeout_s": 9.0}
    assert found["potential"] == began["potential"]


def test_keys_of_the_command_stay(began, command, tmp_path):
    auto = ["resume=auto", f"output.run_dir={tmp_path}/a"]
    final = "algorithm.schedule.sigma.options.final"
    options = {
        f"+{final}=0.1": {"final": 0.1},
        "algorithm.schedule.sigma.options={}": {},
        "algorithm.schedule.sigma.name=constant": {},
    }
    for override, expected in options.items():
        found = command(*auto, override)["algorithm"]["schedule"]["sigma"]
        assert found["options"] == expected, override
    without = command(*auto, "model=mlp", "~model.options.hidden")
    assert without["model"] == {"name": "mlp", "options": {}}
    assert command(*auto, "potential=quad")["potential"] == command("potential=quad")["potential"]
    assert command(*auto, "seed=0")["seed"] == 0
    # An experiment stands for the keys that it changes.
    found = command(*auto, "experiment=smoke")
    smoke = command("experiment=smoke")
    assert found["algorithm"]["iterations"] == smoke["algorithm"]["iterations"] == 20
    assert (found["seed"], found["algorithm"]["momentum"]) == (3, 0.8)


def test_workers_that_were_as_many_as_processes(began, command, tmp_path):
    auto = ["resume=auto", f"output.run_dir={tmp_path}/a"]
    path = tmp_path / "a" / "config.yaml"
    config = OmegaConf.load(path)
    config.workers = None
    OmegaConf.save(config, path)
    assert command(*auto, processes=2)["workers"] is None
    assert command(*auto, processes=1)["workers"] == 2  # of the checkpoint
    assert command(*auto, "workers=4")["workers"] == 4  # refused later


def test_no_run_to_continue(began, command, tmp_path):
    plain = command("seed=5", f"output.run_dir={tmp_path}/a")
    assert (plain["seed"], plain["potential"]["name"]) == (5, "quad")
    new = [f"output.run_dir={tmp_path}/new", "resume=auto"]
    assert command(*new)["seed"] == 0
    (tmp_path / "new").mkdir()
    assert command(*new)["seed"] == 0


def test_a_config_that_cannot_be_read_is_that_of_a_checkpoint(began, command, tmp_path):
    (tmp_path / "a" / "config.yaml").write_text("{[")
    auto = ["resume=auto", f"output.run_dir={tmp_path}/a"]
    assert command(*auto) == began | {"resume": "auto"}


def test_a_run_that_stopped_at_an_iteration_goes_on(train, command, tmp_path):
    """`output.stop_at` is of one command; the continuing one would stop at once."""
    with pytest.raises(RunStopped):
        train(f"output.run_dir={tmp_path}/a", "output.stop_at=3")
    assert "stop_at: 3" in (tmp_path / "a" / "config.yaml").read_text()
    auto = ["resume=auto", f"output.run_dir={tmp_path}/a"]
    assert command(*auto)["output"]["stop_at"] is None
    assert command(*auto, "output.stop_at=5")["output"]["stop_at"] == 5
