"""Diagnosis of made rows, and of runs that do not train."""

import math

import pytest

from consensus.comm import GroupError, Launch
from consensus.run.diagnosis import Diagnosis, divergence
from consensus.run.plan import make_plan
from tests.testing.small_runs import rows_of

GUESSING = 1437 * math.log(10)  # images of digits to train, and their classes


@pytest.fixture
def plan(make_config):
    return make_plan(make_config("model=logistic", "device=cpu", "workers=2"), Launch())


def row(t, *, loss=100.0, coupling=1.0, distance=0.1, cuts_u=0, cuts_z=0, error=5.0, digest=""):
    """An evaluation after t iterations of a run on digits: a healthy one, unless said otherwise."""
    return {
        "iteration": t,
        "epoch": 20 * t / 1437,
        "objective": loss + coupling,
        "train_loss": loss,
        "test_error": error,
        "coupling": coupling,
        "distance": [distance],
        "cuts_u": cuts_u,
        "cuts_z": cuts_z,
        "digest": digest,
    }


def remarks_on(plan, *rows):
    """The remarks after each of the rows."""
    diagnosis = Diagnosis(plan)
    return [diagnosis.remarks(row) for row in rows]


@pytest.mark.parametrize(
    ("objective", "diverged"),
    [(1.0, False), (0.99e6 * GUESSING, False), (4e9, True), (math.inf, True), (math.nan, True)],
)
def test_an_objective_far_beyond_guessing_is_divergence(plan, objective, diverged):
    message = divergence({"iteration": 7, "objective": objective}, plan)
    assert (message is not None) == diverged
    assert message is None or message.startswith("iteration 7: the run has diverged: the objecti")


def test_no_progress_after_an_epoch(plan):
    largest = max((plan.dataset.test.targets == c).sum().item() for c in range(10))
    error = 100 * (1 - largest / 360)
    for t, test_error, said in ((71, 95.0, 0), (72, error - 0.1, 0), (72, error + 1e-9, 1)):
        assert list(map(len, remarks_on(plan, row(t, error=test_error)))) == [said]
    first, second = remarks_on(plan, row(72, error=95.0), row(144, error=95.0))
    assert first[0].startswith("no better than guessing after 1 epochs: test error 95 %, that")
    assert second == [], "once"


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        # Beyond ten times guessing, and more than in all of the first half.
        ([row(20, loss=1e3), row(40, loss=4e4)], "train loss 4e+04, 12.1 times the loss of gu"),
        ([row(20), row(40, coupling=9e4)], "coupling 9e+04, 27.2 times the loss of guessing; a"),
        (
            [row(30), row(60, coupling=9e4, distance=1.1)],
            "coupling 9e+04, 27.2 times the loss of guessing; a smaller",
        ),
        ([row(20, loss=5e4), row(30, loss=6e4), row(40, loss=4e4)], None),
        ([row(20, loss=1e3), row(40, loss=3e4)], None),
        ([row(40, loss=4e4)], None),  # the first evaluation has nothing to compare with
        (
            [row(40, coupling=9e4)],
            "coupling 9e+04, 27.2 times",
        ),  # but the coupling, which began at 0
        ([row(8, coupling=9e4)], None),
        ([row(4, loss=1e3), row(8, loss=4e4)], None),  # the first iterations
        # A distance tenfold that of the first half, after an epoch, where u is worse than guessing.
        ([row(90), row(180, loss=4e3, distance=1.1)], "distance |u - z_j| of layer fc 1.1, be"),
        ([row(90), row(180, loss=3e3, distance=1.1)], None),
        ([row(90), row(180, loss=4e3, distance=0.9)], None),
        ([row(30), row(60, loss=4e3, distance=1.1)], None),
    ],
)
def test_growth(plan, rows, said):
    *before, last = remarks_on(plan, *rows)
    assert not any(before)
    assert len(last) == (said is not None)
    if said:
        start = f"growth without bound at iteration {rows[-1]['iteration']}: {said}"
        assert last[0].startswith(start)


def rises(plan, losses):
    """The evaluations, counted from 1, with a remark about a train loss that has risen."""
    found = remarks_on(plan, *(row(7 * t, loss=loss) for t, loss in enumerate(losses, 1)))
    return [t for t, lines in enumerate(found, 1) if any("may help" in line for line in lines)]


@pytest.mark.parametrize(
    ("losses", "at"),
    [
        ([50.0, 101.0, 102.0, 103.0, 104.0], [4]),  # once
        ([50.0, 100.0, 100.0, 100.0], []),  # not above twice the lowest
        ([50.0, 101.0, 102.0, 99.0, 101.0, 102.0, 103.0], [7]),  # three one after another
        ([50.0, 101.0, 102.0, 40.0, 81.0, 82.0, 83.0], [7]),
        ([50.0, 101.0, math.nan, 102.0, 103.0], []),
        ([math.nan, 50.0, 101.0, 102.0, 103.0], [5]),
        ([0.0, 3.3, 3.3, 3.3], []),  # a thousandth of guessing is 3.309
        ([0.0, 3.4, 3.4, 3.4], [4]),
        ([900.0, 300.0, 90.0, 30.0, 20.0, 30.0, 25.0], []),  # a healthy run
    ],
)
def test_a_train_loss_that_has_risen(plan, losses, at):
    assert rises(plan, losses) == at


def test_a_slow_instability_is_seen(plan):
    """Train losses of two runs with kappa = 0.99 on MNIST (docs/results.md), by epoch."""
    scale = GUESSING / (60_000 * math.log(10))
    quad = [893, 456, 227, 261, 310, 353, 213, 513, 676, 1326]
    cubic = [964, 481, 331, 259, 195, 230, 459, 713, 2835, 3008]
    assert rises(plan, [scale * loss for loss in quad]) == [10]
    assert rises(plan, [scale * loss for loss in cubic]) == [9]
    *_, (said,) = remarks_on(plan, *(row(7 * t, loss=50.0 * t) for t in (1, 3, 4, 5)))
    assert said.startswith("train loss 250 at iteration 35, and 50 at iteration 7: a smaller algor")


def test_a_tenth_of_the_steps_cut(make_config):
    """Of 2 workers that communicate every other iteration."""
    config = make_config("model=logistic", "device=cpu", "workers=2", "algorithm.period=2")
    plan = make_plan(config, Launch())
    # 100 communications are 200 iterations, with 400 steps of the z_j.
    for cuts, share in (((9, 39), None), ((10, 0), "10%"), ((0, 40), "10%"), ((100, 400), "100%")):
        rows = [row(t, cuts_u=t * cuts[0] // 200, cuts_z=t * cuts[1] // 200) for t in (100, 200)]
        first, second = remarks_on(plan, *rows)
        assert first == [], "50 communications"
        assert len(second) == (share is not None)
        if share:
            assert second[0].startswith(f"{share} of the steps of the last 100 communications were")
    # Cuts count since the last look.
    assert remarks_on(plan, row(1000, cuts_u=49), row(1200, cuts_u=58)) == [[], []]
    assert list(map(len, remarks_on(plan, row(1000, cuts_u=49), row(1200, cuts_u=59)))) == [0, 1]


def test_rows_of_a_damaged_or_older_file_are_no_failure(plan):
    bare = {"iteration": 400, "epoch": None, "objective": None, "train_loss": 9e4}
    bare |= {"train_error": None, "test_loss": None, "test_error": None}
    assert remarks_on(plan, bare, {**row(800, loss=8e4), "distance": [None]}) == [[], []]


def test_a_run_that_diverges_is_not_finished(train, tmp_path, capsys):
    """sigma far above 2 / L: the logistic loss grows, and the weights stay finite."""
    huge = ["algorithm.sigma=1e8", "algorithm.tau=1e8", "algorithm.lam=1e9", "potential=quad"]
    with pytest.raises(GroupError, match=r"iteration \d+: the run has diverged: the objective is"):
        train(f"output.run_dir={tmp_path}/a", *huge)
    assert not (tmp_path / "a" / "summary.json").exists()
    *before, last = rows_of(tmp_path / "a")
    assert last["diverged"] is True
    assert not any("diverged" in row for row in before)
    assert "diverged" not in capsys.readouterr().out


def test_a_run_that_cannot_move_mentions_it_once(train, tmp_path, capsys):
    """A domain below the rounding of the weights: every step is cut to nothing.

    The continued run has had the remark, and u moves where the domain is wide enough.
    """
    narrow = ["potential=log", "potential.eta=1e-7", f"output.run_dir={tmp_path}/a", "resume=auto"]
    said = "u has not moved in 16 iterations: 100% of the steps were cut at the boundary"
    for iterations, times in ((20, 1), (28, 0)):
        train(*narrow, f"algorithm.iterations={iterations}")
        assert capsys.readouterr().out.count(said) == times
    assert len({row["digest"] for row in rows_of(tmp_path / "a")}) == 1
    train("potential=log", "algorithm.iterations=20", f"output.run_dir={tmp_path}/b")
    assert "moved" not in capsys.readouterr().out


def test_the_steps_of_a_narrow_domain_are_cut(train, tmp_path, capsys):
    """The coupling of `tan` at a small lam: |u - z_j| comes to the boundary again and again."""
    stiff = ["algorithm.lam=0.0002", "algorithm.iterations=100", "output.eval_every=100"]
    trainer = train(*stiff, f"output.run_dir={tmp_path}/a")
    (found,) = trainer.rows
    share = max(found["cuts_u"] / 100, found["cuts_z"] / 200)
    assert share >= 0.1, "otherwise the test shows nothing"
    out = capsys.readouterr().out
    assert out.count(f"{share:.0%} of the steps of the last 100 communications were cut") == 1


def test_healthy_runs_have_no_remarks(train, tmp_path, capsys):
    long = ["algorithm.iterations=400", "output.eval_every=20", "algorithm.sigma=0.01"]
    for i, own in enumerate((["potential=tan"], ["algorithm=local_sgd", "potential=quad"])):
        trainer = train(*long, *own, f"output.run_dir={tmp_path}/{i}")
        assert trainer.rows[-1]["test_error"] < 30
        out = capsys.readouterr().out
        assert not any(w in out for w in ("guessing", "growth", "moved", "were cut", "may help")), (
            out
        )
