"""Reach the database through an ``AsyncEngine``: every verb in a task that the store owns."""

import asyncio
import os
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, TypeVar

import anyio
from sqlalchemy import Connection
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession
from sqlalchemy.orm import Session
from sqlalchemy.util import greenlet_spawn

from eventbus.errors import StoreError, WrongLoopError
from eventbus.stores._sqlalchemy_link import CHANNEL, Work, needs_level, pause, work_on

__all__ = ("AsyncLink",)

T = TypeVar("T")

LONG = 30.0
"""Seconds after which a listener looks whether its connection is alive, in case that nothing is heard."""


async def _hear_psycopg(driver: Any, wake: Callable[[], None]) -> None:
    await driver.execute(f"LISTEN {CHANNEL}")
    wake()
    while True:
        async for _ in driver.notifies(timeout=LONG):
            wake()
        await driver.execute("SELECT 1")


async def _hear_asyncpg(driver: Any, wake: Callable[[], None]) -> None:
    lost = anyio.Event()

    def end(*_: object) -> None:
        lost.set()

    def hear(*_: object) -> None:
        wake()

    driver.add_termination_listener(end)
    await driver.add_listener(CHANNEL, hear)
    wake()
    while not lost.is_set():
        with anyio.move_on_after(LONG):
            await lost.wait()
        await driver.execute("SELECT 1")


async def _close(opening: "asyncio.Task[tuple[Any, AsyncConnection]]") -> None:
    driver, connection = await opening
    await connection.invalidate()  # else the pool would close it too, in a task that nobody owns
    await connection.close()
    await driver.close()


class AsyncLink:
    """Reach the database through an ``AsyncEngine``, on asyncio."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._single = engine.execution_options(isolation_level="AUTOCOMMIT")
        self._plain = engine
        self.level = False
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
        self.level = await self.call(needs_level, single=False)

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
        task = self._own(self._tried(work, single, undo is None))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if undo is not None:
                task.add_done_callback(partial(self._undo, undo))
            raise

    def launch(self, work: Work[T], over: Callable[[T | None, BaseException | None], object]) -> None:
        def ended(task: "asyncio.Task[T]") -> None:
            if task.cancelled():
                over(None, StoreError("the event loop was closed meanwhile, and whether it was done is not known"))
            elif (error := task.exception()) is not None:
                over(None, error)
            else:
                over(task.result(), None)

        self._own(self._tried(work, True)).add_done_callback(ended)

    async def within(self, session: AsyncSession, step: Callable[[Session], T]) -> T:
        return await asyncio.shield(self._own(self._step(session, step)))

    async def _step(self, session: AsyncSession, step: Callable[[Session], T]) -> T:
        async with session.info.setdefault("eventbus_lock", asyncio.Lock()):  # the caller of the last one may be gone
            return await session.run_sync(step)

    def post(self, what: Callable[[], object]) -> None:
        what()

    async def hear(self, wake: Callable[[], None]) -> None:
        opening = self._own(self._detached())
        try:
            driver, _ = await asyncio.shield(opening)
            await (_hear_asyncpg if hasattr(driver, "add_listener") else _hear_psycopg)(driver, wake)
        finally:
            await asyncio.shield(self._own(_close(opening)))

    async def _detached(self) -> tuple[Any, AsyncConnection]:
        """Return a driver's connection that is made as the engine makes them, and not of its pool any more."""
        connection = await self._single.connect()
        driver = (await connection.get_raw_connection()).driver_connection
        await connection.run_sync(Connection.detach)
        return driver, connection

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
            _ = self._own(self._tried(undo(task.result()), False))

    async def _tried(self, work: Work[T], single: bool, repeats: bool = True) -> T:
        attempt = 0
        while True:
            attempt += 1
            try:
                return await greenlet_spawn(self._once, work, single)
            except Exception as error:
                wait = pause(error, attempt, repeats, self._engine.sync_engine)
            await asyncio.sleep(wait)

    def _once(self, work: Work[T], single: bool) -> T:
        engine = self._single if single else self._plain
        with engine.sync_engine.connect() as connection:
            return work_on(connection, work, single, self.level)
