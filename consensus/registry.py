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
from numbers import Integral, Real
from typing import Any, Generic, TypeVar

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


class Registry(Mapping[str, T], Generic[T]):
    """A mapping from names to entries. The registered factory makes a new entry at each access.

    The kind of its entries, such as "potential", is for messages.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._factories: dict[str, Callable[..., T]] = {}

    def register(self, name: str) -> Callable[[F], F]:
        """Decorator that adds a factory under `name`.

        Raises:
            ValueError: If another factory has the name; a silent replacement would change the
                meaning of old configs. A module that is imported twice may register again.
        """

        def add(factory: F) -> F:
            known = self._factories.get(name, factory)
            if (known.__module__, known.__qualname__) != (factory.__module__, factory.__qualname__):
                raise ValueError(f"{self.kind} `{name}` is already registered by {known!r}")
            self._factories[name] = factory
            return factory

        return add

    def options(self, name: str) -> dict[str, Any]:
        """The option names of an entry with their default values."""
        return {key: option.default for key, option in self._signature(name).items()}

    def make(self, name: str, /, **options: Any) -> T:
        """The entry `name` with the given options.

        Raises:
            ValueError: If the name or an option is unknown, or an option has another type than its
                annotation; the message lists what is allowed.
        """
        allowed = self._signature(name)
        for option, value in options.items():
            if option not in allowed:
                known = ", ".join(allowed) or "none"
                raise ValueError(
                    f"{self.kind} `{name}` has no option `{option}`; its options: {known}"
                )
            options[option] = _typed(option, value, allowed[option].annotation)
        return self._factories[name](**options)

    def _signature(self, name: str) -> Mapping[str, inspect.Parameter]:
        try:
            return inspect.signature(self._factories[name]).parameters
        except KeyError:
            known = ", ".join(sorted(self._factories))
            raise ValueError(f"unknown {self.kind} `{name}`; known: {known}") from None

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
