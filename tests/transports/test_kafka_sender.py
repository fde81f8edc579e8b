"""What the sender does with batches that the client was about to send again."""

import asyncio
import gc
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka import TopicPartition
from aiokafka.producer.message_accumulator import MessageAccumulator

from eventbus.transports._kafka_sender import Sender


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


async def test_giving_up_leaves_no_error_that_nobody_looks_at() -> None:
    """A batch that waits to be sent again fails with the others, and the event loop has nothing to complain about."""
    loop, complaints, batches = asyncio.get_running_loop(), list[Any](), dict[str, Any]()
    before = loop.get_exception_handler()
    loop.set_exception_handler(lambda _, context: complaints.append(context))
    try:
        batches["all"] = MessageAccumulator(SimpleNamespace(leader_for_partition=lambda _: 1), 1_000, 0, 30, loop=loop)
        partition = TopicPartition("t", 0)
        message = await batches["all"].add_message(partition, None, b"x", 5)
        batches["all"].reenqueue(batches["all"]._pop_batch(partition))
        Sender(SimpleNamespace(_message_accumulator=batches["all"]), 10, SimpleNamespace())._fail_all(OSError("gone"))
        await asyncio.wait([message])
        assert isinstance(message.exception(), OSError)
        batches.clear()
        gc.collect()
        await asyncio.sleep(0)
    finally:
        loop.set_exception_handler(before)
    assert complaints == []


async def test_batch_that_is_over_while_it_waits_to_be_sent_again() -> None:
    """Its time may be over then, and the event loop has nothing to complain about."""
    loop, complaints = asyncio.get_running_loop(), list[Any]()
    before = loop.get_exception_handler()
    loop.set_exception_handler(lambda _, context: complaints.append(context))
    try:
        batches: Any = MessageAccumulator(SimpleNamespace(leader_for_partition=lambda _: 1), 1_000, 0, 30, loop=loop)
        task = loop.create_task(asyncio.sleep(0))
        producer = SimpleNamespace(
            _message_accumulator=batches, _sender=SimpleNamespace(sender_task=task, _fail_all=lambda _: None)
        )
        Sender(producer, 10, SimpleNamespace()).watch()
        partition = TopicPartition("t", 0)
        message = await batches.add_message(partition, None, b"x", 5)
        batch = batches._pop_batch(partition)
        batches.reenqueue(batch)
        batch.failure(OSError("too late"))
        await asyncio.wait([message, task])
        assert isinstance(message.exception(), OSError)
        assert isinstance(batch.future.exception(), OSError)
        assert isinstance(batch._drain_waiter.exception(), OSError)
    finally:
        loop.set_exception_handler(before)
    assert complaints == []
