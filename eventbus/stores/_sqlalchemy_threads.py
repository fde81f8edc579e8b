"""Reach the database through a plain ``Engine``: every call in a thread that the store owns."""

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextvars import copy_context
from functools import partial
from typing import Any, TypeVar

import anyio
import anyio.to_thread
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from eventbus._loop import poster
from eventbus.errors import StoreError, WrongLoopError
from eventbus.stores._sqlalchemy_link import CHANNEL, Work, needs_level, pause, work_on

__all__ = ("ThreadLink",)

T = TypeVar("T")

THREADS = 64
"""Threads of a plain engine: more than a pool has connections, so that whoever holds one can always go on."""
SHORT = 0.5
"""Seconds after which a listening thread looks whether it is still wanted."""

LAST = "eventbus_last"
"""Where a session keeps what was done on it last."""


class ThreadLink:
    """Reach the database through a plain ``Engine``, in threads that the store owns."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._single = engine.execution_options(isolation_level="AUTOCOMMIT")
        self._plain = engine
        self.level = False
        self._threads: ThreadPoolExecutor | None = None
        self._closing = threading.Event()
        self.post: Callable[[Callable[[], object]], None]
        self._home = 0

    async def open(self) -> None:
        self._closing.clear()
        self._threads = ThreadPoolExecutor(THREADS, "eventbus")
        self.post = poster()
        self._home = os.getpid()
        self.level = await self.call(needs_level, single=False)

    async def close(self) -> None:
        self._closing.set()
        threads, self._threads = self._threads, None
        if threads is not None:
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(threads.shutdown)

    def check(self) -> None:
        if self._home != os.getpid():
            raise WrongLoopError("using the SQLAlchemy store", "a forked process")

    async def call(self, work: Work[T], *, single: bool, undo: Callable[[T], Work[Any]] | None = None) -> T:
        future, over = self._submit(partial(self._tried, work, single, undo is None))
        try:
            await over.wait()
        except BaseException:
            if undo is not None:
                future.add_done_callback(partial(self._undo, undo))
            raise
        return future.result()

    def launch(self, work: Work[T], over: Callable[[T | None, BaseException | None], object]) -> None:
        def ended(future: "Future[T]") -> None:
            error = future.exception()
            result = future.result() if error is None else None
            self.post(partial(over, result, error))

        if self._threads is None:
            raise StoreError("the SQLAlchemy store is not open: use it within `async with store:`")
        self._threads.submit(copy_context().run, partial(self._tried, work, True)).add_done_callback(ended)

    async def within(self, session: Session, step: Callable[[Session], T]) -> T:
        last: Future[Any] | None = session.info.get(LAST)

        def run() -> T:
            if last is not None:
                wait([last])  # it may go on though its caller was cancelled
            return step(session)

        future, over = self._submit(run)
        session.info[LAST] = future
        await over.wait()
        return future.result()

    async def hear(self, wake: Callable[[], None]) -> None:
        over = threading.Event()

        def run() -> None:
            with self._single.connect() as connection:
                driver: Any = connection.connection.driver_connection
                connection.detach()  # the pool makes itself another
                connection.invalidate()
            with driver:
                driver.execute(f"LISTEN {CHANNEL}")
                self.post(wake)
                while not (over.is_set() or self._closing.is_set()):
                    for _ in driver.notifies(timeout=SHORT, stop_after=1):
                        self.post(wake)

        future, heard = self._submit(run)
        try:
            await heard.wait()
        finally:
            over.set()
        future.result()

    def _submit(self, run: Callable[[], T]) -> "tuple[Future[T], anyio.Event]":
        if self._threads is None:
            raise StoreError("the SQLAlchemy store is not open: use it within `async with store:`")
        over = anyio.Event()
        future = self._threads.submit(copy_context().run, run)

        future.add_done_callback(lambda _: self.post(over.set))
        return future, over

    def _undo(self, undo: Callable[[Any], Work[Any]], future: "Future[Any]") -> None:
        if future.exception() is None and self._threads is not None:
            self._threads.submit(self._tried, undo(future.result()), False)

    def _tried(self, work: Work[T], single: bool, repeats: bool = True) -> T:
        attempt = 0
        while True:
            attempt += 1
            try:
                with (self._single if single else self._plain).connect() as connection:
                    return work_on(connection, work, single, self.level)
            except Exception as error:
                wait = pause(error, attempt, repeats, self._engine)
            time.sleep(wait)
