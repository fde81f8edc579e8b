"""Measure publishing to, and consuming from, an SQLite file, beside bare sqlite3 doing the least that is as safe."""

import sqlite3
from asyncio import Event as Flag
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Literal
from uuid import uuid4

from anyio import create_task_group

from benchmarks.floor_sqlite import GroupCommit, lease_and_delete
from benchmarks.measure import Effort, Goal, Loop, Row, Sample, calls, quiet_gc, race, turns
from benchmarks.waiting import claim_rows
from eventbus import Event, EventBus, Limits, Module
from eventbus.store import Store
from eventbus.stores.sqlite import SQLiteStore

__all__ = ("rows",)

Synchronous = Literal["full", "normal"]
TASKS = 64
PUBLISHED = 20_000
CONSUMED = 30_000
SLOTS = (8, 64)
"""Handlings at once: what a handler has by default, and many; the settlements of as many are committed together."""


class Told(Event, name="bench.told", key="customer"):
    number: int
    customer: str
    sku: str


def told(number: int) -> Told:
    return Told(number=number, customer=f"customer-{number % 1000}", sku="bolt")


def bus_on(path: Path, synchronous: Synchronous, until: int = 0, slots: int = 8) -> tuple[EventBus, Flag]:
    """Return a bus on a file of its own, whose one handler sets a flag after so many events."""
    module, left, done = Module("bench"), until, Flag()

    @module.on(Told, concurrency=slots)
    async def take(_: Told) -> None:
        nonlocal left
        left -= 1
        if not left:
            done.set()

    store = SQLiteStore(path, synchronous=synchronous)
    return EventBus(module, name="bench", store=store, routes={Told: "store"}), done


async def side_by_side(tasks: int, count: int, one: Callable[[int], Awaitable[object]]) -> float:
    """Return the seconds of one of ``count`` calls, made by so many tasks."""

    async def some(first: int) -> None:
        for number in range(first, count, tasks):
            await one(number)

    with quiet_gc():
        start = perf_counter()
        async with create_task_group() as group:
            for first in range(tasks):
                group.start_soon(some, first)
        return (perf_counter() - start) / count


async def publish_rows(effort: Effort, folder: Path, synchronous: Synchronous) -> Sequence[Row]:
    count = effort.of(PUBLISHED)
    bus, _ = bus_on(folder / f"publish-{synchronous}.db", synchronous)

    async def publish(number: int) -> None:
        async with bus.transaction():
            await bus.publish(told(number))

    lean = GroupCommit(folder / f"lean-{synchronous}.db", synchronous, indexes=False)
    same = GroupCommit(folder / f"same-{synchronous}.db", synchronous, indexes=True)
    async with bus.running(consume=False), lean, same:
        took = await turns(
            effort.some(7),
            {
                "publish": partial(side_by_side, TASKS, count, publish),
                "lean": partial(side_by_side, TASKS, count, lean.add),
                "same": partial(side_by_side, TASKS, count, same.add),
            },
        )
    what, ours = f"{TASKS} tasks, a transaction with one publish each, {synchronous.upper()}", took["publish"]
    return [
        Row(what, ours, "group commit, one lean row", took["lean"], Goal(0.55, least=True), "/s"),
        Row(what, ours, "group commit, our row and indexes", took["same"], unit="/s"),
    ]


async def consume_rows(effort: Effort, folder: Path, synchronous: Synchronous) -> Sequence[Row]:
    count = effort.of(CONSUMED)

    async def consume(slots: int) -> float:
        path = folder / f"{uuid4()}.db"
        bus, done = bus_on(path, synchronous, until=count, slots=slots)
        async with bus.running(consume=False):
            for first in range(0, count, 1_000):
                some = [told(number) for number in range(first, min(first + 1_000, count))]
                await bus.publish_many(some, atomic=False)
        with quiet_gc():
            start = perf_counter()
            async with bus.running():
                await done.wait()
            return (perf_counter() - start) / count

    async def bare() -> float:
        return await lease_and_delete(folder / f"{uuid4()}.db", synchronous, count, Limits().batch)

    consumes = {
        f"consume {count:,}, {slots} at once, {synchronous.upper()}": partial(consume, slots) for slots in SLOTS
    }
    took = await turns(effort.some(5), {**consumes, "bare": bare})
    goal, promised = Goal(0.15, least=True), Sample(1 / 25_000, 1 / 25_000)
    return [
        *(Row(what, took[what], "lease a batch, delete it", took["bare"], goal, "/s") for what in consumes),
        *(Row(what, took[what], "25,000 a second", promised, Goal(1, least=True), "/s") for what in consumes),
    ]


async def inside_rows(effort: Effort, folder: Path) -> Sequence[Row]:
    bus, _ = bus_on(folder / "inside.db", "full")
    with sqlite3.connect(folder / "inside.db") as connection:
        connection.execute("CREATE TABLE shop_order (id INTEGER PRIMARY KEY, sku TEXT NOT NULL)")

    async def order() -> None:
        async with bus.transaction() as tx:
            await tx.session.execute("INSERT INTO shop_order (sku) VALUES (?)", ("bolt",))

    async def order_and_publish() -> None:
        async with bus.transaction() as tx:
            await tx.session.execute("INSERT INTO shop_order (sku) VALUES (?)", ("bolt",))
            await bus.publish(told(1))

    async with bus.running(consume=False):
        loops: dict[str, Loop] = {"without": calls(order), "with": calls(order_and_publish)}
        took = await race(effort, loops)
    what = "one event inside a transaction of one statement"
    return [Row(what, took["with"], "the transaction without it", took["without"], Goal(1.3))]


async def rows(effort: Effort) -> Sequence[Row]:
    """Return the comparisons."""
    found: list[Row] = []
    with TemporaryDirectory() as name:
        for synchronous in ("full", "normal"):
            found += await publish_rows(effort, Path(name), synchronous)
            found += await consume_rows(effort, Path(name), synchronous)
        found += await inside_rows(effort, Path(name))

        @asynccontextmanager
        async def made(file: str) -> AsyncGenerator[Store]:
            yield SQLiteStore(Path(name, f"{file}.db"), synchronous="normal")

        found += await claim_rows(effort, made, "SQLite")
    return found
