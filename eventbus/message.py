"""Commands and events, and the name, version and key that each has on the wire."""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar, cast, get_origin, overload

from pydantic import BaseModel, ConfigDict
from typing_extensions import TypeVar as DefaultTypeVar

__all__ = ("Command", "Event", "MessageSpec", "check_message_type", "is_command", "message", "result_type", "spec_of")

R = DefaultTypeVar("R", default=None)
T = TypeVar("T")

_SPEC = "__eventbus_message__"


@dataclasses.dataclass(frozen=True, slots=True)
class MessageSpec:
    """Hold what a message type is called on the wire, in which version, and which field orders it."""

    name: str
    version: int = 1
    key: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not 0 < len(self.name) <= 200 or not self.name.isprintable():
            raise TypeError(f"a message name is 1 to 200 printable characters, not {self.name!r}")
        if self.name.strip() != self.name or "*" in self.name:
            raise TypeError(f"a message name has no '*' and no blank at its ends: {self.name!r}")
        if isinstance(self.version, bool) or not isinstance(self.version, int) or self.version < 1:
            raise TypeError(f"a message version is a whole number from 1, not {self.version!r} ({self.name!r})")
        if self.key is not None and not (isinstance(self.key, str) and self.key.isidentifier()):
            raise TypeError(f"key= names a field of the message, not {self.key!r} ({self.name!r})")

    def key_of(self, message: object) -> str | None:
        """Return the key of one message as text, or None if its type has none or the field is None."""
        if self.key is None:
            return None
        value: object = getattr(message, self.key)
        return None if value is None else str(value)


class _Spoken(BaseModel):
    """Take ``name``, ``version`` and ``key`` as class keywords."""

    model_config = ConfigDict(frozen=True)

    def __init_subclass__(
        cls, *, name: str | None = None, version: int | None = None, key: str | None = None, **unknown: Any
    ) -> None:
        if unknown:
            raise TypeError(
                f"class {cls.__name__} takes the keywords name, version and key, not {', '.join(sorted(unknown))}"
            )
        super().__init_subclass__()
        if name is not None or version is not None or key is not None:
            setattr(cls, _SPEC, _spec(cls, name, 1 if version is None else version, key))


class Command(_Spoken, Generic[R]):
    """Ask for something to be done: exactly one handler, whose result ``R`` comes back to the sender.

    Class keywords: ``name`` (its name on the wire, default the class name), ``version`` (default 1) and ``key``
    (the field whose equal values keep their order, default that of the class above). Commands are frozen. A bare
    ``Command`` has the result None. Raises ``TypeError`` for any other keyword and for a value that cannot work.

    >>> class Add(Command[int], name="math.add"):
    ...     left: int
    ...     right: int
    >>> Add(left=1, right=2)
    Add(left=1, right=2)
    """

    if TYPE_CHECKING:

        @classmethod
        def __eventbus_result__(cls) -> tuple[Self, R]:
            """Tie the command to its result for type checkers; it does not exist at run time."""
            ...


class Event(_Spoken):
    """State a fact that happened: any number of handlers, none of which answers.

    Class keywords as for ``Command``. Events are frozen. Any other pydantic model or dataclass can be an event too.

    >>> class Added(Event, name="math.added", key="account"):
    ...     account: str
    ...     total: int
    >>> Added(account="a", total=3)
    Added(account='a', total=3)
    """


@overload
def message(cls: type[T], /) -> type[T]: ...


@overload
def message(*, name: str | None = None, version: int = 1, key: str | None = None) -> Callable[[type[T]], type[T]]: ...


def message(
    cls: type[T] | None = None, /, *, name: str | None = None, version: int = 1, key: str | None = None
) -> type[T] | Callable[[type[T]], type[T]]:
    """Give a dataclass or a pydantic model its name, version and key on the wire.

    Args:
        name: what it is called there; default the class name.
        version: which form of it this is, from 1.
        key: the field whose equal values keep their order; default that of the class above.

    Returns the class itself. Raises ``TypeError`` for a class that cannot travel or is called something else already,
    and for a value that cannot work.

    >>> @message(name="billing.paid", key="invoice")
    ... @dataclasses.dataclass(frozen=True)
    ... class Paid:
    ...     invoice: str
    >>> Paid(invoice="7")
    Paid(invoice='7')
    """

    def declare(target: type[T]) -> type[T]:
        check_message_type(target)
        spec, declared = _spec(target, name, version, key), target.__dict__.get(_SPEC)
        if declared is not None and declared != spec:
            raise TypeError(f"{target.__name__} is declared already, as {declared.name!r}: declare it once")
        setattr(target, _SPEC, spec)
        return target

    return declare if cls is None else declare(cls)


def check_message_type(cls: object) -> None:
    """Raise ``TypeError`` unless ``cls`` is a pydantic model or a dataclass."""
    if not isinstance(cls, type):
        raise TypeError(f"a message type is a class, not {cls!r}")
    kind = cast("type[object]", cls)
    if issubclass(kind, type):
        raise TypeError("a message is an instance: OrderPlaced(order=1), not the class OrderPlaced")
    if not issubclass(kind, BaseModel) and not dataclasses.is_dataclass(kind):
        raise TypeError(
            f"{kind.__name__} is neither a pydantic model nor a dataclass, so it cannot be a message "
            "(@message stands above @dataclass)"
        )


def spec_of(cls: type) -> MessageSpec:
    """Return what a message type is called on the wire; an undeclared one is called by its class name."""
    spec = cls.__dict__.get(_SPEC)
    return spec if isinstance(spec, MessageSpec) else _spec(cls)


def _spec(cls: type, name: str | None = None, version: int = 1, key: str | None = None) -> MessageSpec:
    """Return what a class is called; a name is its own, a key is inherited with the field it names."""
    if key is None:
        above = (base.__dict__.get(_SPEC) for base in cls.__mro__[1:])
        key = next((spec.key for spec in above if spec is not None), None)
    return MessageSpec(cls.__name__ if name is None else name, version, key)


def is_command(cls: type) -> bool:
    """Tell whether a message type is a command; every other one is an event."""
    return issubclass(cls, Command)


def result_type(command: type) -> Any:
    """Return the result type that a command class names, ``type(None)`` for a bare ``Command``."""
    bound: dict[Any, Any] = {}
    for ancestor in command.__mro__:
        facts: dict[str, Any] = ancestor.__dict__.get("__pydantic_generic_metadata__", {})
        origin = facts.get("origin")
        if origin is None:
            continue
        resolved = [_filled(arg, bound) for arg in facts["args"]]
        if origin is Command:
            return type(None) if resolved[0] is None else resolved[0]
        bound.update(zip(origin.__pydantic_generic_metadata__["parameters"], resolved, strict=False))
    return type(None)


def _filled(annotation: Any, bound: dict[Any, Any]) -> Any:
    """Return an annotation with the type variables that are known by now filled in."""
    if isinstance(annotation, TypeVar):
        return bound.get(annotation, annotation)
    inner = getattr(annotation, "__parameters__", ()) if get_origin(annotation) is not None else ()
    return annotation[tuple(bound.get(one, one) for one in inner)] if inner else annotation
