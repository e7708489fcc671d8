"""The YAML files: where they are, and the comments that describe keys and entries."""

import pytest

from consensus.run import yaml_files
from consensus.run.yaml_files import comments, config_dir, keys_of_runs, keys_of_sweeps

TEXT = """\
# @package _global_
# One entry
# in two lines
defaults:
  - override /potential: tan
a: 1 # of a; with # inside
section: # of the section
  b: '#no' # of b
  c: null
"""


def test_the_files_are_found_inside_the_package_or_beside_it(monkeypatch, tmp_path):
    module = tmp_path / "consensus" / "run" / "yaml_files.py"
    monkeypatch.setattr(yaml_files, "__file__", str(module))
    with pytest.raises(FileNotFoundError, match=r"no configs/train\.yaml"):
        config_dir()
    for folder in (tmp_path / "configs", tmp_path / "consensus" / "configs"):
        folder.mkdir(parents=True)
        (folder / "train.yaml").touch()
        assert config_dir() == str(folder)  # the installed one comes first


def test_a_comment_describes_the_key_beside_it(tmp_path):
    path = tmp_path / "entry.yaml"
    path.write_text(TEXT)
    found, introduction = comments(path)
    assert introduction == "One entry in two lines"
    assert found["a"] == "of a; with # inside"
    assert found["section"] == "of the section"
    assert (found["section.b"], found["section.c"]) == ("of b", "")


def test_every_key_has_a_description():
    keys = keys_of_runs() | keys_of_sweeps()
    assert [key for key, (_, meaning) in keys.items() if not meaning] == []
    assert keys["algorithm.lam"].default == "0.1", "the value of an interpolation"
