"""Measure publishing to, and consuming from, PostgreSQL, beside bare psycopg doing the least that is as safe."""

import sys
from asyncio import Event as Flag
from asyncio import sleep
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from functools import partial
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter

from anyio import create_task_group
from sqlalchemy import make_url, text
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker, create_async_engine

from benchmarks.bench_sqlite import SLOTS, TASKS, Told, side_by_side, told
from benchmarks.floor_postgres import Floor
from benchmarks.measure import Effort, Goal, Loop, Row, Sample, calls, quiet_gc, race, turns
from benchmarks.peer import Asked, Take, asking
from eventbus import EventBus, Limits, Module
from eventbus.stores.sqlalchemy import SQLAlchemyStore
from tests.servers import postgres
from tests.servers.databases import database
from tests.servers.server import AbsentError, Server

__all__ = ("rows",)

PUBLISHED = 6_000
CONSUMED = 20_000
ASKED = 400
CONNECTIONS = 20
"""Of each contender."""
RATE = 200
"""Messages a second where latency is measured."""
CHUNK = 1_000
"""Events of one ``publish_many`` where there are many to consume."""
PEER = "faststream-outbox"
Rows = AsyncGenerator[Row]


class Counter:
    """Be a bus on the database whose one handler counts, and sets a flag after so many events."""

    def __init__(self, engine: AsyncEngine, until: int = 0, slots: int = 8) -> None:
        self.expect(until)
        module = Module("bench")
        module.on(Told, name="take", concurrency=slots)(self.take)
        self.bus = EventBus(
            module, name="bench", store=SQLAlchemyStore(engine, create=True), routes={Told: "store"},
        )  # fmt: skip

    def expect(self, count: int) -> None:
        self.left, self.done, self.taken = count, Flag(), list[float]()

    async def take(self, _: Told) -> None:
        self.taken.append(perf_counter())
        self.left -= 1
        if not self.left:
            self.done.set()

    async def publish(self, number: int) -> None:
        async with self.bus.transaction():
            await self.bus.publish(told(number))

    async def fill(self, count: int) -> None:
        for first in range(0, count, CHUNK):
            some = [told(number) for number in range(first, min(first + CHUNK, count))]
            await self.bus.publish_many(some, atomic=False)


async def empty(engine: AsyncEngine) -> None:
    async with engine.begin() as connection:
        await connection.execute(text("TRUNCATE eventbus_entry"))


async def publish_rows(effort: Effort, engine: AsyncEngine, floor: Floor, peer: Asked) -> Rows:
    count = effort.of(PUBLISHED)
    ours = Counter(engine)
    takes: dict[str, Take] = {
        "publish": partial(side_by_side, TASKS, count, ours.publish),
        "lean": partial(side_by_side, TASKS, count, floor.add_lean),
        "same": partial(side_by_side, TASKS, count, floor.add_same),
    }
    if peer:
        takes[PEER] = peer("publish", count)
    async with ours.bus.running(consume=False):
        took = await turns(effort.some(7), takes)
    what, published = f"{TASKS} tasks, a transaction with one publish each", took["publish"]
    yield Row(what, published, "one raw row per transaction", took["lean"], Goal(0.8, least=True), "/s")
    yield Row(what, published, "the same, our row and indexes", took["same"], unit="/s")
    if peer:
        yield Row(what, published, PEER, took[PEER], Goal(3, least=True), "/s")


async def consume_rows(effort: Effort, engine: AsyncEngine, floor: Floor, peer: Asked) -> Rows:
    count, batch = effort.of(CONSUMED), Limits().batch

    async def consume(slots: int) -> float:
        ours = Counter(engine, count, slots)
        async with ours.bus.running(consume=False):
            await empty(engine)
            await ours.fill(count)
        with quiet_gc():
            start = perf_counter()
            async with ours.bus.running():
                await ours.done.wait()
            return (perf_counter() - start) / count

    async def end_to_end() -> float:
        ours = Counter(engine, count, SLOTS[-1])
        await empty(engine)
        async with ours.bus.running():
            with quiet_gc():
                start = perf_counter()
                async with create_task_group() as group:
                    group.start_soon(ours.fill, count)
                    await ours.done.wait()
                return (perf_counter() - start) / count

    whats = {f"consume {count:,}, {slots} at once": partial(consume, slots) for slots in SLOTS}
    whole = f"publish {count:,} and consume them meanwhile"
    takes: dict[str, Take] = {
        **whats,
        whole: end_to_end,
        "bare": partial(floor.consume, count, batch),
        "bare whole": partial(floor.end_to_end, count, batch),
    }
    if peer:
        takes |= {PEER: peer("consume", count), f"{PEER} whole": peer("whole", count)}
    took = await turns(effort.some(5), takes)
    for what, rival in (*((what, "") for what in whats), (whole, " whole")):
        yield Row(what, took[what], "lease, commit, delete", took[f"bare{rival}"], Goal(0.35, least=True), "/s")
        if peer:
            yield Row(what, took[what], PEER, took[f"{PEER}{rival}"], Goal(3, least=True), "/s")


async def at_a_low_rate(publish: Callable[[int], Awaitable[None]], here: Counter, count: int) -> float:
    """Return the median of the seconds from before a transaction to the beginning of its event's handler."""
    sent: list[float] = []
    here.expect(count)
    for number in range(count):
        sent.append(perf_counter())
        await publish(number)
        await sleep(1 / RATE)
    await here.done.wait()
    return median(end - start for start, end in zip(sent, here.taken, strict=True))


async def latency_rows(effort: Effort, url: str, engine: AsyncEngine, floor: Floor, peer: Asked) -> Rows:
    count = effort.of(ASKED)
    other = create_async_engine(url, pool_size=2)
    here, there = Counter(engine), Counter(other)

    async def notified() -> float:
        return median(await floor.notified(count))

    await empty(engine)
    async with here.bus.running(), there.bus.running(consume=False):
        takes: dict[str, Take] = {
            "here": partial(at_a_low_rate, here.publish, here, count),
            "there": partial(at_a_low_rate, there.publish, here, count),
            "notified": notified,
        }
        if peer:
            takes[PEER] = peer("latency", count)
        took = await turns(effort.some(5), takes)
    await other.dispose()
    promised = Sample(1e-3, 1e-3)
    what = f"from publish to handler, {RATE} a second, p50"
    yield Row(what, took["here"], "1 ms", promised, Goal(1))
    if peer:
        yield Row(what, took["here"], PEER, took[PEER])
    yield Row(f"{what}, another process publishes", took["there"], "published here", took["here"])
    yield Row(f"{what}, another process publishes", took["there"], "a bare NOTIFY until it is heard", took["notified"])


async def inside_rows(effort: Effort, engine: AsyncEngine, where: str, peer: Asked) -> Rows:
    sessions = async_sessionmaker(engine, expire_on_commit=False)
    bus = Counter(engine).bus
    insert = text("INSERT INTO shop_order (sku) VALUES (:sku)")
    async with engine.begin() as connection:
        kind = "INTEGER PRIMARY KEY" if engine.dialect.name == "sqlite" else "bigint GENERATED ALWAYS AS IDENTITY"
        await connection.execute(text(f"CREATE TABLE shop_order (id {kind}, sku VARCHAR(40) NOT NULL)"))

    async def order() -> None:
        async with sessions.begin() as session:
            await session.execute(insert, {"sku": "bolt"})

    async def order_and_publish() -> None:
        async with sessions.begin() as session:
            await session.execute(insert, {"sku": "bolt"})
            async with bus.transaction(session):
                await bus.publish(told(1))

    async with bus.running(consume=False):
        loops: dict[str, Loop] = {"without": calls(order), "with": calls(order_and_publish)}
        took = await race(Effort(effort.rounds, effort.slice * 4, effort.scale), loops)
    what = f"one event inside a transaction of the caller's, {where}"
    yield Row(what, took["with"], "the transaction without it", took["without"], Goal(1.3))
    if peer:
        count = effort.of(ASKED)
        theirs = await turns(effort.some(7), {name: peer(name, count) for name in ("without", "with")})
        yield Row(f"the same by {PEER}", theirs["with"], "the transaction without it", theirs["without"])


async def rows(effort: Effort) -> Sequence[Row]:
    """Return the comparisons; none where there is no PostgreSQL."""
    found: list[Row] = []
    async with AsyncExitStack() as stack:
        try:
            server = Server(postgres.recipe(durable=True))
        except AbsentError as error:
            print(f"postgres is left out: {error}", file=sys.stderr)
            return []
        stack.callback(server.close)
        url = stack.enter_context(database(server))
        engine = create_async_engine(url, pool_size=CONNECTIONS, max_overflow=0)
        stack.push_async_callback(engine.dispose)
        async with Counter(engine).bus.running(consume=False):
            pass  # makes the tables
        floor = await stack.enter_async_context(Floor(url, CONNECTIONS))
        plain = make_url(url).set(drivername="postgresql+asyncpg").render_as_string(hide_password=False)
        peer = await stack.enter_async_context(asking(PEER, "outbox", plain))
        for some in (
            publish_rows(effort, engine, floor, peer),
            consume_rows(effort, engine, floor, peer),
            latency_rows(effort, url, engine, floor, peer),
            inside_rows(effort, engine, "PostgreSQL", peer),
        ):
            found += [row async for row in some]
    with TemporaryDirectory() as folder:
        engine = create_async_engine(f"sqlite+aiosqlite:///{folder}/inside.db")
        found += [row async for row in inside_rows(effort, engine, "SQLite by aiosqlite", None)]
        await engine.dispose()
    return found
