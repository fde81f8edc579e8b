"""Make an empty database for a test, and drop it behind it."""

import asyncio
import itertools
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from sqlalchemy import make_url
from sqlalchemy.ext.asyncio import create_async_engine

from tests.servers.server import Server

NUMBERS = itertools.count(1)


@contextmanager
def database(server: Server) -> Iterator[str]:
    """Yield the URL of an empty database on a server that runs; it is gone afterwards.

    A server that a test left stopped is started again for that.
    """
    server.start()
    name = f"eventbus_{os.getpid()}_{next(NUMBERS)}"
    execute(server.url, f"CREATE DATABASE {name}")
    try:
        yield make_url(server.url).set(database=name).render_as_string(hide_password=False)
    finally:
        server.start()
        execute(server.url, f"DROP DATABASE {name}{' WITH (FORCE)' if 'postgres' in server.url else ''}")


def execute(url: str, *statements: str) -> None:
    """Run statements, each in a transaction of its own, from a test that is not asynchronous."""
    with ThreadPoolExecutor(1) as thread:  # a loop of its own, whatever runs in this thread
        thread.submit(asyncio.run, _execute(url, statements)).result()


async def _execute(url: str, statements: tuple[str, ...]) -> None:
    engine = create_async_engine(url, isolation_level="AUTOCOMMIT")
    try:
        async with engine.connect() as connection:
            for statement in statements:
                await connection.exec_driver_sql(statement)
    finally:
        await engine.dispose()


def fetch(url: str, statement: str) -> list[tuple[Any, ...]]:
    """Return all rows that a query finds."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, _fetch(url, statement)).result()


async def _fetch(url: str, statement: str) -> list[tuple[Any, ...]]:
    engine = create_async_engine(url)
    try:
        async with engine.connect() as connection:
            return [tuple(row) for row in await connection.exec_driver_sql(statement)]
    finally:
        await engine.dispose()
