"""What a reader does while partitions move, against a client that does what it is told."""

from collections import namedtuple
from types import SimpleNamespace
from typing import Any

import anyio
import pytest
from aiokafka import TopicPartition

from eventbus.errors import Lost, SettleError
from eventbus.transports._kafka_reader import Reader

P0, P1 = TopicPartition("t", 0), TopicPartition("t", 1)
Record = namedtuple("Record", "topic partition offset key value headers")  # noqa: PYI024 - as plain as can be


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


def record(partition: TopicPartition, offset: int) -> Record:
    return Record("t", partition.partition, offset, None, b"", [])


class Client:
    """Be a consumer whose partitions and polls the test decides."""

    def __init__(self) -> None:
        self.behind: dict[TopicPartition, int] = {}
        self.seeks: dict[TopicPartition, int] = {}
        self.polls: list[dict[TopicPartition, list[Record]]] = []
        self.asked = anyio.Event()

    def assignment(self) -> set[TopicPartition]:
        return {P0, P1}

    async def getmany(self, *_: object, **__: object) -> dict[TopicPartition, list[Record]]:
        if not self.polls:
            self.asked.set()
            await anyio.sleep_forever()
        return self.polls.pop(0)

    async def committed(self, partition: TopicPartition) -> int | None:
        return self.behind.get(partition)

    async def commit(self, offsets: dict[TopicPartition, Any]) -> None:
        self.behind |= {partition: mark.offset for partition, mark in offsets.items()}

    def seek(self, partition: TopicPartition, offset: int) -> None:
        self.seeks[partition] = offset


def reader_of(client: Client) -> Reader:
    return Reader(client, SimpleNamespace(), "t", prefetch=10, grace=0.01, grouped=True, bury=SimpleNamespace())


async def fed(client: Client, reader: Reader, *polls: dict[TopicPartition, list[Record]]) -> None:
    """Let the reader poll so often, and be cut in the next."""
    client.polls, client.asked = [*polls], anyio.Event()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(reader._pump)
        await client.asked.wait()
        tasks.cancel_scope.cancel()


async def test_a_partition_that_stays_goes_on_where_it_was() -> None:
    """What is at work stays valid, nothing is read twice, and the next poll begins behind it."""
    client = Client()
    reader = reader_of(client)
    await fed(client, reader, {P0: [record(P0, 5), record(P0, 6)]})
    first = await reader.receive()
    client.behind[P0] = 5
    await reader.give_up()
    await reader.take_over([P0, P1])
    assert client.seeks == {P0: 7}
    await first.ack()
    await reader.commit()
    assert client.behind == {P0: 6}
    assert (await reader.receive()).wire.id == "t-0-6"


async def test_a_partition_that_others_had_meanwhile_is_read_anew() -> None:
    """If somebody committed in between, what is at work here is not ours any more."""
    client = Client()
    reader = reader_of(client)
    await fed(client, reader, {P0: [record(P0, 5)]})
    first = await reader.receive()
    await reader.give_up()
    client.behind[P0] = 9
    await reader.take_over([P0])
    assert not client.seeks
    with pytest.raises(SettleError):
        await first.ack()


async def test_what_comes_before_the_partitions_are_sorted_out_is_not_lost() -> None:
    """Records that a poll brings early are kept for a new partition, and dropped for one that goes on."""
    client = Client()
    reader = reader_of(client)
    await fed(client, reader, {P0: [record(P0, 5)]})
    await reader.receive()

    moving, original = anyio.Event(), client.getmany

    async def late(*_: object, **__: object) -> dict[TopicPartition, list[Record]]:
        client.getmany = original  # type: ignore[method-assign]
        await reader.give_up()
        moving.set()
        return {P0: [record(P0, 5)], P1: [record(P1, 0)]}

    client.getmany = late  # type: ignore[method-assign]
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(reader._pump)
        await moving.wait()
        await anyio.wait_all_tasks_blocked()
        tasks.cancel_scope.cancel()
    await reader.take_over([P0, P1])
    assert client.seeks == {P0: 6}
    with anyio.fail_after(1):
        assert (await reader.receive()).wire.id == "t-1-0"
    assert not reader._ready


async def test_offsets_that_begin_again_end_the_subscription() -> None:
    """A record before the last one can only be of another topic of the same name."""
    client = Client()
    reader = reader_of(client)
    await fed(client, reader, {P0: [record(P0, 5)]})
    held = await reader.receive()
    client.polls = [{P0: [record(P0, 0)]}]
    await reader._pump()
    with pytest.raises(Lost, match="begins anew"):
        await reader.receive()
    with pytest.raises(SettleError):
        await held.ack()
