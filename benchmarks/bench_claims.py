"""Measure what a claim from PostgreSQL and MariaDB costs where many and where very many entries wait."""

import sys
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager

from sqlalchemy.ext.asyncio import create_async_engine

from benchmarks.measure import Effort, Row
from benchmarks.waiting import claim_rows
from eventbus.store import Store
from eventbus.stores.sqlalchemy import SQLAlchemyStore
from tests.servers import mariadb, postgres
from tests.servers.databases import database
from tests.servers.server import AbsentError, Server

__all__ = ("rows",)


async def rows(effort: Effort) -> Sequence[Row]:
    """Return the comparisons, for the databases that are there."""
    found: list[Row] = []
    for name, recipe in (("PostgreSQL", postgres.recipe), ("MariaDB", mariadb.recipe)):
        try:
            server = Server(recipe(durable=False))
        except AbsentError as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
            continue

        @asynccontextmanager
        async def made(_: str, server: Server = server) -> AsyncGenerator[Store]:
            with database(server) as url:
                engine = create_async_engine(url)
                yield SQLAlchemyStore(engine, create=True)
                await engine.dispose()

        try:
            found += await claim_rows(effort, made, name)
        finally:
            server.close()
    return found
