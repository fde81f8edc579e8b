"""Run a bus in a test: nothing leaves, time stands still, and settling is exact."""

import math
import time
from collections.abc import AsyncGenerator, Callable, Generator, Mapping, MutableMapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import replace
from functools import partial
from random import Random, SystemRandom
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from eventbus._extras import require
from eventbus.bus import EventBus
from eventbus.clock import Runtime, new_id
from eventbus.context import Receipt
from eventbus.errors import AlreadyRunningError, WiringError
from eventbus.message import Command
from eventbus.store import DeadEntry, Store, connect
from eventbus.testing.clock import Chore, VirtualClock
from eventbus.testing.record import Handling, Record, Seen
from eventbus.testing.rehearsal import Rehearsal, RehearsedFaults, seeded_scheduler
from eventbus.testing.settling import Settling
from eventbus.testing.standins import Stub, Stubs, Understudy, named
from eventbus.testing.watched import Faults, WatchedStore, WatchedTransport

if TYPE_CHECKING:
    import httpx
    from fastapi import FastAPI

__all__ = ("Harness", "Mode", "harness")

R = TypeVar("R")
M = TypeVar("M")
Mode = Literal["inline", "queued", "rehearsal"]
MODES = ("inline", "queued", "rehearsal")

SEEDS = 1_000_000
"""How many seeds there are to draw from, when none is given."""
ALL = 1_000_000
"""How many of the dead are looked at."""


class Harness:
    """Drive a bus from a test; made by ``harness``."""

    def __init__(self, bus: EventBus, clock: VirtualClock, rehearsal: Rehearsal | None = None) -> None:
        self.bus = bus
        self.clock = clock
        self.rehearsal = rehearsal
        """The seed and the schedule of ``mode="rehearsal"``, else None."""
        ids = new_id if rehearsal is None else partial(rehearsal.new_id, clock)
        self.record = Record(clock.monotonic, ids, None if rehearsal is None else rehearsal.perform)
        self.stubs = Stubs()
        self._settling = Settling(bus, clock, self.record, None)
        self._client: httpx.AsyncClient | None = None
        self._app: FastAPI | None = None
        self._state: Mapping[str, Any] = {}
        self._dead: list[DeadEntry] = []
        self._looked: set[str] = set()
        self._calls = 0

    @property
    def client(self) -> "httpx.AsyncClient":
        """An HTTP client on the application, in this event loop. Raises ``RuntimeError`` without ``app=``."""
        if self._client is None:
            raise RuntimeError("there is no client: harness(bus, app=app)")
        return self._client

    @property
    def events(self) -> list[Any]:
        """Every event published, in order, once its transaction has committed."""
        return self.record.events

    @property
    def handlings(self) -> list[Handling]:
        """Every handling, in the order of their beginnings."""
        return self.record.handlings

    @property
    def calls(self) -> int:
        """How many calls of this test's own are under way."""
        return self._calls

    @contextmanager
    def call(self) -> Generator[None]:
        """Count a call of this test's own."""
        self._calls += 1
        try:
            yield
        finally:
            self._calls -= 1

    async def send(self, command: Command[R]) -> R:
        """Send a command and return its result."""
        with self.call():
            return await self.bus.send(command)

    async def publish(
        self,
        event: object,
        /,
        *,
        key: str | None = None,
        delay: float | None = None,
        headers: Mapping[str, str] | None = None,
        atomic: bool = False,
    ) -> Receipt:
        """Publish an event; no transaction is needed here."""
        with self.call():
            [receipt] = await self.bus.publish_many([event], key=key, delay=delay, headers=headers, atomic=atomic)
        return receipt

    async def enqueue(
        self,
        command: Command[Any],
        /,
        *,
        key: str | None = None,
        delay: float | None = None,
        headers: Mapping[str, str] | None = None,
        atomic: bool = False,
    ) -> Receipt:
        """Enqueue a command; no transaction is needed here."""
        with self.call():
            return await self.bus.enqueue(command, key=key, delay=delay, headers=headers, atomic=atomic)

    async def settled(self) -> None:
        """Return when nothing runs and nothing is due at the current virtual time.

        Raises ``NotSettledError`` naming what does not end within 30 real seconds.
        """
        await self._settling.settle()
        self._dead = await self.bus.dead.find(limit=ALL)

    async def advance(self, seconds: float) -> None:
        """Move the clock, stopping at every due time on the way, and settle at each.

        A handler that does nothing while its ``timeout=`` runs is left to it. Raises ``NotSettledError`` as
        ``settled()``, and ``ValueError`` for a way back.
        """
        await self._settling.advance(seconds)
        self._dead = await self.bus.dead.find(limit=ALL)

    def published(self, type: type[M], /, **facts: Any) -> Seen[M]:
        """Return the published events of a type whose fields have these values; shown empty, it says what there was."""
        return self.record.published(type, facts)

    def sent(self, type: type[M], /, **facts: Any) -> Seen[M]:
        """Return the handled commands of a type whose fields have these values; shown empty, it says what there was."""
        return self.record.sent(type, facts)

    def handled(self, handler: str | Callable[..., Any]) -> Seen[Any]:
        """Return the messages that a handler, given by its stable name or function, handled without an error."""
        return self.record.handled(handler if isinstance(handler, str) else self._named(handler))

    def failed(self, handler: str | Callable[..., Any]) -> list[Exception]:
        """Return what a handler raised at any attempt; looking at a failure is observing it."""
        return self.record.failed(self._named(handler))

    @property
    def dead(self) -> list[DeadEntry]:
        """The dead as of the last ``settled`` or ``advance``; looking at one that died is observing it."""
        self._looked.update(entry.id for entry in self._dead)
        return self._dead

    def stub(
        self,
        handler: str | Callable[..., Any],
        *,
        returns: Any = None,
        raises: BaseException | None = None,
        calls: Callable[[Any], Any] | None = None,
    ) -> Stub:
        """Let something else stand in for a handler until the test ends: what it asks for is not opened.

        Args:
            handler: its function or its stable name.
            returns: what it returns.
            raises: what it raises instead.
            calls: what is called with the message and gives the result, awaited if need be.

        Returns the stub, whose ``messages`` are what came. Raises ``ValueError`` if there is no such handler.
        """
        return self.stubs.add(Stub(self._named(handler), returns, raises, calls))

    def tree(self) -> str:
        """Return who caused what: every message with its handlings, their attempts and times."""
        return "\n".join(self.record.tree())

    def begin(self, store: WatchedStore | None) -> None:
        """Take what has been started for the test."""
        self._settling = Settling(self.bus, self.clock, self.record, store)
        if self.rehearsal is not None:
            self.rehearsal.watch(store, lambda: self._calls)
        worker = self.bus.engine.worker
        if worker is not None:
            self.record.news = worker.changed.fire
            if store is not None:
                store.news = worker.changed.fire

    def connect(self, app: "FastAPI", state: Mapping[str, Any] | None) -> "httpx.AsyncClient":
        """Give the test an HTTP client on an application whose lifespan runs; return it, to be entered."""
        self._app, self._state = app, dict(state or {})
        library = require("httpx", extra="testing", what="harness(app=...)")
        transport = library.ASGITransport(app=self.served)
        client: httpx.AsyncClient = library.AsyncClient(transport=transport, base_url="http://test")
        self._client = client
        return client

    async def served(self, scope: "MutableMapping[str, Any]", receive: Any, send: Any) -> None:
        """Be the application, with the state of its lifespan. Raises ``RuntimeError`` without ``app=``."""
        if self._app is None:
            raise RuntimeError("there is no application: harness(bus, app=app)")
        with self.call():
            await self._app({**scope, "state": dict(self._state)}, receive, send)

    def abandon(self) -> None:
        """Cancel what still runs: the test is over, and no time will pass any more for a drain to end by."""
        if self.rehearsal is not None:
            self.rehearsal.stage.over = True
        if self.bus.engine.worker is not None:
            self.bus.engine.worker.cut()

    def check(self) -> None:
        """Raise what fails a test that has passed: what nobody looked at, and what a rehearsal has found."""
        unobserved = self.record.unobserved(self._dead, self._looked, self.bus.engine.owner)
        if unobserved is not None:
            raise unobserved
        if self.rehearsal is not None:
            self.rehearsal.judge()

    def explain(self, error: BaseException) -> None:
        """Add to what fails the test what may be behind it."""
        unobserved = self.record.unobserved([], set(), self.bus.engine.owner)
        if unobserved is not None and unobserved is not error and not isinstance(error, type(unobserved)):
            error.add_note(f"meanwhile, in handlers:\n{unobserved}")
        if self.rehearsal is not None:
            self.rehearsal.sign(error)

    def _named(self, handler: str | Callable[..., Any]) -> str:
        return named(handler, (known.handler for known in self.bus.engine.registry.known))


@asynccontextmanager
async def harness(
    bus: EventBus,
    *,
    app: "FastAPI | None" = None,
    mode: Mode = "queued",
    store: Store | None = None,
    overrides: Mapping[Callable[..., Any], Callable[..., Any]] | None = None,
    seed: int | None = None,
) -> AsyncGenerator[Harness]:
    """Run ``bus`` with its runtime swapped: transports in memory, time held still, everything else as it is.

    Args:
        bus: the application's own bus object; whoever holds it sees the swap.
        app: the application, for ``t.client``; its lifespan runs here.
        mode: "queued" keeps the routes and sends bytes through queues; "inline" handles everything at once;
            "rehearsal" is "queued" with duplicates, other orders, lost acknowledgements and failures from a seed.
        store: a store instead of the bus's own; a bus that needs one and has none gets one in memory.
        overrides: dependency or handler -> replacement; dependencies also for endpoints, with ``app``.
        seed: makes jitter repeatable, and the whole of a rehearsal; without it a rehearsal draws one and prints it.

    Raises ``UnobservedError`` at the end if a message died and nobody looked at ``t.dead``, or a delivered handling
    failed and nobody looked there or at ``t.failed(...)``; ``RehearsalError`` for what a rehearsal found by itself; and
    ``RuntimeError`` for a bus that runs already.

    >>> import anyio
    >>> async def main() -> None:
    ...     async with harness(EventBus()) as t:
    ...         await t.settled()
    >>> anyio.run(main)
    """
    if mode not in MODES:
        raise ValueError(f"harness(mode=...) takes {', '.join(MODES)}, not {mode!r}")
    if _runs(bus):
        raise AlreadyRunningError("harness(bus)")
    rehearsal = None
    if mode == "rehearsal":
        seed = SystemRandom().randrange(SEEDS) if seed is None else seed
        rehearsal = Rehearsal.of(seed, lambda: bus.engine)
    clock = VirtualClock() if seed is not None else VirtualClock(start=float(math.ceil(time.time())))
    t = Harness(bus, clock, rehearsal)
    runtime = Runtime(clock, t.record.new_id, Random(seed))
    async with AsyncExitStack() as stack:
        if seed is not None and rehearsal is not None:
            stack.enter_context(seeded_scheduler(seed))
        stack.enter_context(_replaced(overrides or {}, bus.overrides))
        if app is not None:
            stack.enter_context(_replaced(overrides or {}, app.dependency_overrides))
        watched = _swap(t, runtime, store, overrides or {}, stack)
        bus.engine.observe(t.events.append)
        bus.engine.dispatch.at_once = mode == "inline"
        bus.engine.consumes = True
        if app is not None:
            state = await stack.enter_async_context(app.router.lifespan_context(app))
            await stack.enter_async_context(t.connect(app, state))
        if bus.engine.state != "running":
            await stack.enter_async_context(bus.running())
        t.begin(watched)
        try:
            yield t
            await t.settled()
            t.check()
        except BaseException as error:
            t.explain(error)
            t.abandon()
            raise


def _swap(
    t: Harness,
    runtime: Runtime,
    store: Store | None,
    overrides: Mapping[Callable[..., Any], Callable[..., Any]],
    stack: AsyncExitStack,
) -> WatchedStore | None:
    """Give the bus the parts of the test until the stack ends, compile it, and return its store, watched."""
    bus, wiring = t.bus, t.bus.wiring
    faults = _Spared(t.record) if t.rehearsal is None else RehearsedFaults(t.rehearsal.seed, t.record.deal)
    limits = replace(wiring.limits, sweep=Chore(wiring.limits.sweep), lease=Chore(wiring.limits.lease))
    parts: dict[str, Any] = {
        "limits": limits,
        "transports": {name: WatchedTransport(faults, limits=limits, clock=t.clock) for name in wiring.transports},
        "middleware": (t.record.watch, *wiring.middleware),
        "modules": tuple(Understudy(module, overrides, t.stubs.stand_in) for module in wiring.modules),
    }
    keeper = wiring.store if store is None else store
    watched = None if keeper is None else WatchedStore(keeper, faults)
    stack.enter_context(bus.rewired(runtime, **parts, store=watched))
    try:
        bus.compile()
    except WiringError as found:
        if watched is not None:
            raise
        watched = WatchedStore(connect("memory://"), faults)
        stack.enter_context(bus.rewired(runtime, store=watched))
        try:
            bus.compile()
        except WiringError:
            raise found from None
    if watched is not None:
        watched.bind(runtime.clock)
        stack.callback(watched.bind, None)
    return watched


class _Spared(Faults):
    """Let nothing go wrong."""

    def __init__(self, record: Record) -> None:
        self._record = record

    def dealt(self, dead: Sequence[DeadEntry]) -> None:
        """Note that somebody replays or discards some of the dead."""
        self._record.deal(dead)


@contextmanager
def _replaced(
    overrides: Mapping[Callable[..., Any], Callable[..., Any]],
    shared: MutableMapping[Callable[..., Any], Callable[..., Any]],
) -> Generator[None]:
    before = dict(shared)
    shared.update(overrides)
    try:
        yield
    finally:
        shared.clear()
        shared.update(before)


def _runs(bus: EventBus) -> bool:
    try:
        return bus.engine.state == "running"
    except WiringError:
        return False
