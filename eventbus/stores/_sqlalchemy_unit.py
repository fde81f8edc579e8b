"""Be one transaction of the SQLAlchemy store: on a session of its own, or on the caller's."""

import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Self, TypeVar
from weakref import WeakSet

from sqlalchemy import Connection, Engine, event
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, SQLAlchemyError
from sqlalchemy.orm import Session, SessionTransaction

from eventbus.errors import TransactionClosedError
from eventbus.store import NewEntry, Settlement
from eventbus.stores._sqlalchemy_link import READ_COMMITTED, Link, is_again, is_lost, named
from eventbus.stores._sqlalchemy_rows import Rows
from eventbus.stores._sqlalchemy_schema import ENTRY

__all__ = ("JoinedUnit", "OwnUnit")

T = TypeVar("T")
Add = Callable[[Sequence[NewEntry]], Awaitable[frozenset[str]]]

TRACE = "eventbus_trace"
"""Where a session keeps what became of its transactions."""

log = logging.getLogger("eventbus")


class JoinedUnit:
    """Be a part of the caller's transaction, which the caller begins and ends."""

    def __init__(self, link: Link, rows: Rows, engine: Engine, session: Any) -> None:
        self._link = link
        self._rows = rows
        self._engine = engine
        self._made = session
        self._closed = False
        self._broken: BaseException | None = None
        """What has ended the transaction in the database, though its session may go on in another."""
        self._trace()

    def _trace(self) -> None:
        if TRACE not in self._sync.info:
            self._sync.info[TRACE] = _Trace(self._sync, self._link)

    @property
    def session(self) -> Any:
        """Return the session."""
        return self._made

    @property
    def _sync(self) -> Session:
        session: Session = getattr(self._made, "sync_session", self._made)
        return session

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: object, error: object, trace: object) -> None:
        self._closed = True
        if kind is None and self._broken is not None:
            raise self._broken

    async def lock(self, seq: int, claims: int) -> bool:
        """Take the row lock of a claimed entry first of all; False if the lease is lost."""
        return await self._step("locking an entry", lambda s: self._rows.lock(_connection(s), seq, claims))

    async def add(self, entries: Sequence[NewEntry]) -> frozenset[str]:
        """Write entries in this transaction; duplicates are ignored. Return the recipients written to."""
        self._check_open("publishing")
        if not entries:
            return frozenset()
        return await self._step("publishing", lambda s: self._rows.add(_connection(s), entries), deadlocks=True)

    def stands(self) -> Callable[[], bool]:
        """Return what tells whether the savepoints that are open now, and the transaction, have not been rolled back.

        The session's owner may make savepoints too, and roll back without telling us.
        """
        around = list(_around(self._sync))
        trace: _Trace = self._sync.info[TRACE]
        return lambda: trace.undone.isdisjoint(around)

    def watch(self, committed: Callable[[], object]) -> bool:
        """Call ``committed`` once the session's owner has committed."""
        trace: _Trace = self._sync.info[TRACE]
        trace.waiting.append(committed)
        return True

    async def settle(self, settlement: Settlement) -> bool:
        """Write a settlement in this transaction; False if the lease is lost."""
        lost = await self._step("settling", lambda s: self._rows.settle(_connection(s), [settlement]))
        return not lost

    @asynccontextmanager
    async def savepoint(self) -> AsyncGenerator[None]:
        """Return a savepoint: rolled back on an exception, released otherwise."""
        point = await self._step("a savepoint", lambda s: s.begin_nested(), users=True)
        try:
            yield
            await self._step("a savepoint", lambda s: _release(s, point), users=True)
        except BaseException:
            await self._undo(lambda s: _take_back(s, point))
            raise

    async def _undo(self, step: Callable[[Session], object]) -> None:
        """Roll back; if that fails too, what has failed before is told."""
        try:
            await self._link.within(self.session, step)
            self._broken = None
        except SQLAlchemyError as error:
            self._broken = named(error, self._engine, "rolling back")
            log.warning("%s", self._broken)

    async def _step(
        self, operation: str, step: Callable[[Session], T], *, users: bool = False, deadlocks: bool = False
    ) -> T:
        """Run a step; with ``users`` it writes the user's own objects too, and what is wrong with them is theirs.

        So are ``deadlocks``: the database has taken back what the user did, and only the user can do it again.
        """
        self._check_open(operation)
        self._link.check()
        try:
            return await self._link.within(self.session, step)
        except (IntegrityError, DataError) as error:
            if users:
                raise
            self._broken = named(error, self._engine, operation)
            raise self._broken from error
        except (SQLAlchemyError, OSError) as error:
            theirs = (users or deadlocks) and is_again(error) and self._engine.dialect.name != "sqlite"
            self._broken = error if theirs else named(error, self._engine, operation)
            if theirs:
                raise
            raise self._broken from error

    def _check_open(self, operation: str) -> None:
        if self._closed:
            raise TransactionClosedError(operation)


def _around(session: Session) -> Iterator[SessionTransaction]:
    """Yield the open transactions of a session, the innermost savepoint first."""
    transaction = session.get_nested_transaction() or session.get_transaction()
    while transaction is not None:
        yield transaction
        transaction = transaction.parent


def _release(session: Session, point: SessionTransaction) -> None:
    if point in _around(session):  # not if the session's owner has ended it
        point.commit()


def _take_back(session: Session, point: SessionTransaction) -> None:
    if point in _around(session):
        point.rollback()


def _connection(session: Session) -> Connection:
    return session.connection(bind_arguments={"clause": ENTRY})


class _Trace:
    """Know what became of a session's transactions, by its public events."""

    def __init__(self, session: Session, link: Link) -> None:
        self._link = link
        self.undone: WeakSet[SessionTransaction] = WeakSet()
        self.waiting: list[Callable[[], object]] = []
        """What is to be called when the whole transaction has committed."""
        event.listen(session, "after_soft_rollback", self._rolled_back)
        event.listen(session, "after_commit", self._committed)
        event.listen(session, "after_transaction_end", self._ended)

    def _rolled_back(self, session: Session, transaction: SessionTransaction) -> None:
        self.undone.add(transaction)

    def _committed(self, session: Session) -> None:
        if session.get_nested_transaction() is None:  # a savepoint that is released says the same
            waiting, self.waiting = self.waiting, []
            for committed in waiting:
                self._link.post(committed)

    def _ended(self, session: Session, transaction: SessionTransaction) -> None:
        if transaction.parent is None:
            self.waiting.clear()


class OwnUnit(JoinedUnit):
    """Be a whole transaction, committed at the end, on a session that nobody else has.

    The session is made when somebody asks for it. What was published before its transaction begins is written as the
    first thing in it, and by one statement alone if nobody ever asks.
    """

    def __init__(self, link: Link, rows: Rows, engine: Engine, sessions: Callable[[], Any], add: Add) -> None:
        self._link = link
        self._rows = rows
        self._engine = engine
        self._closed = False
        self._broken = None
        self._sessions = sessions
        self._add = add
        self._made: Any = None
        self._first: list[NewEntry] = []
        """What was published before the session's transaction began."""

    @property
    def session(self) -> Any:
        """Return the session, made now if it is not there."""
        if self._made is None:
            self._made = self._sessions()
            self._trace()
            if self._link.level:
                event.listen(self._sync, "after_begin", _set_level)
            if self._first:
                event.listen(self._sync, "after_begin", self._write_first)
        return self._made

    async def add(self, entries: Sequence[NewEntry]) -> frozenset[str]:
        """Write entries at the latest with the commit; return the recipients that may get something to do."""
        if self._made is not None:
            return await super().add(entries)
        self._check_open("publishing")
        self._first += entries
        return self._rows.recipients(entries)

    def stands(self) -> Callable[[], bool]:
        """Return what tells whether work done now has not been undone by a savepoint of the session's user."""
        return super().stands() if self._made is not None else lambda: True

    def watch(self, committed: Callable[[], object]) -> bool:
        """Return no: the end of this unit is the commit."""
        return False

    async def settle(self, settlement: Settlement) -> bool:
        """Write a settlement; False if the lease is lost. Raises what is wrong with the user's own objects."""

        def written(session: Session) -> SQLAlchemyError | bool:
            try:
                session.flush()  # at the commit it could not be told from the store's own failures
            except SQLAlchemyError as error:
                if is_lost(error, session.get_bind().engine):
                    raise
                return error
            return not self._rows.settle(_connection(session), [settlement])

        outcome = await self._step("settling", written)
        if isinstance(outcome, SQLAlchemyError):
            raise outcome
        return outcome

    async def __aexit__(self, kind: object, error: object, trace: object) -> None:
        self._closed = True
        if self._made is None:
            if kind is None and self._first:
                await self._add(self._first)
            return
        broken = self._broken
        if kind is not None or broken is not None:
            await self._undo(lambda s: s.close())
            if broken is not None and kind is None:
                raise broken
            return
        try:
            users = await self._link.within(self._made, self._commit)
        except (SQLAlchemyError, OSError) as failed:
            unknown = not isinstance(failed, DBAPIError) or failed.connection_invalidated
            what = "the commit failed" + (", and whether it was done is not known" if unknown else "")
            raise named(failed, self._engine, what) from failed
        if users is not None:
            raise users

    def _write_first(self, session: Session, transaction: SessionTransaction, connection: Connection) -> None:
        if self._first and not transaction.nested and connection.engine.pool is self._engine.pool:
            first, self._first = self._first, []
            try:
                self._rows.add(connection, first)
            except SQLAlchemyError as error:
                self._broken = named(error, self._engine, "publishing")
                raise

    def _commit(self, session: Session) -> Exception | None:
        if self._first:
            _connection(session)
        return _commit(session)


def _commit(session: Session) -> Exception | None:
    """Commit; return what is wrong with the user's own objects, which are written just before."""
    try:
        try:
            session.flush()
        except SQLAlchemyError as error:
            return error
        session.commit()
    finally:
        session.close()
    return None


def _set_level(session: Session, transaction: SessionTransaction, connection: Connection) -> None:  # noqa: ARG001 - an event
    if not transaction.nested:
        connection.exec_driver_sql(READ_COMMITTED)
