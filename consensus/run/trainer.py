"""The training loop around Algorithm 1."""

import time
from collections.abc import Callable
from dataclasses import asdict
from signal import Signals

from torch import Tensor

from consensus.algorithm import Consensus
from consensus.comm import Group, GroupError, PeerLostError
from consensus.records import Row
from consensus.replay import Replay, obstacle_to_replay
from consensus.report.stationarity import measurements, verdict
from consensus.run.build import build_algorithm
from consensus.run.checkpoint.directory import RunDirectory
from consensus.run.checkpoint.manifest import as_hex
from consensus.run.checkpoint.resume import Resumed, resume
from consensus.run.checkpoint.writer import CheckpointWriter, Facts
from consensus.run.diagnosis import Diagnosis, divergence
from consensus.run.health import HealthCheck
from consensus.run.metrics import Best, better, measure, selection, share_buffers
from consensus.run.overrides import for_shell, override
from consensus.run.plan import Plan
from consensus.run.problem import difference_of_data
from consensus.run.progress import Screen
from consensus.run.results import draw_pictures, finish_run
from consensus.run.signals import TRY_AGAIN, RunStopped, StopSignals
from consensus.run.sinks import MINIBATCH_LOSS, RunInfo, Sink, Sinks
from consensus.run.stationarity import Stationarity
from consensus.server import digest


class Trainer:
    """One run, on every rank. Rank 0 alone prints, and writes all files but checkpoints.

    Args:
        plan: The plan of the run.
        group: The processes of the run.
        quiet: Whether rank 0 prints nothing either.
        owns_process: Whether a stop signal that has no effect in time may end the process.
        directory: The run directory; None: opened here, by all ranks.
    """

    def __init__(
        self,
        plan: Plan,
        group: Group,
        *,
        quiet: bool = False,
        owns_process: bool = True,
        directory: RunDirectory | None = None,
    ) -> None:
        self.plan, self.config, self.group = plan, plan.config, group
        self.algorithm = build_algorithm(plan, group)
        self.directory = directory or RunDirectory(plan.origin, plan.config, plan.launch, group)
        self.run_dir = self.directory.path
        self.iterations = plan.config.algorithm.iterations
        self.until = plan.config.output.stop_at or self.iterations  # of this process
        self.screen = Screen(self.iterations, enabled=group.rank == 0 and not quiet)
        self.patience_s = plan.config.group.timeout_s if owns_process else None
        every = plan.config.stationarity.every if plan.config.coupled else None
        self.analyse_every = every  # iterations, None: never
        self.stationarity = Stationarity(plan, group) if every is not None else None
        self.rows: list[Row] = []  # the evaluations so far, those before a resume included
        self.best: Best = None
        self.diagnosis = Diagnosis(plan)
        self.sinks = Sink()  # writes nothing: rank 0 gets others in `start`
        self.writer = self.open_writer()

    def open_writer(self) -> CheckpointWriter | None:
        """The writer of checkpoints; None if the run has none. A collective."""
        output = self.config.output
        if output.checkpoint_every is None:
            return None
        return CheckpointWriter(
            self.run_dir,
            self.config,
            self.group.side(),
            (self.plan.own_numbers, self.plan.num_workers),
            output.keep_checkpoints,
            before_publish=lambda: self.sinks.sync(),
        )

    @property
    def problem(self) -> str | None:
        """The write error of this rank; None if there is none."""
        return self.directory.problem or (self.writer.problem if self.writer is not None else None)

    @property
    def stop_signal(self) -> int:
        """The signal that asks the run to stop; 0 if there is none."""
        return self.signals.received

    def agree(self) -> None:
        """Raise on all ranks if one of them has a write error. A collective."""
        self.group.raise_together(self.problem)

    def run(self) -> Row:
        """Train to the end; return the last evaluation. All ranks raise alike."""
        self.signals = StopSignals(self.patience_s)
        try:
            with self.screen:
                self.describe()
                start = self.start()
                self.loop(start)
                self.complete(start)
        except PeerLostError:
            raise
        except GroupError:
            self.finish_writing()  # a checkpoint from before the failure is valid
            raise
        finally:
            self.close()
            self.signals.close()
        self.tell_results()
        return self.rows[-1]

    def close(self) -> None:
        """Close what the run has open but its group."""
        if self.plan.oracle.ahead is not None:
            self.plan.oracle.ahead.close()
        self.sinks.close()
        self.directory.close()

    def describe(self) -> None:
        """Print what the run is, and remarks about its config."""
        lines = [f"{self.plan.description()} -> {self.run_dir}", self.directory.warning]
        for line in filter(None, [*lines, *self.plan.remarks()]):
            self.screen.say(line)

    def complete(self, start: int) -> None:
        """Write the results after the last iteration; `start` is the first of this process.

        RunStopped if the run stops before, at `output.stop_at`.
        """
        if not self.rows or self.rows[-1]["iteration"] != self.until:
            # The loaded checkpoint is that of the last iteration, but its row was lost.
            self.evaluate(self.until, self.stationarity is not None)
        if self.writer is not None and start == self.until and not self.plan.origin.continues:
            self.save(start)  # a new run that starts at its end has a checkpoint too
        if self.until < self.iterations:
            self.stop(self.until, "output.stop_at", 0, saved=True)
        self.finish_writing()
        self.agree()
        with self.directory.writing():
            self.sinks.close()
            self.finish()
        self.agree()

    def tell_results(self) -> None:
        """Print the table of evaluations and the run directory."""
        self.screen.table(self.rows, title=f"{self.run_dir.name}: u at the evaluations")
        if analysed := measurements(self.rows):
            self.screen.say(verdict(analysed))
        self.screen.say(f"results in {self.run_dir}")

    def start(self) -> int:
        """Continue from a checkpoint if the plan has one. Returns the iterations done."""
        plan, began = self.plan, time.perf_counter()
        resumed = self.restore()
        share_buffers(plan, self.group)
        if line := difference_of_data(plan.dataset, self.group):
            self.screen.say(line)
        self.started = began - resumed.seconds
        self.rows, self.best, start = resumed.rows, resumed.best, resumed.iteration
        self.until = max(self.until, start)  # it may be beyond output.stop_at already
        complete = start == self.until and bool(self.rows)
        if complete and self.stationarity is not None and "stationarity" not in self.rows[-1]:
            self.rows.pop()  # evaluated again, with the measurement
        for row in self.rows:
            self.diagnosis.remarks(row)  # they were made before
        self.open_sinks(start if plan.origin.continues else None)
        self.agree()
        self.screen.begin(start)
        return start

    def restore(self) -> Resumed:
        """Load the checkpoint of the plan, if it has one. A collective."""
        where = self.directory, self.algorithm, self.plan.own_numbers
        return resume(*where, self.iterations, self.screen.say)

    def open_sinks(self, after: int | None) -> None:
        """Open the sinks on rank 0; `after`: the iteration that an earlier run has come to."""
        if self.group.rank > 0:
            return
        plan, rows = self.plan, tuple(self.rows)
        layers, config = plan.risk.layout.layer_names, asdict(self.config)
        info = RunInfo(self.run_dir, layers, rows, after, config, selection(plan))
        tensorboard = self.config.output.tensorboard
        with self.directory.writing():
            self.sinks = Sinks(info, tensorboard, self.screen.say, self.screen)

    def loop(self, start: int) -> None:
        """All iterations, with the evaluations and checkpoints that are due between them."""
        self.begin(start)
        step = self.step_function()
        for t in range(start, self.until):
            step(t)
            self.after(t + 1)

    def begin(self, start: int) -> None:
        """Begin to observe the workers of this rank, and the clock of samples_per_s."""
        drops = self.config.algorithm.on_nonfinite == "drop"
        dropped = self.algorithm.worker.dropped if drops else None
        numbers, log_every = self.plan.numbers, self.config.output.log_every
        delay = self.config.algorithm.delay
        late = delay + 1 if delay else 0  # as the sums, on networks where it counts
        self.health = HealthCheck(self.group, numbers, log_every, dropped, late)
        self._clock, self._counted = time.perf_counter(), start

    def after(self, done: int) -> None:
        """Evaluation, checkpoint and checks where due. A collective, or nothing, on all ranks."""
        output, health = self.config.output, self.health
        log = done % output.log_every == 0
        analyse = self.is_due(self.analyse_every, done)
        evaluate = self.is_due(output.eval_every, done) or analyse
        save = self.is_due(output.checkpoint_every, done)
        signal, wait = 0, evaluate or save
        if wait or health.due(done):
            signal = health.check(done, self.stop_signal, self.problem, wait)
            if line := health.remark():
                self.screen.say(line)
        if log or evaluate:
            self.log(done)
        if evaluate:
            self.evaluate(done, analyse and not signal)
        if save:
            self.save(done)
        if signal and done < self.until:
            self.stop(done, Signals(signal).name, TRY_AGAIN, saved=save)

    def is_due(self, every: int | None, done: int) -> bool:
        """Whether an event of this interval, which also happens at the end, is due."""
        return every is not None and (done % every == 0 or done == self.until)

    def step_function(self) -> Callable[[int], None]:
        """An iteration and its observation, replayed as a CUDA graph where possible."""
        algorithm, health = self.algorithm, self.health

        def observe(t: int | Tensor) -> None:
            health.observe(t, algorithm.u, algorithm.worker.z)

        def step(t: int) -> None:
            algorithm.step(t)
            observe(t)

        if not self.config.cuda_graph or obstacle_to_replay(algorithm, self.group.size):
            return step
        return Replay(algorithm, observe, refused=self.screen.say).step

    def log(self, done: int) -> None:
        """Pass the scalars that need no collective to the sinks, on rank 0."""
        if self.group.rank > 0:
            return
        loss = float(self.plan.oracle.losses.mean())
        values = {MINIBATCH_LOSS: loss, "training/smallest_s_j": float(self.algorithm.worker.step)}
        if isinstance(self.algorithm, Consensus):
            values["training/s_u"] = float(self.algorithm.server.step)
        for name in ("sigma", "tau", "lam"):
            size = getattr(self.algorithm, name, None)
            if callable(size):  # it follows a schedule
                values[f"training/{name}"] = float(size(max(0, done - 1)))
        with self.directory.writing():
            self.sinks.scalars(values, done)

    def evaluate(self, done: int, analyse: bool) -> None:
        """Measure on all ranks, `analyse` stationarity too, and write on rank 0. A collective."""
        seconds = time.perf_counter() - self._clock
        steps_each = (1 / n for n in self.config.algorithm.strides(self.plan.num_workers))
        samples = (done - self._counted) * self.config.algorithm.batch_size * sum(steps_each)
        algorithm, digest_of_u = self.algorithm, self.algorithm.verify()
        state = algorithm.u, algorithm.worker.z, algorithm.phi, algorithm.lam, algorithm.cuts
        row = measure(*state, self.plan, self.group, done)
        row["wall_s"] = time.perf_counter() - self.started
        row["samples_per_s"] = samples / seconds
        row["digest"] = as_hex(digest_of_u)
        if analyse:
            assert self.stationarity is not None
            assert isinstance(algorithm, Consensus)
            found = self.stationarity.measure(algorithm, done, lambda: self.signals.received != 0)
            if found is not None:
                row["stationarity"] = found
            else:
                self.screen.say("stationarity not measured: asked to stop")
        if message := divergence(row, self.plan):
            row["diverged"] = True
        self.rows.append(row)
        self.best = better(self.best, row, self.plan)
        with self.directory.writing():
            self.sinks.evaluation(row)
        self.agree()
        if message:
            raise GroupError(message)  # on all ranks: they have the same row
        for remark in self.diagnosis.remarks(row):
            self.screen.say(remark)
        # Evaluations do not count as training: the next samples_per_s starts here.
        self._clock, self._counted = time.perf_counter(), done

    def save(self, done: int) -> None:
        """Start a checkpoint; the training continues as soon as its copy is made."""
        assert self.writer is not None
        wall_s = time.perf_counter() - self.started
        facts = Facts(done, int(digest(self.algorithm.u)), wall_s, self.best)
        self.writer.write(self.algorithm.state_dict(), facts)

    def stop(self, done: int, cause: str, code: int, saved: bool) -> None:
        """Write a checkpoint, then raise RunStopped; GroupError if it fails. On all ranks."""
        stopped = f"{cause}: stopped at iteration {done}"
        if self.writer is None:
            why = "output.checkpoint_every=null"
            raise RunStopped(f"{stopped} without a checkpoint ({why})", 128 + Signals[cause])
        if not saved:
            self.save(done)
        self.finish_writing()
        self.agree()
        again = self.command()
        again += f" {for_shell(['resume=auto', override('output.run_dir', str(self.run_dir))])}"
        raise RunStopped(f"{stopped} with a checkpoint; to continue: {again}", code)

    def command(self) -> str:
        """The command that starts as many processes, without its arguments."""
        return self.plan.launch.command()

    def finish_writing(self) -> None:
        """Wait until no checkpoint is being written."""
        if self.writer is not None:
            self.writer.wait()

    def finish(self) -> None:
        """Write the results, on rank 0."""
        if self.group.rank > 0:
            return
        names, writer = ("written", "wait_s", "write_s"), self.writer
        extra = {"checkpoints": {name: getattr(writer, name) for name in names}} if writer else {}
        finish_run(self.run_dir, self.rows, self.best, self.algorithm.u, self.plan, extra)
        output = self.config.output
        if output.figures:
            draw_pictures(self.run_dir, self.rows, self.screen.say, output.checkpoint_every)
