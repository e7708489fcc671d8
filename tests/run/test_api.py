"""Training from Python: results, errors, and a process that is left as it was found."""

import contextlib
import dataclasses
import importlib
import io
import json
import os
import pickle
import pydoc
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.utils import JobRuntime
from hydra.version import getbase
from torch.nn.functional import cross_entropy

import consensus
from consensus import ConfigError, GroupError, RunStopped
from consensus.problem import DATASETS
from consensus.run import trainer
from consensus.run.sinks import SINKS, Sink
from tests.testing import ROOT
from tests.testing.launch import PLACE, Ranks
from tests.testing.plugins import forget, plugin_in
from tests.testing.small_runs import PACE, SMALL, rows_of, without_clocks

OWN = [*SMALL, *PACE, "output.tensorboard=false"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The current folder, outside of any launch."""
    for name in PLACE:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trainer, "draw_pictures", lambda *_: None)  # takes most of the time
    return tmp_path


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The result of OWN, and its output."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        found = consensus.train(*OWN, f"output.run_dir={tmp_path_factory.mktemp('api')}/run")
    return found, out.getvalue()


def digests(result):
    return [row["digest"] for row in result.rows]


# ---- the function and the module of its name


def test_the_function_outlasts_the_module_of_its_name():
    module = importlib.import_module("consensus.train")
    assert consensus.train is not module
    assert sys.modules["consensus.train"] is module
    from consensus import train
    from consensus.train import main

    assert main is module.main
    assert train is consensus.train
    importlib.reload(module)
    assert consensus.train is train
    assert pickle.loads(pickle.dumps(consensus.train)) is consensus.train
    assert "train(*overrides: " in pydoc.plain(pydoc.render_doc(consensus.train))


FRESH = """
import sys, consensus
assert "torch" not in sys.modules
before = consensus.train
import consensus.train
assert consensus.train is before and consensus.train.__name__ == "train"
from consensus.train import main
assert main.__module__ == "consensus.train" and consensus.train is before
import consensus.train as again
assert again is before
import pickle, hydra.core.config_store
assert pickle.loads(pickle.dumps(before)) is before
assert "schema.yaml" not in hydra.core.config_store.ConfigStore.instance().repo
"""


def test_the_function_in_a_fresh_process():
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", FRESH], env=environment, check=True, timeout=100)


# ---- the result


def test_the_result_is_that_of_the_files(reference, capsys):
    result, out = reference
    rows = rows_of(result.run_dir)
    assert result.rows == rows
    assert [row["iteration"] for row in rows] == [4, 8, 12]
    assert result.summary == json.loads((result.run_dir / "summary.json").read_text())
    lowest = min(rows, key=lambda row: row["test_error"])
    assert result.best == {key: lowest[key] for key in ("iteration", "test_error")}
    assert f"results in {result.run_dir}\n" in out
    assert "iteration     12  epoch " in out
    assert repr(result) == f"Result('{result.run_dir}', iteration=12, best={result.best})"


def test_help_of_the_package_names_the_functions_and_the_tables():
    text = consensus.__doc__
    tables = {name for name in consensus.__all__ if name.isupper()}
    words = set(re.findall(r"\w+", text))
    assert {"train", "load", "compose", "Coupling", "plugins"} | tables <= words


def test_the_model_is_that_of_the_last_row(reference):
    model, row, digits = reference[0].model, reference[0].rows[-1], DATASETS["digits"]
    assert isinstance(model, torch.nn.Module)
    assert not model.training
    with torch.no_grad():
        logits = model(digits.test.inputs)
    wrong = (logits.argmax(1) != digits.test.targets).double().mean()
    assert 100 * float(wrong) == pytest.approx(row["test_error"], rel=1e-12)
    loss = cross_entropy(logits, digits.test.targets, reduction="sum")
    assert float(loss) == pytest.approx(row["test_loss"], rel=1e-5)


def test_load_gives_the_same_result(reference, folder):
    result = reference[0]
    for path in (result.run_dir, str(result.run_dir), os.path.relpath(result.run_dir)):
        loaded = consensus.load(path)
        assert loaded.run_dir == result.run_dir
        assert (loaded.rows, loaded.summary) == (result.rows, result.summary)
        assert not loaded.model.training
        assert loaded.model.state_dict().keys() == result.model.state_dict().keys()
        for name, value in loaded.model.state_dict().items():
            assert torch.equal(value, result.model.state_dict()[name])


def test_load_of_another_dtype_of_a_plugin_and_of_an_earlier_version(folder, monkeypatch):
    own = [*OWN, "plugins=[mine]", "model=tiny", "data=stripes", "dtype=float64"]
    with plugin_in(folder, monkeypatch):
        result = consensus.train(*own, "model.options.depth=1", "output.run_dir=run", quiet=True)
        assert result.summary["model"] == {
            "name": "tiny",
            "options": {"depth": 1, "width": 8, "shape": [28, 28]},
        }
        forget(folder)
        torch.manual_seed(5)
        expected = torch.random.get_rng_state()
        loaded = consensus.load("run")
        assert torch.equal(torch.random.get_rng_state(), expected)
        assert {value.dtype for value in loaded.model.state_dict().values()} == {torch.float64}
        (folder / "mine.py").unlink()
        forget(folder)
        with pytest.raises(ConfigError, match="`plugins` is mine; allowed: a module on the Python"):
            consensus.load("run")
    consensus.train(*OWN, "model=mlp", "output.run_dir=old", quiet=True)
    summary = json.loads(Path("old/summary.json").read_text())
    del summary["model"]
    Path("old/summary.json").write_text(json.dumps(summary))
    assert consensus.load("old").model(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


def test_load_refuses_what_is_no_finished_run(folder, reference):
    for path in ("none", "."):
        with pytest.raises(ConfigError) as caught:
            consensus.load(path)
        allowed = "the directory of a finished run, with a summary.json"
        assert str(caught.value) == f"`run_dir` is {path}; allowed: {allowed}"


@pytest.mark.parametrize("name", ["summary.json", "config.yaml", "model.pt"])
@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04" + bytes(40), b"[1, 2", b"\xff\xfe\x00"])
def test_load_names_a_damaged_file(reference, tmp_path, name, damage):
    shutil.copytree(reference[0].run_dir, tmp_path / "run")
    file = tmp_path / "run" / name
    file.write_bytes(damage)
    with pytest.raises(ValueError, match=rf"{re.escape(str(file))} is damaged: .") as caught:
        consensus.load(tmp_path / "run")
    assert "\n" not in str(caught.value)


# ---- the same run as the command, whatever the state of the process


def test_the_command_trains_the_same_run(reference, monkeypatch, folder):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr(sys, "argv", ["consensus.train", *OWN, "output.run_dir=command"])
    with contextlib.redirect_stdout(io.StringIO()):
        importlib.import_module("consensus.train").main()
    mine = map(without_clocks, reference[0].rows)
    assert list(map(without_clocks, rows_of(folder / "command"))) == list(mine)


def state_of_the_process():
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
    return {
        "handlers": [signal.getsignal(number) for number in numbers],
        "torch": torch.random.get_rng_state().tolist(),
        "numpy": [str(part) for part in np.random.get_state()],  # noqa: NPY002
        "python": random.getstate(),
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "gradients": torch.is_grad_enabled(),
        "strict": torch.are_deterministic_algorithms_enabled(),
        "warn only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "hook": threading.excepthook,
        "running": {thread.name for thread in threading.enumerate()},
        "environment": dict(os.environ),
        "arguments": list(sys.argv),
        "folder": Path.cwd(),
        "streams": (sys.stdout, sys.stderr),
        "hydra": GlobalHydra.instance().hydra,
        "store": sorted(ConfigStore.instance().repo),
        "base": getbase(),
    }


def test_the_process_is_left_as_it_was_found(reference):
    before_usr1 = signal.signal(signal.SIGUSR1, lambda *_: None)
    torch.set_default_dtype(torch.float64)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(7)
            np.random.seed(7)  # noqa: NPY002
            random.seed(7)
            before = state_of_the_process()
            for more in ((), ("deterministic=true", "output.tensorboard=true")):
                result = consensus.train(*OWN, *more, quiet=True)
                assert state_of_the_process() == before
                assert digests(result) == digests(reference[0])
            with pytest.raises(ConfigError):
                consensus.train(*OWN, "data.root=/", "algorithm.batch_size=9999")
            assert state_of_the_process() == before
        with torch.inference_mode():
            assert digests(consensus.train(*OWN, quiet=True)) == digests(reference[0])
    finally:
        signal.signal(signal.SIGUSR1, before_usr1)
        torch.set_default_dtype(torch.float32)
        torch.use_deterministic_algorithms(False)


def test_other_threads_train_as_well(reference):
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(consensus.train(*OWN, quiet=True)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [digests(result) for result in found] == 2 * [digests(reference[0])]
    assert found[0].run_dir != found[1].run_dir


def test_a_hydra_of_the_caller_is_left_alone(reference, folder):
    (folder / "conf" / "potential").mkdir(parents=True)
    (folder / "conf" / "app.yaml").write_text("defaults:\n  - schema\n  - potential: own\n")
    (folder / "conf" / "potential" / "own.yaml").write_text("depth: 3\n")
    store = ConfigStore.instance()
    repo = store.repo
    store.repo = repo | {"potential": {}}
    try:
        store.store(name="schema", node={"lam": 5})
        store.store(name="deep", node={"depth": 9}, group="potential")
        with initialize_config_dir(f"{folder}/conf", version_base="1.2", job_name="app"):
            assert digests(consensus.train(*OWN, quiet=True)) == digests(reference[0])
            with pytest.raises(ConfigError, match="`potential` is deep; allowed: cubic"):
                consensus.compose("potential=deep")
            assert compose("app") == {"lam": 5, "potential": {"depth": 3}}
            assert compose("app", ["potential=deep"]) == {"lam": 5, "potential": {"depth": 9}}
            assert JobRuntime.instance().get("name") == "app"
            assert str(getbase()) == "1.2"
        assert not GlobalHydra.instance().is_initialized()
    finally:
        store.repo = repo


class ZMQInteractiveShell:
    """The shell of a notebook, by whose name rich recognizes one."""


def test_a_notebook_shows_lines_of_text(reference, monkeypatch, capsys):
    monkeypatch.setattr("builtins.get_ipython", ZMQInteractiveShell, raising=False)
    consensus.train(*OWN)
    lines, own = capsys.readouterr().out.splitlines(), reference[1].splitlines()
    assert len(lines) == len(own)
    assert lines[1].split("coupling")[0] == own[1].split("coupling")[0]
    assert lines[1].startswith("iteration      4  epoch ")


def test_quiet_prints_nothing(capsys):
    consensus.train(*OWN, quiet=True)
    assert capsys.readouterr() == ("", "")


# ---- configs and errors


def test_a_config_is_trained(reference, folder):
    config = consensus.compose(*OWN, "output.run_dir=run")
    assert isinstance(config, consensus.Config)
    config.algorithm.iterations = 8
    result = consensus.train(config, quiet=True)
    assert digests(result) == digests(reference[0])[:2]
    assert result.run_dir == folder / "run"
    config.algorithm.lam = -1.0  # after the checks of its construction
    with pytest.raises(ConfigError, match=r"`algorithm.lam` is -1.0; allowed: a number > 0"):
        consensus.train(config)
    again = dataclasses.replace(consensus.compose(*OWN), seed=3)
    assert digests(consensus.train(again, quiet=True)) != digests(reference[0])


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["potential=cubik"], "`potential` is cubik; allowed: cubic, "),
        (["algorithm=3"], "Config group override must be a string or a list. Got int"),
        (["lamda=1"], "unknown key `lamda` (did you mean `algorithm.lam`?); allowed in the top"),
        (["smoke"], "Error parsing override 'smoke'"),
        (["workers=3", "algorithm.batch_size=2000"], "`algorithm.batch_size` is 2000; allowed: "),
        (["--config-dir=none"], "`--config-dir` is "),
        (["resume=auto"], "`resume` is auto; allowed: never or a path, unless "),
    ],
)
def test_a_refusal_is_one_line(overrides, line, capsys):
    with pytest.raises(ConfigError) as caught:
        consensus.train("model=logistic", "device=cpu", *overrides)
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)
    assert capsys.readouterr() == ("", "")


def test_a_wrong_launch_is_refused(monkeypatch):
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(ConfigError, match="`RANK` is 2; allowed: below WORLD_SIZE = 1"):
        consensus.train(*OWN)


def test_other_arguments_are_refused():
    config = consensus.compose()
    for wrong in ((config, "seed=1"), (3,), (config, config)):
        with pytest.raises(TypeError, match="the arguments are overrides KEY=VALUE, or one Config"):
            consensus.train(*wrong)


def test_a_failed_run_is_an_exception():
    with pytest.raises(GroupError, match="became non-finite, and u with it"):
        consensus.train(*OWN, "potential=quad", "algorithm.sigma=1e30", quiet=True)


class Interrupt(Sink):
    """Sends this process a signal at the first evaluation."""

    def evaluation(self, row):
        if row["iteration"] == 4:
            os.kill(os.getpid(), signal.SIGINT)


def test_an_interrupted_run_is_continued(reference, monkeypatch, folder):
    monkeypatch.setattr(SINKS, "_factories", {**SINKS._factories, "interrupt": Interrupt})
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(RunStopped, match=r"SIGINT: stopped at iteration \d+ with a checkpoint"):
        consensus.train(*OWN, "output.run_dir=run", "output.log_every=1", quiet=True)
    assert signal.getsignal(signal.SIGINT) is before
    del SINKS._factories["interrupt"]
    result = consensus.train("resume=auto", "output.run_dir=run", quiet=True)
    assert digests(result) == digests(reference[0])


# ---- several processes


@pytest.mark.ranks
@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_script_under_torchrun(size, reference, folder):
    own = [text for text in OWN if "workers" not in text]
    with Ranks(size, [*own, "workers=4"], folder, module="tests.testing.script") as ranks:
        assert ranks.wait(120) == [0] * size, ranks.err(0)
        assert "results in " in ranks.out(0)
        assert [ranks.out(rank) for rank in range(1, size)] == [""] * (size - 1)
    found = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(size)]
    assert found == [found[0]] * size, "among them the digest of the model, and of u"
    first = found[0]
    assert first["first"]["summary"] == size
    assert first["first"]["rows"] == 3
    assert first["second"] == first["last"] == first["first"]
    assert first["refused"].startswith("ConfigError: `potential` is cubik; allowed: cubic, ")
    assert first["failed"].startswith("GroupError: ")
    if size > 1:  # within a process group of the script
        assert first["within"] == first["first"] | {"initialized": True}
        assert first["total"] == size


@pytest.mark.ranks
def test_after_a_restart_by_torchrun_each_run_continues_its_own(folder):
    env = {"TORCHELASTIC_RUN_ID": "mine"}
    for attempt in (0, 1):
        own = [*OWN, "output.root=runs"]
        with Ranks(1, own, folder, env, attempt, module="tests.testing.two_runs") as ranks:
            assert ranks.wait(120) == [0], ranks.err(0)
        assert len(list(Path("runs").iterdir())) == 2
    before, after = (json.loads(Path(f"attempt{i}.json").read_text()) for i in (0, 1))
    assert before == after
