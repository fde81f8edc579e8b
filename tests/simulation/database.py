"""One database that several simulated processes share: entries and business rows, committed together."""

from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any, Self, TypeVar

import anyio

from eventbus.clock import Clock
from eventbus.errors import StoreError
from eventbus.store import Backlog, Claimed, DeadEntry, DeadFilter, Interest, NewEntry, Recipient, Settlement
from eventbus.stores.memory import MemoryStore

if TYPE_CHECKING:
    from tests.simulation.world import Process, World

__all__ = ("Database", "Port", "Session")

T = TypeVar("T")


class Session:
    """Be what ``Transaction[Session]`` gives a handler: business rows, written with the commit."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, str]] = []

    def write(self, table: str, id: str) -> None:
        """Write a row."""
        self.rows.append((table, id))


class Database:
    """Keep what is committed; a process reaches it through its ``Port``."""

    def __init__(self, world: "World") -> None:
        self.world = world
        self.box = MemoryStore(limits=world.limits)
        self.box.bind(world)  # type: ignore[arg-type]
        self.listeners: dict[Process, Callable[[], None]] = {}
        self.units: dict[Unit, None] = {}

    def disconnect(self, process: "Process") -> None:
        """Roll back what a process that died had open."""
        self.listeners.pop(process, None)
        for unit in [unit for unit in self.units if unit.process is process]:
            unit.roll_back()

    def notify(self, writer: "Process") -> None:
        """Tell other processes that something was written; some never hear it."""
        for process, wake in list(self.listeners.items()):
            if process is not writer and process.works and self.world.random.random() < self.world.traits.notify:
                wake()


class Unit:
    """Be one transaction of one process."""

    def __init__(self, port: "Port") -> None:
        self.port = port
        self.process = port.process
        self.world = port.world
        self.session = Session()
        self.over = False
        self._inner = port.box.begin()

    async def __aenter__(self) -> Self:
        await self.port.call("begin", self._begin)
        return self

    async def _begin(self) -> None:
        self.world.database.units[self] = None

    async def __aexit__(self, kind: object, error: object, trace: object) -> None:
        if kind is not None:
            self.roll_back()
            return
        try:
            await self.port.call("commit", self._commit)
        except StoreError:
            self.port.excuse([one for one in self._inner._written if isinstance(one, Settlement)])
            raise
        finally:
            self.roll_back()

    async def _commit(self) -> None:
        if self.over:
            raise StoreError("the connection of this transaction is gone")
        self._close()
        await self._inner.__aexit__(None, None, None)
        self.world.oracle.committed(self.process, self._inner._written, self.session.rows)
        self.world.database.notify(self.process)

    def roll_back(self) -> None:
        """End without a trace, unless it is over."""
        if not self.over:
            self._close()
            self._inner._closed = True
            for row in self._inner._locked:
                row.locked = False

    def _close(self) -> None:
        self.over = True
        self.world.database.units.pop(self, None)

    def stands(self) -> Callable[[], bool]:
        """Return yes: nobody but the unit makes savepoints here."""
        return lambda: True

    def watch(self, committed: Callable[[], object]) -> bool:
        """Return no: the end of this unit is the commit."""
        return False

    async def lock(self, seq: int, claims: int) -> bool:
        """Lock the row of a claim."""
        return await self.port.call(f"lock {seq}/{claims}", lambda: self._do(self._inner.lock, seq, claims))

    async def add(self, entries: Sequence[NewEntry]) -> frozenset[str]:
        """Write entries with the commit."""
        ids = " ".join(entry.message_id for entry in entries)
        with self._excusing():
            return await self.port.call(f"insert {ids}", lambda: self._do(self._inner.add, entries))

    async def settle(self, settlement: Settlement) -> bool:
        """Write a settlement with the commit."""
        what = f"finish {settlement.seq}/{settlement.claims}"
        with self._excusing():
            return await self.port.call(what, lambda: self._do(self._inner.settle, settlement))

    @contextmanager
    def _excusing(self) -> Generator[None]:
        """Let a handling come again whose end the store failed to write: that is no failure of its handler."""
        try:
            yield
        except StoreError:
            for row in self._inner._locked:
                self.world.oracle.excuse(row.recipient)
            raise

    async def _do(self, verb: Callable[..., Awaitable[T]], *args: Any) -> T:
        if self.over:
            raise StoreError("the connection of this transaction is gone")
        result = await verb(*args)
        if self.over:  # the process died on the way
            for row in self._inner._locked:
                row.locked = False
        return result

    @asynccontextmanager
    async def savepoint(self) -> AsyncGenerator[None]:
        """Return a savepoint for entries and business rows."""
        mark = len(self.session.rows)
        async with self._inner.savepoint():
            try:
                yield
            except BaseException:
                del self.session.rows[mark:]
                raise


class Port:
    """Be the database as one process sees it: late, failing, gone."""

    shared = True
    exclusive = False
    sessions: tuple[type, ...] = (Session,)

    def __init__(self, process: "Process") -> None:
        self.process = process
        self.world = process.world
        self.box = process.world.database.box

    async def call(self, what: str, effect: Callable[[], Awaitable[T]]) -> T:
        """Do something in the database, unless a fault prevents it; its answer may get lost."""
        process, world = self.process, self.world
        await process.gate()
        fault = world.fault("store")
        await world.latency()
        await process.gate()
        if not process.alive:
            raise StoreError("this process is dead")
        if fault == "before":
            world.note(process.name, f"{what} fails")
            raise StoreError(f"{what} failed")
        result = await effect()
        world.note(process.name, f"{what} -> {_shown(result)}")
        if fault == "after":
            world.note(process.name, f"{what} fails afterwards")
            raise StoreError(f"the answer to {what} got lost")
        await world.latency()
        await process.gate()
        return result

    def excuse(self, settlements: Sequence[Settlement]) -> None:
        """Let the handlings come again whose end could not be written, or may not have been."""
        for one in settlements:
            self.world.oracle.excuse(self.world.oracle.known[one.seq][1])

    def bind(self, clock: Clock | None) -> None:
        """Keep the database's own clock."""

    async def __aenter__(self) -> Self:
        await self.call("connect", anyio.lowlevel.checkpoint)
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.world.database.disconnect(self.process)

    def begin(self, session: object | None = None) -> Unit:
        """Return a transaction."""
        return Unit(self)

    async def add(self, entries: Sequence[NewEntry]) -> frozenset[str]:
        """Write entries."""

        async def effect() -> frozenset[str]:
            touched = await self.box.add(entries)
            self.world.oracle.added(self.process, entries)
            self.world.database.notify(self.process)
            return touched

        return await self.call("add " + " ".join(entry.message_id for entry in entries), effect)

    async def claim(self, recipient: Recipient, *, owner: str, limit: int, lease: float, cursor: str = "") -> Claimed:
        """Lease due entries."""

        async def effect() -> Claimed:
            claimed = await self.box.claim(recipient, owner=owner, limit=limit, lease=lease, cursor=cursor)
            self.world.oracle.claimed(self.process, recipient, limit, claimed)
            return claimed

        return await self.call(f"claim {recipient.name}", effect)

    async def settle(self, settlements: Sequence[Settlement]) -> frozenset[int]:
        """Write settlements."""

        async def effect() -> frozenset[int]:
            lost = await self.box.settle(settlements)
            self.world.oracle.settled(self.process, settlements, lost)
            return lost

        told = " ".join(f"{one.seq}/{one.claims}={one.outcome}" for one in settlements)
        try:
            return await self.call(f"settle {told}", effect)
        except StoreError:
            self.excuse(settlements)
            raise

    async def extend(self, held: Sequence[tuple[int, int]], lease: float) -> frozenset[int]:
        """Renew leases."""

        async def effect() -> frozenset[int]:
            lost = await self.box.extend(held, lease)
            self.world.oracle.extended(held, lost)
            return lost

        try:
            return await self.call("extend " + " ".join(f"{seq}/{claims}" for seq, claims in held), effect)
        except StoreError:
            self.world.oracle.lapsed(self.process)
            raise

    async def announce(self, interests: Sequence[Interest], *, aliases: Sequence[tuple[str, str]] = ()) -> None:
        """Write interests."""

        async def effect() -> None:
            await self.box.announce(interests, aliases=aliases)
            self.world.oracle.announced(interests)

        await self.call("announce", effect)

    async def forget(self, recipient: str) -> int:
        """Drop a recipient: nobody does in these runs."""
        raise NotImplementedError

    async def due(self, recipients: Sequence[str]) -> dict[str, float]:
        """Return when the first entries are due."""
        return await self.call("due " + " ".join(recipients), lambda: self.box.due(recipients))

    async def sweep(self, *, retention: float, lease: float, batch: int) -> int:
        """Prune, and free leases from a clock that jumped."""

        async def effect() -> int:
            swept = await self.box.sweep(retention=retention, lease=lease, batch=batch)
            self.world.oracle.swept(retention)
            self.world.ahead = False
            return swept

        return await self.call("sweep", effect)

    async def backlog(self) -> Sequence[Backlog]:
        """Count what waits and what is dead."""
        return await self.call("backlog", self.box.backlog)

    async def dead(self, chosen: DeadFilter) -> Sequence[DeadEntry]:
        """Return dead entries."""
        return await self.call("dead", lambda: self.box.dead(chosen))

    async def replay(self, chosen: DeadFilter) -> Mapping[str, int]:
        """Make dead entries due."""

        async def effect() -> Mapping[str, int]:
            replayed = await self.box.replay(chosen)
            self.world.oracle.raised()
            return replayed

        return await self.call("replay", effect)

    async def discard(self, chosen: DeadFilter) -> int:
        """Forget dead entries."""

        async def effect() -> int:
            discarded = await self.box.discard(chosen)
            self.world.oracle.discarded()
            return discarded

        return await self.call("discard", effect)

    async def listen(self, wake: Callable[[], None]) -> None:
        """Hear what other processes write, mostly."""
        self.world.database.listeners[self.process] = wake
        try:
            await anyio.sleep_forever()
        finally:
            self.world.database.listeners.pop(self.process, None)


def _shown(result: object) -> str:
    if isinstance(result, Claimed):
        return " ".join(f"{entry.seq}/{entry.claims}" for entry in result.entries)
    if isinstance(result, frozenset):
        return " ".join(sorted(map(str, result)))
    if isinstance(result, list):
        return str(len(result))
    return str(result)
