"""Entry of a training run, under torchrun or plain python.

torchrun --standalone --nproc-per-node=4 -m consensus.train KEY=VALUE ...
python -m consensus.train workers=4 KEY=VALUE ...

Exit codes: 0 the run is complete; 1 it failed at run time; 2 the config was refused, before any
process group opened; 130 interrupted.
"""

import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from consensus.comm import GroupError, Launch, PeerLostError, open_group
from consensus.run.config import (
    REFUSALS,
    ConfigError,
    config_dir,
    explain,
    register_schema,
    to_config,
)
from consensus.run.plan import make_plan
from consensus.run.trainer import Trainer

register_schema()


@hydra.main(version_base="1.3", config_path=config_dir(), config_name="train")
def train(cfg: DictConfig) -> None:
    """Plan, meet, train, leave."""
    with failures_in_one_line():
        launch = Launch.from_environment()
        if HydraConfig.get().mode == RunMode.MULTIRUN and launch.size > 1:
            raise ConfigError("--multirun under torchrun would sweep on every rank; leave it out")
        config = to_config(cfg)
        torch.use_deterministic_algorithms(config.deterministic)
        plan = make_plan(config, launch)
        if plan.device.type == "cuda":
            torch.cuda.set_device(plan.device)
        group = open_group(launch, plan.backend, plan.device, config.group.timeout_s)
        try:
            Trainer(plan, group).run()
            group.barrier()  # nobody leaves while rank 0 still writes
        finally:
            group.close()


def main() -> None:
    """Entry of the command line."""
    # Hydra would print what its composition raises in several lines and exit with 1. Failures of
    # the task itself are told inside it, before Hydra adds a line of its own.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    with failures_in_one_line():
        train()


@contextmanager
def failures_in_one_line() -> Iterator[None]:
    """Turn what is expected to go wrong into one line on stderr and an exit code.

    Anything else is a bug and keeps its traceback.
    """
    launch = Launch.from_environment()
    try:
        yield
    except REFUSALS as error:
        leave(f"consensus.train: {explain(error)}", 2, speak=launch.local_rank == 0)
    except PeerLostError as error:
        leave(f"consensus.train: {error}", 1, speak=True)
    except GroupError as error:
        leave(f"consensus.train: {error}", 1, speak=launch.rank == 0)
    except OSError as error:
        leave(f"consensus.train: rank {launch.rank}: {error}", 1, speak=True)
    except Exception as error:
        # Hydra lets a few through as they are: for `algorithm=3`, or a YAML file it cannot parse.
        if package_that_raised(error) not in ("hydra", "yaml"):
            raise
        leave(f"consensus.train: {explain(error)}", 2, speak=launch.local_rank == 0)
    except KeyboardInterrupt:
        leave("consensus.train: interrupted", 130, speak=launch.rank == 0)


def package_that_raised(error: BaseException) -> str:
    """The top-level package of the innermost frame."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


def leave(message: str, code: int, speak: bool) -> NoReturn:
    """End this rank. What all ranks know, one of them says.

    torchrun ends all ranks as soon as one has failed, so the silent ones must not be first: they
    wait for torchrun to end them, and leave by themselves if it does not.
    """
    if speak:
        print(message, file=sys.stderr, flush=True)
    else:
        time.sleep(10.0)
    sys.exit(code)


if __name__ == "__main__":
    main()
