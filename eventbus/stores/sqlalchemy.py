"""Keep entries in the user's own database, through the user's SQLAlchemy engine."""

import contextlib
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import Any, Self, TypeVar

import anyio

from eventbus.errors import MissingExtraError, StoreError

try:
    from sqlalchemy import URL, Connection, Engine, create_engine, make_url
    from sqlalchemy.exc import ArgumentError, DBAPIError, InvalidRequestError, NoSuchModuleError
    from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
    from sqlalchemy.orm import Session, sessionmaker
except ModuleNotFoundError as error:
    if error.name is None or error.name.partition(".")[0] not in ("sqlalchemy", "greenlet"):
        raise
    raise MissingExtraError("eventbus.stores.sqlalchemy", "sqlalchemy") from error

from eventbus.clock import Clock, Setback
from eventbus.limits import Limits
from eventbus.store import (
    Backlog,
    Claimed,
    DeadEntry,
    DeadFilter,
    Interest,
    NewEntry,
    Recipient,
    Settlement,
    Unit,
)
from eventbus.stores._sqlalchemy_async import AsyncLink
from eventbus.stores._sqlalchemy_gathering import Gathering
from eventbus.stores._sqlalchemy_link import Link, named, shown
from eventbus.stores._sqlalchemy_mariadb import MariaDBRows
from eventbus.stores._sqlalchemy_postgresql import PostgreSQLRows
from eventbus.stores._sqlalchemy_rows import BATCH, Rows
from eventbus.stores._sqlalchemy_schema import ENTRY, ddl, include_object, metadata, prepare
from eventbus.stores._sqlalchemy_sqlite import SQLiteRows, really_begin
from eventbus.stores._sqlalchemy_sweeping import hasten, look, sweep
from eventbus.stores._sqlalchemy_threads import ThreadLink
from eventbus.stores._sqlalchemy_unit import JoinedUnit, OwnUnit

__all__ = ("SQLAlchemyStore", "ddl", "include_object", "metadata")

T = TypeVar("T")

POLL = 0.5
"""Seconds between two looks at whether another process has written, and between two attempts to listen."""
RACES = 10
"""Attempts at making tables that other processes make at the same time."""
DRIVERS = {"postgresql": "psycopg", "mariadb": "asyncmy", "mysql": "asyncmy"}
"""Which driver a URL means that names none."""
DEFAULTS = Limits()

log = logging.getLogger("eventbus")


class SQLAlchemyStore:
    """Keep entries in the user's database, so that what is published is one commit with the user's own rows.

    Works with PostgreSQL (psycopg, asyncpg), MariaDB 10.6 (asyncmy) and SQLite (aiosqlite, which from then on emits a
    real BEGIN). A transaction that the store opens is READ COMMITTED; a session that it joins keeps its own level.

    Args:
        engine: an ``AsyncEngine`` (asyncio only) or an ``Engine``, whose calls are made in threads; on SQLite better
            the latter, because aiosqlite leaves a thread behind when it is cancelled while it connects.
        listen: False for a PostgreSQL behind a pooler, where LISTEN reaches nobody: the store polls only.
        create: make the tables at the start if they are not there.
        sessionmaker: how sessions are made, such as ``async_sessionmaker(engine, class_=...)``; SQLAlchemy's own
            otherwise, with ``expire_on_commit=False``.
        limits: ``waiting`` is the ceiling of a silent handler.

    Verbs raise ``StoreFullError`` when there is no room, ``StoreError`` for everything else that goes wrong with the
    database, a missing or too new schema included; neither shows a password.

    >>> from sqlalchemy.ext.asyncio import create_async_engine
    >>> store = SQLAlchemyStore(create_async_engine("postgresql+psycopg://localhost/shop"))  # doctest: +SKIP
    """

    def __init__(
        self,
        engine: AsyncEngine | Engine,
        *,
        listen: bool = True,
        create: bool = False,
        sessionmaker: "async_sessionmaker[Any] | sessionmaker[Any] | None" = None,
        limits: Limits = DEFAULTS,
    ) -> None:
        self._engine = engine.sync_engine if isinstance(engine, AsyncEngine) else engine
        self._create = create
        self._listen = listen
        self._own: AsyncEngine | Engine | None = None
        self._link: Link = AsyncLink(engine) if isinstance(engine, AsyncEngine) else ThreadLink(engine)
        self._sessions = sessionmaker or _sessionmaker(engine)
        self._rows = _rows(self._engine, limits, notify=listen)
        self._where = shown(self._engine.url)
        self._gathering = Gathering(self._link, self._rows.add) if "add" in self._rows.single else None
        self._setback = Setback(None)
        self._open = False

    @classmethod
    def from_url(cls, url: str, *, limits: Limits = DEFAULTS) -> Self:
        """Return the store of an SQLAlchemy URL, with an engine of its own that is disposed of when it closes.

        ``?create=true`` and ``?listen=false`` are as the arguments; what else stands there is for the driver. Without
        a driver PostgreSQL means psycopg, MariaDB asyncmy.
        """
        parts = _quietly(lambda: make_url(url))
        if "@" in (parts.host or ""):
            raise ValueError("the URL of the store has a second @: percent-encode what stands in a password")
        options: dict[str, Any] = {
            name: _flag(name, parts.query[name]) for name in ("create", "listen") if name in parts.query
        }
        parts = parts.difference_update_query(["create", "listen"])
        if parts.drivername in DRIVERS:
            parts = parts.set(drivername=f"{parts.drivername}+{DRIVERS[parts.drivername]}")
        try:
            engine = _quietly(lambda: _engine(parts))
        except ModuleNotFoundError as error:
            raise StoreError(f"{parts.drivername} needs a library: pip install {error.name}") from error
        store = cls(engine, limits=limits, **options)
        store._own = engine
        return store

    @property
    def dialect(self) -> str:
        """Return what ``ddl`` takes for this database."""
        return self._engine.dialect.name

    @property
    def shared(self) -> bool:
        """Tell that other processes see this store."""
        return True

    @property
    def exclusive(self) -> bool:
        """Tell whether an open transaction keeps every other writer out: on SQLite."""
        return self._engine.dialect.name == "sqlite"

    @property
    def sessions(self) -> tuple[type, ...]:
        """Return what ``Transaction[S]`` may name."""
        return (self._sessions.class_,)

    def bind(self, clock: Clock | None) -> None:
        """Take times from ``clock`` instead of the database; None goes back."""
        self._rows.clock, self._setback = clock, Setback(clock)

    async def __aenter__(self) -> Self:
        """Open: look at the database and its tables. Raises ``StoreError``."""
        if self._open:
            raise StoreError(f"the store of {self._where} is open already")
        try:
            await self._link.open()
            await self._prepare()
        except TypeError as error:
            await self._link.close()
            raise StoreError(f"{self._where}: the driver does not take an option of the URL: {error}") from error
        except BaseException:
            await self._link.close()
            raise
        self._open = True
        return self

    async def _prepare(self) -> None:
        work = partial(prepare, create=self._create, where=self._where)
        for attempt in range(RACES):
            try:
                await self._link.call(work, single=False)
            except StoreError as error:
                made_by_another = self._create and isinstance(error.__cause__, DBAPIError)
                if not made_by_another or attempt == RACES - 1:
                    raise
                await anyio.sleep(random.uniform(0.0, 0.1))
            else:
                return

    async def __aexit__(self, *exc: object) -> None:
        """Close; the engine is the caller's and stays as it is."""
        if self._open:
            self._open = False
            await self._link.close()
            if isinstance(self._own, AsyncEngine):
                await self._own.dispose()
            elif self._own is not None:
                self._own.dispose()

    def begin(self, session: object | None = None) -> AbstractAsyncContextManager[Unit]:
        """Return a transaction; ``session`` joins the caller's, which the caller commits.

        Raises ``StoreError`` for a session of another engine, ``TypeError`` for something else.
        """
        self._check()
        if session is None:
            return OwnUnit(self._link, self._rows, self._engine, self._sessions, self.add)
        return JoinedUnit(self._link, self._rows, self._engine, self._checked(session))

    def _checked(self, session: object) -> object:
        wanted = AsyncSession if isinstance(self._link, AsyncLink) else Session
        if not isinstance(session, wanted):
            raise TypeError(f"this store joins a {wanted.__name__}, not {session!r}")
        sync: Session = session.sync_session if isinstance(session, AsyncSession) else session
        other = sync.get_bind(clause=ENTRY).engine
        if other.pool is not self._engine.pool:
            raise StoreError(
                f"the session works on {shown(other.url)}, the store on {self._where} through another engine: what "
                "they write is not committed together. Make both of the same engine"
            )
        return session

    async def add(self, entries: Sequence[NewEntry]) -> frozenset[str]:
        """Write entries; return the recipients written to."""
        self._check()
        if not entries:
            return frozenset()
        if self._gathering is not None:
            return await self._gathering.add(entries)
        return await self._write(partial(self._rows.add, entries=tuple(entries)))

    async def claim(self, recipient: Recipient, *, owner: str, limit: int, lease: float, cursor: str = "") -> Claimed:
        """Lease up to ``limit`` due entries; if the caller is cancelled meanwhile they are released."""
        work = partial(self._rows.claim, recipient=recipient, owner=owner, limit=limit, lease=lease, cursor=cursor)
        self._check()
        return await self._link.call(work, single="claim" in self._rows.single, undo=self._give_back)

    def _give_back(self, claimed: Claimed) -> Callable[[Connection], object]:
        released = [Settlement(entry.seq, entry.claims, "release") for entry in claimed.entries]
        return partial(self._rows.settle, settlements=released)

    async def settle(self, settlements: Sequence[Settlement]) -> frozenset[int]:
        """Write many settlements; return the seqs whose lease was lost."""
        return await self._write(partial(self._rows.settle, settlements=tuple(settlements)))

    async def extend(self, held: Sequence[tuple[int, int]], lease: float) -> frozenset[int]:
        """Renew leases; return the seqs whose lease was lost."""
        return await self._write(partial(self._rows.extend, held=tuple(held), lease=lease))

    async def announce(self, interests: Sequence[Interest], *, aliases: Sequence[tuple[str, str]] = ()) -> None:
        """Write interests with the time; move entries of old names to the new ones."""
        await self._write(partial(self._rows.announce, interests=tuple(interests)))
        for old, new in aliases:
            while old != new and await self._write(partial(self._rows.rename, old=old, new=new, batch=BATCH)):
                pass

    async def forget(self, recipient: str) -> int:
        """Drop a recipient's interests and make its waiting entries dead; return how many."""
        forgotten = more = await self._write(partial(self._rows.forget, name=recipient, batch=BATCH))
        while more:
            more = await self._write(partial(self._rows.forget, name=recipient, batch=BATCH))
            forgotten += more
        return forgotten

    async def due(self, recipients: Sequence[str]) -> dict[str, float]:
        """Return for each recipient with waiting entries the seconds until its first can be claimed."""
        return await self._read(partial(self._rows.due, recipients=tuple(recipients)))

    async def sweep(self, *, retention: float, lease: float, batch: int) -> int:
        """Prune what is older than ``retention``, and mend what a clock that jumped has done."""
        swept = await self._write(partial(sweep, self._rows, retention=retention, lease=lease, batch=batch))

        async def mend(back: int) -> int:
            work = partial(hasten, self._rows, back=back, lease=round(lease * 1000), batch=batch)
            return await self._write(work)

        return swept + await self._setback.mend(lambda: self._read(partial(look, self._rows)), mend, batch)

    async def backlog(self) -> Sequence[Backlog]:
        """Count what waits and what is dead, per recipient."""
        return await self._read(partial(self._rows.backlog))

    async def dead(self, chosen: DeadFilter) -> Sequence[DeadEntry]:
        """Return chosen dead entries, oldest first."""
        return await self._read(partial(self._rows.dead, chosen=chosen))

    async def replay(self, chosen: DeadFilter) -> Mapping[str, int]:
        """Make chosen dead entries due now, failures forgotten; return how many per recipient."""
        return await self._write(partial(self._rows.replay, chosen=chosen))

    async def discard(self, chosen: DeadFilter) -> int:
        """Forget chosen dead entries but for their ids; return how many."""
        return await self._write(partial(self._rows.discard, chosen=chosen))

    async def listen(self, wake: Callable[[], None]) -> None:
        """Call ``wake`` when another process may have written, until cancelled; with a bound clock nothing else writes.

        PostgreSQL notifies, on a connection that the pool lends for good; for the others the highest number is asked.
        """
        if self._rows.clock is not None:
            await anyio.sleep_forever()
        if self._listen and self._engine.dialect.name == "postgresql":
            await self._hear(wake)
        seen: int | None = None
        while True:
            await anyio.sleep(POLL)
            highest = seen
            with contextlib.suppress(StoreError):  # the verbs will tell
                highest = await self._read(partial(self._rows.highest))
            if highest != seen:
                wake()
            seen = highest

    async def _hear(self, wake: Callable[[], None]) -> None:
        failures = 0

        def heard() -> None:
            nonlocal failures
            failures = 0
            wake()

        while True:
            try:
                await self._link.hear(heard)
            except Exception as error:
                log.warning("listening is interrupted, polling goes on: %s", named(error, self._engine))
            failures += 1
            await anyio.sleep(min(POLL * 2**failures, 10.0) * random.uniform(0.5, 1.0))

    def _check(self) -> None:
        if not self._open:
            raise StoreError(f"the store of {self._where} is not open: use it within `async with store:`")
        self._link.check()

    async def _write(self, verb: "partial[T]") -> T:
        self._check()
        return await self._link.call(verb, single=verb.func.__name__ in self._rows.single)

    async def _read(self, verb: "partial[T]") -> T:
        self._check()
        return await self._link.call(verb, single=True)


def _flag(name: str, value: object) -> bool:
    if value not in ("true", "false"):
        raise ValueError(f"?{name}= is true or false")
    return value == "true"


def _engine(parts: URL) -> AsyncEngine | Engine:
    try:
        return create_async_engine(parts)
    except InvalidRequestError:  # the driver is not an async one
        return create_engine(parts)


def _quietly(step: Callable[[], T]) -> T:
    """Return what a step makes of a URL. Raises ``ValueError`` that quotes none of it, as SQLAlchemy's own may."""
    try:
        return step()
    except NoSuchModuleError as error:
        why = f"SQLAlchemy knows no such driver: {error}"
    except (ArgumentError, TypeError, ValueError):
        why = "SQLAlchemy cannot read the URL of the store: user and password percent-encoded, the port a number"
    raise ValueError(why)


def _sessionmaker(engine: AsyncEngine | Engine) -> "async_sessionmaker[AsyncSession] | sessionmaker[Session]":
    if isinstance(engine, AsyncEngine):
        return async_sessionmaker(engine, expire_on_commit=False)
    return sessionmaker(engine, expire_on_commit=False)


def _rows(engine: Engine, limits: Limits, *, notify: bool) -> Rows:
    match engine.dialect.name:
        case "postgresql":
            return PostgreSQLRows(limits, notify=notify)
        case "mariadb" | "mysql":
            return MariaDBRows(limits)
        case "sqlite":
            really_begin(engine)
            return SQLiteRows(limits)
        case name:
            raise ValueError(f"no store in {name}: known are PostgreSQL, MariaDB and SQLite")
