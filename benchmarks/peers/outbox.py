# mypy: ignore-errors
# pyright: basic, reportMissingImports=false
# The library is not there where types are checked.

"""Do with faststream-outbox what ``bench_postgres`` asks for on the standard input, and answer in seconds."""

import asyncio
import json
import logging
import sys
from time import perf_counter

from faststream_outbox import OutboxBroker, make_outbox_table
from pydantic import BaseModel
from sqlalchemy import MetaData, text
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

from benchmarks.bench_sqlite import TASKS, side_by_side
from benchmarks.measure import quiet_gc

CHUNK = 1_000
RATE = 200
WORKERS = 16
"""Each keeps a connection, as does fetching."""
CONNECTIONS = 20 + WORKERS + 1


class Told(BaseModel):
    number: int
    customer: str
    sku: str


def told(number: int) -> Told:
    return Told(number=number, customer=f"customer-{number % 1000}", sku="bolt")


class Outbox:
    """Be its table, and how it is filled and emptied."""

    def __init__(self, url: str) -> None:
        self.engine = create_async_engine(url, pool_size=CONNECTIONS, max_overflow=0)
        self.sessions = async_sessionmaker(self.engine, expire_on_commit=False)
        metadata = MetaData()
        self.table = make_outbox_table(metadata, table_name="outbox")
        self.metadata = metadata
        self.taken: list[float] = []
        self.until = 0
        self.done = asyncio.Event()

    def broker(self) -> OutboxBroker:
        broker = OutboxBroker(self.engine, outbox_table=self.table, logger=None)

        @broker.subscriber(
            "told", max_workers=WORKERS, fetch_batch_size=256, terminal_flush_batch_size=64,
            min_fetch_interval=0.01, max_fetch_interval=1.0,
        )  # fmt: skip
        async def take(_: Told) -> None:
            self.taken.append(perf_counter())
            if len(self.taken) == self.until:
                self.done.set()

        return broker

    def expect(self, count: int) -> None:
        self.taken, self.until, self.done = [], count, asyncio.Event()

    async def publish(self, count: int) -> float:
        broker = self.broker()

        async def publish(number: int) -> None:
            async with self.sessions.begin() as session:
                await broker.publish(told(number), queue="told", session=session)

        taken = await side_by_side(TASKS, count, publish)
        await self.empty()
        return taken

    async def fill(self, broker: OutboxBroker, count: int) -> None:
        for first in range(0, count, CHUNK):
            some = [told(number) for number in range(first, min(first + CHUNK, count))]
            async with self.sessions.begin() as session:
                await broker.publish_batch(*some, queue="told", session=session)

    async def consume(self, count: int) -> float:
        broker = self.broker()
        await self.fill(broker, count)
        self.expect(count)
        with quiet_gc():
            start = perf_counter()
            async with broker:
                await broker.start()
                await self.done.wait()
            return (perf_counter() - start) / count

    async def whole(self, count: int) -> float:
        broker = self.broker()
        self.expect(count)
        async with broker:
            await broker.start()
            with quiet_gc():
                start = perf_counter()
                filling = asyncio.create_task(self.fill(broker, count))
                await self.done.wait()
                await filling
                return (perf_counter() - start) / count

    async def latency(self, count: int) -> float:
        broker = self.broker()
        self.expect(count)
        sent: list[float] = []
        async with broker:
            await broker.start()
            await asyncio.sleep(0.5)
            for number in range(count):
                sent.append(perf_counter())
                async with self.sessions.begin() as session:
                    await broker.publish(told(number), queue="told", session=session)
                await asyncio.sleep(1 / RATE)
            await self.done.wait()
        waits = sorted(end - start for start, end in zip(sent, self.taken, strict=True))
        return waits[count // 2]

    async def without(self, count: int) -> float:
        return await self.inside(count, publishes=False)

    async def within(self, count: int) -> float:
        return await self.inside(count, publishes=True)

    async def inside(self, count: int, publishes: bool) -> float:
        broker, insert = self.broker(), text("INSERT INTO shop_order (sku) VALUES (:sku)")
        with quiet_gc():
            start = perf_counter()
            for number in range(count):
                async with self.sessions.begin() as session:
                    await session.execute(insert, {"sku": "bolt"})
                    if publishes:
                        await broker.publish(told(number), queue="told", session=session)
            return (perf_counter() - start) / count

    async def empty(self) -> None:
        async with self.engine.begin() as connection:
            await connection.execute(text("TRUNCATE outbox"))


async def main(url: str) -> None:
    outbox = Outbox(url)
    async with outbox.engine.begin() as connection:
        await connection.run_sync(outbox.metadata.create_all)
    print("ready", flush=True)
    works = {"with": outbox.within}
    while line := await asyncio.to_thread(sys.stdin.readline):
        work, count = json.loads(line)
        await outbox.empty()
        print(await (works.get(work) or getattr(outbox, work))(count), flush=True)
    await outbox.engine.dispose()


if __name__ == "__main__":
    logging.disable(logging.INFO)
    asyncio.run(main(sys.argv[1]))
