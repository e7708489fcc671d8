"""The config: its defaults, its files, and every refusal with the exact line a user reads."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from consensus.comm import Launch
from consensus.core.potentials import POTENTIALS
from consensus.problem import DATASETS, MODELS
from consensus.registry import Registry
from consensus.run import compose as compose_module
from consensus.run.compose import REFUSALS, config_dir, explain
from consensus.run.config import Config, ConfigError
from consensus.run.plan import choose_device, count_workers, make_plan

CONFIGS = Path(config_dir())
GROUPS = ("algorithm", "data", "group", "model", "output", "potential")


@pytest.fixture
def refusal(make_config):
    """`refusal("lam=abc", ...)`: the line that refuses these overrides."""

    def refuse(*overrides: str) -> str:
        with pytest.raises(REFUSALS) as caught:
            make_config(*overrides)
        line = explain(caught.value)
        assert "\n" not in line
        return line

    return refuse


@pytest.fixture
def plan_refusal(make_config):
    """`plan_refusal(launch, "workers=3", ...)`: likewise, for what only the plan can see."""

    def refuse(launch: Launch, *overrides: str) -> str:
        config = make_config("model=logistic", "device=cpu", *overrides)
        with pytest.raises(ConfigError) as caught:
            make_plan(config, launch)
        line = explain(caught.value)
        assert "\n" not in line
        return line

    return refuse


# ---- what is promised to users

CONTRACT = {
    "workers": None,
    "seed": 0,
    "dtype": "float32",
    "device": "auto",
    "deterministic": False,
    "cuda_graph": True,
    "resume": "never",
    "plugins": [],
    "potential.name": "quad",
    "potential.eta": 1.0,
    "potential.options": {},
    "algorithm.name": "consensus",
    "algorithm.lam": 0.1,
    "algorithm.tau": 0.005,
    "algorithm.sigma": 0.005,
    "algorithm.momentum": 0.9,
    "algorithm.weight_decay": 1e-4,
    "algorithm.batch_size": 20,
    "algorithm.iterations": 30000,
    "algorithm.period": 1,
    "algorithm.order": "gauss_seidel",
    "algorithm.momentum_on": "loss",
    "algorithm.u_step_on": "coupling",
    "algorithm.loss_reduction": "sum",
    "algorithm.schedule.tau": {"name": "constant", "options": {}},
    "algorithm.schedule.sigma": {"name": "constant", "options": {}},
    "algorithm.schedule.lam": {"name": "constant", "options": {}},
    "data.name": "digits",
    "data.partition": "full",
    "model.name": "lenet5",
    "model.options": {},
    "group.name": "auto",
    "output.run_dir": None,
    "output.name": None,
}


def at(config, key):
    for name in key.split("."):
        config = getattr(config, name)
    return dataclasses.asdict(config) if dataclasses.is_dataclass(config) else config


@pytest.mark.parametrize("key", CONTRACT)
def test_contract_defaults(make_config, key):
    value = at(make_config(), key)
    assert value == CONTRACT[key]
    assert type(value) is type(CONTRACT[key])


def test_default_paths_are_absolute(make_config, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    config = make_config("data.root=sub/data", "output.run_dir='~/run'", "output.root=runs")
    assert config.data.root == str(tmp_path / "sub" / "data")
    assert config.output.run_dir == str(tmp_path / "home" / "run")
    assert config.output.root == str(tmp_path / "runs")
    defaults = (CONFIGS / "output" / "default.yaml").read_text()
    assert "\nroot: runs\n" in f"\n{defaults}"


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


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_promised_experiments(make_config, name):
    config = make_config(f"experiment={name}")
    assert {key: at(config, key) for key in EXPERIMENTS[name]} == EXPERIMENTS[name]
    assert config.output.name == name


def test_an_experiment_yields_to_the_command_line(make_config):
    config = make_config("experiment=table1_cell", "potential=tan", "algorithm.iterations=7")
    assert (config.potential.name, config.algorithm.iterations, config.workers) == ("tan", 7, 4)


# ---- the files under configs/


def options_of(group):
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


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
def test_files_and_tables_name_the_same_things(group, table):
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


def test_the_files_are_found_inside_the_package_or_beside_it(monkeypatch, tmp_path):
    module = tmp_path / "consensus" / "run" / "compose.py"
    monkeypatch.setattr(compose_module, "__file__", str(module))
    with pytest.raises(FileNotFoundError, match=r"no configs/train\.yaml"):
        config_dir()
    for folder in (tmp_path / "configs", tmp_path / "consensus" / "configs"):
        folder.mkdir(parents=True)
        (folder / "train.yaml").touch()
        assert config_dir() == str(folder)  # the installed one comes first


# ---- misspelt keys, wrong types, what Hydra and OmegaConf say

TOP = (
    "workers, seed, dtype, device, deterministic, cuda_graph, resume, plugins, potential, "
    "algorithm, data, model, group, output, stationarity"
)
IN_OUTPUT = (
    "allowed in `output`: root, run_dir, name, eval_every, checkpoint_every, keep_checkpoints, "
    "log_every, tensorboard"
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
        ("lamda=1", f"unknown key `lamda`; allowed in the top level: {TOP}"),
        (
            "+worker=1",
            f"unknown key `worker` (did you mean `workers`?); allowed in the top level: {TOP}",
        ),
        ("a.b.c=1", f"unknown key `a`; allowed in the top level: {TOP}"),
        (
            "algorithm.schedule.tau.nam=x",
            "unknown key `algorithm.schedule.tau.nam` (did you mean `name`?); "
            "allowed in `algorithm.schedule.tau`: name, options",
        ),
        (
            "potential=cubik",
            "`potential` is cubik; allowed: cubic, log, log_cosh, log_sep, power, pseudo_huber, "
            "quad, scaled_quad, tan, tan_sep",
        ),
        ("model=lenet", "`model` is lenet; allowed: lenet5, logistic, mlp"),
        ("data=cifar", "`data` is cifar; allowed: digits, mnist"),
        ("algorithm=adam", "`algorithm` is adam; allowed: consensus, easgd, msgd"),
        ("group=mpi", "`group` is mpi; allowed: auto, gloo, nccl"),
    ],
)  # fmt: skip
def test_misspelt(refusal, override, line):
    assert refusal(override) == line


@pytest.mark.parametrize(
    ("override", "key", "fragment"),
    [
        ("algorithm.lam=abc", "`algorithm.lam`: ", "'abc'"),
        ("algorithm.lam=null", "`algorithm.lam`: ", "not Optional"),
        ("algorithm.iterations=1.5", "`algorithm.iterations`: ", "'1.5'"),
        ("algorithm.iterations=1e3", "`algorithm.iterations`: ", "1000.0"),
        ("algorithm.schedule=3", "`algorithm.schedule`: ", "int"),
        ("workers=abc", "`workers`: ", "'abc'"),
        ("deterministic=maybe", "`deterministic`: ", "'maybe'"),
        ("plugins=abc", "`plugins`: ", "str"),
        ("data.root=null", "`data.root`: ", "not Optional"),
        ("model.options=3", "`model.options`: ", "int"),
        ("algorithm.lam=???", "`algorithm.lam`: ", "missing mandatory value"),
        ("~algorithm.lam", "`algorithm.lam`: ", "deletion"),
        ("~potential", "`potential`: ", "missing mandatory value"),
        ("algorithm.lam=${nope}", "`algorithm.lam`: ", "'nope' not found"),
        ("potential.options.p=3", "unknown key `potential.options.p`; ", "+potential.options.p="),
        ("hydra.foo=1", "`hydra.foo`: ", "'foo'"),
        ("algorithm.lam", "", "missing EQUAL"),
        ("foo=[", "", "'['"),
        ("output.run_dir=a=b", "", "mismatched input '='"),
        ("algorithm.lam=1,2", "", "'algorithm.lam=1,2'"),
        ("+algorithm.lam=0.3", "", "'algorithm.lam'"),
    ],
)
def test_hydra_and_omegaconf_in_one_line(refusal, override, key, fragment):
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


def test_an_experiment_file_of_ones_own(make_config, experiment_file):
    content = "defaults:\n  - override /potential: tan\nalgorithm: {lam: 0.25}\n"
    config = make_config(*experiment_file(content))
    assert (config.potential.name, config.algorithm.lam) == ("tan", 0.25)


@pytest.mark.parametrize(
    ("content", "start"),
    [
        ("algorithm: {lamm: 0.2}", "unknown key `algorithm.lamm` (did you mean `lam`?); allowed"),
        ("worker: 3", "unknown key `worker` (did you mean `workers`?); allowed in the top level:"),
        ("algorithm: {lam: abc}", "`algorithm.lam`: Value 'abc'"),
        ("defaults: [override /potential: cubik]", "`potential` is cubik; allowed: cubic, log, "),
        ("defaults: [nothere]", "In 'experiment/mine': Could not load 'experiment/nothere'."),
        ("algorithm: 3", "In 'experiment/mine': ValidationError"),
        ("algorithm: {lam: -1}", "`algorithm.lam` is -1.0; allowed: a number > 0"),
    ],
)
def test_mistakes_inside_an_experiment_file(refusal, experiment_file, content, start):
    assert refusal(*experiment_file(content)).startswith(start)


def test_explain_is_one_line_whatever_it_is_given():
    assert explain(ConfigError("`output.root` is a\nb;\n  allowed: c")) == (
        "`output.root` is a b; allowed: c"
    )
    assert explain(ValueError("two\nlines")) == "two lines"


# ---- every check of config.py

EASGD = "for algorithm=easgd, whose step is symmetric (algorithm=consensus is free)"


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["workers=0"], "`workers` is 0; allowed: null or >= 1"),
        (["seed=-1"], "`seed` is -1; allowed: a whole number >= 0"),
        (["dtype=float16"], "`dtype` is float16; allowed: float32, float64"),
        (["device=tpu"], "`device` is tpu; allowed: auto, cpu, cuda"),
        (["potential.eta=0"], "`potential.eta` is 0.0; allowed: a finite number > 0"),
        (["potential.eta=inf"], "`potential.eta` is inf; allowed: a finite number > 0"),
        (["potential.eta=nan"], "`potential.eta` is nan; allowed: a finite number > 0"),
        (
            ["potential.name=cubik"],
            "`potential.name` is cubik; allowed: " + ", ".join(sorted(POTENTIALS)),
        ),
        (
            ["+potential.options.p=3"],
            "`potential.options` is {'p': 3}: potential `quad` has no option `p`; "
            "its options: none",
        ),
        (
            ["potential=cubic", "potential.options.eps=-1"],
            "`potential.options` is {'eps': -1}: `eps` is -1.0; allowed: a finite number >= 0",
        ),
        (
            ["potential=cubic", "potential.options.eps=abc"],
            "`potential.options` is {'eps': 'abc'}: `eps` is abc; allowed: a number",
        ),
        (["algorithm.name=adam"], "`algorithm.name` is adam; allowed: consensus, easgd, msgd"),
        (
            ["algorithm.lam=0"],
            "`algorithm.lam` is 0.0; allowed: a number > 0 (inf uncouples the workers)",
        ),
        (
            ["algorithm.lam=nan"],
            "`algorithm.lam` is nan; allowed: a number > 0 (inf uncouples the workers)",
        ),
        (["algorithm.tau=0"], "`algorithm.tau` is 0.0; allowed: a finite number > 0"),
        (["algorithm.tau=inf"], "`algorithm.tau` is inf; allowed: a finite number > 0"),
        (["algorithm.sigma=-1"], "`algorithm.sigma` is -1.0; allowed: a finite number > 0"),
        (["algorithm.sigma=nan"], "`algorithm.sigma` is nan; allowed: a finite number > 0"),
        (["algorithm.momentum=1"], "`algorithm.momentum` is 1.0; allowed: a number in [0, 1)"),
        (["algorithm.momentum=-0.1"], "`algorithm.momentum` is -0.1; allowed: a number in [0, 1)"),
        (
            ["algorithm.weight_decay=-1"],
            "`algorithm.weight_decay` is -1.0; allowed: a finite number >= 0",
        ),
        (
            ["algorithm.weight_decay=inf"],
            "`algorithm.weight_decay` is inf; allowed: a finite number >= 0",
        ),
        (["algorithm.batch_size=0"], "`algorithm.batch_size` is 0; allowed: a whole number >= 1"),
        (["algorithm.iterations=0"], "`algorithm.iterations` is 0; allowed: a whole number >= 1"),
        (["algorithm.period=0"], "`algorithm.period` is 0; allowed: a whole number >= 1"),
        (["algorithm.order=both"], "`algorithm.order` is both; allowed: gauss_seidel, jacobi"),
        (["algorithm.momentum_on=u"], "`algorithm.momentum_on` is u; allowed: loss, objective"),
        (["algorithm.u_step_on=u"], "`algorithm.u_step_on` is u; allowed: coupling, objective"),
        (
            ["algorithm.loss_reduction=max"],
            "`algorithm.loss_reduction` is max; allowed: mean, sum",
        ),
        (
            ["algorithm.schedule.lam.name=sine"],
            "`algorithm.schedule.lam.name` is sine; allowed: constant, cosine, linear, step",
        ),
        (
            ["algorithm.schedule.tau.name=step", "+algorithm.schedule.tau.options.every=0"],
            "`algorithm.schedule.tau.options` is {'every': 0}: `every` is 0; allowed: a whole "
            "number >= 1",
        ),
        (
            ["algorithm.sigma=1e30", "algorithm.lam=1e-9"],
            "`algorithm.lam` is 1e-09; allowed: a number for which sigma / lam and tau / lam fit "
            "float32, below 3.4e+38",
        ),
        (
            ["algorithm=easgd", "algorithm.momentum_on=objective"],
            "`algorithm.momentum_on` is objective; allowed: loss for algorithm=easgd: the elastic "
            "force acts outside the velocity",
        ),
        (
            ["algorithm.coupling=implicit", "algorithm.order=jacobi"],
            "`algorithm.coupling` is implicit; allowed: explicit with order=jacobi: the proximal "
            "step is around u+",
        ),
        (
            ["algorithm=easgd", "algorithm.u_update=exact"],
            "`algorithm.u_update` is exact; allowed: gradient for algorithm=easgd",
        ),
        (
            ["algorithm=msgd", "algorithm.coupling=implicit"],
            "`algorithm.coupling` is implicit; allowed: explicit for algorithm=msgd",
        ),
        (
            ["algorithm.coupling=loose"],
            "`algorithm.coupling` is loose; allowed: explicit, implicit",
        ),
        (
            ["algorithm.u_update=newton"],
            "`algorithm.u_update` is newton; allowed: exact, gradient",
        ),
        (
            ["algorithm=easgd", "algorithm.schedule.tau.name=cosine"],
            "`algorithm.schedule.tau` is ScheduleConfig(name='cosine', options={}); allowed: the "
            "schedule of sigma, for algorithm=easgd, whose step is symmetric (algorithm=consensus "
            "is free)",
        ),
        (
            [
                "algorithm.schedule.lam.name=step",
                "+algorithm.schedule.lam.options={every: 1, factor: 0.01}",
            ],
            "`algorithm.schedule.lam` is a factor from 0 to 1; allowed: finite factors > 0",
        ),
        (
            [
                "algorithm.iterations=22",
                "algorithm.schedule.lam.name=step",
                "+algorithm.schedule.lam.options={every: 1, factor: 0.01}",
            ],
            "`algorithm.lam` is 1e-43; allowed: a number for which sigma / lam and tau / lam fit "
            "float32, below 3.4e+38",
        ),
        (["data.name=cifar"], "`data.name` is cifar; allowed: digits, mnist"),
        (
            ["data.partition=half"],
            "`data.partition` is half; allowed: full, label_skew, sharded",
        ),
        (["data.alpha=0"], "`data.alpha` is 0.0; allowed: a finite number > 0"),
        (["model.name=resnet"], "`model.name` is resnet; allowed: lenet5, logistic, mlp"),
        (
            ["+model.options.num_classes=3"],
            "`model.options` is {'num_classes': 3}; allowed: none called num_classes: "
            "the data say it",
        ),
        (["group.name=mpi"], "`group.name` is mpi; allowed: auto, gloo, nccl"),
        (["group.timeout_s=0"], "`group.timeout_s` is 0.0; allowed: a number of seconds >= 1"),
        (["group.timeout_s=inf"], "`group.timeout_s` is inf; allowed: a number of seconds >= 1"),
        (["group.compress=fp8"], "`group.compress` is fp8; allowed: null, bf16"),
        (
            ["device=cpu", "group=nccl"],
            "`group` is nccl; allowed: auto or gloo with device=cpu: NCCL moves CUDA tensors only",
        ),
        (["output.eval_every=0"], "`output.eval_every` is 0; allowed: a whole number >= 1"),
        (["output.log_every=0"], "`output.log_every` is 0; allowed: a whole number >= 1"),
        (
            ["stationarity.every=0"],
            "`stationarity.every` is 0; allowed: a whole number >= 1, or null for never",
        ),
        (
            ["stationarity.samples=0"],
            "`stationarity.samples` is 0; allowed: a whole number >= 1, or null for all",
        ),
        (
            ["stationarity.tolerance=1"],
            "`stationarity.tolerance` is 1.0; allowed: a number in (0, 1)",
        ),
        (["stationarity.budget=1"], "`stationarity.budget` is 1; allowed: a whole number >= 2"),
        (
            ["stationarity.lam=0"],
            "`stationarity.lam` is 0.0; allowed: a finite number > 0, or null",
        ),
        (
            ["stationarity.batch_size=0"],
            "`stationarity.batch_size` is 0; allowed: a whole number >= 1",
        ),
        (["output.name=a/b"], "`output.name` is 'a/b'; allowed: a word without `/`"),
        (['output.name=""'], "`output.name` is ''; allowed: a word without `/`"),
        (
            ["algorithm=easgd", "algorithm.order=gauss_seidel"],
            f"`algorithm.order` is gauss_seidel; allowed: jacobi, {EASGD}",
        ),
        (
            ["algorithm=easgd", "algorithm.u_step_on=coupling"],
            f"`algorithm.u_step_on` is coupling; allowed: objective, {EASGD}",
        ),
        (
            ["algorithm=easgd", "algorithm.tau=0.1"],
            f"`algorithm.tau` is 0.1; allowed: algorithm.sigma = 0.005, {EASGD}",
        ),
        (
            ["algorithm=easgd", "potential=tan"],
            "`potential` is tan; allowed: quad for algorithm=easgd (algorithm=consensus takes any)",
        ),
        (
            ["algorithm=msgd", "potential=cubic"],
            "`potential` is cubic; allowed: quad for algorithm=msgd (algorithm=consensus takes "
            "any)",
        ),
        (
            ["algorithm=msgd", "algorithm.period=2"],
            "`algorithm.period` is 2; allowed: 1 for algorithm=msgd",
        ),
        (
            ["plugins=[no.such.module]"],
            "`plugins` names no.such.module; allowed: modules on the Python path "
            "(No module named 'no')",
        ),
        (["plugins=['']"], "`plugins` is ''; allowed: names of modules on the Python path"),
        (["plugins=[.mine]"], "`plugins` is '.mine'; allowed: names of modules on the Python path"),
    ],
)  # fmt: skip
def test_checks_of_the_config(refusal, overrides, line):
    if "potential.name=cubik" in overrides:
        assert {"quad", "cubic", "tan", "tan_sep", "log", "log_sep"} <= set(POTENTIALS)
    assert refusal(*overrides) == line


def test_what_is_just_inside_passes(make_config):
    edges = ["workers=1", "algorithm.lam=inf", "algorithm.momentum=0", "algorithm.weight_decay=0"]
    ones = [f"algorithm.{name}=1" for name in ("batch_size", "iterations", "period")]
    config = make_config(*edges, *ones, "group.timeout_s=1", "output.log_every=1")
    assert (config.workers, config.algorithm.lam, config.algorithm.momentum) == (1, math.inf, 0)


def test_easgd_takes_tau_from_sigma(make_config):
    algorithm = make_config("algorithm=easgd", "algorithm.sigma=0.01").algorithm
    assert (algorithm.name, algorithm.tau, algorithm.sigma) == ("easgd", 0.01, 0.01)
    assert (algorithm.order, algorithm.u_step_on) == ("jacobi", "objective")


def test_a_saved_config_is_the_same_config(make_config, tmp_path):
    config = make_config(
        "potential=scaled_quad",
        "potential.options.weight=[1.0,2.5,3]",
        "algorithm.lam=1e-4",
        "algorithm.schedule.sigma.name=cosine",
        "+algorithm.schedule.sigma.options.warmup=5",
        "output.name=no",  # a boolean to a careless YAML reader
        "model=mlp",
        "workers=4",
    )
    OmegaConf.save(OmegaConf.structured(config), tmp_path / "config.yaml")
    loaded = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.load(tmp_path / "config.yaml"))
    assert OmegaConf.to_object(loaded) == config
    assert config.potential.options == {"weight": [1.0, 2.5, 3]}
    assert config.output.name == "no"


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


# ---- what depends on the launch: plan.py


@pytest.mark.parametrize(
    ("workers", "size", "expected"),
    [("null", 1, 1), ("null", 4, 4), (1, 1, 1), (4, 1, 4), (4, 2, 4), (4, 4, 4), (12, 3, 12)],
)
def test_workers_and_processes(make_config, workers, size, expected):
    config = make_config(f"workers={workers}")
    assert count_workers(config, Launch(0, size, 0, size)) == expected


@pytest.mark.parametrize(("workers", "size"), [(1, 2), (3, 2), (2, 4), (6, 4)])
def test_workers_must_be_a_multiple_of_the_processes(make_config, workers, size):
    with pytest.raises(ConfigError) as caught:
        count_workers(make_config(f"workers={workers}"), Launch(0, size, 0, size))
    assert str(caught.value) == (
        f"`workers` is {workers}; allowed: a multiple of the {size} processes (WORLD_SIZE), "
        "or null for one each"
    )


def test_the_plan_deals_out_the_workers(make_config):
    config = make_config("workers=4", "model=logistic", "data.partition=sharded", "device=cpu")
    for rank, block in [(0, [0, 1]), (1, [2, 3])]:
        plan = make_plan(config, Launch(rank, 2, rank, 2))
        assert plan.num_workers == 4
        assert list(plan.local_workers) == block
        assert [source.worker for source in plan.oracle.minibatches] == block
        assert plan.shard_sizes == (359,) * 4  # 1437 // 4
        assert plan.epochs(100) == pytest.approx(100 * 20 / 359)
        assert plan.backend == "gloo"


def test_msgd_is_one_worker_in_one_process(make_config):
    config = make_config("algorithm=msgd", "workers=4")
    assert count_workers(config, Launch()) == 1
    with pytest.raises(ConfigError) as caught:
        count_workers(config, Launch(1, 2, 1, 2))
    assert str(caught.value) == (
        "`algorithm` is msgd; allowed: one process, since it is one worker, but there are 2: "
        "start it with `python -m consensus.train` or --nproc-per-node=1"
    )


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            ["algorithm.batch_size=1438"],
            "`algorithm.batch_size` is 1438; allowed: at most 1437, the images in the shard of "
            "worker 0 (data.partition=full, 4 workers)",
        ),
        (
            ["algorithm.batch_size=360", "data.partition=sharded"],
            "`algorithm.batch_size` is 360; allowed: at most 359, the images in the shard of "
            "worker 0 (data.partition=sharded, 4 workers)",
        ),
        (
            ["workers=1438", "data.partition=sharded"],
            "`data.partition` is 'sharded' with 1438 workers and 1437 samples; allowed: at most "
            "as many workers as samples",
        ),
        (
            ["data.partition=label_skew", "data.alpha=1e10"],
            "`data.alpha` is 10000000000.0; allowed: a number in (0, 1e9]",
        ),
        (
            ["model=mlp", "model.options.hidden=[8,0]"],
            "`model` is mlp {'num_classes': 10, 'hidden': [8, 0]}: `model.hidden` is [8, 0]; "
            "allowed: positive integers",
        ),
        (
            ["+model.options.depth=3"],
            "`model` is logistic {'num_classes': 10, 'depth': 3}: model `logistic` has no option "
            "`depth`; its options: num_classes",
        ),
        (
            ["potential=scaled_quad", "potential.options.weight=[1,2]"],
            "`potential.options` is {'weight': [1, 2]}: `weight` has 2 entries; allowed: 1, "
            "1 (one a layer) or 7850 (one a coordinate)",
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("rank", [0, 1])
def test_checks_of_the_plan_are_the_same_on_every_rank(plan_refusal, overrides, line, rank):
    assert plan_refusal(Launch(rank, 2, rank, 2), "workers=4", *overrides) == line


def test_data_that_are_not_there(plan_refusal, tmp_path):
    (tmp_path / "file").touch()
    root = tmp_path / "file" / "data"  # cannot be made: nothing is asked of the network
    line = plan_refusal(Launch(), "data=mnist", f"data.root={root}")
    assert line.startswith(f"`data.root` is '{root}': MNIST is not in {root}/MNIST/raw and cannot")
    assert line.endswith("or use data=digits, which needs no files")


def test_directories_that_hold_a_run_are_refused(plan_refusal, make_config, tmp_path):
    run_dir = tmp_path / "run"
    start = f"`output.run_dir` is {run_dir}; allowed: an empty or new directory; this one holds"
    run_dir.mkdir()
    config = make_config(f"output.run_dir={run_dir}", "model=logistic", "device=cpu")
    assert make_plan(config, Launch()).config is config  # an empty one is welcome
    (run_dir / "metrics.jsonl").touch()
    line = plan_refusal(Launch(), f"output.run_dir={run_dir}")
    assert line == f"{start} an unfinished run (metrics.jsonl); resume=auto continues it"
    (run_dir / "summary.json").touch()
    line = plan_refusal(Launch(), f"output.run_dir={run_dir}")
    assert line == f"{start} a finished run (summary.json); resume=auto continues it"
    file = run_dir / "summary.json"
    assert plan_refusal(Launch(), f"output.run_dir={file}") == (
        f"`output.run_dir` is {file}; allowed: a directory, or a path where none exists yet"
    )


@pytest.fixture
def cuda_devices(monkeypatch):
    """`cuda_devices(n)`: torch sees n CUDA devices."""

    def pretend(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return pretend


def test_devices(make_config, cuda_devices):
    cuda_devices(2)
    auto = make_config("device=auto")
    chosen = [choose_device(auto, Launch(r, 4, r, 4)) for r in range(4)]
    assert chosen == [torch.device("cuda", i) for i in (0, 1, 0, 1)]
    assert choose_device(make_config("device=cpu"), Launch()) == torch.device("cpu")
    cuda_devices(0)
    assert choose_device(auto, Launch()) == torch.device("cpu")
    with pytest.raises(ConfigError) as caught:
        choose_device(make_config("device=cuda"), Launch())
    assert str(caught.value) == "`device` is cuda; allowed: cpu or auto: no CUDA device"


def test_nccl_without_a_device_is_refused(make_config, cuda_devices):
    cuda_devices(0)
    with pytest.raises(ConfigError) as caught:
        make_plan(make_config("group=nccl"), Launch(0, 2, 0, 2))
    assert str(caught.value) == (
        "`group` is nccl; allowed: gloo or auto here: NCCL moves CUDA tensors only"
    )
