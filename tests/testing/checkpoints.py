"""Checkpoints for tests: a known state, its files taken apart, and how they are damaged or forged.

The state is a function of the number of the worker. The files are read with json and hashlib, not
with the package.
"""

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch

from consensus.comm import GroupError, Solo
from consensus.run.checkpoint.manifest import DamagedError, Manifest
from consensus.run.checkpoint.reader import (
    choose,
    inspect,
    load,
    verify_files,
)
from consensus.run.checkpoint.writer import CheckpointWriter, Facts
from consensus.server import digest

M, N = 4, 6  # workers, coordinates

SIZES = (4, 2, 1)  # processes: 4x1, 2x2 and 1x4


def block(group):
    """The numbers j of the workers of a rank."""
    each = M // group.size
    return range(group.rank * each, (group.rank + 1) * each)


def make_state(workers, t, dtype=torch.float32, n=N):
    """A result of `Algorithm.state_dict` after t iterations: a function of j, of i and of t."""
    j = torch.tensor(list(workers))
    i = torch.arange(n, dtype=torch.float64)
    z = ((1 + j.double() + t).unsqueeze(1) / (3 + i)).to(dtype)  # most are inexact
    v = -z / 7
    # Bits that a comparison of numbers, or a conversion to text, would lose.
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


def no_flush():
    """A `before_publish` without effect."""


def make_facts(t, state):
    return Facts(t, int(digest(state["server/u"])), 0.25 * t, None)


def save(group, run_dir, config, iterations, dtype=torch.float32, n=N, keep=9):
    """Write the checkpoints of these iterations; the problem, their number, all digests of u."""
    workers = block(group)
    writer = CheckpointWriter(run_dir, config, group.side(), (workers, M), keep, no_flush)
    for t in iterations:
        state = make_state(workers, t, dtype, n)
        writer.write(state, make_facts(t, state))
    writer.wait()
    return writer.problem, writer.written, group.gather(digest(state["server/u"])).tolist()


def restore(group, checkpoints, dtype=torch.float32, n=N):
    """The bits of this rank's state in each of the checkpoints, and all digests of u."""
    states, digests = [], []
    for checkpoint in checkpoints:
        said = []
        assert choose([checkpoint], group, said.append) == checkpoint, said
        wanted = {
            key: torch.full_like(x, 7) for key, x in make_state(block(group), 0, dtype, n).items()
        }
        state = load(checkpoint, wanted, block(group))
        assert all((x == 7).all() for x in wanted.values()), "only its shapes are used"
        states.append(bits(state))
        digests.append(group.gather(digest(state["server/u"])).tolist())
    return states, digests


def at(run_dir, t):
    return run_dir / "checkpoints" / f"{t:08d}"


def names(run_dir):
    """All names in checkpoints/, those with a dot included."""
    return sorted(os.listdir(run_dir / "checkpoints"))


def whole(checkpoint):
    """Whether every file is as the manifest lists it, checked without the package."""
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_bytes())
        found = {name: described(checkpoint / name) for name in manifest["files"]}
    except FileNotFoundError:
        return False
    return manifest["sha256"] == signature(manifest) and manifest["files"] == found


def described(path):
    """Bytes and SHA-256 of a file, as a manifest lists them."""
    content = path.read_bytes()
    return [len(content), hashlib.sha256(content).hexdigest()]


def signature(manifest):
    """The documented digest of a manifest over all of itself but the digest."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def written(group_size, answers, count=1):
    """Whether all ranks succeeded and have the same u."""
    assert len(answers) == group_size
    for problem, number, digests in answers:
        assert (problem, number) == (None, count)
        assert digests == [answers[0][2][0]] * group_size
    return True


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


# ---- a forged checkpoint: every hash is right


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
    """Assert that every reader reports damage."""
    for read in (Manifest.read, inspect, lambda path: verify_files(path, Solo())):
        with pytest.raises(DamagedError, match=text):
            read(checkpoint)
    with pytest.raises(GroupError, match=text):
        load(checkpoint, make_state(range(M), 0), range(M))
