"""README: its code runs, its commands are taken, its tables are complete and its links exist."""

import re
import shlex

import pytest
import torch
from hydra import initialize_config_dir

from consensus import Coupling
from consensus.core.potentials import POTENTIALS
from consensus.run.compose import config_dir
from consensus.sweep.grid import read_sweep, register_sweep_schema
from tests.testing import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
COUPLING = (ROOT / "docs" / "coupling.md").read_text(encoding="utf-8")
(PYTHON,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
(DIFF,) = re.findall(r"```diff\n(.*?)```", README, re.DOTALL)


def test_the_change_of_a_loop_runs(tmp_path, monkeypatch):
    """The lines that stay and those that are added, around a small model."""
    monkeypatch.chdir(tmp_path)
    model = torch.nn.Linear(4, 1)
    seen = []
    names = {
        "torch": torch,
        "model": model,
        "optimizer": torch.optim.AdamW(model.parameters(), lr=0.01),
        "loss_fn": torch.nn.functional.mse_loss,
        "loader": [(torch.randn(8, 4), torch.randn(8, 1)) for _ in range(25)],
        "evaluate": lambda own: seen.append(own.weight.detach().clone()),
    }
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", "0")
    kept = [line[1:] for line in DIFF.splitlines() if not line.startswith("-")]
    with torch.random.fork_rng():
        exec("\n".join(kept), names)
    assert isinstance(names["coupling"], Coupling)
    names["coupling"].close()
    torch.distributed.destroy_process_group()
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    assert torch.equal(state["weight"], seen[0]), "the model is u where it is evaluated"
    before = [line[1:] for line in DIFF.splitlines() if not line.startswith("+")]
    exec("\n".join(before), names)
    assert len(seen) == 2


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


def commands():
    """The words of each command of the README, those in the text included."""
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    lines = [line.partition("#")[0] for block in blocks for line in block.splitlines()]
    lines += re.findall(r"`((?:python -m|scripts/)[^`]+)`", README)
    return [words for words in map(shlex.split, lines) if words]


def test_every_command_is_taken(make_config):
    register_sweep_schema()
    taken = []
    for words in commands():
        found = re.search(r"-m consensus\.(\w+)(.*)", " ".join(words))
        if found is None:
            assert (ROOT / words[0]).exists() or words == ["source", ".venv/bin/activate"], words
            continue
        program, overrides = found[1], found[2].split()
        taken.append(program)
        if program == "sweep":
            with initialize_config_dir(config_dir(), version_base="1.3"):
                assert len(read_sweep(overrides).jobs) == 6
        else:
            make_config(*overrides)
    assert sorted(taken) == ["doctor", "sweep", "train", "train", "train"]


def test_the_table_of_potentials_is_complete():
    table = README.split("## Potentials")[1].split("\n## ")[0]
    cells = re.findall(r"^\| (`.*?`) \|", table, re.MULTILINE)
    rows = [name for cell in cells for name in re.findall(r"`(\w+)`", cell)]
    assert rows == list(dict.fromkeys(rows))
    files = {path.stem for path in (ROOT / "configs" / "potential").glob("*.yaml")}
    assert set(rows) == files
    assert files <= set(POTENTIALS)


def test_it_is_short_and_says_how_the_project_is_run_and_tested():
    lines = README.splitlines()
    assert len(lines) <= 140
    first_screen = "\n".join(lines[:30])
    assert "./scripts/train" in first_screen
    assert "./scripts/test" in first_screen


@pytest.mark.parametrize(("text", "folder"), [(README, ROOT), (COUPLING, ROOT / "docs")])
def test_the_links_and_scripts_exist(text, folder):
    for target in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (folder / target).exists(), target
    for script in re.findall(r"(?<![\w/])(?:\./)?((?:scripts|launch)/[\w.]+)", text):
        assert (ROOT / script).exists(), script
