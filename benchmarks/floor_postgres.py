"""Do with bare psycopg the least that is as safe: what the store on PostgreSQL is measured against."""

from asyncio import Event as Flag
from asyncio import LifoQueue
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from time import perf_counter
from typing import Any, Self

import psycopg
from anyio import create_task_group

from benchmarks.floor_sqlite import BODY
from benchmarks.measure import quiet_gc

__all__ = ("BATCH", "Floor")

LEAN = """CREATE TABLE floor_lean (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, due bigint NOT NULL,
    claims int NOT NULL, body bytea NOT NULL);
CREATE INDEX floor_due ON floor_lean (due, id)"""
SAME = "CREATE TABLE floor_same (LIKE eventbus_entry INCLUDING ALL)"
INSERT_LEAN = "INSERT INTO floor_lean (due, claims, body) VALUES (0, 0, %b)"
INSERT_SAME = """INSERT INTO floor_same (message_id, recipient, type, state, due_at, body)
    VALUES (%s, 'bench/bench.take', 'bench.told', 0, 0, %b)"""
FILL = "INSERT INTO floor_lean (due, claims, body) SELECT 0, 0, body FROM unnest(%b::bytea[]) AS b(body)"
LEASE = """WITH c AS MATERIALIZED (SELECT id FROM floor_lean WHERE due = 0 ORDER BY id LIMIT %s FOR UPDATE SKIP LOCKED)
    UPDATE floor_lean f SET due = 1, claims = claims + 1 FROM c WHERE f.id = c.id RETURNING f.id, f.body"""
SETTLE = "DELETE FROM floor_lean WHERE id = ANY(%s) AND claims = 1"
BATCH = 100
"""Rows of one statement that writes many."""


class Floor:
    """Keep connections, each statement being a transaction, and write, lease and delete rows."""

    def __init__(self, url: str, connections: int) -> None:
        self._url = url.replace("+psycopg", "")
        self._count = connections
        self._free: LifoQueue[psycopg.AsyncConnection[Any]] = LifoQueue()
        self._stack = AsyncExitStack()
        self._last = 0

    async def __aenter__(self) -> Self:
        for _ in range(self._count):
            self._free.put_nowait(await self._stack.enter_async_context(self.connected()))
        async with self.lent() as connection:
            await connection.execute(f"DROP TABLE IF EXISTS floor_lean, floor_same; {LEAN}; {SAME}")
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._stack.aclose()

    @asynccontextmanager
    async def connected(self) -> AsyncGenerator[psycopg.AsyncConnection[Any]]:
        connection = await psycopg.AsyncConnection.connect(self._url, autocommit=True)
        async with connection:
            yield connection

    @asynccontextmanager
    async def lent(self) -> AsyncGenerator[psycopg.AsyncConnection[Any]]:
        connection = await self._free.get()
        try:
            yield connection
        finally:
            self._free.put_nowait(connection)

    async def add_lean(self, _: int) -> None:
        """Return when one more lean row is committed."""
        async with self.lent() as connection:
            await connection.execute(INSERT_LEAN, (BODY,))

    async def add_same(self, _: int) -> None:
        """Return when one more row like ours is committed."""
        self._last += 1
        number = self._last
        async with self.lent() as connection:
            await connection.execute(INSERT_SAME, (f"{number:036}", BODY))

    async def fill(self, count: int) -> None:
        """Commit so many lean rows, some at a time."""
        for first in range(0, count, BATCH):
            async with self.lent() as connection:
                await connection.execute(FILL, ([BODY] * min(BATCH, count - first),))

    async def lease_and_delete(self, count: int, batch: int) -> None:
        """Lease rows, give each to a function that does nothing, and delete them, until there were so many."""
        left = count
        async with self.lent() as connection:
            while left:
                leased = await (await connection.execute(LEASE, (batch,), binary=True)).fetchall()
                for _, body in leased:
                    await _take(body)
                await connection.execute(SETTLE, ([id_ for id_, _ in leased],))
                left -= len(leased)

    async def consume(self, count: int, batch: int) -> float:
        """Return the seconds of one row: leased with others, handled, deleted."""
        async with self.lent() as connection:
            await connection.execute("TRUNCATE floor_lean")
        await self.fill(count)
        with quiet_gc():
            start = perf_counter()
            await self.lease_and_delete(count, batch)
            return (perf_counter() - start) / count

    async def end_to_end(self, count: int, batch: int) -> float:
        """Return the seconds of one row, written while others are leased and deleted."""
        with quiet_gc():
            start = perf_counter()
            async with create_task_group() as group:
                group.start_soon(self.fill, count)
                group.start_soon(self.lease_and_delete, count, batch)
            return (perf_counter() - start) / count

    async def notified(self, count: int) -> list[float]:
        """Return how long it took, each of so many times, until another connection was notified."""
        times: list[float] = []
        ready = Flag()

        async def hear(connection: psycopg.AsyncConnection[Any]) -> None:
            async for _ in connection.notifies(stop_after=count):
                times.append(perf_counter())
                ready.set()

        taken: list[float] = []
        async with self.connected() as ears, self.lent() as mouth:
            await ears.execute("LISTEN floor")
            async with create_task_group() as group:
                group.start_soon(hear, ears)
                for _ in range(count):
                    ready.clear()
                    start = perf_counter()
                    await mouth.execute("NOTIFY floor")
                    await ready.wait()
                    taken.append(times[-1] - start)
        return taken


async def _take(_: bytes) -> None:
    pass
