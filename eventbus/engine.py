"""The parts of one bus, put together from its compiled wiring, and their lifetime."""

import os
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Literal

import anyio
from anyio.abc import TaskGroup
from anyio.lowlevel import EventLoopToken, current_token

from eventbus._loop import here, surely_in
from eventbus.broadcast import Broadcast
from eventbus.channel import Source
from eventbus.claims import Claims
from eventbus.clock import Ids, Runtime
from eventbus.context import Seed
from eventbus.dead import Graveyard, Named
from eventbus.dispatch import Dispatch, Posting
from eventbus.entries import Entries
from eventbus.errors import AlreadyRunningError, NotRunningError, TransactionOpenError, WiringError, WrongLoopError
from eventbus.invoker import Surroundings
from eventbus.keeping import StoreKeeper
from eventbus.ledger import Ledger
from eventbus.limits import Limits
from eventbus.link import Link
from eventbus.live import Live, Stream
from eventbus.registry import Registry
from eventbus.routes import MEMORY
from eventbus.sources import Countable, Sources, groups, ordered_groups
from eventbus.worker import Worker

__all__ = ("Engine",)

FLUSH = 2.0
"""Seconds, at the most, that live events have to get out when the bus stops."""


class Engine:
    """Run one compiled wiring; the bus makes a new one when a test swaps parts."""

    def __init__(self, bus: object, registry: Registry, runtime: Runtime) -> None:
        self.registry = registry
        self.runtime = runtime
        self.state = "not started"
        self.live = Live()
        self.worker: Worker | None = None
        self.ledger: Ledger | None = None
        """What writes to the store, while the bus runs and has one."""
        self._staff: TaskGroup | None = None
        self.claims: dict[str, Claims] = {}
        """Recipient -> its subscription to the store, while the worker runs."""
        self.consumes = False
        """Whether it consumes even if told to publish only (the test kit's, and the worker process's)."""
        self.only: Callable[[Source], bool] | None = None
        """Which sources it takes; None: all (the worker process's)."""
        self._watchers: list[Callable[[object], None]] = []
        self.links = {
            name: Link(name, transport, runtime, registry.wiring.limits)
            for name, transport in registry.wiring.transports.items()
        }
        carrier = self.links.get(registry.wiring.live or "")
        self.broadcast = None if carrier is None else Broadcast(registry, carrier, runtime, self.live)
        """What carries live events across processes, if anything does."""
        self.entries = Entries(registry, self.links, self.wake, self._spawn)
        entries = self.entries
        around = Surroundings(bus, runtime, entries.transaction, entries.unit, entries.flush_open, self._follow)
        self.dispatch = Dispatch(registry, around, self._post, self._feed)
        self._home: tuple[EventLoopToken, int] | None = None

    def require(self, operation: str) -> None:
        """Raise ``NotRunningError`` or ``WrongLoopError`` unless this is where the bus runs."""
        if self._surely_at_home():
            return
        if self._home is None:
            raise NotRunningError(operation, self.state)
        loop, process = self._home
        if process != os.getpid():
            raise WrongLoopError(operation, "a forked child process")
        if (place := here()) != loop:
            raise WrongLoopError(operation, "another event loop" if place else "a thread without an event loop")

    def _surely_at_home(self) -> bool:
        return self._home is not None and surely_in(self._home[0])

    def wake(self, recipients: frozenset[str] | None = None) -> None:
        """Let the worker look for what was written here for some recipients; None: elsewhere, for anybody."""
        if recipients is not None and self.ledger is not None:
            self.ledger.note()
        for name in self.claims if recipients is None else recipients & self.claims.keys():
            self.claims[name].wake()

    @property
    def owner(self) -> str:
        """Return what stands before a handler's name in stores and queues."""
        return self.registry.owner

    @property
    def limits(self) -> Limits:
        """Return the ceilings of the bus."""
        return self.registry.wiring.limits

    def graveyards(self, change: str | None = None) -> Sequence[Graveyard]:
        """Return every place that keeps dead entries; raise ``TransactionOpenError`` if a ``change`` could not end."""
        self.require("bus.dead")
        store, level = self.registry.wiring.store, self.entries.open.get()
        if change and store is not None and store.exclusive and level is not None and not level.transaction.closed:
            raise TransactionOpenError(f"bus.dead.{change}()")
        places: list[Graveyard] = [] if store is None else [store]
        links = sorted(self.links.values(), key=lambda link: link.name != MEMORY)
        places.extend(Named(link.name, link.transport) for link in links if isinstance(link.transport, Graveyard))
        return places

    @asynccontextmanager
    async def running(self, consume: bool) -> AsyncGenerator[None]:
        """Open everything, run the worker, and on leaving drain and close in that order."""
        if self._home is not None:
            self.require("bus.running()")
            raise AlreadyRunningError("bus.running()")
        faults = [fault for link in self.used_links() if (fault := link.misplaced()) is not None]
        if faults:
            raise WiringError(faults)
        if isinstance(self.runtime.ids, Ids):
            self.runtime.ids.forget()  # this process may have been forked off one that has ids in stock
        failure: BaseException | None = None
        async with AsyncExitStack() as stack:
            self._home = current_token(), os.getpid()
            stack.callback(self._leave)
            if self.registry.wiring.store is not None:
                await stack.enter_async_context(self.registry.wiring.store)
            async with anyio.create_task_group() as group:
                staff = await self._hire(group)
                try:
                    for link in self._declared():
                        await staff.start(link.keep, name=f"eventbus {link.name}")
                    if self.broadcast is not None:
                        self.broadcast.open(staff)
                    self.state = "running"
                    ledger = await self._open_store(staff)
                    if consume or self.consumes:
                        await self._consume(staff, ledger)
                    yield
                except BaseException as error:  # out of the task group, so that it is not wrapped in a group
                    failure = error
                finally:
                    try:
                        await self._stop()
                    finally:
                        staff.cancel_scope.cancel()
        if failure is not None:
            raise failure

    def _spawn(self, action: Callable[[], Coroutine[Any, Any, None]]) -> None:
        if self._staff is None:
            raise NotRunningError("committing a transaction", self.state)
        self._staff.start_soon(action, name="eventbus commit")

    async def _hire(self, group: TaskGroup) -> TaskGroup:
        """Return a group for the tasks of the bus, which a cancellation of its lifetime must not reach undrained.

        Not by ``group.start()``: cut in the middle, that would wait for ever for a task that shields itself.
        """
        shelter, ready, hired = anyio.CancelScope(shield=True), anyio.Event(), list[TaskGroup]()

        async def employ() -> None:
            with shelter:
                async with anyio.create_task_group() as staff:
                    hired.append(staff)
                    ready.set()
                    await anyio.sleep_forever()

        group.start_soon(employ, name="eventbus")
        try:
            await ready.wait()
        except BaseException:
            shelter.cancel()
            raise
        self._staff = hired[0]
        return hired[0]

    async def _consume(self, staff: TaskGroup, ledger: Ledger | None) -> None:
        limits = self.registry.wiring.limits
        sources = Sources(self.registry, self.links, self.dispatch.invokers, self.runtime, ledger)
        chosen = [source for source in sources.make() if self.only is None or self.only(source)]
        self.worker = Worker(chosen, self.runtime, limits)
        names = {source.name for source in chosen}
        self.claims = {name: claims for name, claims in sources.claims.items() if name in names}
        if self.broadcast is not None:
            self.broadcast.changed = self.worker.changed
        for claims in self.claims.values():
            claims.quiet = self.worker.changed.fire
        staff.start_soon(self.worker.run, name="eventbus worker")
        if all(link.is_up for link in self.used_links()):
            with self.runtime.clock.move_on_after(limits.connect):
                for channel in self.worker.channels:
                    await channel.tried.wait()

    async def _stop(self) -> None:
        self.state = "stopping"
        self.live.end()
        end = self.runtime.clock.monotonic() + self.limits.drain
        with anyio.CancelScope(shield=True):
            if self.broadcast is not None:
                self.broadcast.deafen()
            if self.worker is not None:
                await self.worker.drain()
            if self.broadcast is not None:  # what the last handlers published; one deadline for all
                await self.broadcast.flush(min(FLUSH, max(end - self.runtime.clock.monotonic(), 0.0)))

    def _leave(self) -> None:
        if self.broadcast is not None:
            self.broadcast.close()
        self.worker = self.ledger = None
        self.claims = {}
        self._home = None
        self.state = "stopped"

    def outstanding(self) -> int:
        """Count what runs or could start now, in queues and in the worker; exact between two steps of the loop."""
        waiting = sum(
            link.transport.outstanding() for link in self.used_links() if isinstance(link.transport, Countable)
        )
        channels = [] if self.worker is None else self.worker.channels
        claimed = sum(channel.source.busy() for channel in channels if channel.source.busy is not None)
        leaving = 0 if self.broadcast is None else self.broadcast.outstanding()
        return waiting + claimed + leaving - sum(channel.later() for channel in channels)

    def used_links(self) -> list[Link]:
        """Return the links of the transports that some route, or ``live=``, names."""
        return [link for link in self.links.values() if self._used(link.name)]

    def _declared(self) -> list[Link]:
        for link in self.links.values():
            taken = [
                subject for subject in self.registry.subjects.values() if subject.source == link.name and subject.routed
            ]
            link.topics = {subject.spec.name: groups(self.registry, subject) for subject in taken}
            link.ordered = {subject.spec.name: ordered_groups(self.registry, subject) for subject in taken}
        if self.broadcast is not None:
            self.broadcast.link.topics |= dict.fromkeys(self.broadcast.topics.values(), ())
        return self.used_links()

    async def declare(self) -> None:
        """Make what is missing at the transports, without running. Raises ``TransportError``."""
        for link in self._declared():
            await link.declare()

    def _used(self, transport: str) -> bool:
        routed = any(transport in subject.targets for subject in self.registry.subjects.values())
        return routed or transport == self.registry.wiring.live

    async def _open_store(self, group: TaskGroup) -> Ledger | None:
        store = self.registry.wiring.store
        if store is None:
            return None
        ledger = self.ledger = Ledger(store, self.runtime, self.registry.wiring.limits)
        keeper = StoreKeeper(self.registry, ledger)
        await keeper.announce()
        group.start_soon(ledger.run, name="eventbus ledger")
        group.start_soon(keeper.keep, name="eventbus keeper")
        group.start_soon(store.listen, self.wake, name="eventbus listener")
        return ledger

    def _post(self, postings: Sequence[Posting], atomic: bool) -> Awaitable[None]:
        if not self._surely_at_home():  # what to say is put together only if it is to be said
            self.require(f"publishing {postings[0].subject.spec.name!r}, which has a route,")
        return self.entries.post(postings, atomic)

    async def _follow(self, messages: Iterable[object]) -> None:
        atomic = self.entries.current("publishing") is not None
        await self.dispatch.follow(messages, atomic)

    def observe(self, watch: Callable[[object], None]) -> None:
        """Call ``watch`` with every event once its transaction has committed."""
        self._watchers.append(watch)

    @asynccontextmanager
    async def stream(
        self, types: tuple[type, ...], buffer: int, slow: Literal["drop", "disconnect"]
    ) -> AsyncGenerator[Stream[Any]]:
        """Open a live stream, which follows other processes too where the bus has ``live=``."""
        self.require("bus.stream()")
        async with AsyncExitStack() as stack:
            if self.broadcast is not None:
                await stack.enter_async_context(self.broadcast.followed(types))
            stream = self.live.open(types, buffer, slow)
            stack.callback(self.live.close, stream)
            yield stream

    def _feed(self, seed: Seed) -> None:
        event: object = seed[0]
        carried = self.broadcast is not None and self.broadcast.carries(type(event))
        if not (self.live.streams or self._watchers or carried):
            return

        async def after_commit() -> None:
            self._tell(seed)

        if not self.entries.after_commit(after_commit):
            self._tell(seed)

    def _tell(self, seed: Seed) -> None:
        event: object = seed[0]
        self.live.feed(event)
        for watch in self._watchers:
            watch(event)
        if self.broadcast is not None and self.broadcast.carries(type(event)):
            self.broadcast.offer(seed)
