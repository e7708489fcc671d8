"""The training problem of a run: data that differ between processes. Refusals: test_plan.py."""

from dataclasses import replace

import pytest
import torch

from consensus.comm import Launch, Solo
from consensus.problem import Dataset
from consensus.run.plan import make_plan
from consensus.run.problem import difference_of_data
from consensus.run.trainer import Trainer
from consensus.server import digest
from tests.testing.small_runs import PACE, SMALL


def train(group, config, changed):
    """Train with other samples on rank 1: what the run says, and the digest of u."""
    plan = make_plan(config, Launch(group.rank, group.size, group.rank, group.size))
    if group.rank == 1 and changed:
        splits = dict(plan.dataset.splits)
        splits[changed] = splits[changed].map(lambda x: x.flip(0))
        plan = replace(plan, dataset=replace(plan.dataset, **splits))
    trainer, said = Trainer(plan, group), []
    trainer.screen.say = said.append
    trainer.run()
    return [line for line in said if "samples of" in line], int(digest(trainer.algorithm.server.u))


@pytest.mark.ranks
def test_processes_that_have_read_other_samples_say_so(ranks, make_config, tmp_path):
    def run(changed):
        config = make_config(*SMALL, *PACE, f"output.run_dir={tmp_path / str(changed)}")
        (said, u), (_, other) = ranks(2, train, config, changed)
        assert u == other
        return said

    assert run(None) == []
    (line,) = run("test")
    assert line.startswith("rank 1 has other samples of `test` than rank 0, if this is not meant: ")


def test_the_fingerprint_has_numbers_of_samples_and_some_of_their_bits():
    x, y = torch.rand(5000, 3), torch.arange(5000) % 7
    data = Dataset((x, y), (x[:10], y[:10]))
    assert difference_of_data(data, Solo()) is None
    found = data.fingerprint()
    assert found == Dataset((x.clone(), y.clone()), (x[:10], y[:10])).fingerprint()
    assert sorted(found) == ["test", "train"]
    for other, changed in (
        (Dataset((x[:-1], y[:-1]), (x[:10], y[:10])), {"train"}),
        (Dataset((x, y), (x[:10], y[:10].flip(0))), {"test"}),
        (Dataset((x + 1e-6, y), (x[:10], y[:10])), {"train"}),
    ):
        assert {
            name for name, text in other.fingerprint().items() if text != found[name]
        } == changed
