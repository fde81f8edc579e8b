"""Write messages where they are safe: in the open transaction, in the store, or on their transport."""

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Any

from eventbus.dispatch import Posting
from eventbus.envelope import Envelope, binary, check_key, structured
from eventbus.errors import NoTransactionError, NotRunningError, PublishError, TransactionClosedError
from eventbus.link import Link
from eventbus.registry import MEMORY, STORE, Registry
from eventbus.store import NewEntry, Recipient, Transaction, Unit
from eventbus.transport import Capabilities, Wire

__all__ = ("Entries", "Opened", "outward", "wrap")

Opened = tuple[Transaction[Any], Unit]


def outward(source: str, transport: str) -> str:
    """Return the recipient name under which a store keeps what goes out through a transport."""
    return f"{source}>{transport}"


class Entries:
    """Know the open transaction of every task, and write what is published in it when it closes."""

    def __init__(self, registry: Registry, links: Mapping[str, Link], wake: Callable[[frozenset[str]], None]) -> None:
        self._registry = registry
        self._links = links
        self._store = registry.wiring.store
        self._source = registry.owner
        self._wake = wake
        self._open: ContextVar[Opened | None] = ContextVar("eventbus_transaction", default=None)

    def current(self, operation: str) -> Transaction[Any] | None:
        """Return the open transaction of this task. Raises ``TransactionClosedError`` if it is over."""
        opened = self._open.get()
        if opened is None:
            return None
        if opened[0].closed:
            raise TransactionClosedError(operation)
        return opened[0]

    def after_commit(self, action: Callable[[], Awaitable[None]]) -> bool:
        """Run ``action`` after the open transaction has committed; False if none is open."""
        transaction = self.current("publishing")
        if transaction is None:
            return False
        transaction.after.append(action)
        return True

    @asynccontextmanager
    async def transaction(self, session: object | None = None) -> AsyncGenerator[Opened]:
        """Open a transaction and commit it at the end, or join the open one by a savepoint."""
        opened = self._open.get()
        if opened is not None and not opened[0].closed and session is None:
            async with self._savepoint(*opened):
                yield opened
            return
        if self._store is None:
            raise RuntimeError("a transaction needs a store: EventBus(..., store='sqlite:///shop.db')")
        async with self._store.begin(session) as unit:
            transaction: Transaction[Any] = Transaction(unit)
            token = self._open.set((transaction, unit))
            try:
                yield transaction, unit
                await self.flush(transaction, unit)
            finally:
                transaction.closed = True
                self._open.reset(token)
        transaction.committed = True
        self._wake(frozenset(transaction.touched))
        for action in transaction.after:
            try:
                await action()
            except Exception as error:
                error.add_note("the transaction itself is committed; this was to follow it")
                raise

    @asynccontextmanager
    async def _savepoint(self, transaction: Transaction[Any], unit: Unit) -> AsyncGenerator[None]:
        written, actions = len(transaction.pending), len(transaction.after)
        try:
            async with unit.savepoint():
                yield
        except BaseException:
            del transaction.pending[written:], transaction.after[actions:]
            raise

    async def flush(self, transaction: Transaction[Any], unit: Unit) -> None:
        """Write what was published in a transaction so far."""
        if transaction.pending:
            entries, transaction.pending = transaction.pending, []
            transaction.touched |= await unit.add(entries)

    async def post(self, postings: Sequence[Posting], atomic: bool) -> None:
        """Make routed messages safe: in the open transaction if there is one, at once otherwise."""
        transaction = self.current("publishing")
        entries: list[NewEntry] = []
        actions: list[Callable[[], Awaitable[None]]] = []
        for posting in postings:
            kept = [one for one in posting.subject.targets if one == STORE or (one != MEMORY and self._store)]
            if kept and transaction is None and atomic:
                raise NoTransactionError(posting.subject.spec.name, kept[0])
            envelope = self._envelope(posting)
            if kept:
                entries.append(self._entry(posting, envelope, kept))
            for target in posting.subject.targets:
                heard = target != MEMORY or (posting.subject.source == MEMORY and posting.subject.routed)
                if target not in kept and heard:
                    actions.append(partial(self._publish, target, envelope, posting.delay))
        if transaction is not None:
            transaction.pending.extend(entries)
            transaction.after.extend(actions)
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
        return Envelope(
            id=identity.id,
            name=spec.name,
            version=spec.version,
            time=identity.time,
            source=self._source,
            correlation=identity.correlation,
            causation=identity.causation,
            key=key,
            headers=origin.headers,
            body=self._registry.wiring.codec.encode(origin.message),
        )

    def _entry(self, posting: Posting, envelope: Envelope, kept: Sequence[str]) -> NewEntry:
        return NewEntry(
            message_id=envelope.id,
            type=envelope.name,
            body=structured(envelope),
            key=envelope.key,
            delay=posting.delay,
            subscribers=STORE in kept,
            recipients=tuple(Recipient(outward(self._source, one), ordered=True) for one in kept if one != STORE),
        )

    async def _publish(self, target: str, envelope: Envelope, delay: float) -> None:
        link = self._links.get(target)
        if link is None:
            raise NotRunningError(f"publishing {envelope.name!r} to {target!r}")
        if delay:
            envelope = replace(envelope, due=envelope.time + timedelta(seconds=delay))
        try:
            await link.publish(envelope.name, [wrap(envelope, link.transport.capabilities)])
        except PublishError as error:
            raise error.failed[0] from error


def wrap(envelope: Envelope, capabilities: Capabilities) -> Wire:
    """Return an envelope as a transport carries it; what is delayed is in no order."""
    lane = None if envelope.due else envelope.key
    if not capabilities.headers:
        return Wire(envelope.id, structured(envelope), key=lane)
    headers, body = binary(envelope)
    return Wire(envelope.id, body, headers, lane)
