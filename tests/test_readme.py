"""README and docs/coupling.md: their code runs, overrides compose, the tree and links exist."""

import re
import shlex

import pytest
import torch

from consensus.comm import Launch, Solo
from consensus.core.potentials import POTENTIALS
from consensus.run.compose import REFUSALS, explain
from consensus.run.plan import make_plan
from consensus.run.trainer import Trainer
from tests.testing import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
COUPLING = (ROOT / "docs" / "coupling.md").read_text(encoding="utf-8")
MODEL_SNIPPET, PLUGIN, LIBRARY, PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def section(title):
    return README.split(f"## {title}\n")[1].split("\n## ")[0]


def test_the_model_snippet_repeats_the_test_error_of_the_run(
    make_config, tmp_path, monkeypatch, capsys
):
    run_dir = tmp_path / "run"
    config = make_config(
        "experiment=digits",
        "stationarity.every=null",
        "algorithm.iterations=60",
        "output.eval_every=60",
        f"output.run_dir={run_dir}",
    )
    row = Trainer(make_plan(config, Launch()), Solo()).run()
    monkeypatch.setenv("RUN", str(run_dir))
    assert "consensus" not in MODEL_SNIPPET, "torch and scikit-learn suffice"
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import load_model

    assert "consensus" not in vars(load_model), "likewise"
    for program in (lambda: exec(MODEL_SNIPPET, {}), lambda: load_model.main([str(run_dir)])):
        capsys.readouterr()
        program()
        assert capsys.readouterr().out == f"test error {row['test_error']:.2f} %\n"
    assert row["test_error"] < 80.0, "60 iterations beat guessing, so the model is not the start"


def test_the_library_example_runs():
    exec(LIBRARY, {})


def test_training_from_python_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {"images": torch.zeros(3, 1, 28, 28)}
    exec(PYTHON, names)
    assert names["logits"].shape == (3, 10)
    assert names["result"].run_dir.parent == tmp_path / "runs"
    assert f"{names['result'].best} " in capsys.readouterr().out


def test_the_snippets_about_coupling_run_one_after_another(capsys):
    snippets = re.findall(r"```python\n(.*?)```", COUPLING, re.DOTALL)
    names = {}
    with torch.random.fork_rng():
        for snippet in snippets:
            exec(snippet, names)
    assert len(snippets) >= 5
    loss = float(re.match(r"tensor\((.*)\)\n", capsys.readouterr().out)[1])
    assert 0.0 < loss < 0.25, "below the variance of the mean of eight squares, 2 / 8"
    assert names["u"].keys() == names["state"].keys()


def test_the_plugin_example_runs(make_config, tmp_path, monkeypatch):
    monkeypatch.setattr(POTENTIALS, "_factories", dict(POTENTIALS._factories))
    (tmp_path / "my_potentials.py").write_text(PLUGIN, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    overrides = re.search(r"consensus\.train '(plugins=.*?)' (potential=\w+)", README).groups()
    config = make_config(*overrides)
    assert config.potential.make().profile.bound == float("inf")


def override_cells():
    table = section("Running").split("| what you want")[1].split("\n\n")[0]
    lines = [line for line in table.splitlines()[2:] if line]
    cells = [re.findall(r"`([^`]+)`", line.rsplit("|", 2)[1]) for line in lines]
    return [overrides for cell in cells for overrides in cell]


@pytest.mark.parametrize("overrides", override_cells())
def test_every_combination_of_overrides_composes(make_config, overrides):
    make_config(*shlex.split(overrides))


def test_there_are_overrides_to_test():
    assert len(override_cells()) >= 12


def test_the_message_that_is_shown_is_the_message(make_config):
    shown = section("Running").split("```\n$ python -m consensus.train ")[1].split("\n```")[0]
    override, message = shown.split("\n")
    with pytest.raises(REFUSALS) as refusal:
        make_config(override)
    assert message == f"consensus.train: {explain(refusal.value)}"


def test_the_table_of_potentials_is_complete():
    rows = re.findall(r"^\| `(\w+)`.*\|$", section("Potentials"), re.MULTILINE)
    assert rows == list(dict.fromkeys(rows))
    files = {path.stem for path in (ROOT / "configs" / "potential").glob("*.yaml")}
    assert set(rows) == files
    assert files <= set(POTENTIALS)


def test_the_tree_is_the_tree():
    tree = section("Code").strip("\n").split("\n\n")[0].splitlines()
    folders: list[tuple[int, str]] = []
    named = set()
    for line in tree:
        indent = len(line) - len(line.lstrip())
        name = line.split()[0]
        folders = [(depth, folder) for depth, folder in folders if depth < indent]
        path = "".join(folder for _, folder in folders) + name
        assert (ROOT / path).exists(), f"{path} is in the README but not in the repository"
        named.add(path.rstrip("/"))
        if name.endswith("/"):
            folders.append((indent, name))
    top = {f"consensus/{path.name}" for path in (ROOT / "consensus").glob("*.py")}
    core = {f"consensus/core/{path.name}" for path in (ROOT / "consensus/core").glob("*.py")}
    absent = {path for path in top | core if "__init__" not in path} - named
    assert not absent, f"{absent} is not in the README"


def test_the_links_and_scripts_exist():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", COUPLING):
        assert (ROOT / "docs" / target).exists(), target
    for script in re.findall(r"(?<![\w/])(?:\./)?((?:scripts|launch)/[\w.]+)", README):
        assert (ROOT / script).exists(), script
