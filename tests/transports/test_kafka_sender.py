"""What the sender does with batches that the client was about to send again."""

import asyncio
import gc
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import anyio
import pytest
from aiokafka import TopicPartition
from aiokafka.producer.message_accumulator import MessageAccumulator

from eventbus.errors import Lost, PublishError
from eventbus.transport import Wire
from eventbus.transports import _kafka_sender
from eventbus.transports._kafka_sender import Sender
from eventbus.transports._kafka_tasks import Tasks


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def complaints() -> AsyncIterator[list[Any]]:
    """Yield what the event loop complains about."""
    loop, found = asyncio.get_running_loop(), list[Any]()
    before = loop.get_exception_handler()
    loop.set_exception_handler(lambda _, context: found.append(context))
    yield found
    loop.set_exception_handler(before)


def accumulator() -> Any:
    """Return where the client keeps its batches."""
    place = SimpleNamespace(leader_for_partition=lambda _: 1)
    return MessageAccumulator(place, 1_000, 0, 30, loop=asyncio.get_running_loop())


async def test_giving_up_leaves_no_error_that_nobody_looks_at(complaints: list[Any]) -> None:
    """A batch that waits to be sent again fails with the others, and the event loop has nothing to complain about."""
    batches, partition = {"all": accumulator()}, TopicPartition("t", 0)
    message = await batches["all"].add_message(partition, None, b"x", 5)
    sender = Sender(SimpleNamespace(_message_accumulator=batches["all"]), SimpleNamespace(), 10, SimpleNamespace())
    batches["all"].reenqueue(batches["all"]._pop_batch(partition))
    sender._fail_all(OSError("gone"))
    await asyncio.wait([message])
    assert isinstance(message.exception(), OSError)
    batches.clear()
    del sender
    gc.collect()
    await asyncio.sleep(0)
    assert complaints == []


async def test_batch_that_is_over_while_it_waits_to_be_sent_again(complaints: list[Any]) -> None:
    """Its time may be over then, and the event loop has nothing to complain about."""
    batches, partition = accumulator(), TopicPartition("t", 0)
    message = await batches.add_message(partition, None, b"x", 5)
    Sender(SimpleNamespace(_message_accumulator=batches), SimpleNamespace(), 10, SimpleNamespace())
    batch = batches._pop_batch(partition)
    batches.reenqueue(batch)
    batch.failure(OSError("too late"))
    await asyncio.wait([message])
    assert isinstance(message.exception(), OSError)
    assert isinstance(batch.future.exception(), OSError)
    assert isinstance(batch._drain_waiter.exception(), OSError)
    assert complaints == []


async def test_each_call_waits_as_long_as_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who comes later is given up later, by the same clock."""
    monkeypatch.setattr(_kafka_sender, "CONFIRM", 0.2)
    ends: list[str] = []

    async def silent(_: str) -> None:
        await anyio.sleep_forever()

    async def publish(topic: str) -> None:
        with pytest.raises(PublishError, match=f"{topic}: no confirmation within") as caught:
            await sender.send(topic, [Wire("1", b"")])
        assert isinstance(caught.value.failed[0], Lost)
        ends.append(topic)

    producer = SimpleNamespace(_message_accumulator=accumulator(), client=SimpleNamespace(cluster=None))
    producer.partitions_for = silent
    sender = Sender(producer, SimpleNamespace(), 10, Tasks())
    with anyio.fail_after(2):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(publish, "first")
            await anyio.sleep(0.1)
            tasks.start_soon(publish, "second")
    assert ends == ["first", "second"]
    for pump in sender._pumps:
        pump.cancel()
