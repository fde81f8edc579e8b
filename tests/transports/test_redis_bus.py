"""A bus moves to Redis by its route: the same handlers, with a store and without, through crashes of all kinds."""

import logging
import os
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

import anyio
import pytest
from redis.asyncio import Redis

from eventbus import Context, Event, EventBus, Limits, Module, Reject, Retry, WiringError
from eventbus.errors import TransportError
from eventbus.stores.sqlite import SQLiteStore
from tests.servers.server import Server

LOAD = int(os.environ.get("EVENTBUS_LOAD", "1000"))
"""Messages that are published while the server is killed; 10,000 where there is time."""

PUBLISHERS = 100
QUICK = Retry(attempts=3, initial=0.01, maximum=0.05)


class Paid(Event, name="r.paid", key="account"):
    """State that something was paid."""

    number: int
    account: str = "a"


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    """Run on asyncio: the client knows nothing else."""
    return "asyncio"


@pytest.fixture
async def server(valkey: Server) -> AsyncGenerator[Server]:
    """Return a server that holds nothing."""
    valkey.start()
    async with Redis.from_url(valkey.url) as client:
        await client.flushall()
    yield valkey
    valkey.start()


class Shop:
    """Hold a bus with one handler, which notes what it gets and does as it is told."""

    def __init__(self, url: str, store: SQLiteStore | None = None, **options: Any) -> None:
        self.seen: list[tuple[int, int]] = []
        self.done: list[int] = []
        self.action: Callable[[Paid, Context], None] = lambda event, ctx: None
        module = Module("m")

        @module.on(Paid, retry=QUICK, **options)
        async def book(event: Paid, ctx: Context) -> None:
            self.seen.append((event.number, ctx.attempt))
            self.action(event, ctx)
            self.done.append(event.number)

        self.bus = EventBus(
            module, name="shop", store=store, transports={"events": url}, routes={"r.*": "events"},
            limits=Limits(lease=2.0),
        )  # fmt: skip

    async def publish(self, *numbers: int) -> None:
        for number in numbers:
            await self.bus.publish(Paid(number=number, account=str(number)), atomic=False)

    async def finished(self, *numbers: int) -> None:
        await until(lambda: {*numbers} <= {*self.done}, lambda: f"done {self.done}, seen {self.seen}")


async def until(fact: Callable[[], object], otherwise: Callable[[], str] = str, seconds: float = 15.0) -> None:
    with anyio.move_on_after(seconds):
        while not fact():  # noqa: ASYNC110 - what is awaited happens elsewhere
            await anyio.sleep(0.01)
        return
    raise AssertionError(otherwise())


@pytest.fixture(params=["alone", "with a store"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> SQLiteStore | None:
    return None if request.param == "alone" else SQLiteStore(tmp_path / "s.db")


async def test_the_same_handler_with_a_store_and_without(server: Server, store: SQLiteStore | None) -> None:
    """Messages arrive, a failing one is tried again with its attempts counted, one that is given up is kept as dead."""
    shop = Shop(server.url, store)

    def action(event: Paid, ctx: Context) -> None:
        if event.number == 1 and ctx.attempt < 3:
            raise ValueError("not yet")
        if event.number == 2:
            raise Reject("card stolen")

    shop.action = action
    async with shop.bus.running() as bus:
        await shop.publish(1, 2, 3)
        await shop.finished(1, 3)
        await until(lambda: (2, 1) in shop.seen)
        assert sorted(shop.seen) == [(1, 1), (1, 2), (1, 3), (2, 1), (3, 1)]
        if store is None:
            async with Redis.from_url(server.url) as client:
                while not (dead := await client.xrange("r.paid@shop/m.book.dead")):  # noqa: ASYNC110
                    await anyio.sleep(0.01)
            assert [fields[b"reason"] for _, fields in dead] == [b"Reject: card stolen"]
            return
        while not await bus.dead.find():  # noqa: ASYNC110
            await anyio.sleep(0.01)
        shop.action = lambda event, ctx: None
        assert await bus.dead.replay(handler="m.book") == 1
        await shop.finished(2)


async def test_a_store_recognises_what_came_twice(server: Server, tmp_path: Path) -> None:
    """A message that was published twice under one id is handled once behind a store."""
    shop = Shop(server.url, SQLiteStore(tmp_path / "s.db"))
    async with Redis.from_url(server.url) as client, shop.bus.running():
        await shop.publish(1)
        await shop.finished(1)
        [(_, fields)] = await client.xrange("r.paid")
        await client.xadd("r.paid", fields)
        await shop.publish(2)
        await shop.finished(1, 2)
        assert sorted(shop.done) == [1, 2]


async def test_a_foreign_message_is_dead_and_stops_nobody(server: Server) -> None:
    """What is no message of ours goes to the dead with the reason, and the next is handled."""
    shop = Shop(server.url)
    async with Redis.from_url(server.url) as client, shop.bus.running():
        await client.xadd("r.paid", {"hello": "world"})
        await shop.publish(1)
        await shop.finished(1)
        while not (dead := await client.xrange("r.paid@shop/m.book.dead")):  # noqa: ASYNC110
            await anyio.sleep(0.01)
        assert dead[0][1][b"hello"] == b"world"
        assert dead[0][1][b"reason"]


async def test_keys_keep_their_order_over_two_processes(server: Server, store: SQLiteStore | None) -> None:
    """Two buses of one name share an ordered handler: each key in its order, through failures."""
    shops = [Shop(server.url, store, ordered=True) for _ in range(1 if store else 2)]
    order: dict[str, list[int]] = {"a": [], "b": []}

    def action(event: Paid, ctx: Context) -> None:
        if event.number % 5 == 0 and ctx.attempt == 1:
            raise ValueError("once more")
        order[event.account].append(event.number)

    for shop in shops:
        shop.action = action
    async with shops[0].bus.running() as bus, shops[-1].bus.running() if len(shops) > 1 else anyio.Lock():
        for number in range(40):
            await bus.publish(Paid(number=number, account="ab"[number % 2]), atomic=False)
        await until(lambda: sum(map(len, order.values())) == 40, lambda: str(order))
    assert order == {"a": [*range(0, 40, 2)], "b": [*range(1, 40, 2)]}


async def test_a_handler_cannot_take_from_channels(server: Server) -> None:
    """A route that would make a handler depend on Pub/Sub is a fault of the wiring."""
    for store in (None, "memory://"):
        module = Module("m")
        module.on(Paid, name="book")(lambda event: None)
        channels = server.url.replace("redis", "redis+pubsub", 1)
        bus = EventBus(module, name="s", store=store, transports={"live": channels}, routes={Paid: "live"})
        with pytest.raises(WiringError, match="has no consumer groups"):
            bus.compile()


async def test_a_broker_that_is_away_costs_no_attempt(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With a store publishing goes on while the server is down, health says so, and all arrives once it is back."""
    caplog.set_level(logging.ERROR)
    shop = Shop(server.url, SQLiteStore(tmp_path / "s.db"))
    async with shop.bus.running() as bus:
        await shop.publish(0)
        await shop.finished(0)
        server.kill()
        await shop.publish(1, 2, 3)
        await until(lambda: not bus.health().healthy)
        server.start()
        await shop.finished(1, 2, 3)
        await until(lambda: bus.health().healthy)
        assert sorted(shop.seen) == [(0, 1), (1, 1), (2, 1), (3, 1)]
        assert await bus.dead.find() == []


@pytest.mark.timeout(300)
async def test_nothing_is_lost_when_the_server_is_killed_under_load(server: Server, store: SQLiteStore | None) -> None:
    """A hundred publishers, one kill and one restart of the server: every number that was confirmed is handled."""
    shop = Shop(server.url, store, concurrency=64)
    numbers, confirmed = iter(range(LOAD)), list[int]()

    async def publish() -> None:
        for number in numbers:
            while True:
                try:
                    await shop.publish(number)
                except TransportError:
                    await anyio.sleep(0.05)  # as a careful caller would
                else:
                    confirmed.append(number)
                    break

    async def disturb(at: int, how: Callable[[], None]) -> None:
        await until(lambda: len(confirmed) >= at, seconds=60)
        how()
        server.start()  # not in another thread: the server would end with it

    async with shop.bus.running():
        async with anyio.create_task_group() as tasks:
            for _ in range(PUBLISHERS):
                tasks.start_soon(publish)
            await disturb(LOAD // 3, server.kill)
            await disturb(LOAD // 2, server.stop)
        assert sorted(confirmed) == [*range(LOAD)]
        await until(lambda: len({*shop.done}) == LOAD, lambda: f"{len({*shop.done})} of {LOAD}", 120)
    if store is not None:
        assert max(Counter(shop.done).values()) == 1
