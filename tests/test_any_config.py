"""Random command lines: each one runs as documented or is refused in one line.

Half of the command lines have valid values only, the others have one to three invalid ones. The
command runs in this process, on 40 random images, for at most 4 iterations. The expected properties
of a run are computed here from u, the z_j and README's table, not by the code under test.

    exit code 0   finite and strictly feasible after every iteration, all promised files
    exit code 1   an iterate became non-finite, or the run directory cannot be made: one line
    exit code 2   refused in one line, and no file was touched

`CONSENSUS_EXAMPLES=5000 pytest tests/test_any_config.py` tries more of them.
"""

import contextlib
import importlib
import io
import json
import math
import os
import re
import resource
import shutil
import signal
import string
import sys
import threading
import urllib.error
import urllib.request
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from consensus.problem import DATASETS, Dataset
from consensus.run import results as results_module
from consensus.run import trainer as trainer_module

entry = importlib.import_module("consensus.train")  # the attribute of that name is a function

EXAMPLES = int(os.environ.get("CONSENSUS_EXAMPLES", "30"))
SECONDS = 60.0  # no command may take longer
BYTES = 4 << 30  # nor more memory than this
TRAIN, TEST = 40, 20  # images


@dataclass(frozen=True)
class Line:
    """A command line and its expected result.

    `can` holds the possible exit codes, `says` the expected keys of config.yaml if it runs, and
    `picture` whether convergence.png is really drawn, which is slow, or replaced by a stand-in.
    """

    argv: list[str]
    can: frozenset[int] = frozenset({0, 1, 2})
    says: dict[str, Any] = field(default_factory=dict)
    picture: bool = False


# ---- valid command lines

POTENTIALS = {  # name -> options with valid values; eta is for all
    "quad": {},
    "cubic": {"eps": [0.0, 0.5, 3]},
    "tan": {},
    "tan_sep": {},
    "log": {},
    "log_sep": {},
    "scaled_quad": {"weight": [1.0, 0.25, 30, [2.0]]},
    "pseudo_huber": {"separable": [True, False]},
    "huber": {"separable": [True, False]},
    "log_cosh": {"separable": [True, False]},
    "power": {"p": [1.5, 2, 2.5, 4.0, 7], "eps": [0.0, 1.5], "separable": [True, False]},
}
SCHEDULES = {  # name -> options with valid values
    "constant": {},
    "linear": {"final": [0.5, 1, 2.0], "warmup": [0, 1, 3]},
    "cosine": {"final": [0.1, 1.0], "warmup": [0, 2]},
    "step": {"every": [1, 2, 1000], "factor": [0.5, 1, 2.0]},
}
ANY_ALGORITHM = {  # key -> valid values
    "algorithm.lam": [1e-3, 0.01, 0.1, 1, 10.0, 1e30, math.inf],
    "algorithm.sigma": [1e-300, 1e-6, 1e-4, 0.005, 0.05, 1],
    "algorithm.momentum": [0, 0.5, 0.9, 0.99, 0.999999],
    "algorithm.weight_decay": [0, 1e-300, 1e-4, 0.1, 2],
    "algorithm.loss_reduction": ["sum", "mean"],
    "algorithm.momentum_on": ["loss"],
    "algorithm.on_nonfinite": ["stop"],
    "potential.eta": [1e-3, 0.1, 0.5, 1, 3, 1e4],
    "dtype": ["float32", "float64"],
    "seed": [0, 1, 7, 2**31, 2**64, 10**400],
    "device": ["cpu", "auto"],
    "deterministic": [True, False],
    "cuda_graph": [True, False],
    "group": ["auto", "gloo"],
    "group.timeout_s": [1, 10.0, 600],
    "group.compress": [None, "bf16", "int8"],
    "group.sum": ["reduce"],
    "data.alpha": [0.001, 1.0, 1e9],
    "data.root": ["data", "elsewhere"],
    "output.root": ["runs", "deep/down"],
    "output.name": [None, "mine", "no", "a-b_c"],
    "output.eval_every": [1, 2, 3, 10**30],
    "output.checkpoint_every": [None, 1, 2, 10**30],
    "output.keep_checkpoints": [1, 2, 10**30],
    "output.log_every": [1, 2, 10**30],
    "stationarity.every": [None, 1, 2, 10**30],
    "stationarity.lam": [None, 1e-3, 10],
    "stationarity.samples": [None, 1, 10, 10**30],
    "stationarity.batch_size": [1, 7, 10**30],
    "stationarity.tolerance": [1e-300, 0.01, 0.99],
    "stationarity.budget": [2, 3, 10],
    "resume": ["never"],
    "plugins": [[], ["json"], ["os", "string"]],
    "experiment": ["smoke", "digits"],
}
ONLY_CONSENSUS = {
    "algorithm.tau": [1e-300, 1e-6, 1e-3, 0.005, 0.1, 1],
    "algorithm.period": [1, 2, 3, 10, 10**30],
    "algorithm.order": ["gauss_seidel", "jacobi"],
    "algorithm.momentum_on": ["loss", "objective"],
    "algorithm.u_step_on": ["coupling", "objective"],
    "algorithm.coupling": ["explicit", "implicit"],
    "algorithm.u_update": ["gradient", "exact"],
    "algorithm.on_nonfinite": ["stop", "drop"],
}
GROUPS = ("experiment", "potential", "algorithm", "data", "model", "loss", "group", "output")
MODELS = {"logistic": 1, "mlp": 3, "lenet5": 3}  # with their number of layers


def text(value: Any) -> str:
    """A value as Hydra's grammar reads it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return "[" + ",".join(map(text, value)) + "]"
    return str(value)


@st.composite
def runnable(draw: st.DrawFn) -> Line:
    """A command line of valid values only, of a run that is cheap."""

    def one_of(values):
        return draw(st.sampled_from(list(values)))

    def now_and_then(odds=3):
        return one_of([True] + [False] * (odds - 1))

    algorithm = one_of(["consensus"] * 5 + ["easgd", "msgd"])
    free = algorithm == "consensus"
    workers = one_of([None, 1, 2, 2, 3, 4])
    partition = one_of(["full", "full", "sharded"])
    says: dict[str, Any] = {
        "algorithm.name": algorithm,
        "algorithm.iterations": one_of([1, 2, 2, 3, 4]),
        "algorithm.batch_size": one_of([1, 4, 10] + [20] * (partition == "full")),
        "data.partition": partition,
        "model.name": one_of(["logistic"] * 4 + ["mlp"] * 2 + ["lenet5"]),
        "potential.name": one_of(POTENTIALS) if free else "quad",
        "output.tensorboard": now_and_then(12),
        "output.figures": not now_and_then(12),
    }
    chosen = {f"{key}.name": key for key in ("algorithm", "model", "potential")}
    groups = {key: says[name] for name, key in chosen.items()}
    if workers is not None or now_and_then():
        says["workers"] = workers
    if now_and_then():
        says["output.run_dir"] = one_of([None, "new", "new/deeper", "empty"])
        groups["data"] = "digits"
    if now_and_then(8):
        groups["output"] = "default"
    if says["model.name"] == "mlp":
        says["model.options.hidden"] = one_of([[8], [4, 3], []])
    for option, values in POTENTIALS[says["potential.name"]].items():
        if now_and_then():
            says[f"potential.options.{option}"] = one_of(values)
    added = {}
    for name in ("tau", "sigma", "lam"):
        if now_and_then(5) and (free or name != "tau"):
            key = f"algorithm.schedule.{name}"
            says[f"{key}.name"] = schedule = one_of(SCHEDULES)
            for option, values in SCHEDULES[schedule].items():
                if now_and_then(2) or (name == "lam" and option == "final"):  # its 0 is refused
                    added[f"{key}.options.{option}"] = one_of(values)
    for key, values in (ANY_ALGORITHM | (ONLY_CONSENSUS if free else {})).items():
        if now_and_then(6):
            value = one_of(values)
            if key in GROUPS:
                groups[key] = value
            else:
                says[key] = value
    if free and now_and_then(4):  # rates in place of the letters
        for letter, rate, values in [
            ("lam", "pull", [0, 0.1, 0.5, 1]),
            ("tau", "outer", [0, 0.1, 1, 2]),
        ]:
            if now_and_then(2) and f"algorithm.schedule.{letter}.name" not in says:
                says.pop(f"algorithm.{letter}", None)
                says[f"algorithm.{rate}"] = one_of(values)
        says["algorithm.local_pull"] = one_of([0, 0.1, 1])
        for key in ("coupling", "u_update", "u_step_on"):
            says.pop(f"algorithm.{key}", None)
    if says.get("algorithm.order") == "jacobi":
        says.pop("algorithm.coupling", None)
    typed = {k: v for k, v in says.items() if k not in chosen}
    overrides = [f"{key}={value}" for key, value in groups.items()]
    overrides += [f"{key}={text(value)}" for key, value in typed.items()]
    overrides += [f"+{key}={text(value)}" for key, value in added.items()]
    says |= added
    for key in ("output.root", "output.run_dir", "data.root"):
        if says.get(key) is not None:
            says[key] = os.path.join("{here}", says[key])
    if algorithm == "msgd":
        says.pop("workers", None)
    order = draw(st.permutations(overrides))
    return Line(order, frozenset({0, 1}), says, picture=now_and_then(40))


USED = [  # how the run in the folder `used` was made
    "model=logistic", "device=cpu", "workers=2", "potential=log", "algorithm.iterations=3",
    "algorithm.batch_size=4", "output.checkpoint_every=1", "output.tensorboard=false",
]  # fmt: skip


@st.composite
def resumed(draw: st.DrawFn) -> Line:
    """A run that continues another one, or starts in a directory that may hold one."""
    again = [key for key in USED if "iterations" not in key and "checkpoint" not in key]
    how = draw(
        st.sampled_from(
            [
                ("resume=auto", "output.run_dir=used", 0),
                ("resume=auto", "output.run_dir=new", 0),
                ("resume=used", "output.run_dir=new", 0),
                ("resume=used", "output.run_dir=null", 0),
                ("resume=used/checkpoints/00000002", "output.run_dir=new", 0),
                ("resume=used/checkpoints/00000003", "output.run_dir=empty", 0),
                ("resume=never", "output.run_dir=used", 2),
                ("resume=used", "output.run_dir=used", 2),
                ("resume=auto", "output.run_dir=null", 2),
                ("resume=auto", "output.run_dir=file", 2),
                ("resume=used/checkpoints/00000001", "output.run_dir=new", 2),
                ("resume=empty", "output.run_dir=new", 2),
                ("resume=file", "output.run_dir=new", 2),
                ("resume=nowhere", "output.run_dir=new", 2),
            ]
        )
    )
    *place, code = how
    iterations = draw(st.sampled_from([3, 4]))
    free = {
        "output.tensorboard": [True, False],
        "output.figures": [True, False],
        "output.checkpoint_every": [None, 1],
        "output.eval_every": [1, 3],
        "deterministic": [True],
        "cuda_graph": [False],
        "group.timeout_s": [5],
        "group.compress": ["bf16", "int8"],
        "plugins": [["json"]],
        "stationarity.every": [1, None],
    }
    overrides = [*again, *place, f"algorithm.iterations={iterations}"]
    for key, values in free.items():
        if draw(st.integers(0, 3)) == 0:
            overrides.append(f"{key}={text(draw(st.sampled_from(values)))}")
    if draw(st.integers(0, 3)) == 0:
        overrides.append(
            draw(
                st.sampled_from(
                    [
                        "algorithm.lam=0.2",
                        "seed=1",
                        "dtype=float64",
                        "workers=4",
                        "model=mlp",
                        "potential=tan",
                        "algorithm.iterations=1",
                        "data.partition=sharded",
                    ]
                )
            )
        )
        if how[0] != "resume=never" and "new" not in how[1][-3:] + how[0][-3:]:
            code = 2
        elif code == 0:
            return Line(draw(st.permutations(overrides)))
    return Line(draw(st.permutations(overrides)), frozenset({code}))


# ---- invalid values

NO_NUMBER = ["abc", "''", "' '", "[]", "[1]", "{}", "{a: 1}", "???", "'${nope}'", "'1 2'"]
NO_NUMBER += ["'日本'", "'a\nb'", r"'\''", "'\"'", "nan'", "'\udcff'", "'NaN!'", "${seed"]
NO_WHOLE = [*NO_NUMBER, "true", "false", "1.5", "nan", "inf", "1e300", "1e0", "0x10", "-1", "1j"]
NO_WORD = ["nope", "''", "null", "[quad]", "{a: 1}", "???", "3", "true", "'日本'", "'a\nb'"]
NO_WORD += ["AUTO", "' cpu'", "'\"'", "'a\u2028b'", "'\udcff'", "'${nope}'", "1e300"]
NO_GROUP = [*NO_WORD, "[nope]", "a/b", "'../train'", "${nope}", "quad,tan", "=", "[[quad]]", "/tmp"]
NO_DICT = ["null", "abc", "[1]", "{1: 2}", "???", "3", "'${nope}'", "''", "{nope: 1}"]
NO_TRUTH = ["maybe", "null", "[]", "{a: 1}", "???", "''", "nan", "'${nope}'", "'a\nb'"]
NO_PATH = ["[a]", "{a: 1}", "???", "'${nope}'", "[", "'"]
NO_PLUGINS = ["abc", "null", "{a: 1}", "???", "[null]", "[[a]]", "[???]", "['']", "['a b']", "[.x]"]
NO_PLUGINS += [
    "[3]",
    "[nowhere_at_all]",
    "['日本']",
    "[json.nope]",
    "['a/b']",
    "['a\nb']",
    "[class]",
]
TOO_LONG = "1" + "0" * 5000  # Python refuses to read it

WRONG: dict[str, list[str]] = {  # key -> values that must be refused, whatever else there is
    "workers": [*NO_WHOLE, "0", "-3"],
    "seed": [*NO_WHOLE, "null"],
    "dtype": [*NO_WORD, "float16", "double"],
    "device": [*NO_WORD, "cuda", "cuda:0", "gpu"],
    "deterministic": NO_TRUTH,
    "cuda_graph": NO_TRUTH,
    "resume": [*NO_PATH, "null", "''", "nowhere", "file", "auto/x"],
    "plugins": NO_PLUGINS,
    "potential.name": [*NO_WORD, "cubik"],
    "potential.eta": [*NO_NUMBER, "null", "true", "0", "-1", "nan", "inf", "-inf", "1e400"],
    "potential.options": NO_DICT,
    "algorithm.name": [*NO_WORD, "easgd2"],
    "algorithm.lam": [*NO_NUMBER, "null", "true", "0", "-0.0", "-1", "nan", "-inf", "1e-400"],
    "algorithm.tau": [*NO_NUMBER, "null", "true", "0", "-1", "nan", "inf", "1e400"],
    "algorithm.pull": [*NO_NUMBER, "true", "-1e-9", "1.1", "nan", "inf"],
    "algorithm.outer": [*NO_NUMBER, "true", "-1", "nan", "inf", "1e400"],
    "algorithm.local_pull": [*NO_NUMBER, "null", "true", "-1", "2", "nan"],
    "algorithm.sigma": [*NO_NUMBER, "null", "true", "0", "-1", "nan", "inf", "1e-400"],
    "algorithm.momentum": [*NO_NUMBER, "null", "true", "1", "-1e-9", "nan", "inf", "1e300"],
    "algorithm.weight_decay": [*NO_NUMBER, "null", "true", "-1", "nan", "inf", "-1e-300"],
    "algorithm.batch_size": [*NO_WHOLE, "null", "0", "-7", "41", "1" + "0" * 18, "1" + "0" * 400],
    "algorithm.iterations": [*NO_WHOLE, "null", "0", "-4"],
    "algorithm.period": [*NO_WHOLE, "null", "0"],
    "algorithm.delay": [*NO_WHOLE, "null", "-1", "1", "7"],
    "algorithm.step_every": ["0", "3", "abc", "[]", "[0]", "[1.5]", "[abc]", "{a: 1}"],
    "algorithm.order": NO_WORD,
    "algorithm.momentum_on": NO_WORD,
    "algorithm.u_step_on": NO_WORD,
    "algorithm.coupling": NO_WORD,
    "algorithm.u_update": NO_WORD,
    "algorithm.loss_reduction": [*NO_WORD, "max"],
    "algorithm.schedule": ["null", "3", "[1]", "abc", "???", "{eta: 1}", "{tau: 3}", "{tau: null}"],
    "algorithm.schedule.tau": ["null", "3", "[1]", "constant", "???", "{nope: 1}"],
    "algorithm.schedule.sigma": ["null", "3", "[1]", "cosine", "???", "{name: nope}"],
    "algorithm.schedule.lam": ["null", "3", "[1]", "step", "???", "{options: 3}"],
    "algorithm.schedule.tau.name": NO_WORD,
    "algorithm.schedule.sigma.name": [*NO_WORD, "sine"],
    "algorithm.schedule.lam.name": NO_WORD,
    "algorithm.schedule.tau.options": NO_DICT,
    "algorithm.schedule.sigma.options": NO_DICT,
    "algorithm.schedule.lam.options": NO_DICT,
    "data.name": [*NO_WORD, "mnist", "cifar"],
    "data.root": [*NO_PATH, "null"],
    "data.partition": [*NO_WORD, "half"],
    "data.alpha": [*NO_NUMBER, "null", "true", "0", "-1", "nan", "inf"],
    "data.options": NO_DICT,
    "data.validation": [*NO_NUMBER, "null", "true", "1", "-0.1", "nan", "inf", "1e-9"],
    "data.loader_workers": [*NO_WHOLE, "null", "-1"],
    "model.name": [*NO_WORD, "resnet"],
    "model.options": NO_DICT,
    "loss.name": [*NO_WORD, "hinge", "mse", "bce", "token_cross_entropy"],
    "loss.options": NO_DICT,
    "group.name": [*NO_WORD, "nccl", "mpi"],
    "group.timeout_s": [*NO_NUMBER, "null", "true", "0", "0.5", "-1", "nan", "inf"],
    "group.compress": [*[word for word in NO_WORD if word != "null"], "fp8", "BF16"],
    "output.root": [*NO_PATH, "null"],
    "output.run_dir": [*NO_PATH, "file", "used"],
    "output.name": [*NO_PATH, "''", "a/b", "'/'"],
    "output.eval_every": [*NO_WHOLE, "null", "0"],
    "output.checkpoint_every": [*NO_WHOLE, "0"],
    "output.keep_checkpoints": [*NO_WHOLE, "null", "0"],
    "output.log_every": [*NO_WHOLE, "null", "0"],
    "output.stop_at": [*NO_WHOLE, "0", "-1", "5", "1" + "0" * 18],
    "output.tensorboard": NO_TRUTH,
    "output.figures": NO_TRUTH,
    "stationarity.every": [*NO_WHOLE, "0"],
    "stationarity.lam": [*NO_NUMBER, "true", "0", "-1", "nan", "inf"],
    "stationarity.samples": [*NO_WHOLE, "0"],
    "stationarity.batch_size": [*NO_WHOLE, "null", "0"],
    "stationarity.tolerance": [*NO_NUMBER, "null", "true", "0", "1", "-1", "nan", "inf"],
    "stationarity.budget": [*NO_WHOLE, "null", "0", "1"],
    **{group: NO_GROUP for group in GROUPS},
}
KEYS = sorted(WRONG)

NUMBERS = ["0", "-0.0", "1", "-1", "2", "1e300", "-1e300", "1e-300", "5e-324", "1e38", "3.4e38"]
NUMBERS += ["1e39", "1e-39", "1e-40", "1e-46", "1e20", "1e-20", "1e154", "1e308", "1e400", "nan"]
NUMBERS += ["inf", "-inf", "null", "true", "0.9999999999999999", "1.0000000000000002", "abc"]
NUMBERS += ["''", "[1]", "[]", "{}", "1" + "0" * 18, "1" + "0" * 40, "1" + "0" * 400, "'3'", "???"]
WHOLE = ["1", "2", "3", "2147483647", "2147483648", "9223372036854775807", "9223372036854775808"]
WHOLE += ["18446744073709551616", "1" + "0" * 40, "1" + "0" * 400, "9" * 4300, "'3'", "null"]
NAMES = [
    "' '",
    "'.'",
    "'a b'",
    "true",
    "3",
    "1e3",
    "'日本'",
    "'é'",
    "'😀'",
    "_x",
    "'$x_'",
    "'a$b$c'",
]
NAMES += [r"'$\frac$'", "'[bold]'", "'[red]a'", "'x[@click=f(]'", "'a\nb'", "'a\tb'", "'\x1b[31m'"]
NAMES += ["':smile:'", "'\"'", r"'\''", "'%s{}'", "'*?'", "'-x'", "'a,b'", "'\udcff'", r"'\\'"]
PATHS = [*NAMES, "'~nobody_at_all/x'", "''", ".", "here/../there", "empty", "file/below", "~"]
LONG = "a" * 300

ODD: dict[str, list[str]] = {  # key -> values of which each may be refused or not
    **{
        key: NUMBERS
        for key in WRONG
        if key.rpartition(".")[2]
        in (
            "lam",
            "tau",
            "pull",
            "outer",
            "local_pull",
            "sigma",
            "eta",
            "momentum",
            "weight_decay",
            "alpha",
            "timeout_s",
        )
        and "schedule" not in key
    },
    "seed": WHOLE,
    "workers": ["1" + "0" * 18, "1" + "0" * 20, "1" + "0" * 400, "'2'", "7", "41"],
    "algorithm.batch_size": ["21", "39", "40", *WHOLE],
    "algorithm.period": WHOLE,
    "output.eval_every": WHOLE,
    "output.log_every": WHOLE,
    "output.checkpoint_every": WHOLE,
    "output.keep_checkpoints": WHOLE,
    "output.name": [*NAMES, LONG],
    "output.root": [*PATHS, LONG],
    "output.run_dir": [*PATHS, LONG],
    "data.root": [*PATHS, LONG],
    "resume": [*PATHS, "auto", "used", "used/checkpoints/00000003", LONG],
    "plugins": ["[os]", "[consensus.train]", "[consensus]", "[sys,sys]"],
    "output.tensorboard": ["2", "on", "'yes'", "0", "-1"],
    "output.figures": ["2", "on", "'yes'", "0"],
    "deterministic": ["2", "on", "'yes'", "0"],
    "cuda_graph": ["2", "on", "'yes'", "0"],
    "device": ["auto"],
    "data.partition": ["label_skew"],
    "experiment": ["[]", "[smoke,digits]", "table1_cell", "figure1_8", "[table1_cell]"],
    "potential": [*POTENTIALS, "{}", "[tan,log]", "[quad]", "{name: tan}", "{eta: 0}"],
    "algorithm": [
        "consensus",
        "easgd",
        "msgd",
        "local_sgd",
        "lookahead",
        "{}",
        "[msgd,easgd]",
        "{name: msgd}",
        "{lam: 3}",
    ],
    "model": ["mlp", "lenet5", "[mlp,lenet5]", "{name: mlp}", "{options: {hidden: [3]}}"],
    "data": ["{}", "mnist", "{root: x}", "[digits]"],
    "group": ["nccl", "[gloo,auto]", "{timeout_s: 1}"],
    "output": ["{}", "{name: x}", "[default]"],
    "algorithm.schedule": ["{}", "{tau: {name: linear}}", "{lam: {name: linear}}"],
    **{
        f"algorithm.schedule.{name}.name": ["linear", "cosine", "step"]
        for name in ("tau", "sigma", "lam")
    },
}
OPTIONS = {  # (the overrides that choose it, an option) -> values that must be refused
    ("potential=power", "potential.options.p"): ["1", "0.5", "-1", "nan", "inf", "null", "abc"],
    ("potential=power", "potential.options.eps"): ["-1", "nan", "inf", "null", "abc", "[1]"],
    ("potential=power", "potential.options.separable"): [],
    ("potential=cubic", "potential.options.eps"): ["-1", "nan", "inf", "-inf", "null", "{}"],
    ("potential=scaled_quad", "potential.options.weight"): [
        *("0", "-1", "nan", "inf", "[1,0]", "[]", "null", "abc", "{a: 1}", "[null]", "[[1],[2,3]]")
    ],
    ("potential=pseudo_huber", "potential.options.separable"): [],
    ("potential=huber", "potential.options.separable"): [],
    ("potential=log_cosh", "potential.options.separable"): [],
    ("model=mlp", "model.options.hidden"): ["[0]", "[-1]", "[1.5]", "abc", "3", "null", "[a]"],
    **{
        (f"{key}.name={name}", f"+{key}.options.{option}"): values
        for key in (f"algorithm.schedule.{x}" for x in ("tau", "sigma", "lam"))
        for name, option, values in [
            ("linear", "final", ["-1", "nan", "inf", "null", "abc", "[1]"]),
            ("cosine", "final", ["-0.1", "nan", "inf", "null", "abc", "{}"]),
            ("linear", "warmup", ["-1", "null", "abc"]),
            ("cosine", "warmup", ["-1", "null", "[]"]),
            ("step", "every", ["0", "-1", "null", "abc"]),
            ("step", "factor", ["0", "-1", "nan", "inf", "null", "abc"]),
        ]
    },
}
OPTION_VALUES = [*NUMBERS, "[1,2]", "[100000000000000]", "[1" + "0" * 20 + "]", "[1,1]", "[true]"]
OPTION_VALUES += ["false", "'false'", "{a: 1}", "[[1]]", "'日本'", "'a\nb'", "'${seed}'"]
HOLDERS = ["potential", "model", "data", "algorithm.schedule.tau", "algorithm.schedule.lam"]

REFUSED_AS_A_WHOLE = [
    *("", " ", "=", "=3", "seed", "seed==3", "foo=[", "foo", "a.b.c=3", "potential..eta=3"),
    *(".eta=3", "seed.=3", "seed.x=3", "+seed.x=3", "+seed=3", "++new=3", "+new=3", "plugins.0=x"),
    *("~nope", "~seed", "~potential", "~potential.name", "~algorithm.schedule", "~output.root"),
    *("seed=1,2", "seed=range(1,3)", "potential=tan,quad", "seed=choice(1,2)", "seed=glob(*)"),
    *("potential.eta@foo=3", "potential@foo=tan", "+potential@algorithm=tan", "output.name=${"),
    *("hydra.nope=3", "hydra/launcher=nope", "hydra.mode=FOO", "hydra.verbose=3", "hydra=3"),
    *("hydra.searchpath=3", "--config-name=nope", "--config-dir=nowhere", "--config-path=nowhere"),
    *("--foo", "-x", "--cfg", "--cfg=nope", "--config-name", "--info=nope", "--=", "-", "--resum"),
    *("+potential={nope: 1}", "+algorithm.schedule.eta.name=constant", "+experiment=smoke"),
    *("++potential=null", "++output=3", "algorithm.schedule.tau.options.final=1", "日本=3"),
    *(f"seed={TOO_LONG}", f"output.name={TOO_LONG}", f"new={TOO_LONG}", "'seed'=3", "seed:3"),
]


def swapped(key: str, position: int, letter: str, how: str) -> str:
    """A key with one typing mistake."""
    i = position % len(key)
    return {
        "drop": key[:i] + key[i + 1 :],
        "double": key[: i + 1] + key[i:],
        "replace": key[:i] + letter + key[i + 1 :],
        "insert": key[:i] + letter + key[i:],
        "swap": key[:i] + key[i + 1 : i + 2] + key[i : i + 1] + key[i + 2 :],
        "upper": key[:i] + key[i:].upper(),
    }[how]


@dataclass(frozen=True)
class Poison:
    """Overrides that go together, the keys that they set, and whether they must be refused."""

    overrides: tuple[str, ...]
    keys: tuple[str, ...] = ()
    refused: bool = False


def value_of_a_key(table: dict[str, list[str]], refused: bool) -> st.SearchStrategy[Poison]:
    pairs = st.sampled_from(sorted(table)).flatmap(
        lambda key: st.tuples(st.just(key), st.sampled_from(table[key]))
    )

    def poison(pair: tuple[str, str]) -> Poison:
        override = "=".join(pair)
        # Only `resume` decides whether the directory of another run is refused.
        keys = (pair[0], "resume") if override == "output.run_dir=used" else (pair[0],)
        return Poison((override,), keys, refused)

    return pairs.map(poison)


@st.composite
def value_of_an_option(draw: st.DrawFn) -> Poison:
    choice, option = draw(st.sampled_from(sorted(OPTIONS)))
    wrong = OPTIONS[choice, option]
    refused = bool(wrong) and draw(st.booleans())
    value = draw(st.sampled_from(wrong if refused else OPTION_VALUES))
    group = choice.partition("=")[0]
    keys = (group, f"{group}.name", option.lstrip("+"))
    return Poison((choice, f"{option}={value}"), keys, refused)


@st.composite
def unknown_option(draw: st.DrawFn) -> Poison:
    holder = draw(st.sampled_from(HOLDERS))
    name = draw(st.sampled_from(["nope", "self", "name", "Eta", "num_classes", "seed", "1", "é"]))
    value = draw(st.sampled_from(OPTION_VALUES))
    sign = draw(st.sampled_from(["+", "++", ""]))
    return Poison((f"{sign}{holder}.options.{name}={value}",), (holder,), refused=True)


@st.composite
def misspelt(draw: st.DrawFn) -> Poison:
    key = draw(st.sampled_from(KEYS))
    how = draw(st.sampled_from(["drop", "double", "replace", "insert", "swap", "upper"]))
    letter = draw(st.sampled_from(string.ascii_letters + "_.-/ 3é"))
    wrong = swapped(key, draw(st.integers(0, 40)), letter, how)
    sign = draw(st.sampled_from(["", "", "+", "++", "~"]))
    override = f"{sign}{wrong}" + ("" if sign == "~" else "=1")
    known = wrong in KEYS or wrong.endswith(".options") or ".options." in wrong
    return Poison((override,), (), refused=not known)


SIGNS = "=[]{}()'\"\\,:$~+@ .-%#&|<>!?*;^`"
AWFUL = st.text(st.sampled_from(SIGNS + "ab1é日\n\t\u2028" + "x0") | st.characters(), max_size=12)
FREE_TEXT = AWFUL.filter(lambda t: not set(t) & {"/", "\0"} and t.strip(" '\"") not in (".", ".."))
TEXT_KEYS = [key for key in KEYS if key != "algorithm.iterations"]  # a huge one would run for ever


@st.composite
def any_text(draw: st.DrawFn) -> Poison:
    """A value, a key or a whole override out of arbitrary characters."""
    words = draw(FREE_TEXT)
    key = draw(st.sampled_from(TEXT_KEYS))
    kind = draw(st.sampled_from(["value", "quoted", "key", "all"]))
    if kind == "quoted":
        quoted = (
            "'" + re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + "\\'" * (m[2] == "'"), words) + "'"
        )
        return Poison((f"{key}={quoted}",), (key,))
    override = {"value": f"{key}={words}", "key": f"{words}=1", "all": words}[kind]
    switches = override.startswith("-")  # -m would sweep, -h help
    return Poison((f"+{override}" if switches else override,), (key,) if kind == "value" else ())


WHOLE_LINES = st.sampled_from(REFUSED_AS_A_WHOLE).map(lambda line: Poison((line,), (), True))
POISONS = st.one_of(
    value_of_a_key(WRONG, refused=True),
    value_of_a_key(WRONG, refused=True),
    value_of_a_key(ODD, refused=False),
    value_of_a_key(ODD, refused=False),
    value_of_a_key(ODD, refused=False),
    value_of_an_option(),
    value_of_an_option(),
    unknown_option(),
    misspelt(),
    WHOLE_LINES,
    any_text(),
)


def key_of(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def spoil(line: Line, poisons: list[Poison], places: list[int]) -> Line:
    """A valid command line with poisons, each in the place of what it replaces."""
    keys = {key for poison in poisons for key in poison.keys}
    argv = [override for override in line.argv if key_of(override) not in keys]
    if "potential" in keys:  # options of another one
        argv = [override for override in argv if not override.startswith("potential.options")]
    if "model" in keys:
        argv = [override for override in argv if not override.startswith("model.options")]
    for poison, place in zip(poisons, places, strict=True):
        i = place % (len(argv) + 1)
        argv[i:i] = poison.overrides
    # If two set one key, the later one counts; the result is then open.
    alone = Counter(key for poison in poisons for key in set(poison.keys)).most_common(1)
    surely = any(poison.refused for poison in poisons) and (not alone or alone[0][1] == 1)
    return Line(argv, frozenset({2}) if surely else frozenset({0, 1, 2}), picture=strange(argv))


def strange(argv: list[str]) -> bool:
    """Whether the name of a run has characters that may break the text of a picture."""
    return any(
        re.match(r"\+*output\.(name|run_dir)=.*[^\w=./-]|.*=_", override, re.S) for override in argv
    )


@st.composite
def spoilt(draw: st.DrawFn) -> Line:
    poisons = draw(st.lists(POISONS, min_size=1, max_size=3))
    places = [draw(st.integers(0, 50)) for _ in poisons]
    return spoil(draw(runnable()), poisons, places)


KINDS = (runnable(), resumed(), spoilt())
# As often as they are listed, whatever is simplest: `one_of` may prefer the first.
LINES = st.sampled_from([0] * 7 + [1] + [2] * 8).flatmap(lambda i: KINDS[i])


# ---- the command, in this process


class HungError(BaseException):
    """A timeout, which the command must not catch."""


def hang(*_: object) -> None:
    raise HungError


def tiny(root: str = "data") -> Dataset:
    del root
    random = torch.Generator().manual_seed(0)
    images = torch.rand(TRAIN + TEST, 1, 28, 28, generator=random)
    labels = torch.randint(10, (TRAIN + TEST,), generator=random)
    labels[:10] = torch.arange(10)
    train, test = (images[:TRAIN], labels[:TRAIN]), (images[TRAIN:], labels[TRAIN:])
    return Dataset(train, test, num_classes=10)


DOMAINS = {  # README's table: what keeps x = w_l / eta strictly inside, for each layer
    "tan": lambda x: float(x.square().sum()) < math.pi / 2,
    "tan_sep": lambda x: float(x.square().max()) < math.pi / 2,
    "log": lambda x: float(x.square().sum()) < 1,
    "log_sep": lambda x: float(x.abs().max()) < 1,
}


class Seen:
    """The iterates of one run, checked from outside after each iteration."""

    def __init__(self, plan: Any, algorithm: Any) -> None:
        self.plan, self.algorithm = plan, algorithm
        self.iterations: list[int] = []
        self.faults: list[str] = []  # what was infeasible
        self.first_bad: int | None = None  # the iteration after which something was not finite
        owners: dict[str, int] = {}
        for name, parameter in plan.model.named_parameters():
            owner = name.rpartition(".")[0]
            owners[owner] = owners.get(owner, 0) + parameter.numel()
        self.lengths = list(owners.values())
        step = algorithm.step

        def observed(t: int) -> None:
            step(t)
            self.look(t)

        algorithm.step = observed
        self.look(-1)

    def look(self, t: int) -> None:
        self.iterations.append(t)
        u, z = self.algorithm.u, self.algorithm.worker.z
        if self.first_bad is None and not (u.isfinite().all() and z.sum().isfinite()):
            self.first_bad = t + 1
        config = self.plan.config
        inside = DOMAINS.get(config.potential.name)
        if inside is None or config.algorithm.name == "msgd" or self.first_bad is not None:
            return
        x = (u.double() - z.double()) / config.potential.eta
        for j, worker in enumerate(x):
            for layer, x_l in enumerate(worker.split(self.lengths)):
                if not inside(x_l):
                    self.faults.append(f"iteration {t + 1}, worker {j}, layer {layer}")


@dataclass
class Ended:
    """The result of a command: exit code, output, runs, files before and after."""

    code: object
    out: str
    err: str
    runs: list[Seen]
    before: dict[str, tuple]
    after: dict[str, tuple]


def files_in(folder: Path) -> dict[str, tuple]:
    """Every path with its size and time, except for the lock of a refused download."""
    found = {}
    locks: set[Path] = set()
    for path in folder.rglob("*"):
        status = path.lstat()
        found[path] = (path.is_dir(), status.st_size, status.st_mtime_ns)
        if path.name == ".mnist.lock":
            locks |= {path, *path.parents}
    for path in locks & found.keys():
        del found[path]
    return {str(path.relative_to(folder)): facts for path, facts in found.items() if path}


def roomy(function):
    """Call it on a fresh chunk of the interpreter's stack, large enough for all nested calls."""
    return function()


# Otherwise CPython 3.11 allocates and frees a chunk at each call that crosses the end of one, which
# takes a quarter of the time of this test.
roomy.__code__ = roomy.__code__.replace(co_stacksize=1 << 16)


class Command:
    """Runs command lines, each in a folder of its own with a file, an empty folder and a run."""

    def __init__(self, root: Path, patch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.number = 0
        self.runs: list[Seen] = []
        self.draw = results_module.draw_run
        self.build = trainer_module.build_algorithm
        self.patch = patch
        self.address_space = resource.getrlimit(resource.RLIMIT_AS)
        patch.setitem(DATASETS._factories, "digits", tiny)
        patch.setattr(urllib.request, "urlopen", self.unreachable)
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(os, "fsync", lambda handle: None)  # half of the time of a run this short
        patch.setattr(trainer_module, "build_algorithm", self.seen)
        patch.setenv("HYDRA_FULL_ERROR", "1")  # main sets it: so it is restored
        patch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # so does deterministic=true
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR"):
            patch.delenv(name, raising=False)
        self.template = root / "template"
        self.template.mkdir()
        (self.template / "file").write_text("a file\n")
        (self.template / "empty").mkdir()
        self.used: Path | None = None
        ended = self(Line([*USED, "output.run_dir=used"]))
        assert ended.code == 0, ended.err
        self.used = root / "used"
        shutil.move(self.folder / "used", self.used)

    def unreachable(self, *args: object, **options: object) -> None:
        raise urllib.error.URLError("no route to host")

    def seen(self, plan: Any, group: Any) -> Any:
        algorithm = self.build(plan, group)
        self.runs.append(Seen(plan, algorithm))
        return algorithm

    def pretend(self, rows: Any, path: Path, **others: Any) -> None:
        path.write_bytes(b"a picture")

    def __call__(self, line: Line) -> Ended:
        """Run it, and undo its changes to this process."""
        if self.number:
            shutil.rmtree(self.folder)
        self.number += 1
        self.folder = self.root / str(self.number) / "inner"
        shutil.copytree(self.template, self.folder)
        if self.used is not None and any("used" in override for override in line.argv):
            shutil.copytree(self.used, self.folder / "used")
        before = files_in(self.folder)
        self.runs = []
        out = io.TextIOWrapper(io.BytesIO(), "utf-8")  # as Python's own: strict
        err = io.TextIOWrapper(io.BytesIO(), "utf-8", errors="backslashreplace")
        code: object = 0
        with self.around(line), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                roomy(entry.main)
            except SystemExit as leaving:
                code = leaving.code
            except HungError:
                code = f"no end in {SECONDS} s"
        texts = [stream.buffer.getvalue().decode() for stream in (out, err) if not stream.flush()]
        return Ended(code, *texts, self.runs, before, files_in(self.folder))

    @contextlib.contextmanager
    def around(self, line: Line) -> Iterator[None]:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + BYTES
        handler = signal.signal(signal.SIGALRM, hang)
        thread_hook = threading.excepthook
        drawing = self.draw if line.picture else self.pretend
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
            patch.chdir(self.folder)
            patch.setattr(sys, "argv", ["consensus.train", *line.argv])
            patch.setattr(results_module, "draw_run", drawing)
            # The warnings that Python shows to users; none may appear on stderr.
            warnings.simplefilter("always")
            for kind in (DeprecationWarning, PendingDeprecationWarning, ResourceWarning):
                warnings.simplefilter("ignore", kind)
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as we do
            resource.setrlimit(resource.RLIMIT_AS, (limit, self.address_space[1]))
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
            try:
                yield
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0.0)
                signal.signal(signal.SIGALRM, handler)
                resource.setrlimit(resource.RLIMIT_AS, self.address_space)
                torch.use_deterministic_algorithms(False)
                threading.excepthook = thread_hook


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        yield Command(tmp_path_factory.mktemp("any"), patch)


# ---- the checks of each result


def digest(u: np.ndarray) -> str:
    """The sum over i of mix(bits of u_i xor i c) modulo 2^64, mix the finalizer of splitmix64."""
    signed = u.view(np.int32 if u.itemsize == 4 else np.int64).astype(np.int64)
    x = signed.view(np.uint64) ^ (
        np.arange(u.size, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    )
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return f"{int((x ^ (x >> np.uint64(31))).sum(dtype=np.uint64)):016x}"


def strict_json(content: str) -> Any:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    return json.loads(content, parse_constant=refuse)


def check_run(line: Line, ended: Ended, folder: Path) -> None:
    """Check a run with exit code 0: it is finite and feasible, and has written all files."""
    assert ended.err == ""
    (seen,) = ended.runs
    assert seen.faults == [], "outside the domain of the potential"
    assert seen.first_bad is None, f"not finite after iteration {seen.first_bad}"
    (summary_path,) = (
        folder / path
        for path in ended.after
        if path.endswith("summary.json") and ended.after[path] != ended.before.get(path)
    )
    run_dir = summary_path.parent
    config = OmegaConf.load(run_dir / "config.yaml")
    for key, value in line.says.items():
        if isinstance(value, str):
            value = value.replace("{here}", str(folder))
        assert OmegaConf.select(config, key) == value, key

    output, total = config.output, config.algorithm.iterations
    files = {".lock", "config.yaml", "metrics.jsonl", "summary.json", "model.pt"}
    files |= {"convergence.png"} if output.figures else set()
    files |= {"checkpoints"} if output.checkpoint_every is not None else set()
    files |= {"events"} if output.tensorboard else set()  # events.out.tfevents.TIME.HOST...
    algorithm = config.algorithm
    pulled = algorithm.pull if algorithm.lam is None else algorithm.lam < math.inf
    pulled = pulled or (algorithm.local_pull and algorithm.period > 1)
    coupled = algorithm.name not in ("msgd", "ddp") and pulled
    every = config.stationarity.every if coupled and config.stationarity.every else math.inf
    drawn = output.figures and every < math.inf
    files |= {"stationarity.png", "stationarity.pdf"} if drawn else set()
    files |= {"convergence.pdf"} if line.picture and output.figures else set()
    made = {path.name.partition(".out.")[0] for path in run_dir.iterdir()}
    if run_dir == folder:  # run_dir=.
        made -= {"file", "empty", "used", "data"}
    resumed_run = str(run_dir.relative_to(folder)) in ended.before and config.resume == "auto"
    assert made >= files
    assert resumed_run or made == files

    u = seen.algorithm.u.numpy()
    rows = [strict_json(row) for row in (run_dir / "metrics.jsonl").read_text().splitlines()]
    summary = strict_json(summary_path.read_text())
    assert rows[-1]["digest"] == summary["digest"] == digest(u)
    assert rows[-1]["iteration"] == total
    if config.resume == "never":
        wanted = {*range(output.eval_every, total + 1, output.eval_every), total}
        analysed = {t for t in range(1, total + 1) if t % every == 0 or t == total}
        analysed = analysed if every < math.inf else set()
        assert [row["iteration"] for row in rows] == sorted(wanted | analysed)
        assert {row["iteration"] for row in rows if "stationarity" in row} == analysed
        assert seen.iterations == list(range(-1, total))
    known = {"best", "environment", "goals", "model", "selection"}
    assert {*summary} - {*rows[-1]} == known | (files & {"checkpoints"})
    assert {key: summary[key] for key in rows[-1]} == rows[-1]
    for row in rows:
        assert 0 <= row["train_error"] <= 100
        assert 0 <= row["test_error"] <= 100
        assert row["epoch"] > 0
        assert len(row["distance"]) == len(seen.lengths)

    state = torch.load(run_dir / "model.pt", weights_only=True)
    assert [*state] == [name for name, _ in seen.plan.model.named_parameters()]
    flat = torch.cat([tensor.reshape(-1) for tensor in state.values()])
    assert str(flat.dtype) == f"torch.{config.dtype}"
    assert torch.equal(flat, seen.algorithm.u)
    assert flat.isfinite().all()
    if line.picture and output.figures:
        assert (run_dir / "convergence.png").read_bytes().startswith(b"\x89PNG")
    if output.checkpoint_every is not None:
        every, keep = output.checkpoint_every, output.keep_checkpoints
        names = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
        if config.resume == "never":
            wanted = sorted({*range(every, total + 1, every), total})[-keep:]
            assert names == [f"{t:08d}" for t in wanted]
        newest = json.loads((run_dir / "checkpoints" / names[-1] / "manifest.json").read_text())
        assert (newest["iteration"], newest["digest"]) == (total, digest(u))


DIVERGED = (
    r"iteration (\d+): (u|(worker \d+|one of the workers \d+ to \d+) on rank 0) became non-finite"
)
BEYOND_GUESSING = r"iteration \d+: the run has diverged: the objective is \S+, more than 1e6 times"
ALL_DROPPED = r"iterations \d+ to \d+: each of the \d+ workers was non-finite"
UNWRITABLE = "cannot write the run directory: "


def check_failure(line: Line, ended: Ended) -> str:
    """Check a run with exit code 1: it diverged, or its directory cannot be created."""
    said = one_line(ended)
    if UNWRITABLE in said:
        assert any("file/below" in x or LONG in x for x in line.argv), "it could be written"
        return "no directory"
    if re.match(BEYOND_GUESSING, said):
        (seen,) = ended.runs
        assert seen.faults == []
        return "diverged"
    if re.match(ALL_DROPPED, said):
        (seen,) = ended.runs
        assert seen.plan.config.algorithm.on_nonfinite == "drop"
        assert seen.faults == []
        return "diverged"
    diverged = re.match(DIVERGED, said)
    assert diverged, said
    (seen,) = ended.runs
    assert seen.first_bad == int(diverged[1]), f"not finite since iteration {seen.first_bad}"
    assert seen.faults == []
    if seen.first_bad <= 1:
        # At the start u = z_j, so nothing couples yet: only a huge step of the loss explains it.
        config = seen.plan.config.algorithm
        step = config.sigma * max(1.0, config.weight_decay)
        largest = torch.finfo(seen.algorithm.u.dtype).max
        assert step > 1e-6 * largest, "not the steps are at fault, but another number"
    made = {Path(path).name for path in ended.after.keys() - ended.before.keys()}
    assert made.isdisjoint({"summary.json", "model.pt", "convergence.png"})
    return "diverged"


def one_line(ended: Ended) -> str:
    """The only line on stderr, without the name of the command."""
    assert "Traceback" not in ended.err, ended.err
    assert ended.err.endswith("\n"), ended.err
    assert len(ended.err.splitlines()) == 1, ended.err
    assert ended.err.startswith("consensus.train: "), ended.err
    said = ended.err.removeprefix("consensus.train: ").strip()
    assert said != "", "an empty line"
    return said


def check(line: Line, ended: Ended, folder: Path) -> str:
    """Check a result. Returns its kind."""
    if ended.code == 0:
        check_run(line, ended, folder)
        kind = "ran"
    elif ended.code == 1:
        kind = check_failure(line, ended)
    else:
        assert ended.code == 2, (ended.code, ended.err)
        one_line(ended)
        assert ended.out == ""
        assert ended.after == ended.before, "a refusal touches no file"
        kind = "refused"
    assert ended.code in line.can, (ended.code, ended.err, ended.out)
    return kind


SHORT = ["model=logistic", "algorithm.iterations=2", "algorithm.batch_size=5", "device=cpu"]
SHORT += ["output.tensorboard=false", "output.checkpoint_every=null"]


def only(*codes: int):
    """`only(2)("seed=-1")`: a short command line with these possible exit codes."""

    def line(*overrides: str) -> Line:
        return Line([*SHORT, *overrides], frozenset(codes), picture=strange([*overrides]))

    return line


refused, runs, either = only(2), only(0), only(0, 1, 2)
BIG = "1" + "0" * 400
STEP = "algorithm.schedule.sigma.name=step"
RATE = "+algorithm.schedule.sigma.options"

EACH_CHECK = [
    *("workers=0", "seed=-1", "dtype=float16", "device=gpu", "device=cuda", "resume=nowhere"),
    *("potential.name=cubik", "potential.eta=0", "potential.eta=nan", "potential.eta=inf"),
    *("algorithm.lam=0", "algorithm.lam=nan", "algorithm.tau=0", "algorithm.tau=inf"),
    *("algorithm.sigma=0", "algorithm.sigma=inf", "algorithm.momentum=1"),
    *("algorithm.momentum=-1e-9", "algorithm.weight_decay=-1", "algorithm.weight_decay=inf"),
    *("algorithm.batch_size=0", "algorithm.batch_size=41", "algorithm.iterations=0"),
    *("algorithm.period=0", "algorithm.order=up", "algorithm.momentum_on=it"),
    *("algorithm.u_step_on=it", "algorithm.loss_reduction=max", "algorithm.name=sgd"),
    *("data.name=cifar", "data.partition=half", "data.alpha=0", "data.alpha=inf"),
    *("model.name=resnet", "group.name=mpi", "group.timeout_s=0.5", "group.timeout_s=inf"),
    *("output.name=''", "output.name=a/b", "output.run_dir=file", "output.run_dir=used"),
    *("output.eval_every=0", "output.checkpoint_every=0", "output.keep_checkpoints=0"),
    *("output.log_every=0", "output.stop_at=0"),
]

EDGES = [
    *map(refused, EACH_CHECK),
    # numbers that once caused a traceback
    either("potential=power", f"potential.options.p={BIG}"),
    either("potential=power", f"potential.options.eps={BIG}"),
    either("potential=scaled_quad", f"potential.options.weight={BIG}"),
    either("potential=scaled_quad", "potential.options.weight=1e300"),
    either("algorithm.weight_decay=1e300"),
    refused(f"algorithm.tau={BIG}"),
    either("algorithm.schedule.sigma.name=linear", f"{RATE}.final={BIG}"),
    either(STEP, f"{RATE}={{every: 1, factor: 1e300}}", "algorithm.iterations=3"),
    either(STEP, f"{RATE}={{every: 1, factor: {BIG}}}"),
    either(f"workers=1{'0' * 18}"),
    either(f"workers={BIG}"),
    either("potential=tan", "potential.eta=1e-40"),
    either("potential=quad", "potential.eta=1e-40"),
    either("potential=cubic", "potential.options.eps=1e300"),
    either("potential=power", "potential.options.p=1e300"),
    either("potential=tan", "potential.eta=1e-20"),
    either("potential=log_sep", "algorithm.sigma=1e37"),
    either("potential=tan", "algorithm.sigma=1e300", "algorithm.lam=10", "dtype=float64"),
    # with order=jacobi u diverges before any z_j
    either(
        "algorithm.order=jacobi", "algorithm.tau=3e38", "algorithm.sigma=1e4", "algorithm.lam=3"
    ),
    # names and paths
    *(either(f"{key}='~nobody_at_all/x'") for key in ("data.root", "output.root", "resume")),
    *(runs(f"output.run_dir={name}") for name in ("_x", "'$x_'", r"'$\frac$'", "'\udcff'", "'日'")),
    either(f"output.run_dir={LONG}"),
    either(f"resume={LONG}"),
    only(1)("output.run_dir='file/below/a\nb'"),
    only(1)(f"output.name={LONG}"),
    # errors of Hydra and of its argument parser in one line
    refused("--foo"),
    refused("--cfg"),
    refused("potential='cu\nbik'"),
    refused("experiment='a\nb'"),
    refused("hydra.verbose=3"),
    either("hydra.searchpath=[nowhere]"),
    refused("hydra.searchpath=[nowhere]", "potential=cubik"),
    # a text is no bool
    refused("potential=log_cosh", "potential.options.separable='false'"),
    refused("potential=power", "potential.options.separable=null"),
    # long but valid numbers
    runs(f"seed={BIG}"),
    runs(f"output.eval_every={BIG}", f"algorithm.period={BIG}"),
    runs(f"output.keep_checkpoints={BIG}", "output.checkpoint_every=1"),
    refused(f"algorithm.iterations={BIG}", "workers=0"),
    runs("algorithm.pull=1", "algorithm.outer=1", "potential=tan", "algorithm.local_pull=1"),
    runs("algorithm=fedprox", "workers=2", "algorithm.period=2"),
    runs("algorithm=ddp", "workers=2", "algorithm.clip_grad_norm=1", "stationarity.every=1"),
    runs("algorithm.optimizer={optimizer: AdamW, lr: 0.01}", "potential=tan", "workers=2"),
    refused("algorithm.optimizer={optimizer: AdamW, lr: 0.01}", "algorithm.sigma=0.1"),
    refused("output.stop_at=1", "output.checkpoint_every=null"),
    runs("algorithm.pull=0", "stationarity.every=1"),
    either("algorithm.pull=1", "potential.eta=1e-18", "algorithm.outer=1"),
    runs("algorithm.lam=inf", "potential=tan", "algorithm.momentum_on=objective"),
    runs("algorithm.sigma=5e-324", "algorithm.tau=5e-324", "dtype=float64"),
    refused("algorithm.lam=5e-324", "dtype=float64"),
]


def what_is_special(line: Line) -> str:
    text = " ".join(line.argv[len(SHORT) :]).encode("unicode_escape").decode()
    return text if len(text) <= 60 else f"{text[:50]}..{len(text)}"


@pytest.mark.parametrize("line", EDGES, ids=what_is_special)
def test_an_edge(command, line):
    check(line, command(line), command.folder)


@pytest.mark.slow
def test_any_command_line_runs_or_is_refused(command):
    counts: Counter[str] = Counter()

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(LINES)
    def try_one(line: Line) -> None:
        kind = check(line, command(line), command.folder)
        counts[kind] += 1
        event(kind)

    try_one()
    total = sum(counts.values())
    assert total >= EXAMPLES, counts
    assert counts["ran"] >= 0.3 * total, counts
    assert counts["refused"] >= 0.2 * total, counts
    print(dict(counts))  # for `pytest -s`
