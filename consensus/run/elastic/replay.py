"""Replay of an elastic run on one process: the same workers in the same iterations, the same u."""

from dataclasses import replace

from consensus.comm import Group
from consensus.problem import Minibatches, MinibatchRisk
from consensus.repeatable import begin_at_consensus
from consensus.run.build import build_algorithm
from consensus.run.elastic.log import Change, changes_to_replay
from consensus.run.plan import Plan
from consensus.run.stationarity import Stationarity
from consensus.run.trainer import Trainer


class ReplayTrainer(Trainer):
    """A run whose workers come and go as the membership log of another says.

    Every worker is a row of this process. u has the bits of that run, whose sums have the order of
    tree_sum.py. An evaluation at the iteration of a change may have other workers than there.
    """

    def __init__(self, plan: Plan, group: Group) -> None:
        super().__init__(plan, group)
        assert plan.config.group.replay is not None
        self._changes = changes_to_replay(plan.config.group.replay)[1:]

    def loop(self, start: int) -> None:
        """As in `Trainer`, with the changes where they are due."""
        assert start == 0, "config.py refuses to continue a replay"
        self.begin(start)
        step = self.step_function()
        for t in range(start, self.iterations):
            while self._changes and self._changes[0].iteration == t:
                self._change(self._changes.pop(0))
                step = self.step_function()
            step(t)
            self.after(t + 1)

    def _change(self, change: Change) -> None:
        """Keep the rows of the workers that stay; let new ones begin at u."""
        before, old = self.algorithm.state_dict(), list(self.plan.numbers)
        self.finish_writing()
        self.plan = plan_with(self.plan, change.workers)
        self.algorithm = build_algorithm(self.plan, self.group)
        state = {key: x.clone() for key, x in self.algorithm.state_dict().items()}
        state |= {key: x.clone() for key, x in before.items() if key.startswith("server/")}
        for k, j in enumerate(change.workers):
            if j in change.new or j not in old:
                begin_at_consensus(state, k, change.iteration)
                continue
            for key, rows in before.items():
                if key.startswith("worker/"):
                    state[key][k] = rows[old.index(j)]
        self.algorithm.load_state_dict(state)
        self.begin(change.iteration)
        self.writer = self.open_writer()
        if self.stationarity is not None:
            self.stationarity = Stationarity(self.plan, self.group)


def plan_with(plan: Plan, members: tuple[int, ...]) -> Plan:
    """The plan of one process with other workers, which all draw from all samples."""
    first = plan.oracle.minibatches[0]
    sources = [Minibatches(first.indices, first.batch_size, first.seed, worker=j) for j in members]
    return replace(
        plan,
        num_workers=len(members),
        members=members,
        oracle=MinibatchRisk(plan.risk, plan.dataset, sources),
        shard_sizes=(plan.shard_sizes[0],) * len(members),
    )
