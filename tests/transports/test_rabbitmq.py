"""RabbitMQ passes the exam, and heals what only a broker can suffer."""

from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any, cast
from urllib.parse import urlsplit

import aio_pika
import pytest
from aiormq.exceptions import DeliveryError
from anyio import to_thread
from pamqp.commands import Basic

from eventbus.testing.transport_exam import Bench, Check, broker_checks_for, checks_for, examine
from eventbus.transport import Transport
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
        command = [CONTROL, "-q", "-n", f"eventbus{rabbitmq.port}@localhost", "list_queues", "name"]
        return (await to_thread.run_sync(rabbitmq.run, command)).split()

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
