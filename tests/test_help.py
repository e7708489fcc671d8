"""Help, version and completion of the commands, in processes without torch."""

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from dataclasses import fields

import pytest
from hydra import compose
from omegaconf import OmegaConf

from consensus import help as help_module
from consensus.help import MAIN_KEYS, page
from consensus.run.compose import composing, to_config
from consensus.run.config_algorithm import AlgorithmConfig
from consensus.sweep.grid import SweepOptions, read_sweep, register_sweep_schema
from tests.testing import ROOT

COMMANDS = ("train", "sweep", "doctor", "report", "elastic")
CONFIGS = ROOT / "configs"


@pytest.mark.parametrize("command", COMMANDS)
def test_a_page_fits_into_a_terminal(command):
    lines = page(command).splitlines()
    assert max(map(len, lines)) <= 80
    assert len(lines) <= 48
    for part in ("Usage:", "--version", "Examples:", "Exit codes: 0 "):
        assert part in page(command)
    assert len([line for line in lines if line.startswith(("  python -m", "  launch/"))]) == 2


def test_the_page_of_training_has_the_groups_the_experiments_and_the_defaults():
    text = page("train")
    assert "grid" not in text, "it is refused by consensus.train"
    for group in ("potential", "algorithm", "data", "model", "loss", "group", "experiment"):
        for path in (CONFIGS / group).glob("*.yaml"):
            assert re.search(rf"\b{path.stem}\b", text), path
    with composing("train", []):
        composed = compose("train")
    shown = dict(re.findall(r"^  ([\w.]+) \((\S+)\)  ", text, re.MULTILINE))
    assert shown.keys() == set(MAIN_KEYS)
    for key, default in shown.items():
        assert OmegaConf.create(f"x: {default}").x == OmegaConf.select(composed, key), key
    assert " quad*," in text
    assert "lenet5*," in text
    assert " ...\n" not in text.partition("Groups")[2], "each description fits into its line"


def test_the_page_of_sweeps_has_the_grids_and_the_options():
    text = page("sweep")
    assert all(f"\n  {path.stem} " in text for path in (CONFIGS / "grid").glob("*.yaml"))
    assert all(f"\n  sweep.{option.name} (" in text for option in fields(SweepOptions))


@pytest.mark.parametrize("command", ["train", "sweep", "doctor"])
def test_the_examples_are_accepted(command):
    examples = re.findall(r"^  (?:python -m \S+|launch/local.sh \d) (.*)", page(command), re.M)
    assert len(examples) == 2
    register_sweep_schema()
    for words in map(shlex.split, examples):
        own = [word for word in words if word not in ("--dry-run", "step_size=true")]
        with composing(command, own) as (others, _):
            if command == "sweep":
                assert read_sweep(others).jobs
            else:
                to_config(compose("train", overrides=others))


def test_the_arguments_of_the_report_are_those_of_its_parser(capsys, monkeypatch):
    from consensus.report import __main__ as report

    monkeypatch.setattr(sys, "argv", ["consensus.report"])
    with pytest.raises(SystemExit):
        report.main()
    usage = capsys.readouterr().err
    options = set(re.findall(r"--\w+", usage))
    assert options == {"--output", "--folder", "--by"}
    assert options | {"--version"} == set(re.findall(r"(?m)^  (--\w+)", page("report")))


@pytest.mark.parametrize(
    ("names", "lines"),
    [
        (["algorithm.lam"], ["algorithm.lam (0.1)  coupling: phi(u - z_j) / lam; 0.1"]),
        (["seed"], ["seed (0)  every random stream derives from it"]),
        (["output"], ["output.root (runs)", "output.tensorboard (true)"]),
        (
            ["potential"],
            ["potential=tan_sep       phi(x) = sum_i tan x_i^2", "potential.eta (1.0)"],
        ),
        (["experiment", "grid"], ["experiment=smoke", "grid=table1"]),
    ],
)
def test_help_describes_keys_sections_and_groups(names, lines):
    text = page("train", names)
    for line in lines:
        assert f"\n  {line}" in f"\n{text}"
    assert max(map(len, text.splitlines())) <= 80
    assert "Usage" not in text


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("algorithm.lr", "algorithm.sigma"),
        ("batchsize", "algorithm.batch_size"),
        ("experimnt", "experiment"),
    ],
)
def test_an_unknown_name_has_a_suggestion(name, near, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["consensus.train", "--help", name])
    with pytest.raises(SystemExit, match="2"):
        help_module.answer_questions("__main__", "consensus.train")
    line = f"consensus.train: --help: unknown name `{name}` (did you mean `{near}`?); allowed: "
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(line)
    assert err.count("\n") == 1


# ---- the commands, in one process in which torch cannot be imported

PROGRAM = """
import contextlib, io, json, os, runpy, sys
sys.modules["torch"] = None  # its import raises
answers = []
for module, words, variables in json.loads(sys.argv[1]):
    sys.argv = [module, *words]
    os.environ.update({"RANK": "0", "COMP_LINE": ""} | variables)
    out, err = io.StringIO(), io.StringIO()
    code = "no exit"
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_module(module, run_name="__main__")
        except SystemExit as stop:
            code = stop.code
    answers.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def answers():
    """`answers[module, words, variables]`: exit code, stdout and stderr of a command."""
    asked = [(f"consensus.{name}", (word,), ()) for name in COMMANDS for word in QUESTIONS]
    asked += [("consensus.train", (word,), (("RANK", "1"),)) for word in QUESTIONS]
    asked += [line_of(line) for line in COMPLETIONS]
    asked.append(("consensus.train", ("-sc", "install=bash"), ()))
    words = json.dumps([(module, words, dict(variables)) for module, words, variables in asked])
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, words],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        timeout=120,
    )
    return dict(zip(asked, json.loads(found.stdout), strict=True))


QUESTIONS = ("--help", "-h", "--version")
KEYS = {f"algorithm.{field.name}" for field in fields(AlgorithmConfig)}
COMPLETIONS = {
    "consensus-train potential=t": "potential=tan potential=tan_sep",
    "consensus-train algorithm.lam=": "algorithm.lam=0.1",
    "consensus-train algorithm.": " ".join(
        sorted(f"{key}{'.' if key.endswith('schedule') else '='}" for key in KEYS)
    ),
    "consensus-train g": "group. group=",  # and no grid
    "consensus-train --cfg job algorithm=di": "algorithm=diloco",
    "consensus-train potential=nosuch wor": "",
    "consensus-train data=(": "",
    "consensus-sweep --dry-run gri": "grid=",
    "consensus-sweep grid=table1_": "grid=table1_small",
    "consensus-sweep sweep.j": "sweep.jobs=",
    "consensus-doctor st": "stationarity. step_size=",
}


def line_of(line):
    module = line.partition(" ")[0].replace("-", ".")
    return module, ("-sc", "query=bash"), (("COMP_LINE", line),)


def test_help_and_version_need_no_torch(answers):
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    for command in COMMANDS:
        for word in QUESTIONS:
            text = f"consensus {version}\n" if word == "--version" else page(command)
            assert answers[f"consensus.{command}", (word,), ()] == [0, text, ""]


@pytest.mark.parametrize("word", QUESTIONS)
def test_ranks_above_0_answer_nothing(answers, word):
    assert answers["consensus.train", (word,), (("RANK", "1"),)] == [0, "", ""]


@pytest.mark.parametrize("line", COMPLETIONS)
def test_completion_needs_no_torch(answers, line):
    code, out, err = answers[line_of(line)]
    assert (code, out.strip(), err) == (0, COMPLETIONS[line], "")


def test_completion_is_installed_for_the_script(answers):
    code, out, _ = answers["consensus.train", ("-sc", "install=bash"), ()]
    assert code == 0
    assert out.rstrip().endswith(" -F hydra_bash_completion consensus-train")
    assert subprocess.run(["bash", "-n"], input=out, text=True).returncode == 0
