"""The training loop around Algorithm 1: evaluations, files, and failures that concern all ranks."""

import io
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from signal import Signals

import torch
from torch import Tensor

from consensus.algorithm import Algorithm, Consensus, Msgd
from consensus.atomic_files import write_whole
from consensus.comm import Group, GroupError, PeerLostError
from consensus.core.flat import Scalar
from consensus.core.kernels import consensus_kernel, worker_kernel
from consensus.records import Row, rows_until, to_json
from consensus.replay import Replay, obstacle_to_replay
from consensus.report.plots import draw_convergence, draw_stationarity
from consensus.report.stationarity import measurements, verdict
from consensus.run.checkpoint.directory import RunDirectory
from consensus.run.checkpoint.manifest import Manifest
from consensus.run.checkpoint.reader import candidates, choose, load, set_aside
from consensus.run.checkpoint.writer import CheckpointWriter, Facts
from consensus.run.config import AlgorithmConfig
from consensus.run.health import Watch
from consensus.run.metrics import measure
from consensus.run.plan import Plan
from consensus.run.progress import Screen
from consensus.run.signals import TRY_AGAIN, StopSignals
from consensus.run.sinks import MINIBATCH_LOSS, RunInfo, Sinks
from consensus.run.stationarity import Stationarity
from consensus.server import Server, digest
from consensus.worker import Worker


class RunStopped(Exception):  # noqa: N818  (no error: it was asked for)
    """All ranks leave because one was asked to; the message says what is left."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class Trainer:
    """One run. The same on every rank; rank 0 alone speaks and writes, all but checkpoints.

    Args:
        plan: What is trained.
        group: The processes, already met.

    Attributes:
        run_dir: Where rank 0 writes.
        rows: The evaluations so far, those before a resume included.
        best: Iteration and test error of the evaluation with the lowest.

    Raises:
        GroupError: If rank 0 cannot make or lock the run directory, on every rank.
    """

    def __init__(self, plan: Plan, group: Group) -> None:
        self.plan = plan
        self.config = plan.config
        self.group = group
        self.algorithm = build_algorithm(plan, group)
        self.directory = RunDirectory(plan.origin, plan.config, plan.launch, group)
        self.run_dir = self.directory.path
        every = plan.config.stationarity.every if plan.config.coupled else None
        self.analyse_every = every  # iterations, None: never
        self.stationarity = Stationarity(plan, group) if every is not None else None
        self.rows: list[Row] = []
        self.best: dict[str, float] | None = None
        self.sinks: Sinks | None = None
        self._problem: str | None = None
        output = plan.config.output
        self.writer: CheckpointWriter | None = None
        if output.checkpoint_every is not None:
            self.writer = CheckpointWriter(
                self.run_dir,
                plan.config,
                group.side(),
                (plan.local_workers, plan.num_workers),
                output.keep_checkpoints,
                before_publish=self._sync_metrics,
            )

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Around what rank 0 alone writes: keep a failure for `agree`, never raise alone."""
        try:
            yield
        except OSError as error:
            where = f": {error.filename}" if error.filename else ""
            self._problem = (
                self._problem or f"cannot write to {self.run_dir}: {error.strerror}{where}"
            )

    @property
    def problem(self) -> str | None:
        """Why this rank cannot go on; None if it can."""
        return self._problem or (self.writer.problem if self.writer is not None else None)

    def agree(self) -> None:
        """Raise on all ranks if one of them could not write. A collective."""
        self.group.raise_together(self.problem)

    def run(self) -> Row:
        """Train to the end; return the last evaluation.

        Raises:
            GroupError: On every rank, if one of them failed.
            RunStopped: On every rank, if one of them was asked to stop.
        """
        signals = StopSignals(self.config.group.timeout_s)
        screen = Screen(self.config.algorithm.iterations, enabled=self.group.rank == 0)
        try:
            with screen:
                self._run(signals, screen)
        except PeerLostError:
            raise
        except GroupError:
            self._finish_writing()  # a checkpoint from before the failure is a good one
            raise
        finally:
            signals.close()
            if self.sinks is not None:
                self.sinks.close()
            self.directory.close()
        screen.table(self.rows, title=f"{self.run_dir.name}: u at the evaluations")
        if analysed := measurements(self.rows):
            screen.say(verdict(analysed))
        screen.say(f"results in {self.run_dir}")
        return self.rows[-1]

    def _run(self, signals: StopSignals, screen: Screen) -> None:
        config, output = self.config, self.config.output
        iterations = config.algorithm.iterations
        screen.say(self.introduction())
        if self.directory.warning:
            screen.say(self.directory.warning)
        if config.workers not in (None, self.plan.num_workers):
            screen.say(f"workers={config.workers} has no effect: mSGD is one worker")
        if config.stationarity.every is not None and not config.coupled:
            screen.say("stationarity.every has no effect: without a coupling there is no envelope")
        start = self.restore(screen)
        self.sinks = self.open_sinks(start, screen)
        watch = Watch(self.group, len(self.plan.local_workers), output.log_every)
        screen.begin(start)
        self.resumed_at, self.resumed_t = time.perf_counter(), start  # behind samples_per_s
        step = self.steps(watch, screen)
        for t in range(start, iterations):
            step(t)
            done = t + 1
            log = done % output.log_every == 0
            analyse = self.is_due(self.analyse_every, done)
            evaluate = self.is_due(output.eval_every, done) or analyse
            save = self.is_due(output.checkpoint_every, done)
            if not (log or evaluate or save or watch.due(done)):
                continue
            signal = watch.look(done, signals.received, self.problem)
            analyse = analyse and not signal
            if log or evaluate:
                self.log(done)
            if evaluate:
                self.evaluate(done, screen, signals, analyse)
            if save:
                self.save(done)
            if signal and done < iterations:
                self.stop(done, signal, saved=save)
        if not self.rows or self.rows[-1]["iteration"] != iterations:
            # a checkpoint without its row, or one that grew
            self.evaluate(iterations, screen, signals, self.stationarity is not None)
        if self.writer is not None:
            if start == iterations and not self.plan.origin.continues:
                self.save(iterations)  # a new run that begins where it ends has a checkpoint too
            self.writer.wait()
        self.agree()
        with self.writing():
            if self.sinks is not None:
                self.sinks.close()
            self.finish()
        self.agree()

    def is_due(self, every: int | None, done: int) -> bool:
        """Whether what happens so often, and at the end, happens after `done` iterations."""
        return every is not None and (done % every == 0 or done == self.config.algorithm.iterations)

    def steps(self, watch: Watch, screen: Screen) -> Callable[[int], None]:
        """An iteration and the look at what it left, replayed where that can be."""
        algorithm = self.algorithm

        def observe(t: int | Tensor) -> None:
            watch.observe(t, algorithm.u, algorithm.worker.z)

        def step(t: int) -> None:
            algorithm.step(t)
            observe(t)

        if not self.config.cuda_graph or obstacle_to_replay(algorithm, self.group.size):
            return step
        return Replay(algorithm, observe, refused=screen.say).step

    def restore(self, screen: Screen) -> int:
        """Continue from the newest good checkpoint of the plan's source, if there is one.

        Returns:
            The iterations done.

        Raises:
            GroupError: If there are checkpoints and none of them is good, on every rank.
        """
        origin = self.plan.origin
        self.started = time.perf_counter()
        if origin.source is None:
            return 0
        paths = candidates(origin.source) if self.group.rank == 0 else []
        path = choose(paths, self.group, screen.say)
        if path is None:
            # Killed before its first checkpoint, a run begins again. But never over one whose
            # checkpoints are all damaged: that is for a person to decide.
            damaged = self.group.share(bool(paths))
            self.group.raise_together(
                f"no checkpoint in {origin.source} can be read: begin again in a new directory"
                if damaged
                else None
            )
            screen.say(f"no checkpoint in {origin.source} yet: begins again at iteration 0")
            with self.writing():
                if self.group.rank == 0:
                    set_aside(self.run_dir, 0)
            self.agree()
            return 0
        manifest = Manifest.read(path)
        problem = None
        try:
            state = load(path, self.algorithm.state_dict(), self.plan.local_workers)
        except GroupError as error:
            problem = str(error)
        self.group.raise_together(problem)
        self.algorithm.load_state_dict(state)
        found = f"{self.algorithm.verify() & (2**64 - 1):016x}"
        self.group.raise_together(
            None
            if found == manifest.digest
            else f"checkpoint {path}: u has the digest {found} instead of {manifest.digest}"
        )
        t = manifest.iteration
        self.started -= manifest.wall_s
        self.best = manifest.best
        with self.writing():
            if self.group.rank == 0:
                run = path.parent.parent if origin.source == path else origin.source
                self.rows = rows_until(run, t)
                done = t == self.config.algorithm.iterations and self.rows
                if done and self.stationarity is not None and "stationarity" not in self.rows[-1]:
                    self.rows.pop()  # to be evaluated again, with what it lacks
                if origin.continues:
                    set_aside(self.run_dir, t)
                    if t < self.config.algorithm.iterations:
                        (self.run_dir / "summary.json").unlink(missing_ok=True)
        self.agree()
        self.rows = self.group.share(self.rows)
        screen.say(f"continues {path} at iteration {t:,}")
        return t

    def open_sinks(self, start: int, screen: Screen) -> Sinks | None:
        """The sinks, on rank 0, with the evaluations that a continued run keeps."""
        sinks = None
        if self.group.rank == 0:
            info = RunInfo(
                self.run_dir,
                self.plan.risk.layout.layer_names,
                tuple(self.rows),
                continues_after=start if self.plan.origin.continues else None,
                config=asdict(self.config),
            )
            with self.writing():
                sinks = Sinks(info, self.config.output.tensorboard, screen.say, screen)
        self.agree()
        return sinks

    def log(self, done: int) -> None:
        """The cheap numbers, on rank 0."""
        if self.sinks is None:
            return
        worker = self.algorithm.worker
        loss = float(self.plan.oracle.losses.mean())
        values = {MINIBATCH_LOSS: loss, "training/smallest_s_j": float(worker.step)}
        if isinstance(self.algorithm, Consensus):
            values["training/s_u"] = float(self.algorithm.server.step)
        with self.writing():
            self.sinks.scalars(values, done)

    def evaluate(self, done: int, screen: Screen, signals: StopSignals, analyse: bool) -> None:
        """Measure on all ranks, its stationarity too; verify what must agree, write on rank 0."""
        seconds = time.perf_counter() - self.resumed_at
        samples = (done - self.resumed_t) * self.config.algorithm.batch_size
        samples *= self.plan.num_workers
        digest_of_u = self.algorithm.verify()
        row = measure(self.algorithm, self.plan, self.group, done)
        row["wall_s"] = time.perf_counter() - self.started
        row["samples_per_s"] = samples / seconds
        row["digest"] = f"{digest_of_u & (2**64 - 1):016x}"
        if analyse:
            assert self.stationarity is not None
            assert isinstance(self.algorithm, Consensus)
            found = self.stationarity.measure(self.algorithm, done, lambda: signals.received != 0)
            if found is not None:
                row["stationarity"] = found
            else:
                screen.say("stationarity not measured: asked to stop")
        self.rows.append(row)
        if self.best is None or row["test_error"] < self.best["test_error"]:
            self.best = {"iteration": done, "test_error": row["test_error"]}
        with self.writing():
            if self.sinks is not None:
                self.sinks.evaluation(row)
        self.agree()
        # Evaluation is not training: the next samples_per_s starts here.
        self.resumed_at, self.resumed_t = time.perf_counter(), done

    def save(self, done: int) -> None:
        """Begin a checkpoint; the training goes on as soon as its copy is made."""
        assert self.writer is not None
        wall_s = time.perf_counter() - self.started
        facts = Facts(done, int(digest(self.algorithm.u)), wall_s, self.best)
        self.writer.write(self.algorithm.state_dict(), facts)

    def stop(self, done: int, signal: int, saved: bool) -> None:
        """Write a checkpoint and leave, all ranks together.

        Raises:
            RunStopped: Always, or GroupError if the checkpoint could not be written.
        """
        name = Signals(signal).name
        if self.writer is None:
            raise RunStopped(
                f"{name}: stopped at iteration {done} without a checkpoint "
                "(output.checkpoint_every=null)",
                128 + signal,
            )
        if not saved:
            self.save(done)
        self._finish_writing()
        self.agree()
        raise RunStopped(
            f"{name}: stopped at iteration {done} with a checkpoint; to continue: "
            f"resume=auto output.run_dir={self.run_dir}",
            TRY_AGAIN,
        )

    def _finish_writing(self) -> None:
        if self.writer is not None:
            self.writer.wait()

    def _sync_metrics(self) -> None:
        if self.sinks is not None:
            self.sinks.sync()

    def finish(self) -> None:
        """Rank 0 writes the model, the figure and, last of all, the summary."""
        if self.group.rank > 0:
            return
        buffer = io.BytesIO()
        torch.save(self.plan.risk.layout.state_dict(self.algorithm.u), buffer)
        write_whole(self.run_dir / "model.pt", buffer.getvalue())
        draw_convergence({self.run_dir.name: self.rows}, self.run_dir / "convergence.png")
        if analysed := measurements(self.rows):
            draw_stationarity({self.run_dir.name: analysed}, self.run_dir / "stationarity.png")
        summary = self.rows[-1] | {"best": self.best, "environment": environment(self.plan)}
        if self.writer is not None:
            summary["checkpoints"] = {
                "written": self.writer.written,
                "wait_s": self.writer.wait_s,
                "write_s": self.writer.write_s,
            }
        write_whole(self.run_dir / "summary.json", to_json(summary, indent=2).encode() + b"\n")

    def introduction(self) -> str:
        """One line that says what runs, and where."""
        plan, config = self.plan, self.config
        layout = plan.risk.layout
        where = f"{plan.launch.size} process{'es' if plan.launch.size > 1 else ''} on {plan.device}"
        if plan.launch.size > 1:
            where += f" over {plan.backend}"
        return (
            f"{config.algorithm.name} with {config.potential.name}: {plan.num_workers} worker"
            f"{'s' if plan.num_workers > 1 else ''}, {where}, {config.model.name} "
            f"(n = {layout.size:,}, L = {len(layout.layers)}) on {config.data.name}, "
            f"{config.algorithm.iterations:,} iterations -> {self.run_dir}"
        )


def environment(plan: Plan) -> dict[str, str | int]:
    """What the numbers of a run were made with."""
    device = plan.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": str(device.type),
        "device_name": name or platform.machine(),
        "threads": torch.get_num_threads(),
        "processes": plan.launch.size,
        "workers": plan.num_workers,
        "backend": plan.backend if plan.launch.size > 1 else "none",
        "seed": plan.config.seed,
    }


def build_algorithm(plan: Plan, group: Group) -> Algorithm:
    """U and the z_j at their common start, and the algorithm of the config over them."""
    config = plan.config.algorithm
    u = group.broadcast_(plan.start)  # the same everywhere already, unless the ranks' torch differ
    worker = Worker(
        u.repeat(len(plan.local_workers), 1),
        plan.oracle,
        plan.phi,
        kappa=config.momentum,
        nu=config.weight_decay,
        momentum_on=config.momentum_on,
        kernel=worker_kernel(config.coupling, plan.phi, u),
    )
    if config.name == "msgd":
        return Msgd(worker, group, sigma=scheduled(config, "sigma"))
    return Consensus(
        Server(u, plan.phi, group, consensus_kernel(config.u_update, plan.phi, u, group.sum_)),
        worker,
        tau=scheduled(config, "tau"),
        sigma=scheduled(config, "sigma"),
        lam=scheduled(config, "lam"),
        order=config.order,
        u_step_on=config.u_step_on,
        period=config.period,
    )


def scheduled(config: AlgorithmConfig, name: str) -> float | Callable[[int], Scalar]:
    """tau, sigma or lam: its constant, or its constant times its schedule."""
    base: float = getattr(config, name)
    if getattr(config.schedule, name).name == "constant":
        return base
    factor = config.schedule.make(name)
    return lambda t: base * factor(t, config.iterations)
