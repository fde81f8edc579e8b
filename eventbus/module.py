"""A named group of handlers, as a router is of routes: the unit of a modular monolith."""

from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Concatenate, Generic, Literal, ParamSpec, Protocol, TypeVar, cast, overload

from eventbus.errors import WiringError
from eventbus.handler import Handler, Options, describe
from eventbus.message import Command, check_message_type, is_command
from eventbus.middleware import Middleware
from eventbus.retry import Retry

__all__ = ("Module", "checked")

P = ParamSpec("P")
A = TypeVar("A")
B = TypeVar("B")
D = TypeVar("D")
X = TypeVar("X")
C = TypeVar("C")
R = TypeVar("R")
E = TypeVar("E")
C_co = TypeVar("C_co", covariant=True)
R_co = TypeVar("R_co", covariant=True)

OnDead = Literal["continue", "block"]


class Answers(Protocol[C_co, R_co]):
    """Match a command class, which ties the command to its result for type checkers."""

    def __eventbus_result__(self) -> tuple[C_co, R_co]: ...


class Handles(Generic[C, R]):
    """Register a function that takes the command first and returns its result; the function stays as it is."""

    def __init__(self, register: Callable[[Callable[..., Any]], None]) -> None:
        self._register = register

    @overload
    def __call__(
        self, func: Callable[Concatenate[C, P], Coroutine[Any, Any, R]], /
    ) -> Callable[Concatenate[C, P], Coroutine[Any, Any, R]]: ...
    @overload
    def __call__(self, func: Callable[Concatenate[C, P], R], /) -> Callable[Concatenate[C, P], R]: ...
    def __call__(self, func: Callable[..., Any], /) -> Callable[..., Any]:
        self._register(func)
        return func


class On(Generic[E]):
    """Register a function that takes the event first; the function stays as it is."""

    def __init__(self, register: Callable[[Callable[..., Any]], None]) -> None:
        self._register = register

    def __call__(self, func: Callable[Concatenate[E, P], X], /) -> Callable[Concatenate[E, P], X]:
        self._register(func)
        return func


class Module:
    """Group handlers under a name; a handler's stable name is ``<module name>.<function>``.

    Args:
        name: the module's name, the first part of its handlers' identity.
        messages: message types that the module speaks without handling them here.
        imports: dotted names of Python modules to import when the bus compiles, so that no handler file is forgotten.
        middleware: what goes around every handler of this module, outermost first, inside the bus's own.

    Raises ``ValueError`` for a name that cannot be part of an identity, ``TypeError`` for what is no message type and
    no middleware.

    >>> from eventbus import Event
    >>> class Placed(Event):
    ...     order: int
    >>> orders = Module("orders")
    >>> @orders.on(Placed)
    ... async def audit(event: Placed) -> None:
    ...     print(event.order)
    >>> [handler.name for handler in orders.handlers]
    ['orders.audit']
    """

    def __init__(
        self,
        name: str,
        *,
        messages: Sequence[type] = (),
        imports: Sequence[str] = (),
        middleware: Sequence[Middleware] = (),
    ) -> None:
        if not isinstance(name, str) or not name.isprintable() or name.strip() != name or not name or "/" in name:
            raise ValueError(f"a module's name is printable text without '/' and blanks at its ends, not {name!r}")
        if isinstance(imports, str) or isinstance(messages, type):
            raise ValueError(f"Module({name!r}): messages= and imports= take a list")
        for message in messages:
            check_message_type(message)
        self.name = name
        self.messages = tuple(messages)
        self.imports = tuple(imports)
        self.middleware = checked(f"Module({name!r})", middleware)
        self._handlers: list[Handler] = []
        self._frozen = False

    @property
    def handlers(self) -> tuple[Handler, ...]:
        """Return the handlers registered so far, in registration order."""
        return tuple(self._handlers)

    def freeze(self) -> None:
        """Refuse further handlers: a bus has compiled this module."""
        self._frozen = True

    def handles(
        self,
        command: Answers[C, R],
        /,
        *,
        name: str | None = None,
        aliases: Sequence[str] = (),
        retry: Retry | None = None,
        timeout: float | None = None,
        concurrency: int | None = None,
        ordered: bool = False,
        on_dead: OnDead = "continue",
    ) -> Handles[C, R]:
        """Register the one handler of a command.

        Args:
            command: the command class; the handler takes it first and returns its result type.
            name: the function's name in the stable name, default the one it has.
            aliases: former stable names, whose waiting messages it takes over; one without a dot is a former function
                of this module.
            retry: when a failed handling is tried again; waits for a route, ``send`` never retries.
            timeout: seconds that one handling may take; not for plain ``def`` handlers, whose thread goes on.
            concurrency: handlings at once in one process.
            ordered: handle equal keys one after another, on a route.
            on_dead: whether later messages of a key "continue" or "block" when one of it is dead.

        Returns a decorator that returns the function unchanged. Raises ``TypeError`` for anything but a command class
        and for what cannot be a handler, ``ValueError`` for a value that cannot work, ``WiringError`` once a bus has
        compiled the module.

        >>> from eventbus import Command
        >>> class Double(Command[int]):
        ...     number: int
        >>> @Module("math").handles(Double)
        ... async def double(cmd: Double) -> int:
        ...     return cmd.number * 2
        """
        check_message_type(command)
        if not (isinstance(command, type) and is_command(command)):
            raise TypeError(f"handles() takes a command; {getattr(command, '__name__', command)} is an event: use on()")
        if cast("object", command) is Command:
            raise TypeError("handles() takes one command class: each has a handler of its own")
        options = Options(
            name=name, aliases=_names(aliases), retry=Retry() if retry is None else retry, timeout=timeout,
            concurrency=concurrency, ordered=ordered, on_dead=on_dead,
        )  # fmt: skip
        return Handles(lambda func: self._add(func, (command,), options))

    @overload
    def on(
        self, event: type[E], /, *, name: str | None = ..., aliases: Sequence[str] = ...,
        retry: Retry | None = ..., timeout: float | None = ..., concurrency: int | None = ..., ordered: bool = ...,
        on_dead: OnDead = ..., inline: bool = ...,
    ) -> On[E]: ...  # fmt: skip
    @overload
    def on(
        self, event: type[A], second: type[B], /, *, name: str | None = ..., aliases: Sequence[str] = ...,
        retry: Retry | None = ..., timeout: float | None = ..., concurrency: int | None = ..., ordered: bool = ...,
        on_dead: OnDead = ..., inline: bool = ...,
    ) -> On[A | B]: ...  # fmt: skip
    @overload
    def on(
        self, event: type[A], second: type[B], third: type[D], /, *, name: str | None = ...,
        aliases: Sequence[str] = ..., retry: Retry | None = ..., timeout: float | None = ...,
        concurrency: int | None = ..., ordered: bool = ..., on_dead: OnDead = ..., inline: bool = ...,
    ) -> On[A | B | D]: ...  # fmt: skip
    @overload
    def on(
        self, event: type[Any], second: type[Any], third: type[Any], fourth: type[Any], /, *more: type[Any],
        name: str | None = ..., aliases: Sequence[str] = ..., retry: Retry | None = ..., timeout: float | None = ...,
        concurrency: int | None = ..., ordered: bool = ..., on_dead: OnDead = ..., inline: bool = ...,
    ) -> On[Any]: ...  # fmt: skip
    def on(
        self,
        event: type[Any],
        /,
        *more: type[Any],
        name: str | None = None,
        aliases: Sequence[str] = (),
        retry: Retry | None = None,
        timeout: float | None = None,
        concurrency: int | None = None,
        ordered: bool = False,
        on_dead: OnDead = "continue",
        inline: bool = False,
    ) -> On[Any]:
        """Register a handler of one or several event types, or of a base class of them.

        Args:
            event: a pydantic model or dataclass class; subclasses of it are handled too.
            more: further types for the same handler.
            inline: run in the publisher's task even if the event has a route.
            name, aliases, retry, timeout, concurrency, ordered, on_dead: as for ``handles``.

        A handler annotated to return a message (or a list of them) has what it returns published, and commands
        enqueued, together with its success. Returns a decorator that returns the function unchanged. Raises
        ``TypeError`` for a command class and for what is no message type, otherwise as ``handles``.

        >>> from eventbus import Event
        >>> class Paid(Event):
        ...     order: int
        >>> class Shipped(Event):
        ...     order: int
        >>> @Module("shipping").on(Paid, retry=Retry(attempts=3), timeout=10.0)
        ... async def ship(event: Paid) -> Shipped:
        ...     return Shipped(order=event.order)
        """
        types = (event, *more)
        for one in types:
            check_message_type(one)
            if is_command(one):
                raise TypeError(f"on() takes events; {one.__name__} is a command: use handles()")
        if len(set(types)) != len(types):
            raise TypeError(f"on() names {', '.join(one.__name__ for one in types)}: each type once")
        options = Options(
            name=name, aliases=_names(aliases), retry=Retry() if retry is None else retry, timeout=timeout,
            concurrency=concurrency, ordered=ordered, on_dead=on_dead, inline=inline,
        )  # fmt: skip
        return On(lambda func: self._add(func, types, options))

    def _add(self, func: Callable[..., Any], types: tuple[type, ...], options: Options) -> None:
        handler = describe(self.name, func, types, options)
        if self._frozen:
            fault = (
                f"handler {handler.name} came after the bus compiled module {self.name!r}: import its file before, "
                f"or name it in Module({self.name!r}, imports=[...])"
            )
            raise WiringError([fault])
        self._handlers.append(handler)

    def __repr__(self) -> str:
        return f"Module({self.name!r}, {len(self._handlers)} handlers)"


def checked(where: str, middleware: Sequence[Middleware]) -> tuple[Middleware, ...]:
    """Return the middleware given to ``where``. Raises ``TypeError`` for what cannot be one."""
    if not isinstance(middleware, Sequence):
        raise TypeError(f"{where}: middleware= takes a list: [{middleware!r}]")
    for around in middleware:
        if not callable(around) or isinstance(around, type):
            raise TypeError(f"{where}: a middleware is a function of ctx and call_next, not {around!r}")
    return tuple(middleware)


def _names(aliases: Sequence[str]) -> tuple[str, ...]:
    if isinstance(aliases, str):
        raise ValueError(f"aliases= takes a list of names: [{aliases!r}]")
    return tuple(aliases)
