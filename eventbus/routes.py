"""Which transports carry a message: rules in code and in configuration, the most specific one wins."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from difflib import get_close_matches
from typing import Any, cast

from pydantic import BaseModel

from eventbus.errors import WiringError
from eventbus.message import Command, Event

__all__ = ("INLINE", "MEMORY", "RESERVED", "STORE", "Route", "Routes")

RESERVED = INLINE, MEMORY, STORE = "inline", "memory", "store"
"""Names that every bus knows; a transport cannot take them."""

OPEN = (object, BaseModel, Command, Event)
"""Base classes whose rule may wait for its first message."""


@dataclass(frozen=True, slots=True)
class Route:
    """Say where a message goes, and by which rule."""

    transports: tuple[str, ...]
    rule: str


class Routes:
    """Hold the rules of one bus.

    Args:
        code: message class, base class, wire name or pattern of names -> transport name or names.
        config: the same by name or pattern only; any rule of it that matches beats all of ``code``.

    Nothing is refused here: ``faults`` says everything at once.

    >>> routes = Routes({"shop.*": "store"})
    >>> routes.resolve(Event, "shop.paid")
    Route(transports=('store',), rule="routes['shop.*'] in code")
    """

    def __init__(
        self,
        code: Mapping[Any, str | Sequence[str]],
        config: Mapping[str, str | Sequence[str]] | None = None,
    ) -> None:
        self._layers = (_Layer("configuration", config or {}), _Layer("code", code))

    @property
    def types(self) -> tuple[type, ...]:
        """Return the message classes that have a rule in code."""
        keys = [cast("type[object]", key) for key in self._layers[1].given if isinstance(key, type)]
        return tuple(key for key in keys if key not in OPEN and (issubclass(key, BaseModel) or is_dataclass(key)))

    def resolve(self, type: type, name: str) -> Route:
        """Return the route of a message type; without any rule it is inline.

        Raises ``WiringError`` if two rules are equally specific and disagree.
        """
        for layer in self._layers:
            for rank in layer.ranks(type, name):
                if len({transports for _, transports in rank}) > 1:
                    rules = " and ".join(f"{_shown(key)} -> {', '.join(to)}" for key, to in rank)
                    raise WiringError([f"routes: equally specific rules in {layer.name} disagree on {name!r}: {rules}"])
                if rank:
                    key, transports = rank[0]
                    return Route(transports, layer.told(key))
        return Route(("inline",), "no rule")

    def faults(self, types: Mapping[type, str], transports: Collection[str]) -> list[str]:
        """Return one sentence per fault, given every registered message type with its name and every transport.

        A fault is a rule that cannot be read, goes nowhere, goes somewhere unknown or twice to one place, or matches
        no message (patterns may wait for one); and two equally specific rules that disagree.
        """
        found = [fault for layer in self._layers for fault in layer.faults(types, {*RESERVED, *transports})]
        for type, name in types.items():
            try:
                self.resolve(type, name)
            except WiringError as error:
                found.extend(error.faults)
        return found


class _Layer:
    def __init__(self, name: str, rules: Mapping[Any, Any]) -> None:
        self.name = name
        self.given = {key: _targets(value) for key, value in rules.items()}
        self.rules = {key: targets for key, targets in self.given.items() if targets}

    def told(self, key: object) -> str:
        return f"routes[{_shown(key)}] in {self.name}"

    def ranks(self, type: type, name: str) -> Iterator[list[tuple[Any, tuple[str, ...]]]]:
        """Yield the rules that match, most specific rank first."""
        yield [(key, self.rules[key]) for key in (type, name) if key in self.rules]
        yield [(base, self.rules[base]) for base in type.__mro__[1:] if base in self.rules][:1]
        patterns = [key for key in self.rules if isinstance(key, str) and _matches(key, name)]
        most = max(map(_literals, patterns), default=0)
        yield [(key, self.rules[key]) for key in patterns if _literals(key) == most]

    def faults(self, types: Mapping[type, str], known: Collection[str]) -> Iterator[str]:
        for key, targets in self.given.items():
            rule = self.told(key)
            if isinstance(key, type) and self.name == "code":
                if key not in OPEN and not any(issubclass(message, key) for message in types):
                    yield f"{rule} matches no registered message: name its messages in Module(messages=[...])"
            elif not isinstance(key, str) or not key:
                yield f"{rule}: the key is neither a message name nor a pattern{' nor a class' * (self.name == 'code')}"
            elif "*" not in key and key not in types.values():
                yield f"{rule} matches no registered message{meant(key, types.values())}"
            if targets is None:
                yield f"{rule}: the value is neither a transport name nor a list of them"
            elif not targets:
                yield f"{rule} names no transport: remove it, or say 'inline'"
            else:
                if len(set(targets)) < len(targets):
                    yield f"{rule} names a transport twice: {', '.join(targets)}"
                for target in sorted(set(targets) - set(known)):
                    yield f"{rule} names an unknown transport {target!r}{meant(target, known)}"


def _targets(value: Any) -> tuple[str, ...] | None:
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, Sequence):
        return None
    targets = tuple(cast("Sequence[object]", value))
    return cast("tuple[str, ...]", targets) if all(isinstance(target, str) for target in targets) else None


def _matches(pattern: str, name: str) -> bool:
    first, *rest = pattern.split("*")
    if not rest:
        return False
    *middle, last = rest
    if len(name) < len(first) + len(last) or not name.startswith(first) or not name.endswith(last):
        return False
    position, end = len(first), len(name) - len(last)
    for part in middle:
        position = name.find(part, position, end)
        if position < 0:
            return False
        position += len(part)
    return True


def _literals(pattern: str) -> int:
    return len(pattern) - pattern.count("*")


def meant(name: str, known: Collection[str]) -> str:
    """Return the end of a sentence about a name that is not known."""
    close = get_close_matches(name, sorted(known), n=1)
    return f": did you mean {close[0]!r}?" if close else f" (known are {', '.join(sorted(known))})"


def _shown(key: object) -> str:
    return key.__qualname__ if isinstance(key, type) else repr(key)
