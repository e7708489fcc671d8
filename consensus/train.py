"""Entry of a training run, under torchrun or plain python.

torchrun --standalone --nproc-per-node=4 -m consensus.train KEY=VALUE ...
python -m consensus.train workers=4 KEY=VALUE ...

Exit codes: 0 the run is complete; 1 it failed at run time; 2 the config was refused, before any
process group opened; 75 it was asked to stop (SIGTERM, SIGUSR1) and left a checkpoint; 128 + the
signal, it was and could not; 130 interrupted.
"""

import io
import os
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from consensus.comm import GroupError, Launch, LaunchError, PeerLostError, open_group
from consensus.private_api import run_exit_handlers
from consensus.run.compose import (
    REFUSALS,
    config_dir,
    explain,
    full_key,
    refuse_unknown_switches,
    register_schema,
    to_config,
)
from consensus.run.config import ConfigError
from consensus.run.plan import make_plan, set_determinism
from consensus.run.signals import follow_launcher
from consensus.run.trainer import RunStopped, Trainer

register_schema()

REFUSED = (*REFUSALS, LaunchError)
PATIENCE_S = 5.0  # torchrun looks every 0.1 s whether a rank has failed


@hydra.main(version_base="1.3", config_path=config_dir(), config_name="train")
def train(cfg: DictConfig) -> None:
    """Plan, meet, train, leave."""
    with failures_in_one_line():
        launch = Launch.from_environment()
        if HydraConfig.get().mode == RunMode.MULTIRUN and launch.size > 1:
            raise ConfigError("--multirun under torchrun would sweep on every rank; leave it out")
        config = to_config(cfg)
        set_determinism(config)
        plan = make_plan(config, launch)
        if plan.device.type == "cuda":
            torch.cuda.set_device(plan.device)
        options = config.group
        group = open_group(
            launch,
            plan.backend,
            plan.device,
            options.timeout_s,
            options.shared_memory,
            options.compress,
        )
        with group.publish_failure():
            Trainer(plan, group).run()
        group.close()  # after a failure the group is not closed but left: peers may hang in it


def main() -> None:
    """Entry of the command line."""
    # Hydra would print what its composition raises in several lines and exit with 1. Failures of
    # the task itself are told inside it, before Hydra adds a line of its own.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a path may hold what no encoding does
    follow_launcher()
    with failures_in_one_line():
        refuse_unknown_switches()
        warnings.filterwarnings("error", ".*searchpath.* is not available", UserWarning)
        train()
    if os.environ.get("WORLD_SIZE", "1") != "1":
        # Modules of torch that are imported while a group is open keep its threads to the very end
        # of Python, where they now and then abort a process that has done its work.
        run_exit_handlers()
        end(0)


@contextmanager
def failures_in_one_line() -> Iterator[None]:
    """Turn what is expected to go wrong into one line on stderr and an exit code.

    Anything else is a bug and keeps its traceback.
    """
    rank, local_rank = os.environ.get("RANK", "0"), os.environ.get("LOCAL_RANK", "0")
    try:
        yield
    except REFUSED as error:
        leave(explain(error), 2, speak=local_rank == "0")
    except PeerLostError as error:
        leave(str(error), 1, speak=True)
    except GroupError as error:
        leave(str(error), 1, speak=rank == "0")
    except RunStopped as stopped:
        # All ranks are here, with nothing left to do: none has to wait for another.
        leave(str(stopped) if rank == "0" else None, stopped.code)
    except OSError as error:
        leave(f"rank {rank}: {error}", 1, speak=True)
    except KeyboardInterrupt:
        # Whoever interrupts reaches all ranks: none has to wait for another.
        leave("interrupted" if rank == "0" else None, 130)
    except Exception as error:
        # Hydra lets a few through as they are: for `algorithm=3`, or a YAML file it cannot parse.
        if package_that_raised(error) in ("hydra", "yaml") or full_key(error):
            leave(explain(error), 2, speak=local_rank == "0")
        traceback.print_exc()
        leave(f"rank {rank}: this is a bug, see the traceback", 1, speak=True)


def package_that_raised(error: BaseException) -> str:
    """The top-level package of the innermost frame."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


def leave(message: str | None, code: int, speak: bool = True) -> NoReturn:
    """End this rank. What all ranks know, one of them says; None says nothing.

    torchrun ends all ranks as soon as one has failed, so the silent ones must not be first: they
    wait for torchrun to end them. One that is still here afterwards was alone with its failure.
    """
    if not speak:
        time.sleep(PATIENCE_S)
        message = f"rank {os.environ.get('RANK', '0')}: {message}"
    if message is not None:
        line = " ".join(message.split())  # a path, or a name, may hold line breaks
        print(f"consensus.train: {line}", file=sys.stderr, flush=True)
    if code != 2 and os.environ.get("WORLD_SIZE", "1") != "1":
        end(code)  # the teardown of a process group waits for peers that may be gone or stuck
    sys.exit(code)


def end(code: int) -> NoReturn:
    """End this process at once."""
    with suppress(OSError):  # nobody may be left to read it
        sys.stdout.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
