"""Runs of a sweep that advance together in this process: `sweep.engine=population`.

Data flow: the runs that are not done are grouped by everything in their configs but the numbers
that a `Population` takes one by one (lam, eta, tau, sigma, momentum, weight decay, schedules,
seed); each group is cut into populations that fit into memory, and these train one after another.
Every run leaves the files that it would leave alone, but for the picture and TensorBoard's events.
The state of a population is one file, written whole, in the directory of the sweep.
"""

import copy
import hashlib
import io
import json
import math
import os
import pickle
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from consensus.algorithm import StepSize
from consensus.atomic_files import write_whole
from consensus.comm import Launch, Solo
from consensus.core.flat import part_of
from consensus.core.layerwise import Layerwise
from consensus.population import Population
from consensus.problem import WAYS, PopulationRisk, Way
from consensus.records import Row, rows_until, to_json
from consensus.replay import cuda_graph
from consensus.run.build import scheduled
from consensus.run.checkpoint.directory import Origin, RunDirectory
from consensus.run.checkpoint.resume import find_origin
from consensus.run.checks import ConfigError
from consensus.run.config import Config
from consensus.run.device import memory_of, set_determinism
from consensus.run.metrics import measure
from consensus.run.plan import Plan, count_workers, make_phi, make_plan
from consensus.run.results import environment
from consensus.run.signals import StopSignals
from consensus.run.sinks import JsonlSink, RunInfo
from consensus.server import digest
from consensus.sweep.job import Status

FORMAT = 2
"""Of the state of a population; part of its name, so that no other is read."""

MOST_MODELS = 65_535
"""In one population: the kernels of core/kernels/triton.py have a place in their grid for each."""

VECTORS = 8
"""Of (M, n) that a configuration needs at most at once: z, v, the look-ahead points, u - z, its
force, the direction, and what lies between."""
SHARE_OF_MEMORY = 0.5


@dataclass
class Member:
    """A configuration of a population, and its files.

    Attributes:
        name: Of the run.
        run_dir: Its directory.
        config: Its config.
        rows: Its evaluations so far.
    """

    name: str
    run_dir: Path
    config: Config
    rows: list[Row] = field(default_factory=list)


def kind(config: Config) -> str:
    """What configurations of one population share: their config without what may differ."""
    shared = copy.deepcopy(asdict(config))
    for key in ("lam", "tau", "sigma", "momentum", "weight_decay", "schedule"):
        del shared["algorithm"][key]
    for key in ("root", "run_dir", "name"):
        del shared["output"][key]
    del shared["potential"]["eta"], shared["seed"], shared["resume"], shared["group"]
    return json.dumps(shared, sort_keys=True, default=str)


def key_of(members: Sequence[Member]) -> str:
    """A name for the state of a population, that of no other: the same runs, the same configs."""
    configs = [asdict(member.config) for member in members]
    for config in configs:
        del config["output"]["root"], config["output"]["run_dir"]  # a sweep may be moved
    names = [member.name for member in members]
    content = json.dumps([FORMAT, names, configs], sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def populations(members: Sequence[Member], memory: int | None = None) -> list[list[Member]]:
    """Members that can advance together, in as few populations as fit into memory.

    A function of all members, done or not, and of the machine, so that a sweep that is started
    again finds the populations that it has begun.

    Args:
        members: All runs of the sweep that the engine takes.
        memory: Bytes to use; None: a half of what the device has.
    """
    groups: dict[str, list[Member]] = {}
    for member in members:
        groups.setdefault(kind(member.config), []).append(member)
    found = []
    for group in groups.values():
        plan = plan_alone(group[0].config)
        usable = int(SHARE_OF_MEMORY * memory_of(plan.device)) if memory is None else memory
        each = VECTORS * plan.num_workers * plan.start.numel() * plan.start.element_size()
        most = min(usable // each, MOST_MODELS // plan.num_workers)
        parts = math.ceil(len(group) / max(1, most))
        size = math.ceil(len(group) / parts)  # even
        found += [group[i : i + size] for i in range(0, len(group), size)]
    return found


def plan_alone(config: Config) -> Plan:
    """The plan of a configuration, whatever its directory holds."""
    output = replace(config.output, run_dir=None)
    return make_plan(replace(config, output=output, resume="never"), Launch())


def train_together(
    members: Sequence[Member], folder: Path, say: Callable[[str], None], gradients: str = "auto"
) -> None:
    """Train the members that are not done, population by population.

    Args:
        members: All runs of the sweep that the engine takes.
        folder: For the states of populations.
        say: Gets lines for a person.
        gradients: `sweep.gradients`.

    Raises:
        ConfigError: If a member's directory holds another run, or a plan cannot be made.
        KeyboardInterrupt: If this process is asked to stop.
    """
    known: dict[str, Way] = {}
    for population in populations(members):
        left = [m for m in population if Status.read(m.run_dir).state != "done"]
        for member in left:
            find_origin(member.config, Launch(), count_workers(member.config, Launch()))
        if left:
            say(f"{len(left)} runs of {len(population)} advance together")
            Together(left, folder, say, gradients, known).run()


@dataclass
class _Worker:
    z: Tensor


@dataclass
class _View:
    """One configuration as `measure` looks at an algorithm."""

    u: Tensor
    worker: _Worker
    phi: Layerwise
    lam: StepSize
    cuts: Tensor


class Together:
    """The training of one population.

    Args:
        members: Of one kind.
        folder: Where its checkpoint lies.
        say: Gets lines for a person.
        gradients: `sweep.gradients`.
        known: The ways that other populations have found fastest for as many of the same models;
            gets that of this one.

    Raises:
        ConfigError: If its gradients cannot be computed in that way.
    """

    def __init__(
        self,
        members: Sequence[Member],
        folder: Path,
        say: Callable[[str], None] = print,
        gradients: str = "auto",
        known: dict[str, Way] | None = None,
    ) -> None:
        self.members = list(members)
        self.say = say
        self.checkpoint = folder / f"{key_of(members)}.pt"
        first = members[0].config
        set_determinism(first)
        self.plans: dict[int, Plan] = {}
        for member in members:
            seed = member.config.seed
            if seed not in self.plans:
                self.plans[seed] = plan_alone(member.config)
        self.group = Solo(self.plans[first.seed].device)
        self.phis = [self._phi(member) for member in members]
        self.population = self._make()
        self.oracle = cast(PopulationRisk, self.population.oracle)
        self.iterations = first.algorithm.iterations
        self.start = self._restore()
        if self.start == 0:
            self.oracle.way = self._way(gradients, {} if known is None else known)
        self.say(f"gradients {self.oracle.way}")
        # Last: what is refused leaves no directory locked.
        self.directories = [
            RunDirectory(Origin(m.run_dir), m.config, Launch(), self.group) for m in members
        ]

    def _plan(self, member: Member) -> Plan:
        return replace(self.plans[member.config.seed], config=member.config)

    def _phi(self, member: Member) -> Layerwise:
        plan = self.plans[member.config.seed]
        return make_phi(member.config, plan.risk, plan.device, plan.start.dtype)

    def _make(self) -> Population:
        configs = [member.config for member in self.members]
        chosen = [config.algorithm for config in configs]
        plan = self.plans[configs[0].seed]
        potential = configs[0].potential.make()
        layers = plan.risk.layout.layers
        oracle = PopulationRisk(
            plan.risk,
            plan.dataset,
            [config.seed for config in configs],
            {seed: plan.oracle.minibatches for seed, plan in self.plans.items()},
        )
        wanted = configs[0].cuda_graph and plan.device.type == "cuda"
        self.record = cuda_graph if wanted and not oracle.model_draws else None
        plan.risk.side_by_side = self.record is not None
        return Population(
            torch.stack([self.plans[config.seed].start for config in configs]),
            plan.num_workers,
            oracle,
            lambda eta: Layerwise(potential, layers, eta),
            eta=[config.potential.eta for config in configs],
            tau=[scheduled(algorithm, "tau") for algorithm in chosen],
            sigma=[scheduled(algorithm, "sigma") for algorithm in chosen],
            lam=[scheduled(algorithm, "lam") for algorithm in chosen],
            kappa=[algorithm.momentum for algorithm in chosen],
            nu=[algorithm.weight_decay for algorithm in chosen],
            order=chosen[0].order,
            u_step_on=chosen[0].u_step_on,
            momentum_on=chosen[0].momentum_on,
            period=chosen[0].period,
            record=self.record,
            refused=self.say,
        )

    def _way(self, gradients: str, known: dict[str, Way]) -> Way:
        """The way that `sweep.gradients` means."""
        config, device = self.members[0].config, self.group.device
        if gradients == "auto" and (device.type == "cpu" or config.deterministic):
            return Way()
        names = WAYS if gradients in ("auto", "measure") else (gradients,)
        points = self.population.z.flatten(0, 1)
        same = (asdict(config.model), config.dtype, config.algorithm.batch_size, len(points))
        if str(same) not in known:
            try:
                with torch.no_grad():
                    found = self.oracle.fastest_way(points, names, self.record)
            except ValueError as error:
                raise ConfigError(
                    f"`sweep.gradients` is {gradients}; allowed here: one_by_one ({error})"
                ) from error
            known[str(same)] = found
        return known[str(same)]

    def run(self) -> None:
        """Train to the end, or until this process is asked to stop.

        Raises:
            KeyboardInterrupt: If it is asked to, by SIGTERM or SIGUSR1 after a checkpoint.
        """
        signals = StopSignals(600.0)
        running = Status("running", os.getpid(), socket.gethostname())
        for i in self.population.active.tolist():
            running.write(self.members[i].run_dir)
        try:
            self._train(signals)
        except BaseException:
            for i in self.population.active.tolist():
                Status("stopped").write(self.members[i].run_dir)
            raise
        finally:
            signals.close()
            for directory in self.directories:
                directory.close()
        self.checkpoint.unlink(missing_ok=True)

    def _train(self, signals: StopSignals) -> None:
        output = self.members[0].config.output
        self._began, self._clock, self._done = time.perf_counter(), time.perf_counter(), self.start
        for t in range(self.start, self.iterations):
            self.population.step(t)
            done = t + 1
            last = done == self.iterations
            evaluate = done % output.eval_every == 0 or last
            save = output.checkpoint_every is not None and done % output.checkpoint_every == 0
            if evaluate or save or done % output.log_every == 0:
                self._let_go(done)
                if not len(self.population.active):
                    return
            if evaluate:
                self._evaluate(done)
            if last:
                self._finish()
            elif save or signals.received:
                self._save(done)
            if signals.received and not last:
                raise KeyboardInterrupt

    def _let_go(self, done: int) -> None:
        """Freeze what has diverged, and say so in its status."""
        for i in self.population.freeze(self.population.diverged()).tolist():
            message = f"became non-finite, by iteration {done} at the latest"
            seconds = time.perf_counter() - self._began
            Status("failed", seconds=seconds, code=1, message=message).write(
                self.members[i].run_dir
            )

    def _evaluate(self, done: int) -> None:
        data = self.plans[self.members[0].config.seed].dataset
        now = time.perf_counter()  # evaluation is not training
        on_train = self.oracle.evaluate(self.population.u, data.train_images, data.train_labels)
        on_test = self.oracle.evaluate(self.population.u, data.test_images, data.test_labels)
        seconds, passed = now - self._clock, done - self._done
        for row, i in enumerate(self.population.active.tolist()):
            member = self.members[i]
            view = self._view(row, i)
            plan = self._plan(member)
            evaluated = (on_train[row], on_test[row])
            state = view.u, view.worker.z, view.phi, view.lam, view.cuts
            numbers = measure(*state, plan, self.group, done, evaluated)
            numbers["wall_s"] = now - self._began
            samples = passed * plan.num_workers * member.config.algorithm.batch_size
            numbers["samples_per_s"] = samples / seconds
            numbers["digest"] = f"{int(digest(view.u)) & (2**64 - 1):016x}"
            names = plan.risk.layout.layer_names
            sink = JsonlSink(RunInfo(member.run_dir, names, member.rows))
            sink.evaluation(numbers)
            sink.close()
            member.rows.append(numbers)
        self._clock, self._done = time.perf_counter(), done

    def _view(self, row: int, i: int) -> _View:
        population = self.population
        return _View(
            population.u[row],
            _Worker(population.z[row]),
            self.phis[i],
            scheduled(self.members[i].config.algorithm, "lam"),
            population.cuts[row],
        )

    def _finish(self) -> None:
        """The model, and last of all the summary, of each that came to the end."""
        seconds = time.perf_counter() - self._began
        for row, i in enumerate(self.population.active.tolist()):
            member = self.members[i]
            plan = self._plan(member)
            buffer = io.BytesIO()
            torch.save(plan.risk.layout.state_dict(self.population.u[row]), buffer)
            write_whole(member.run_dir / "model.pt", buffer.getvalue())
            best = min(member.rows, key=lambda found: float(found["test_error"]))
            summary = member.rows[-1] | {
                "best": {key: best[key] for key in ("iteration", "test_error")},
                "environment": environment(plan)
                | {"population": len(self.members), "gradients": str(self.oracle.way)},
            }
            content = to_json(summary, indent=2).encode() + b"\n"
            write_whole(member.run_dir / "summary.json", content)
            Status("done", seconds=seconds, code=0).write(member.run_dir)

    # ---- the checkpoint

    def _save(self, done: int) -> None:
        state = {f"population/{k}": v for k, v in self.population.state_dict().items()}
        state |= {f"oracle/{k}": v for k, v in self.oracle.state_dict().items()}
        state["iterations"] = torch.tensor(done)
        buffer = io.BytesIO()
        torch.save(state, buffer)
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.checkpoint, buffer.getvalue())

    def _restore(self) -> int:
        """Continue from the checkpoint, if there is one. Returns the iterations done."""
        if not self.checkpoint.exists():
            return 0
        try:
            state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        except (RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError):
            self.say(f"{self.checkpoint} cannot be read: these runs begin again")
            return 0
        done = int(state["iterations"])
        self.population.load_state_dict(part_of(state, "population"))
        self.oracle.load_state_dict(part_of(state, "oracle"))
        for member in self.members:
            member.rows = rows_until(member.run_dir, done)
        self.say(f"continues {len(self.population.active)} runs at iteration {done:,}")
        return done
