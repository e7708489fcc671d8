"""Checkpoints: the same bits on any layout, whole or absent, and nothing believed that is read.

What is expected are tensors made here as a function of the worker's number, and the documented
format, taken apart with json, hashlib and pickle.
"""

import errno
import hashlib
import io
import json
import os
import pickle
import re
import resource
import shutil
import threading
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from consensus.comm import GroupError, Solo
from consensus.run.checkpoint import writer as checkpoint_writer
from consensus.run.checkpoint.manifest import DamagedError, Manifest, Place
from consensus.run.checkpoint.reader import (
    by_worker,
    candidates,
    choose,
    inspect,
    list_checkpoints,
    load,
    set_aside,
    verify_files,
)
from consensus.run.checkpoint.writer import CheckpointWriter, Facts
from consensus.run.compose import config_dir, register_schema, to_config
from consensus.run.config import ConfigError
from consensus.server import digest

M, N = 4, 6  # workers, coordinates
SIZES = (4, 2, 1)  # processes: 4x1, 2x2 and 1x4


@pytest.fixture(scope="module")
def config():
    """Any config: composed once, since most tests below write a checkpoint."""
    register_schema()
    with initialize_config_dir(config_dir(), version_base="1.3"):
        return to_config(compose("train", overrides=["output.tensorboard=false"]))


# ---- a state that is known, and how it is written and read


def block(group):
    """The j of the workers of a rank."""
    each = M // group.size
    return range(group.rank * each, (group.rank + 1) * each)


def make_state(workers, t, dtype=torch.float32, n=N):
    """What `Algorithm.state_dict` returns after t iterations: a function of j, of i and of t."""
    j = torch.tensor(list(workers))
    i = torch.arange(n, dtype=torch.float64)
    z = ((1 + j.double() + t).unsqueeze(1) / (3 + i)).to(dtype)  # hardly one of them is exact
    v = -z / 7
    # Bits that a comparison of numbers, or a detour over text, would lose.
    v[:, :4] = torch.tensor([-0.0, torch.inf, torch.nan, torch.finfo(dtype).tiny / 2], dtype=dtype)
    return {
        "worker/z": z,
        "worker/v": v,
        "worker/cuts": 10 * j + t,
        "worker/oracle/position": 1000 * t + 7 * j,
        "server/u": (1 / (5 + i + t)).to(dtype),
        "server/step": torch.tensor(1 / 3, dtype=dtype),
        "server/cuts": torch.tensor(17 + t),
    }


def bits(state):
    """Dtype, shape and bytes of every tensor."""
    return {
        key: (str(x.dtype), tuple(x.shape), x.contiguous().numpy().tobytes())
        for key, x in state.items()
    }


def nothing():
    """Of what must be on disk before a checkpoint appears."""


def make_facts(t, state):
    return Facts(t, int(digest(state["server/u"])), 0.25 * t, None)


def save(group, run_dir, config, iterations, dtype=torch.float32, n=N, keep=9):
    """Write the checkpoints of these iterations; problem, how many, and everyone's digest of u."""
    workers = block(group)
    writer = CheckpointWriter(run_dir, config, group.side(), (workers, M), keep, nothing)
    for t in iterations:
        state = make_state(workers, t, dtype, n)
        writer.write(state, make_facts(t, state))
    writer.wait()
    return writer.problem, writer.written, group.gather(digest(state["server/u"])).tolist()


def restore(group, checkpoints, dtype=torch.float32, n=N):
    """The bits of this rank's state in each of the checkpoints, and everyone's digests of u."""
    states, digests = [], []
    for checkpoint in checkpoints:
        said = []
        assert choose([checkpoint], group, said.append) == checkpoint, said
        wanted = {
            key: torch.full_like(x, 7) for key, x in make_state(block(group), 0, dtype, n).items()
        }
        state = load(checkpoint, wanted, block(group))
        assert all((x == 7).all() for x in wanted.values()), "only the shapes are taken from there"
        states.append(bits(state))
        digests.append(group.gather(digest(state["server/u"])).tolist())
    return states, digests


def at(run_dir, t):
    return run_dir / "checkpoints" / f"{t:08d}"


def names(run_dir):
    """All names in checkpoints/, those with a dot included."""
    return sorted(os.listdir(run_dir / "checkpoints"))


def whole(checkpoint):
    """Whether every file is there as the manifest says, seen without the package."""
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_bytes())
        found = {name: described(checkpoint / name) for name in manifest["files"]}
    except FileNotFoundError:
        return False
    return manifest["sha256"] == signature(manifest) and manifest["files"] == found


def described(path):
    """Bytes and SHA-256 of a file, as a manifest lists it."""
    content = path.read_bytes()
    return [len(content), hashlib.sha256(content).hexdigest()]


def signature(manifest):
    """The documented digest of a manifest over all of itself but the digest."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def stored(checkpoint, place):
    """The tensor at a place: torch.save's bytes from offset on."""
    content = (checkpoint / place["file"]).read_bytes()
    piece = content[place["offset"] : place["offset"] + place["length"]]
    return torch.load(io.BytesIO(piece), weights_only=True)


def written(group_size, answers, count=1):
    """Nothing went wrong on any rank, and all hold the same u."""
    assert len(answers) == group_size
    for problem, number, digests in answers:
        assert (problem, number) == (None, count)
        assert digests == [answers[0][2][0]] * group_size
    return True


@pytest.mark.ranks
@pytest.mark.parametrize("dtype", [torch.float32], ids=str)
def test_every_layout_reads_what_every_layout_wrote(ranks, config, tmp_path, dtype):
    for size in SIZES:
        assert written(size, ranks(size, save, tmp_path / str(size), config, [500], dtype))
    checkpoints = [at(tmp_path / str(size), 500) for size in SIZES]
    for size in SIZES:
        answers = ranks(size, restore, checkpoints, dtype)
        for rank, (states, digests) in enumerate(answers):
            each = M // size
            workers = range(rank * each, (rank + 1) * each)
            assert states == [bits(make_state(workers, 500, dtype))] * len(SIZES)
            assert digests == [[answers[0][1][0][0]] * size] * len(SIZES)


def test_one_worker_without_a_server(config, tmp_path):
    """What `Msgd` has: K = M = 1, and no `server/...`."""
    state = {key: x for key, x in make_state([3], 20).items() if key.startswith("worker/")}
    writer = CheckpointWriter(tmp_path, config, Solo(), (range(1), 1), 1, nothing)
    writer.write(state, Facts(20, 0, 0.0, None))
    writer.wait()
    assert writer.problem is None
    wanted = {key: torch.zeros_like(x) for key, x in state.items()}
    assert bits(load(at(tmp_path, 20), wanted, range(1))) == bits(state)


def test_memory_layouts_do_not_matter(config, tmp_path):
    """A state that is a view, transposed or expanded, is written by its values."""
    state = make_state(range(M), 5)
    laid_out = {
        **state,
        "worker/z": state["worker/z"].T.contiguous().T,
        "worker/v": state["worker/v"][:1].expand(M, N),
        "server/u": torch.stack([state["server/u"], -state["server/u"]], 1)[:, 0],
    }
    expected = bits({**state, "worker/v": state["worker/v"][:1].repeat(M, 1)})
    writer = CheckpointWriter(tmp_path, config, Solo(), (range(M), M), 1, nothing)
    writer.write(laid_out, make_facts(5, state))
    writer.wait()
    assert writer.problem is None
    assert bits(load(at(tmp_path, 5), laid_out, range(M))) == expected


# ---- what lies on the disk


def save_once(group, run_dir, config, facts):
    workers = block(group)
    writer = CheckpointWriter(run_dir, config, group.side(), (workers, M), 1, nothing)
    state = make_state(workers, facts.iteration)
    writer.write(state, facts)
    writer.wait()
    return writer.problem, writer.written, group.gather(digest(state["server/u"])).tolist()


@pytest.mark.ranks
@pytest.mark.parametrize("size", [1, 2, 4])
def test_what_lies_on_the_disk(ranks, config, tmp_path, size):
    best = {"iteration": 400, "test_error": 1.25}
    assert written(size, ranks(size, save_once, tmp_path, config, Facts(500, -2, 12.5, best)))
    assert names(tmp_path) == ["00000500"]
    checkpoint = at(tmp_path, 500)
    listed = {"config.yaml", *(f"__{rank}_0.distcp" for rank in range(size))}
    assert set(os.listdir(checkpoint)) == listed | {"manifest.json"}
    manifest = json.loads((checkpoint / "manifest.json").read_bytes())
    places = manifest["tensors"]
    assert manifest == {
        "format": 1,
        "iteration": 500,
        "num_workers": M,
        "digest": "fffffffffffffffe",  # -2 modulo 2^64
        "wall_s": 12.5,
        "best": best,
        "torch": str(torch.__version__),
        "files": {name: described(checkpoint / name) for name in listed},
        "tensors": places,
        "sha256": signature(manifest),
    }
    expected = by_worker(make_state(range(M), 500), range(M))
    assert bits({key: stored(checkpoint, places[key]) for key in places}) == bits(expected)
    for key, tensor in expected.items():
        assert (places[key]["dtype"], places[key]["shape"]) == (str(tensor.dtype), [*tensor.shape])
    assert OmegaConf.load(checkpoint / "config.yaml") == asdict(config)
    read, before = inspect(checkpoint)
    files = {name: tuple(what) for name, what in manifest["files"].items()}
    assert read == verify_files(checkpoint, Solo()) == Manifest.read(checkpoint)
    tensors = {
        key: Place(**place | {"shape": tuple(place["shape"])}) for key, place in places.items()
    }
    assert read == Manifest(
        500, M, "fffffffffffffffe", 12.5, best, torch.__version__, files, tensors
    )
    assert before == asdict(config)


@pytest.mark.ranks
def test_every_number_is_stored_once(ranks, config, tmp_path):
    """A row is not stored with the rows beside it, and u not by every rank."""
    n = 20_000
    assert written(2, ranks(2, save, tmp_path, config, [1], torch.float64, n))
    stored = sum(path.stat().st_size for path in at(tmp_path, 1).glob("*.distcp"))
    numbers = 8 * (2 * M * n + n)
    assert numbers < stored < 1.05 * numbers


@pytest.mark.ranks
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("keep", [1, 3])
def test_the_oldest_go(ranks, config, tmp_path, size, keep):
    iterations = [7, 99_999_999, 100_000_000, 100_000_007]  # by number, not by name
    answers = ranks(size, save, tmp_path, config, iterations, torch.float32, N, keep)
    assert written(size, answers, count=4)
    assert names(tmp_path) == sorted(f"{t:08d}" for t in iterations[-keep:])
    for t in iterations[-keep:]:
        [state], _ = restore(Solo(), [at(tmp_path, t)])
        assert state == bits(make_state(range(M), t))


def test_a_checkpoint_of_the_same_iteration_is_replaced(config, tmp_path):
    writer = CheckpointWriter(tmp_path, config, Solo(), (range(M), M), 2, nothing)
    for t in (5, 10):
        state = make_state(range(M), t)
        writer.write(state, Facts(5, t, 0.0, None))
    writer.wait()
    assert (writer.problem, writer.written, names(tmp_path)) == (None, 2, ["00000005"])
    assert Manifest.read(at(tmp_path, 5)).digest == "000000000000000a"
    assert restore(Solo(), [at(tmp_path, 5)])[0] == [bits(make_state(range(M), 10))]


# ---- the copy is a copy


def write_while_training(group, run_dir, config):
    """The second thread is held back until the state has changed; what it writes must not have."""
    workers = block(group)
    side, gate = group.side(), threading.Event()
    honest = side.gather
    side.gather = lambda tensor: gate.wait(60.0) and honest(tensor)
    writer = CheckpointWriter(run_dir, config, side, (workers, M), 9, nothing)
    state = make_state(workers, 5)
    writer.write(state, make_facts(5, state))
    seen = [(writer.written, at(run_dir, 5).exists())]
    for key, x in make_state(workers, 10).items():
        state[key].copy_(x)  # in place, `cuts` as well
    total = float(group.sum_(torch.ones(())))  # the training communicates meanwhile
    opening = threading.Timer(0.3, gate.set)
    opening.start()
    writer.write(state, make_facts(10, state))  # one copy exists at a time: waits for the first
    seen.append((writer.written >= 1, at(run_dir, 5).exists()))
    writer.wait()
    opening.join()
    seconds = writer.wait_s, writer.write_s
    digests = group.gather(digest(state["server/u"])).tolist()
    return (writer.problem, writer.written, digests), seen, seconds, total


@pytest.mark.ranks
@pytest.mark.parametrize("size", [1, 2])
def test_the_training_goes_on_while_its_copy_is_written(ranks, config, tmp_path, size):
    answers = ranks(size, write_while_training, tmp_path, config)
    assert written(size, [answer[0] for answer in answers], count=2)
    for _, seen, (wait_s, write_s), total in answers:
        assert seen == [(0, False), (True, True)]
        assert total == size
        assert 0.25 < wait_s < 60.0, "the second write waited for the first"
        assert 0.25 < write_s < 60.0
    states, _ = restore(Solo(), [at(tmp_path, 5), at(tmp_path, 10)])
    assert states == [bits(make_state(range(M), t)) for t in (5, 10)]


# ---- a write that fails


def fail_to_publish(group, run_dir, config):
    """The second of three writes fails on rank 0 just before its checkpoint would appear."""
    seen = []

    def before_publish():
        seen.append(names(run_dir))
        if len(seen) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    workers = block(group)
    writer = CheckpointWriter(run_dir, config, group.side(), (workers, M), 9, before_publish)
    for t in (5, 10, 15):
        state = make_state(workers, t)
        writer.write(state, make_facts(t, state))
        writer.wait()
    return writer.problem, writer.written, seen, group.gather(digest(state["server/u"])).tolist()


@pytest.mark.ranks
@pytest.mark.parametrize("size", [1, 2, 4])
def test_what_must_be_on_disk_first_fails(ranks, config, tmp_path, size):
    answers = ranks(size, fail_to_publish, tmp_path, config)
    why = f"rank 0: cannot write checkpoint {at(tmp_path, 10)}: No space left on device"
    for rank, (problem, number, seen, digests) in enumerate(answers):
        assert (problem, number) == (why, 1)
        assert digests == [answers[0][3][0]] * size
        # Called before the name appears, on rank 0, and no more once a write has failed.
        assert seen == ([] if rank else [[".00000005.tmp"], [".00000010.tmp", "00000005"]])
    assert names(tmp_path) == ["00000005"]
    assert whole(at(tmp_path, 5))


def fail_to_hash(group, run_dir, config, wrong):
    """A rank cannot read back what it wrote."""
    workers = block(group)
    writer = CheckpointWriter(run_dir, config, group.side(), (workers, M), 9, nothing)
    honest = checkpoint_writer.file_digest

    def file_digest(path):
        if group.rank == wrong and path.parent.name == ".00000010.tmp":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return honest(path)

    checkpoint_writer.file_digest = file_digest
    try:
        for t in (5, 10):
            state = make_state(workers, t)
            writer.write(state, make_facts(t, state))
        writer.wait()
    finally:
        checkpoint_writer.file_digest = honest
    return writer.problem, writer.written, group.gather(digest(state["server/u"])).tolist()


@pytest.mark.ranks
@pytest.mark.parametrize(("size", "wrong"), [(1, 0), (2, 0), (2, 1), (4, 3)])
def test_one_ranks_failure_is_everyones(ranks, config, tmp_path, size, wrong):
    answers = ranks(size, fail_to_hash, tmp_path, config, wrong)
    why = f"rank {wrong}: cannot write checkpoint {at(tmp_path, 10)}: Input/output error"
    assert answers == [(why, 1, [answers[0][2][0]] * size)] * size
    assert names(tmp_path) == ["00000005"]
    assert whole(at(tmp_path, 5))


class Steps:
    """Counts the calls that change the disk, looks around before each, and fails at one of them.

    What it sees is what a kill there would leave.
    """

    CALLS = (
        (os, "fsync"),
        (Path, "mkdir"),
        (Path, "write_bytes"),
        (Path, "rename"),
        (Path, "replace"),
    )

    def __init__(self, patch, run_dir, failing):
        self.run_dir, self.failing = run_dir, failing
        self.count = 0
        self.seen = []
        for owner, name in self.CALLS:
            patch.setattr(owner, name, self.wrapped(getattr(owner, name)))
        # Asked to ignore errors, it cannot fail; but a kill may come before it.
        patch.setattr(shutil, "rmtree", self.wrapped(shutil.rmtree, can_fail=False))

    def wrapped(self, honest, can_fail=True):
        def call(*args, **kwargs):
            self.look()
            if can_fail:
                self.count += 1
                if self.count == self.failing:
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
            return honest(*args, **kwargs)

        return call

    def look(self):
        found = names(self.run_dir)
        self.seen.append({name: whole(self.run_dir / "checkpoints" / name) for name in found})


def test_a_name_without_a_dot_is_whole_wherever_a_write_fails_or_is_killed(
    config, tmp_path, monkeypatch
):
    published = 0
    for failing in range(1, 100):
        run_dir = tmp_path / str(failing)
        assert save(Solo(), run_dir, config, [5])[0] is None
        writer = CheckpointWriter(run_dir, config, Solo(), (range(M), M), 1, nothing)
        state = make_state(range(M), 10)
        with monkeypatch.context() as patch:
            steps = Steps(patch, run_dir, failing)
            writer.write(state, make_facts(10, state))
            writer.wait()
        steps.look()
        for moment in steps.seen:
            named = [is_whole for name, is_whole in moment.items() if not name.startswith(".")]
            assert named, "there is always a checkpoint"
            assert all(named)
        assert not [name for name in names(run_dir) if name.startswith(".")]
        if steps.count < failing:
            break  # it went through
        assert re.search("Input/output error", writer.problem)
        assert writer.written == 0
        published += at(run_dir, 10).exists()
    assert (writer.problem, names(run_dir)) == (None, ["00000010"])
    assert steps.count > 8
    assert published == 2, "the sync of its name and the removal of the old one come after"


def fail_to_fit(group, run_dir, config, limited, n):
    """A full disk, as far as a process can have one of its own: its files may not grow."""
    workers = block(group)
    writer = CheckpointWriter(run_dir, config, group.side(), (workers, M), 9, nothing)
    state = make_state(workers, 5)
    writer.write(state, make_facts(5, state))
    writer.wait()
    assert writer.problem is None
    writer = CheckpointWriter(run_dir, config, group.side(), (workers, M), 9, nothing)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if group.rank in limited:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))  # Python ignores the signal
    try:
        state = make_state(workers, 10, n=n)
        writer.write(state, make_facts(10, state))
        writer.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    return writer.problem, writer.written, group.gather(digest(state["server/u"])).tolist()


FULL = [(1, (0,)), (2, (1,)), (2, (0, 1)), (4, (2,))]


@pytest.mark.ranks
@pytest.mark.parametrize(("size", "limited"), FULL)
def test_a_full_disk_leaves_the_older_ones(ranks, config, tmp_path, size, limited):
    answers = ranks(size, fail_to_fit, tmp_path, config, limited, 20_000)
    problem = answers[0][0]
    assert f"cannot write checkpoint {at(tmp_path, 10)}" in problem
    assert f"rank {limited[0]}: " in problem
    assert answers == [(problem, 0, [answers[0][2][0]] * size)] * size
    assert names(tmp_path) == ["00000005"]
    assert restore(Solo(), [at(tmp_path, 5)])[0] == [bits(make_state(range(M), 5))]


@pytest.mark.ranks
@pytest.mark.parametrize(("size", "limited"), FULL)
def test_a_full_disk_is_named(ranks, config, tmp_path, size, limited):
    problem = ranks(size, fail_to_fit, tmp_path, config, limited, 20_000)[0][0]
    assert re.fullmatch(rf"rank {limited[0]}: cannot write checkpoint .*: File too large", problem)


def diverge(group, run_dir, config, wrong):
    """One bit of u on some of the ranks."""
    workers = block(group)
    writer = CheckpointWriter(run_dir, config, group.side(), (workers, M), 9, nothing)
    for t in (5, 10):
        state = make_state(workers, t)
        if t == 10 and group.rank in wrong:
            state["server/u"].view(torch.int32)[3] ^= 1
        writer.write(state, make_facts(t, state))
    writer.wait()
    return writer.problem, writer.written, group.gather(digest(state["server/u"])).tolist()


@pytest.mark.ranks
@pytest.mark.parametrize(("size", "wrong"), [(2, [1]), (4, [2]), (4, [1, 3])])
def test_diverged_replicas_are_not_saved(ranks, config, tmp_path, size, wrong):
    answers = ranks(size, diverge, tmp_path, config, wrong)
    for problem, number, digests in answers:
        assert f"u on rank {wrong} differs" in problem
        assert number == 1
        assert [rank for rank in range(size) if digests[rank] != digests[0]] == wrong
        assert digests == answers[0][2]
    assert names(tmp_path) == ["00000005"]
    assert whole(at(tmp_path, 5))


# ---- damage

FILES = ("manifest.json", "config.yaml", "__0_0.distcp")


def truncate(path):
    os.truncate(path, path.stat().st_size - 1)


def halve(path):
    os.truncate(path, path.stat().st_size // 2)


def empty(path):
    os.truncate(path, 0)


def grow(path):
    path.write_bytes(path.read_bytes() + b"\n")


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = (truncate, halve, empty, flip_a_bit, Path.unlink)


@pytest.mark.parametrize(
    ("name", "damage"),
    # Not manifest.json and grow: whitespace after JSON says nothing.
    [*((name, damage) for name in FILES for damage in DAMAGES), *((f, grow) for f in FILES[1:])],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_damaged_checkpoint_is_named_and_skipped(config, tmp_path, name, damage):
    assert save(Solo(), tmp_path, config, [5, 10])[0] is None
    older, newer = at(tmp_path, 5), at(tmp_path, 10)
    damage(newer / name)
    said = []
    assert choose(list_checkpoints(tmp_path), Solo(), said.append) == older
    assert len(said) == 1
    assert str(newer) in said[0]
    assert name in said[0].replace(str(newer), "")
    if damage in (truncate, halve, empty, grow) and name != "manifest.json":
        assert "bytes instead of" in said[0]
    with pytest.raises(DamagedError, match=re.escape(name)):
        verify_files(newer, Solo())
    if name != "__0_0.distcp":  # only the ranks look at the tensors
        with pytest.raises(DamagedError, match=re.escape(name)):
            inspect(newer)
    else:
        assert inspect(newer)[0].iteration == 10
    damage(older / name)
    said.clear()
    assert choose(list_checkpoints(tmp_path), Solo(), said.append) is None
    assert [str(newer) in said[0], str(older) in said[1]] == [True, True]
    assert len(said) == 2


def choose_each(group, run_dirs):
    """Of each run: the checkpoint chosen, what was said, and everyone's digest of u in it."""
    answers = []
    for run_dir in run_dirs:
        said = []
        paths = list_checkpoints(run_dir) if group.rank == 0 else [Path("not of this rank")]
        path = choose(paths, group, said.append)
        assert path is not None, said
        state = load(path, make_state(block(group), 0), block(group))
        answers.append((path, said, group.gather(digest(state["server/u"])).tolist()))
    return answers


@pytest.mark.ranks
@pytest.mark.parametrize("size", [2, 4])
def test_all_ranks_choose_alike(ranks, config, tmp_path, size):
    cases = [(name, damage) for name in (*FILES, "__1_0.distcp") for damage in DAMAGES]
    pattern = tmp_path / "whole"
    assert written(2, ranks(2, save, pattern, config, [5, 10]), count=2)
    run_dirs = []
    for k, (name, damage) in enumerate(cases):
        run_dirs.append(tmp_path / str(k))
        shutil.copytree(pattern, run_dirs[-1])
        damage(at(run_dirs[-1], 10) / name)
    answers = ranks(size, choose_each, run_dirs)
    assert answers == [answers[0]] * size
    for (name, _), run_dir, (path, said, digests) in zip(cases, run_dirs, answers[0], strict=True):
        assert path == at(run_dir, 5)
        assert len(said) == 1
        newer = re.escape(str(at(run_dir, 10)))
        assert re.search(rf"{newer} is damaged .*rank \d: .*{re.escape(name)}", said[0])
        assert digests == [int(digest(make_state(range(M), 5)["server/u"]))] * size


def test_no_flipped_bit_in_any_byte_of_a_manifest_passes(config, tmp_path):
    assert save(Solo(), tmp_path, config, [5])[0] is None
    path = at(tmp_path, 5) / "manifest.json"
    content = path.read_bytes()
    for k in range(len(content)):
        flipped = bytearray(content)
        flipped[k] ^= 1 << k % 7
        path.write_bytes(flipped)
        with pytest.raises((DamagedError, ConfigError)):
            Manifest.read(path.parent)


def test_a_flipped_bit_is_no_later_format(config, tmp_path):
    assert save(Solo(), tmp_path, config, [5])[0] is None
    path = at(tmp_path, 5) / "manifest.json"
    content = path.read_bytes()
    assert content.count(b'"format": 1') == 1
    path.write_bytes(content.replace(b'"format": 1', b'"format": 3'))  # 0x31 and 0x33
    with pytest.raises(DamagedError):
        inspect(path.parent)


def test_a_checkpoint_that_is_no_directory_is_damaged(config, tmp_path):
    assert save(Solo(), tmp_path, config, [5])[0] is None
    at(tmp_path, 10).write_text("a file")
    at(tmp_path, 15).mkdir()
    said = []
    assert choose(list_checkpoints(tmp_path), Solo(), said.append) == at(tmp_path, 5)
    assert len(said) == 2


# ---- which checkpoints there are


def test_list_checkpoints_knows_numbers_only(tmp_path):
    assert list_checkpoints(tmp_path) == []
    folder = tmp_path / "checkpoints"
    ours = ["00000005", "00000040", "99999999", "100000000"]
    strangers = [".00000050.tmp", ".00000005.gone", "00000060.damaged", "0000070", "latest"]
    strangers += ["-0000080", "00000090 ", "0x0000005", "00000100\n"]
    for name in ours + strangers:
        (folder / name).mkdir(parents=True)
    assert list_checkpoints(tmp_path) == [folder / name for name in reversed(ours)]


def test_candidates(tmp_path):
    for t in (5, 10):
        at(tmp_path, t).mkdir(parents=True)
        (at(tmp_path, t) / "manifest.json").touch()
    assert candidates(tmp_path) == [at(tmp_path, 10), at(tmp_path, 5)]
    assert candidates(at(tmp_path, 5)) == [at(tmp_path, 5)]
    assert candidates(tmp_path / "checkpoints") == []
    assert candidates(tmp_path / "nowhere") == []


def test_what_was_half_written_is_ignored_and_removed(config, tmp_path):
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


def test_what_was_half_written_is_no_obstacle(config, tmp_path):
    assert save(Solo(), tmp_path, config, [5])[0] is None
    shutil.copytree(at(tmp_path, 5), tmp_path / "checkpoints" / ".00000010.tmp")
    (tmp_path / "checkpoints" / ".00000010.tmp" / "__7_0.distcp").touch()
    assert save(Solo(), tmp_path, config, [10])[0] is None
    assert names(tmp_path) == ["00000005", "00000010"]
    assert not (at(tmp_path, 10) / "__7_0.distcp").exists()


def test_by_worker_gives_views():
    state = make_state([2, 3], 5)
    rows = by_worker(state, range(2, 4))
    mine = ("z", "v", "cuts", "oracle/position")
    server = ("server/u", "server/step", "server/cuts")
    assert set(rows) == {f"worker/{j}/{name}" for j in (2, 3) for name in mine} | set(server)
    assert rows["worker/3/z"].shape == (N,)
    assert rows["worker/2/cuts"].shape == ()
    assert all(rows[key] is state[key] for key in server)
    for k, j in enumerate((2, 3)):
        for name in mine:
            rows[f"worker/{j}/{name}"].fill_(100 + j)
            assert (state[f"worker/{name}"][k] == 100 + j).all()


# ---- a state that does not fit


@pytest.fixture
def good(config, tmp_path):
    """A checkpoint, written by one process."""
    assert save(Solo(), tmp_path, config, [5])[0] is None
    return at(tmp_path, 5)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"worker/z": torch.zeros(M, 7)}, "worker/0/z is (6,) {f} instead of (7,) {f}"),
        ({"server/u": torch.zeros(1, N)}, "server/u is (6,) {f} instead of (1, 6) {f}"),
        ({"server/step": torch.zeros(1)}, "server/step is () {f} instead of (1,) {f}"),
        ({"server/u": torch.zeros(N).double()}, "server/u is (6,) {f} instead of (6,) {d}"),
        ({"worker/cuts": torch.zeros(M).int()}, "worker/0/cuts is () {l} instead of () {i}"),
        ({"worker/momentum": torch.zeros(M, N)}, "lacks worker/0/momentum"),
        ({"server/v": torch.zeros(N)}, "lacks server/v"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(good, change, text):
    dtypes = {"f": "torch.float32", "d": "torch.float64", "l": "torch.int64", "i": "torch.int32"}
    with pytest.raises(GroupError) as caught:
        load(good, make_state(range(M), 0) | change, range(M))
    assert f"checkpoint {good}" in str(caught.value)
    assert str(caught.value).endswith(text.format_map(dtypes))


def test_workers_that_it_does_not_hold_are_refused(good):
    with pytest.raises(GroupError, match=re.escape(f"checkpoint {good} lacks worker/4/z")):
        load(good, make_state(range(1, M + 1), 0), range(1, M + 1))


# ---- a checkpoint that somebody else made: every hash is right


def sign(checkpoint, manifest):
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    text = json.dumps(content | {"sha256": signature(content)})
    (checkpoint / "manifest.json").write_text(text)


def forge(checkpoint, name, content):
    """Replace a file, and make the manifest agree."""
    (checkpoint / name).write_bytes(content)
    manifest = json.loads((checkpoint / "manifest.json").read_bytes())
    manifest["files"][name] = described(checkpoint / name)
    sign(checkpoint, manifest)


def tamper(checkpoint, change):
    """Change the places of the tensors, and the digest of the manifest."""
    manifest = json.loads((checkpoint / "manifest.json").read_bytes())
    change(manifest["tensors"])
    sign(checkpoint, manifest)


def damaged(checkpoint, text):
    """By everyone who reads it."""
    for read in (Manifest.read, inspect, lambda path: verify_files(path, Solo())):
        with pytest.raises(DamagedError, match=text):
            read(checkpoint)
    with pytest.raises(GroupError, match=text):
        load(checkpoint, make_state(range(M), 0), range(M))


def test_what_is_forged_here_is_convincing(good):
    """A forger who changes nothing is believed: what the tests below see refused is the change."""
    sign(good, json.loads((good / "manifest.json").read_bytes()))
    forge(good, "config.yaml", b"seed: ${oc.env:HOME}\n")
    tamper(good, lambda tensors: None)
    manifest, config = inspect(good)
    assert manifest.iteration == 5
    assert config == {"seed": "${oc.env:HOME}"}, "and nothing is looked up in the environment"
    assert restore(Solo(), [good])[0] == [bits(make_state(range(M), 5))]


class Touch:
    """A pickle of it makes a file when it is read."""

    def __init__(self, how, path):
        self.how, self.path = how, path

    def __reduce__(self):
        path = str(self.path)
        return {
            "os.system": (os.system, (f"touch '{path}'",)),
            "eval": (eval, (f"open({path!r}, 'w').close()",)),
            "exec": (exec, (f"open({path!r}, 'w').close()",)),
            "our own class": (Canary, (path,)),
            "state": (object.__new__, (Canary,), {"path": path}),
        }[self.how]


class Canary:
    def __init__(self, path):
        Path(path).touch()

    def __setstate__(self, state):
        Path(state["path"]).touch()


HOWS = ("os.system", "eval", "exec", "our own class", "state")


@pytest.fixture
def canary(tmp_path):
    """A path where nothing is, and nothing may ever be."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists(), "something was executed"


def armed(content, canary, read=pickle.loads):
    """The content, after seeing that it does harm to those who simply read it."""
    read(content)
    assert canary.exists()
    canary.unlink()
    return content


@pytest.mark.parametrize("how", HOWS)
def test_the_index_of_torch_is_never_read(good, canary, how):
    """It is a pickle. Where it lies nobody opens it, and a manifest that lists it is refused."""
    content = armed(pickle.dumps(Touch(how, canary)), canary)
    (good / ".metadata").write_bytes(content)
    assert inspect(good)[0].iteration == 5
    assert restore(Solo(), [good])[0] == [bits(make_state(range(M), 5))]
    forge(good, ".metadata", content)
    damaged(good, "impossible files")


def test_torch_writes_no_pickled_index(good):
    assert sorted(os.listdir(good)) == ["__0_0.distcp", "config.yaml", "manifest.json"]


@pytest.mark.parametrize(
    "file",
    [
        *("../../x", "../00000005/__0_0.distcp", "/etc/passwd", "sub/__0_0.distcp"),
        *("./__0_0.distcp", "__0_0.distcp/../../x", "__0_0.distcp\n", "__0_0.distcp\0"),
        *("manifest.json", "config.yaml", ".metadata", "__1_0.distcp", "", None, 5, ["x"], {}),
    ],
    ids=repr,
)
def test_tensors_that_lie_elsewhere_are_refused(good, file):
    shutil.copy(good / "__0_0.distcp", good.parent.parent / "x")  # where two of them point
    tamper(good, lambda tensors: tensors["worker/1/z"].update(file=file))
    damaged(good, "impossible tensors|lacks something")


BEYOND = 10**9


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("offset", value) for value in (-1, BEYOND, 0.5, "0", None, [0], True, 10**30)],
        *[("length", value) for value in (-1, BEYOND, 0.5, "9", None, [0], True, 10**30)],
        *[("shape", value) for value in (None, 6, [-6], ["6"], [6.0], [None], [True], {"6": 6})],
        *[("dtype", value) for value in (None, 5, ["torch.float32"])],
    ],
)
def test_impossible_places_are_damage(good, field, value):
    tamper(good, lambda tensors: tensors["worker/1/z"].update({field: value}))
    damaged(good, "impossible tensors|lacks something")


@pytest.mark.parametrize("place", [None, 5, "x", [], {}, {"file": "__0_0.distcp"}], ids=repr)
def test_what_is_no_place_is_damage(good, place):
    tamper(good, lambda tensors: tensors.update({"worker/1/z": place}))
    damaged(good, "manifest.json lacks something")


def test_a_place_of_other_fields_is_damage(good):
    tamper(good, lambda tensors: tensors["worker/1/z"].update(code="print()"))
    damaged(good, "manifest.json lacks something")


@pytest.mark.parametrize(("offset", "length"), [(0, 0), (1, 100), (7, 0), (0, 1)])
def test_a_place_of_something_else_is_refused(good, offset, length):
    tamper(good, lambda tensors: tensors["worker/1/z"].update(offset=offset, length=length))
    with pytest.raises(GroupError, match=re.escape(str(good))):
        load(good, make_state(range(M), 0), range(M))


def test_a_tensor_that_lies_nowhere_is_refused(good):
    tamper(good, dict.clear)
    with pytest.raises(GroupError, match=re.escape(str(good))):
        load(good, make_state(range(M), 0), range(M))


# ---- tensors that are none


def implant(checkpoint, key, content):
    """Put something else where a tensor lies."""
    tensors = (checkpoint / "__0_0.distcp").read_bytes()
    forge(checkpoint, "__0_0.distcp", tensors + content)

    where = {"offset": len(tensors), "length": len(content)}
    tamper(checkpoint, lambda places: places[key].update(where))


def saved(value, path, **options):
    """What torch.save writes."""
    torch.save(value, path, **options)
    return path.read_bytes()


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("kind", ["archive", "old archive", "pickle"])
def test_tensors_are_not_executed(good, canary, tmp_path, how, kind):
    evil = Touch(how, canary)
    if kind == "pickle":
        content = armed(pickle.dumps(evil), canary)
    else:
        content = saved(evil, tmp_path / "evil", _use_new_zipfile_serialization=kind == "archive")
        armed(tmp_path / "evil", canary, read=lambda path: torch.load(path, weights_only=False))
    implant(good, "worker/1/z", content)
    assert choose([good], Solo(), pytest.fail) == good
    assert inspect(good)[0].iteration == 5, "nothing is wrong but the tensor"
    with pytest.raises(GroupError, match=re.escape(str(good))):
        load(good, make_state(range(M), 0), range(M))


def test_what_is_implanted_is_read(good, tmp_path):
    """A tensor that fits is taken: the tests beside this one implant where it matters."""
    implant(good, "worker/1/z", saved(torch.arange(N).float(), tmp_path / "tensor"))
    assert load(good, make_state(range(M), 0), range(M))["worker/z"][1].tolist() == [*range(N)]


@pytest.mark.parametrize(
    "value", [torch.zeros(N - 1), torch.zeros(()), [0.0] * N, "text", None, {"z": torch.zeros(N)}],
    ids=["short", "scalar", "list", "text", "none", "dictionary"],
)  # fmt: skip
def test_something_else_instead_of_a_tensor_is_refused(good, tmp_path, value):
    implant(good, "worker/1/z", saved(value, tmp_path / "value"))
    with pytest.raises(GroupError, match=re.escape(str(good))):
        load(good, make_state(range(M), 0), range(M))


def test_noise_instead_of_a_tensor_is_refused(good):
    implant(good, "worker/1/z", b"PK\x03\x04" + bytes(range(256)))
    with pytest.raises(GroupError, match=re.escape(str(good))):
        load(good, make_state(range(M), 0), range(M))


# ---- manifests


def test_a_later_format_is_named_before_anything_else_is_read(good):
    manifest = json.loads((good / "manifest.json").read_bytes())
    for name in manifest["files"]:
        (good / name).unlink()
    sign(good, {"format": 2, "whatever": [1, 2]})
    for read in (Manifest.read, inspect):
        with pytest.raises(ConfigError) as caught:
            read(good)
        assert str(good) in str(caught.value)
        assert "in format 2; allowed: up to 1" in str(caught.value)
    said = []
    assert choose([good], Solo(), said.append) is None
    assert "format 2" in said[0]


@pytest.mark.parametrize("version", [0, -1, "1", "2", 1.5, None, [2], True], ids=repr)
def test_a_format_that_never_was_is_damage(good, version):
    manifest = json.loads((good / "manifest.json").read_bytes())
    sign(good, manifest | {"format": version})
    with pytest.raises(DamagedError, match=re.escape("manifest.json")):
        Manifest.read(good)


@pytest.mark.parametrize(
    "name",
    [
        *("../../x", "/etc/passwd", "sub/config.yaml", "./config.yaml", "", ".", ".."),
        *("manifest.json", ".metadata", "__\u0663_0.distcp", "__a_0.distcp", "x__0_0.distcp"),
        *("__0_0.distcp\n", "__0_0.distcp/.."),
    ],
)
def test_a_manifest_that_lists_other_files_is_damaged(good, name):
    manifest = json.loads((good / "manifest.json").read_bytes())
    outside = good.parent.parent / "x"
    outside.write_bytes(b"of somebody else")
    manifest["files"][name] = described(outside)
    sign(good, manifest)
    damaged(good, "impossible files")


@pytest.mark.parametrize("name", ["__0_0.distcp", "config.yaml"])
def test_a_manifest_that_lists_too_little_is_damaged(good, name):
    manifest = json.loads((good / "manifest.json").read_bytes())
    del manifest["files"][name]
    sign(good, manifest)
    damaged(good, "impossible (files|tensors)")


def test_a_manifest_of_other_fields_is_damaged(good):
    manifest = json.loads((good / "manifest.json").read_bytes())
    fields = set(manifest) - {"format", "sha256"}
    assert len(fields) == 8
    changed = [{k: v for k, v in manifest.items() if k != field} for field in sorted(fields)]
    changed += [manifest | {"more": 1}]
    changed += [manifest | {"files": files} for files in (None, [], 5, "x", {"config.yaml": 5})]
    changed += [manifest | {"files": {"config.yaml": [1]}}]
    changed += [manifest | {"files": {"config.yaml": ["x", "y"]}}]
    for content in changed:
        sign(good, content)
        with pytest.raises(DamagedError, match=re.escape("manifest.json")):
            Manifest.read(good)


@pytest.mark.parametrize(
    "text", ["", "{", "null", "[]", "3", '"x"', "{}", '{"format": 1}', "\ufeff"]
)
def test_a_manifest_that_is_none_is_damaged(good, text):
    (good / "manifest.json").write_text(text)
    with pytest.raises(DamagedError, match=re.escape("manifest.json")):
        Manifest.read(good)


def test_a_manifest_of_endless_brackets_is_damaged(good):
    (good / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(DamagedError):
        Manifest.read(good)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("files", {"config.yaml": [float("inf"), ""]}),
        ("files", {"config.yaml": [1, "0" * 63]}),
        ("files", {"config.yaml": [-1, "0" * 64]}),
        ("tensors", None),
        ("tensors", []),
        ("wall_s", float("nan")),
        ("wall_s", -1.0),
        ("iteration", "five"),
        ("iteration", None),
        ("iteration", -1),
        ("iteration", 1.5),
        ("num_workers", "4"),
        ("num_workers", 0),
        ("digest", 5),
        ("wall_s", "long"),
        ("wall_s", None),
        ("best", 3),
        ("best", {"iteration": "x"}),
        ("torch", 2),
    ],
)
def test_a_manifest_of_other_types_is_damaged(good, field, value):
    manifest = json.loads((good / "manifest.json").read_bytes())
    sign(good, manifest | {field: value})
    with pytest.raises((DamagedError, ConfigError)):
        Manifest.read(good)


@pytest.mark.parametrize(
    "content",
    [
        b"a: [1",
        b"- 1\n",
        b"\xff\xfe\x00",
        b"a: ${unclosed\n",
        b"!!python/object/apply:os.system ['touch canary']\n",
    ],
)
def test_a_config_that_is_none_is_refused(good, tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    forge(good, "config.yaml", content)
    try:
        with pytest.raises((ConfigError, DamagedError), match=re.escape("config.yaml")):
            inspect(good)
    finally:
        assert not (tmp_path / "canary").exists()


# ---- anything at all


def read_anyhow(checkpoint):
    """Everything that reads; what may be raised is what is documented."""
    for read, allowed in (
        (Manifest.read, (DamagedError, ConfigError)),
        (inspect, (DamagedError, ConfigError)),
        (lambda path: verify_files(path, Solo()), DamagedError),
        (lambda path: load(path, make_state(range(M), 0), range(M)), GroupError),
    ):
        said = "nothing"
        try:
            read(checkpoint)
        except allowed as error:
            said = str(error)
        assert said.strip()
        assert "\n" not in said


@st.composite
def mutations(draw, content):
    """The content with some bytes replaced, removed, inserted, or a piece of it moved."""
    mutated = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at_byte = draw(st.integers(0, len(mutated)))
        length = draw(st.sampled_from([0, 1, 1, 1, 2, 9, 100, len(mutated)]))
        origin = draw(st.integers(0, len(content)))
        piece = draw(st.binary(max_size=4) | st.just(content[origin : origin + length]))
        mutated[at_byte : at_byte + length] = piece
    return bytes(mutated)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=6,
)


def searched(count):
    """Settings of a search that is the same in every run."""
    return settings(max_examples=count, deadline=None, derandomize=True, database=None)


@pytest.fixture(scope="module")
def place(config, tmp_path_factory):
    """A checkpoint to spoil again and again, with what it was."""
    run_dir = tmp_path_factory.mktemp("spoiled")
    assert save(Solo(), run_dir, config, [5])[0] is None
    return at(run_dir, 5), {path.name: path.read_bytes() for path in at(run_dir, 5).iterdir()}


@pytest.fixture
def empty_room(tmp_path, monkeypatch):
    """The working directory, where `touch canary` would show."""
    monkeypatch.chdir(tmp_path)
    yield
    assert os.listdir(tmp_path) == []


def renew(place):
    checkpoint, files = place
    for name, content in files.items():
        (checkpoint / name).write_bytes(content)
    return checkpoint


@pytest.mark.usefixtures("empty_room")
@pytest.mark.parametrize("name", FILES)
def test_any_unsigned_change_is_damage(place, name):
    _, files = place

    @searched(60)
    @given(mutations(files[name]) | st.binary(max_size=99))
    def search(content):
        assume(content != files[name])
        checkpoint = renew(place)
        (checkpoint / name).write_bytes(content)
        read_anyhow(checkpoint)
        if name != "manifest.json":  # whitespace between its words says nothing
            said = []
            assert choose([checkpoint], Solo(), said.append) is None
            assert name in said[0]

    search()


@pytest.mark.usefixtures("empty_room")
def test_any_signed_manifest_is_read_or_refused(place):
    fields = list(json.loads(place[1]["manifest.json"]))

    @searched(200)
    @given(st.dictionaries(st.sampled_from(fields) | st.text(max_size=9), JSON, max_size=3))
    def search(changes):
        checkpoint = renew(place)
        manifest = json.loads((checkpoint / "manifest.json").read_bytes())
        sign(checkpoint, manifest | changes)
        read_anyhow(checkpoint)

    search()


@pytest.mark.usefixtures("empty_room")
def test_any_signed_place_is_read_or_refused(place):
    fields = ["dtype", "shape", "file", "offset", "length"]
    keys = list(json.loads(place[1]["manifest.json"])["tensors"])
    near = st.integers(-2, 9000) | st.lists(st.integers(0, 9)) | st.sampled_from(FILES) | JSON

    @searched(200)
    @given(
        st.sampled_from(keys),
        st.dictionaries(st.sampled_from(fields) | st.text(max_size=9), near, max_size=3),
    )
    def search(key, changes):
        checkpoint = renew(place)
        tamper(checkpoint, lambda tensors: tensors[key].update(changes))
        read_anyhow(checkpoint)

    search()


@pytest.mark.usefixtures("empty_room")
@pytest.mark.parametrize("name", ["config.yaml", "__0_0.distcp"])
def test_any_signed_content_is_read_or_refused(place, name):
    @searched(200)
    @given(mutations(place[1][name]) | st.binary(max_size=99))
    def search(content):
        checkpoint = renew(place)
        forge(checkpoint, name, content)
        read_anyhow(checkpoint)

    search()
