"""Write messages where they are safe: in the open transaction, in the store, or on their transport."""

import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from types import MappingProxyType, TracebackType
from typing import Any

import anyio

from eventbus.clock import Clock
from eventbus.cloudevents import binary, from_binary, from_structured, structured
from eventbus.dispatch import Posting
from eventbus.envelope import Envelope, check_key, header_fault
from eventbus.errors import NoTransactionError, NotRunningError, PublishError, StoreError, TransactionClosedError
from eventbus.limits import Limits
from eventbus.link import Link
from eventbus.middleware import Outgoing
from eventbus.registry import Registry
from eventbus.routes import STORE
from eventbus.store import NewEntry, Recipient, Transaction, Unit
from eventbus.transport import Capabilities, Wire

log = logging.getLogger("eventbus")

__all__ = ("Entries", "Opening", "entry_of", "outward", "unwrap", "wrap")

Action = Callable[[], Awaitable[None]]
Stands = Callable[[], bool]


def outward(source: str, transport: str) -> str:
    """Return the recipient name under which a store keeps what goes out through a transport."""
    return f"{source}>{transport}"


class Level:
    """Hold what is published between a transaction's, or a savepoint's, beginning and its end."""

    __slots__ = ("actions", "entries", "gate", "transaction", "unit")

    def __init__(self, transaction: Transaction[Any], unit: Unit) -> None:
        self.transaction = transaction
        self.unit = unit
        self.entries: list[tuple[Stands, NewEntry]] = []
        """What is to be written when it ends well, if it still stands then."""
        self.actions: list[tuple[Stands, Action]] = []
        """What is to be done once the whole transaction has committed, if it still stands then."""
        self.gate: anyio.Lock | None = None
        """Lets one savepoint in at a time: those of one connection can only be nested, never side by side."""


class Opening(AbstractAsyncContextManager[Transaction[Any]]):
    """Be one ``async with`` around a transaction, or around a savepoint of the open one."""

    __slots__ = ("_begun", "_entries", "_level", "_savepoint", "_session", "_store", "_token")

    def __init__(self, entries: "Entries", session: object | None) -> None:
        self._entries = entries
        self._session = session
        self._begun = False
        self._savepoint: AbstractAsyncContextManager[Level] | None = None

    async def __aenter__(self) -> Transaction[Any]:
        """Begin. Raises ``RuntimeError`` the second time."""
        if self._begun:
            raise RuntimeError("what bus.transaction() returns is entered once: call it again for another transaction")
        self._begun = True
        entries = self._entries
        outer = entries.open.get()
        if outer is not None and not outer.transaction.closed and self._session is None:
            self._savepoint = entries.savepoint(outer)
            self._level = await self._savepoint.__aenter__()
        else:
            self._store = entries.begin(self._session)
            unit = await self._store.__aenter__()
            self._level = Level(Transaction(unit), unit)
            self._token = entries.open.set(self._level)
        return self._level.transaction

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        """Commit, or roll back after an error."""
        if self._savepoint is not None:
            return await self._savepoint.__aexit__(kind, error, trace)
        entries, level, failure = self._entries, self._level, error
        try:
            if failure is None:
                await entries.flush(level)
        except BaseException as unwritten:
            failure = unwritten
        level.transaction.closed = True
        try:
            entries.open.reset(self._token)
        except ValueError as elsewhere:  # it is left in another context than it was entered in
            failure = failure or elsewhere
        if failure is None:
            await entries.commit(self._store, level)
            return None
        handled = await self._store.__aexit__(type(failure), failure, failure.__traceback__)
        if failure is not error and not handled:
            raise failure
        return handled


class Entries:
    """Know the open transaction of every task, and write what is published in it when it closes."""

    def __init__(
        self, registry: Registry, links: Mapping[str, Link], wake: Callable[[frozenset[str]], None],
        spawn: Callable[[Callable[[], Coroutine[Any, Any, None]]], None],
    ) -> None:  # fmt: skip
        self._registry = registry
        self._links = links
        self._store = registry.wiring.store
        self._source = registry.owner
        self._codec = registry.wiring.codec
        self._wake = wake
        self._spawn = spawn
        middleware: Sequence[object] = registry.wiring.middleware
        self._outgoing = [one.outgoing for one in middleware if isinstance(one, Outgoing)]
        self.open: ContextVar[Level | None] = ContextVar("eventbus_transaction", default=None)

    def current(self, operation: str) -> Level | None:
        """Return the open transaction of this task. Raises ``TransactionClosedError`` if it is over."""
        level = self.open.get()
        if level is not None and level.transaction.closed:
            raise TransactionClosedError(operation)
        return level

    def after_commit(self, action: Action) -> bool:
        """Run ``action`` after the open transaction has committed; False if none is open."""
        level = self.current("publishing")
        if level is None:
            return False
        level.actions.append((level.unit.stands(), action))
        return True

    def transaction(self, session: object | None = None) -> "Opening":
        """Open a transaction and commit it at the end, or join the open one by a savepoint."""
        return Opening(self, session)

    def begin(self, session: object | None) -> AbstractAsyncContextManager[Unit]:
        """Return a transaction of the store. Raises ``RuntimeError`` without one."""
        if self._store is None:
            raise RuntimeError("a transaction needs a store: EventBus(..., store='sqlite:///shop.db')")
        return self._store.begin(session)

    @asynccontextmanager
    async def savepoint(self, outer: Level) -> AsyncGenerator[Level]:
        """Open a level inside another, which gets what is published there if it ends well."""
        gate = outer.gate = outer.gate or anyio.Lock()
        async with gate:
            level = Level(outer.transaction, outer.unit)
            async with outer.unit.savepoint():
                token = self.open.set(level)
                try:
                    yield level
                finally:
                    self.open.reset(token)
            outer.entries += level.entries
            outer.actions += level.actions

    async def commit(self, opening: AbstractAsyncContextManager[Unit], level: Level) -> None:
        """Commit, and do what was to follow; that a caller is cancelled meanwhile does not part the two."""

        def committed() -> None:
            level.transaction.committed = True
            self._wake(frozenset(level.transaction.touched))

        async def commit() -> None:
            await opening.__aexit__(None, None, None)
            committed()

        async def follow() -> None:
            committed()
            await self._follow(level.actions)

        if level.unit.watch(lambda: self._spawn(follow)):
            await opening.__aexit__(None, None, None)
            return
        if not level.actions:
            await commit()
            return
        over, failed = anyio.Event(), list[Exception]()

        async def finish() -> None:
            try:
                await commit()
                failed.extend(await self._follow(level.actions))
            except Exception as error:
                failed.append(error)
            finally:
                over.set()

        self._spawn(finish)
        await over.wait()
        if failed:
            raise failed[0]
        if not level.transaction.committed:
            raise StoreError("the bus was stopped during a commit: whether it was done is not known")

    async def _follow(self, actions: Sequence[tuple[Stands, Action]]) -> list[Exception]:
        """Do what was to follow a commit, all of it though some of it fails; return what failed."""
        failed: list[Exception] = []
        for action in [action for stands, action in actions if stands()]:
            try:
                await action()
            except Exception as error:
                error.add_note("the transaction itself is committed; this was to follow it")
                log.warning("after a commit: %s", error)
                failed.append(error)
        return failed

    def unit(self) -> Unit:
        """Return the open transaction as the store has it. Raises ``LookupError`` if there is none."""
        level = self.open.get()
        if level is None:
            raise LookupError("no transaction is open")
        return level.unit

    async def flush_open(self) -> None:
        """Write what was published in the open transaction so far."""
        level = self.open.get()
        if level is not None:
            await self.flush(level)

    async def flush(self, level: Level) -> None:
        """Write what was published at a level so far, also what comes while this writes."""
        while level.entries:
            pending, level.entries = level.entries, []
            entries = [entry for stands, entry in pending if stands()]
            level.transaction.touched |= await level.unit.add(entries)

    async def post(self, postings: Sequence[Posting], atomic: bool) -> None:
        """Make routed messages safe: in the open transaction if there is one, at once otherwise."""
        level = self.current("publishing")
        entries: list[NewEntry] = []
        actions: list[Action] = []
        for posting in postings:
            kept, direct = posting.plan.kept, posting.plan.direct
            if kept and level is None and atomic:
                raise NoTransactionError(posting.subject.spec.name, kept[0])
            envelope = self._envelope(posting)
            if kept:
                away = [Recipient(outward(self._source, one), ordered=True) for one in kept if one != STORE]
                entries.append(entry_of(envelope, posting.delay, away, STORE in kept))
            actions += [partial(self._publish, target, envelope, posting.delay) for target in direct]
        if level is not None:
            stands = level.unit.stands()
            level.entries += [(stands, entry) for entry in entries]
            level.actions += [(stands, action) for action in actions]
            return
        if entries and self._store is not None:
            self._wake(await self._store.add(entries))
        for action in actions:
            await action()

    def _envelope(self, posting: Posting) -> Envelope:
        origin, spec = posting.origin, posting.subject.spec
        identity = origin.identity
        key = origin.key if origin.key is not None else spec.key_of(origin.message)
        if key is not None:
            check_key(key, spec.name)
        body = self._codec.encode(origin.message)
        headers = self._headers(origin.headers) if self._outgoing else origin.headers
        id, correlation, causation, time = identity
        return Envelope(
            id, spec.name, time, self._source, correlation, body, causation, key, headers, spec.version
        )  # fmt: skip

    def _headers(self, given: Mapping[str, str]) -> Mapping[str, str]:
        """Add what middleware lets travel along; what could not travel stays here, rather than the message."""
        added = {name: value for outgoing in self._outgoing for name, value in outgoing().items()}
        headers = MappingProxyType({**added, **given})
        return headers if added and not header_fault(headers, self._registry.wiring.limits) else given

    async def _publish(self, target: str, envelope: Envelope, delay: float) -> None:
        link = self._links.get(target)
        if link is None:
            raise NotRunningError(f"publishing {envelope.name!r} to {target!r}")
        if delay:
            envelope = envelope._replace(due=envelope.time + timedelta(seconds=delay))
        try:
            await link.publish(envelope.name, [wrap(envelope, link.transport.capabilities)])
        except PublishError as error:
            raise error.failed[0] from error


@dataclass(frozen=True, slots=True)
class Kept(Wire):
    """Be a wire that stays in this process, so that nobody has to write its envelope down and read it again."""

    envelope: Envelope | None = None


def entry_of(envelope: Envelope, delay: float, recipients: Sequence[Recipient], subscribers: bool) -> NewEntry:
    """Return an envelope as a store keeps it, for ``recipients`` and, if told so, whoever was announced."""
    body = structured(envelope)
    return NewEntry(envelope.id, envelope.name, body, envelope.key, delay, subscribers, tuple(recipients))


def wrap(envelope: Envelope, capabilities: Capabilities) -> Wire:
    """Return an envelope as a transport carries it; what is delayed is in no order."""
    lane = None if envelope.due else envelope.key
    if capabilities.local:
        return Kept(envelope.id, envelope.body, key=lane, envelope=envelope)
    if not capabilities.headers:
        return Wire(envelope.id, structured(envelope), key=lane)
    headers, body = binary(envelope)
    return Wire(envelope.id, body, headers, lane)


def unwrap(wire: Wire, limits: Limits, clock: Clock) -> tuple[Envelope, bool]:
    """Return the envelope of a wire in either mode, and whether this process wrote it. Raises ``DecodeError``."""
    if isinstance(wire, Kept) and wire.envelope is not None:
        return wire.envelope, True
    headers = wire.headers
    if headers and ("ce-specversion" in headers or any(name.lower() == "ce-specversion" for name in headers)):
        return from_binary(headers, wire.body, limits, clock.now), False
    return from_structured(wire.body, limits, clock.now), False
