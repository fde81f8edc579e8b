"""What the sender does with batches that the client was about to send again."""

import asyncio
import gc
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import anyio
import pytest
from aiokafka import TopicPartition
from aiokafka.errors import NotEnoughReplicasError
from aiokafka.producer.message_accumulator import MessageAccumulator

from eventbus.errors import Lost, PublishError, Refused
from eventbus.transport import Wire
from eventbus.transports import _kafka_sender
from eventbus.transports._kafka_connections import Connections
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


class Producer:
    """Be a producer that learns of a topic, and has a batch confirmed, when the test says so."""

    def __init__(self) -> None:
        self._message_accumulator, self._sender = accumulator(), None
        self.client = SimpleNamespace(cluster=self)
        self.known, self.sent, self.error = anyio.Event(), list[bytes](), None

    def available_partitions_for_topic(self, _: str) -> set[int]:
        return {0}

    async def partitions_for(self, _: str) -> set[int]:
        await self.known.wait()
        return {0}

    def create_batch(self) -> Any:
        append = lambda value, **_: self.sent.append(value) or 0  # noqa: E731
        return SimpleNamespace(append=append, close=lambda: None)

    async def send_batch(self, *_: object, **__: object) -> "asyncio.Future[None]":
        future = asyncio.get_running_loop().create_future()
        future.set_result(None) if self.error is None else future.set_exception(self.error)
        return future

    async def stop(self) -> None:
        pass


@pytest.fixture
async def sender() -> AsyncIterator[Any]:
    tasks, producer = Tasks(), Producer()
    found = Sender(producer, Connections(SimpleNamespace(_get_conn=None, _conns={}), {}), 10, tasks)
    yield found
    await found.close("the test is over", 0.1)
    await tasks.end(1)


async def test_each_call_waits_as_long_as_the_first(sender: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who comes later is given up later, by the same clock."""
    monkeypatch.setattr(_kafka_sender, "CONFIRM", 0.2)
    ends: list[str] = []

    async def publish(topic: str) -> None:
        with pytest.raises(PublishError, match=f"{topic}: no confirmation within") as caught:
            await sender.send(topic, [Wire("1", b"")])
        assert isinstance(caught.value.failed[0], Lost)
        ends.append(topic)

    with anyio.fail_after(2):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(publish, "first")
            await anyio.sleep(0.1)
            tasks.start_soon(publish, "second")
    assert ends == ["first", "second"]


async def test_what_nobody_waits_for_any_more_is_not_sent(sender: Any) -> None:
    """Who is cancelled before the topic is known leaves nothing behind that is sent then."""
    async with anyio.create_task_group() as tasks:
        gone = asyncio.ensure_future(sender.send("topic", [Wire("1", b"gone")]))
        tasks.start_soon(sender.send, "topic", [Wire("2", b"here")])
        await anyio.wait_all_tasks_blocked()
        gone.cancel()
        await asyncio.wait([gone])
        sender._producer.known.set()
    assert sender._producer.sent == [b"here"]


async def test_the_end_fails_who_waits(sender: Any) -> None:
    """Also who waits for a topic to be known gets Lost when the producer is closed."""
    waiting = asyncio.ensure_future(sender.send("topic", [Wire("1", b"")]))
    await anyio.wait_all_tasks_blocked()
    await sender.close("closed", 0.1)
    with anyio.fail_after(1), pytest.raises(PublishError, match="closed"):
        await waiting


async def test_a_producer_that_lost_something_is_not_used_again(sender: Any) -> None:
    """Behind a batch that is lost everything is: its numbers are gone, and it may still come late."""
    sender._producer.known.set()
    sender._producer.error = NotEnoughReplicasError()
    for _ in range(2):
        with pytest.raises(PublishError, match="NotEnoughReplicas") as caught:
            await sender.send("topic", [Wire("1", b"x")])
        assert isinstance(caught.value.failed[0], Lost)
    assert sender._producer.sent == [b"x"]


async def test_what_cannot_be_written_is_refused(sender: Any) -> None:
    """What is no text is the fault of its message alone."""
    sender._producer.known.set()
    with pytest.raises(PublishError) as caught:
        await sender.send("topic", [Wire("1", b"x", {"name": "\ud800"}), Wire("2", b"y")])
    assert {index: type(error) for index, error in caught.value.failed.items()} == {0: Refused}
    assert sender._producer.sent == [b"y"]
