"""`algorithm=ddp` against torch's DistributedDataParallel, on the same minibatches."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from consensus.comm import GroupError, Launch, Solo
from consensus.replay import Replay
from consensus.run.build import build_algorithm
from consensus.run.plan import make_plan
from consensus.run.trainer import Trainer
from consensus.server import digest
from consensus.sweep.__main__ import can_be_member
from tests.testing.tape import taped

LENGTH, LR, KAPPA = 15, 0.01, 0.8
SMALL = [
    *("algorithm=ddp", "model=lenet5", "device=cpu", "dtype=float64", "workers=2"),
    *("algorithm.batch_size=3", f"algorithm.iterations={LENGTH}", "output.eval_every=15"),
    "output.checkpoint_every=7",
]
NESTEROV = f"{{optimizer: SGD, lr: {LR}, momentum: {KAPPA}, nesterov: true, weight_decay: 0.01}}"
PAPER = ["algorithm.weight_decay=0", f"algorithm.sigma={LR}", f"algorithm.momentum={KAPPA}"]
CASES = {  # overrides; torch's optimizer; clipping
    "Nesterov momentum of the paper": (PAPER, "SGD", {"momentum": KAPPA, "nesterov": True}, None),
    "SGD": (
        [f"algorithm.optimizer={NESTEROV}"],
        *("SGD", {"momentum": KAPPA, "nesterov": True, "weight_decay": 0.01}, None),
    ),
    "AdamW, clipped": (
        [
            f"algorithm.optimizer={{optimizer: AdamW, lr: {LR}, eps: 0.001}}",
            *("algorithm.clip_grad_norm=0.5", "algorithm.loss_reduction=mean"),
        ],
        *("AdamW", {"eps": 1e-3}, 0.5),
    ),
}


def launch_of(group):
    return Launch(group.rank, group.size, group.rank, group.size)


def beside_torch(group, configs):
    """The largest difference after any step, the digest of u, how far u moved; by config."""
    found = []
    for config, (_, name, options, clip) in zip(configs, CASES.values(), strict=True):
        algorithm = build_algorithm(make_plan(config, launch_of(group)), group)
        plan = make_plan(config, launch_of(group))  # draws the same minibatches
        ((source,), model) = plan.oracle.minibatches, plan.model.train()
        start, ddp = plan.start.clone(), DistributedDataParallel(model)
        optimizer = getattr(torch.optim, name)(model.parameters(), lr=LR, **options)
        apart = 0.0
        for t in range(LENGTH):
            algorithm.step(t)
            chosen = source.draw()
            images, labels = plan.dataset.train.inputs[chosen], plan.dataset.train.targets[chosen]
            reduction = config.algorithm.loss_reduction
            optimizer.zero_grad()
            cross_entropy(ddp(images), labels, reduction=reduction).backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            worker = algorithm.worker  # torch's Nesterov SGD keeps the look-ahead point
            point = worker.z[0] + worker.kappa * worker.v[0]
            theirs = nn.utils.parameters_to_vector(model.parameters()).detach()
            apart = max(apart, float((point - theirs).abs().max()))
        moved = float((algorithm.u - start).abs().max())
        found.append((apart, algorithm.verify(), moved))
        assert int(digest(algorithm.u)) == found[-1][1]
    return found


@pytest.mark.ranks
def test_it_is_torchs_distributed_data_parallel(make_config, ranks):
    configs = [make_config(*SMALL, *overrides) for overrides, *_ in CASES.values()]
    first, second = ranks(2, beside_torch, configs)
    for name, one, other in zip(CASES, first, second, strict=True):
        assert one[1] == other[1], "u differs between ranks"
        for apart, _, moved in (one, other):
            assert apart < 1e-12, name
            assert moved > 0.01, name


# ---- layouts and checkpoints


def train(group, config):
    """Train to the end: the digest that all ranks share, u, and the last row."""
    trainer = Trainer(make_plan(config, launch_of(group)), group)
    row = trainer.run()
    return row["digest"], trainer.algorithm.u.numpy(), row


@pytest.mark.ranks
def test_layouts_are_interchangeable(make_config, ranks, tmp_path):
    own = [*SMALL, *CASES["AdamW, clipped"][0], "model=logistic", "workers=4"]
    runs = {}
    for size in (1, 2, 4):
        config = make_config(*own, f"output.run_dir={tmp_path}/{size}")
        runs[size] = ranks(size, train, config)
        assert len({digest for digest, *_ in runs[size]}) == 1, "u differs between ranks"
        np.testing.assert_allclose(runs[size][0][1], runs[1][0][1], rtol=0, atol=1e-12)
        row = runs[size][0][2]
        assert (row["coupling"], row["distance"], row["cuts_u"]) == (0.0, [0.0], 0)
        assert row["objective"] == row["train_loss"], "AdamW has no R"
    for first, second in ((1, 4), (4, 2), (2, 2)):
        where = f"output.run_dir={tmp_path}/{first}to{second}"
        ranks(first, train, make_config(*own, where, "algorithm.iterations=7"))
        answers = ranks(second, train, make_config(*own, where, "resume=auto"))
        assert len({digest for digest, *_ in answers}) == 1, "u differs between ranks"
        np.testing.assert_allclose(answers[0][1], runs[second][0][1], rtol=0, atol=1e-12)
        if first == second:
            assert answers[0][0] == runs[second][0][0], "the same bits"


def test_replicas_that_differ_are_found(make_config):
    algorithm = build_algorithm(make_plan(make_config(*SMALL), Launch()), Solo())
    algorithm.verify()
    algorithm.worker.z[1, 5] += 1e-9
    with pytest.raises(GroupError, match=r"the model of workers \[1\] of this process differs"):
        algorithm.verify()


@pytest.mark.usefixtures("operations_of_torch")
@pytest.mark.parametrize("name", ["ddp", "consensus"])
def test_a_replay_is_the_step_of_a_run_with_clipping(make_config, name):
    own = [f"algorithm={name}", "model=logistic", "algorithm.clip_grad_norm=0.5"]
    own += ["algorithm.schedule.sigma.name=cosine", "workers=3"]
    plain, replayed = (
        build_algorithm(make_plan(make_config(*SMALL, *own), Launch()), Solo()) for _ in range(2)
    )
    assert plain.closed_form
    replay = Replay(replayed, record=taped(replayed), refused=pytest.fail)
    for t in range(LENGTH):
        plain.step(t)
        replay.step(t)
    assert torch.equal(replayed.u, plain.u)
    assert torch.equal(replayed.worker.v, plain.worker.v)
    assert plain.worker.v.abs().max() > 1e-4


# ---- what is refused


def test_a_coupling_is_refused(make_config, refusal):
    for key, value, allowed in [
        ("lam", "0.1", "null"),
        ("tau", "0.1", "null"),
        ("pull", "0.5", "null"),
        ("outer", "1.0", "null"),
        ("local_pull", "0.5", "0"),
        ("period", "2", "1"),
    ]:
        line = f"`algorithm.{key}` is {value}; allowed: {allowed} for algorithm=ddp"
        assert refusal("algorithm=ddp", f"algorithm.{key}={value}") == line
    assert refusal("algorithm=ddp", "potential=tan").startswith("`potential` is tan; ")
    assert not can_be_member(make_config("algorithm=ddp"))
    config = make_config("algorithm=ddp", "stationarity.every=1")
    assert not config.coupled
    assert make_plan(config, Launch()).remarks() == [
        "stationarity.every has no effect: without a coupling there is no envelope"
    ]
