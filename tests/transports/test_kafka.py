"""Kafka passes the exam against a real broker, and does what only a log with consumer groups does."""

from collections.abc import Sequence
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer

from eventbus.testing.transport_exam import Bench, Check, checks_for, examine
from eventbus.transport import Transport, connect
from eventbus.transports._kafka_cluster import dead_topic
from eventbus.transports.kafka import KafkaTransport
from tests.servers.server import Server

PROMISES = KafkaTransport.from_url("kafka://localhost").capabilities
pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def url(kafka: Server) -> str:
    return f"{kafka.url}?partitions=6"


async def records(url: str, topic: str) -> list[Any]:
    """Return what a topic holds now."""
    servers = url.removeprefix("kafka://").partition("?")[0]
    consumer = AIOKafkaConsumer(topic, bootstrap_servers=servers, auto_offset_reset="earliest")
    await consumer.start()
    try:
        ends = await consumer.end_offsets(consumer.assignment())
        found: list[Any] = []
        while len(found) < sum(ends.values()):
            for some in (await consumer.getmany(timeout_ms=200)).values():
                found += some
        return found
    finally:
        await consumer.stop()


@pytest.mark.parametrize("check", checks_for(PROMISES), ids=str)
async def test_exam(check: Check, url: str) -> None:
    """Kafka keeps what it declares."""

    async def buried(transport: Transport, topic: str, group: str) -> Sequence[tuple[str, str]]:
        found = await records(url, dead_topic(topic, group))
        headers = [dict(record.headers) for record in found]
        return [(one["eventbus-id"].decode(), one["eventbus-dead-reason"].decode()) for one in headers]

    await examine(Bench(make=lambda: connect(url), lease=30.0, patience=10.0, quiet=0.4, dead=buried), check)
