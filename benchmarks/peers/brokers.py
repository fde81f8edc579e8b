# mypy: ignore-errors
# pyright: basic, reportMissingImports=false
# The library is not there where types are checked.

"""Do with FastStream, at least once, what ``bench_brokers`` asks for on the standard input, and answer in seconds."""

import asyncio
import json
import logging
import sys
from contextlib import asynccontextmanager, suppress

from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from faststream import AckPolicy
from faststream.kafka import KafkaBroker
from faststream.nats import JStream, NatsBroker, PullSub
from faststream.rabbit import Channel, QueueType, RabbitBroker, RabbitQueue
from faststream.redis import RedisBroker, StreamSub
from nats import connect
from pydantic import BaseModel
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from benchmarks.laps import TASKS, Laps, spread

TOPIC = "peer.told"
GROUP = "peer"
PREFETCH = 2 * TASKS
PARTITIONS = 12
SAFE = {"ack_policy": AckPolicy.NACK_ON_ERROR}


class Told(BaseModel):
    number: int
    customer: str
    sku: str


def told(number):
    return Told(number=number, customer=f"customer-{number % 1000}", sku="bolt")


async def redis(url):
    async with Redis.from_url(url) as client:
        with suppress(ResponseError):
            await client.xgroup_create(TOPIC, GROUP, "0", mkstream=True)
    broker = RedisBroker(url, logger=None)
    stream = StreamSub(TOPIC, group=GROUP, consumer="one", max_records=PREFETCH, polling_interval=100)
    return (
        broker,
        lambda: broker.subscriber(stream=stream, **SAFE),
        lambda number: broker.publish(told(number), stream=TOPIC),
    )


async def rabbitmq(url):
    queue = RabbitQueue(TOPIC, queue_type=QueueType.QUORUM, durable=True)
    broker = RabbitBroker(url, logger=None, default_channel=Channel(prefetch_count=PREFETCH))
    await broker.connect()
    await broker.declare_queue(queue)
    return (
        broker,
        lambda: broker.subscriber(queue, **SAFE),
        lambda number: broker.publish(told(number), TOPIC, persist=True),
    )


async def nats(url):
    connection = await connect(url)
    await connection.jetstream().add_stream(name=GROUP, subjects=[TOPIC])
    await connection.close()
    broker = NatsBroker(url, logger=None)
    stream = JStream(GROUP, declare=False)
    pull = PullSub(batch_size=PREFETCH, timeout=0.1)
    return (
        broker,
        lambda: broker.subscriber(TOPIC, stream=stream, durable=GROUP, pull_sub=pull, **SAFE),
        lambda number: broker.publish(told(number), TOPIC, stream=GROUP),
    )


async def kafka(url):
    address = url.partition("://")[2]
    admin = AIOKafkaAdminClient(bootstrap_servers=address)
    await admin.start()
    await admin.create_topics([NewTopic(TOPIC, PARTITIONS, 1)])
    await admin.close()
    broker = KafkaBroker(address, logger=None, acks="all", enable_idempotence=True)
    return (
        broker,
        lambda: broker.subscriber(
            TOPIC, group_id=GROUP, auto_offset_reset="earliest", max_workers=PARTITIONS, **SAFE
        ),
        lambda number: broker.publish(told(number), TOPIC, key=f"customer-{number % 1000}".encode()),
    )  # fmt: skip


BROKERS = {"redis": redis, "rabbitmq": rabbitmq, "nats": nats, "kafka": kafka}


def opening(broker, url):
    @asynccontextmanager
    async def opened(consume, take):
        made, subscriber, publish = await BROKERS[broker](url)
        if consume:

            @subscriber()
            async def handle(_: Told) -> None:
                take()

        async with made:
            await made.start()
            yield lambda count: spread(count, publish)

    return opened


async def main(broker, url):
    laps = Laps(opening(broker, url))
    print("ready", flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        work, count = json.loads(line)
        print(await getattr(laps, work)(count), flush=True)


if __name__ == "__main__":
    logging.disable(logging.INFO)
    asyncio.run(main(*sys.argv[1:]))
