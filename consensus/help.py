"""Answers to --help, --version and shell completion, before the imports that take seconds.

The descriptions of keys, experiments and grids are the comments of the YAML files.
"""

import io
import os
import re
import sys
import textwrap
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from consensus.run.yaml_files import (
    GROUPS,
    Key,
    config_dir,
    default_of,
    did_you_mean,
    entries,
    keys_of_runs,
    keys_of_sweeps,
    nearest,
    register_resolvers,
)
from consensus.startup import is_program, protect_streams, version

WIDTH = 80
MAIN_KEYS = (
    "workers",
    "potential.eta",
    "algorithm.lam",
    "algorithm.sigma",
    "algorithm.batch_size",
    "algorithm.iterations",
    "algorithm.period",
    "output.run_dir",
    "output.eval_every",
    "resume",
)
"""The keys on the first page of help; the other pages have all."""

SWITCHES = """\
  --help NAME ...      describe keys, sections or groups: --help algorithm lam
  --config-dir=FOLDER  search FOLDER for YAML files too
  --version            print the version"""

TRAIN = """\
Train M workers that a potential couples, in one process or several.

Usage: python -m consensus.train [KEY=VALUE ...]
       torchrun --standalone --nproc-per-node=N -m consensus.train ...

Groups, GROUP=NAME (* default):
{groups}

Experiments, experiment=NAME:
{experiments}

Keys that matter most, KEY=VALUE (default):
{keys}

Options:
{switches}
  --cfg job            print the whole config of the run and exit

Examples:
  python -m consensus.train experiment=smoke workers=4 potential=tan
  launch/local.sh 4 experiment=digits output.run_dir=runs/mine resume=auto

Exit codes: 0 complete, 1 failed, 2 refused, 75 stopped with a checkpoint,
            128 + the signal: stopped without one
{rest}"""

SWEEP = """\
Run a grid of configurations. The same command again continues it.

Usage: python -m consensus.sweep [grid=NAME] [KEY=VALUE[,VALUE ...] ...]

A key with several values stands for one run each. Other keys are those of
python -m consensus.train; hydra/launcher=submitit_slurm makes SLURM jobs.

Grids, grid=NAME:
{grids}

Keys (default):
{sweep_keys}

Options:
  --dry-run            list the runs, and start nothing
{switches}

Examples:
  python -m consensus.sweep grid=smoke --dry-run
  python -m consensus.sweep experiment=digits seed=0,1,2 sweep.jobs=3

Exit codes: 0 all runs are done or stopped by sweep.halving, 1 some are not,
            2 refused, 75 a population stopped (a checkpoint), 130 interrupted
{rest}"""

DOCTOR = """\
Check machines, network and configuration before a run.

Usage: python -m consensus.doctor [KEY=VALUE ...]
       torchrun --standalone --nproc-per-node=N -m consensus.doctor ...
       MODULE=consensus.doctor launch/node.sh ...

It takes the keys of the run, as python -m consensus.train does, and leaves no
files behind. Under torchrun it checks the processes of the launch, and with
launch/node.sh the nodes of a job as well.

Keys (default):
  step_size (false)    true: short runs, which propose algorithm.sigma

Options:
{switches}

Examples:
  python -m consensus.doctor experiment=digits workers=4
  python -m consensus.doctor step_size=true experiment=smoke workers=4

Exit codes: 0 no fault, 1 a fault, or no step size trains, 2 refused
{rest}"""

REPORT = """\
Compare runs from their metrics files.

Usage: python -m consensus.report RUN_DIR ... [--output FILE] [--folder FOLDER]
                                  [--by KEY,...]

It prints the last evaluation of each run, and draws all runs in one figure. Two
or more runs that differ in their config give Table 1, Figure 1 and report.md.

Arguments:
  RUN_DIR              a run, or a folder of runs
  --output FILE        the figure; default: report.png in the first RUN_DIR
  --folder FOLDER      for Table 1, Figure 1 and report.md; default: report in
                       the first RUN_DIR, if that is a folder of runs
  --by KEY,...         methods side by side for each value of these keys, as in
                       --by data.alpha or --by algorithm.period
  --version            print the version

Examples:
  python -m consensus.report runs/tan runs/quad
  python -m consensus.report runs/table1 --folder results/table1

Exit codes: 0 written, 2 no runs to compare, or a file cannot be written
More: docs/sweeps.md
"""

ELASTIC = """\
Start processes of one elastic run on this machine. A process that is killed
does not end the others, and more of them may join at any time.

Usage: python -m consensus.elastic [OPTION ...] [KEY=VALUE ...]
       python -m consensus.elastic [OPTION ...] --script FILE [ARGUMENT ...]

Keys are those of python -m consensus.train. A process that joins a run takes
those that it is not given from the run. A script has an ElasticCoupling.

Options (default):
  --processes N (1)    processes to start here; 0 with --serve: only the store
  --expected N         processes with which the run begins (--processes)
  --store HOST:PORT    the store in which the processes meet (one of its own)
  --serve              keep the store here, at the port of --store
  --wait S (60)        longest wait for the store, in seconds
  --run NAME           of the run, where a store has several
  --script FILE        start this Python file in place of the trainer
  --restarts N (0)     new processes for lost ones
  --version            print the version

SIGTERM to this launcher lets its processes leave the run. Ctrl+C and SIGUSR1
stop the whole run with a checkpoint. The store is kept until the processes of
other launchers have ended; a second signal ends it at once.

Examples:
  python -m consensus.elastic --processes 4 experiment=digits
  python -m consensus.elastic --processes 2 --store node1:29400

Exit codes: 0 the run is complete, 1 failed or no store, 2 refused, 75 left the
            run or stopped with a checkpoint, 128 + the signal: killed
More: docs/elastic.md
"""

REST = """\
All keys: --help algorithm data output ..., or the site of scripts/docs
Completion in bash: eval "$(consensus-{command} -sc install=bash)"
"""


def answer_questions(module: str, command: str) -> None:
    """Answer --help, --version or `-sc` and exit; return if the command line has none of them.

    Call it before the imports, with the `__name__` of the module. It has no effect unless the
    module is the program. Of several ranks only rank 0 prints.
    """
    if not is_program(module, command):
        return
    words, command = sys.argv[1:], command.removeprefix("consensus.")
    code, text = 0, ""
    if not {"-sc", "--shell-completion"}.isdisjoint(words):
        text = completion(command)
    elif not {"-h", "--help"}.isdisjoint(words):
        try:
            text = page(command, [word for word in words if not re.search("^-|=", word)])
        except ValueError as error:
            code, text = 2, f"consensus.{command}: {error}\n"
    elif "--version" in words:
        text = f"consensus {version()}\n"
    else:
        return
    protect_streams(f"consensus.{command}")
    if os.environ.get("RANK", "0") == "0":
        print(text, end="", file=sys.stderr if code else sys.stdout, flush=True)
    sys.exit(code)


def page(command: str, names: Sequence[str] = ()) -> str:
    """The help of a command, or of each name instead; ValueError if there is no such name."""
    if command in ("report", "elastic"):
        return REPORT if command == "report" else ELASTIC
    known = keys_of_sweeps() | keys_of_runs() if command == "sweep" else keys_of_runs()
    if names:
        return "\n".join(_about(name, known) for name in names)
    template = {"train": TRAIN, "sweep": SWEEP, "doctor": DOCTOR}[command]
    return template.format(
        groups="\n".join(_choices(group) for group in GROUPS if len(entries(group)) > 1),
        experiments=_columns(entries("experiment")),
        grids=_columns(entries("grid")),
        keys=_columns(_with_defaults({key: known[key] for key in MAIN_KEYS})),
        sweep_keys=_columns(_with_defaults(keys_of_sweeps())),
        switches=SWITCHES,
        rest=REST.format(command=command),
    )


def _about(name: str, known: Mapping[str, Key]) -> str:
    """The descriptions of a key, of the keys in a section, or of the entries of a group."""
    name = name.strip(".")
    groups = [path.name for path in Path(config_dir()).iterdir() if path.is_dir()]
    keys = {key: text for key, text in known.items() if f".{name}." in f".{key}."}
    if not keys and name not in groups:
        hint = did_you_mean(nearest(name, [*known, *groups]))
        raise ValueError(f"--help: unknown name `{name}`{hint}; allowed: keys, sections, groups")
    parts = [_columns(_with_defaults(keys), whole=True)] if keys else []
    if name in groups and len(entries(name)) > 1:
        named = {f"{name}={entry}": text for entry, text in entries(name).items()}
        parts.insert(0, _columns(named, whole=True))
    return "\n\n".join(parts) + "\n"


def _with_defaults(keys: Mapping[str, Key]) -> dict[str, str]:
    return {f"{name} ({key.default})": key.meaning for name, key in keys.items()}


def _choices(group: str) -> str:
    """A line with the names of a group, or several lines."""
    names = [f"{name}*" if name == default_of(group) else name for name in entries(group)]
    return _row(group, ", ".join(names), 13)


def _columns(texts: Mapping[str, str], whole: bool = False) -> str:
    """Names, and what they mean: the first clauses that fit into one line, or the `whole` text."""
    indent = max(map(len, texts)) + 4
    rows = []
    for name, text in texts.items():
        while not whole and len(text) > WIDTH - indent and "; " in text:
            text = text.rpartition("; ")[0]
        if not whole:
            text = textwrap.shorten(text, WIDTH - indent, placeholder=" ...")
        rows.append(_row(name, text, indent))
    return "\n".join(rows)


def _row(name: str, text: str, indent: int) -> str:
    lines = textwrap.wrap(text, WIDTH - indent, break_long_words=False, break_on_hyphens=False)
    return (f"  {name}".ljust(indent) + f"\n{' ' * indent}".join(lines)).rstrip()


def completion(command: str) -> str:
    """The answer of Hydra to `-sc`, from the YAML files without their types, which import torch.

    It is empty if the words so far have a mistake: a traceback would end up in the prompt.
    """
    import hydra
    from hydra.core.config_store import ConfigStore

    # Hydra lists the options of the run alone.
    own: dict[str, Any] = {"doctor": {"step_size": False}}.get(command, {})
    if command == "sweep":
        own = {"sweep": OmegaConf.load(Path(config_dir(), "sweep.yaml")).sweep}
    ConfigStore.instance().store(name="schema", node=own)
    register_resolvers()
    sys.argv[0] = f"consensus-{command}"  # the script that completion is installed for
    program, *words = os.environ.get("COMP_LINE", "").split(" ")
    last = words.pop() if words else ""
    words = [word for word in words if "=" in word and word[0] != "-"]  # Hydra refuses our switches
    os.environ["COMP_LINE"] = " ".join([program, *words, last])
    found = io.StringIO()
    with suppress(Exception, SystemExit), redirect_stdout(found), redirect_stderr(io.StringIO()):
        hydra.main(version_base="1.3", config_path=config_dir(), config_name="train")(_nothing)()
    text = found.getvalue()
    return text if command == "sweep" else re.sub(r"(?<!\S)grid=\S*\s?", "", text)


def _nothing(cfg: object) -> None:
    """The task of which Hydra completes the command line."""
