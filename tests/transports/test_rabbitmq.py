"""RabbitMQ passes the exam, and heals what only a broker can suffer."""

from collections.abc import Sequence

import aio_pika
import pytest

from eventbus.testing.transport_exam import Bench, Check, checks_for, examine
from eventbus.transport import Transport
from eventbus.transports.rabbitmq import RabbitMQTransport
from tests.servers.server import Server


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    """Run on asyncio, which is what this transport promises."""
    return "asyncio"


@pytest.fixture(scope="module")
def bench(rabbitmq: Server) -> Bench:
    """Return a bench on the real server."""

    async def buried(transport: Transport, topic: str, group: str) -> Sequence[tuple[str, str]]:
        async with await aio_pika.connect(rabbitmq.url) as link:
            channel = await link.channel()
            queue = await channel.get_queue(f"{topic}@{group}.dead")
            found: list[tuple[str, str]] = []
            while (message := await queue.get(fail=False)) is not None:
                found.append((str(message.message_id), str(message.headers["x-eventbus-reason"])))
            return found

    return Bench(make=lambda: RabbitMQTransport(rabbitmq.url), quiet=0.3, dead=buried)


@pytest.mark.parametrize("check", checks_for(RabbitMQTransport.capabilities), ids=str)
async def test_exam(bench: Bench, check: Check) -> None:
    """Every promise that is declared is kept."""
    await examine(bench, check)
