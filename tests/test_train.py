"""The command as a user runs it: files, exit codes, one line for each failure, no process left.

Starting a process costs seconds, so most refusals call `main` in this process. Real processes run
only where the result depends on them.
"""

import contextlib
import errno
import importlib
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.nn.functional import cross_entropy, max_pool2d, relu

from consensus.comm import GroupError, Launch
from consensus.core.scalar_equation import NotConvergedError
from consensus.problem import DATASETS
from consensus.run.config import Config
from consensus.run.limits import LESS
from consensus.run.plan import make_plan
from consensus.run.sinks import JsonlSink
from consensus.run.trainer import Trainer
from consensus.server import digest
from tests.testing.launch import Ranks
from tests.testing.plugins import MINE
from tests.testing.small_runs import rows_of

entry = importlib.import_module("consensus.train")  # the attribute of that name is a function

LAUNCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
MARK = "CONSENSUS_TEST_MARK"


class Ended:
    """The result of a command."""

    def __init__(self, code: int, out: str, err: str, seconds: float, left_behind: list[str]):
        self.code, self.out, self.err, self.seconds = code, out, err, seconds
        self.left_behind = left_behind  # processes of it that are still alive
        self.modules: dict[str, set[str]] = {}  # at the end of each process, by rank

    @property
    def lines(self) -> list[str]:
        """The lines of the command itself on stderr; torchrun adds a report of its own."""
        return [line for line in self.err.splitlines() if line.startswith("consensus.train:")]


def environment(**others: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in LAUNCH}
    return kept | {"OMP_NUM_THREADS": "1"} | others


def command(*overrides: str, processes: int = 0) -> list[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [sys.executable, *(torchrun if processes else []), "-m", "consensus.train", *overrides]


def run(folder: Path, *overrides: str, processes: int = 0, timeout: float = 120.0, **env) -> Ended:
    """Run the command in a folder to its end, and kill the processes that it leaves."""
    mark = uuid.uuid4().hex
    started = time.monotonic()
    ended = subprocess.run(
        command(*overrides, processes=processes),
        cwd=folder,
        env=environment(**env, **{MARK: mark}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    seconds = time.monotonic() - started
    left = marked(mark)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    return Ended(ended.returncode, ended.stdout, ended.stderr, seconds, left)


def marked(mark: str) -> list[str]:
    """The processes that inherited a mark."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if f"{MARK}={mark}".encode() in path.read_bytes():
                found.append(path.parent.name)
    return found


# ---- the files of a run

CONTRACT_KEYS = {
    "iteration",
    "epoch",
    "objective",
    "train_loss",
    "train_error",
    "test_loss",
    "test_error",
    "coupling",
    "distance",
    "wall_s",
    "samples_per_s",
}
FILES = {
    ".lock",
    "checkpoints",
    "config.yaml",
    "metrics.jsonl",
    "summary.json",
    "model.pt",
    "convergence.png",
    "convergence.pdf",
    "events",  # of TensorBoard, events.out.tfevents.TIME.HOST...
}
SMOKE = ["experiment=smoke", "potential=tan", "device=cpu"]


class PlainLeNet(nn.Module):
    """LeNet-5 of the paper in plain torch."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 20, 5)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.fc = nn.Linear(800, 10)

    def forward(self, x):
        x = max_pool2d(relu(self.conv1(x)), 2)
        x = max_pool2d(relu(self.conv2(x)), 2)
        return self.fc(x.flatten(1))


# Python imports it at its start: each process of a command lists its modules at its end.
LISTING = """
import atexit, os, pathlib, sys
path = pathlib.Path(__file__).with_name(f"modules-{os.environ.get('RANK', 'launcher')}")
atexit.register(lambda: path.write_text("\\n".join(sys.modules)))
"""

HEAVY = {"matplotlib", "tensorboard", "torch.utils.tensorboard", "sklearn", "scipy"}
HEAVY |= {"torchvision", "pandas", "sympy", "torch._dynamo", "torch._inductor"}
HEAVY |= {"torch.distributed.checkpoint", "torch.distributed.tensor", "functorch"}
"""Modules that take a tenth of a second or more, and that training does not need."""

ONLY_FIRST = {"matplotlib", "tensorboard", "torch.utils.tensorboard"}
"""Those that rank 0 needs: figures, events."""


@pytest.fixture(scope="module", params=[0, 2], ids=["python", "torchrun"])
def smoke(request, tmp_path_factory):
    """A finished run of two workers: its folder, its options and its output."""
    folder = tmp_path_factory.mktemp("smoke")
    listing = tmp_path_factory.mktemp("modules")
    (listing / "sitecustomize.py").write_text(LISTING)
    path = os.pathsep.join(filter(None, [str(listing), os.environ.get("PYTHONPATH")]))
    how = [] if request.param else ["workers=2"]
    where = "output.run_dir=run"
    ended = run(folder, *SMOKE, *how, where, processes=request.param, PYTHONPATH=path)
    assert ended.code == 0, ended.err
    ended.modules = {
        file.name.removeprefix("modules-"): set(file.read_text().split())
        for file in listing.glob("modules-*")
    }
    return folder / "run", how, ended


@pytest.mark.ranks
@pytest.mark.slow
def test_smoke_imports_no_module_that_it_does_not_need(smoke):
    """Each costs every rank a part of a second of CPU time, at the start of every run."""
    _, how, ended = smoke
    first, *others = ("launcher",) if how else ("0", "1")
    assert {"torch", "consensus.run.trainer"} <= ended.modules[first]
    assert ended.modules[first] & HEAVY == ONLY_FIRST
    for rank in others:
        assert {"torch", "consensus.run.trainer"} <= ended.modules[rank]
        assert ended.modules[rank] & HEAVY == set()


@pytest.mark.ranks
@pytest.mark.slow
def test_smoke_writes_all_files_and_no_others(smoke):
    run_dir, _, ended = smoke
    assert {path.name.partition(".out.")[0] for path in run_dir.iterdir()} == FILES
    assert [path.name for path in run_dir.parent.iterdir()] == ["run"], "Hydra makes no folder"
    assert ended.left_behind == []
    assert ended.lines == []


@pytest.mark.ranks
@pytest.mark.slow
def test_smoke_config_loads_back(smoke, make_config):
    run_dir, how, _ = smoke
    saved = OmegaConf.load(run_dir / "config.yaml")
    loaded = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), saved))
    root = f"output.root={run_dir.parent}/runs"
    where = [f"output.run_dir={run_dir}", root, f"data.root={run_dir.parent}/data"]
    assert loaded == make_config(*SMOKE, *how, *where, "output.tensorboard=true")


@pytest.mark.ranks
@pytest.mark.slow
def test_smoke_metrics_and_summary(smoke):
    run_dir, _, _ = smoke
    rows = rows_of(run_dir)
    assert [row["iteration"] for row in rows] == [10, 20]
    assert rows[1]["epoch"] == pytest.approx(20 * 20 / 1437)
    for row in rows:
        assert row.keys() >= CONTRACT_KEYS
        assert len(row["distance"]) == 3
        numbers = [row[key] for key in CONTRACT_KEYS - {"distance"}] + row["distance"]
        assert all(math.isfinite(number) and number >= 0 for number in numbers)
    assert rows[1]["objective"] < rows[0]["objective"] < 1437 * math.log(10)
    summary = json.loads((run_dir / "summary.json").read_text())
    facts = summary.pop("environment")
    assert summary.pop("best") == {"iteration": 20, "test_error": rows[1]["test_error"]}
    assert summary.pop("selection") == {"column": "test_error", "goal": "min"}
    assert summary.pop("goals") == {"error": "min"}
    assert summary.pop("model") == {"name": "lenet5", "options": {"num_classes": 10}}
    assert summary.pop("checkpoints").keys() == {"written", "wait_s", "write_s"}
    assert summary == rows[1]
    assert facts["torch"] == torch.__version__
    assert (facts["workers"], facts["device"], facts["seed"]) == (2, "cpu", 0)


@pytest.mark.ranks
@pytest.mark.slow
def test_smoke_model_has_the_measured_errors(smoke):
    run_dir, _, _ = smoke
    model = PlainLeNet()
    state = torch.load(run_dir / "model.pt", weights_only=True)
    model.load_state_dict(state)  # strict
    data = DATASETS.make("digits")
    with torch.no_grad():
        logits = model(data.test.inputs)
    row = rows_of(run_dir)[-1]
    wrong = int((logits.argmax(1) != data.test.targets).sum())
    assert row["test_error"] == pytest.approx(100 * wrong / 360, abs=1e-9)
    loss = float(cross_entropy(logits.double(), data.test.targets, reduction="sum"))
    assert row["test_loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.ranks
@pytest.mark.slow
def test_smoke_pictures(smoke):
    run_dir, _, _ = smoke
    picture = imread(run_dir / "convergence.png")
    assert picture.shape[:2] == (480, 1100), "2.4 by 5.5 inches at 200 dots"
    assert picture[..., :3].std() > 0.05
    events = EventAccumulator(str(run_dir)).Reload()
    tags = set(events.Tags()["scalars"])
    assert tags >= {f"workers_and_layers/distance/{name}" for name in ("conv1", "conv2", "fc")}
    assert [e.step for e in events.Scalars("evaluation/objective")] == [10, 20]
    assert [e.step for e in events.Scalars("training/minibatch_loss")] == [5, 10, 15, 20]


@pytest.mark.ranks
@pytest.mark.slow
def test_smoke_screen(smoke):
    run_dir, how, ended = smoke
    lines = [line for line in ended.out.splitlines() if not line.startswith("[Gloo]")]  # torch 2.9
    where = "1 process on cpu" if how else "2 processes on cpu over gloo"
    assert lines[0] == (
        f"consensus with tan: 2 workers, {where}, lenet5 (n = 33,580, L = 3) on digits, "
        f"20 iterations, pull 0.1, outer 0.02 -> {run_dir}"
    )
    assert re.findall(r"^iteration +(\d+)", "\n".join(lines), re.MULTILINE) == ["10", "20"]
    assert lines[-1] == f"results in {run_dir}"


@pytest.mark.ranks
@pytest.mark.slow
def test_a_finished_run_is_never_overwritten(smoke, refused):
    run_dir, _, _ = smoke
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    assert refused("experiment=smoke", f"output.run_dir={run_dir}") == (
        f"`output.run_dir` is {run_dir}; allowed: an empty or new directory; this one holds a "
        "finished run (summary.json); resume=auto continues it"
    )
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")} == before


# ---- refusals: exit code 2, one line, before any process group


@pytest.fixture
def main(monkeypatch, capsys, tmp_path):
    """`main("lam=abc", RANK="1")`: exit code, stdout and stderr of the command, in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # main sets it; monkeypatch restores it
    monkeypatch.setattr(entry.time, "sleep", lambda seconds: None)  # of the ranks that do not print

    def call(*overrides: str, **launch: str) -> tuple[int, str, str]:
        for name in LAUNCH:
            monkeypatch.delenv(name, raising=False)
        for name, value in launch.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", ["consensus.train", *overrides])
        code = 0
        try:
            entry.main()
        except SystemExit as leaving:
            code = leaving.code
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def refused(main, tmp_path):
    """`refused("lam=abc")`: the line of a refusal, without the name of the command."""

    def call(*overrides: str, **launch: str) -> str:
        code, out, err = main(*overrides, **launch)
        assert (code, out) == (2, "")
        assert err.startswith("consensus.train: ")
        assert err.endswith("\n")
        assert err.count("\n") == 1, err
        assert not torch.distributed.is_initialized()
        return err.strip().removeprefix("consensus.train: ")

    return call


TWO = {
    "RANK": "0",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "1",
}


@pytest.mark.parametrize(
    ("override", "start"),
    [
        ("potential=cubik", "`potential` is cubik; allowed: cubic, huber, "),
        ("potential.etta=1", "unknown key `potential.etta` (did you mean `eta`?); allowed in"),
        ("+potential.etta=1", "unknown key `potential.etta` (did you mean `eta`?); allowed in"),
        ("lamda=1", "unknown key `lamda` (did you mean `algorithm.lam`?); allowed in "),
        ("algorithm.lam=abc", "`algorithm.lam` is 'abc'; allowed: a number > 0 (inf uncouples the"),
        ("algorithm.lam=-1", "`algorithm.lam` is -1.0; allowed: a number > 0"),
        ("algorithm=3", "Config group override must be a string or a list. Got int"),
        ("experiment=smok", "`experiment` is smok; allowed: "),
        ("foo=[", "`foo` is [; Hydra cannot read it (no viable alternative at input '['"),
        ("workers=0", "`workers` is 0; allowed: null, or a whole number >= 1"),
        ("resume=runs/lam=0.1,é", "`resume` is %s/runs/lam=0.1,é; allowed: never, auto, or the"),
        ("output.name=a=b/c", "`output.name` is 'a=b/c'; allowed: a word without `/`"),
        ("algorithm.batch_size=5000", "`algorithm.batch_size` is 5000; allowed: at most 1437, "),
        ("plugins=[nowhere]", "`plugins` is nowhere; allowed: a module on the Python path or in "),
        ("~algorithm", "`algorithm`: "),
        ("+model.options.depth=2", "`model` is lenet5 {'num_classes': 10, 'depth': 2}: "),
    ],
)
def test_refusals(refused, override, start, tmp_path):
    assert refused(override, "device=cpu").startswith(start.replace("%s", str(tmp_path)))
    assert list(tmp_path.iterdir()) == [], "nothing was made"


def test_refusal_of_a_file_that_is_not_yaml(refused, tmp_path):
    (tmp_path / "experiment").mkdir()
    file = tmp_path / "experiment" / "mine.yaml"
    file.write_text("# @package _global_\nalgorithm: [\n")
    line = refused(f"hydra.searchpath=[file://{tmp_path}]", "experiment=mine")
    assert f'in "{file}", line 3, column 1' in line


def test_refusals_that_depend_on_the_launch(refused, tmp_path):
    assert refused("workers=3", **TWO) == (
        "`workers` is 3; allowed: a multiple of the 2 processes (WORLD_SIZE), or null for one each"
    )
    assert refused("algorithm=msgd", **TWO).startswith("`algorithm` is msgd; allowed: one process,")


@pytest.mark.parametrize("how", ["--multirun", "-m", "hydra.mode=MULTIRUN"])
def test_multirun_under_torchrun_is_refused(refused, how):
    line = refused(how, "seed=1,2", "device=cpu", **TWO)
    assert line == "--multirun under torchrun would sweep on every rank; leave it out"


def test_only_one_rank_of_a_node_prints_at_once(main, monkeypatch):
    slept = []
    monkeypatch.setattr(entry.time, "sleep", slept.append)
    other = TWO | {"RANK": "1", "LOCAL_RANK": "1"}
    code, out, err = main("workers=3", **other)
    # It prints only if torchrun has not ended it during its sleep, which takes no time here.
    assert (code, out) == (2, "")
    assert err.startswith("consensus.train: rank 1: `workers` is 3; allowed: ")
    assert slept == [entry.PATIENCE_S]
    first_of_second_node = TWO | {"RANK": "1", "LOCAL_WORLD_SIZE": "1"}
    assert main("workers=3", **first_of_second_node)[2].count("\n") == 1


def test_mnist_that_is_absent_and_cannot_be_downloaded(refused, monkeypatch, tmp_path):
    def unreachable(*args, **kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    line = refused("data=mnist", f"data.root={tmp_path}/none", "device=cpu")
    assert line.startswith(f"`data.root` is '{tmp_path}/none': MNIST is not in {tmp_path}/none/")
    assert "no route to host" in line


def test_cfg_shows_the_config_and_does_not_train(main, tmp_path):
    code, out, err = main("--cfg", "job", "potential=tan")
    assert (code, err) == (0, "")
    shown = OmegaConf.create(out)
    assert (shown.potential.name, shown.algorithm.lam, shown.workers) == ("tan", 0.1, None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("own", [[], ["hydra.job.name=mine"]], ids=["plain", "a key of Hydra"])
def test_values_of_hydra_can_be_interpolated(main, monkeypatch, own):
    """A key of Hydra itself sends the command line through its main function."""
    names = []
    monkeypatch.setattr(entry, "run", lambda config, *_: names.append(config.output.name))
    value = "${hydra:runtime.choices.potential}-${hydra:job.name}"
    code, _, err = main("potential=tan", f"output.name={value}", *own)
    assert (code, err) == (0, "")
    assert names == [f"tan-{'mine' if own else 'train'}"]


# ---- failures at run time, in this process


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "runs/metrics.jsonl"),
            1,
            "rank 0: No space left on device for runs/metrics.jsonl: free some space, or choose "
            "another output.root",
        ),
        (MemoryError(), 1, f"rank 0: out of memory: {LESS}, or a higher limit of the job"),
        (GroupError("iteration 3: worker 1"), 1, "iteration 3: worker 1"),
        (NotConvergedError("psi' is"), 1, "rank 0: psi' is"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_an_expected_failure_is_one_line(main, monkeypatch, error, code, line):
    def fail(self):
        raise error

    monkeypatch.setattr(Trainer, "run", fail)
    answer = main("model=logistic", "device=cpu")
    assert answer == (code, "", f"consensus.train: {line}\n")


def test_a_model_that_needs_more_memory_than_there_is_is_refused(refused):
    line = refused("model=mlp", "model.options.hidden=[100000000000]", "device=cpu")
    wanted = 784 * 4 * 10**11 / 1e6  # the first layer, in float32
    assert (
        line
        == f"out of memory ({wanted:,.0f} MB more wanted): {LESS}, or a higher limit of the job"
    )


def test_switches_may_stand_between_overrides(main, monkeypatch, tmp_path):
    (tmp_path / "own" / "experiment").mkdir(parents=True)
    own = "# @package _global_\nalgorithm: {iterations: 3}\n"
    (tmp_path / "own" / "experiment" / "mine.yaml").write_text(own)
    ran = []
    monkeypatch.setattr(entry, "run", lambda config, *_: ran.append(config.algorithm))
    for words in (
        ("model=logistic", "--config-dir=own", "experiment=mine", "device=cpu"),
        ("experiment=mine", "--config-dir", "own", "model=logistic", "device=cpu"),
    ):
        assert main(*words)[0] == 0
    assert [algorithm.iterations for algorithm in ran] == [3, 3]


@pytest.mark.parametrize("bug", [ZeroDivisionError("a bug"), ValueError("a bug")])
@pytest.mark.parametrize(
    ("module", "found"),
    [
        ("consensus.run.trainer", "this is a bug"),
        ("mine", "/plugins/mine.py, line 3: {}: a bug"),  # the code of a user
    ],
)
def test_a_bug_keeps_its_traceback(main, monkeypatch, bug, module, found):
    code = compile("def run(self):\n\n    raise bug", "/plugins/mine.py", "exec")
    exec(code, names := {"__name__": module, "bug": bug})
    monkeypatch.setattr(Trainer, "run", names["run"])
    code, _, err = main("model=logistic", "device=cpu")
    assert code == 1
    assert err.startswith("Traceback (most recent call last):")
    assert f"{type(bug).__name__}: a bug" in err
    found = found.format(type(bug).__name__)
    assert err.endswith(f"\nconsensus.train: rank 0: {found}; see the traceback\n")


def test_a_run_directory_that_cannot_be_made(main, tmp_path):
    (tmp_path / "file").touch()
    overrides = ["model=logistic", "device=cpu"]
    expected = "rank 0: cannot write the run directory: Not a directory: "
    for where in ("run_dir", "root"):
        code, out, err = main(*overrides, f"output.{where}={tmp_path}/file/below")
        assert (code, out) == (1, "")
        assert err.startswith(f"consensus.train: {expected}{tmp_path}/file/below")
        assert err.count("\n") == 1


def fill_the_disk(group, config):
    """A run whose rank 0 cannot write its second evaluation."""
    plan = make_plan(config, Launch(group.rank, group.size, group.rank, group.size))
    trainer = Trainer(plan, group)
    write, rows = JsonlSink.evaluation, []

    def evaluation(self, row):
        rows.append(row)
        if len(rows) == 2:
            raise OSError(28, "No space left on device")
        write(self, row)

    JsonlSink.evaluation = evaluation
    try:
        trainer.run()
    except GroupError as error:
        return str(error), int(digest(trainer.algorithm.u))
    finally:
        JsonlSink.evaluation = write
    return None


@pytest.mark.ranks
def test_a_full_disk_on_rank_0_is_raised_by_all_ranks(ranks, make_config, tmp_path):
    overrides = ["model=logistic", "device=cpu", "experiment=smoke"]
    config = make_config(*overrides, f"output.run_dir={tmp_path}/run")
    answers = ranks(2, fill_the_disk, config)
    message = f"rank 0: cannot write to {tmp_path}/run: No space left on device"
    assert [answer[0] for answer in answers] == [message] * 2
    assert answers[0][1] == answers[1][1]
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 1


def open_trainer(group, config):
    plan = make_plan(config, Launch(group.rank, group.size, group.rank, group.size))
    try:
        Trainer(plan, group)
    except GroupError as error:
        return str(error)
    return None


@pytest.mark.ranks
def test_a_run_directory_that_cannot_be_made_concerns_all_ranks(ranks, make_config, tmp_path):
    (tmp_path / "file").touch()
    run_dir = tmp_path / "file" / "run"
    config = make_config("model=logistic", "device=cpu", f"output.run_dir={run_dir}")
    answers = ranks(2, open_trainer, config)
    assert answers == [f"rank 0: cannot write the run directory: Not a directory: {run_dir}"] * 2


# ---- real processes


@pytest.mark.ranks
def test_refusal_of_a_plain_process(tmp_path):
    ended = run(tmp_path, "potential=cubik")
    assert (ended.code, ended.out) == (2, "")
    assert ended.err == (
        "consensus.train: `potential` is cubik; allowed: cubic, huber, log, log_cosh, log_sep, "
        "power, pseudo_huber, quad, scaled_quad, tan, tan_sep; did you mean `cubic`?\n"
    )


@pytest.mark.ranks
@pytest.mark.slow
def test_a_refusal_under_torchrun_is_printed_once(tmp_path):
    # Both ranks search for the data; the proxy refuses at once on any machine.
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTPS_PROXY"), "http://127.0.0.1:9")
    ended = run(tmp_path, "data=mnist", "data.root=none", processes=2, no_proxy="", **nowhere)
    assert ended.code != 0
    (line,) = ended.lines
    assert "MNIST is not in" in line
    assert "exitcode  : 2" in ended.err, "as torchrun reports it"
    # torchrun's own report has a traceback of torchrun; ours would name this package.
    assert "consensus/train.py" not in ended.err
    assert not (tmp_path / "runs").exists()
    assert ended.left_behind == []
    assert ended.seconds < 200  # and not the timeout of the group


@pytest.mark.ranks
@pytest.mark.slow
def test_a_run_that_diverges_ends_on_all_ranks(tmp_path):
    overrides = ["experiment=smoke", "device=cpu", "algorithm.sigma=1e36", "output.run_dir=run"]
    with Ranks(2, overrides, tmp_path) as ranks:
        assert ranks.wait(200) == [1, 1]  # and not after the timeout of the group
        (line,), (other,) = ranks.lines(0), ranks.lines(1)  # torchrun would have ended rank 1
        assert "consensus/train.py" not in ranks.err(0) + ranks.err(1)
    pattern = r"consensus\.train: iteration \d: worker ([01]) on rank \1 became non-finite, "
    assert re.match(pattern, line)
    assert "algorithm.sigma" in line
    assert other == line.replace("consensus.train: ", "consensus.train: rank 1: ")
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert left.isdisjoint({"summary.json", "model.pt"}), "no file of a finished run"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.ranks
@pytest.mark.slow
def test_the_survivor_of_a_killed_rank_exits_by_itself(tmp_path):
    # Without torchrun, which would end the survivor, and whose store would outlive rank 0.
    meeting = {"MASTER_PORT": str(free_port()), "TORCHELASTIC_USE_AGENT_STORE": "False"}
    endless = ["algorithm.iterations=1000000", "output.eval_every=5", "output.tensorboard=false"]
    own = ["model=logistic", "device=cpu", "output.run_dir=run", *endless]
    metrics = tmp_path / "run" / "metrics.jsonl"
    with Ranks(2, own, tmp_path, env=meeting) as ranks:
        deadline = time.monotonic() + 90
        while not (metrics.exists() and metrics.read_text()):
            assert not ranks.ended, ranks.err(0)
            assert time.monotonic() < deadline
            time.sleep(0.1)
        ranks.kill(1)
        assert ranks.wait(60) == [1, -signal.SIGKILL]
        (line,) = ranks.lines(0)
        assert "Traceback" not in ranks.err(0)
    assert re.match(r"consensus\.train: rank 0: lost a peer in `\w+`: ", line)
    assert not (tmp_path / "run" / "summary.json").exists()


# ---- a plugin on several processes


@pytest.mark.ranks
def test_a_plugin_of_the_current_folder_on_several_processes(tmp_path, monkeypatch):
    own = ["plugins=[mine]", "potential=quartic", "data=stripes", "model=tiny", "dtype=float64"]
    own += ["model.options.depth=1", "workers=4", "algorithm.batch_size=4", "device=cpu"]
    own += ["algorithm.iterations=6", "output.tensorboard=false", "output.run_dir=run"]
    found = []
    for size in (1, 2, 4):
        folder = tmp_path / str(size)
        folder.mkdir()
        (folder / "mine.py").write_text(MINE)
        with Ranks(size, own, folder) as ranks:
            assert ranks.wait(120) == [0] * size, ranks.err(0)
        found.append(json.loads((folder / "run" / "summary.json").read_text()))
    for key in ("objective", "train_loss", "coupling"):  # u is compared across the ranks by the run
        assert found[0][key] == pytest.approx(found[1][key], rel=1e-9)
        assert found[0][key] == pytest.approx(found[2][key], rel=1e-9)
    assert found[0]["environment"]["processes"] == 1
    assert found[2]["environment"]["processes"] == 4
