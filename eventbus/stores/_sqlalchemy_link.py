"""Reach the database through the user's engine: whole verbs, each to its end, whatever becomes of who asked for it."""

import logging
import random
from collections.abc import Callable
from itertools import chain
from typing import Any, Protocol, TypeVar

from sqlalchemy import URL, Connection, Engine
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.orm import Session

from eventbus.errors import EventBusError, StoreError, StoreFullError

__all__ = (
    "CHANNEL",
    "READ_COMMITTED",
    "Link",
    "Work",
    "is_again",
    "is_lost",
    "named",
    "needs_level",
    "pause",
    "shown",
    "work_on",
)

log = logging.getLogger("eventbus")

T = TypeVar("T")
Work = Callable[[Connection], T]

TRIES = 8
"""Attempts at a verb that the database broke off for the sake of another."""
SHORTEST = 0.005
"""Seconds before the second attempt at the most, doubling from there: those that met would meet again at once."""
AGAIN = {"40001", "40P01", 1213, 1205, 1020, 5, 6}
"""Serialization failure, deadlock, lock timeout, changed row (MariaDB), SQLITE_BUSY, SQLITE_LOCKED."""
FULL = {"53100", "53200", 1021, 1114, 13}
"""Disk full, out of memory, table full (MariaDB), SQLITE_FULL."""

SHORT = 4
"""Letters below which an option of a URL is no secret."""

CHANNEL = "eventbus"
"""What a writer notifies and a listener listens to, in PostgreSQL."""


class Link(Protocol):
    """Run what needs a connection, or a session, where it can be run."""

    level: bool
    """Whether transactions have to be told to be READ COMMITTED."""

    async def open(self) -> None:
        """Get ready. Raises ``StoreError`` where this engine cannot work."""
        ...

    async def close(self) -> None:
        """Wait for what still runs."""
        ...

    def check(self) -> None:
        """Raise ``WrongLoopError`` where this engine is not at home."""
        ...

    async def call(self, work: Work[T], *, single: bool, undo: Callable[[T], Work[Any]] | None = None) -> T:
        """Run a verb to its end in a transaction of its own, or ``single``: none; ``undo`` what nobody waited for."""
        ...

    def launch(self, work: Work[T], over: Callable[[T | None, BaseException | None], object]) -> None:
        """Run a verb of one statement to its end, and have ``over`` called in the event loop with what came of it."""
        ...

    async def within(self, session: Any, step: Callable[[Session], T]) -> T:
        """Run a step on a session to its end, though who asked for it is cancelled; one after another."""
        ...

    def post(self, what: Callable[[], object], /) -> None:
        """Have something called in the event loop, from whatever thread a session was committed in."""
        ...

    async def hear(self, wake: Callable[[], None]) -> None:
        """Call ``wake`` whenever PostgreSQL notifies, and whenever this begins to listen, until the link is lost."""
        ...


READ_COMMITTED = "SET TRANSACTION ISOLATION LEVEL READ COMMITTED"


def needs_level(connection: Connection) -> bool:
    """Tell whether transactions have to be told to be READ COMMITTED."""
    return connection.dialect.name != "sqlite" and connection.get_isolation_level() != "READ COMMITTED"


def work_on(connection: Connection, work: Work[T], single: bool, level: bool) -> T:
    """Run a verb on a connection."""
    if single:
        return work(connection)
    with connection.begin():
        if level:
            connection.exec_driver_sql(READ_COMMITTED)
        return work(connection)


def code(error: BaseException) -> object:
    """Return what the database calls an error: an SQLSTATE, or the number of MariaDB or SQLite."""
    orig: Any = error.orig if isinstance(error, DBAPIError) else error
    state = getattr(orig, "sqlstate", None) or getattr(orig, "sqlite_errorcode", None)
    if isinstance(state, int):
        return state & 0xFF
    first = orig.args[0] if getattr(orig, "args", ()) else None
    return state or (first if isinstance(first, int) else None)


def is_again(error: BaseException) -> bool:
    """Tell whether the database broke a transaction off for the sake of another, so that it can be tried again."""
    return isinstance(error, DBAPIError) and code(error) in AGAIN


def pause(error: Exception, attempt: int, repeats: bool, engine: Engine) -> float:
    """Return the seconds to wait before a verb is tried again; raise what its error is called if it is not.

    ``repeats``: it does no harm twice, so that it is tried again, once, after a connection that was lost.
    """
    again = is_again(error) or (repeats and attempt == 1 and is_lost(error, engine))
    if attempt == TRIES or not again:
        raise named(error, engine) from error
    log.debug("trying again: %s", error)
    return random.uniform(0.0, SHORTEST * 2 ** (attempt - 1))


def is_lost(error: BaseException, engine: Engine) -> bool:
    """Tell whether the connection was lost: one from the pool may have been dead for long.

    Every verb but a claim can be repeated even if it was done: the unique key and the fence see to it.
    """
    if isinstance(error, DBAPIError):
        return error.connection_invalidated
    return isinstance(error, engine.dialect.loaded_dbapi.Error)  # bare while a connection is made AUTOCOMMIT


def shown(url: URL) -> str:
    """Return a URL without its password and its options, which may hold another one."""
    return url.set(query={}).render_as_string(hide_password=True)


def named(error: BaseException, engine: Engine, doing: str = "") -> BaseException:
    """Return what an error is called outside, without passwords, statements or bodies."""
    if isinstance(error, EventBusError):
        return error
    if not isinstance(error, (SQLAlchemyError, OSError, TimeoutError)) and not is_lost(error, engine):
        return error
    orig = getattr(error, "orig", None) or error
    text = " ".join(str(orig).split())[:500] or type(orig).__name__
    given = chain.from_iterable([one] if isinstance(one, str) else one for one in engine.url.query.values())
    for secret in filter(None, (engine.url.password, *(one for one in given if len(one) >= SHORT))):
        text = text.replace(str(secret), "***")
    where = shown(engine.url)
    kind = StoreFullError if code(error) in FULL else StoreError
    found = kind(f"{where}: {doing}{': ' if doing else ''}{text}")
    found.__cause__ = error
    return found
