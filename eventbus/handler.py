"""One handler, described once when it is registered and inspected once when the bus compiles."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from eventbus.annotations import UnresolvedError, layers, resolved
from eventbus.message import check_message_type, is_command, result_type
from eventbus.retry import Retry

__all__ = ("Handler", "Options", "accepts", "describe", "returned_messages", "shown", "signature_faults")

_UNIONS = (Union, UnionType)
_RECEIVERS = (("self",), ("cls",))
_OPEN = (Any, object, inspect.Parameter.empty)
_NUMBERS: dict[Any, tuple[type, ...]] = {float: (int,), complex: (int, float)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Hold what a decorator was told about a handler; a value that cannot work raises ``ValueError``."""

    name: str | None = None
    """The function's name in the stable name; default the name it has."""
    aliases: tuple[str, ...] = ()
    """Former stable names, whose entries it takes over; without a dot, a former function of the same module."""
    retry: Retry = field(default_factory=Retry)
    """When a failed handling is tried again."""
    timeout: float | None = None
    """Seconds that one attempt may take."""
    concurrency: int | None = None
    """Handlings at once in one process."""
    ordered: bool = False
    """Whether equal keys are handled one after another."""
    on_dead: Literal["continue", "block"] = "continue"
    """What later messages of a key do when one of it is dead."""
    inline: bool = False
    """Whether it runs in the publisher's task even if the event has a route."""

    def __post_init__(self) -> None:
        if self.name is not None and not _is_name(self.name):
            raise ValueError(f"name= takes printable text without '/' and blanks at its ends, not {self.name!r}")
        for alias in self.aliases:
            if not _is_name(alias):
                raise ValueError(f"aliases= takes former names of handlers, not {alias!r}")
        if self.timeout is not None and not (_is_number(self.timeout, int, float) and 0 < self.timeout < float("inf")):
            raise ValueError(f"timeout= takes seconds greater than zero, not {self.timeout!r}")
        if self.concurrency is not None and not (_is_number(self.concurrency, int) and self.concurrency > 0):
            raise ValueError(f"concurrency= takes a whole number from 1, not {self.concurrency!r}")
        if self.on_dead not in ("continue", "block"):
            raise ValueError(f'on_dead= takes "continue" or "block", not {self.on_dead!r}')
        if not isinstance(self.retry, Retry):
            raise ValueError(f"retry= takes a Retry, not {self.retry!r}")


def _is_name(text: object) -> bool:
    return isinstance(text, str) and text.isprintable() and text.strip() == text != "" and "/" not in text


def _is_number(value: object, *kinds: type) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool)


@dataclass(frozen=True, slots=True, eq=False)
class Handler:
    """Describe one handler; ``name`` is its identity in metrics, queues and replays."""

    name: str
    module: str
    func: Callable[..., Any]
    types: tuple[type, ...]
    options: Options

    @property
    def is_command_handler(self) -> bool:
        """Tell whether it handles a command."""
        return is_command(self.types[0])

    @property
    def where(self) -> str:
        """Return the file and line of the function, for messages to people."""
        code = next((one.__code__ for one in reversed([*layers(self.func)]) if hasattr(one, "__code__")), None)
        return f"{code.co_filename}:{code.co_firstlineno}" if code else repr(self.func)


def describe(module: str, func: Callable[..., Any], handled: tuple[type, ...], options: Options) -> Handler:
    """Return the description of a handler. Raises ``TypeError`` for what can never be one."""
    if isinstance(func, staticmethod | classmethod) or _is_method_to_be(func):
        raise TypeError(
            f"{func!r} cannot be a handler in a class body: register the bound method, "
            "module.on(Event)(instance.method)"
        )
    if not callable(func):
        raise TypeError(f"{func!r} cannot be a handler: it cannot be called")
    if inspect.isclass(func):
        raise TypeError(f"class {func.__name__} cannot be a handler: register an instance with __call__, or a method")
    name = options.name or getattr(func, "__name__", None)
    if name is None or name == "<lambda>":
        raise TypeError(f"{func!r} has no name of its own, and a handler's name is its identity: say name='...'")
    for message in handled:
        check_message_type(message)
    aliases = tuple(alias if "." in alias else f"{module}.{alias}" for alias in options.aliases)
    return Handler(f"{module}.{name}", module, func, handled, replace(options, aliases=aliases))


def _is_method_to_be(func: Callable[..., Any]) -> bool:
    """Tell whether a function stands in a class body and waits for an instance."""
    if not inspect.isfunction(func):
        return False
    owner, code = func.__qualname__.rpartition(".")[0], func.__code__
    return owner.rpartition(".")[2] not in ("", "<locals>") and code.co_varnames[: code.co_argcount][:1] in _RECEIVERS


def signature_faults(handler: Handler) -> Iterator[str]:
    """Yield what is wrong with the first parameter and with the result of a handler."""
    try:
        parameters = list(inspect.signature(handler.func).parameters.values())
    except (TypeError, ValueError) as error:
        yield f"handler {handler.name}: its signature cannot be read ({error})"
        return
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    if not parameters or parameters[0].kind not in (*positional, inspect.Parameter.VAR_POSITIONAL):
        yield f"handler {handler.name}: its first parameter must take the message ({handler.where})"
        return
    wanted = _meaning(handler.func, parameters[0].annotation)
    for message in handler.types:
        if not accepts(wanted, message):
            yield (
                f"handler {handler.name}: its first parameter is {shown(wanted)}, "
                f"but it is registered for {message.__name__} ({handler.where})"
            )
    if handler.is_command_handler:
        promised, given = result_type(handler.types[0]), _returned(handler.func)
        if not accepts(promised, given):
            yield (
                f"handler {handler.name}: it returns {shown(given)}, but {handler.types[0].__name__} promises "
                f"{shown(promised)} ({handler.where})"
            )


def returned_messages(handler: Handler) -> tuple[type, ...]:
    """Return the classes an ``on`` handler may return, alone or in a list; messages among them are published."""
    return () if handler.is_command_handler else tuple(dict.fromkeys(_members(_returned(handler.func))))


def _members(annotation: Any) -> Iterator[type]:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is None and isinstance(annotation, type) and annotation not in _OPEN:
        yield annotation
    elif origin is Annotated or origin in (*_UNIONS, list, tuple, Sequence):
        for arg in args[:1] if origin is Annotated else args:
            yield from _members(arg)


def _returned(func: Callable[..., Any]) -> Any:
    try:
        annotation = inspect.signature(func).return_annotation
    except (TypeError, ValueError):
        return Any
    resolved = _meaning(func, annotation)
    if get_origin(resolved) is not None and getattr(get_origin(resolved), "__name__", "") in ("Awaitable", "Coroutine"):
        resolved = get_args(resolved)[-1]
    return resolved


def _meaning(func: Callable[..., Any], annotation: Any) -> Any:
    """Return what an annotation means, or Any for a name that exists for type checkers only: they have checked it."""
    try:
        return type(None) if annotation is None else resolved(annotation, func)
    except UnresolvedError:
        return Any


def accepts(wanted: Any, given: Any) -> bool:
    """Tell whether ``given`` may stand where ``wanted`` is expected; what cannot be judged passes."""
    if get_origin(wanted) is Annotated:
        return accepts(get_args(wanted)[0], given)
    if get_origin(given) is Annotated:
        return accepts(wanted, get_args(given)[0])
    if get_origin(given) in _UNIONS:
        return all(accepts(wanted, member) for member in get_args(given))
    if get_origin(wanted) in _UNIONS:
        return any(accepts(member, given) for member in get_args(wanted))
    wanted, given = get_origin(wanted) or wanted, get_origin(given) or given
    if wanted in _OPEN or given in _OPEN or not isinstance(wanted, type) or not isinstance(given, type):
        return True
    if getattr(wanted, "_is_protocol", False):
        return True
    return issubclass(given, (wanted, *_NUMBERS.get(wanted, ())))


def shown(annotation: Any) -> str:
    """Return an annotation as people write it."""
    if annotation is type(None):
        return "None"
    return annotation.__name__ if isinstance(annotation, type) and get_origin(annotation) is None else str(annotation)
