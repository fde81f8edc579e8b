"""Run a bus in a test: nothing leaves, time stands still, and settling is exact."""

import math
import time
from collections.abc import AsyncGenerator, Callable, Generator, Mapping, MutableMapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from random import Random
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import anyio
from anyio.lowlevel import checkpoint

from eventbus._extras import require
from eventbus.bus import EventBus
from eventbus.clock import Runtime, new_id
from eventbus.context import Context
from eventbus.dispatch import Receipt
from eventbus.errors import WiringError
from eventbus.message import Command
from eventbus.middleware import CallNext
from eventbus.store import DeadEntry, Store, connect
from eventbus.testing.clock import VirtualClock
from eventbus.transport import Delivery
from eventbus.transports.memory import MemoryTransport

if TYPE_CHECKING:
    import httpx
    from fastapi import FastAPI

__all__ = ("Harness", "NotSettledError", "UnobservedError", "harness")

R = TypeVar("R")
M = TypeVar("M")
Mode = Literal["inline", "queued"]

PATIENCE = 30.0
"""Real seconds after which work that does not end is reported instead of waited for."""

HUNG = 1.0
"""Real seconds after which handlers that do nothing seem to wait for their timeout, which only time can bring."""

STEPS = 10
"""Turns of the event loop, without anything left to do, after which every task has set its next timer."""


class NotSettledError(AssertionError):
    """Say what was still going on when the patience of ``settled()`` ended."""


class UnobservedError(AssertionError):
    """Say which messages died without the test looking at ``t.dead``."""


class Harness:
    """Drive a bus from a test; made by ``harness``."""

    def __init__(self, bus: EventBus, clock: VirtualClock) -> None:
        self.bus = bus
        self.clock = clock
        self._client: httpx.AsyncClient | None = None
        self._dead: list[DeadEntry] = []
        self._seen: set[str] = set()
        self._hung: set[Delivery] = set()
        self.events: list[Any] = []
        """Every event published, in order, once its transaction has committed."""
        self.handlings: list[tuple[str, Any, BaseException | None]] = []
        """Every handling that ended: handler, message, what it raised."""

    @property
    def client(self) -> "httpx.AsyncClient":
        """An HTTP client on the application, in this event loop. Raises ``RuntimeError`` without ``app=``."""
        if self._client is None:
            raise RuntimeError("there is no client: harness(bus, app=app)")
        return self._client

    def connect(self, client: "httpx.AsyncClient") -> None:
        """Give the test its HTTP client."""
        self._client = client

    async def send(self, command: Command[R]) -> R:
        """Send a command and return its result."""
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
        receipts = await self.bus.publish_many([event], key=key, delay=delay, headers=headers, atomic=atomic)
        return receipts[0]

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
        return await self.bus.enqueue(command, key=key, delay=delay, headers=headers, atomic=atomic)

    async def settled(self) -> None:
        """Return when nothing runs and nothing is due at the current virtual time.

        Raises ``NotSettledError`` naming what does not end within ``PATIENCE`` real seconds.
        """
        await self._settle(moving=False)
        self._dead = await self.bus.dead.find(limit=1_000_000)

    async def advance(self, seconds: float) -> None:
        """Move the clock, stopping at every due time on the way, and settle at each.

        A handler that does nothing while its ``timeout=`` runs is left to it. Raises ``NotSettledError`` as
        ``settled()``, and ``ValueError`` for a way back.
        """
        if not 0 <= seconds < math.inf:
            raise ValueError(f"advance() takes the seconds to move on, 0 or more, not {seconds!r}")
        target = self.clock.monotonic() + seconds
        await self._settle(moving=True)
        while (due := self.clock.next_due()) is not None and due <= target:
            self.clock.jump(due)
            await self._settle(moving=True)
        self.clock.jump(target)
        await self._settle(moving=True)
        self._dead = await self.bus.dead.find(limit=1_000_000)

    def published(self, type: type[M], /, **facts: Any) -> list[M]:
        """Return the published events of a type whose fields have these values."""
        return [event for event in self.events if isinstance(event, type) and _has(event, facts)]

    def sent(self, type: type[M], /, **facts: Any) -> list[M]:
        """Return the handled commands of a type whose fields have these values."""
        return [message for _, message, _ in self.handlings if isinstance(message, type) and _has(message, facts)]

    def handled(self, handler: str) -> list[Any]:
        """Return the messages that a handler, by its stable name, has handled without an error."""
        return [message for name, message, error in self.handlings if name == handler and error is None]

    @property
    def dead(self) -> list[DeadEntry]:
        """The dead as of the last ``settled`` or ``advance``; looking at one that died is observing it."""
        self._seen.update(entry.id for entry in self._dead)
        return self._dead

    def unobserved(self) -> list[DeadEntry]:
        """Return the dead that nobody has looked at."""
        return [entry for entry in self._dead if entry.id not in self._seen]

    async def record(self, ctx: Context, call_next: CallNext) -> Any:
        """Be the outermost middleware: note what was handled and how it ended."""
        try:
            result = await call_next(ctx)
        except BaseException as error:
            self.handlings.append((ctx.handler, ctx.message, error))
            raise
        self.handlings.append((ctx.handler, ctx.message, None))
        return result

    def abandon(self) -> None:
        """Cancel what still runs: the test is over, and no time will pass any more for a drain to end by."""
        if self.bus.engine.worker is not None:
            self.bus.engine.worker.cut()

    async def _settle(self, *, moving: bool) -> None:
        with anyio.move_on_after(PATIENCE) as scope:
            await self._quiet(moving)
        if scope.cancelled_caught:
            worker = self.bus.engine.worker
            running = [
                f"{len(channel.running)} x {channel.source.name}"
                for channel in (worker.channels if worker else [])
                if channel.running
            ]
            what = ", ".join(running) or "messages that nobody took"
            hint = "; a timeout= runs out in advance() only" if self.clock.timed and not moving else ""
            raise NotSettledError(f"after {PATIENCE:g} s still going on: {what}{hint}")

    async def _quiet(self, moving: bool) -> None:
        engine, steps = self.bus.engine, 0
        while steps < STEPS:
            await checkpoint()
            left = 0 if engine.worker is None else engine.outstanding()
            steps = 0 if left or self.clock.waking else steps + 1
            if engine.worker is None or not left or self.clock.waking:
                continue
            if not moving:
                await engine.worker.changed.wait()
                continue
            running = {delivery for channel in engine.worker.channels for delivery in channel.running}
            if running and running == self._hung and left <= self.clock.timed:
                return
            with anyio.move_on_after(HUNG) as scope:
                await engine.worker.changed.wait()
            if scope.cancelled_caught and engine.outstanding() <= self.clock.timed:
                self._hung = running
                return


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
        mode: "queued" keeps the routes and sends bytes through queues; "inline" handles everything at once.
        store: a store instead of the bus's own; a bus that needs one and has none gets one in memory.
        overrides: dependency -> replacement, for handlers and (with ``app``) endpoints.
        seed: makes jitter repeatable.

    Raises ``UnobservedError`` at the end if a message died and nobody looked at ``t.dead``, and ``RuntimeError`` for a
    bus that runs already.

    >>> import anyio
    >>> async def main() -> None:
    ...     async with harness(EventBus()) as t:
    ...         await t.settled()
    >>> anyio.run(main)
    """
    if mode not in ("inline", "queued"):
        raise ValueError(f'harness(mode=...) takes "inline" or "queued", not {mode!r}')
    if _runs(bus):
        raise RuntimeError("harness(bus): this bus runs already; leave its lifetime, or the other harness, first")
    wiring = bus.wiring
    clock = VirtualClock() if seed is not None else VirtualClock(start=float(math.ceil(time.time())))
    parts: dict[str, Any] = {
        "transports": {name: MemoryTransport(limits=wiring.limits, clock=clock) for name in wiring.transports}
    }
    if store is not None:
        parts["store"] = store
    t = Harness(bus, clock)
    parts["middleware"] = (t.record, *wiring.middleware)
    runtime = Runtime(clock, new_id, Random(seed))
    async with AsyncExitStack() as stack:
        stack.enter_context(_replaced(overrides or {}, bus.overrides))
        if app is not None:
            stack.enter_context(_replaced(overrides or {}, app.dependency_overrides))
        stack.enter_context(bus.rewired(runtime, **parts))
        _compile(bus, runtime, stack)
        if bus.wiring.store is not None:
            bus.wiring.store.bind(clock)
            stack.callback(bus.wiring.store.bind, None)
        bus.engine.observe(t.events.append)
        bus.engine.dispatch.at_once = mode == "inline"
        bus.engine.consumes = True
        if app is not None:
            state = await stack.enter_async_context(app.router.lifespan_context(app))
            t.connect(await stack.enter_async_context(_client(app, state)))
        if bus.engine.state != "running":
            await stack.enter_async_context(bus.running())
        try:
            yield t
            await t.settled()
        except BaseException:
            t.abandon()
            raise
    unseen = t.unobserved()
    if unseen:
        raise UnobservedError(
            f"{len(unseen)} message(s) died unobserved:\n"
            + "\n".join(f"  {entry.message} in {entry.handler}: {entry.error}" for entry in unseen)
        )


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


def _compile(bus: EventBus, runtime: Runtime, stack: AsyncExitStack) -> None:
    """Compile the bus; give it a store if that is what it lacks."""
    try:
        bus.compile()
    except WiringError as faults:
        if bus.wiring.store is not None:
            raise
        stack.enter_context(bus.rewired(runtime, store=connect("memory://")))
        try:
            bus.compile()
        except WiringError:
            raise faults from None


def _runs(bus: EventBus) -> bool:
    try:
        return bus.engine.state == "running"
    except WiringError:
        return False


def _client(app: "FastAPI", state: Mapping[str, Any] | None) -> "httpx.AsyncClient":
    async def served(scope: "MutableMapping[str, Any]", receive: Any, send: Any) -> None:
        await app({**scope, "state": dict(state or {})}, receive, send)

    library = require("httpx", extra="testing", what="harness(app=...)")
    client: httpx.AsyncClient = library.AsyncClient(transport=library.ASGITransport(app=served), base_url="http://test")
    return client


def _has(message: object, facts: Mapping[str, Any]) -> bool:
    return all(getattr(message, name, _ABSENT) == value for name, value in facts.items())


_ABSENT = object()
