"""The config: its defaults, its types, and the exact line of every refusal."""

import dataclasses
import math
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from consensus.comm import Launch
from consensus.core.potentials import POTENTIALS
from consensus.run.checks import ConfigError
from consensus.run.compose import config_dir
from consensus.run.config import Config
from consensus.run.plan import make_plan

CONFIGS = Path(config_dir())

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
    "algorithm.pull": None,
    "algorithm.outer": None,
    "algorithm.local_pull": 0.0,
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
    assert "\nroot: runs " in f"\n{defaults}"


# ---- every check of config.py

EASGD = "for algorithm=easgd, whose step is symmetric (algorithm=consensus is free)"


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["workers=0"], "`workers` is 0; allowed: null, or a whole number >= 1"),
        (["output.run_dir=''"], "`output.run_dir` is ''; allowed: the path of a file or folder"),
        (["output.root=''"], "`output.root` is ''; allowed: the path of a file or folder"),
        (["seed=-1"], "`seed` is -1; allowed: a whole number >= 0"),
        (["dtype=float16"], "`dtype` is float16; allowed: bfloat16, float32, float64"),
        (["device=tpu"], "`device` is tpu; allowed: auto, cpu, cuda"),
        (["potential.eta=0"], "`potential.eta` is 0.0; allowed: a finite number > 0"),
        (["potential.eta=inf"], "`potential.eta` is inf; allowed: a finite number > 0"),
        (["potential.eta=nan"], "`potential.eta` is nan; allowed: a finite number > 0"),
        (
            ["potential.eta=1e-20"],
            "`potential.eta` is 1e-20; allowed: 5.4e-20 to 9.2e+18 with dtype=float32",
        ),
        (
            ["potential.eta=1e19"],
            "`potential.eta` is 1e+19; allowed: 5.4e-20 to 9.2e+18 with dtype=float32",
        ),
        (
            ["potential.eta=1e154", "dtype=float64"],
            "`potential.eta` is 1e+154; allowed: 7.5e-155 to 6.7e+153 with dtype=float64",
        ),
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
        (
            ["algorithm.name=adam"],
            "`algorithm.name` is adam; allowed: consensus, ddp, diloco, easgd, "
            "fedprox, local_sgd, lookahead, msgd",
        ),
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
        (
            ["algorithm.lam=0.1", "algorithm.pull=0.3"],
            "`algorithm.lam` is 0.1; allowed: null beside algorithm.pull = 0.3, which replaces it "
            "(pull = 2 sigma / (lam eta^2))",
        ),
        (
            ["algorithm.outer=1", "algorithm.tau=0.005"],
            "`algorithm.tau` is 0.005; allowed: null beside algorithm.outer = 1.0, which replaces "
            "it (outer = 2 M tau / eta^2)",
        ),
        (
            ["algorithm.lam=null"],
            "`algorithm.lam` is null; allowed: a number > 0, or null where algorithm.pull is given",
        ),
        (
            ["algorithm.pull=1.5"],
            "`algorithm.pull` is 1.5; allowed: a number in [0, 1], or null for lam in its place",
        ),
        (
            ["algorithm.outer=-1"],
            "`algorithm.outer` is -1.0; allowed: a finite number >= 0, {optimizer: NAME IN "
            "torch.optim, OPTION: VALUE}, or null for tau in its place",
        ),
        (["algorithm.local_pull=2"], "`algorithm.local_pull` is 2.0; allowed: a number in [0, 1]"),
        (
            ["algorithm.pull=0.1", "algorithm.schedule.lam.name=linear"],
            "`algorithm.schedule.lam.name` is linear; allowed: constant with algorithm.pull, which "
            "follows no schedule",
        ),
        (
            ["algorithm.outer=1", "algorithm.u_step_on=objective"],
            "`algorithm.u_step_on` is objective; allowed: coupling with algorithm.outer, the step "
            "of u",
        ),
        (
            ["algorithm.outer=1", "algorithm.u_update=exact"],
            "`algorithm.u_update` is exact; allowed: gradient with algorithm.outer, the step of u",
        ),
        (
            ["algorithm.pull=1", "algorithm.coupling=implicit"],
            "`algorithm.coupling` is implicit; allowed: explicit with algorithm.pull, the rate of "
            "an explicit step",
        ),
        (
            ["algorithm.local_pull=1", "algorithm.coupling=implicit"],
            "`algorithm.coupling` is implicit; allowed: explicit with algorithm.local_pull, the "
            "rate of an explicit step",
        ),
        (
            ["algorithm.outer=1e10", "potential.eta=1e15"],
            "`algorithm.outer` is 10000000000.0; allowed: a number for which outer eta^2 fits "
            "float32, below 3.4e+38",
        ),
        (
            ["algorithm.pull=1", "algorithm.sigma=1e-30", "potential.eta=1e10"],
            "`algorithm.pull` is 1.0; allowed: a number for which 1 / lam = pull eta^2 / (2 sigma) "
            "fits float32, below 3.4e+38",
        ),
        (
            ["algorithm=easgd", "algorithm.outer=1"],
            f"`algorithm.outer` is 1.0; allowed: null, {EASGD}",
        ),
        (
            ["algorithm=msgd", "algorithm.pull=0.5"],
            "`algorithm.pull` is 0.5; allowed: null for algorithm=msgd",
        ),
        (
            ["algorithm=msgd", "algorithm.local_pull=0.5"],
            "`algorithm.local_pull` is 0.5; allowed: 0 for algorithm=msgd",
        ),
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
            "`data.partition` is half; allowed: by_label, full, label_skew, sharded",
        ),
        (["data.alpha=0"], "`data.alpha` is 0.0; allowed: a finite number > 0"),
        (["model.name=resnet"], "`model.name` is resnet; allowed: lenet5, logistic, mlp"),
        (
            ["+model.options.num_classes=3"],
            "`model.options` is {'num_classes': 3}; allowed: no num_classes; it comes "
            "from the data set",
        ),
        (["group.name=mpi"], "`group.name` is mpi; allowed: auto, gloo, nccl"),
        (["group.timeout_s=0"], "`group.timeout_s` is 0.0; allowed: a number of seconds >= 1"),
        (["group.timeout_s=inf"], "`group.timeout_s` is inf; allowed: a number of seconds >= 1"),
        (["group.compress=fp8"], "`group.compress` is fp8; allowed: null, bf16, int8"),
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
            "`plugins` is no.such.module; allowed: a module on the Python path or in the current "
            "folder, or the path of a file NAME.py (No module named 'no')",
        ),
        *(
            (
                [f"plugins=[{name}]"],
                f"`plugins` is {name}; allowed: a module on the Python path or in the current "
                "folder, or the path of a file NAME.py",
            )
            for name in ("''", ".mine", "nowhere.py", "a.b.py")
        ),
    ],
)  # fmt: skip
def test_refusals_of_the_config(refusal, overrides, line):
    if "potential.name=cubik" in overrides:
        assert {"quad", "cubic", "tan", "tan_sep", "log", "log_sep"} <= set(POTENTIALS)
    assert refusal(*overrides) == line


def test_values_at_the_limits_are_accepted(make_config):
    edges = ["workers=1", "algorithm.lam=inf", "algorithm.momentum=0", "algorithm.weight_decay=0"]
    ones = [f"algorithm.{name}=1" for name in ("batch_size", "iterations", "period")]
    config = make_config(*edges, *ones, "group.timeout_s=1", "output.log_every=1")
    assert (config.workers, config.algorithm.lam, config.algorithm.momentum) == (1, math.inf, 0)


def test_a_rate_takes_the_place_of_a_letter(make_config):
    algorithm = make_config("algorithm.pull=0.3", "algorithm.sigma=${algorithm.tau}").algorithm
    assert (algorithm.lam, algorithm.tau, algorithm.sigma) == (None, 0.005, 0.005)
    algorithm = make_config("algorithm.outer=1", "algorithm.lam=0.2").algorithm
    assert (algorithm.lam, algorithm.tau, algorithm.outer) == (0.2, None, 1.0)
    assert make_config("algorithm.pull=0", "algorithm.lam=null").coupled is False
    between = ["algorithm.pull=0", "algorithm.local_pull=0.1"]
    assert make_config(*between).coupled is False, "every iteration is a communication"
    assert make_config(*between, "algorithm.period=2").coupled is True


def test_easgd_takes_tau_from_sigma(make_config):
    algorithm = make_config("algorithm=easgd", "algorithm.sigma=0.01").algorithm
    assert (algorithm.name, algorithm.tau, algorithm.sigma) == ("easgd", 0.01, 0.01)
    assert (algorithm.order, algorithm.u_step_on) == ("jacobi", "objective")


def test_a_saved_config_is_the_same_config(make_config, tmp_path):
    config = make_config(
        "potential=scaled_quad",
        "potential.options.weight=[1.0,2.5,3]",
        "algorithm.pull=0.25",
        "algorithm.outer={optimizer: SGD, lr: 0.5, nesterov: false}",
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


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["workers=4"], "`workers` is 4; allowed: null: as many as there are"),
        (
            ["algorithm=msgd"],
            "`algorithm` is msgd; allowed: consensus, or another that couples workers",
        ),
        (
            ["algorithm=ddp"],
            "`algorithm` is ddp; allowed: consensus, or another that couples workers",
        ),
        (["algorithm.u_update=exact"], "`algorithm.u_update` is exact; allowed: gradient"),
        (["algorithm.period=3", "algorithm.delay=2"], "`algorithm.delay` is 2; allowed: 0"),
        *(
            (
                [f"data.partition={name}"],
                f"`data.partition` is {name}; allowed: full: shards depend on the number of "
                "workers",
            )
            for name in ("sharded", "label_skew", "by_label")
        ),
        (["group=nccl"], "`group` is nccl; allowed: auto, gloo"),
        (["group.sum=gather", "potential=huber"], "`group.sum` is gather; allowed: reduce"),
        (["group.compress=bf16"], "`group.compress` is bf16; allowed: null"),
        (["group.compress=int8"], "`group.compress` is int8; allowed: null"),
        (
            ["deterministic=true", "group.workers_per_process=2"],
            "`deterministic` is true; allowed: false, or group.workers_per_process=1",
        ),
    ],
)
def test_refusals_of_an_elastic_run(refusal, overrides, line):
    assert refusal("group.elastic=true", *overrides) == f"{line} with group.elastic=true"


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            ["group.workers_per_process=2"],
            "`group.workers_per_process` is 2; allowed: 1 without group.elastic=true",
        ),
        (
            ["group.min_workers=2"],
            "`group.min_workers` is 2; allowed: 1 without group.elastic=true",
        ),
        (
            ["group.elastic=true", "group.min_workers=0"],
            "`group.min_workers` is 0; allowed: a whole number >= 1",
        ),
        (
            ["group.elastic=true", "group.workers_per_process=0"],
            "`group.workers_per_process` is 0; allowed: a whole number >= 1",
        ),
        (
            ["group.replay=runs/mine", "group.elastic=true"],
            "`group.elastic` is true; allowed: false with group.replay",
        ),
        (
            ["group.replay=runs/mine"],
            "`deterministic` is false; allowed: true with group.replay, as in that run: else sums "
            "depend on the processes",
        ),
        (
            ["group.replay=runs/mine", "deterministic=true", "workers=2"],
            "`workers` is 2; allowed: null with group.replay",
        ),
        (
            ["group.replay=runs/mine", "deterministic=true", "resume=runs/mine"],
            "`resume` is RESUME; allowed: never with group.replay",
        ),
    ],
)
def test_refusals_around_elastic_runs(refusal, overrides, line):
    assert refusal(*overrides) == line.replace("RESUME", str(Path("runs/mine").absolute()))


def test_a_replay_of_no_elastic_run_is_refused(make_config, tmp_path):
    where = tmp_path / "none"
    config = make_config(f"group.replay={where}", "deterministic=true", "device=cpu")
    with pytest.raises(ConfigError) as caught:
        make_plan(config, Launch())
    line = str(caught.value)
    assert line.startswith(f"`group.replay` is {where}; allowed: the directory of an elastic run (")
    assert "\n" not in line
