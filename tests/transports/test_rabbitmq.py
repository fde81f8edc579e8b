"""RabbitMQ passes the exam, and heals what only a broker can suffer."""

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import aio_pika
import pytest
from anyio import to_thread

from eventbus.testing.transport_exam import Bench, Broker, Check, broker_checks_for, checks_for, examine
from eventbus.transport import Transport
from eventbus.transports.rabbitmq import RabbitMQTransport
from tests.servers.proxy import Fault, Proxy
from tests.servers.server import Server

PROMISES = RabbitMQTransport.capabilities


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    """Run on asyncio, which is what this transport promises."""
    return "asyncio"


@asynccontextmanager
async def administered(server: Server) -> AsyncGenerator[aio_pika.abc.AbstractChannel]:
    """Yield a channel beside the transport."""
    async with await aio_pika.connect(server.url) as link:
        yield await link.channel()


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

    @asynccontextmanager
    async def frozen() -> AsyncGenerator[tuple[Callable[[], Transport], Callable[[], None]]]:
        async with Proxy(urlsplit(rabbitmq.url).port or 5672).running() as proxy:
            url = f"amqp://guest:guest@127.0.0.1:{proxy.port}/"
            yield lambda: RabbitMQTransport(url), lambda: proxy.inject(Fault(does="black-hole"))

    async def start() -> None:
        rabbitmq.start()  # not in a thread: the server would end with the thread that started it

    broker = Broker(
        start=start,
        stop=lambda: to_thread.run_sync(rabbitmq.stop),
        kill=lambda: to_thread.run_sync(rabbitmq.kill),
        delete=delete,
        frozen=frozen,
        age=2.0,
        count=messages,
    )
    return Bench(make=lambda: RabbitMQTransport(rabbitmq.url), quiet=0.3, dead=buried, broker=broker)


@pytest.mark.parametrize("check", checks_for(PROMISES), ids=str)
async def test_exam(bench: Bench, check: Check) -> None:
    """Every promise that is declared is kept."""
    await examine(bench, check)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("check", broker_checks_for(PROMISES), ids=str)
async def test_exam_of_the_broker(bench: Bench, check: Check, rabbitmq: Server) -> None:
    """Whatever happens to the broker, what is declared is kept."""
    try:
        await examine(bench, check)
    finally:
        rabbitmq.start()
