"""Fault injection: a plugin that disturbs a chosen rank at a chosen iteration of a real run.

A plugin of the command (`plugins=[tests.testing.faults]`, the checkout on PYTHONPATH): every rank
imports it and reads the environment variable FAULTS, a JSON list of

    {"kind": "kill", "rank": 1, "iteration": 30, "attempt": 0, "seconds": 2.0}

`iteration` is the number of iterations done before it; "import" is before the rendezvous, "finish"
after the last iteration. `attempt` counts torchrun's restarts (default 0), `rank` may be "all". The
kinds:

    kill       SIGKILL, as the kernel's out-of-memory killer sends it
    stop       SIGSTOP, and SIGCONT after `seconds` if they are given
    slow       sleeps `seconds` before this iteration
    hang       sleeps for ever, alive
    raise      an unexpected exception
    signal     sends itself `signal`, a name such as "SIGTERM"
    nan        the minibatch gradient of its first worker becomes NaN, once
    no_reader  the reader of its standard output goes away
    full       its standard output is a full device
    flip_bit   the lowest bit of u[0] is flipped in this rank's replica
    quota      limits the size of files to `bytes`
"""

import json
import os
import resource
import signal
import subprocess
import time

import torch

from consensus.algorithm import Consensus
from consensus.run.trainer import Trainer

RANK = int(os.environ.get("RANK", "0"))
ATTEMPT = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def mine(fault: dict) -> bool:
    return fault["rank"] in (RANK, "all") and fault.get("attempt", 0) == ATTEMPT


FAULTS = [fault for fault in json.loads(os.environ.get("FAULTS", "[]")) if mine(fault)]


def happen(fault: dict, algorithm: Consensus | None = None) -> None:
    kind, seconds = fault["kind"], fault.get("seconds")
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "stop":
        if seconds is not None:
            wake = f"sleep {seconds}; kill -CONT {os.getpid()}"
            subprocess.Popen(["sh", "-c", wake], start_new_session=True)
        os.kill(os.getpid(), signal.SIGSTOP)
    elif kind == "slow":
        time.sleep(seconds)
    elif kind == "hang":
        while True:
            time.sleep(1.0)
    elif kind == "raise":
        raise RuntimeError("an injected failure")
    elif kind == "signal":
        os.kill(os.getpid(), getattr(signal, fault["signal"]))
    elif kind == "nan":
        spoil_the_next_gradient(algorithm)
    elif kind == "quota":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # write() fails with EFBIG instead
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault["bytes"], fault["bytes"]))
    elif kind == "no_reader":
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, 1)
    elif kind == "full":
        os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
    elif kind == "flip_bit":
        u = algorithm.server.u
        bits = u.view({torch.float32: torch.int32, torch.float64: torch.int64}[u.dtype])
        bits[0] ^= 1
    else:
        raise ValueError(f"no such fault: {kind}")


def spoil_the_next_gradient(algorithm: Consensus) -> None:
    oracle = algorithm.worker.oracle
    honest = oracle.gradient

    def gradient(points, batch):
        oracle.gradient = honest
        delta = honest(points, batch)
        delta[0] = float("nan")
        return delta

    oracle.gradient = gradient


honest_step, honest_finish = Consensus.step, Trainer.finish


def strike(when: int | str, algorithm: Consensus | None = None) -> None:
    for fault in FAULTS:
        if fault["iteration"] == when:
            happen(fault, algorithm)


def step(self: Consensus, t: int) -> None:
    strike(t, self)
    honest_step(self, t)


def finish(self: Trainer) -> None:
    strike("finish")
    honest_finish(self)


Consensus.step = step  # type: ignore[method-assign]
Trainer.finish = finish  # type: ignore[method-assign]
strike("import")
