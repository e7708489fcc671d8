"""Tables of names in a config: potentials, models, data sets, schedules, sinks.

A table maps a name to a *factory*, a function whose keyword arguments are the options of that
entry. `TABLE[name]` is the entry with its default options, `TABLE.make(name, **options)` with
others. An option annotated as bool, int or float is checked before the call. Users add entries with
the decorator that the built-in ones use:

    @POTENTIALS.register("mine")
    def mine(sharpness: float = 2.0) -> Potential: ...
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from numbers import Integral, Real
from typing import Any, Generic, TypeVar

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


class Registry(Mapping[str, T], Generic[T]):
    """A mapping from names to entries. The registered factory makes a new entry at each access.

    Args:
        kind: The kind of its entries, such as "potential", for messages.
        of: The class of its entries; None: any.
        expected: The entries in words, for messages; "": from the name of the class.
    """

    def __init__(self, kind: str, of: Any = None, expected: str = "") -> None:
        self.kind, self._of = kind, of
        self._expected = expected or f"a {getattr(of, '__name__', '')}"
        self._factories: dict[str, Callable[..., T]] = {}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.kind}: {', '.join(sorted(self._factories))})"

    def register(self, name: str) -> Callable[[F], F]:
        """Decorator that adds a factory under `name`.

        Raises:
            ValueError: If another factory has the name; a silent replacement would change the
                meaning of old configs. The function of a module that is reloaded, or of a cell of
                a notebook that runs again, replaces its former self.
        """

        def add(factory: F) -> F:
            known = self._factories.get(name, factory)
            if known is not factory and not _same_function(known, factory):
                raise ValueError(f"{self.kind} `{name}` is already registered by {known!r}")
            self._factories[name] = factory
            return factory

        return add

    def options(self, name: str) -> dict[str, Any]:
        """The option names of an entry with their default values.

        `inspect.Parameter.empty` is that of an option without a default.
        """
        return {key: option.default for key, option in self._signature(name)[0].items()}

    def completed(self, name: str, options: Mapping[str, Any], /, **offered: Any) -> dict[str, Any]:
        """The options, after those offered ones that the factory of `name` has."""
        known, others = self._signature(name)
        own = {key: value for key, value in offered.items() if others or key in known}
        return own | dict(options)

    def make(self, name: str, /, **options: Any) -> T:
        """The entry `name` with the given options.

        Raises:
            ValueError: If the name or an option is unknown, an option has another type than its
                annotation, or the factory returns something else than an entry; the message names
                what is allowed.
        """
        known, others = self._signature(name)
        for option, value in options.items():
            if option in known:
                options[option] = _typed(option, value, known[option].annotation)
            elif not others:
                raise ValueError(
                    f"{self.kind} `{name}` has no option `{option}`; its options: "
                    f"{', '.join(known) or 'none'}"
                )
        factory = self._factories[name]
        entry = factory(**options)
        if self._of is not None and (isinstance(entry, type) or not isinstance(entry, self._of)):
            found = f"the class {entry.__name__}" if isinstance(entry, type) else _kind_of(entry)
            where = ".".join(filter(None, _origin(factory)))
            raise ValueError(
                f"the factory of {self.kind} `{name}`, {where}, returned {found}; allowed: "
                f"{self._expected}"
            )
        return entry

    def _signature(self, name: str) -> tuple[dict[str, inspect.Parameter], bool]:
        """The options of an entry, and whether its factory takes any others (`**options`)."""
        if name not in self._factories:
            known = ", ".join(sorted(self._factories))
            raise ValueError(f"unknown {self.kind} `{name}`; known: {known}")
        found = inspect.signature(self._factories[name]).parameters
        variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        options = {key: option for key, option in found.items() if option.kind not in variadic}
        return options, any(option.kind is variadic[1] for option in found.values())

    def __getitem__(self, name: str) -> T:
        if name not in self._factories:
            raise KeyError(name)
        return self.make(name)

    def __contains__(self, name: object) -> bool:  # does not make the entry
        return name in self._factories

    def __iter__(self) -> Iterator[str]:
        return iter(self._factories)

    def __len__(self) -> int:
        return len(self._factories)


def _origin(factory: Callable[..., Any]) -> tuple[str, str]:
    """The module and the name of a factory; "" where it has none."""
    inner = factory.func if isinstance(factory, partial) else factory
    return getattr(inner, "__module__", ""), getattr(inner, "__qualname__", "")


def _same_function(known: Callable[..., Any], new: Callable[..., Any]) -> bool:
    """Whether two factories are one function, defined twice: they have one module and one name.

    All lambdas have one name, so their code is compared. Partial functions have none.
    """
    same = _origin(known) == _origin(new) and not isinstance(new, partial)
    if same and _origin(new)[1].endswith("<lambda>"):
        old, code = known.__code__, new.__code__
        same = (old.co_code, old.co_consts) == (code.co_code, code.co_consts)
    return same


def _kind_of(value: object) -> str:
    return "None" if value is None else f"a value of type {type(value).__name__}"


_TYPES: dict[str, tuple[type, str]] = {
    "bool": (bool, "true or false"),
    "int": (Integral, "a whole number"),
    "float": (Real, "a number"),
}


def _typed(option: str, value: Any, annotation: Any) -> Any:
    """The value, checked against an annotation as bool, int or float; a float is converted.

    An int is a float, but a bool is no int.
    """
    name = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "")
    if name not in _TYPES:
        return value
    kind, allowed = _TYPES[name]
    fits = isinstance(value, kind) and isinstance(value, bool) == (kind is bool)  # True is an int
    if fits:
        with suppress(OverflowError):
            return float(value) if kind is Real else value
    raise ValueError(f"`{option}` is {value}; allowed: {allowed}")
