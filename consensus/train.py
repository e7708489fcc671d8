"""Entry of a training run, under torchrun or plain python; --help describes the command.

Exit codes: 0 the run is complete; 1 it failed at run time; 2 the config was refused, before any
process group opened; 75 it stopped on request (SIGTERM, SIGINT, SIGUSR1, SIGHUP) and left a
checkpoint; 128 + the signal, it stopped without a checkpoint (130: a second Ctrl+C).
"""

import os
import sys

from consensus.startup import announce, begin_imports, end_imports, protect_streams

begin_imports(__name__, "consensus.train")  # the imports below take seconds

from consensus.help import answer_questions

answer_questions(__name__, "consensus.train")
announce(__name__, "consensus.train")

import re
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

import hydra
from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from consensus.comm import GroupError, Launch, LaunchError, PeerLostError
from consensus.core.scalar_equation import NotConvergedError
from consensus.private_api import run_exit_handlers
from consensus.problem import SampleError
from consensus.run.api import run
from consensus.run.checks import ConfigError
from consensus.run.compose import (
    REFUSALS,
    composing,
    explain,
    is_refusal,
    refuse_unknown_switches,
    register_for_main,
    to_config,
)
from consensus.run.continued import as_replayed, continued
from consensus.run.elastic.member import train_as_member
from consensus.run.elastic.replay import ReplayTrainer
from consensus.run.limits import MachineError
from consensus.run.overrides import before_switches, take_as_text
from consensus.run.plugins import place_in_user_code
from consensus.run.signals import RunStopped, follow_launcher
from consensus.run.trainer import Trainer
from consensus.run.yaml_files import config_dir

_OF_HYDRA = re.compile(r"-|[+~]*hydra\b")
"""The beginning of a switch such as --multirun or --cfg, or of a key of Hydra itself."""

PATIENCE_S = 5.0  # torchrun checks every 0.1 s whether a rank has failed


def train(cfg: DictConfig) -> None:
    """Train with a composed config, whose overrides `HydraConfig` has."""
    with failures_in_one_line():
        launch = Launch.from_environment()
        if HydraConfig.get().mode == RunMode.MULTIRUN and launch.size > 1:
            raise ConfigError("--multirun under torchrun would sweep on every rank; leave it out")
        overrides = HydraConfig.get().overrides.task
        if OmegaConf.select(cfg, "group.elastic") is True:
            train_as_member(cfg, overrides, launch)
            return
        cfg = as_replayed(continued(cfg, overrides, launch.size), overrides)
        config = to_config(cfg, overrides)
        kind = Trainer if config.group.replay is None else ReplayTrainer
        run(config, launch, lambda plan, group: kind(plan, group).run())


def main() -> None:
    """Entry of the command line."""
    # Hydra would print an error of composition in several lines and exit with 1. Failures of the
    # task itself are reported inside it, before Hydra adds a line of its own.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    answer_questions("__main__", "consensus.train")
    protect_streams("consensus.train")
    end_imports()
    follow_launcher()
    with failures_in_one_line():
        sys.argv[1:] = before_switches(sys.argv[1:])
        refuse_unknown_switches()
        multirun = not {"-m", "--multirun"}.isdisjoint(sys.argv)
        words = take_as_text(sys.argv[1:], sweeping=multirun)
        if any(map(_OF_HYDRA.match, words)):
            sys.argv[1:] = words
            warnings.filterwarnings("error", ".*searchpath.* is not available", UserWarning)
            register_for_main(words)
            hydra.main(version_base="1.3", config_path=config_dir(), config_name="train")(train)()
        else:
            compose_and_train(words)
    if has_peers():
        # Modules of torch that are imported while a group is open keep its threads alive until
        # interpreter shutdown, where they sometimes abort a process that has succeeded.
        run_exit_handlers()
        end(0)


def compose_and_train(words: Sequence[str]) -> None:
    """Compose the config and train. `hydra.main` would compose it twice, in 0.1 s each."""
    with composing("train", words) as (overrides, _):
        cfg = compose("train", overrides=overrides, return_hydra_config=True)
        HydraConfig.instance().set_config(cfg)  # for ${hydra:...}
        with open_dict(cfg):
            del cfg["hydra"]
        train(cfg)


@contextmanager
def failures_in_one_line() -> Iterator[None]:
    """Turn an expected failure into one line on stderr and an exit code.

    Any other exception is a bug, of this software or of a plugin, and keeps its traceback.
    """
    rank, local_rank = os.environ.get("RANK", "0"), os.environ.get("LOCAL_RANK", "0")
    try:
        yield
    except (*REFUSALS, LaunchError) as error:
        leave(explain(error), 2, speak=local_rank == "0")
    except (MachineError, NotConvergedError, SampleError) as error:
        leave(f"rank {rank}: {error}", 1, speak=True)
    except PeerLostError as error:
        leave(str(error), 1, speak=True)
    except GroupError as error:
        leave(str(error), 1, speak=rank == "0")
    except RunStopped as stopped:
        # All ranks are here and have finished, so none waits for another.
        leave(str(stopped) or None if rank == "0" else None, stopped.code)
    except OSError as error:
        leave(f"rank {rank}: {error}", 1, speak=True)
    except KeyboardInterrupt:
        # An interrupt reaches all ranks, so none waits for another.
        leave("interrupted" if rank == "0" else None, 130)
    except Exception as error:
        if is_refusal(error):
            leave(explain(error), 2, speak=local_rank == "0")
        traceback.print_exc()
        where, kind = place_in_user_code(error), type(error).__name__
        found = f"{where}: {kind}: {error}" if where else "this is a bug"
        leave(f"rank {rank}: {found}; see the traceback", 1, speak=True)


def leave(message: str | None, code: int, speak: bool = True) -> NoReturn:
    """Exit this rank, with a line on stderr unless the message is None.

    An error known to all ranks is printed by one, the rank that may `speak`. torchrun ends all
    ranks as soon as one has failed, so the others wait until it ends them. A rank that survives
    the wait failed alone, and prints.
    """
    if not speak:
        time.sleep(PATIENCE_S)
        message = f"rank {os.environ.get('RANK', '0')}: {message}"
    if message is not None:
        line = " ".join(message.split())  # a path or a name may contain line breaks
        print(f"consensus.train: {line}", file=sys.stderr, flush=True)
    if code != 2 and has_peers():
        end(code)  # closing a process group would wait for peers that may be gone or stuck
    sys.exit(code)


def has_peers() -> bool:
    """Whether this is one of several processes of a run."""
    return os.environ.get("WORLD_SIZE", "1") != "1" or "CONSENSUS_MEMBERS" in os.environ


def end(code: int) -> NoReturn:
    """Exit this process at once, without the handlers of Python."""
    sys.stdout.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
