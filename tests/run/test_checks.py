"""Rules of fields, and the lines of their refusals."""

from dataclasses import dataclass, field

import pytest

from consensus.registry import Registry
from consensus.run.checks import (
    COUNT,
    POSITIVE,
    ConfigError,
    absolute,
    check_fields,
    made,
    one_of,
    or_null,
    rule,
)


@dataclass
class Section:
    free: str = "anything"
    size: float = field(default=1.0, metadata=POSITIVE)
    count: int | None = field(default=None, metadata=or_null(COUNT, "all"))
    share: float | None = field(default=None, metadata=or_null(POSITIVE))
    word: str = field(default="b", metadata=one_of(("b", "a")))
    entry: str | None = field(default=None, metadata=or_null(rule(len, "a text")))

    def check(self) -> None:
        check_fields(self, "section.")


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"size": 0}, "`section.size` is 0; allowed: a finite number > 0"),
        ({"count": 0}, "`section.count` is 0; allowed: a whole number >= 1, or null for all"),
        ({"share": -1}, "`section.share` is -1; allowed: a finite number > 0, or null"),
        ({"word": "c", "entry": ""}, "`section.word` is c; allowed: a, b"),
        ({"entry": ""}, "`section.entry` is ; allowed: a text, or null"),
    ],
)
def test_the_first_field_that_breaks_its_rule_is_refused(values, line):
    Section().check()
    with pytest.raises(ConfigError) as caught:
        Section(**values).check()
    assert str(caught.value) == line


def test_a_table_may_grow_after_its_rule_is_made():
    table = Registry("shape")

    @dataclass
    class Shape:
        name: str = field(metadata=one_of(table))

    shape = Shape("dot")
    with pytest.raises(ConfigError, match=r"`name` is dot; allowed: $"):
        check_fields(shape)
    table.register("dot")(lambda: "a dot")
    check_fields(shape)
    assert made("shape", table, "dot", {}) == "a dot"
    with pytest.raises(ConfigError, match=r"`shape.options` is \{'size': 1\}: shape `dot` has no "):
        made("shape", table, "dot", {"size": 1})


def test_absolute_paths(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert absolute("key", "a/../b") == str(tmp_path / "b")
    with pytest.raises(ConfigError, match=r"^`key` is a{300}; allowed: the path of a file or "):
        absolute("key", "a" * 300)
