"""Preflight check of machines, network and configuration.

`python -m consensus.doctor --help` describes the command. It leaves no files behind.
"""

import os
import signal
import sys
from collections.abc import Sequence

from consensus.startup import (
    announce,
    begin_imports,
    end_imports,
    interrupt_on_signals,
    protect_streams,
)

begin_imports(__name__, "consensus.doctor")  # the imports below take seconds

from consensus.help import answer_questions

answer_questions(__name__, "consensus.doctor")
announce(__name__, "consensus.doctor")

from hydra import compose

from consensus.comm import Launch, LaunchError
from consensus.doctor.examination import end, examine, here
from consensus.doctor.exchange import Nodes
from consensus.doctor.finding import print_report, unexpected
from consensus.doctor.step_size import search
from consensus.run.checks import ConfigError, require
from consensus.run.compose import REFUSALS, composing, explain, to_config
from consensus.run.continued import continued
from consensus.run.overrides import take_as_text


def main() -> None:
    """Entry of the command line."""
    os.environ["HYDRA_FULL_ERROR"] = "1"
    answer_questions("__main__", "consensus.doctor")
    protect_streams("consensus.doctor")
    end_imports()
    try:
        with composing("doctor", take_as_text(sys.argv[1:])) as (overrides, _):
            job = Nodes.from_environment() or Launch.from_environment()
            overrides, tries_steps = read(overrides, job)
            cfg = compose("train", overrides=overrides)
            cfg = continued(cfg, overrides, job.size)
            config = to_config(cfg, overrides)
    except (*REFUSALS, LaunchError) as error:
        sys.exit(refuse(error))
    interrupt_on_signals()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that folders are removed
    code = 1
    try:
        code = search(cfg) if tries_steps else examine(config, job)
    except REFUSALS as error:
        code = refuse(error)
    except KeyboardInterrupt:
        code = 130
    except SystemExit as stop:
        code = int(stop.code or 0)
    except Exception as error:
        print_report([here()], [[unexpected("doctor", error)]])
    end(code)


def read(words: Sequence[str], job: Nodes | Launch) -> tuple[list[str], bool]:
    """The overrides of the run, and whether `step_size=true` is among the words."""
    overrides, value = [], "false"
    for word in words:
        key, _, text = word.partition("=")
        if word.startswith("-"):
            allowed = "the doctor takes nothing else but --config-dir=FOLDER"
            raise ConfigError(f"`{word}` is no KEY=VALUE, and {allowed}")
        if key == "step_size":
            value = text
        else:
            overrides.append(word)
    require(value in ("true", "false"), "step_size", value, "true, false")
    alone = isinstance(job, Launch) and job.size == 1
    allowed = "false on several processes: `python -m consensus.doctor step_size=true workers=M`"
    require(value == "false" or alone, "step_size", value, allowed)
    return overrides, value == "true"


def refuse(error: Exception) -> int:
    """Print the line of a refusal; return the exit code."""
    print(f"consensus.doctor: {explain(error)}", file=sys.stderr, flush=True)
    return 2


if __name__ == "__main__":
    main()
