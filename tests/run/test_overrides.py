"""Paths and names as overrides, read back by Hydra's own parser, OmegaConf and a shell."""

import random
import subprocess

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from consensus.run.overrides import before_switches, for_shell, override, take_as_text

CHARACTERS = "aZ09_.-/=,:;()[]{}<>'\"`~!@#$%^&*+|? \téß漢😀"


def read(text):
    """The value of an override in a composed config; a list for several values."""
    parsed = OverridesParser.create().parse_override(text)
    if parsed.is_sweep_override():
        return [read(f"{parsed.key_or_group}={value}") for value in parsed.sweep_string_iterator()]
    return OmegaConf.create({"x": parsed.value()}).x


def names(characters, count):
    chosen = random.Random(0)
    return ["".join(chosen.choices(characters, k=chosen.randint(1, 9))) for _ in range(count)]


def test_any_text_comes_back_from_an_override_and_from_a_shell():
    texts = [*names(CHARACTERS + "\\\\\n", 400), "null", "true", "991_2", "1e3", "${seed}", "\\${"]
    overrides = [override("output.run_dir", text) for text in texts]
    assert [read(text) for text in overrides] == texts
    assert take_as_text(overrides) == overrides
    script = f"printf '%s\\0' {for_shell(overrides)}"
    printed = subprocess.run(["sh", "-c", script], capture_output=True, check=True).stdout
    assert printed.decode().split("\0")[:-1] == overrides


def test_any_value_of_a_path_or_a_name_is_taken_as_text():
    known = [text for text in names(CHARACTERS, 400) if "${" not in text and text[0] not in "'\""]
    known += ["991_2", "lam=0.1", "a,b", "(", "é", "it's", " x ", "yes", "0x10", "[a]", "choice(a)"]
    for key in ("output.run_dir", "output.name", "resume", "data.root", "sweep.dir", "+resume"):
        (command,) = {key: take_as_text([f"{key}={text}" for text in known])}.values()
        assert [read(text) for text in command] == known
        assert take_as_text(command) == command, "the children of a sweep get the same arguments"


@pytest.mark.parametrize(
    ("value", "meaning"),
    [
        ("null", None),
        ("NULL", None),
        ("'a=b'", "a=b"),
        ('"a=b"', "a=b"),
        ("a\\=b", "a=b"),
        ("", ""),
        ("'a' b'", "'a' b'"),
    ],
)
def test_quoted_and_escaped_values_keep_their_meaning(value, meaning):
    (text,) = take_as_text([f"output.name={value}"])
    assert read(text) == meaning


@pytest.mark.parametrize("value", ["${seed}", "runs/${seed}", "runs/lam=${seed}", "'é ${seed}'"])
def test_interpolations_are_resolved(value):
    (text,) = take_as_text([f"output.name={value}"])
    parsed = OverridesParser.create().parse_override(text)
    config = OmegaConf.create({"seed": 7, "x": parsed.value()})
    assert config.x == (value.strip("'").replace("${seed}", "7") if value != "${seed}" else 7)


@pytest.mark.parametrize(
    ("value", "choices"),
    [
        ("a=1,b=2", ["a=1", "b=2"]),
        ("991_2, 991_3", ["991_2", "991_3"]),
        ("'a,b',it's", ["a,b", "it's"]),
        ("choice(a,b)", ["a", "b"]),
        ("f(x,y", ["f(x", "y"]),
    ],
)
def test_commas_separate_the_values_of_a_sweep(value, choices):
    (text,) = take_as_text([f"data.root={value}"], sweeping=True)
    assert read(text) == choices


def test_other_keys_and_plain_values_are_left_alone():
    command = ["seed=1_0", "algorithm.lam=0.1,0.2", "~output.name", "output.run_dir=runs/a-b_1 c"]
    assert take_as_text(command) == command
    assert take_as_text(["sweep.dir=a,b", "data.root=/x,/y"], sweeping=True) == [
        "sweep.dir='a,b'",
        "data.root=/x,/y",
    ]


def test_overrides_come_before_the_switches_of_hydra():
    words = ["a=1", "--config-dir=own", "b=2", "--config-name", "train", "~c", "-m", "+d.e=[1,2]"]
    expected = [
        "a=1",
        "b=2",
        "~c",
        "+d.e=[1,2]",
        "--config-dir=own",
        "--config-name",
        "train",
        "-m",
    ]
    assert before_switches(words) == expected
