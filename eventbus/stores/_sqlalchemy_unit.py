"""Be one transaction of the SQLAlchemy store: on a session of its own, or on the caller's."""

import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Self, TypeVar

from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.orm import Session

from eventbus.errors import TransactionClosedError
from eventbus.store import NewEntry, Settlement
from eventbus.stores._sqlalchemy_link import Link, named
from eventbus.stores._sqlalchemy_rows import Rows

__all__ = ("JoinedUnit", "OwnUnit")

T = TypeVar("T")

log = logging.getLogger("eventbus")


class JoinedUnit:
    """Be a part of the caller's transaction, which the caller begins and ends."""

    def __init__(self, link: Link, rows: Rows, engine: Engine, session: Any) -> None:
        self._link = link
        self._rows = rows
        self._engine = engine
        self._session = session
        self._closed = False

    @property
    def session(self) -> Any:
        """Return the session."""
        return self._session

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: object, error: object, trace: object) -> None:
        self._closed = True

    async def lock(self, seq: int, claims: int) -> bool:
        """Take the row lock of a claimed entry first of all; False if the lease is lost."""
        return await self._step("locking an entry", lambda s: self._rows.lock(s.connection(), seq, claims))

    async def add(self, entries: Sequence[NewEntry]) -> frozenset[str]:
        """Write entries in this transaction; duplicates are ignored. Return the recipients written to."""
        self._check_open("publishing")
        if not entries:
            return frozenset()
        return await self._step("publishing", lambda s: self._rows.add(s.connection(), entries))

    async def settle(self, settlement: Settlement) -> bool:
        """Write a settlement in this transaction; False if the lease is lost."""
        lost = await self._step("settling", lambda s: self._rows.settle(s.connection(), [settlement]))
        return not lost

    @asynccontextmanager
    async def savepoint(self) -> AsyncGenerator[None]:
        """Return a savepoint: rolled back on an exception, released otherwise."""
        point = await self._step("a savepoint", lambda s: s.begin_nested())
        try:
            yield
        except BaseException:
            await self._undo(lambda s: point.rollback() if point.is_active else None)
            raise
        if point.is_active:
            await self._step("a savepoint", lambda s: point.commit())

    async def _undo(self, step: Callable[[Session], object]) -> None:
        """Roll back; if that fails too, what has failed before is told."""
        try:
            await self._link.finish(self._session, step)
        except SQLAlchemyError as error:
            log.warning("rolling back: %s", named(error, self._engine))

    async def _step(self, operation: str, step: Callable[[Session], T]) -> T:
        self._check_open(operation)
        self._link.check()
        try:
            return await self._link.within(self._session, step)
        except (DBAPIError, OSError) as error:
            raise named(error, self._engine, operation) from error

    def _check_open(self, operation: str) -> None:
        if self._closed:
            raise TransactionClosedError(operation)


class OwnUnit(JoinedUnit):
    """Be a whole transaction, committed at the end, on a session that nobody else has."""

    async def __aexit__(self, kind: object, error: object, trace: object) -> None:
        self._closed = True
        if kind is not None:
            await self._undo(lambda s: s.close())
            return
        try:
            await self._link.finish(self._session, _commit)
        except (DBAPIError, OSError) as failed:
            raise named(failed, self._engine, "the commit failed, and whether it was done is not known") from failed


def _commit(session: Session) -> None:
    try:
        session.commit()
    finally:
        session.close()
