"""A bus moves its events to NATS by one line of data: the same handlers, with a store and without."""

from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest

from eventbus import Event, EventBus, Limits, Module, Reject, Retry
from eventbus.clock import new_id
from eventbus.testing.exam_bench import until
from eventbus.transport import Wire, connect
from tests.servers.server import Server
from tests.transports.test_nats import buried

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    """Run on asyncio: the client knows no other."""
    return "asyncio"


class Shop:
    """Hold one shop of its own: its event, its handlers, and what they have done."""

    def __init__(self) -> None:
        self.name = f"shop-{new_id()}"
        self.module = Module("orders")
        self.done: list[tuple[str, int]] = []
        self.failures: Counter[int] = Counter()
        self.poisonous = True

        class Placed(Event, name=f"{self.name}.placed", key="customer"):
            customer: str
            number: int

        self.placed = Placed
        retry = Retry(attempts=3, initial=0.05, maximum=0.1)

        @self.module.on(Placed, retry=retry)
        async def bill(event: Placed) -> None:
            if event.number == 13 and self.poisonous:
                raise Reject("unlucky")
            if event.number % 5 == 0 and not self.failures[event.number]:
                self.failures[event.number] += 1
                raise RuntimeError("not yet")
            self.done.append(("bill", event.number))

        @self.module.on(Placed, retry=retry, ordered=True)
        async def ship(event: Placed) -> None:
            self.done.append((f"ship {event.customer}", event.number))

    def bus(self, url: str, store: str | None) -> EventBus:
        limits = Limits(lease=2.0, sweep=0.2, drain=5.0)
        return EventBus(
            self.module, name=self.name, store=store, transports={"events": url},
            routes={f"{self.name}.*": "events"}, limits=limits,
        )  # fmt: skip

    async def publish(self, bus: EventBus, *numbers: int) -> None:
        for number in numbers:
            await bus.publish(self.placed(customer="ab"[number % 2], number=number), atomic=False)

    async def handled(self, what: str, count: int) -> list[int]:
        def found() -> list[int]:
            return [number for name, number in self.done if name.startswith(what)]

        await until(lambda: len(found()) >= count, 20.0, f"fewer than {count} handled")
        return found()


async def eventually(ask: Callable[[], Awaitable[Sequence[Any]]]) -> Sequence[Any]:
    """Ask until there is something."""
    with anyio.fail_after(10):
        while True:
            if found := await ask():
                return found
            await anyio.sleep(0.05)


@pytest.fixture(params=["with a store", "without"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> str | None:
    return f"sqlite:///{tmp_path}/shop.db" if request.param == "with a store" else None


@asynccontextmanager
async def running(bus: EventBus) -> AsyncGenerator[EventBus]:
    async with bus.running():
        yield bus


async def test_every_handler_gets_every_event_once_ordered_ones_in_order(nats: Server, store: str | None) -> None:
    shop = Shop()
    async with running(shop.bus(nats.url, store)) as bus:
        await shop.publish(bus, *range(30))
        assert sorted(await shop.handled("bill", 29)) == [number for number in range(30) if number != 13]
        await shop.handled("ship", 30)
    for customer, first in (("a", 0), ("b", 1)):
        assert [number for name, number in shop.done if name == f"ship {customer}"] == [*range(first, 30, 2)]


async def test_two_processes_share_the_work_and_what_one_leaves_the_other_does(
    nats: Server, store: str | None, tmp_path: Path
) -> None:
    shop = Shop()
    async with running(shop.bus(nats.url, store)) as bus:
        async with running(shop.bus(nats.url, store)):
            await shop.publish(bus, *range(20))
        assert sorted(await shop.handled("bill", 19)) == [number for number in range(20) if number != 13]
        assert sorted(await shop.handled("ship", 20)) == [*range(20)]


async def test_what_is_dead_lies_where_the_route_says(nats: Server, store: str | None) -> None:
    shop = Shop()
    async with running(shop.bus(nats.url, store)) as bus:
        await shop.publish(bus, 13)
        await shop.handled("ship", 1)
        if store is None:
            group = f"{shop.name}/orders.bill"
            found = await eventually(lambda: buried(nats.url, f"{shop.name}.placed", group))
            assert [reason for _, reason in found] == ["Reject: unlucky"]
            return
        await eventually(bus.dead.find)
        shop.poisonous = False
        assert await bus.dead.replay(handler="orders.bill") == 1
        assert await shop.handled("bill", 1) == [13]


async def test_a_duplicate_of_the_broker_is_one_entry_in_the_store(nats: Server, tmp_path: Path) -> None:
    shop = Shop()
    topic = f"{shop.name}.placed"
    async with running(shop.bus(nats.url, f"sqlite:///{tmp_path}/shop.db")) as bus:
        async with connect(nats.url) as other, other.subscribe(topic, group="spy", prefetch=9, lease=9.0) as spy:
            await shop.publish(bus, 1)
            wire = (await spy.receive()).wire
            bare = Wire("another for the stream", wire.body, {**wire.headers}, wire.key)
            await other.publish(topic, [bare])
            await shop.publish(bus, 2)
        assert await shop.handled("bill", 2) == [1, 2]
        await shop.handled("ship", 2)


async def test_poison_is_kept_with_its_reason_and_holds_nobody_up(nats: Server, store: str | None) -> None:
    shop = Shop()
    topic = f"{shop.name}.placed"
    async with running(shop.bus(nats.url, store)) as bus:
        async with connect(nats.url) as other:
            await other.publish(topic, [Wire("poison", b"{not json")])
        await shop.publish(bus, 1)
        await shop.handled("bill", 1)
        group = shop.name if store else f"{shop.name}/orders.bill"
        found = await eventually(lambda: buried(nats.url, topic, group))
        assert [id for id, _ in found] == ["poison"]


async def test_while_the_server_is_down_the_store_keeps_what_goes_out(nats: Server, tmp_path: Path) -> None:
    shop = Shop()
    async with running(shop.bus(nats.url, f"sqlite:///{tmp_path}/shop.db")) as bus:
        await shop.publish(bus, 1)
        await shop.handled("bill", 1)
        nats.kill()
        await shop.publish(bus, 2, 3)
        nats.start()
        assert sorted(await shop.handled("bill", 3)) == [1, 2, 3]
        await shop.handled("ship", 3)
        assert not await bus.dead.find()
