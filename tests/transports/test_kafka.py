"""Kafka passes the exam against a real broker, and does what only a log with consumer groups does."""

from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer
from aiokafka.admin import AIOKafkaAdminClient

from eventbus.testing.transport_exam import Bench, Check, broker_checks_for, checks_for, examine
from eventbus.transport import Transport, Wire, connect
from eventbus.transports import _kafka_sender
from eventbus.transports._kafka_cluster import dead_topic
from eventbus.transports._kafka_records import outgoing
from eventbus.transports.kafka import KafkaTransport
from tests.servers.kafka import BEHIND, PROXY
from tests.servers.proxy import Proxy
from tests.servers.server import Server
from tests.transports.brokers import broker_at

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


@contextmanager
def faulty(_: Transport) -> Iterator[None]:
    """Have the broker refuse what has the body of a fault: it comes there larger than it takes."""

    def swollen(wire: Wire) -> dict[str, Any]:
        return outgoing(replace(wire, body=bytes(2**20)) if wire.body == b"fault" else wire)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_kafka_sender, "outgoing", swollen)
        yield


@asynccontextmanager
async def administered(kafka: Server) -> AsyncGenerator[AIOKafkaAdminClient]:
    """Yield what manages topics, as an operator does."""
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka.url.removeprefix("kafka://"))
    await admin.start()
    try:
        yield admin
    finally:
        await admin.close()


@pytest.fixture
def bench(kafka: Server, url: str, messages: int) -> Bench:
    """Return a bench on the real server."""

    async def buried(transport: Transport, topic: str, group: str) -> Sequence[tuple[str, str]]:
        found = await records(url, dead_topic(topic, group))
        headers = [dict(record.headers) for record in found]
        return [(one["eventbus-id"].decode(), one["eventbus-dead-reason"].decode()) for one in headers]

    async def delete(topic: str, group: str) -> None:
        async with administered(kafka) as admin:
            await admin.delete_topics([topic])

    async def left(topic: str) -> list[str]:
        async with administered(kafka) as admin:
            return [name for name, _ in await admin.list_consumer_groups() if topic in name]

    broker = broker_at(
        kafka, "kafka://127.0.0.1:{port}?partitions=6", proxy=lambda: Proxy(kafka.port + BEHIND, kafka.port + PROXY),
        delete=delete, delete_dead=lambda topic, group: delete(dead_topic(topic, group), group), left=left,
        count=messages,
    )  # fmt: skip
    return Bench(
        make=lambda: connect(url), lease=30.0, patience=10.0, quiet=0.4, dead=buried, faulty=faulty, broker=broker
    )


@pytest.mark.parametrize("check", checks_for(PROMISES), ids=str)
async def test_exam(check: Check, bench: Bench) -> None:
    """Kafka keeps what it declares."""
    await examine(bench, check)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("check", broker_checks_for(PROMISES), ids=str)
async def test_exam_of_the_broker(check: Check, bench: Bench, kafka: Server) -> None:
    """Whatever happens to the broker, what is declared is kept."""
    try:
        await examine(replace(bench, lease=6.0), check)
    finally:
        kafka.start()
