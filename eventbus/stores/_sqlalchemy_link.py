"""Reach the database through the user's engine: whole verbs, each to its end, whatever becomes of who asked for it."""

import asyncio
import contextlib
import logging
import os
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from typing import Any, Protocol, TypeVar

import anyio
import anyio.to_thread
from anyio.lowlevel import current_token
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session

from eventbus.errors import EventBusError, StoreError, StoreFullError, WrongLoopError

__all__ = ("AsyncLink", "Link", "ThreadLink", "named")

T = TypeVar("T")
Work = Callable[[Connection], T]
AnySession = AsyncSession | Session

THREADS = 64
"""Threads of a plain engine: more than a pool has connections, so that whoever holds one can always go on."""
TRIES = 4
"""Attempts at a verb that the database broke off for the sake of another."""
AGAIN = {"40001", "40P01", 1213, 1205, 1020, 5, 6}
"""Serialization failure, deadlock, lock timeout, changed row (MariaDB), SQLITE_BUSY, SQLITE_LOCKED."""
FULL = {"53100", "53200", 1021, 1114, 13}
"""Disk full, out of memory, table full (MariaDB), SQLITE_FULL."""

log = logging.getLogger("eventbus")


class Link(Protocol):
    """Run what needs a connection, or a session, where it can be run."""

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

    async def within(self, session: Any, step: Callable[[Session], T]) -> T:
        """Run a step on a session."""
        ...

    async def finish(self, session: Any, step: Callable[[Session], T]) -> T:
        """Run a step on a session to its end, though who asked for it is cancelled."""
        ...


def work_on(connection: Connection, work: Work[T], single: bool) -> T:
    """Run a verb on a connection."""
    if single:
        return work(connection)
    with connection.begin():
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


def named(error: BaseException, engine: Engine, doing: str = "") -> BaseException:
    """Return what an error is called outside, without passwords, statements or bodies."""
    if isinstance(error, EventBusError) or not isinstance(error, (SQLAlchemyError, OSError, TimeoutError)):
        return error
    orig = getattr(error, "orig", None) or error
    text = " ".join(str(orig).split())[:500] or type(orig).__name__
    password = engine.url.password
    if password:
        text = text.replace(str(password), "***")
    where = engine.url.render_as_string(hide_password=True)
    kind = StoreFullError if code(error) in FULL else StoreError
    found = kind(f"{where}: {doing}{': ' if doing else ''}{text}")
    found.__cause__ = error
    return found


class AsyncLink:
    """Reach the database through an ``AsyncEngine``, on asyncio."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._single = engine.execution_options(isolation_level="AUTOCOMMIT")
        self._plain = engine
        self._tasks: set[asyncio.Task[Any]] = set()
        self._home: tuple[int, object] | None = None

    async def open(self) -> None:
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError as error:
            raise StoreError(
                "an AsyncEngine works on asyncio only: give the store a plain Engine (create_engine) to use it on trio"
            ) from error
        self._home = os.getpid(), loop

    async def close(self) -> None:
        while self._tasks:
            await asyncio.wait(self._tasks)

    def check(self) -> None:
        if self._home is None or self._home[0] != os.getpid():
            raise WrongLoopError("using the SQLAlchemy store", "a forked process")
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            loop = None
        if loop is not self._home[1]:
            raise WrongLoopError("using the SQLAlchemy store", "another event loop")

    async def call(self, work: Work[T], *, single: bool, undo: Callable[[T], Work[Any]] | None = None) -> T:
        task = self._own(self._tried(work, single))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if undo is not None:
                task.add_done_callback(partial(self._undo, undo))
            raise

    async def within(self, session: AsyncSession, step: Callable[[Session], T]) -> T:
        return await session.run_sync(step)

    async def finish(self, session: AsyncSession, step: Callable[[Session], T]) -> T:
        return await asyncio.shield(self._own(session.run_sync(step)))

    def _own(self, coroutine: Coroutine[Any, Any, T]) -> "asyncio.Task[T]":
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: "asyncio.Task[Any]") -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # whoever waits has it; nobody else needs to hear of it

    def _undo(self, undo: Callable[[Any], Work[Any]], task: "asyncio.Task[Any]") -> None:
        if not task.cancelled() and task.exception() is None:
            self._own(self._tried(undo(task.result()), False))

    async def _tried(self, work: Work[T], single: bool) -> T:
        attempt = 1
        while True:
            try:
                return await self._once(work, single)
            except Exception as error:
                if attempt == TRIES or not is_again(error):
                    raise named(error, self._engine.sync_engine) from error
                log.debug("trying again: %s", error)
            attempt += 1

    async def _once(self, work: Work[T], single: bool) -> T:
        connection = await (self._single if single else self._plain).connect()
        try:
            return await connection.run_sync(work_on, work, single)
        finally:
            await connection.close()


class ThreadLink:
    """Reach the database through a plain ``Engine``, in threads that the store owns."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._single = engine.execution_options(isolation_level="AUTOCOMMIT")
        self._plain = engine
        self._threads: ThreadPoolExecutor | None = None
        self._post: Callable[[Callable[[], object]], object]
        self._home = 0

    async def open(self) -> None:
        self._threads = ThreadPoolExecutor(THREADS, "eventbus")
        self._post = poster()
        self._home = os.getpid()

    async def close(self) -> None:
        threads, self._threads = self._threads, None
        if threads is not None:
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(threads.shutdown)

    def check(self) -> None:
        if self._home != os.getpid():
            raise WrongLoopError("using the SQLAlchemy store", "a forked process")

    async def call(self, work: Work[T], *, single: bool, undo: Callable[[T], Work[Any]] | None = None) -> T:
        future, over = self._submit(partial(self._tried, work, single))
        try:
            await over.wait()
        except BaseException:
            if undo is not None:
                future.add_done_callback(partial(self._undo, undo))
            raise
        return future.result()

    async def within(self, session: Session, step: Callable[[Session], T]) -> T:
        return await self.finish(session, step)

    async def finish(self, session: Session, step: Callable[[Session], T]) -> T:
        lock = session.info.setdefault("eventbus_lock", threading.Lock())

        def run() -> T:
            with lock:  # an earlier step may go on though its caller was cancelled
                return step(session)

        future, over = self._submit(run)
        await over.wait()
        return future.result()

    def _submit(self, run: Callable[[], T]) -> "tuple[Future[T], anyio.Event]":
        if self._threads is None:
            raise StoreError("the SQLAlchemy store is not open: use it within `async with store:`")
        over, post = anyio.Event(), self._post
        future = self._threads.submit(copy_context().run, run)

        def tell(_: object) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is over, nobody waits
                post(over.set)

        future.add_done_callback(tell)
        return future, over

    def _undo(self, undo: Callable[[Any], Work[Any]], future: "Future[Any]") -> None:
        if future.exception() is None and self._threads is not None:
            self._threads.submit(self._tried, undo(future.result()), False)

    def _tried(self, work: Work[T], single: bool) -> T:
        attempt = 1
        while True:
            try:
                with (self._single if single else self._plain).connect() as connection:
                    return work_on(connection, work, single)
            except Exception as error:
                if attempt == TRIES or not is_again(error):
                    raise named(error, self._engine) from error
                log.debug("trying again: %s", error)
            attempt += 1


def poster() -> Callable[[Callable[[], object]], object]:
    """Return how another thread has something called in this event loop without waiting for it."""
    token: Any = current_token()
    native = getattr(token, "native_token", token)  # anyio before 4.11 hands out the loop's own
    trios: Callable[[Callable[[], object]], object] | None = getattr(native, "run_sync_soon", None)
    return native.call_soon_threadsafe if trios is None else trios
