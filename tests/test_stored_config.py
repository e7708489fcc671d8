"""Stored configurations against OmegaConf, which reads them with its own parser."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from consensus import stored_config
from consensus.run.config import Config

SCALARS = """
a: 1e-4
b: 1_000
c: 2026-11-30
d: '1e-4'
e: yes
f: null
g: [1, 2.5, .inf, -.inf, on, "x: y"]
h: {i: {}, j: [], 3: four}
k: 12:30
l: 0o17
m: |
  two
  lines
n: "\\u65e5"
o: ${a}
"""


def by_omegaconf(text):
    return OmegaConf.to_container(OmegaConf.create(text), resolve=False)


@pytest.mark.parametrize("text", SCALARS.strip().split("\n"), ids=lambda text: text[:8])
def test_it_reads_what_omegaconf_reads(text):
    if text.startswith(("m", "  ")):
        text = "m: |\n  two\n  lines"
    expected = {str(key): value for key, value in by_omegaconf(text).items()}
    assert stored_config.parse_config(text) == expected
    kinds = [type(value) for value in stored_config.parse_config(text).values()]
    assert kinds == [type(value) for value in expected.values()]


def test_a_number_that_is_none_is_read_as_such():
    assert math.isnan(stored_config.parse_config("a: .nan")["a"])


@pytest.mark.parametrize(
    "text",
    [
        *("", "text", "- a", "3", "a: b: c", "a: [1", "{", "a: 1\na: 2", "a: {b: 1, b: 2}"),
        *("a: &x [*x]", "a: !!python/name:os.system", "a: !!binary aGk="),
        *("a: !!timestamp 2026-11-30", "\t", "a: \x00", "a: !unknown b", "? [1, 2]\n: 3"),
        *("a: *none", "a: ${b", "a: 1\n---\nb: 2"),
    ],
)  # fmt: skip
def test_another_content_is_one_line(text):
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z"):
        stored_config.parse_config(text)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text(max_size=80))
def test_any_text_is_a_mapping_or_refused(text):
    try:
        found = stored_config.parse_config(text)
    except ValueError:
        return
    assert all(isinstance(key, str) for key in found)


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("potential=tan", "algorithm.schedule.sigma.name=cosine", "seed=7", "plugins=[]"),
        ("algorithm=diloco", "+model.options.width=8", "output.name='1e3'", "workers=4"),
        ("data.partition=by_label", "algorithm.step_every=[1,10]", "workers=2"),
        ("output.name='Zürich: #1, \\${seed}'", "+model.options={a: '', b: [], c: {}, d: -.inf}"),
    ],
)
def test_a_config_in_plain_data_is_its_text_read_again(overrides):
    import consensus

    config = consensus.compose(*overrides)
    assert isinstance(config, Config)
    text = stored_config.to_text(config)
    assert text == OmegaConf.to_yaml(OmegaConf.structured(config))
    assert stored_config.plain(config) == stored_config.parse_config(text) == by_omegaconf(text)


def test_a_file_is_read_as_utf_8(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_bytes("a: 日\n".encode())
    assert stored_config.read_config(path) == {"a": "日"}
    path.write_bytes(b"a: \xff\n")
    with pytest.raises(ValueError, match="utf-8"):
        stored_config.read_config(path)
    with pytest.raises(FileNotFoundError):
        stored_config.read_config(tmp_path / "none.yaml")
