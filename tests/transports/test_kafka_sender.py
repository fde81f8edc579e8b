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
