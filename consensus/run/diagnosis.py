"""Diagnosis of a run from its evaluations: divergence, and remarks about a lack of progress.

All ranks have the same rows, and thus come to the same conclusion.
"""

import math

import torch

from consensus.records import Row
from consensus.run.plan import Plan

ADVICE = "a smaller algorithm.sigma and algorithm.tau, or a larger algorithm.lam, may help"
HOPELESS = 1e6


def divergence(row: Row, plan: Plan) -> str | None:
    """The message about an objective far beyond that of guessing; None below it.

    Guessing gives each class the same probability, at a loss of log(classes) for each image.
    """
    guessing = len(plan.dataset.train_labels) * math.log(plan.dataset.num_classes)
    objective = row["objective"]
    if objective <= HOPELESS * max(1.0, guessing):
        return None
    found = f"the objective is {objective:.3g}, more than 1e6 times that of guessing"
    return f"iteration {row['iteration']}: the run has diverged: {found}; {ADVICE}"


def no_progress(row: Row, plan: Plan) -> str | None:
    """A remark if u is no better than the largest class after an epoch; None otherwise."""
    counts = torch.bincount(plan.dataset.test_labels)
    majority = 100.0 * (1.0 - float(counts.max()) / len(plan.dataset.test_labels))
    if row["epoch"] < 1.0 or row["test_error"] < majority:
        return None
    found = (
        f"test error {row['test_error']:.2f} %, that of the largest class alone {majority:.2f} %"
    )
    return f"no better than guessing after {row['epoch']:.3g} epochs: {found}; {ADVICE}"
