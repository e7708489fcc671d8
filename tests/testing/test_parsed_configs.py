"""The changes of Hydra for the tests: a changed file is seen, and what they leave out is there."""

import os

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from tests.testing import parsed_configs


def composed(folder, *overrides):
    with initialize_config_dir(str(folder), version_base="1.3"):
        return OmegaConf.to_container(compose("top", overrides=list(overrides)))


def test_a_file_is_parsed_again_once_it_is_another(tmp_path):
    parsed_configs.remember()
    file = tmp_path / "top.yaml"
    file.write_text("value: [1]\n")
    assert composed(tmp_path, "value=[7]") == {"value": [7]}
    assert composed(tmp_path) == {"value": [1]}, "the copy of a call is its own"
    file.write_text("value: [22]\n")  # another size
    assert composed(tmp_path) == {"value": [22]}
    moment = file.stat().st_mtime_ns
    file.write_text("value: [33]\n")
    os.utime(file, ns=(moment, moment + 1))
    assert composed(tmp_path) == {"value": [33]}
    (tmp_path / "other.yaml").write_text("value: [44]\n")
    os.utime(tmp_path / "other.yaml", ns=(moment, moment + 1))
    (tmp_path / "other.yaml").replace(file)  # another file, as old and as large
    assert composed(tmp_path) == {"value": [44]}


def test_a_list_of_defaults_refers_to_its_other_choices(tmp_path):
    for group, name in (("a", "x"), ("a", "y"), ("b", "of_x"), ("b", "of_y")):
        (tmp_path / group).mkdir(exist_ok=True)
        (tmp_path / group / f"{name}.yaml").write_text(f"name: {name}\n")
    (tmp_path / "top.yaml").write_text("defaults: [{a: x}, {b: 'of_${a}'}, _self_]\n")
    for name in ("x", "y"):
        found = composed(tmp_path, f"a={name}")
        assert found == {"a": {"name": name}, "b": {"name": f"of_{name}"}}


def test_a_stored_config_that_is_replaced_is_merged_again(tmp_path):
    parsed_configs.remember()
    (tmp_path / "top.yaml").write_text("defaults: [stored_for_a_test, _self_]\n")
    for value in (1, 2):
        ConfigStore.instance().store("stored_for_a_test", {"value": [value]})
        assert composed(tmp_path, "value=[7]") == {"value": [7]}
        assert composed(tmp_path) == {"value": [value]}, "the copy of a call is its own"


def test_the_same_files_in_another_order_or_place_are_merged_anew(tmp_path):
    parsed_configs.remember()
    (tmp_path / "top.yaml").write_text("of: top\n")
    (tmp_path / "group").mkdir()
    for name in ("x", "y"):
        (tmp_path / "group" / f"{name}.yaml").write_text(f"name: {name}\n")
    for place in ("a", "b"):
        found = composed(tmp_path, f"+group@{place}=x")
        assert found == {"of": "top", place: {"name": "x"}}
    for first, second in (("x", "y"), ("y", "x")):
        found = composed(tmp_path, f"+group@a={first}", f"+group@a.b={second}")
        assert found == {"of": "top", "a": {"name": first, "b": {"name": second}}}


def test_a_file_that_is_new_is_found(tmp_path):
    parsed_configs.remember()
    (tmp_path / "group").mkdir()
    (tmp_path / "group" / "x.yaml").write_text("name: x\n")
    (tmp_path / "top.yaml").write_text("defaults: [{optional group: y}, _self_]\nof: top\n")
    assert composed(tmp_path) == composed(tmp_path) == {"of": "top"}
    assert composed(tmp_path, "group=x") == {"of": "top", "group": {"name": "x"}}
    (tmp_path / "group" / "y.yaml").write_text("name: y\n")
    assert composed(tmp_path) == {"of": "top", "group": {"name": "y"}}
    (tmp_path / "group" / "y.yaml").unlink()
    assert composed(tmp_path) == {"of": "top"}


def test_a_stored_config_that_is_gone_is_not_found(tmp_path):
    parsed_configs.remember()
    (tmp_path / "top.yaml").write_text("defaults: [{optional kept: x}, _self_]\nof: top\n")
    store = ConfigStore.instance()
    before = dict(store.repo)
    store.store("x", {"name": "x"}, group="kept")
    assert composed(tmp_path) == {"of": "top", "kept": {"name": "x"}}
    store.repo = before
    assert composed(tmp_path) == {"of": "top"}
