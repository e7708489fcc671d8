"""Training from Python: `consensus.train`, `consensus.load` and `consensus.compose`.

    result = consensus.train("experiment=smoke", "potential=tan", "workers=4")
    result.rows, result.best, result.model

The commands and these functions share `run`: a plan, the process group, and work on both.
"""

import copy
import itertools
import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import hydra
import torch
from torch import nn

from consensus.comm import Group, GroupError, Launch, LaunchError, PeerLostError, open_group
from consensus.problem import DATASETS, MODELS, SampleError
from consensus.problem.streams import restored_generators
from consensus.records import Row, read_rows
from consensus.run.checkpoint.manifest import brief
from consensus.run.checks import ConfigError, require, require_one_of
from consensus.run.compose import composing, explain, is_refusal, to_config
from consensus.run.config import Config
from consensus.run.continued import continued
from consensus.run.limits import MachineError, machine_failures
from consensus.run.overrides import take_as_text
from consensus.run.plan import Plan, make_plan, set_determinism
from consensus.run.plugins import import_plugin
from consensus.run.problem import offered
from consensus.run.signals import RunStopped
from consensus.run.trainer import Trainer
from consensus.stored_config import read_config

T = TypeVar("T")

_ONE_AT_A_TIME = threading.RLock()  # global generators and the modes of torch are of the process
_number = itertools.count()  # of a run in this process


@dataclass(frozen=True)
class Result:
    """A finished run.

    Attributes:
        run_dir: The run directory.
        rows: The evaluations, as in metrics.jsonl; a number that is not finite is None.
        summary: The content of summary.json.
        model: The model at u after the last iteration, in evaluation mode.
    """

    run_dir: Path
    rows: list[Row]
    summary: dict[str, Any]
    model: nn.Module

    @property
    def best(self) -> dict[str, float]:
        """The `iteration` of the best evaluation, and the number that decided."""
        found: dict[str, float] = self.summary["best"]
        return found

    def __repr__(self) -> str:
        last, best = self.rows[-1]["iteration"], self.summary.get("best")
        return f"Result('{self.run_dir}', iteration={last}, best={best})"


def train(*overrides: str | Config, quiet: bool = False) -> Result:
    """Train as the command `consensus-train` does, and return the result on every rank.

    In one process `workers=4` trains four workers. In a script under torchrun, every process calls
    `train` with the same arguments. A stop signal ends the run with a checkpoint, as it does the
    command, but in the main thread only. The process is left as it was found: signal handlers,
    global generators, the modes of torch, and Hydra.

    Args:
        overrides: Those of the command line, such as "potential=tan", or one `Config`, as `compose`
            returns it.
        quiet: Print nothing.

    Raises:
        ConfigError: If an override, the config or the launch is refused, in one line as by the
            command.
        GroupError: If the run fails at run time, on all ranks; after a lost peer the process group
            cannot be used again.
        SampleError: A RuntimeError, if a rank cannot read a sample; the others lose a peer.
        RunStopped: After a stop signal, or at `output.stop_at`; the message names the checkpoint.
    """
    with _ONE_AT_A_TIME, _process_of_a_command():
        launch = _launch()
        config = _config_of(overrides, launch)
        for key in ("elastic", "replay"):  # other trainers, of the command
            value = getattr(config.group, key)
            allowed = "with the command consensus.train only"
            require(not value, f"group.{key}", value, allowed)
        # After a restart by torchrun, run number n of the script continues run number n.
        number = next(_number)
        launch = replace(launch, name=f"{launch.name}#{number}" if number else launch.name)
        return run(config, launch, lambda plan, group: _train(plan, group, quiet))


def compose(*overrides: str) -> Config:
    """The checked config of a run, to look at, change and pass to `train`.

    Raises:
        ConfigError: If an override is refused.
    """
    return _config_of(overrides, _launch())


def load(run_dir: str | Path) -> Result:
    """The result of a finished run, from its directory; the model is on the CPU.

    A model of a plugin needs its plugin, which is imported if the model is not registered yet.

    Raises:
        ConfigError: If there is no finished run, or no such model or plugin.
        ValueError: If a file is damaged.
    """
    path = Path(run_dir).expanduser()
    finished = (path / "summary.json").is_file()
    require(finished, "run_dir", path, "the directory of a finished run, with a summary.json")
    with _reading(path / "summary.json") as file:
        summary = json.loads(file.read_bytes())
        made = summary.get("model", {})
    with _reading(path / "config.yaml") as file:
        config = read_config(file)
        name = config["model"]["name"]
    options = made.get("options")
    if name not in MODELS:
        for plugin in config["plugins"]:
            import_plugin(plugin)
    require_one_of("model.name", name, MODELS)
    if options is None:  # a run of an earlier version
        data = config["data"]
        given = DATASETS.completed(data["name"], data["options"], root=data["root"])
        classes = offered(DATASETS.make(data["name"], **given))
        options = MODELS.completed(name, config["model"]["options"], **classes)
    with restored_generators():
        model = MODELS.make(name, **options)
    with _reading(path / "model.pt") as file:
        state = torch.load(file, map_location="cpu", weights_only=True)
        dtypes = [value.dtype for value in state.values() if value.is_floating_point()]
        model.to(dtypes[0]).load_state_dict(state)
    return Result(path.resolve(), read_rows(path), summary, model.eval())


@contextmanager
def _reading(file: Path) -> Iterator[Path]:
    """ValueError if the file's content is not as it was written, whatever its parser raises."""
    try:
        yield file
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"{file} is damaged: {brief(error)}") from error


def run(config: Config, launch: Launch, work: Callable[[Plan, Group], T]) -> T:
    """Plan a run on this process of a launch, open its process group, and work on both.

    ConfigError if the plan is refused, before the group opens; otherwise the errors of `work`.
    """
    set_determinism(config)
    try:
        with machine_failures():
            plan = make_plan(config, launch)
    except (
        MachineError,
        SampleError,
    ) as error:  # as all ranks of this machine, before a group opens
        raise ConfigError(str(error)) from error
    if plan.device.type == "cuda":
        torch.cuda.set_device(plan.device)
    how = config.group
    where = launch, plan.backend, plan.device
    options = how.timeout_s, how.shared_memory, how.compress
    group = open_group(*where, *options, tree=config.deterministic)
    try:
        with group.publish_failure(), machine_failures():
            found = work(plan, group)
    except PeerLostError:
        raise
    except (GroupError, RunStopped):
        group.close()  # all ranks are here; after another failure peers may hang in the group
        raise
    group.close()
    return found


def _train(plan: Plan, group: Group, quiet: bool) -> Result:
    trainer = Trainer(plan, group, quiet=quiet, owns_process=False)
    trainer.run()
    path, found = trainer.run_dir, None
    if group.rank == 0:
        found = read_rows(path), json.loads((path / "summary.json").read_bytes())
    rows, summary = group.share(found)
    model = plan.model
    model.load_state_dict(plan.risk.state_dict(trainer.algorithm.u))
    return Result(path, rows, summary, model.eval())


def _launch() -> Launch:
    """The launch of this process. ConfigError if the environment describes none."""
    try:
        return Launch.from_environment()
    except LaunchError as error:
        raise ConfigError(str(error)) from error


def _config_of(overrides: tuple[str | Config, ...], launch: Launch) -> Config:
    """The config of overrides, completed by that of a run that `resume=auto` continues."""
    if len(overrides) == 1 and isinstance(overrides[0], Config):
        return _checked(copy.deepcopy(overrides[0]))
    texts = [text for text in overrides if isinstance(text, str)]
    if len(texts) < len(overrides):
        raise TypeError("the arguments are overrides KEY=VALUE, or one Config")
    try:
        with composing("train", take_as_text(texts)) as (others, _):
            cfg = hydra.compose("train", overrides=others)
            return to_config(continued(cfg, others, launch.size), others)
    except Exception as error:
        if isinstance(error, ConfigError) or not is_refusal(error):
            raise
        raise ConfigError(explain(error)) from error


def _checked(section: T) -> T:
    """A dataclass made again, with all sections in it, so that its checks run."""
    assert is_dataclass(section)
    values = {entry.name: getattr(section, entry.name) for entry in fields(section)}
    again: Any = type(section)
    return again(**{k: _checked(v) if is_dataclass(v) else v for k, v in values.items()})  # type: ignore[no-any-return]


@contextmanager
def _process_of_a_command() -> Iterator[None]:
    """The modes of torch with which a command starts; the state of the process is restored."""
    dtype, seed, hook = torch.get_default_dtype(), torch.initial_seed(), threading.excepthook
    strict = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    workspace, threads = os.environ.get("CUBLAS_WORKSPACE_CONFIG"), torch.get_num_threads()
    on_gpu = torch.cuda.is_initialized()
    states = torch.cuda.get_rng_state_all() if on_gpu else []
    device = torch.cuda.current_device() if on_gpu else 0
    try:
        with ExitStack() as stack:
            stack.enter_context(restored_generators())
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            if torch.get_default_device().type != "cpu":
                stack.enter_context(torch.device("cpu"))
            torch.set_default_dtype(torch.float32)
            yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_num_threads(threads)
        threading.excepthook = hook  # that of TensorBoard's sink
        if (strict, warns) != (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        ):
            torch.use_deterministic_algorithms(strict, warn_only=warns)
        if workspace is None:
            os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
        if torch.cuda.is_initialized():
            torch.cuda.set_device(device)
        if on_gpu:
            torch.cuda.set_rng_state_all(states)
        else:
            torch.cuda.manual_seed_all(seed)  # when a GPU is used first
