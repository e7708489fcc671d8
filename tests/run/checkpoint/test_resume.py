"""Continuing a run: the same bits, what is refused, and restarts by torchrun."""

import json
import shutil

import pytest
import torch
from omegaconf import OmegaConf

from consensus.comm import GroupError, Launch, ProcessGroup, Solo
from consensus.run.checkpoint.directory import Origin
from consensus.run.checkpoint.manifest import Manifest
from consensus.run.checkpoint.reader import choose, list_checkpoints, load
from consensus.run.checkpoint.resume import find_origin, set_aside
from consensus.run.checks import ConfigError
from consensus.run.plan import make_plan
from consensus.run.trainer import Trainer
from consensus.server import digest
from tests.testing.checkpoints import at, names, save, whole
from tests.testing.small_runs import PACE, SMALL, rows_of, same_rows


@pytest.fixture
def refusal(make_config):
    """`refusal("resume=auto", ...)`: why the plan is refused."""

    def call(*overrides: str, launch: Launch | None = None) -> str:
        with pytest.raises(ConfigError) as caught:
            make_plan(make_config(*SMALL, *PACE, *overrides), launch or Launch())
        return str(caught.value)

    return call


# ---- continuing


def test_a_grown_run_equals_one_that_was_as_long_from_the_start(train, tmp_path):
    train(f"output.run_dir={tmp_path}/a")
    whole = train(f"output.run_dir={tmp_path}/b", "algorithm.iterations=20")
    grown = train(f"output.run_dir={tmp_path}/a", "algorithm.iterations=20", "resume=auto")
    assert same_rows(tmp_path / "a", tmp_path / "b")
    assert [row["iteration"] for row in rows_of(tmp_path / "a")] == [4, 8, 12, 16, 20]
    assert bool((grown.algorithm.u == whole.algorithm.u).all())
    assert bool((grown.algorithm.worker.v == whole.algorithm.worker.v).all())
    assert OmegaConf.load(tmp_path / "a" / "config.yaml").algorithm.iterations == 20


@pytest.mark.parametrize("delay", [1, 2, 3])
def test_a_run_with_a_delay_continues_to_the_same_bits(train, tmp_path, delay):
    options = ["algorithm.period=5", f"algorithm.delay={delay}", "potential=tan"]
    for run_dir, first in ((tmp_path / "a", 12), (tmp_path / "b", 20)):
        train(f"output.run_dir={run_dir}", *options, f"algorithm.iterations={first}")
    train(f"output.run_dir={tmp_path}/a", *options, "algorithm.iterations=20", "resume=auto")
    assert rows_of(tmp_path / "a")[-1]["digest"] == rows_of(tmp_path / "b")[-1]["digest"]


def test_time_continues(train, tmp_path):
    train(f"output.run_dir={tmp_path}/a")
    before = rows_of(tmp_path / "a")[-1]["wall_s"]
    train(f"output.run_dir={tmp_path}/a", "algorithm.iterations=20", "resume=auto")
    times = [row["wall_s"] for row in rows_of(tmp_path / "a")]
    assert times == sorted(times)
    assert times[3] > before


def test_a_finished_run_is_finished_again_without_a_step(train, tmp_path, monkeypatch):
    run_dir = tmp_path / "a"
    train(f"output.run_dir={run_dir}")
    kept = (run_dir / "metrics.jsonl").read_bytes(), (run_dir / "model.pt").read_bytes()
    (run_dir / "summary.json").unlink()  # it was killed while it wrote its last files
    monkeypatch.setattr("consensus.algorithm.Consensus.step", None)
    train(f"output.run_dir={run_dir}", "resume=auto")
    assert ((run_dir / "metrics.jsonl").read_bytes(), (run_dir / "model.pt").read_bytes()) == kept
    assert json.loads((run_dir / "summary.json").read_text())["iteration"] == 12


def test_auto_starts_in_a_new_directory(train, tmp_path):
    train(f"output.run_dir={tmp_path}/new", "resume=auto")
    assert [row["iteration"] for row in rows_of(tmp_path / "new")] == [4, 8, 12]


def test_auto_starts_again_without_a_checkpoint(train, tmp_path):
    train(f"output.run_dir={tmp_path}/whole")
    run_dir = tmp_path / "a"
    (run_dir / "checkpoints" / ".00000006.tmp").mkdir(parents=True)
    (run_dir / "metrics.jsonl").write_text((tmp_path / "whole/metrics.jsonl").read_text()[:-20])
    train(f"output.run_dir={run_dir}", "resume=auto")
    assert same_rows(run_dir, tmp_path / "whole")
    assert {path.name for path in (run_dir / "checkpoints").iterdir()} == {"00000006", "00000012"}


def test_a_run_from_a_path_leaves_the_other_run_unchanged(train, tmp_path):
    source = tmp_path / "a"
    train(f"output.run_dir={source}")
    before = {path: path.stat().st_mtime_ns for path in source.rglob("*")}
    whole = train(f"output.run_dir={tmp_path}/whole", "algorithm.iterations=20")
    for name, where in {"run": source, "checkpoint": source / "checkpoints" / "00000006"}.items():
        new = tmp_path / f"from-{name}"
        fork = train(f"resume={where}", f"output.run_dir={new}", "algorithm.iterations=20")
        assert same_rows(new, tmp_path / "whole")
        assert bool((fork.algorithm.u == whole.algorithm.u).all())
    assert {path: path.stat().st_mtime_ns for path in source.rglob("*")} == before


def test_best_covers_the_whole_run(train, tmp_path):
    train(f"output.run_dir={tmp_path}/a")
    grown = train(f"output.run_dir={tmp_path}/a", "algorithm.iterations=20", "resume=auto")
    rows = rows_of(tmp_path / "a")
    lowest = min(row["test_error"] for row in rows)
    first = next(row["iteration"] for row in rows if row["test_error"] == lowest)
    summary = json.loads((tmp_path / "a" / "summary.json").read_text())
    assert summary["best"] == grown.best == {"iteration": first, "test_error": lowest}


# ---- refusals


def test_refused_continuations(train, refusal, tmp_path):
    run_dir = tmp_path / "a"
    train(f"output.run_dir={run_dir}")
    where = f"output.run_dir={run_dir}"
    newest = run_dir / "checkpoints" / "00000012"
    as_it_began = f"as in {newest} (a run is continued as it began)"
    cases = {
        "algorithm.lam=0.2": f"`algorithm.lam` is 0.2; allowed: 0.1, {as_it_began}",
        "potential=log": f"`potential.name` is log; allowed: tan, {as_it_began}",
        "seed=1": f"`seed` is 1; allowed: 0, {as_it_began}",
        "dtype=float64": f"`dtype` is float64; allowed: float32, {as_it_began}",
        "data.partition=sharded": f"`data.partition` is sharded; allowed: full, {as_it_began}",
        "workers=4": (
            f"`workers` is 4; allowed: 2, as in {newest} (on any number of processes dividing it)"
        ),
        "algorithm.iterations=6": (
            f"`algorithm.iterations` is 6; allowed: at least 12, which {newest} has done"
        ),
    }
    for override, line in cases.items():
        assert refusal(where, "resume=auto", override) == line
        assert refusal(f"resume={run_dir}", override) == line
    assert refusal(where) == (
        f"`output.run_dir` is {run_dir}; allowed: an empty or new directory; this one holds a "
        "finished run (summary.json); resume=auto continues it"
    )
    assert refusal(where, f"resume={run_dir}").startswith(f"`output.run_dir` is {run_dir}; ")
    assert refusal(f"resume={tmp_path}/none") == (
        f"`resume` is {tmp_path}/none; allowed: never, auto, or the path of a checkpoint or of a "
        "run that has one"
    )


def test_all_that_differs_is_refused_in_one_line_in_both_directions(train, refusal, tmp_path):
    option = "algorithm.schedule.sigma.options.final"
    cosine = ["algorithm.schedule.sigma.name=cosine", f"+{option}=0.5"]
    train(f"output.run_dir={tmp_path}/a", "algorithm.schedule.sigma.name=cosine")
    train(f"output.run_dir={tmp_path}/b", *cosine)
    ending = "/checkpoints/00000012 (a run is continued as it began)"
    added = refusal("resume=auto", f"output.run_dir={tmp_path}/a", *cosine)
    assert added == f"`{option}` is 0.5; allowed: 0.0, as in {tmp_path}/a{ending}"
    for how in ("resume=auto", f"output.run_dir={tmp_path}/b"), (f"resume={tmp_path}/b",):
        dropped = refusal(*how, cosine[0], "seed=3", "device=auto", "output.eval_every=3")
        assert dropped == (
            f"`seed` is 3; allowed: 0; `{option}` is 0.0; allowed: 0.5, as in {tmp_path}/b{ending}"
        )


def test_runs_of_earlier_versions_may_lack_keys_and_options(train, tmp_path):
    run_dir = tmp_path / "a"
    train(f"output.run_dir={run_dir}", "output.checkpoint_every=null")
    (run_dir / "summary.json").unlink()
    config = OmegaConf.load(run_dir / "config.yaml")
    del config.algorithm.u_step_on, config.potential.options
    config.algorithm.an_old_key = 3
    OmegaConf.save(config, run_dir / "config.yaml")
    train(f"output.run_dir={run_dir}", "resume=auto")
    assert [row["iteration"] for row in rows_of(run_dir)] == [4, 8, 12]


def test_keys_that_may_differ(train, tmp_path):
    train(f"output.run_dir={tmp_path}/a")
    free = ["output.eval_every=2", "output.keep_checkpoints=1", "group.timeout_s=9", "data.root=x"]
    train(f"output.run_dir={tmp_path}/a", "resume=auto", "algorithm.iterations=14", *free)
    assert [row["iteration"] for row in rows_of(tmp_path / "a")] == [4, 8, 12, 14]
    assert [path.name for path in (tmp_path / "a/checkpoints").iterdir()] == ["00000014"]


def test_a_finished_run_without_checkpoints_is_not_begun_again(train, refusal, tmp_path):
    where = f"output.run_dir={tmp_path}/a"
    train(where, "output.checkpoint_every=null")
    assert refusal(where, "resume=auto") == (
        f"`resume` is auto; allowed: never, in a new directory: {tmp_path}/a holds a finished run "
        "without checkpoints"
    )


def test_another_unfinished_run_is_not_replaced(train, refusal, tmp_path):
    where = f"output.run_dir={tmp_path}/a"
    train(where, "output.checkpoint_every=null")
    (tmp_path / "a" / "summary.json").unlink()
    assert refusal(where, "resume=auto", "algorithm.tau=0.1") == (
        f"`algorithm.tau` is 0.1; allowed: 0.005, as in {tmp_path}/a (a run is continued as it "
        "began)"
    )


def test_a_run_whose_checkpoints_are_all_damaged_is_not_changed(train, tmp_path):
    run_dir = tmp_path / "a"
    train(f"output.run_dir={run_dir}")
    for file in run_dir.glob("checkpoints/*/*.distcp"):
        file.write_bytes(file.read_bytes()[:-1])
    before = (run_dir / "metrics.jsonl").read_bytes()
    with pytest.raises(GroupError, match=r"no checkpoint in .*/a can be read: begin again in a"):
        train(f"output.run_dir={run_dir}", "resume=auto")
    assert (run_dir / "metrics.jsonl").read_bytes() == before
    assert (run_dir / "summary.json").exists()


def test_the_checkpoint_before_a_damaged_one_is_used(train, tmp_path, capsys):
    run_dir = tmp_path / "a"
    train(f"output.run_dir={run_dir}")
    train(f"output.run_dir={tmp_path}/whole")
    (file,) = run_dir.glob("checkpoints/00000012/*.distcp")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    train(f"output.run_dir={run_dir}", "resume=auto")
    said = capsys.readouterr().out
    damaged = run_dir / "checkpoints" / "00000012"
    assert f"checkpoint {damaged} is damaged and skipped: {file.name} is not as it was" in said
    assert f"continues {run_dir}/checkpoints/00000006 at iteration 6" in said
    assert same_rows(run_dir, tmp_path / "whole")
    names = {path.name for path in (run_dir / "checkpoints").iterdir()}
    assert names == {"00000006", "00000012", "00000012.damaged"}


@pytest.mark.parametrize("resume", ["never", "auto"])
def test_a_run_that_was_planned_before_another_ended_here_changes_nothing(
    train, make_config, tmp_path, resume
):
    where = f"output.run_dir={tmp_path}/a"
    slow = make_plan(make_config(*SMALL, *PACE, where, f"resume={resume}", "seed=1"), Launch())
    train(where)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").rglob("*.*")}
    with pytest.raises(
        GroupError, match=r"/a holds a run \(summary.json, metrics.jsonl\) that beg"
    ):
        Trainer(slow, Solo())
    del before[tmp_path / "a" / ".lock"]
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())
    train(where, "resume=auto", "algorithm.iterations=16")  # the lock is free


def test_a_damaged_row_does_not_end_a_run_that_continues(train, tmp_path, capsys):
    run_dir = tmp_path / "a"
    train(f"output.run_dir={run_dir}")
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    lines[1] = lines[1].replace("train_loss", "train_lors")
    path.write_text("".join(lines))
    train(f"output.run_dir={run_dir}", "resume=auto", "algorithm.iterations=16")
    assert [row["iteration"] for row in rows_of(run_dir)] == [4, 12, 16]
    assert f"{path}: line 2 is damaged and left out" in capsys.readouterr().out


# ---- torchrun restarts the same launch


def test_a_restart_continues_whatever_resume_says(train, tmp_path):
    train(f"output.run_dir={tmp_path}/a", launch=Launch(name="x"))
    again = Launch(restart=1, name="x")
    train(f"output.run_dir={tmp_path}/a", "algorithm.iterations=16", launch=again)
    assert [row["iteration"] for row in rows_of(tmp_path / "a")] == [4, 8, 12, 16]


def test_a_restart_finds_the_directory_that_rank_0_named(train, tmp_path):
    first = train(launch=Launch(name="x"))
    other = train(launch=Launch(name="y"))
    again = train("algorithm.iterations=16", launch=Launch(restart=2, name="x"))
    assert again.run_dir == first.run_dir != other.run_dir
    assert again.rows[-1]["iteration"] == 16


def test_a_run_of_an_earlier_launch_of_the_same_name_is_not_adopted(train, make_config, tmp_path):
    first = train(launch=Launch(name="x"))
    lock = first.run_dir / ".lock"
    began = lock.stat().st_mtime
    for where in ((), (f"output.run_dir={first.run_dir}", "resume=auto")):
        config = make_config(*SMALL, *PACE, *where)
        for started, adopted in ((began - 5, True), (began + 3600, False)):
            launch = Launch(restart=1, name="x", started=started)
            if where and not adopted:
                config.resume = "never"
                with pytest.raises(ConfigError, match="this one holds a finished run"):
                    find_origin(config, launch, 2)
            else:
                own = Origin(first.run_dir, first.run_dir) if adopted else Origin()
                assert find_origin(config, launch, 2) == own


def test_a_restart_before_the_first_directory_starts_a_run(make_config, tmp_path):
    config = make_config(*SMALL)
    assert find_origin(config, Launch(restart=1, name="x"), 2) == Origin()


# ---- checkpoints that are set aside


def test_incomplete_checkpoints_are_ignored_and_removed(config, tmp_path):
    assert save(Solo(), tmp_path, config, [5, 10, 15])[0] is None
    folder = tmp_path / "checkpoints"
    shutil.copytree(at(tmp_path, 15), folder / ".00000020.tmp")  # killed before the rename
    shutil.copytree(at(tmp_path, 15), folder / ".00000001.gone")  # killed while it was removed
    (folder / "00000015.damaged").mkdir()  # of an earlier time
    (folder / "00000015.damaged" / "old").touch()
    (folder / ".notes").mkdir()
    (folder / "notes").touch()
    said = []
    assert choose(list_checkpoints(tmp_path), Solo(), said.append) == at(tmp_path, 15)
    assert said == []
    set_aside(tmp_path, 10)
    left = [".notes", "00000005", "00000010", "00000015.damaged", "notes"]
    assert names(tmp_path) == left
    assert list_checkpoints(tmp_path) == [at(tmp_path, 10), at(tmp_path, 5)]
    assert whole(folder / "00000015.damaged"), "the newest of that name"
    set_aside(tmp_path, 10)
    assert names(tmp_path) == left
    set_aside(tmp_path, 0)
    assert list_checkpoints(tmp_path) == []
    set_aside(tmp_path / "nowhere", 0)


# ---- what compressed sums keep back


def run_compressed(group, configs, compress="int8"):
    """Train one config after another: the digests of u and of the own z_j, and the residual."""
    launch, found = Launch(group.rank, group.size, group.rank, group.size), []
    for config in configs:
        how = {"shared_memory": False, "compress": compress}
        own = ProcessGroup(group.handle, group.device, 60.0, **how) if group.size > 1 else group
        trainer = Trainer(make_plan(config, launch), own)
        trainer.run()
        algorithm = trainer.algorithm
        digests = [int(digest(z)) for z in (algorithm.u, *algorithm.worker.z)]
        found.append((digests, algorithm.residual, sorted(algorithm.state_dict())))
        if own is not group:
            own.close()
    return found


COMPRESSED = [*SMALL, *PACE, "workers=4", "potential=tan", "algorithm.momentum=0.9"]


@pytest.mark.ranks
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("method", [(), ("algorithm=ddp", "potential=quad")])
def test_a_compressed_run_continues_to_the_same_bits(ranks, make_config, tmp_path, size, method):
    own = [*COMPRESSED, *method]
    whole = make_config(*own, f"output.run_dir={tmp_path}/whole", "algorithm.iterations=20")
    half = make_config(*own, f"output.run_dir={tmp_path}/half", "algorithm.iterations=10")
    again = [f"output.run_dir={tmp_path}/half", "algorithm.iterations=20", "resume=auto"]
    rest = make_config(*own, *again)
    # The origin of a plan is looked for when it is made, so after the half.
    answers = ranks(size, run_compressed, [whole, half, rest])
    for one, part, other in answers:
        assert one[0] == other[0]
        assert one[0] != part[0]
        assert torch.equal(one[1], other[1])
        assert one[1].abs().max() > 0
        assert "worker/residual" in one[2]
    assert len({answer[0][0][0] for answer in answers}) == 1, "u differs between the ranks"


@pytest.mark.ranks
def test_another_layout_keeps_the_total_of_what_sums_kept_back(ranks, make_config, tmp_path):
    def config(*overrides):
        return make_config(*COMPRESSED, f"output.run_dir={tmp_path}/run", *overrides)

    ranks(4, run_compressed, [config("algorithm.iterations=10")])
    (path,) = list_checkpoints(tmp_path / "run")[:1]
    n = Manifest.read(path).tensors["server/u"].shape[0]
    rows = load(path, {"worker/residual": torch.zeros(4, n)}, range(4))["worker/residual"]
    assert (rows.abs().amax(1) > 0).all()
    still = config("algorithm.iterations=10", "resume=auto", "output.eval_every=1")
    answers = ranks(2, run_compressed, [still])
    for rank, ((_, residual, _),) in enumerate(answers):
        assert torch.equal(residual, rows[2 * rank : 2 * rank + 2].sum(0))
    # One process rounds nothing, and a run whose sums were exact has kept nothing back.
    more = config("algorithm.iterations=12", "resume=auto")
    ((_, residual, keys),) = ranks(1, run_compressed, [more])[0]
    assert residual is None
    assert "worker/residual" not in keys
    again = config("algorithm.iterations=12", "resume=auto", "output.eval_every=1")
    for ((_, residual, _),) in ranks(2, run_compressed, [again]):
        assert residual.abs().max() == 0
