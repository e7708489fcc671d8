"""Diagnosis of a run from its evaluations: divergence, and remarks about a run that does not train.

All ranks have the same rows, and thus come to the same conclusion. Evaluations have brought the
numbers to the host, so a diagnosis needs no synchronization with the device.
"""

import math

from consensus.records import Row, largest, number
from consensus.run.checkpoint.manifest import as_hex
from consensus.run.plan import Plan
from consensus.server import digest

ADVICE = "a smaller algorithm.sigma and algorithm.tau, or a larger algorithm.lam, may help"
HOPELESS = 1e6  # times the loss of guessing: diverged
UNUSUAL = 10.0  # times the loss of guessing, and growing: a remark
RISEN = 2.0  # times the lowest train loss: a remark
EVALUATIONS = 3  # one after another, in which it has risen
SMALL = 1e-3  # of the loss of guessing: a train loss that may vary by any factor
LOOK = 100  # communications between two looks at the cut steps, as in Coupling
MOST_CUTS = 0.1  # of the steps
FEW = 10  # iterations, during which u need not have moved, and anything may grow


def guessing(plan: Plan) -> float:
    """The train loss of the best constant output, as far as the loss says it; 1 at least."""
    guess = plan.risk.loss.guess(plan.dataset).get("loss", 1.0)
    return max(1.0, len(plan.dataset.train) * guess)


def divergence(row: Row, plan: Plan) -> str | None:
    """The message about an objective far beyond the loss of guessing; None below it."""
    objective = row["objective"]
    if objective <= HOPELESS * guessing(plan):
        return None
    found = f"the objective is {objective:.3g}, more than 1e6 times that of guessing"
    return f"iteration {row['iteration']}: the run has diverged: {found}; {ADVICE}"


class Diagnosis:
    """Remarks about a run that does not train, each made once.

    Call `remarks` with every evaluation in order, those before a resume included.
    """

    def __init__(self, plan: Plan) -> None:
        self._period, self._workers = plan.config.algorithm.period, plan.num_workers
        self._guessing, self._layers = guessing(plan), plan.risk.layout.layer_names
        self._metric, self._goal = plan.risk.loss.best
        self._guess = plan.risk.loss.guess(plan.dataset).get(self._metric)
        self._start = as_hex(int(digest(plan.start)))
        self._rows: list[Row] = []
        self._made: set[str] = set()
        self._lowest, self._risen = (math.inf, 0), 0  # train loss and its iteration; see _rise
        self._looked = 0, 0, 0  # iteration, cuts of u and of the z_j at the last look

    def remarks(self, row: Row) -> list[str]:
        """The remarks about an evaluation that none before it gave cause for."""
        checks = {
            "move": self._no_move,
            "cuts": self._cuts,
            "progress": self._no_progress,
            "growth": self._growth,
            "rise": self._rise,
        }
        found = []
        for name, check in checks.items():
            if name not in self._made and (remark := check(row)):
                self._made.add(name)
                found.append(remark)
        self._rows.append(row)
        return found

    def _no_move(self, row: Row) -> str | None:
        """A remark if u is still at its start, to the bit."""
        t = row["iteration"]
        # Line 3 moves u first in the iteration after the first communication, which finds u = z_j.
        if t <= FEW + 2 * self._period or row.get("digest") != self._start:
            return None
        self._made |= {"cuts", "progress"}  # this line explains them
        share = row.get("cuts_z", 0) / (t * self._workers)
        why = "algorithm.sigma or algorithm.tau may be too small"
        if share >= MOST_CUTS:
            why = f"{share:.0%} of the steps were cut at the boundary of the domain; "
            why += "a larger potential.eta may help"
        return f"u has not moved in {t} iterations: {why}"

    def _cuts(self, row: Row) -> str | None:
        """A remark if a tenth of the steps since the last look were cut."""
        before, now = self._looked, (row["iteration"], row.get("cuts_u", 0), row.get("cuts_z", 0))
        communications = -(-now[0] // self._period) - -(-before[0] // self._period)
        if communications < LOOK:
            return None
        self._looked = now
        iterations, of_u, of_z = (b - a for a, b in zip(before, now, strict=True))
        share = max(of_u / communications, of_z / (iterations * self._workers))
        if share < MOST_CUTS:
            return None
        return (
            f"{share:.0%} of the steps of the last {communications} communications were cut at the "
            "boundary of the domain, which slows training; remedies: a larger potential.eta or "
            "algorithm.lam, algorithm.coupling=implicit"
        )

    def _no_progress(self, row: Row) -> str | None:
        """A remark if u is no better than the best constant output after an epoch."""
        value, guess = number(row, f"test_{self._metric}"), self._guess
        if number(row, "epoch") < 1.0 or not guess:
            return None
        if not (value >= guess if self._goal == "min" else value <= guess):
            return None
        unit = " %" if self._metric == "error" else ""
        found = f"test {self._metric} {value:.4g}{unit}, that of the best constant output "
        found += f"{guess:.4g}{unit}"
        remedy = "`python -m consensus.doctor step_size=true` with these overrides proposes a sigma"
        return f"no better than guessing after {row['epoch']:.3g} epochs: {found}; {remedy}"

    def _growth(self, row: Row) -> str | None:
        """A remark if the train loss, the coupling or a distance grows without bound.

        They grow if they exceed all values of the first half of the run. At the start of a healthy
        run distances and the coupling grow as well, but neither the loss nor the coupling comes to
        several times the loss of guessing. Distances have no such measure of their own.
        """
        t, loss = row["iteration"], number(row, "train_loss")
        values = {"train_loss": loss, "coupling": number(row, "coupling")}
        large = [key for key, value in values.items() if value > UNUSUAL * self._guessing]
        after_epoch = number(row, "epoch") >= 1.0 and loss > self._guessing
        if t <= FEW or not (large or after_epoch):
            return None
        first = [old for old in self._rows if 2 * old["iteration"] <= t]
        found = [
            f"{key.replace('_', ' ')} {values[key]:.3g}, {values[key] / self._guessing:.3g} times "
            "the loss of guessing"
            for key in large
            # A run begins at coupling 0, and at some loss.
            if (first or key == "coupling") and all(values[key] > number(old, key) for old in first)
        ]
        distances = row.get("distance") or [math.nan]
        before = max(
            (largest(old.get("distance") or [math.nan]) for old in first), default=math.nan
        )
        far = largest(distances)
        if after_epoch and far > UNUSUAL * before:
            layer = self._layers[distances.index(far)]
            found.append(f"distance |u - z_j| of layer {layer} {far:.3g}, before {before:.3g}")
        if not found:
            return None
        return f"growth without bound at iteration {t}: {'; '.join(found)}; {ADVICE}"

    def _rise(self, row: Row) -> str | None:
        """A remark if the train loss has risen far above its lowest value, and stays there.

        A large step with much momentum may lower the loss for epochs before it becomes unstable.
        """
        t, loss = row["iteration"], number(row, "train_loss")
        lowest, at = self._lowest
        if loss < lowest:
            self._lowest, self._risen = (loss, t), 0
            return None
        high = loss > max(RISEN * lowest, SMALL * self._guessing)
        self._risen = self._risen + 1 if high else 0
        if self._risen < EVALUATIONS:
            return None
        return (
            f"train loss {loss:.4g} at iteration {t}, and {lowest:.4g} at iteration {at}: a "
            "smaller algorithm.sigma or algorithm.momentum, or a decaying step size "
            "(algorithm.schedule.sigma.name=cosine), may help"
        )
