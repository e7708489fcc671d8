"""Grids and command lines, against their runs, written out by hand."""

from itertools import product

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra

from consensus.run.compose import (
    REFUSALS,
    composing,
    config_dir,
    explain,
    register_schema,
    to_config,
)
from consensus.sweep.grid import LONGEST_NAME, check, read_sweep, register_sweep_schema

POTENTIALS = ["quad", "cubic", "tan", "tan_sep", "log", "log_sep"]


@pytest.fixture(autouse=True)
def hydra():
    register_schema()
    register_sweep_schema()
    with initialize_config_dir(config_dir(), version_base="1.3", job_name="sweep"):
        yield


def runs(*arguments):
    return [
        dict(text.split("=", 1) for text in job.overrides) for job in read_sweep(arguments).jobs
    ]


def test_paths_and_names_are_text(tmp_path):
    values = "a=1,991_2"
    assert [run["output.name"] for run in runs(f"output.name={values}")] == ["'a=1'", "'991_2'"]
    sweep = read_sweep(["seed=1", f"sweep.dir={tmp_path}/(a,b)=é"])
    assert sweep.path == tmp_path / "(a,b)=é"


def test_table_1_is_432_configurations():
    found = runs("grid=table1")
    tied = "$\\{algorithm.sigma\\}"  # as Hydra's parser prints it
    expected = [
        {
            "experiment": "table1_cell",
            "potential": potential,
            "potential.eta": eta,
            "algorithm.lam": lam,
            "algorithm.sigma": sigma,
            "algorithm.tau": tied,
            "algorithm.momentum": momentum,
        }
        for potential, eta, lam, sigma, momentum in product(
            POTENTIALS,
            ["0.5", "1.0", "2.0"],
            ["0.1", "0.05", "0.025", "0.01", "0.005", "0.0025"],
            ["0.001", "0.005"],
            ["0.9", "0.99"],
        )
    ]
    assert found == expected
    assert len(found) == 432
    config = to_config(
        compose("train", overrides=["algorithm.sigma=0.25", f"algorithm.tau={tied}"])
    )
    assert config.algorithm.tau == 0.25


def test_figure_1_has_both_panels_and_momentum_sgd():
    found = [
        (r["experiment"], r.get("potential", r.get("algorithm"))) for r in runs("grid=figure1")
    ]
    both = ["figure1_4", "figure1_8"]
    assert found == [*product(both, POTENTIALS), *product(both, ["msgd"])]


def test_the_methods_train_on_the_same_samples():
    found = runs("grid=methods", "seed=1")
    sizes = {(r["algorithm"], r.get("potential"), r["algorithm.sigma"]) for r in found}
    assert sizes == {
        ("ddp", None, "0.002"),
        ("diloco", None, "0.002"),
        ("local_sgd", None, "0.001"),
        ("easgd", None, "0.001"),
        ("consensus", "tan", "0.002"),
    }
    keys = ("workers", "algorithm.iterations", "data.partition", "seed")
    assert {tuple(r[key] for key in keys) for r in found} == {("4", "360", "sharded", "1")}


@pytest.mark.parametrize(
    "grid", ["table1", "table1_small", "figure1", "conventions", "methods", "smoke"]
)
def test_every_grid_has_valid_runs_with_distinct_names(grid):
    sweep = read_sweep([f"grid={grid}"])
    check(sweep)
    assert str(sweep.path) == f"runs/{grid}"
    names = [job.name for job in sweep.jobs]
    assert len(set(names)) == len(names)
    assert len(names) > 1


def test_the_command_line_overrides_a_grid():
    found = runs("grid=smoke", "seed=3", "algorithm.lam=range(1,3)", "+data.options.x=1")
    assert [(r["potential"], r["algorithm.lam"], r["seed"]) for r in found] == [
        (potential, lam, "3") for potential, lam in product(["quad", "tan"], ["1", "2"])
    ]
    assert all(r["+data.options.x"] == "1" for r in found)


def test_a_grid_may_have_mappings(tmp_path):
    (tmp_path / "grid").mkdir()
    (tmp_path / "grid" / "mine.yaml").write_text(
        "name: mine\nparts:\n  - algorithm.tau: null\n    algorithm.outer:\n"
        "      - {optimizer: SGD, lr: 0.7, nesterov: false}\n"
        "      - {optimizer: AdamW, betas: [0.9, 0.99]}\n"
    )
    GlobalHydra.instance().clear()
    with composing("sweep", [f"--config-dir={tmp_path}", "grid=mine"]) as (others, _):
        register_sweep_schema()
        sweep = read_sweep(others)
        found = [sweep.config(job).algorithm.outer for job in sweep.jobs]
    assert found == [
        {"optimizer": "SGD", "lr": 0.7, "nesterov": False},
        {"optimizer": "AdamW", "betas": [0.9, 0.99]},
    ]


def test_without_a_grid():
    sweep = read_sweep(["potential=quad,tan", "model.options.hidden=[8],[8,8]", "model=mlp"])
    assert str(sweep.path) == "runs/sweep"
    assert [job.overrides for job in sweep.jobs] == [
        (f"potential={p}", f"model.options.hidden={h}", "model=mlp")
        for p, h in product(["quad", "tan"], ["[8]", "[8,8]"])
    ]
    assert [job.overrides for job in read_sweep([]).jobs] == [()]


def test_names_hold_the_keys_that_vary():
    sweep = read_sweep(["potential=quad,tan", "algorithm.lam=0.1,0.2", "seed=4"])
    assert [job.name for job in sweep.jobs] == [
        f"potential={p},lam={lam}" for p, lam in product(["quad", "tan"], ["0.1", "0.2"])
    ]
    (job,) = read_sweep(["seed=4"]).jobs
    assert job.name == "run"
    two = read_sweep(["algorithm.schedule.tau.name=a,b", "algorithm.schedule.sigma.name=c,d"])
    first = two.jobs[0].name
    assert first == "algorithm.schedule.tau.name=a,algorithm.schedule.sigma.name=c"


def test_names_are_valid_directory_names_and_distinct():
    long = ",".join("x" * 300 + end for end in "ab")
    odd = "'a/b','a-b','../c'"
    for values in (long, odd):
        names = [job.name for job in read_sweep([f"output.name={values}"]).jobs]
        assert len(set(names)) == len(names) > 1
        assert all(len(name) <= LONGEST_NAME and "/" not in name for name in names)
        assert not any(name.startswith(".") for name in names)


def test_equal_runs_are_merged():
    assert len(read_sweep(["seed=1,1,2"]).jobs) == 2


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["grid=table2"],
            "`grid` is table2; allowed: choose_identical, choose_skew, ",
        ),
        (["potential="], "`potential` is nothing; allowed: a value, or values between commas"),
        (["potential=quad,,tan"], "`potential` is quad,,tan; allowed: a value, or values between"),
        (["potential=quad,tann"], "`potential` is tann; allowed: cubic, huber"),
        (["grid=smoke", "potential.etta=1"], "unknown key `potential.etta` (did you mean `eta`?)"),
        (["algorithm.lam=0.1,-1"], "`algorithm.lam` is -1.0; allowed: "),
        (["grid=smoke", "workers=3,4", "sweep.processes=2"], "`sweep.processes` is 2; allowed: a "),
        (["sweep.jobs=0"], "`sweep.jobs` is 0; allowed: a whole number >= 1"),
        (["sweep.jobs=two"], "`sweep.jobs` is 'two'; allowed: a whole number >= 1"),
        (["sweep.jobs=null"], "`sweep.jobs` is null; allowed: a whole number >= 1"),
        (["sweep.screening_seeds=x"], "`sweep.screening_seeds` is 'x'; allowed: null, or a number"),
        (["sweep.processes=0"], "`sweep.processes` is 0; allowed: a whole number >= 1"),
        (["sweep.dir=''"], "`sweep.dir` is ; allowed: a path or null"),
        (
            ["sweep.job=2"],
            "unknown key `sweep.job` (did you mean `sweep.jobs`?); allowed in `sweep`: sweep.dir, ",
        ),
        (["lam=0.1"], "unknown key `lam` (did you mean `algorithm.lam`?); allowed in"),
        (["algorithm.lr=1"], "unknown key `algorithm.lr` (did you mean `algorithm.sigma`?)"),
        (
            ["algorithm.lam=interval(0.01,0.1)"],
            "`algorithm.lam` is interval(0.01,0.1); allowed: values between commas, choice(...) or "
            "range(START, STOP, STEP), which can be listed",
        ),
        (["+data.options.x=tag(a,interval(0,1))"], "`+data.options.x` is tag(a,interval(0,1)); "),
        (["grid=smoke", "seed=int(interval(0,9))"], "`seed` is int(interval(0,9)); allowed: "),
        (
            ["algorithm.lam=glob(*)"],
            "`algorithm.lam` is glob(*), which stands for no value; allowed: at least one value",
        ),
        (
            ["data=glob(x*)"],
            "`data` is glob(x*), which stands for no value; allowed: names or patterns among "
            "digits, mnist",
        ),
        (["seed=range(3,3)"], "`seed` is range(3,3), which stands for no value; allowed: at least"),
        (
            ["--dry"],
            "`--dry` is no argument of a sweep; allowed: KEY=VALUE and --config-dir=FOLDER",
        ),
        (["output.run_dir=a"], "`output.run_dir` is set; allowed: nothing here"),
        (["resume=auto"], "`resume` is set; allowed: nothing here"),
        (["grid=without_parts"], "`grid.parts` is []; allowed: at least one part"),
        (["grid=without_seeds"], "`grid: seed` is []; allowed: at least one value"),
    ],
)
def test_bad_grids_are_refused_in_one_line(arguments, line):
    store = ConfigStore.instance().store
    store(group="grid", name="without_parts", node={"parts": []})
    store(group="grid", name="without_seeds", node={"parts": [{"seed": []}]})
    with pytest.raises(REFUSALS) as caught:
        check(read_sweep(arguments))
    assert explain(caught.value).startswith(line)
