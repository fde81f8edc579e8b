"""The bus on top of Kafka: handlers unchanged, with a store and without."""

from typing import Any

import anyio
import pytest

from eventbus import Context, Event, EventBus, Module, Retry, WiringError
from eventbus.clock import new_id
from eventbus.transport import Wire, connect
from tests.servers.server import Server
from tests.transports.test_kafka_broker import take, until

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def url(kafka: Server) -> str:
    return f"{kafka.url}?partitions=4"


class Placed(Event, name="shop.placed", key="order"):
    order: str


def shop(name: str, log: list[tuple[str, int]]) -> Module:
    module = Module(name)

    @module.on(Placed, retry=Retry(attempts=2, initial=0.05))
    async def note(event: Placed, context: Context) -> None:
        log.append((event.order, context.attempt))
        if event.order == "bad" or (event.order == "shaky" and context.attempt == 1):
            raise RuntimeError(event.order)

    return module


async def test_the_bus_on_top_with_a_store(url: str, tmp_path: Any) -> None:
    """With a store what comes in is kept once, retried, and among the dead it can be replayed."""
    log: list[tuple[str, int]] = []
    bus = EventBus(
        shop("billing", log),
        name=f"shop-{new_id()}",
        store=f"sqlite:///{tmp_path}/shop.db",
        transports={"events": url},
        routes={Placed: "events"},
    )
    async with bus.running():
        for order in ("good", "shaky", "bad"):
            await bus.publish(Placed(order=order), atomic=False)
        await until(lambda: len(log) >= 5, 20.0)
        with anyio.fail_after(10):
            while not (dead := await bus.dead.find()):  # noqa: ASYNC110 - what is waited for is a row
                await anyio.sleep(0.05)
        assert [entry.message for entry in dead] == ["shop.placed"]
        twice = await bus.dead.get(dead[0].id)
        async with connect(url) as outside:  # the same message again, as at a redelivery
            await outside.publish("shop.placed", [Wire(twice.message_id, twice.body)])
        assert await bus.dead.replay(dead[0].id) == 1
        await until(lambda: len(log) >= 7, 20.0)
    assert sorted(log) == [("bad", 1), ("bad", 1), ("bad", 2), ("bad", 2), ("good", 1), ("shaky", 1), ("shaky", 2)]


async def test_the_bus_on_top_without_a_store(url: str) -> None:
    """Without a store a handler is refused, since Kafka counts no attempts; publishing alone works."""
    routes: dict[Any, Any] = {Placed: "events"}
    with pytest.raises(WiringError, match="counts no attempts"):
        EventBus(shop("billing", []), name="shop", transports={"events": url}, routes=routes).compile()
    module = Module("empty", messages=[Placed])
    bus = EventBus(module, name="shop", transports={"events": url}, routes=routes)
    async with (
        connect(url) as other,
        other.subscribe("shop.placed", group=None, prefetch=5, lease=30.0) as listener,
        bus.running(),
    ):
        receipt = await bus.publish(Placed(order="7"))
        [delivery] = await take(listener, 1)
    assert (delivery.wire.id, delivery.wire.key) == (receipt.id, "7")
    assert delivery.wire.headers["ce-type"] == "shop.placed"
