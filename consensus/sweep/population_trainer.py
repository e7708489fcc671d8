"""Population training of a sweep in this process: `sweep.engine=population`.

Populations train one after another. Every run gets the files of a separate run except the figure
and TensorBoard events. The checkpoint of a population is one file in the directory of the sweep,
written atomically.
"""

import io
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from signal import Signals

import torch

from consensus.atomic_files import write_whole
from consensus.comm import Launch, Solo
from consensus.core.flat import part_of
from consensus.core.layerwise import Layerwise
from consensus.population import Population
from consensus.problem import WAYS, PopulationRisk, Way
from consensus.records import rows_until
from consensus.replay import cuda_graph
from consensus.run.build import lam_of, scheduled, tau_of
from consensus.run.checkpoint.directory import Origin, RunDirectory
from consensus.run.checkpoint.resume import find_origin
from consensus.run.checks import ConfigError
from consensus.run.diagnosis import ADVICE, Diagnosis, divergence
from consensus.run.metrics import Best, better, measure
from consensus.run.plan import Plan, count_workers, make_phi, set_determinism
from consensus.run.results import environment, finish_run
from consensus.run.signals import TRY_AGAIN, RunStopped, StopSignals
from consensus.run.sinks import JsonlSink, RunInfo
from consensus.server import digest
from consensus.sweep.halving import has_diverged
from consensus.sweep.job import Status, allow_open_files, finished
from consensus.sweep.members import Member, Stage, key_of, plan_alone, populations


def train_populations(
    members: Sequence[Member],
    folder: Path,
    log: Callable[[str], None],
    gradients: str,
    stage: Stage,
) -> list[Member]:
    """Train the members of a stage, one population after another, with `sweep.gradients`.

    Returns the members that no population can train.

    The members are all runs of the sweep that the engine can train, and `folder` holds the
    checkpoints. Raises a ConfigError if the directory of a member holds another run, or a plan
    cannot be made, and RunStopped after a stop signal and a checkpoint.
    """
    known: dict[str, Way] = {}
    found = populations(members)
    allow_open_files(max(map(len, found), default=0))
    for population in found:
        left = [m for m in population if not finished(m.run_dir, m.config.algorithm.iterations)]
        if stage.todo.isdisjoint(member.name for member in left):
            continue
        for member in left:
            find_origin(member.config, Launch(), count_workers(member.config, Launch()))
        going = sum(member.name in stage.going for member in left)
        log(f"{going} runs of {len(population)} advance together")
        PopulationTrainer(left, folder, log, gradients, known, stage).run()
    together = {member.name for population in found for member in population}
    return [member for member in members if member.name not in together]


class PopulationTrainer:
    """Trains one population: runs of one `kind`, with a checkpoint in `folder`.

    `known` is a cache of measured gradient methods, shared with other populations. Members that do
    not go on in the stage are frozen at its start. A ConfigError if `gradients` names a method that
    does not work for this model.
    """

    def __init__(
        self,
        members: Sequence[Member],
        folder: Path,
        log: Callable[[str], None],
        gradients: str,
        known: dict[str, Way],
        stage: Stage,
    ) -> None:
        self.members, self.log = members, log
        self.checkpoint = folder / f"{key_of(members)}.pt"
        first = members[0].config
        set_determinism(first)
        of_seed: dict[int, Plan] = {}
        for member in members:
            if member.config.seed not in of_seed:
                of_seed[member.config.seed] = plan_alone(member.config)
        self.plans = [replace(of_seed[m.config.seed], config=m.config) for m in members]
        plan = self.plans[0]
        self.group = Solo(plan.device)
        self.phis = [make_phi(m.config, plan.risk, plan.device, plan.start.dtype) for m in members]
        self.oracle = PopulationRisk(
            plan.risk,
            plan.dataset,
            [member.config.seed for member in members],
            {seed: plan.oracle.minibatches for seed, plan in of_seed.items()},
        )
        on_gpu = first.cuda_graph and plan.device.type == "cuda"
        self.record = cuda_graph if on_gpu and not self.oracle.model_draws else None
        plan.risk.side_by_side = self.record is not None
        self.population = self._make_population(plan)
        self.diagnoses = [Diagnosis(own) for own in self.plans]
        self.iterations = first.algorithm.iterations
        self.until = stage.iterations or self.iterations  # at the end of the stage
        self.start = self._restore(stage.todo)
        gone = [members[i].name not in stage.going for i in self._active()]
        self.population.freeze(torch.tensor(gone, dtype=torch.bool))
        if self.start == 0:
            self.oracle.way = self._way(gradients, known)
        else:
            self.log(f"continues {len(self.population.active)} runs at iteration {self.start:,}")
        self.log(f"gradients {self.oracle.way}")
        # Last, so that a refusal leaves no directory locked.
        self.directories = [
            # The sweep has checked what is there: every member continues its own run.
            RunDirectory(Origin(m.run_dir, m.run_dir), m.config, Launch(), self.group)
            for m in members
            if m.name in stage.going
        ]

    def _make_population(self, plan: Plan) -> Population:
        configs = [member.config for member in self.members]
        algorithms = [config.algorithm for config in configs]
        shared, potential = algorithms[0], configs[0].potential.make()
        return Population(
            torch.stack([own.start for own in self.plans]),
            plan.num_workers,
            self.oracle,
            lambda eta: Layerwise(potential, plan.risk.layout.layers, eta),
            eta=[config.potential.eta for config in configs],
            tau=[tau_of(config, plan.num_workers) for config in configs],
            sigma=[scheduled(algorithm, "sigma") for algorithm in algorithms],
            lam=[lam_of(config) for config in configs],
            kappa=[algorithm.momentum for algorithm in algorithms],
            nu=[algorithm.weight_decay for algorithm in algorithms],
            order=shared.order,
            u_step_on=shared.u_step_on,
            momentum_on=shared.momentum_on,
            period=shared.period,
            local_pull=[algorithm.local_pull for algorithm in algorithms],
            record=self.record,
            refused=self.log,
        )

    def _way(self, gradients: str, known: dict[str, Way]) -> Way:
        """The gradient method that `sweep.gradients` selects."""
        config, device = self.members[0].config, self.group.device
        if gradients == "auto" and (device.type == "cpu" or config.deterministic):
            return Way()
        names = WAYS if gradients in ("auto", "measure") else (gradients,)
        points = self.population.z.flatten(0, 1)
        same = str((asdict(config.model), config.dtype, config.algorithm.batch_size, len(points)))
        if same not in known:
            try:
                with torch.no_grad():
                    known[same] = self.oracle.fastest_way(points, names, self.record)
            except ValueError as error:
                raise ConfigError(
                    f"`sweep.gradients` is {gradients}; allowed here: one_by_one ({error})"
                ) from error
        return known[same]

    def run(self) -> None:
        """Train to the end of the stage, or to a stop signal: RunStopped, after a checkpoint."""
        signals = StopSignals(600.0)
        running = Status.running()
        for i in self._active():
            running.write(self.members[i].run_dir)
        try:
            self._train(signals)
        except BaseException:
            with suppress(OSError):  # a full disk
                for i in self._active():
                    Status("stopped").write(self.members[i].run_dir)
            raise
        finally:
            signals.close()
            for directory in self.directories:
                directory.close()
        if self.until == self.iterations or not len(self.population.active):
            self.checkpoint.unlink(missing_ok=True)
        if signals.received:  # during the last iteration
            raise KeyboardInterrupt

    def _train(self, signals: StopSignals) -> None:
        output = self.members[0].config.output
        self._began, self._clock, self._done = time.perf_counter(), time.perf_counter(), self.start
        if self.start >= self.until and any(self._reached(i) < self.start for i in self._active()):
            self._evaluate(self.start)  # the checkpoint is that of the rung, but rows were lost
        for t in range(self.start, self.until):
            self.population.step(t)
            done = t + 1
            last = done == self.until
            evaluate = done % output.eval_every == 0 or last
            save = output.checkpoint_every is not None and done % output.checkpoint_every == 0
            if evaluate or save or done % output.log_every == 0:
                self._freeze_non_finite(done)
            if evaluate and len(self.population.active):
                self._evaluate(done)
            if not len(self.population.active):
                return
            if done == self.iterations:
                self._finish()
            elif last or save or signals.received:
                self._save(done)
            if signals.received and not last:
                name = Signals(signals.received).name
                how = f"{name}: stopped at iteration {done} with a checkpoint"
                raise RunStopped(f"{how}; the same command continues it", TRY_AGAIN)
        if self.until < self.iterations:
            seconds = time.perf_counter() - self._began
            for i in self._active():
                Status("stopped", seconds=seconds, code=0).write(self.members[i].run_dir)

    def _active(self) -> list[int]:
        return self.population.active.tolist()

    def _reached(self, i: int) -> int:
        """The iteration of the last evaluation of a member; -1 without one."""
        rows = self.members[i].rows
        return rows[-1]["iteration"] if rows else -1

    def _freeze_non_finite(self, done: int) -> None:
        """Freeze the members that hold a number that is not finite."""
        message = f"became non-finite, by iteration {done} at the latest; {ADVICE}"
        self._freeze([message if wild else None for wild in self.population.diverged().tolist()])

    def _freeze(self, messages: Sequence[str | None]) -> None:
        """Freeze each active member with a message, and set its status to failed."""
        seconds = time.perf_counter() - self._began
        wild = torch.tensor([text is not None for text in messages], dtype=torch.bool)
        frozen = self.population.freeze(wild)
        for i, message in zip(frozen.tolist(), filter(None, messages), strict=True):
            status = Status("failed", seconds=seconds, code=1, message=message)
            status.write(self.members[i].run_dir)

    def _evaluate(self, done: int) -> None:
        """Append an evaluation to metrics.jsonl of each active member; freeze what diverged."""
        now, data, block = time.perf_counter(), self.plans[0].dataset, self.population
        of_sets = [self.oracle.evaluate(block.u, samples) for samples in data.splits.values()]
        seconds, passed = now - self._clock, done - self._done  # evaluation is not training
        messages: list[str | None] = []
        for row, i in enumerate(block.active.tolist()):
            member, plan, phi = self.members[i], self.plans[i], self.phis[i]
            u, z, cuts = block.u[row], block.z[row], block.cuts[row]
            lam, evaluated = lam_of(plan.config), [of_set[row] for of_set in of_sets]
            numbers = measure(u, z, phi, lam, cuts, plan, self.group, done, evaluated)
            samples = passed * plan.num_workers * plan.config.algorithm.batch_size
            numbers["wall_s"] = now - self._began
            numbers["samples_per_s"] = samples / seconds
            numbers["digest"] = f"{int(digest(u)) & (2**64 - 1):016x}"
            messages.append(divergence(numbers, plan))
            if messages[-1]:
                numbers["diverged"] = True
            sink = JsonlSink(RunInfo(member.run_dir, plan.risk.layout.layer_names, member.rows))
            sink.evaluation(numbers)
            sink.close()
            member.rows.append(numbers)
            for remark in self.diagnoses[i].remarks(numbers):
                self.log(f"{member.name}: {remark}")
        self._freeze(messages)
        self._clock, self._done = time.perf_counter(), done

    def _finish(self) -> None:
        """Write the model and then the summary of each active member."""
        seconds = time.perf_counter() - self._began
        for row, i in enumerate(self.population.active.tolist()):
            member, plan = self.members[i], self.plans[i]
            best: Best = None
            for found in member.rows:
                best = better(best, found, plan)
            shared = {"population": len(self.members), "gradients": str(self.oracle.way)}
            extra = {"environment": environment(plan) | shared}
            finish_run(member.run_dir, member.rows, best, self.population.u[row], plan, extra)
            Status("done", seconds=seconds, code=0).write(member.run_dir)

    def _save(self, done: int) -> None:
        state = {f"population/{k}": v for k, v in self.population.state_dict().items()}
        state |= {f"oracle/{k}": v for k, v in self.oracle.state_dict().items()}
        state["iterations"] = torch.tensor(done)
        buffer = io.BytesIO()
        torch.save(state, buffer)
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.checkpoint, buffer.getvalue())

    def _restore(self, todo: Collection[str]) -> int:
        """Restore the checkpoint, if it has all of `todo`. Returns the iterations done."""
        if not self.checkpoint.exists():
            return 0
        try:
            state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
            done, active = int(state["iterations"]), state["population/active"].tolist()
        except Exception:  # whatever two parsers, and a file of somebody else, may lead to
            self.log(f"{self.checkpoint} cannot be read: these runs start again")
            return 0
        absent = [m for i, m in enumerate(self.members) if i not in active and m.name in todo]
        if not all(has_diverged(member.run_dir) for member in absent):
            self.log(f"{self.checkpoint} lacks runs that now go on: these runs start again")
            return 0
        self.population.load_state_dict(part_of(state, "population"))
        self.oracle.load_state_dict(part_of(state, "oracle"))
        for member, diagnosis in zip(self.members, self.diagnoses, strict=True):
            member.rows = rows_until(member.run_dir, done)
            for row in member.rows:
                diagnosis.remarks(row)  # they were made before
        return done
