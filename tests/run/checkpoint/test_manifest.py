"""The manifest: any change of it is noticed, and every value is validated."""

import json
import re
import shutil

import pytest

from consensus.comm import Solo
from consensus.run.checkpoint.manifest import DamagedError, Manifest
from consensus.run.checkpoint.reader import (
    choose,
    inspect,
)
from consensus.run.checks import ConfigError
from tests.testing.checkpoints import (
    at,
    damaged,
    described,
    save,
    sign,
    tamper,
)


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


def test_a_flipped_bit_is_not_mistaken_for_a_later_format(config, tmp_path):
    assert save(Solo(), tmp_path, config, [5])[0] is None
    path = at(tmp_path, 5) / "manifest.json"
    content = path.read_bytes()
    assert content.count(b'"format": 1') == 1
    path.write_bytes(content.replace(b'"format": 1', b'"format": 3'))  # 0x31 and 0x33
    with pytest.raises(DamagedError):
        inspect(path.parent)


# ---- places of tensors


@pytest.mark.parametrize(
    "file",
    [
        *("../../x", "../00000005/__0_0.distcp", "/etc/passwd", "sub/__0_0.distcp"),
        *("./__0_0.distcp", "__0_0.distcp/../../x", "__0_0.distcp\n", "__0_0.distcp\0"),
        *("manifest.json", "config.yaml", ".metadata", "__1_0.distcp", "", None, 5, ["x"], {}),
    ],
    ids=repr,
)
def test_tensors_outside_the_checkpoint_are_refused(good, file):
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
def test_a_malformed_place_is_damage(good, place):
    tamper(good, lambda tensors: tensors.update({"worker/1/z": place}))
    damaged(good, "manifest.json lacks something")


def test_a_place_of_other_fields_is_damage(good):
    tamper(good, lambda tensors: tensors["worker/1/z"].update(code="print()"))
    damaged(good, "manifest.json lacks something")


# ---- all other entries


def test_a_later_format_is_reported_before_any_other_file_is_read(good):
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
def test_an_impossible_format_is_damage(good, version):
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
def test_a_file_that_is_no_manifest_is_damaged(good, text):
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
