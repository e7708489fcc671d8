"""Successive halving: the decisions against a ranking by hand, and what is refused."""

import itertools
import json
import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from consensus.report.halving import Place, read_places, rungs_table, write_places
from consensus.run.checks import ConfigError
from consensus.sweep.grid import Job, SweepOptions
from consensus.sweep.halving import Candidate, Halving, Rung, has_diverged
from consensus.sweep.job import Status
from tests.testing.sweeps import call_sweep

ROW = {"epoch": 0.0, "objective": 1.0, "train_loss": 1.0, "test_loss": 1.0}
LAST = Rung(9, 100, None)


def row(iteration, **numbers):
    return {**ROW, "iteration": iteration, **numbers}


def candidates(values, goal="min", groups=None):
    """Candidates of one run per value, and the rows of the runs; None: no row."""
    jobs = [[Job(f"c{i},{j}", ()) for j in range(len(of))] for i, of in enumerate(values)]
    groups = groups or [""] * len(values)
    found = [Candidate(f"c{i}", groups[i], goal, tuple(own)) for i, own in enumerate(jobs)]
    pairs = zip(itertools.chain(*jobs), itertools.chain(*values), strict=True)
    return found, {j: None if v is None else row(5, test_error=v) for j, v in pairs}


def decided(rung, values, goal="min", groups=None, column="test_error"):
    """Name -> decision, in the order of the places."""
    found, rows = candidates(values, goal, groups)
    places = Halving((rung, LAST), tuple(found), column).decide(rung, found, rows)
    return {place.configuration: place.decision for place in places}


numbers = st.one_of(st.none(), st.just(math.nan), st.integers(0, 4).map(float))


@settings(deadline=None)
@given(
    st.lists(st.tuples(numbers, st.sampled_from("ab")), min_size=1, max_size=12),
    st.sampled_from([0.1, 0.25, 0.3, 0.5, 0.7, 0.99, 1, 2, 5, 40]),
    st.sampled_from(["min", "max"]),
)
def test_the_best_of_each_group_go_on(drawn, keep, goal):
    """Against sorted() over the finite numbers of a group, and exact arithmetic for its part."""
    values, groups = zip(*drawn, strict=True)
    found = decided(Rung(1, 5, keep), [[v] for v in values], goal, groups)
    for group in set(groups):
        own = [i for i, other in enumerate(groups) if other == group]
        count = math.ceil(Fraction(str(keep)) * len(own)) if keep < 1 else keep
        known = [i for i in own if values[i] is not None and not math.isnan(values[i])]
        best = sorted(known, key=lambda i: values[i] if goal == "min" else -values[i])
        kept = [name for name, d in found.items() if d == "kept" and groups[int(name[1:])] == group]
        assert kept == [f"c{i}" for i in best[:count]]
        rest = [f"c{i}" for i in best[count:]]
        assert [n for n, d in found.items() if d == "stopped" and int(n[1:]) in own] == rest
    lost = {f"c{i}" for i, v in enumerate(values) if v is None or math.isnan(v)}
    assert {name for name, decision in found.items() if decision == "no number"} == lost


def test_a_share_is_rounded_up_exactly():
    """0.07 * 100 is 7.000000000000001 in floating point."""
    for hundredths, configurations in itertools.product(range(1, 100), range(1, 150)):
        expected = math.ceil(Fraction(hundredths, 100) * configurations)
        assert Rung(1, 5, hundredths / 100).count(configurations) == expected


def test_a_configuration_is_the_mean_of_its_seeds():
    """Means 3, 2.5 and nan: one seed of the last has no number, so that it is the last."""
    values = [[1.0, 5.0], [3.0, 2.0], [0.0, math.nan]]
    found = decided(Rung(1, 5, 1), values)
    assert found == {"c1": "kept", "c0": "stopped", "c2": "no number"}


def test_a_diverged_row_ranks_last_whatever_its_number():
    found, rows = candidates([[0.0], [9.0]])
    rows[found[0].jobs[0]]["diverged"] = True
    rung = Rung(1, 5, 0.5)
    places = Halving((rung, LAST), tuple(found), "test_error").decide(rung, found, rows)
    assert [(p.configuration, p.decision) for p in places] == [("c1", "kept"), ("c0", "no number")]


def test_without_a_metric_the_column_of_the_reports_ranks():
    """The first metric of the validation set where there is one, else of the test set."""
    found, _ = candidates([[1.0], [1.0]])
    rung = Rung(1, 5, 1)
    rows = [row(5, test_mae=1.0, validation_mae=v, validation_loss=9.0) for v in (2.0, 1.0)]
    of_jobs = {c.jobs[0]: r for c, r in zip(found, rows, strict=True)}
    places = Halving((rung, LAST), tuple(found), None).decide(rung, found, of_jobs)
    assert [(p.configuration, p.column) for p in places] == [
        ("c1", "validation_mae"),
        ("c0", "validation_mae"),
    ]


def test_the_sizes_of_the_rungs_and_their_iterations():
    """10 configurations in two groups of 6 and 4: 0.5 keeps 3 and 2, 1 keeps one of each."""
    found, _ = candidates([[1.0]] * 10, groups=["a"] * 6 + ["b"] * 4)
    rungs = (Rung(1, 100, 0.5), Rung(2, 300, 1), Rung(3, 1000, None))
    halving = Halving(rungs, tuple(found), None)
    assert halving.sizes() == [10, 5, 2]
    assert [halving.after(rung) for rung in rungs] == [5 * 200 + 2 * 700, 2 * 700, 0]
    assert halving.lines() == [
        "rung 1: 10 runs to 100 iterations",
        "rung 2: at most 5 runs to 300 iterations",
        "rung 3: at most 2 runs to 1,000 iterations",
        "at most 3,400 iterations, 34 % of the whole grid's",
    ]


# ---- rows of a run


@pytest.mark.parametrize(
    ("iterations", "expected"),
    [
        ([5], 5),
        ([2, 4], None),  # not there yet
        ([2, 4, 8], 4),  # beyond it, without a row there
        ([8, 9], 8),  # beyond it, with none before
        ([2, 5, 8], 5),
        ([], None),
    ],
)
def test_the_row_that_ranks_a_run(tmp_path, iterations, expected):
    lines = [json.dumps(row(i)) for i in iterations]
    torn = '\n{"iteration": 7' if lines else ""  # of a killed run
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + torn)
    rung = Rung(1, 5, 0.5)
    found = rung.row(tmp_path)
    assert (None if found is None else found["iteration"]) == expected
    assert rung.is_over(tmp_path) == (expected is not None)
    assert not Rung(2, 5, None).is_over(tmp_path), "the last rung writes the summary too"


def test_a_diverged_run_is_over(tmp_path):
    """At each rung after its end; before, its row ranks it."""
    text = "\n".join(map(json.dumps, [row(5, test_error=1.0), row(7, diverged=True)]))
    (tmp_path / "metrics.jsonl").write_text(text)
    assert [Rung(1, n, k).is_over(tmp_path) for n, k in ((5, 1), (9, 1), (9, None))] == [True] * 3
    assert Rung(1, 5, 1).row(tmp_path)["iteration"] == 5
    assert Rung(1, 9, 1).row(tmp_path)["diverged"]


def test_the_message_of_a_run_that_was_not_finite_is_known(tmp_path):
    message = "iteration 3: u became non-finite; smaller algorithm.sigma and algorithm.tau, or a "
    message += "larger algorithm.lam, may help"
    for state, text, expected in [
        ("failed", message, True),
        ("failed", "the disk is full", False),
        ("running", "", False),
    ]:
        Status(state, message=text).write(tmp_path)
        assert has_diverged(tmp_path) == expected


# ---- refusals

OWN = ["experiment=smoke", "model=logistic", "workers=2", "device=cpu", "sweep.dir=many"]
GRID = [*OWN, "algorithm.lam=0.1,0.2", "potential=quad,tan", "sweep.halving=[5]"]


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"halving": []}, "`sweep.halving` is []; allowed: null, or increasing numbers of iterati"),
        ({"halving": [5, 5]}, "`sweep.halving` is [5,5]; allowed: null, or increasing numbers of"),
        ({"halving": [0, 5]}, "`sweep.halving` is [0,5]; allowed: null, or increasing numbers of"),
        ({"halving": 0}, "`sweep.halving` is [0]; allowed: null, or increasing numbers of"),
        ({"halving": [0.3]}, "`sweep.halving` is [0.3]; allowed: null, or increasing numbers of"),
        ({"halving": "many"}, "`sweep.halving` is [many]; allowed: null, or increasing numbers"),
        ({"halving": [True]}, "`sweep.halving` is [true]; allowed: null, or increasing numbers"),
        ({"keep": 0}, "`sweep.keep` is 0; allowed: a share of the configurations below 1, or a wh"),
        ({"keep": 1.5}, "`sweep.keep` is 1.5; allowed: a share"),
        ({"keep": math.nan}, "`sweep.keep` is nan; allowed: a share"),
        ({"keep": math.inf}, "`sweep.keep` is inf; allowed: a share"),
        ({"keep": True}, "`sweep.keep` is true; allowed: a share"),
        ({"keep": None}, "`sweep.keep` is null; allowed: a share"),
        ({"keep": "half"}, "`sweep.keep` is half; allowed: a share"),
        ({"keep": [0.5]}, "`sweep.keep` is [0.5]; allowed: one number, or a list of 2, as many as"),
        ({"keep": [0.5, -1]}, "`sweep.keep` is [0.5,-1]; allowed: a share"),
        ({"halving": None, "metric": "x"}, "`sweep.metric` is x; allowed: null without sweep.halv"),
        ({"screening_seeds": 0}, "`sweep.screening_seeds` is 0; allowed: null, or a number >= 1"),
        ({"halving": None, "within": "x"}, "`sweep.within` is x; allowed: null without sweep.halv"),
    ],
)
def test_options_that_suit_no_grid_are_refused(options, line):
    given = dict(dir=None, jobs=1, processes=1, engine="separate", gradients="auto")
    given |= dict(halving=[3, 5], keep=0.5, metric=None, within=None, screening_seeds=None)
    assert SweepOptions(**given).keeps() == [0.5, 0.5]
    assert SweepOptions(**given | {"halving": 5}).halving == [5]
    with pytest.raises(ConfigError) as caught:
        SweepOptions(**given | options)
    assert str(caught.value).startswith(line)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["sweep.halving=[5,20]"],
            "`sweep.halving` is [5,20]; allowed: numbers below 20, the algorithm.iterations of",
        ),
        (
            ["algorithm.iterations=10,20"],
            "`sweep.halving` is [5]; allowed: null here: the runs differ in algorithm.iterations "
            "(10 to 20)",
        ),
        (["sweep.metric=test_eror"], "`sweep.metric` is test_eror; allowed: objective, regulari"),
        (["sweep.within=potental"], "`sweep.within` is potental; allowed: a key that varies ov"),
        (
            ["data=digits,mnist", f"data.root={__file__}"],
            "`sweep.within` is null; allowed: data, so that runs of digits, mnist are not ranked",
        ),
        (["output.checkpoint_every=null"], "`output.checkpoint_every` is null; allowed: a number"),
        (["output.stop_at=3"], "`output.stop_at` is set; allowed: nothing here"),
        (["sweep.halfing=[3]"], "unknown key `sweep.halfing` (did you mean `sweep.halving`?)"),
    ],
)
def test_a_wrong_option_is_refused_before_any_run(tmp_path, monkeypatch, arguments, line):
    monkeypatch.chdir(tmp_path)
    code, out, err = call_sweep(*GRID, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith(f"consensus.sweep: {line}")
    assert err.count("\n") == 1
    near = {"sweep.metric=test_eror": "test_error", "sweep.within=potental": "potential"}
    assert all(f"(did you mean `{near[a]}`?)" in err for a in arguments if a in near)
    assert not (tmp_path / "many").exists()


# ---- halving.csv


def test_the_table_is_read_as_it_was_written(tmp_path):
    places = [
        Place(1, 500, "tan", 1, "potential=tan,lam=0.1", 2, "test_error", 2.25, "kept"),
        Place(1, 500, "tan", 2, "potential=tan,lam=0.2", 2, "test_error", 3.5, "stopped"),
        Place(2, 1500, "tan", 1, "potential=tan,lam=0.1", 2, "", math.nan, "no number"),
    ]
    write_places(places, tmp_path / "report")
    found = read_places(tmp_path / "report")
    assert found[:2] == places[:2]
    assert math.isnan(found[2].mean)
    assert rungs_table(found)[1:] == [
        [
            "1",
            "500",
            "tan",
            "2",
            "4",
            "1",
            "0",
            "test_error",
            "2.25",
            "2.25",
            places[0].configuration,
        ],
        ["2", "1,500", "tan", "1", "2", "0", "1", "", "-", "-", "-"],
    ]
    assert read_places(tmp_path) == []
    (tmp_path / "report" / "halving.csv").write_text("rung\nx\n")
    with pytest.raises(ValueError, match=r"halving.csv is damaged"):
        read_places(tmp_path / "report")
