"""RabbitMQ passes the exam, and heals what only a broker can suffer."""

from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any, cast
from urllib.parse import urlsplit

import aio_pika
import pytest
from aiormq.exceptions import DeliveryError
from anyio import CancelScope, fail_after, to_thread
from pamqp.commands import Basic

from eventbus.testing.transport_exam import Bench, Check, broker_checks_for, checks_for, examine
from eventbus.transport import Lost, PublishError, Subscription, Transport, Wire
from eventbus.transports.rabbitmq import RabbitMQTransport
from tests.servers.proxy import Proxy
from tests.servers.rabbitmq import AGE
from tests.servers.server import Server
from tests.transports.brokers import broker_at

PROMISES = RabbitMQTransport.capabilities
CONTROL = "/usr/lib/rabbitmq/bin/rabbitmqctl"

pytestmark = pytest.mark.timeout(300)  # RabbitMQ is slow to start, and the first test of a run waits for it


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    """Run on asyncio, which is what this transport promises."""
    return "asyncio"


@asynccontextmanager
async def administered(server: Server) -> AsyncGenerator[aio_pika.abc.AbstractChannel]:
    """Yield a channel beside the transport."""
    async with await aio_pika.connect(server.url) as link:
        yield await link.channel()


async def control(server: Server, *arguments: str) -> str:
    """Have the server's own tool do something."""
    return await to_thread.run_sync(server.run, [CONTROL, "-q", "-n", f"eventbus{server.port}@localhost", *arguments])


@contextmanager
def faulty(transport: Transport) -> Iterator[None]:
    """Have the broker refuse what has the body of a fault."""
    line = cast("RabbitMQTransport", transport)._line
    assert line is not None
    outlet = cast("Any", line._outlet)
    launch = outlet._launch

    def refuse(call: Any, index: int, id: str, until: float, pieces: Sequence[bytes]) -> None:
        if b"fault" in pieces:
            call.failed[index] = outlet._explain(DeliveryError(None, Basic.Nack()))
        else:
            launch(call, index, id, until, pieces)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outlet, "_launch", refuse)
        yield


@pytest.fixture(scope="module")
def bench(rabbitmq: Server, messages: int) -> Bench:
    """Return a bench on the real server."""

    async def buried(transport: Transport, topic: str, group: str) -> Sequence[tuple[str, str]]:
        async with administered(rabbitmq) as channel:
            queue = await channel.get_queue(f"{topic}@{group}.dead")
            found: list[tuple[str, str]] = []
            while (message := await queue.get(fail=False)) is not None:
                found.append((str(message.message_id), str(message.headers["x-eventbus-reason"])))
            return found

    async def delete(topic: str, group: str) -> None:
        async with administered(rabbitmq) as channel:
            await channel.queue_delete(f"{topic}@{group}")

    async def left(topic: str) -> list[str]:
        return (await control(rabbitmq, "list_queues", "name")).split()

    broker = broker_at(
        rabbitmq,
        "amqp://guest:guest@127.0.0.1:{port}/",
        proxy=lambda: Proxy(urlsplit(rabbitmq.url).port or 5672),
        delete=delete,
        delete_dead=lambda topic, group: delete(topic, f"{group}.dead"),
        left=left,
        age=AGE,
        count=messages,
    )
    return Bench(
        make=lambda: RabbitMQTransport(rabbitmq.url),
        patience=15.0,
        quiet=0.3,
        dead=buried,
        faulty=faulty,
        broker=broker,
    )


@pytest.mark.parametrize("check", checks_for(PROMISES), ids=str)
async def test_exam(bench: Bench, check: Check) -> None:
    """Every promise that is declared is kept."""
    await examine(bench, check)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("check", broker_checks_for(PROMISES), ids=str)
async def test_exam_of_the_broker(bench: Bench, check: Check, rabbitmq: Server) -> None:
    """Whatever happens to the broker, what is declared is kept."""
    try:
        await examine(bench, check)
    finally:
        rabbitmq.start()


@asynccontextmanager
async def consuming(url: str, topic: str) -> AsyncGenerator[tuple[Any, Subscription]]:
    """Yield an open transport and a subscription of its own."""
    transport = RabbitMQTransport(url)
    async with transport, transport.subscribe(topic, group="g", prefetch=10, lease=30.0) as subscription:
        yield transport, subscription


async def test_a_confirmation_that_stays_away_ends_everything(
    rabbitmq: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the timeout of the URL the waiter and every subscription hear of it, though RabbitMQ answers otherwise."""
    async with consuming(f"{rabbitmq.url}?timeout=1", "special.silent") as (transport, subscription):
        await transport.publish("special.silent", [Wire("1", b"")])
        await subscription.receive()
        monkeypatch.setattr(transport._line._outlet._pen, "write", lambda pieces: None)
        with pytest.raises(PublishError, match="did not confirm within 1 s"), fail_after(3):
            await transport.publish("special.silent", [Wire("2", b"")])
        with pytest.raises(Lost, match="did not confirm within 1 s"):
            await subscription.receive()


async def test_who_consumes_is_spared_when_who_publishes_is_blocked(rabbitmq: Server) -> None:
    """While RabbitMQ has no memory to spare, what is published is Lost, and everything else goes on."""
    async with consuming(f"{rabbitmq.url}?timeout=1", "special.blocked") as (transport, subscription):
        await transport.publish("special.blocked", [Wire("1", b"")])
        await control(rabbitmq, "set_vm_memory_high_watermark", "0")
        try:
            with suppress(PublishError):
                await transport.publish("special.blocked", [Wire("2", b"")])  # RabbitMQ blocks after the first
            for _ in range(2):
                with pytest.raises(PublishError, match="did not confirm within 1 s"), fail_after(3):
                    await transport.publish("special.blocked", [Wire("3", b"")])
            await (await subscription.receive()).retry(0)
            while (delivery := await subscription.receive()).wire.id != "1":
                await delivery.ack()
            assert delivery.attempt == 2
        finally:
            await control(rabbitmq, "set_vm_memory_high_watermark", "0.6")
        with fail_after(30):
            await transport.publish("special.blocked", [Wire("4", b"")])
            while (await subscription.receive()).wire.id != "4":
                pass


async def test_who_is_cancelled_stops_nothing(rabbitmq: Server) -> None:
    """What was handed over arrives in spite of it, and the next publish is confirmed as ever."""
    async with consuming(rabbitmq.url, "special.cut") as (transport, subscription):
        for topic, expected in (("special.cut", ["1", "2"]), ("special.cut.unheard", ["2"])):
            with CancelScope() as scope:
                scope.cancel()
                await transport.publish(topic, [Wire("1", b"")])
            assert scope.cancelled_caught
            await transport.publish("special.cut", [Wire("2", b"")])
            assert [(await subscription.receive()).wire.id for _ in expected] == expected
