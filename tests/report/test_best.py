"""The best configuration as an experiment: its command composes to the config of the run."""

from dataclasses import asdict
from pathlib import Path

import pytest
from hydra import compose
from omegaconf import OmegaConf

from consensus.report.best import best_files, best_of_each, command, sentence
from consensus.report.page import write_report
from consensus.report.runs import read_run
from consensus.report.table1 import table1
from consensus.run.compose import composing, to_config
from consensus.run.overrides import take_as_text
from tests.testing import ROOT
from tests.testing.made_runs import FIRST, SECOND, config, row, run

PLACES = ["output.run_dir=runs/a", "resume=auto", "data.root=/a, b=c"]
OPTIONS = [
    "potential=cubic", "potential.options.eps=0.5", "workers=2", "seed=3", "model=mlp",
    "model.options.hidden=[7]", "+loss.options.label_smoothing=0.1", "data.validation=0.25",
    "algorithm.optimizer={optimizer: AdamW, lr: 1e-5, betas: [0.9, 0.99]}", "output.eval_every=7",
]  # fmt: skip
METHOD = [
    "algorithm=diloco", "workers=3", "algorithm.schedule.sigma.name=step",
    "+algorithm.schedule.sigma.options.every=10000", "algorithm.momentum=0",
]  # fmt: skip


def composed(*arguments):
    with composing("train", arguments) as (others, _):
        return to_config(compose("train", overrides=others))


def written(path, config):
    """A run directory with the config.yaml that a run writes."""
    path.mkdir()
    (path / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
    (path / "summary.json").write_text("{}")


@pytest.mark.usefixtures("blank_figures")
@pytest.mark.parametrize("trained", [OPTIONS, METHOD], ids=["options", "method"])
def test_the_command_composes_to_the_config_of_the_best_run(tmp_path, trained):
    best = composed(*take_as_text([*trained, *PLACES]))
    other = composed(*trained, "algorithm.batch_size=5")
    written(tmp_path / "a", best)
    written(tmp_path / "b", other)
    runs = [
        read_run("a", tmp_path / "a", [row(1, 1, 1, 1, 0.5)]),
        read_run("b", tmp_path / "b", [row(1, 1, 1, 1, 0.7)]),
    ]
    folder = tmp_path / "a report"
    write_report(runs, folder, ["x"])
    (line,) = [x for x in (folder / "report.md").read_text().splitlines() if "To train it" in x]
    assert f"`{command('best', folder)}`" in line
    found = composed(f"--config-dir={folder}", "experiment=best")
    expected = asdict(best)
    expected["output"]["run_dir"] = None
    expected["resume"] = "never"
    assert asdict(found) == expected
    changed = composed(f"--config-dir={folder}", "experiment=best", "seed=9")
    assert asdict(changed) == expected | {"seed": 9}


def test_the_page_on_sweeps_names_the_command():
    page = (ROOT / "docs" / "sweeps.md").read_text(encoding="utf-8")
    assert f"`{command('best', Path('runs/mine/report'))}`" in page


def test_the_sentence_has_the_spread_of_the_seeds():
    runs = [
        run(config(lam=lam, seed=s), row(1, 1, 1, 1, 10 * lam + s))
        for lam in (0.1, 0.2)
        for s in (0, 1)
    ]
    runs += [run(config("tan", lam=0.1), row(1, 1, 1, 1, 4.0))]
    (found,) = best_of_each(table1(runs)).values()
    # 1 and 2: mean 1.5, deviation sqrt(1 / 2)
    assert sentence(*found) == (
        "Best in test error: quad, 1.50 ± 0.71 (2 seeds), with algorithm.lam=0.1"
    )


def test_several_problems_have_a_best_each(tmp_path):
    runs = [run(config(lam=lam), last) for lam, last in ((0.1, FIRST), (0.2, SECOND))]
    runs += [run(config(data__name="my data"), SECOND), run(config("tan"), None, finished=False)]
    records = table1(runs)
    assert {
        name: best.config["algorithm.lam"] for name, (_, best) in best_of_each(records).items()
    } == {
        "best_digits_lenet5": 0.2,
        "best_my-data_lenet5": 0.1,
    }
    assert best_files(records, tmp_path) == {}, "of runs whose whole config is not known"
