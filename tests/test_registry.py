"""Tables of names: entries, options, and messages that list what is allowed."""

import functools
import importlib.util
from collections.abc import Mapping

import pytest

from consensus.registry import Registry


@pytest.fixture
def shapes():
    table = Registry("shape")

    @table.register("circle")
    def circle(radius=1.0, filled=False):
        return ("circle", radius, filled)

    @table.register("dot")
    def dot():
        return ["dot"]

    return table


def test_entries_with_defaults_and_options(shapes):
    assert shapes["circle"] == ("circle", 1.0, False)
    assert shapes.make("circle", radius=2.0) == ("circle", 2.0, False)
    assert shapes.make("circle", filled=True, radius=3.0) == ("circle", 3.0, True)
    assert shapes["dot"] is not shapes["dot"]  # each made anew


def test_options(shapes):
    assert shapes.options("circle") == {"radius": 1.0, "filled": False}
    assert list(shapes.options("circle")) == ["radius", "filled"]
    assert shapes.options("dot") == {}


def test_is_a_mapping(shapes):
    assert isinstance(shapes, Mapping)
    assert list(shapes) == ["circle", "dot"]
    assert len(shapes) == 2
    assert "dot" in shapes
    assert "square" not in shapes
    assert shapes.get("square") is None
    assert dict(shapes) == {"circle": ("circle", 1.0, False), "dot": ["dot"]}
    with pytest.raises(KeyError, match="square"):
        shapes["square"]


def test_a_lookup_of_a_name_does_not_make_the_entry():
    table, made = Registry("thing"), []

    @table.register("costly")
    def costly():
        made.append(1)

    assert "costly" in table
    assert list(table) == ["costly"]
    table.options("costly")
    assert made == []
    table["costly"]
    assert made == [1]


@pytest.mark.parametrize("method", ["make", "options"])
def test_unknown_name(shapes, method):
    with pytest.raises(ValueError, match="unknown shape `square`; known: circle, dot") as caught:
        getattr(shapes, method)("square")
    assert caught.value.__context__ is None  # one line for the user, not two tracebacks


def test_unknown_option(shapes):
    message = "shape `circle` has no option `radios`; its options: radius, filled"
    with pytest.raises(ValueError, match=message):
        shapes.make("circle", radios=1.0)
    with pytest.raises(ValueError, match="shape `dot` has no option `radius`; its options: none"):
        shapes.make("dot", radius=1.0)


def test_register_returns_the_factory():
    table = Registry("thing")

    def factory():
        return 1

    assert table.register("one")(factory) is factory
    assert table.register("uno")(factory) is factory  # two names for one thing
    assert table["one"] == table["uno"] == 1


def test_a_name_is_not_taken_twice(shapes):
    def other():
        return "other"

    with pytest.raises(ValueError, match=r"shape `dot` is already registered by <function .*dot"):
        shapes.register("dot")(other)
    assert shapes["dot"] == ["dot"]


def test_one_function_defined_twice_may_register_again(shapes):
    """As a cell of a notebook that runs again, or a module that is reloaded."""

    def define(size):
        def mine():
            return size

        return mine

    shapes.register("mine")(define(1))
    shapes.register("mine")(define(2))
    assert shapes["mine"] == 2
    shapes.register("short")(lambda: 1)
    shapes.register("short")(lambda: 1)
    with pytest.raises(ValueError, match=r"`short` is already registered by <function .*lambda"):
        shapes.register("short")(lambda: 2)
    shapes.register("half")(functools.partial(define(1)))
    with pytest.raises(ValueError, match=r"`half` is already registered by functools\.partial"):
        shapes.register("half")(functools.partial(define(1)))
    assert (shapes["short"], shapes["half"]) == (1, 1)


def test_repr_lists_the_names(shapes):
    assert repr(shapes) == "Registry(shape: circle, dot)"


def test_an_option_of_any_name_and_any_other_options():
    table = Registry("thing")

    @table.register("open")
    def anything(size: int = 1, *rest, **others):
        return size, others

    assert table.options("open") == {"size": 1}
    assert table.make("open", name="x", self=3) == (1, {"name": "x", "self": 3})
    assert table.completed("open", {"depth": 2}, root="data") == {"root": "data", "depth": 2}
    with pytest.raises(ValueError, match=r"`size` is 0\.5; allowed: a whole number"):
        table.make("open", size=0.5)


def test_a_factory_gets_the_offered_options_that_it_has(shapes):
    offered = {"radius": 5.0, "root": "data"}
    assert shapes.completed("circle", {"filled": True}, **offered) == {
        "radius": 5.0,
        "filled": True,
    }
    assert shapes.completed("circle", {"radius": 2.0}, **offered) == {"radius": 2.0}
    assert shapes.completed("dot", {}, **offered) == {}
    assert shapes.completed("dot", {"size": 1}) == {"size": 1}, "refused by `make`"
    with pytest.raises(ValueError, match="unknown shape `square`; known: circle, dot"):
        shapes.completed("square", {})


@pytest.mark.parametrize(
    ("returned", "found"),
    [
        (None, "None"),
        ((1, 2), "a value of type tuple"),
        (int, "the class int"),
        (True, None),
        (7, None),
    ],
)
def test_a_factory_that_returns_something_else_is_refused(returned, found):
    table = Registry("number", int, "an int")

    @table.register("mine")
    def build():
        return returned

    if found is None:
        assert table["mine"] == returned
        return
    where = f"{__name__}.{build.__qualname__}"
    with pytest.raises(ValueError, match="allowed: an int") as caught:
        table["mine"]
    assert str(caught.value) == (
        f"the factory of number `mine`, {where}, returned {found}; allowed: an int"
    )


def test_tables_are_independent(shapes):
    assert list(Registry("shape")) == []
    assert len(shapes) == 2


def test_a_module_imported_twice_may_register_again(shapes, tmp_path):
    """A plugin that is imported under two orders, or reloaded; the newer factory is used."""
    path = tmp_path / "plugin.py"
    path.write_text("def build(size=1):\n    return size\n")
    loaded = []
    for default in (1, 2):
        path.write_text(f"def build(size={default}):\n    return 'size', size\n# {'x' * default}\n")
        spec = importlib.util.spec_from_file_location("plugin_of_test_registry", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        shapes.register("mine")(module.build)
        loaded.append(module.build)
    assert loaded[0] is not loaded[1]
    assert shapes["mine"] == ("size", 2)
    assert shapes.options("mine") == {"size": 2}


def test_an_option_may_be_called_name():
    table = Registry("thing")
    table.register("named")(lambda name="a": [name])
    assert table.make("named", name="b") == ["b"]
