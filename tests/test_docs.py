"""The site builds without a warning; the commands of its pages are taken, and some of them run."""

import csv
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import consensus
from consensus import elastic
from consensus.comm import Launch, Solo
from consensus.problem import DATASETS, MODELS
from consensus.report.__main__ import report
from consensus.run import trainer
from consensus.run.compose import (
    REFUSALS,
    composing,
    config_dir,
    explain,
    register_schema,
    to_config,
)
from consensus.run.plan import make_plan
from consensus.run.sinks import SINKS
from consensus.run.trainer import Trainer
from consensus.sweep.grid import read_sweep, register_sweep_schema
from tests.testing import ROOT
from tests.testing.small_runs import rows_of

PAGES = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")}
OTHERS = (
    "cd",
    "git",
    "docker",
    "kubectl",
    "sed",
    "squeue",
    "tail",
    "ls",
    "source",
    "python3",
    "cp",
)
OTHERS += ("pip", ".venv/bin/uv", "apptainer")  # programs that are not ours
MARKS = re.compile(r"KEY=VALUE|\.\.\.|\S+=[A-Z]{3,}$")  # that stand for something


def commands(page):
    """The words of every command in the bash blocks of a page."""
    for block in re.findall(r"^```bash\n(.*?)^```", PAGES[page], re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            for command in re.sub(r"(^|\s)#.*", "", line).split(" && "):
                if words := shlex.split(command):
                    yield words


def of_us(words):
    """(program, arguments) of one of our commands; None if it is another's.

    The programs are "train", "sweep", "report", and the path of a script.
    """
    words = list(words)
    while re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words.pop(0)
    for i, word in enumerate(words):
        if match := re.fullmatch(r"consensus\.(train|doctor|sweep|report|elastic)", word):
            if match[1] == "elastic":
                return "train", overrides_of_launcher(words[i + 1 :])
            return {"doctor": "train"}.get(match[1], match[1]), words[i + 1 :]
        if match := re.fullmatch(r"(?:/opt/consensus/)?(launch/[\w.]+)", word):
            arguments = words[i + 1 :]
            if match[1].endswith("slurm_sweep.sh"):
                return "sweep", arguments
            first = arguments and "=" not in arguments[0]  # the processes, or the hosts
            return "train", arguments[1:] if first else arguments
        if re.fullmatch(r"(?:scripts|examples)/[\w.]+", word):
            return word, words[i + 1 :]
    return None


def overrides_of_launcher(arguments):
    """The overrides of a process that consensus.elastic starts with these arguments."""
    options, rest = elastic._parser().parse_known_args(arguments)
    elastic._check(options, rest)
    if options.script is not None:  # its arguments are its own
        assert (ROOT / options.script).is_file()
        rest = []
    return ["group.elastic=true", *rest]


def overrides_of(arguments):
    own = "step_size=true"  # of the doctor, not of the run
    return [word for word in arguments if word != own and not MARKS.search(word)]


@pytest.fixture
def own_tables(monkeypatch):
    """Plugins register in copies of the tables, under modules that are imported anew."""
    for table in (DATASETS, MODELS, SINKS):
        monkeypatch.setattr(table, "_factories", dict(table._factories))
    for name in ("own_images", "own_sink"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))


def run(make_config, where, *overrides):
    """A run of few iterations of a small model in this process; its directory."""
    small = ["model=logistic", "algorithm.iterations=2", "output.eval_every=2"]
    small += ["output.log_every=2", "output.checkpoint_every=null", f"output.run_dir={where}"]
    config = make_config(*overrides, *small)
    config.stationarity.every = None  # costs more than the run
    Trainer(make_plan(config, Launch()), Solo()).run()
    return where


class Sources(HTMLParser):
    """Scripts, styles and pictures that a page loads."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        named = dict(attributes)
        if tag in ("script", "img") or (tag == "link" and "stylesheet" in named.get("rel", "")):
            self.found += [named[key] for key in ("src", "href") if key in named]


def test_the_site_builds_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path):
    command = [sys.executable, str(ROOT / "docs" / "build.py"), "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == str(tmp_path / "index.html")
    for page in PAGES:
        loaded = Sources((tmp_path / f"{page}.html").read_text(encoding="utf-8")).found
        assert loaded
        assert [source for source in loaded if "//" in source] == []
    index = (tmp_path / "searchindex.js").read_text(encoding="utf-8")
    assert "consensus_state_dict" in index, "the search works without a server"
    assert "cosine" in (tmp_path / "configuration.html").read_text(encoding="utf-8")


def test_a_snippet_that_fails_and_a_link_to_nothing_are_reported(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    from build import broken_links, run_snippets

    page = tmp_path / "page.md"
    page.write_text(
        "```python\nx = 1\n```\ntext\n```python\n>>> x + 1\n3\n```\n```python\nx.y\n```\n"
    )
    wrong, raised = run_snippets(page)
    assert "Expected:\n    3\nGot:\n    2\n" in wrong
    assert raised.startswith("page.md, snippet at line 9: AttributeError")
    (tmp_path / "a.html").write_text(
        '<h1 id="top"><a href="b.html#here"></a><a href="b.html#gone"></a><a href="#top"></a>'
        '<a href="c.html"></a><img src="d.png?v=1"><a href="https://example.org/e"></a>'
    )
    (tmp_path / "b.html").write_text('<p id="here">')
    (tmp_path / "d.png").touch()
    links = [f"a.html: {link} is not there" for link in ("b.html#gone", "c.html")]
    assert broken_links(tmp_path) == links


def test_every_page_is_in_the_contents():
    trees = re.findall(r"```{toctree}\n(.*?)```", PAGES["index"], re.DOTALL)
    named = [line for tree in trees for line in tree.splitlines() if re.fullmatch(r"\w+", line)]
    assert sorted(named) == sorted(PAGES.keys() - {"index"})


def test_the_files_that_the_architecture_names_are_there():
    named = set(re.findall(r"`([\w./]+(?:/|\.py))`", PAGES["architecture"]))
    assert len(named) >= 30
    roots = (ROOT, ROOT / "consensus")
    assert [name for name in sorted(named) if not any((at / name).exists() for at in roots)] == []


def test_the_api_page_has_every_public_name():
    absent = {name for name in consensus.__all__ if f"consensus.{name}" not in PAGES["api"]}
    assert absent == set()


def test_every_command_of_the_pages_is_taken(make_config):
    """Overrides compose, grids expand, scripts and benchmarks exist, others are known programs."""
    register_sweep_schema()
    taken = {"train": 0, "sweep": 0, "report": 0}
    for page in PAGES:
        for words in commands(page):
            ours = of_us(words)
            if ours is None:
                program = next(word for word in words if not re.match(r"[A-Z_]+=|srun|-", word))
                assert program in OTHERS, f"{page}: {words}"
                continue
            program, arguments = ours
            if program == "train":
                make_config(*overrides_of(arguments))
            elif program == "sweep":
                arguments = [word for word in arguments if word != "--dry-run"]
                with initialize_config_dir(config_dir(), version_base="1.3"):
                    assert read_sweep(arguments).jobs
            elif program != "report":
                assert (ROOT / program).exists(), f"{page}: {words}"
                if program == "scripts/bench":
                    assert (ROOT / "benchmarks" / f"{arguments[0]}.py").exists()
            taken[program] = taken.get(program, 0) + 1
    assert taken["train"] >= 20
    assert taken["sweep"] >= 5
    assert taken["report"] >= 4


def test_the_first_commands_run_and_their_runs_compare(make_config, tmp_path, capsys, monkeypatch):
    """Every training of these pages, in few iterations of a small model and in one process."""
    monkeypatch.setattr(trainer, "draw_pictures", lambda *arguments: None)  # most of the time
    different = set()
    for page in ("quickstart", "checkpoints"):
        for words in commands(page):
            program, arguments = of_us(words) or ("", [])
            if program == "train" and arguments:
                given = overrides_of(arguments)
                different.add(tuple(sorted(w for w in given if "output.run_dir=" not in w)))
    assert len(different) >= 4
    runs = [
        run(make_config, tmp_path / f"run{i}", *given) for i, given in enumerate(sorted(different))
    ]
    assert all((path / "model.pt").is_file() for path in runs)
    capsys.readouterr()
    report(runs, tmp_path / "figure.png")
    printed = capsys.readouterr().out
    assert [path.name for path in runs if f"{path.name} " not in printed] == []
    assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG"


def cells():
    """The overrides in the table of the quickstart."""
    rows = PAGES["quickstart"].split("| you want | overrides |")[1].split("\n\n")[0].splitlines()
    return [text for row in rows[2:] for text in re.findall(r"`([^`]+=[^`]*)`", row)]


def test_every_combination_of_overrides_composes(make_config):
    assert len(cells()) >= 12
    for overrides in cells():
        make_config(*shlex.split(overrides))


def test_the_message_that_is_shown_is_the_message(make_config):
    shown = PAGES["quickstart"].split("```\n$ python -m consensus.train ")[1].split("\n```")[0]
    override, message = shown.split("\n")
    with pytest.raises(REFUSALS) as refusal:
        make_config(override)
    assert message == f"consensus.train: {explain(refusal.value)}"


def test_the_yaml_of_a_plugin_composes(own_tables, tmp_path):
    (block,) = re.findall(r"^```yaml\n# my_configs/(\S+)\n(.*?)^```", PAGES["extend"], re.M | re.S)
    path = tmp_path / block[0]
    path.parent.mkdir()
    path.write_text(block[1], encoding="utf-8")
    register_schema()
    arguments = [f"--config-dir={tmp_path}", f"experiment={path.stem}"]
    with composing("train", arguments) as (overrides, _):
        config = to_config(compose("train", overrides=["model.options={}", *overrides]))
    assert (config.data.name, config.algorithm.pull, config.algorithm.lam) == (
        "own_images",
        0.3,
        None,
    )


def test_the_example_of_a_sink_writes_the_columns_of_every_evaluation(
    own_tables, make_config, tmp_path
):
    where = run(make_config, tmp_path / "run", "plugins=[own_sink]", "experiment=smoke")
    with (where / "metrics.csv").open(newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    rows = rows_of(where)
    assert len(table) == len(rows) == 1
    for written, row in zip(table, rows, strict=True):
        assert set(written) < set(row)
        assert {key: float(text) for key, text in written.items()} == {k: row[k] for k in written}


def flat(node, prefix=""):
    """The keys of a composed config with their values; options are one key, a schedule its name."""
    for key, value in node.items():
        if isinstance(value, dict) and key != "options":
            yield from flat(value, f"{prefix}{key}.")
        elif not (key == "options" and ".schedule." in prefix):
            yield f"{prefix}{key}", value


def test_the_configuration_reference_has_every_key_with_its_default(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    from reference import configuration

    register_schema()
    with initialize_config_dir(config_dir(), version_base="1.3"):
        composed = OmegaConf.to_container(compose("train"), resolve=True)
    page = configuration()
    rows = re.findall(r"^\| `([\w.]+)` \| `(.*?)` \| (.+?) \| (.+?) \|$", page, re.MULTILINE)
    found = {key: OmegaConf.create(f"x: {default}")["x"] for key, default, _, _ in rows}
    of_runs = {key: value for key, value in found.items() if not key.startswith("sweep.")}
    assert of_runs == dict(flat(composed)), "each with a default, allowed values and a meaning"
    assert len(found) == len(rows)
    for group in ("potential", "algorithm", "data", "model", "loss", "experiment", "grid"):
        for path in (ROOT / "configs" / group).glob("*.yaml"):
            assert f"`{group}={path.stem}`" in page
    sweep = OmegaConf.load(Path(config_dir()) / "sweep.yaml").sweep
    assert {key for key in found if key.startswith("sweep.")} == {f"sweep.{key}" for key in sweep}
