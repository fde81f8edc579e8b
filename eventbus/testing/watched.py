"""A store and a transport as a test sees them: calls in flight are counted, and can be made to fail."""

from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Generator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

from anyio.lowlevel import checkpoint

from eventbus.clock import Clock
from eventbus.errors import Lost, PublishError, StoreError
from eventbus.limits import Limits
from eventbus.store import DeadEntry, DeadFilter, Store, Unit
from eventbus.transport import Wire
from eventbus.transports.memory import MemoryTransport

__all__ = ("Faults", "WatchedStore", "WatchedTransport")

P = ParamSpec("P")
R = TypeVar("R")


class Faults:
    """Say what goes wrong, which is nothing, and hear what is done about the dead."""

    def commit(self) -> bool:
        """Tell whether the commit that begins now shall fail."""
        return False

    def publish(self) -> bool:
        """Tell whether the publish that begins now shall not get through."""
        return False

    def turns(self) -> int:
        """Return how many turns of the event loop the publish that begins now shall take."""
        return 0

    def dealt(self, dead: Sequence[DeadEntry]) -> None:
        """Hear that somebody replays or discards some of the dead, and so knows of them."""


class WatchedTransport(MemoryTransport):
    """Carry wires between the tasks of one process, if the faults let it."""

    def __init__(self, faults: Faults, *, limits: Limits, clock: Clock) -> None:
        super().__init__(limits=limits, clock=clock)
        self._faults = faults

    async def publish(self, topic: str, wires: Sequence[Wire]) -> None:
        """Put wires into the queue of every group. Raises ``PublishError``."""
        for _ in range(self._faults.turns()):
            await checkpoint()
        if self._faults.publish():
            lost = Lost("the connection was lost while this was published (rehearsed)")
            raise PublishError(dict.fromkeys(range(len(wires)), lost))
        await super().publish(topic, wires)

    async def replay(self, chosen: DeadFilter) -> Mapping[str, int]:
        """Put chosen dead messages back at their places."""
        self._faults.dealt(await self.dead(replace(chosen, limit=None)))
        return await super().replay(chosen)

    async def discard(self, chosen: DeadFilter) -> int:
        """Forget chosen dead messages."""
        self._faults.dealt(await self.dead(replace(chosen, limit=None)))
        return await super().discard(chosen)


class WatchedUnit:
    """Be one transaction of a watched store."""

    def __init__(self, unit: Unit, store: "WatchedStore", owner: object) -> None:
        self.owner = owner
        """Who had it opened."""
        self._unit = unit
        self._store = store
        self.add, self.settle, self.savepoint = unit.add, unit.settle, unit.savepoint
        self.stands, self.watch = unit.stands, unit.watch

    @property
    def session(self) -> Any:
        """Return what a handler works with."""
        return self._unit.session

    async def lock(self, seq: int, claims: int) -> bool:
        """Take the row lock of a claimed entry; False if the lease is lost."""
        locked = await self._unit.lock(seq, claims)
        self._store.units.remove(self)
        self._store.units.insert(0, self)
        return locked


def _counted(
    verb: Callable[Concatenate[Store, P], Awaitable[R]],
) -> "Callable[Concatenate[WatchedStore, P], Coroutine[Any, Any, R]]":
    """Return a verb that hands itself on to the store, as a call in flight."""

    async def counted(self: "WatchedStore", /, *args: P.args, **kwargs: P.kwargs) -> R:
        with self.call():
            found: R = await getattr(self.store, verb.__name__)(*args, **kwargs)
            return found

    return counted


class WatchedStore:
    """Hand every verb on to a store; ``calls`` of them have not returned yet."""

    def __init__(self, store: Store, faults: Faults) -> None:
        self.store = store
        self._faults = faults
        self.calls = 0
        self.callers: Counter[object] = Counter()
        """Whose they are; None is whoever is not known."""
        self.units: list[WatchedUnit] = []
        """The open transactions; where only one can write, the first one does."""
        self.opener: Callable[[], object] = lambda: None
        """Tells who calls now."""
        self.news: Callable[[], None] = lambda: None
        """Called whenever a call returns."""

    @property
    def shared(self) -> bool:
        """Tell whether other processes see this store."""
        return self.store.shared

    @property
    def exclusive(self) -> bool:
        """Tell whether an open transaction keeps every other writer out."""
        return self.store.exclusive

    @property
    def sessions(self) -> tuple[type, ...]:
        """Return the types that ``Transaction[S]`` may name."""
        return self.store.sessions

    @contextmanager
    def call(self) -> Generator[None]:
        """Count a call."""
        who = self.opener()
        self.callers[who] += 1
        self.calls += 1
        try:
            yield
        finally:
            self.calls -= 1
            self.callers[who] -= 1
            self.news()

    def bind(self, clock: Clock | None) -> None:
        """Take times from ``clock``; None goes back."""
        self.store.bind(clock)

    async def __aenter__(self) -> Self:
        await self.store.__aenter__()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.store.__aexit__(*exc)

    @asynccontextmanager
    async def begin(self, session: object | None = None) -> AsyncGenerator[Unit]:
        """Return a transaction; a faulty one is rolled back where it should be committed."""
        opening = self.store.begin(session)
        with self.call():
            unit = WatchedUnit(await opening.__aenter__(), self, self.opener())
        self.units.append(unit)
        try:
            try:
                yield unit
                if self._faults.commit():
                    raise StoreError("the connection was lost while the transaction committed (rehearsed)")
            except BaseException as error:
                if not await opening.__aexit__(type(error), error, error.__traceback__):
                    raise
            else:
                with self.call():
                    await opening.__aexit__(None, None, None)
        finally:
            self.units.remove(unit)

    add = _counted(Store.add)
    claim = _counted(Store.claim)
    settle = _counted(Store.settle)
    extend = _counted(Store.extend)
    announce = _counted(Store.announce)
    forget = _counted(Store.forget)
    due = _counted(Store.due)
    sweep = _counted(Store.sweep)
    backlog = _counted(Store.backlog)
    dead = _counted(Store.dead)

    async def replay(self, chosen: DeadFilter) -> Mapping[str, int]:
        """Make chosen dead entries due now; return how many per recipient."""
        with self.call():
            self._faults.dealt(await self.store.dead(replace(chosen, limit=None)))
            return await self.store.replay(chosen)

    async def discard(self, chosen: DeadFilter) -> int:
        """Forget chosen dead entries; return how many."""
        with self.call():
            self._faults.dealt(await self.store.dead(replace(chosen, limit=None)))
            return await self.store.discard(chosen)

    async def listen(self, wake: Callable[[], None]) -> None:
        """Call ``wake`` when another process may have written; waiting for that is no call in flight."""
        await self.store.listen(wake)
