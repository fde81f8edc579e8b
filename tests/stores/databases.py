"""Make databases of their own for tests of the SQLAlchemy store, one for each driver and module."""

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import Engine, create_engine, make_url, text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from eventbus.stores.sqlalchemy import metadata

DRIVERS = ("psycopg", "asyncpg", "asyncmy", "aiosqlite")
KINDS = (*DRIVERS, "sync psycopg")
CASES = [*((kind, "asyncio") for kind in KINDS), ("sync psycopg", "trio")]
"""Which engine on which backend: an ``AsyncEngine`` is for asyncio only."""
ON_ASYNCIO = pytest.mark.parametrize("anyio_backend", ["asyncio"])


@dataclass(frozen=True)
class Database:
    """Be an empty database, and how it is reached."""

    kind: str
    url: str

    def engine(self, **options: Any) -> Any:
        """Return a new engine."""
        return (create_engine if self.kind.startswith("sync") else create_async_engine)(self.url, **options)

    def run(self, *statements: str) -> list[Any]:
        """Run statements by themselves; return the rows of the last one."""
        with ThreadPoolExecutor(1) as elsewhere:  # a test's own event loop may be running here
            return elsewhere.submit(asyncio.run, _run(self.url, statements)).result()

    def wipe(self, *more: str) -> None:
        """Drop the tables of the store, and run what else is to be run."""
        self.run(*(f"DROP TABLE IF EXISTS {table.name}" for table in metadata.sorted_tables), *more)


async def _run(url: str, statements: tuple[str, ...]) -> list[Any]:
    engine = create_async_engine(url, isolation_level="AUTOCOMMIT")
    rows: list[Any] = []
    try:
        async with engine.connect() as connection:
            for statement in statements:
                result = await connection.execute(text(statement))
                rows = list(result.all()) if result.returns_rows else []
    finally:
        await engine.dispose()
    return rows


@contextmanager
def a_database(kind: str, request: pytest.FixtureRequest, directory: Path) -> Iterator[Database]:
    """Make a database, and drop it at the end."""
    driver = kind.rsplit(maxsplit=1)[-1]
    if driver == "aiosqlite":
        yield Database(kind, f"sqlite+aiosqlite:///{directory / 'test.db'}")
        return
    base = make_url(request.getfixturevalue("mariadb" if driver == "asyncmy" else "postgres").url)
    name = f"eventbus_{uuid4().hex[:12]}"
    server = Database(kind, base.render_as_string(hide_password=False))
    server.run(f"CREATE DATABASE {name}")
    mine = base.set(drivername=f"{base.get_backend_name()}+{driver}", database=name)
    try:
        yield Database(kind, mine.render_as_string(hide_password=False))
    finally:
        server.run(f"DROP DATABASE {name}" + (" WITH (FORCE)" if driver != "asyncmy" else ""))


Databases = Callable[[str], Database]


async def dispose(engine: AsyncEngine | Engine) -> None:
    """Close what an engine has in its pool."""
    if isinstance(engine, AsyncEngine):
        await engine.dispose()
    else:
        engine.dispose()
