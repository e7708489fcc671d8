"""Composition: the YAML files, experiments, plugins, and the errors of Hydra in one line."""

import dataclasses
from pathlib import Path

import pytest
import torch
from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from consensus.comm import Launch
from consensus.core.potentials import POTENTIALS
from consensus.problem import DATASETS, MODELS
from consensus.registry import Registry
from consensus.run.checks import ConfigError
from consensus.run.compose import composing, explain, register_schema, to_config
from consensus.run.plan import make_plan
from consensus.run.yaml_files import config_dir

CONFIGS = Path(config_dir())

GROUPS = ("algorithm", "data", "group", "loss", "model", "output", "potential")


def options_of(group):
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


EPOCH = 60000 // 20  # iterations that show a worker all of MNIST

EXPERIMENTS = {
    "table1_cell": {
        "workers": 4,
        "data.name": "mnist",
        "algorithm.iterations": 10 * EPOCH,
        "output.eval_every": EPOCH,
    },
    "figure1_4": {"workers": 4, "data.name": "mnist", "algorithm.iterations": 50 * EPOCH},
    "figure1_8": {"workers": 8, "data.name": "mnist", "algorithm.iterations": 10 * EPOCH},
    "smoke": {"data.name": "digits", "algorithm.iterations": 20},
}


def at(config, key):
    for name in key.split("."):
        config = getattr(config, name)
    return dataclasses.asdict(config) if dataclasses.is_dataclass(config) else config


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_promised_experiments(make_config, name):
    config = make_config(f"experiment={name}")
    assert {key: at(config, key) for key in EXPERIMENTS[name]} == EXPERIMENTS[name]
    assert config.output.name == name


def test_an_experiment_yields_to_the_command_line(make_config):
    config = make_config("experiment=table1_cell", "potential=tan", "algorithm.iterations=7")
    assert (config.potential.name, config.algorithm.iterations, config.workers) == ("tan", 7, 4)


# ---- the files under configs/


def test_every_folder_is_known():
    folders = {path.name for path in CONFIGS.iterdir() if path.is_dir()}
    assert folders == {*GROUPS, "experiment", "grid"}


@pytest.mark.parametrize("choice", [f"{g}={o}" for g in GROUPS for o in options_of(g)])
def test_every_option_of_every_group_passes(make_config, choice):
    group, _, option = choice.partition("=")
    config = make_config(choice)
    if group != "output":
        assert at(config, group)["name"] == option


@pytest.mark.parametrize("experiment", options_of("experiment"))
def test_every_experiment_passes(make_config, experiment):
    make_config(f"experiment={experiment}")


def built_in(table: Registry) -> list[str]:
    """Names from this package; other tests may have registered their own."""
    return [n for n in table if table._factories[n].__module__.startswith("consensus.")]


@pytest.mark.parametrize(
    ("group", "table"), [("potential", POTENTIALS), ("model", MODELS), ("data", DATASETS)]
)
def test_files_and_tables_have_the_same_names(group, table):
    assert options_of(group) == sorted(built_in(table))


@pytest.mark.parametrize("name", built_in(POTENTIALS))
def test_potential_files_hold_the_defaults_of_the_table(make_config, name):
    assert make_config(f"potential={name}").potential.options == POTENTIALS.options(name)


@pytest.mark.parametrize("name", built_in(MODELS))
def test_model_files_hold_the_defaults_of_the_table(make_config, name):
    table = MODELS.options(name)
    assert table.pop("num_classes") == 10  # comes from the data
    table = {key: list(v) if isinstance(v, tuple) else v for key, v in table.items()}
    assert make_config(f"model={name}").model.options == table


@pytest.mark.parametrize("name", built_in(DATASETS))
def test_data_files_hold_the_defaults_of_the_table(name):
    assert OmegaConf.load(CONFIGS / "data" / f"{name}.yaml").root == DATASETS.options(name)["root"]


# ---- misspelt keys, wrong types, errors of Hydra and OmegaConf

TOP = (
    "workers, seed, dtype, device, deterministic, cuda_graph, resume, plugins, potential, "
    "algorithm, data, model, loss, group, output, stationarity"
)

IN_OUTPUT = (
    "allowed in `output`: root, run_dir, name, eval_every, checkpoint_every, keep_checkpoints, "
    "log_every, tensorboard, figures, stop_at"
)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        (
            "potential.etta=2",
            "unknown key `potential.etta` (did you mean `eta`?); allowed in `potential`: "
            "name, eta, options",
        ),
        (
            "+potential.etta=2",
            "unknown key `potential.etta` (did you mean `eta`?); allowed in `potential`: "
            "name, eta, options",
        ),
        ("++output.rot=x", f"unknown key `output.rot` (did you mean `root`?); {IN_OUTPUT}"),
        ("output.zzz=x", f"unknown key `output.zzz`; {IN_OUTPUT}"),
        (
            "lamda=1",
            f"unknown key `lamda` (did you mean `algorithm.lam`?); allowed in the top level: {TOP}",
        ),
        ("qqq=1", f"unknown key `qqq`; allowed in the top level: {TOP}"),
        (
            "batchsize=3",
            "unknown key `batchsize` (did you mean `algorithm.batch_size`?); allowed in the top "
            f"level: {TOP}",
        ),
        (
            "+worker=1",
            f"unknown key `worker` (did you mean `workers`?); allowed in the top level: {TOP}",
        ),
        (
            "lam=1",
            f"unknown key `lam` (did you mean `algorithm.lam`?); allowed in the top level: {TOP}",
        ),
        (
            "+algorithm.lr=1",
            "unknown key `algorithm.lr` (did you mean `algorithm.sigma`?); allowed in `algorithm`: "
            "name, lam, tau, pull, outer, local_pull, optimizer, clip_grad_norm, sigma, momentum, "
            "weight_decay, batch_size, iterations, period, order, momentum_on, u_step_on, "
            "coupling, u_update, loss_reduction, schedule, on_nonfinite, tau_per_worker, delay, "
            "step_every",
        ),
        ("a.b.c=1", f"unknown key `a`; allowed in the top level: {TOP}"),
        (
            "algorithm.schedule.tau.nam=x",
            "unknown key `algorithm.schedule.tau.nam` (did you mean `name`?); "
            "allowed in `algorithm.schedule.tau`: name, options",
        ),
        (
            "potential=cubik",
            "`potential` is cubik; allowed: cubic, huber, log, log_cosh, log_sep, power, "
            "pseudo_huber, quad, scaled_quad, tan, tan_sep; did you mean `cubic`?",
        ),
        (
            "grid=smoke",
            "unknown key `grid`; a grid is run by `python -m consensus.sweep grid=NAME`",
        ),
        ("model=lenet", "`model` is lenet; allowed: lenet5, logistic, mlp; did you mean `lenet5`?"),
        ("data=cifar", "`data` is cifar; allowed: digits, mnist"),
        ("algorithm=adam", "`algorithm` is adam; allowed: consensus, ddp, diloco, easgd, fedprox, "
         "local_sgd, lookahead, msgd"),
        ("group=mpi", "`group` is mpi; allowed: auto, gloo, nccl"),
    ],
)  # fmt: skip
def test_misspelt_keys_and_names(refusal, override, line):
    assert refusal(override) == line


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("algorithm.lam=abc", "'abc'; allowed: a number > 0 (inf uncouples the workers)"),
        ("algorithm.lam=true", "true; allowed: a number > 0 (inf uncouples the workers)"),
        ("algorithm.sigma=null", "null; allowed: a finite number > 0"),
        ("algorithm.iterations=1.5", "1.5; allowed: a whole number >= 1"),
        ("algorithm.iterations=1e3", "1000.0; allowed: a whole number >= 1"),
        ("algorithm.batch_size=${algorithm.sigma}", "0.005; allowed: a whole number >= 1"),
        ("algorithm.schedule=3", "3; allowed: a section with tau, sigma, lam"),
        ("workers=abc", "'abc'; allowed: null, or a whole number >= 1"),
        ("stationarity.every=x", "'x'; allowed: a whole number >= 1, or null for never"),
        ("dtype=[1]", "[1]; allowed: bfloat16, float32, float64"),
        ("model.name=[1]", "[1]; allowed: lenet5, logistic, mlp"),
        ("deterministic=maybe", "'maybe'; allowed: true or false"),
        ("plugins=abc", "'abc'; allowed: a list, as [NAME,NAME]"),
        ("data.root=null", "null; allowed: text"),
        ("output.run_dir=[1]", "[1]; allowed: text, or null"),
        ("model.options=3", "3; allowed: options, as {NAME: VALUE}"),
    ],
)
def test_values_of_another_type(refusal, override, line):
    assert refusal(override).startswith(f"`{override.partition('=')[0]}` is {line}")


@pytest.mark.parametrize(
    ("override", "key", "fragment"),
    [
        ("algorithm.lam=???", "`algorithm.lam`: ", "missing mandatory value"),
        ("~algorithm.lam", "`algorithm.lam`: ", "; allowed: a number > 0 (inf"),
        ("~potential", "`potential`: ", "; allowed: a section with name, eta, options"),
        ("algorithm.lam=${nope}", "`algorithm.lam`: ", "'nope' not found; allowed: a number > 0"),
        ("plugins={a:b}", "`plugins`: ", "; allowed: a list, as [NAME,NAME]"),
        ("potential.options.p=3", "unknown key `potential.options.p`; ", "+potential.options.p="),
        ("hydra.foo=1", "`hydra.foo`: ", "'foo'"),
        ("algorithm.lam", "", "missing EQUAL"),
        ("foo=[", "`foo` is [; Hydra cannot read it", "'['"),
        ("model.options.x=a=b", "`model.options.x` is a=b; ", "as text: \"model.options.x='a=b'\""),
        ("algorithm.lam=1,2", "", "'algorithm.lam=1,2'"),
        ("+algorithm.lam=0.3", "", "'algorithm.lam'"),
    ],
)
def test_errors_of_hydra_and_omegaconf_are_one_line(refusal, override, key, fragment):
    line = refusal(override)
    assert line.startswith(key)
    assert fragment in line


@pytest.fixture
def experiment_file(tmp_path):
    """`experiment_file("...")`: overrides that choose an experiment with this content."""

    def write(content: str) -> tuple[str, str]:
        folder = tmp_path / "more" / "experiment"
        folder.mkdir(parents=True)
        (folder / "mine.yaml").write_text(f"# @package _global_\n{content}")
        return f"hydra.searchpath=[file://{folder.parent}]", "experiment=mine"

    return write


def test_a_users_experiment_file(make_config, experiment_file):
    content = "defaults:\n  - override /potential: tan\nalgorithm: {lam: 0.25}\n"
    config = make_config(*experiment_file(content))
    assert (config.potential.name, config.algorithm.lam) == ("tan", 0.25)


@pytest.mark.parametrize(
    ("content", "start"),
    [
        ("algorithm: {lamm: 0.2}", "unknown key `algorithm.lamm` (did you mean `lam`?); allowed"),
        ("worker: 3", "unknown key `worker` (did you mean `workers`?); allowed in the top level:"),
        ("algorithm: {lam: abc}", "`algorithm.lam` is 'abc'; allowed: a number > 0"),
        ("defaults: [override /potential: cubik]", "`potential` is cubik; allowed: cubic, huber, "),
        ("defaults: [nothere]", "In 'experiment/mine': Could not load 'experiment/nothere'."),
        ("algorithm: 3", "In 'experiment/mine': ValidationError"),
        ("algorithm: {lam: -1}", "`algorithm.lam` is -1.0; allowed: a number > 0"),
    ],
)
def test_mistakes_inside_an_experiment_file(refusal, experiment_file, content, start):
    assert refusal(*experiment_file(content)).startswith(start)


def test_explain_returns_one_line():
    assert explain(ConfigError("`output.root` is a\nb;\n  allowed: c")) == (
        "`output.root` is a b; allowed: c"
    )
    assert explain(ValueError("two\nlines")) == "two lines"


# ---- plugins

PLUGIN = '''
from consensus import POTENTIALS, Potential, Profile, Radial

@POTENTIALS.register("mine")
def mine(weight: float = 1.0) -> Potential:
    """weight |x|^4."""
    return Potential(
        Profile(
            psi=lambda s: weight * s**2,
            dpsi=lambda s: 2 * weight * s,
            d2psi=lambda s: 2 * weight + 0 * s,
            assumptions=frozenset({"A1", "A2", "A4", "A5"}),
        ),
        Radial(),
    )
'''


def test_a_plugin_registers_a_potential(make_config, monkeypatch, tmp_path):
    monkeypatch.setattr(POTENTIALS, "_factories", dict(POTENTIALS._factories))
    (tmp_path / "plugin_of_test_config.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)
    mine = ["plugins=[plugin_of_test_config]", "potential.name=mine", "potential.eta=2.0"]
    config = make_config(*mine, "+potential.options.weight=3.0", "dtype=float64", "device=cpu")
    phi = make_plan(config, Launch()).phi
    w = torch.randn(33580, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    # LeNet-5: 20 * 25 + 20, 50 * 20 * 25 + 50 and 800 * 10 + 10 coordinates
    expected = sum(3.0 * float(w_l.norm() / 2.0) ** 4 for w_l in w.split([520, 25050, 8010]))
    assert float(phi.value(w)) == pytest.approx(expected, rel=1e-12)


def test_a_name_without_its_plugin_is_refused(refusal):
    assert refusal("potential.name=mine").startswith("`potential.name` is mine; allowed: cubic, ")


# ---- folders of YAML files outside


@pytest.fixture
def outside(tmp_path):
    """A folder with the experiment `mine`, whose lam is 0.07."""
    folder = tmp_path / "own configs"
    (folder / "experiment").mkdir(parents=True)
    text = "# @package _global_\nalgorithm:\n  lam: 0.07\n"
    (folder / "experiment" / "mine.yaml").write_text(text)
    return folder


def test_folders_that_a_command_line_names_are_searched(outside, monkeypatch):
    register_schema()
    monkeypatch.chdir(outside.parent)
    switch = [f"--config-dir={outside}"]
    for arguments, searched in [
        (switch, switch),
        (["--config-dir", "own configs"], switch),
        (["-cd", str(outside)], switch),
        ([f"hydra.searchpath=['{outside}']"], [f"hydra.searchpath=['{outside}']"]),
        ([f"hydra.searchpath=['file://{outside}']"], [f"hydra.searchpath=['file://{outside}']"]),
    ]:
        given = [*arguments, "experiment=mine", "seed=3"]
        with composing("test", given) as (others, found):
            config = to_config(compose("train", overrides=others))
            names = GlobalHydra.instance().config_loader().get_group_options("experiment")
        assert (others, found) == (["experiment=mine", "seed=3"], searched)
        assert (config.algorithm.lam, config.seed) == (0.07, 3)
        assert {"mine", "smoke"} <= set(names), "for globs"


def test_a_folder_that_is_not_there_is_refused(outside):
    register_schema()
    for arguments, key, place in [
        ([f"--config-dir={outside}/none"], "--config-dir", f"{outside}/none"),
        (["hydra.searchpath=[/none]"], "hydra.searchpath", "/none"),
        (["hydra.searchpath=[pkg://none]"], "hydra.searchpath", "pkg://none"),
    ]:
        with pytest.raises(ConfigError) as caught, composing("test", arguments):
            pass
        allowed = "a folder of YAML files, such as configs/"
        assert str(caught.value) == f"`{key}` is {place}; allowed: {allowed}"
