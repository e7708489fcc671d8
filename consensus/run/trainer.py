"""The training loop around Algorithm 1: evaluations, files, and failures that concern all ranks."""

import io
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import torch
from omegaconf import OmegaConf
from torch import Tensor

from consensus.algorithm import Algorithm, Consensus, Msgd
from consensus.comm import Group, GroupError
from consensus.core.flat import Scalar
from consensus.run.config import AlgorithmConfig, Config
from consensus.run.metrics import MetricsFiles, Row, measure, to_json, write_whole
from consensus.run.plan import Plan
from consensus.run.progress import Screen
from consensus.run.report import draw
from consensus.server import Server
from consensus.worker import Worker


class Trainer:
    """One run. The same on every rank; rank 0 alone writes files and speaks.

    Args:
        plan: What is trained.
        group: The processes, already met.

    Attributes:
        run_dir: Where rank 0 writes.
        rows: The evaluations so far.

    Raises:
        GroupError: If rank 0 cannot make the run directory, on every rank.
    """

    def __init__(self, plan: Plan, group: Group) -> None:
        self.plan = plan
        self.config = plan.config
        self.group = group
        self.algorithm = build_algorithm(plan, group)
        self.watch = FiniteWatch(plan.device)
        self.run_dir = open_run_dir(plan.config, group)
        self.rows: list[Row] = []
        self._problem: str | None = None

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

    def agree(self) -> None:
        """Raise on all ranks if rank 0 could not write. A collective."""
        self.group.raise_together(self._problem)

    def run(self) -> Row:
        """Train to the end; return the last evaluation.

        Raises:
            GroupError: On every rank, if one of them failed.
        """
        plan, output = self.plan, self.config.output
        iterations = self.config.algorithm.iterations
        self.started = time.perf_counter()
        self.resumed_at, self.resumed_t = self.started, 0  # of the clock behind samples_per_s
        files = None
        if self.group.rank == 0:
            with self.writing():
                layers = plan.risk.layout.layer_names
                files = MetricsFiles(self.run_dir, layers, output.tensorboard)
        self.agree()
        with Screen(iterations, enabled=self.group.rank == 0) as screen:
            screen.say(self.introduction())
            if self.config.workers not in (None, plan.num_workers):
                screen.say(f"workers={self.config.workers} has no effect: mSGD is one worker")
            for t in range(iterations):
                self.algorithm.step(t)
                self.watch.observe(t, self.algorithm.worker.z)
                done = t + 1
                evaluate = done % output.eval_every == 0 or done == iterations
                if done % output.log_every == 0 or evaluate:
                    self.look(done, files, screen)
                if evaluate:
                    self.evaluate(done, files, screen)
            with self.writing():
                if files is not None:
                    files.close()
                self.finish()
            self.agree()
        screen.table(self.rows, title=f"{self.run_dir.name}: u at the evaluations")
        screen.say(f"results in {self.run_dir}")
        return self.rows[-1]

    def look(self, done: int, files: MetricsFiles | None, screen: Screen) -> None:
        """Is everything finite? And, on rank 0, the cheap numbers."""
        self.watch.check(self.group, self.plan.local_workers)
        if files is None:
            return
        worker = self.algorithm.worker
        loss = float(self.plan.oracle.losses.mean())
        screen.advance(done, loss)
        values = {"training/minibatch_loss": loss, "training/smallest_s_j": float(worker.step)}
        if isinstance(self.algorithm, Consensus):
            values["training/s_u"] = float(self.algorithm.server.step)
        with self.writing():
            files.scalars(values, done)

    def evaluate(self, done: int, files: MetricsFiles | None, screen: Screen) -> None:
        """Measure on all ranks, verify what must agree, write on rank 0."""
        seconds = time.perf_counter() - self.resumed_at
        samples = (done - self.resumed_t) * self.config.algorithm.batch_size
        samples *= self.plan.num_workers
        digest = self.algorithm.verify()
        row = measure(self.algorithm, self.plan, self.group, done)
        row["wall_s"] = time.perf_counter() - self.started
        row["samples_per_s"] = samples / seconds
        row["digest"] = f"{digest & (2**64 - 1):016x}"
        self.rows.append(row)
        with self.writing():
            if files is not None:
                files.evaluation(row)
            screen.evaluation(row)
        self.agree()
        # Evaluation is not training: the next samples_per_s starts here.
        self.resumed_at, self.resumed_t = time.perf_counter(), done

    def finish(self) -> None:
        """Rank 0 writes the model, the figure and, last of all, the summary."""
        if self.group.rank > 0:
            return
        buffer = io.BytesIO()
        torch.save(self.plan.risk.layout.state_dict(self.algorithm.u), buffer)
        write_whole(self.run_dir / "model.pt", buffer.getvalue())
        draw({self.run_dir.name: self.rows}, self.run_dir / "convergence.png")
        summary = self.rows[-1] | {"environment": self.environment()}
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

    def environment(self) -> dict[str, str | int]:
        """What the numbers were made with."""
        device = self.plan.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
        return {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "device": str(device.type),
            "device_name": name or platform.machine(),
            "threads": torch.get_num_threads(),
            "processes": self.plan.launch.size,
            "workers": self.plan.num_workers,
            "backend": self.plan.backend if self.plan.launch.size > 1 else "none",
            "seed": self.config.seed,
        }


class FiniteWatch:
    """Remembers when a z_j of this process first stopped being finite, without synchronizing.

    u itself is no witness: it is spoilt on all ranks one iteration after one of them.
    """

    def __init__(self, device: torch.device) -> None:
        self._never = torch.iinfo(torch.int64).max
        self._first = torch.full((), self._never, dtype=torch.int64, device=device)

    def observe(self, t: int, z: Tensor) -> None:
        """After iteration t. One pass over z (K, n): a sum is finite only if its terms are.

        Terms so large that their sum overflows count as non-finite too; they have diverged.
        """
        self._first = torch.where(torch.isfinite(z.sum()), self._first, self._first.clamp(max=t))

    def check(self, group: Group, workers: range) -> None:
        """Raise on all ranks if a z_j anywhere became non-finite. A collective.

        Raises:
            GroupError: Naming the first iteration and rank.
        """
        first = group.gather(self._first).tolist()
        t = min(first)
        if t < self._never:
            rank = first.index(t)
            j = [rank * len(workers), (rank + 1) * len(workers) - 1]
            who = f"worker {j[0]}" if j[0] == j[1] else f"one of the workers {j[0]} to {j[1]}"
            raise GroupError(
                f"iteration {t + 1}: {who} on rank {rank} became non-finite, and u with it; "
                "smaller algorithm.sigma and algorithm.tau, or a larger algorithm.lam, may help"
            )


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
    )
    if config.name == "msgd":
        return Msgd(worker, group, sigma=scheduled(config, "sigma"))
    return Consensus(
        Server(u, plan.phi, group),
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


def open_run_dir(config: Config, group: Group) -> Path:
    """Rank 0 makes the run directory and writes the config; everyone learns its path.

    Raises:
        GroupError: If it cannot be made, on every rank.
    """
    run_dir, problem = None, None
    if group.rank == 0:
        try:
            run_dir = _make_run_dir(config)
            OmegaConf.save(OmegaConf.structured(config), run_dir / "config.yaml")
        except OSError as error:
            problem = f"cannot write the run directory: {error.strerror}: {error.filename}"
    group.raise_together(problem)
    path: Path = group.share(run_dir)
    return path


def _make_run_dir(config: Config) -> Path:
    output = config.output
    if output.run_dir is not None:
        path = Path(output.run_dir)
        path.mkdir(parents=True, exist_ok=True)
        return path
    algorithm, potential = config.algorithm.name, config.potential.name
    name = output.name or f"{algorithm}-{potential}-{config.data.name}"
    stamp = f"{datetime.now():%Y%m%d-%H%M%S}-{name}"
    root = Path(output.root)
    root.mkdir(parents=True, exist_ok=True)
    for attempt in range(1, 1000):  # two runs may start within a second
        path = root / (stamp if attempt == 1 else f"{stamp}-{attempt}")
        try:
            path.mkdir()
        except FileExistsError:
            continue
        return path
    raise FileExistsError(17, "no free name for a run directory", str(root / stamp))
