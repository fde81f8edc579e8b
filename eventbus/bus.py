"""The bus: where the parts meet. Signatures that delegate, and the lifetime."""

import inspect
import os
import sys
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Mapping, MutableMapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

from eventbus import store as stores
from eventbus import transport as carriers
from eventbus._extras import load
from eventbus.clock import Runtime
from eventbus.context import Receipt
from eventbus.errors import WiringError
from eventbus.limits import Limits
from eventbus.message import Command, check_message_type
from eventbus.middleware import Middleware
from eventbus.module import Module, checked
from eventbus.routes import MEMORY, RESERVED, Routes
from eventbus.store import Store, Transaction
from eventbus.transport import Transport
from eventbus.wiring import Wiring

if TYPE_CHECKING:  # loaded when they are needed: a bus that is only imported must not make anybody wait
    from eventbus.catalog import Explanation
    from eventbus.config import Overridden
    from eventbus.dead import DeadLetters
    from eventbus.dispatch import Publish
    from eventbus.engine import Engine
    from eventbus.health import Health
    from eventbus.live import Gap, Stream

__all__ = ("EventBus",)

R = TypeVar("R")
E = TypeVar("E")


class SendOrEnqueueIt:
    """Be what publishing a command gives, to type checkers only: nothing that could be awaited."""


class EventBus:
    """Send commands to their one handler and publish events to all of theirs.

    Args:
        modules: the modules whose handlers this bus knows.
        name: who this is, to others: CloudEvents source, consumer group, owner of entries. Needed once anything
            leaves the process.
        store: a Store or its URL; keeps what is routed to ``"store"``.
        transports: name -> Transport or URL.
        routes: message type, wire name or pattern -> transport or list of them. No route = handled at once, inline.
        middleware: what goes around every handler, outermost first.
        limits: every time and ceiling.
        live: the transport that carries what ``stream`` gives to the other processes of this name; None: no other.
        config: a TOML file whose store, transports, routes and limits beat these; EVENTBUS_CONFIG names another one.

    Nothing is checked here but the arguments themselves (``TypeError``, ``ValueError``) and the configuration
    (``ConfigurationError``): ``compile()`` checks the wiring as a whole, and start-up calls it.

    >>> from anyio import run
    >>> class Double(Command[int]):
    ...     number: int
    >>> math = Module("math")
    >>> @math.handles(Double)
    ... async def double(cmd: Double) -> int:
    ...     return cmd.number * 2
    >>> run(EventBus(math).send, Double(number=21))
    42
    """

    def __init__(
        self,
        *modules: Module,
        name: str | None = None,
        store: Store | str | None = None,
        transports: Mapping[str, Transport | str] | None = None,
        routes: Mapping[Any, str | Sequence[str]] | None = None,
        middleware: Sequence[Middleware] = (),
        limits: Limits | None = None,
        live: str | None = None,
        config: str | os.PathLike[str] | None = None,
    ) -> None:
        for module in modules:
            if not isinstance(module, Module):
                raise TypeError(f"EventBus(...) takes modules first, not {module!r}")
        if name is not None and not (_is_text(name) and not set(name) & set("/>@*")):
            raise ValueError(f"a bus name is printable text without / > @ * and blanks at its ends, not {name!r}")
        limits = Limits() if limits is None else limits
        if not isinstance(limits, Limits):
            raise TypeError(f"limits= takes a Limits, not {limits!r}")
        given: Overridden = store, transports or {}, limits, {}
        if file := os.environ.get("EVENTBUS_CONFIG") or config:
            given = load("eventbus.config:override")(file, *given[:3])
        store, transports, limits, rules = given
        keeper = stores.connect(store, limits) if isinstance(store, str) else store
        if keeper is not None and not isinstance(keeper, Store):
            raise TypeError(f"store= takes a URL or a Store, not {keeper!r}")
        runtime = Runtime()
        opened = {label: _transport(label, where, limits) for label, where in transports.items()}
        opened[MEMORY] = load(carriers.SCHEMES[MEMORY])(limits=limits, clock=runtime.clock)
        self._overrides: MutableMapping[Callable[..., Any], Callable[..., Any]] = {}
        self._runtime = runtime
        self._engine: Engine | None = None
        self._sends: dict[type, Callable[[Any], Coroutine[Any, Any, Any]]] = {}
        self._publishes: dict[type, Publish] = {}
        self._wiring = Wiring(
            name=name,
            modules=tuple(modules),
            store=keeper,
            transports=opened,
            routes=Routes(routes or {}, rules),
            middleware=checked("EventBus", middleware),
            limits=limits,
            codec=load("eventbus.codec:JSONCodec")(limits),
            overrides=self._overrides,
            bus_type=EventBus,
            live=live,
        )

    @property
    def name(self) -> str | None:
        """The name of this bus."""
        return self._wiring.name

    @property
    def wiring(self) -> Wiring:
        """What the bus was given, for the test kit and adapters."""
        return self._wiring

    @property
    def overrides(self) -> MutableMapping[Callable[..., Any], Callable[..., Any]]:
        """Dependency -> replacement, looked up first at every handling; FastAPI's own mapping once installed."""
        return self._overrides

    @property
    def limits(self) -> Limits:
        """Every time and ceiling of this bus."""
        return self._wiring.limits

    @property
    def engine(self) -> "Engine":
        """The compiled bus, for the test kit and adapters; made at the first look."""
        engine = self._engine
        if engine is None:
            registry = load("eventbus.registry:compile_wiring")(self._wiring)
            made: Engine = load("eventbus.engine:Engine")(self, registry, self._runtime)
            engine = self._engine = made
        return engine

    @property
    def dead(self) -> "DeadLetters":
        """The dead: find, get, replay and discard them."""
        letters: DeadLetters = load("eventbus.dead:DeadLetters")(lambda: self.engine)
        return letters

    def compile(self) -> None:
        """Freeze the wiring. Raises one ``WiringError`` that lists every fault."""
        _ = self.engine

    def explain(self, what: type | str | None = None) -> "Explanation":
        """Return who handles a message, where it goes and what is promised there; ``str()`` of it is for people.

        Args:
            what: a message type, its wire name or its class name; default: everything.

        Raises ``UnknownMessageError`` for a name that is not registered, ``TypeError`` for what is no message.

        >>> print(EventBus().explain())
        bus (no name): 0 messages
        """
        registry = self.engine.registry
        if what is None:
            subjects = list(registry.subjects.values())
        else:
            type_ = registry.called(what) if isinstance(what, str) else what
            check_message_type(type_)
            subjects = [registry.subject(type_)]
        explained: Explanation = load("eventbus.catalog:explain")(registry, subjects)
        return explained

    if sys.version_info >= (3, 12):

        def send(self, command: Command[R], /) -> Coroutine[Any, Any, R]:
            """Run the handler of a command now and return its result; its exception arrives unchanged.

            Raises ``NoHandlerError`` if nobody handles it here, ``TypeError`` for an event.
            """
            try:
                call = self._sends[type(command)]
            except KeyError:
                call = self._sender(type(command))
            return call(command)

    else:

        async def send(self, command: Command[R], /) -> R:
            """Run the handler of a command now and return its result; its exception arrives unchanged.

            Raises ``NoHandlerError`` if nobody handles it here, ``TypeError`` for an event.
            """
            try:
                call = self._sends[type(command)]
            except KeyError:
                call = self._sender(type(command))
            result: R = await call(command)
            return result

    @overload
    def publish(  # type: ignore[overload-overlap]  # so that publishing a command is refused where it is written
        self, event: Command[Any], /, *, key: str | None = None, delay: float | None = None,
        headers: Mapping[str, str] | None = None, atomic: bool = True,
    ) -> SendOrEnqueueIt: ...  # fmt: skip
    @overload
    async def publish(
        self, event: object, /, *, key: str | None = None, delay: float | None = None,
        headers: Mapping[str, str] | None = None, atomic: bool = True,
    ) -> Receipt: ...  # fmt: skip
    async def publish(  # type: ignore[misc]  # the first overload is never true
        self,
        event: object,
        /,
        *,
        key: str | None = None,
        delay: float | None = None,
        headers: Mapping[str, str] | None = None,
        atomic: bool = True,
    ) -> Receipt:
        """Publish an event: run its inline handlers, and make it safe where its route says.

        Args:
            event: a pydantic model or dataclass that is no command.
            key: what keeps its order, instead of the message's own key.
            delay: seconds before it is handled; needs a route.
            headers: text to travel along.
            atomic: False to publish a durable message outside a transaction.

        Returns a receipt with the message's id. Raises an ``ExceptionGroup`` of what inline handlers raised,
        ``NotRunningError``, ``NoTransactionError``, ``QueueFullError``, ``EncodeError``, ``ValueError``, ``TypeError``.

        >>> from anyio import run
        >>> from eventbus import Event
        >>> class Paid(Event):
        ...     order: int
        >>> isinstance(run(EventBus().publish, Paid(order=7)), Receipt)
        True
        """
        publish = self._publishes.get(type(event))
        if publish is None:
            publish = self._publishes[type(event)] = self.engine.dispatch.publisher(type(event))
        return await publish(event, key, delay, headers, atomic)

    async def publish_many(
        self,
        events: Sequence[object],
        /,
        *,
        key: str | None = None,
        delay: float | None = None,
        headers: Mapping[str, str] | None = None,
        atomic: bool = True,
    ) -> list[Receipt]:
        """Publish several events, their routed parts together; everything else as ``publish``."""
        return await self.engine.dispatch.publish(events, key, delay, headers, atomic)

    async def enqueue(
        self,
        command: Command[Any],
        /,
        *,
        key: str | None = None,
        delay: float | None = None,
        headers: Mapping[str, str] | None = None,
        atomic: bool = True,
    ) -> Receipt:
        """Send a command through its route, for later; its result is dropped.

        Arguments and errors as ``publish``; a command without a route is a ``ValueError``.
        """
        return await self.engine.dispatch.enqueue(command, key, delay, headers, atomic)

    def transaction(self, session: object | None = None) -> AbstractAsyncContextManager[Transaction[Any]]:
        """Open a transaction of the store: whoever opens it commits it; inside another one it is a savepoint.

        Everything published inside leaves after the commit, and not at all after a rollback.

        Args:
            session: a session or connection of yours to join, where the store can.
        """
        self.engine.require("bus.transaction()")
        return self.engine.entries.transaction(session)

    @overload
    def stream(
        self, event: type[E], /, *more: type[E], buffer: int = 100, slow: Literal["drop"] = "drop"
    ) -> "AbstractAsyncContextManager[Stream[E | Gap]]": ...
    @overload
    def stream(
        self, event: type[E], /, *more: type[E], buffer: int = 100, slow: Literal["disconnect"]
    ) -> "AbstractAsyncContextManager[Stream[E]]": ...
    @asynccontextmanager
    async def stream(
        self, event: type[Any], /, *more: type[Any], buffer: int = 100, slow: Literal["drop", "disconnect"] = "drop"
    ) -> "AsyncGenerator[Stream[Any]]":
        """Open a live stream of events, for a WebSocket or server-sent events; at most once, after commit.

        Args:
            event, more: the event types (subclasses included).
            buffer: events kept for a reader that is behind.
            slow: "drop" lets the oldest go and yields ``Gap(missed)`` in their place; "disconnect" ends the stream
                with ``SlowConsumerError``.
        """
        async with self.engine.stream((event, *more), buffer, slow) as stream:
            yield stream

    @asynccontextmanager
    async def running(self, consume: bool = True) -> AsyncGenerator["EventBus"]:
        """Run the bus: open its store and transports, handle what is routed here, and drain at the end.

        Args:
            consume: False only publishes (a web process whose workers are elsewhere).

        Raises ``WiringError`` before anything is opened.

        >>> import anyio
        >>> async def main() -> None:
        ...     async with EventBus().running() as bus:
        ...         print(bus.health().healthy)
        >>> anyio.run(main)
        True
        """
        async with self.engine.running(consume):
            yield self

    def _sender(self, type_: type) -> Callable[[Any], Coroutine[Any, Any, Any]]:
        try:
            call = self._sends[type_] = self.engine.dispatch.sender(type_)
        except Exception as error:
            error.__suppress_context__ = True  # that it was looked for in a table is nobody's concern
            raise
        return call

    def health(self) -> "Health":
        """Return how the bus and its parts are doing."""
        reported: Health = load("eventbus.health:report")(self.engine)
        return reported

    def share_overrides(self, overrides: MutableMapping[Callable[..., Any], Callable[..., Any]]) -> None:
        """Look dependencies up in ``overrides`` first, by reference. Raises ``WiringError`` while the bus runs."""
        if self._engine is not None and self._engine.state == "running":
            raise WiringError(["overrides can be shared before the bus runs: call install(app, bus) earlier"])
        self._overrides = overrides
        self._wiring = replace(self._wiring, overrides=overrides)
        self._engine, self._sends, self._publishes = None, {}, {}

    @contextmanager
    def rewired(self, runtime: Runtime, **parts: Any) -> Generator[None]:
        """Run with other parts for a while (the test kit's door); everybody who holds the bus sees the change."""
        before = self._wiring, self._runtime, self._engine, self._sends, self._publishes
        self._wiring, self._runtime = replace(self._wiring, **parts), runtime
        self._engine, self._sends, self._publishes = None, {}, {}
        try:
            yield
        finally:
            self._wiring, self._runtime, self._engine, self._sends, self._publishes = before

    def __repr__(self) -> str:
        return f"EventBus(name={self.name!r}, modules={[module.name for module in self._wiring.modules]})"


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value.isprintable() and value.strip() == value != ""


def _transport(label: str, where: Transport | str, limits: Limits) -> Transport:
    if label in RESERVED:
        raise ValueError(f"transports: {label!r} is built in; call yours another name")
    if not _is_text(label):
        raise ValueError(f"transports: a name is printable text without blanks at its ends, not {label!r}")
    transport = carriers.connect(where, limits) if isinstance(where, str) else where
    if not isinstance(transport, Transport):
        raise TypeError(f"transports: {label!r} takes a URL or a Transport, not {transport!r}")
    return transport


if sys.version_info >= (3, 12):
    inspect.markcoroutinefunction(EventBus.send)
