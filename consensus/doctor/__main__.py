"""Preflight check of machines, network and configuration.

python -m consensus.doctor KEY=VALUE ...               this machine
torchrun ... -m consensus.doctor KEY=VALUE ...         the processes of a launch
MODULE=consensus.doctor launch/node.sh KEY=VALUE ...   the nodes of a job, then their processes

It takes the overrides of the run, and leaves no files behind.

Exit codes: 0 no fault; 1 a fault; 2 the config was refused.
"""

import os
import signal
import sys

from consensus.startup import answer_signals, interrupt_on_signals, protect_streams

answer_signals(__name__, "consensus.doctor")  # the imports below take seconds

from hydra import compose

from consensus.comm import Launch, LaunchError
from consensus.doctor.examination import end, examine, here
from consensus.doctor.exchange import Nodes
from consensus.doctor.finding import print_report, unexpected
from consensus.run.checks import ConfigError
from consensus.run.compose import REFUSALS, composing, explain, to_config
from consensus.run.continued import continued
from consensus.run.overrides import take_as_text


def main() -> None:
    """Entry of the command line."""
    os.environ["HYDRA_FULL_ERROR"] = "1"
    protect_streams("consensus.doctor")
    if "--help" in sys.argv or "-h" in sys.argv:
        print(__doc__)
        return
    try:
        with composing("doctor", take_as_text(sys.argv[1:])) as (overrides, _):
            for text in overrides:
                if text.startswith("-"):
                    allowed = "the doctor takes nothing else but --config-dir=FOLDER"
                    raise ConfigError(f"`{text}` is no KEY=VALUE, and {allowed}")
            job = Nodes.from_environment() or Launch.from_environment()
            cfg = compose("train", overrides=overrides)
            config = to_config(continued(cfg, overrides, job.size))
    except (*REFUSALS, LaunchError) as error:
        print(f"consensus.doctor: {explain(error)}", file=sys.stderr)
        sys.exit(2)
    interrupt_on_signals()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that folders are removed
    code = 1
    try:
        code = examine(config, job)
    except KeyboardInterrupt:
        code = 130
    except SystemExit as stop:
        code = int(stop.code or 0)
    except Exception as error:
        print_report([here()], [[unexpected("doctor", error)]])
    end(code)


if __name__ == "__main__":
    main()
