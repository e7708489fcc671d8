"""The configs of a sweep are those that Hydra composes for each run by itself."""

from pathlib import Path
from unittest import mock

import pytest
from hydra import compose
from omegaconf import OmegaConf

from consensus.run.compose import composing, explain, is_refusal
from consensus.sweep import composer as module
from consensus.sweep.composer import Composer
from consensus.sweep.grid import read_sweep, register_sweep_schema
from tests.testing import ROOT

GRIDS = sorted(path.stem for path in Path(ROOT, "configs", "grid").glob("*.yaml"))


def content(config):
    return OmegaConf.to_container(config, resolve=False), OmegaConf.is_struct(config)


def outcome(make, overrides):
    """Content of a config, or the line that refuses it."""
    try:
        return content(make(overrides))
    except Exception as error:
        if not is_refusal(error):
            raise
        return explain(error)


def by_hydra(overrides):
    return compose("train", overrides=list(overrides))


@pytest.mark.parametrize("grid", GRIDS)
def test_the_configs_of_a_grid_are_those_of_hydra(grid):
    with composing("sweep", []):
        register_sweep_schema()
        jobs = read_sweep([f"grid={grid}"]).jobs
        composer = Composer()
        for job in jobs[:: max(1, len(jobs) // 12)]:
            composed = composer.compose(job.overrides)
            assert content(composed) == content(by_hydra(job.overrides))


CASES = [
    ["algorithm.lam=0.2", "algorithm.lam=0.3"],
    ["algorithm.tau=${algorithm.sigma}", "algorithm.sigma=0.5"],
    ["potential.eta=2", "potential=tan"],  # the file first, then the value
    ["potential=tan", "potential=log", "potential.eta=2"],
    ["potential=tan", "potential={eta: 3}", "potential.eta=2"],
    ["potential.eta=2", "potential={eta: 3}"],
    ["+algorithm.schedule.sigma.options.final=0.1", "algorithm.schedule.sigma.name=cosine"],
    ["algorithm.schedule.sigma.name=cosine", "++algorithm.schedule.sigma.options.final=0.1"],
    ["+loss.options={a: 1}", "~loss.options.a"],
    ["~experiment"],
    ["experiment=smoke", "algorithm.iterations=7"],
    ["+experiment=smoke"],
    ["hydra.job.name=x", "algorithm.lam=0.2"],
    ["hydra/job_logging=none", "algorithm.lam=0.2"],
    ["plugins=[a,b]", "output.name=a=b"],
    # refused
    ["potential=tann"],
    ["potentiall=tan"],
    ["algorithm.lamm=0.1"],
    ["algorithm.lam=much"],
    ["algorithm=3"],
    ["+algorithm.lam=0.1"],
    ["~algorithm.lamm"],
    ["algorithm.lam=0.1,0.2"],
    ["algorithm.lam=[0.1"],
    ["data@model=digits"],
    ["grid=smoke"],
]


@pytest.mark.parametrize("overrides", CASES, ids=" ".join)
def test_every_kind_of_override_does_what_it_does_for_hydra(overrides):
    with composing("test", []):
        composer = Composer()
        expected = outcome(by_hydra, overrides)
        assert outcome(composer.compose, overrides) == expected
        assert outcome(composer.compose, overrides) == expected  # from the copy


def test_files_are_merged_once_for_all_values():
    with composing("test", []), mock.patch.object(module, "compose", wraps=compose) as merges:
        composer = Composer()
        found = [
            composer.compose([f"potential={name}", f"algorithm.lam={lam}"])
            for lam in (0.1, 0.2, 0.3)
            for name in ("quad", "tan")
        ]
    assert merges.call_count == 2
    assert [c.potential.name for c in found] == ["quad", "tan"] * 3
    assert [c.algorithm.lam for c in found] == [0.1, 0.1, 0.2, 0.2, 0.3, 0.3]
