"""Step-size search: short runs of the user's own model and data with several sigma.

The velocity v = kappa v - sigma g is that of torch.optim.SGD without dampening. g is the gradient
of a loss that is summed over the B samples of a minibatch (or averaged, `loss_reduction=mean`), so

    lr = sigma B    (sigma if averaged)        weight_decay = nu / B    (nu if averaged)

All runs begin at the same weights and draw the same minibatches. tau is what the config makes of
sigma, and schedules are constant.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import replace

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from consensus.algorithm import Algorithm
from consensus.comm import GroupError, Launch, Solo
from consensus.doctor.finding import count
from consensus.run.build import build_algorithm
from consensus.run.compose import to_config
from consensus.run.config import Config
from consensus.run.plan import Plan, make_plan, set_determinism

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0)  # torch's lr
BUDGET_S = 30.0  # of all runs together
FEWEST, MOST = 20, 300  # iterations of a run
SAMPLES = 500  # training samples that the losses are of
WORSE = 10.0  # times the loss at the start: diverged
ENOUGH = 0.98  # of the largest decrease


def rate_of(config: Config) -> float:
    """The lr of torch.optim.SGD that sigma stands for."""
    algorithm = config.algorithm
    summed = algorithm.loss_reduction == "sum"
    return algorithm.sigma * algorithm.batch_size if summed else algorithm.sigma


def meaning(config: Config) -> str:
    """A sentence about sigma in the terms of torch."""
    algorithm = config.algorithm
    loss = f"a loss summed over {algorithm.batch_size} samples"
    if algorithm.loss_reduction == "mean":
        loss = "a mean loss"
    return (
        f"sigma = {algorithm.sigma:g} on {loss} is lr = {rate_of(config):g} of torch.optim.SGD, "
        f"with momentum {algorithm.momentum:g}"
    )


def search(cfg: DictConfig) -> int:
    """Try steps, print a table and a proposal. Returns the exit code: 1 if no step trains."""
    cfg = _alone(cfg)
    config = to_config(cfg)
    set_determinism(config)
    plan = make_plan(config, Launch())
    what = f"{config.model.name} on {config.data.name}, {count(plan.num_workers, 'worker')}"
    print(f"consensus.doctor: step sizes for {what}", flush=True)
    unit = rate_of(config) / config.algorithm.sigma
    configs = {rate: _with_sigma(cfg, float(f"{rate / unit:.3g}")) for rate in RATES}
    trial = Trial(plan)
    iterations = trial.affordable(configs)
    print(f"now {meaning(config)}; mean loss of u at the start {trial.start:.4g}")
    print(f"{'sigma':>9}  {'torch lr':>8}  loss after {iterations} iterations")
    losses: dict[float, float] = {}
    for rate, own in configs.items():
        losses[rate] = trial.loss(own, iterations)
        shown = f"{losses[rate]:.4g}" if math.isfinite(losses[rate]) else "diverged"
        print(f"{own.algorithm.sigma:>9.3g}  {rate:>8g}  {shown}", flush=True)
        if not any(math.isfinite(loss) for loss in list(losses.values())[-2:]) and len(losses) > 1:
            break  # and so would larger ones
    chosen = choose(trial.start, losses)
    if chosen is None:
        print("no step lowers the loss: look at the data, the model and algorithm.lam")
        return 1
    why = f"the smallest with {ENOUGH:.0%} of the largest decrease"
    print(f"proposal: algorithm.sigma={configs[chosen].algorithm.sigma:g} ({why})")
    return 0


def choose(start: float, losses: Mapping[float, float]) -> float | None:
    """The smallest key with nearly the largest decrease of the loss; None if there is none.

    A short run favours no larger step that is just as good, which is closer to instability.
    """
    most = start - min(losses.values())
    found = (key for key, loss in sorted(losses.items()) if start - loss >= ENOUGH * most)
    return next(found, None) if most > 0 else None


def _alone(cfg: DictConfig) -> DictConfig:
    """The config of runs without a directory, whose sigma, tau and lam follow no schedule."""
    cfg = cfg.copy()
    own: dict[str, object] = {"resume": "never", "output.run_dir": None}
    for name in ("tau", "sigma", "lam"):
        own |= {f"algorithm.schedule.{name}.name": "constant"}
        own |= {f"algorithm.schedule.{name}.options": {}}
    for key, value in own.items():
        OmegaConf.update(cfg, key, value, merge=False, force_add=True)
    return cfg


def _with_sigma(cfg: DictConfig, sigma: float) -> Config:
    cfg = cfg.copy()
    OmegaConf.update(cfg, "algorithm.sigma", sigma)
    return to_config(cfg)


class Trial:
    """Short runs that begin alike.

    Attributes:
        start: The mean loss of a sample at the start.
    """

    def __init__(self, plan: Plan) -> None:
        state = plan.oracle.state_dict()
        self._plan, self._drawn = plan, {key: value.clone() for key, value in state.items()}
        data = plan.dataset
        count = min(SAMPLES, len(data.train))
        # Evenly spaced: the samples may be sorted by their classes.
        chosen = torch.linspace(0, len(data.train) - 1, count).long().to(plan.device)
        self._samples = data.train.select(chosen)
        self.start = self._mean_loss(plan.start.unsqueeze(0))

    def affordable(self, configs: Mapping[float, Config]) -> int:
        """The iterations of each run for which the time of all suffices."""
        gentlest = next(iter(configs.values()))
        self._run(gentlest, 1)  # the first iteration of a process is slower
        began = time.perf_counter()
        self._run(gentlest, FEWEST // 4)
        each = (time.perf_counter() - began) / (FEWEST // 4)
        return max(FEWEST, min(MOST, int(BUDGET_S / (len(configs) * each))))

    def loss(self, config: Config, iterations: int) -> float:
        """The mean loss of u after some iterations; inf if u or a worker has diverged."""
        try:
            algorithm = self._run(config, iterations)
        except GroupError:  # the exact update of u has not converged
            return math.inf
        loss = self._mean_loss(algorithm.u.unsqueeze(0))
        # u follows the workers slowly where tau is small.
        of_workers = self._mean_loss(algorithm.worker.z)
        limit = WORSE * self.start
        return loss if loss <= limit and of_workers <= limit else math.inf

    def _run(self, config: Config, iterations: int) -> Algorithm:
        plan = replace(self._plan, config=config)
        plan.oracle.load_state_dict(self._drawn)
        algorithm = build_algorithm(plan, Solo(plan.device))
        for t in range(iterations):
            algorithm.step(t)
        float(algorithm.u[0])  # waits for the device
        return algorithm

    def _mean_loss(self, points: Tensor) -> float:
        """Mean over samples and points (K, n)."""
        found = self._plan.risk.evaluate_each(points, self._samples)[:, 0]
        return float(found.mean()) / len(self._samples)
