"""Do with each broker's ordinary client what a bus does, in the fastest way that is as safe.

A window of messages is on its way at once, each confirmed; what arrives together is handled, then acknowledged
together.
"""

from asyncio import Task, create_task, gather, get_running_loop, sleep
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

import aiormq
import nats
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from pydantic import BaseModel
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from benchmarks.laps import TASKS, Contender, Publish, spread

__all__ = ("FLOORS",)

TOPIC = "bare.told"
GROUP = "bare"
BATCH = 256
"""Messages of one fetch."""
PATIENCE = 0.1
"""Seconds that one fetch waits."""
Take = Callable[[], None]
Opened = AsyncGenerator[Publish]


class Told(BaseModel):
    number: int
    customer: str
    sku: str


def body(number: int) -> bytes:
    return Told(number=number, customer=f"customer-{number % 1000}", sku="bolt").model_dump_json().encode()


async def handle(data: bytes, take: Take) -> None:
    Told.model_validate_json(data)
    take()


async def in_windows(count: int, publish: Callable[[range], Awaitable[object]]) -> None:
    for first in range(0, count, TASKS):
        await publish(range(first, min(first + TASKS, count)))


@asynccontextmanager
async def repeating(step: Callable[[], Awaitable[object]], consume: bool) -> AsyncGenerator[None]:
    """Take one step after another in a task, and end between two."""
    over = not consume

    async def run() -> None:
        while not over:
            await step()

    task = create_task(run())
    try:
        yield
    finally:
        over = True
        await task


@asynccontextmanager
async def redis(url: str, consume: bool, take: Take) -> Opened:
    """Open Redis Streams: a pipeline a window, an XACK a batch."""
    client = Redis.from_url(url)

    async def window(numbers: range) -> None:
        pipe = client.pipeline(transaction=False)
        for number in numbers:
            pipe.xadd(TOPIC, {"body": body(number)})
        await pipe.execute()

    async def step() -> None:
        found = await client.xreadgroup(GROUP, "one", {TOPIC: ">"}, BATCH, round(PATIENCE * 1000))
        for _, entries in found.items() if isinstance(found, dict) else found:
            some = entries[0] if entries and isinstance(entries[0], list) else entries
            for _, fields in some:
                await handle(fields[b"body"], take)
            await client.xack(TOPIC, GROUP, *(id_ for id_, _ in some))

    async with client:
        with suppress(ResponseError):
            await client.xgroup_create(TOPIC, GROUP, "0", mkstream=True)
        async with repeating(step, consume):
            yield lambda count: in_windows(count, window)


@asynccontextmanager
async def rabbitmq(url: str, consume: bool, take: Take) -> Opened:
    """Open RabbitMQ: confirmed and persistent, and one ack of all that was handled in a turn of the event loop."""
    connection = await aiormq.connect(url)
    channel = await connection.channel(publisher_confirms=True)
    kept, loop, handled, acks = aiormq.spec.Basic.Properties(delivery_mode=2), get_running_loop(), 0, set[Any]()

    async def one(number: int) -> None:
        await channel.basic_publish(body(number), routing_key=TOPIC, properties=kept, mandatory=True)

    def flush() -> None:
        nonlocal handled
        task = create_task(channel.basic_ack(handled, multiple=True))
        acks.add(task)
        task.add_done_callback(acks.discard)
        handled = 0

    async def arrived(message: Any) -> None:
        nonlocal handled
        await handle(message.body, take)
        if not handled:
            loop.call_soon(flush)
        handled = message.delivery_tag

    async with connection:
        await channel.queue_declare(TOPIC, durable=True, arguments={"x-queue-type": "quorum"})
        if consume:
            await channel.basic_qos(prefetch_count=BATCH)
            await channel.basic_consume(TOPIC, arrived)
        yield lambda count: spread(count, one)
        await sleep(0)  # the last flush
        await gather(*acks)


@asynccontextmanager
async def jetstream(url: str, consume: bool, take: Take) -> Opened:
    """Open NATS JetStream: a window of publishes without waiting, acks of a batch of which the last is answered."""
    connection = await nats.connect(url)
    stream = connection.jetstream()
    await stream.add_stream(name=GROUP, subjects=[TOPIC])
    pull = await stream.pull_subscribe(TOPIC, durable=GROUP, stream=GROUP)

    async def window(numbers: range) -> None:
        await gather(*[await stream.publish_async(TOPIC, body(number)) for number in numbers])

    async def step() -> None:
        with suppress(nats.errors.TimeoutError):
            *some, last = await pull.fetch(BATCH, timeout=PATIENCE)
            for message in (*some, last):
                await handle(message.data, take)
            for message in some:
                await message.ack()
            await last.ack_sync()

    try:
        async with repeating(step, consume):
            yield lambda count: in_windows(count, window)
    finally:
        await connection.close()


@asynccontextmanager
async def kafka(url: str, consume: bool, take: Take) -> Opened:
    """Open Kafka: an idempotent producer, one commit after another of what was handled meanwhile."""
    address, handled, commits = url.partition("://")[2], dict[TopicPartition, int](), list[Task[None]]()
    async with AsyncExitStack() as stack:
        admin = AIOKafkaAdminClient(bootstrap_servers=address)
        await admin.start()
        await admin.create_topics([NewTopic(TOPIC, 12, 1)])
        await admin.close()
        producer = AIOKafkaProducer(bootstrap_servers=address, acks="all", enable_idempotence=True)
        await producer.start()
        stack.push_async_callback(producer.stop)

        async def window(numbers: range) -> None:
            await gather(*[
                await producer.send(TOPIC, body(number), key=f"customer-{number % 1000}".encode())
                for number in numbers
            ])  # fmt: skip

        async def step() -> None:
            found = await consumer.getmany(timeout_ms=round(PATIENCE * 1000), max_records=BATCH)
            for place, records in found.items():
                for record in records:
                    await handle(record.value, take)
                handled[place] = records[-1].offset + 1
            if handled and (not commits or commits[-1].done()):
                commits[:] = [create_task(consumer.commit(dict(handled)))]
                handled.clear()

        if consume:
            consumer = AIOKafkaConsumer(
                TOPIC, bootstrap_servers=address, group_id=GROUP, enable_auto_commit=False,
                auto_offset_reset="earliest",
            )  # fmt: skip
            await consumer.start()
            stack.push_async_callback(consumer.stop)
        async with repeating(step, consume):
            yield lambda count: in_windows(count, window)
        await gather(*commits)
        if handled:
            await consumer.commit(handled)


def _at(opened: Callable[[str, bool, Take], Any]) -> Callable[[str], Contender]:
    return lambda url: lambda consume, take: opened(url, consume, take)


FLOORS = {"redis": _at(redis), "rabbitmq": _at(rabbitmq), "nats": _at(jetstream), "kafka": _at(kafka)}
"""Broker -> the contender at a URL."""
