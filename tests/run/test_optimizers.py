"""`algorithm.optimizer` and `algorithm.clip_grad_norm` from the command to the checkpoint."""

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from consensus.comm import Launch, Solo
from consensus.run.build import build_algorithm, lam_of
from consensus.run.checks import ConfigError
from consensus.run.compose import config_dir, register_schema, to_config
from consensus.run.continued import continued
from consensus.run.plan import make_plan
from consensus.run.trainer import Trainer
from consensus.sweep.__main__ import can_be_member
from tests.testing.small_runs import rows_of

LR = 0.004
ADAMW = f"algorithm.optimizer={{optimizer: AdamW, lr: {LR}, weight_decay: 0.1, eps: 0.001}}"
RUN = [
    *("model=logistic", "device=cpu", "dtype=float64", "workers=4", "algorithm.batch_size=4"),
    *("potential=tan", "potential.eta=2", "algorithm.period=2", "algorithm.pull=0.3"),
    *("algorithm.outer=1", "algorithm.clip_grad_norm=3.0", "output.eval_every=12"),
    *("output.checkpoint_every=5", "group.shared_memory=false"),
]
STEPS = {"AdamW": ADAMW, "Nesterov momentum": "algorithm.optimizer=null"}


# ---- the step of a run, beside a loop with torch's optimizers


def with_torch(plan, iterations, clip, factor):
    """The copies, each moved by AdamW and half the way to the mean of all."""
    images, labels = plan.dataset.train.inputs.flatten(1), plan.dataset.train.targets
    copies = [plan.start.clone().requires_grad_() for _ in range(plan.num_workers)]
    optimizers = [torch.optim.AdamW([z], lr=LR, weight_decay=0.1, eps=1e-3) for z in copies]
    for t in range(iterations):
        center = torch.stack([z.detach() for z in copies]).mean(0)
        for z, optimizer, source in zip(copies, optimizers, plan.oracle.minibatches, strict=True):
            before, chosen = z.detach().clone(), source.draw()
            logits = images[chosen] @ z[:7840].view(10, 784).T + z[7840:]
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(logits, labels[chosen], reduction="sum").backward()
            torch.nn.utils.clip_grad_norm_([z], clip)
            optimizer.param_groups[0]["lr"] = LR * factor(t)
            optimizer.step()
            with torch.no_grad():
                z += 0.5 * (center - before)
    return torch.stack([z.detach() for z in copies])


@pytest.mark.parametrize("clip", [2.0, 1e6])
def test_a_run_is_its_loop(make_config, clip):
    overrides = ["potential=quad", "algorithm.pull=0.5", "algorithm.period=1", "potential.eta=1"]
    overrides += ["algorithm.schedule.sigma.name=linear", "algorithm.iterations=20", ADAMW]
    config = make_config(*RUN, *overrides, f"algorithm.clip_grad_norm={clip}")
    wanted = with_torch(make_plan(config, Launch()), 20, clip, lambda t: 1.0 - t / 20)
    algorithm = build_algorithm(make_plan(config, Launch()), Solo())
    for t in range(20):
        algorithm.step(t)
    torch.testing.assert_close(algorithm.worker.z, wanted, rtol=0, atol=1e-12)
    moved = (wanted - make_plan(config, Launch()).start).abs().max()
    assert moved > 0.02


def test_the_letters_of_the_paper_have_the_rate_of_the_optimizer(make_config):
    """pull = 2 lr / (lam eta^2)."""
    letters = make_config(ADAMW, "algorithm.lam=0.05", "potential=tan", "potential.eta=0.7")
    rates = make_config(ADAMW, f"algorithm.pull={2 * LR / 0.05 / 0.49!r}", "potential.eta=0.7")
    assert lam_of(letters) == 0.05
    assert lam_of(rates) == pytest.approx(0.05, rel=1e-14)
    assert (letters.algorithm.sigma, letters.algorithm.momentum) == (LR, 0.0)


# ---- checkpoints


def train(group, config):
    """Train to the end: the digest that all ranks share, and the rows of this rank."""
    launch = Launch(group.rank, group.size, group.rank, group.size)
    trainer = Trainer(make_plan(config, launch), group)
    row = trainer.run()
    return row["digest"], {key: x.numpy() for key, x in trainer.algorithm.state_dict().items()}


def whole(answers, key):
    return np.concatenate([state[key] for _, state in answers])


@pytest.mark.ranks
def test_layouts_are_interchangeable(make_config, ranks, tmp_path):
    """4x1, 2x2 and 1x4: one run. Each continues what another has begun, its own to the bits."""
    for name, step in STEPS.items():
        own = [*RUN, step, "algorithm.iterations=12"]
        runs = {}
        for size in (1, 2, 4):
            config = make_config(*own, f"output.run_dir={tmp_path}/{name}{size}")
            runs[size] = ranks(size, train, config)
            assert len({digest for digest, _ in runs[size]}) == 1, "u differs between ranks"
        keys = ["worker/z", "worker/v"]
        keys += ["worker/optimizer/exp_avg_sq"] if name == "AdamW" else []
        for key in keys:
            one = whole(runs[1], key)
            assert np.abs(one).max() > 1e-6
            for size in (2, 4):
                np.testing.assert_allclose(whole(runs[size], key), one, rtol=0, atol=1e-12)
        for first, second in ((1, 4), (4, 2), (2, 2)):
            where = f"output.run_dir={tmp_path}/{name}{first}to{second}"
            ranks(first, train, make_config(*own, where, "algorithm.iterations=5"))
            answers = ranks(second, train, make_config(*own, where, "resume=auto"))
            assert len({digest for digest, _ in answers}) == 1, "u differs between ranks"
            for key in keys:
                found, wanted = whole(answers, key), whole(runs[second], key)
                np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-12)
            if first == second:
                assert answers[0][0] == runs[second][0][0], "the same bits"


@pytest.mark.parametrize(
    "optimizer",
    [
        "{optimizer: SGD, lr: 0.002, momentum: 0.9, nesterov: true}",
        "{optimizer: Adagrad, lr: 0.01}",
        "{optimizer: NAdam, lr: 0.001}",
    ],
)
def test_a_run_continues_to_the_same_bits(make_config, tmp_path, optimizer):
    own = [*RUN, f"algorithm.optimizer={optimizer}", "algorithm.iterations=12"]

    def call(where, *others):
        return train(Solo(), make_config(*own, f"output.run_dir={tmp_path}/{where}", *others))

    _, wanted = call("whole")
    call("a", "algorithm.iterations=5")
    _, found = call("a", "resume=auto")
    assert {key: x.tobytes() for key, x in found.items()} == {
        key: x.tobytes() for key, x in wanted.items()
    }
    assert found["worker/optimizer/started"].tolist() == [1] * 4


def test_a_run_keeps_its_optimizer(make_config, tmp_path):
    where = f"output.run_dir={tmp_path}/a"
    train(Solo(), make_config(*RUN, "algorithm.iterations=4", ADAMW, where))
    written = OmegaConf.load(tmp_path / "a" / "config.yaml").algorithm
    assert written.optimizer == {
        **{"optimizer": "AdamW", "lr": LR, "weight_decay": 0.1, "eps": 0.001}
    }
    assert (written.sigma, written.momentum, written.weight_decay) == (LR, 0.0, 0.0)
    assert rows_of(tmp_path / "a")[-1]["regularizer"] == 0.0
    auto = ["resume=auto", where]
    register_schema()
    with initialize_config_dir(config_dir(), version_base="1.3"):
        again = to_config(continued(compose("train", overrides=auto), auto, 1)).algorithm
    assert OmegaConf.to_container(OmegaConf.structured(again)) == written
    for other in ("{optimizer: AdamW, lr: 0.004}", "null"):
        with pytest.raises(ConfigError, match=r"`algorithm.optimizer` is .*; allowed: {'optimizer"):
            make_plan(make_config(*RUN, *auto, f"algorithm.optimizer={other}"), Launch())


# ---- refusals and where it runs


def test_what_contradicts_an_optimizer_is_refused(refusal):
    for key, value, allowed in [
        ("sigma", "0.1", f"{LR} with algorithm.optimizer, whose lr it is"),
        ("momentum", "0.9", "0 with algorithm.optimizer: an option of AdamW, if it has one"),
        ("weight_decay", "0.1", "0 with algorithm.optimizer: an option of AdamW, if it has one"),
        ("momentum_on", "objective", "loss with algorithm.optimizer"),
    ]:
        line = f"`algorithm.{key}` is {value}; allowed: {allowed}"
        assert refusal(ADAMW, f"algorithm.{key}={value}") == line
    assert refusal(ADAMW, "algorithm=msgd").endswith("; allowed: null for algorithm=msgd")
    assert refusal(ADAMW, "stationarity.every=5") == (
        "`stationarity.lam` is null; allowed: a number > 0 with algorithm.optimizer, or "
        "stationarity.every=null"
    )
    assert refusal("algorithm.clip_grad_norm=0") == (
        "`algorithm.clip_grad_norm` is 0.0; allowed: a finite number > 0, or null for no limit"
    )


def test_optimizers_that_cannot_move_workers_are_refused(refusal):
    for optimizer, cause in {
        "{optimizer: Nope, lr: 1}": "`optimizer` is Nope; allowed: the name of a class in torch",
        "{optimizer: SGD, lr: 1, nesterov: true}": "SGD refuses its options: Nesterov momentum",
        "{optimizer: LBFGS, lr: 1}": "LBFGS cannot step over one flat vector (",
        "{optimizer: SparseAdam, lr: 1}": "SparseAdam cannot step over one flat vector (",
        "{optimizer: Adafactor, lr: 1}": "Adafactor uses the shapes of parameters",
        "{optimizer: Adam, lr: 1, capturable: true}": "Adam cannot step over one flat vector (",
    }.items():
        found = refusal(f"algorithm.optimizer={optimizer}")
        assert found.startswith("`algorithm.optimizer` is {'optimizer': ")
        assert f"}}: {cause}" in found
    for optimizer in ("{optimizer: Adam}", "{lr: 1}", "{optimizer: Adam, lr: fast}", "Adam"):
        allowed = "; allowed: {optimizer: NAME IN torch.optim, lr: A FINITE NUMBER > 0, "
        assert allowed in refusal(f"algorithm.optimizer={optimizer}")


def test_the_plan_shows_the_optimizer(make_config):
    plan = make_plan(make_config(*RUN, ADAMW, "algorithm.iterations=7"), Launch())
    shown = f"7 iterations, AdamW(lr={LR}, weight_decay=0.1, eps=0.001), pull 0.3, outer 1, "
    assert plan.description().endswith(shown + "period 2")


def test_separate_runs_without_a_cuda_graph(make_config):
    assert not can_be_member(make_config(ADAMW))
    assert not can_be_member(make_config("algorithm.clip_grad_norm=1"))
    algorithm = build_algorithm(make_plan(make_config(*RUN, ADAMW), Launch()), Solo())
    assert not algorithm.closed_form
