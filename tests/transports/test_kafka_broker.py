"""What is special to Kafka: partitions that move, commits without gaps, a broker that goes away or stands still."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import InvalidMessageError, NotEnoughReplicasError, TopicAuthorizationFailedError
from aiokafka.producer.message_accumulator import BatchBuilder

from eventbus.clock import new_id
from eventbus.errors import Lost, PublishError, Refused, SettleError, TransportError
from eventbus.transport import Delivery, Subscription, Wire, connect
from tests.servers.server import Server

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def url(kafka: Server) -> str:
    return f"{kafka.url}?partitions=4"


@pytest.fixture
def topic() -> str:
    return f"test.{new_id()}"


def wires(count: int, key: str | None = None) -> list[Wire]:
    return [Wire(new_id(), b"{}", key=key) for _ in range(count)]


def address(url: str) -> str:
    return url.removeprefix("kafka://").partition("?")[0]


@asynccontextmanager
async def administered(url: str) -> AsyncIterator[AIOKafkaAdminClient]:
    admin = AIOKafkaAdminClient(bootstrap_servers=address(url))
    await admin.start()
    try:
        yield admin
    finally:
        await admin.close()


async def take(subscription: Subscription, count: int, within: float = 10.0) -> list[Delivery]:
    with anyio.fail_after(within):
        return [await subscription.receive() for _ in range(count)]


async def until(fact: Callable[[], bool], within: float) -> None:
    with anyio.fail_after(within):
        while not fact():  # noqa: ASYNC110 - what is waited for happens elsewhere
            await anyio.sleep(0.02)


async def committed(url: str, topic: str, group: str) -> int:
    """Return how much of a topic a group has behind it."""
    async with administered(url) as admin:
        offsets = await admin.list_consumer_group_offsets(f"{topic}@{group}")
        return sum(found.offset for found in offsets.values() if found.offset > 0)


async def test_acks_of_one_moment_are_committed_together(url: str, topic: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two hundred acks at once take a handful of commits, and leave nothing behind."""
    commits: list[object] = []
    async with connect(url) as transport:
        async with transport.subscribe(topic, group="g", prefetch=200, lease=30.0) as subscription:
            commit = subscription.consumer.commit

            async def counted(offsets: Any) -> None:
                commits.append(offsets)
                await commit(offsets)

            monkeypatch.setattr(subscription.consumer, "commit", counted)
            await transport.publish(topic, wires(200))
            held = await take(subscription, 200)
            async with anyio.create_task_group() as tasks:
                for delivery in held:
                    tasks.start_soon(delivery.ack)
            await until(lambda: not subscription._uncommitted(), 5.0)
        assert 1 <= len(commits) <= 5
        assert await committed(url, topic, "g") == 200


async def test_only_what_is_settled_without_a_gap_is_committed(url: str, topic: str) -> None:
    """The commit stops before the first message of a partition that is not settled."""
    async with connect(url) as transport:
        async with transport.subscribe(topic, group="g", prefetch=10, lease=30.0) as subscription:
            await transport.publish(topic, wires(6, key="k"))
            held = await take(subscription, 6)
            for index in (0, 1, 3, 4):
                await held[index].ack()
        assert await committed(url, topic, "g") == 2


async def test_a_stuck_message_is_not_outrun_for_ever(url: str, topic: str) -> None:
    """Behind an unsettled message a partition rests after ten times the prefetch; other partitions go on."""
    async with (
        connect(url) as transport,
        transport.subscribe(topic, group="g", prefetch=2, lease=30.0) as subscription,
    ):
        await transport.publish(topic, wires(60, key="stuck"))
        [stuck] = await take(subscription, 1)
        passed = 0
        with anyio.move_on_after(1.0):
            while True:
                await (await subscription.receive()).ack()
                passed += 1
        assert 18 <= passed <= 21
        others = [Wire(new_id(), b"{}", key=f"other-{number}") for number in range(20)]
        await transport.publish(topic, others)
        [other] = await take(subscription, 1)
        assert other.wire.key != "stuck"
        await other.ack()
        await stuck.ack()
        while passed < 59:
            [delivery] = await take(subscription, 1)
            passed += delivery.wire.key == "stuck"
            await delivery.ack()


async def test_what_runs_is_finished_before_its_partition_moves(url: str, topic: str) -> None:
    """A newcomer waits for the acks of those who work, and gets nothing that they had."""
    async with AsyncExitStack() as stack:
        one, other = [await stack.enter_async_context(connect(url)) for _ in range(2)]
        first = await stack.enter_async_context(one.subscribe(topic, group="g", prefetch=50, lease=30.0))
        sent = [Wire(new_id(), b"{}", key=str(number)) for number in range(40)]
        await one.publish(topic, sent)
        held = await take(first, 40)
        second = await stack.enter_async_context(other.subscribe(topic, group="g", prefetch=50, lease=30.0))
        with anyio.move_on_after(0.5):
            raise AssertionError(f"{await second.receive()} has another owner")
        for delivery in held:
            await delivery.ack()
        later = [Wire(new_id(), b"{}", key=str(number)) for number in range(40)]
        await one.publish(topic, later)
        got: list[list[str]] = [[], []]

        async def consume(subscription: Subscription, ids: list[str]) -> None:
            while True:
                delivery = await subscription.receive()
                ids.append(delivery.wire.id)
                await delivery.ack()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(consume, first, got[0])
            tasks.start_soon(consume, second, got[1])
            await until(lambda: len(got[0]) + len(got[1]) >= 40, 10.0)
            tasks.cancel_scope.cancel()
        assert all(got)
        assert sorted(got[0] + got[1]) == sorted(wire.id for wire in later)


async def test_a_partition_that_moves_takes_its_messages_along(url: str, topic: str) -> None:
    """Beyond the grace what is unsettled goes to the new owner; the old one gets SettleError, and keeps what stayed."""
    async with AsyncExitStack() as stack:
        one, other = [await stack.enter_async_context(connect(url)) for _ in range(2)]
        first = await stack.enter_async_context(one.subscribe(topic, group="g", prefetch=50, lease=3.0))
        sent = [Wire(new_id(), b"{}", key=str(number)) for number in range(40)]
        await one.publish(topic, sent)
        held = {delivery.wire.id: delivery for delivery in await take(first, 40)}
        second = await stack.enter_async_context(other.subscribe(topic, group="g", prefetch=50, lease=3.0))
        moved: list[Delivery] = await take(second, 1)
        with anyio.move_on_after(1.0):
            while True:
                moved.append(await second.receive())
        ids = {delivery.wire.id for delivery in moved}
        assert len(ids) == len(moved) < 40
        for id, delivery in held.items():
            if id in ids:
                with pytest.raises(SettleError, match="moved to another consumer"):
                    await delivery.ack()
            else:
                await delivery.ack()
        for delivery in moved:
            await delivery.ack()
        with anyio.move_on_after(0.5):
            raise AssertionError(f"{await first.receive()} came twice")
        await stack.aclose()
    assert await committed(url, topic, "g") == 40


async def test_a_deleted_topic_is_noticed_and_made_anew(url: str, topic: str) -> None:
    """The subscription is lost within seconds, and the next one finds a new topic."""
    async with connect(url) as transport:
        async with transport.subscribe(topic, group="g", prefetch=10, lease=30.0) as subscription:
            await transport.publish(topic, wires(3))
            for delivery in await take(subscription, 3):
                await delivery.ack()
            async with administered(url) as admin:
                await admin.delete_topics([topic])
            with anyio.fail_after(7.0), pytest.raises(Lost):
                await subscription.receive()
        async with transport.subscribe(topic, group="g", prefetch=10, lease=30.0) as subscription:
            sent = wires(3)
            await transport.publish(topic, sent)
            got = await take(subscription, 3)
            assert sorted(delivery.wire.id for delivery in got) == sorted(wire.id for wire in sent)


async def test_a_topic_that_was_made_anew_is_noticed(url: str, topic: str) -> None:
    """A subscription that outlived its topic is lost, and does not wait at a place that the new one has not reached."""
    async with (
        connect(url) as transport,
        transport.subscribe(topic, group="g", prefetch=10, lease=30.0) as subscription,
    ):
        await transport.publish(topic, wires(3, key="k"))
        await take(subscription, 3)
        async with administered(url) as admin:
            await admin.delete_topics([topic])
        await transport.declare(topic, ["g"])
        with anyio.fail_after(10.0), pytest.raises(Lost):
            await subscription.receive()


async def test_a_dead_copy_that_fails_leaves_the_message(url: str, topic: str) -> None:
    """Where the dead copy is not confirmed the message is not settled, and comes again after a new subscription."""
    async with connect(url) as transport:
        async with transport.subscribe(topic, group="g", prefetch=10, lease=30.0) as subscription:
            [sent] = wires(1)
            await transport.publish(topic, [sent])
            [delivery] = await take(subscription, 1)
            transport._sender.broken, mended = "torn", transport._sender.broken
            with pytest.raises(SettleError, match="its dead copy could not be kept"):
                await delivery.reject("card stolen")
            transport._sender.broken = mended
            with pytest.raises(Lost, match="torn"):
                await subscription.receive()
        async with transport.subscribe(topic, group="g", prefetch=10, lease=30.0) as subscription:
            [delivery] = await take(subscription, 1)
            assert delivery.wire.id == sent.id


async def test_a_failure_names_its_messages(url: str, topic: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one call exactly the messages are named that failed, lost or refused, and the others are there."""
    async with connect(url) as transport, transport.subscribe(topic, group="g", prefetch=9, lease=30.0) as subscription:
        append = BatchBuilder.append
        faults = {b"1": NotEnoughReplicasError(), b"3": InvalidMessageError()}

        def faulty(batch: BatchBuilder, *, value: bytes, **others: Any) -> Any:
            if value in faults:
                raise faults[value]
            return append(batch, value=value, **others)

        monkeypatch.setattr(BatchBuilder, "append", faulty)
        with pytest.raises(PublishError) as caught:
            await transport.publish(topic, [Wire(new_id(), b"%d" % number) for number in range(5)])
        assert {index: type(error) for index, error in caught.value.failed.items()} == {1: Lost, 3: Refused}
        assert {delivery.wire.body for delivery in await take(subscription, 3)} == {b"0", b"2", b"4"}


async def test_what_the_broker_refuses_takes_nothing_along(url: str, topic: str) -> None:
    """Of a batch that is refused each is tried alone, so that only the guilty one is refused, and all goes on."""
    async with administered(url) as admin:
        await admin.create_topics([NewTopic(topic, 1, 1, topic_configs={"max.message.bytes": "2000"})])
    async with connect(url) as transport, transport.subscribe(topic, group="g", prefetch=9, lease=30.0) as subscription:
        sent = [Wire(new_id(), bytes(3_000 if number == 2 else 600)) for number in range(6)]
        with pytest.raises(PublishError) as caught:
            await transport.publish(topic, sent)
        assert {index: type(error) for index, error in caught.value.failed.items()} == {2: Refused}
        await transport.publish(topic, wires(1))
        got = [delivery.wire.id for delivery in await take(subscription, 6)]
        assert got[:5] == [wire.id for wire in sent if len(wire.body) == 600]


async def test_a_key_is_in_the_partition_of_every_client(url: str, topic: str) -> None:
    """What has one key is in one partition, whoever published it."""
    keys = [new_id() for _ in range(20)]
    async with connect(url) as transport, transport.subscribe(topic, group="g", prefetch=40, lease=30.0) as received:
        await transport.publish(topic, [Wire(new_id(), b"{}", key=key) for key in keys])
        async with AIOKafkaProducer(bootstrap_servers=address(url)) as producer:
            for key in keys:
                await producer.send(topic, b"{}", key=key.encode())
        places = {(delivery.wire.key, id(delivery.track)) for delivery in await take(received, 40)}
        assert len(places) == 20
        assert len({place for _, place in places}) > 1


async def test_without_a_key_it_goes_where_a_leader_is(url: str, topic: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What has no key waits for no partition that nobody leads."""
    async with connect(url) as transport, transport.subscribe(topic, group="g", prefetch=9, lease=30.0) as subscription:
        led = transport._sender._producer.client.cluster
        monkeypatch.setattr(led, "available_partitions_for_topic", lambda _: {2})
        await transport.publish(topic, wires(9))
        await take(subscription, 9)
        assert {partition.partition for partition in subscription._tracks} == {2}


async def test_a_topic_that_nobody_declared_is_made(url: str, topic: str) -> None:
    """Where nobody declares a topic, as where a bus only publishes, the first publish makes it as the URL says."""
    async with connect(url) as transport:
        with anyio.fail_after(4):
            await transport.publish(topic, wires(3))
        assert len(await transport._sender._producer.partitions_for(topic)) == 4


async def test_who_may_not_create_topics_may_publish(url: str, topic: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A topic that is there is published to by whom the cluster does not let create one."""

    async def refuse(_: object) -> None:
        raise TopicAuthorizationFailedError

    async with connect(url) as transport:
        monkeypatch.setattr(transport._admin, "create_topics", refuse)
        async with connect(url) as other:
            await other.declare(topic, [])
        await transport.publish(topic, wires(1))


async def test_a_producer_that_gave_up_is_lost(url: str, topic: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the client's own task fails, what waits is Lost at once, and so is the transport."""
    async with connect(url) as transport:
        await transport.declare(topic, [])

        def fail(*_: object, **__: object) -> None:
            raise RuntimeError("torn")

        monkeypatch.setattr(transport._sender._producer._message_accumulator, "drain_by_nodes", fail)
        for _ in range(2):
            with anyio.fail_after(2), pytest.raises(PublishError, match=r"batch delivery|gave up"):
                await transport.publish(topic, wires(1))
        with pytest.raises(Lost, match=r"batch delivery|gave up"):
            await transport.declare(topic, [])


async def test_what_the_close_cuts_is_lost(url: str, topic: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody who waits for an answer that does not come gets Lost when the transport closes, and no cancellation."""
    ends: list[BaseException] = []

    async def declare() -> None:
        try:
            await transport.declare(topic, [])
        except BaseException as error:
            ends.append(error)
            raise

    async def silent(*_: object) -> None:
        asked.set()
        await anyio.sleep_forever()

    asked = anyio.Event()
    async with connect(url) as transport:
        monkeypatch.setattr(transport._admin, "create_topics", silent)
        waiting = asyncio.ensure_future(declare())
        await asked.wait()
    with anyio.fail_after(2), pytest.raises(Lost, match="was closed"):
        await waiting
    assert len(ends) == 1


async def test_topics_that_others_own_are_only_looked_at(kafka: Server, topic: str) -> None:
    """With declare=false a missing topic is an error that says so, and none is made."""
    async with connect(f"{kafka.url}?declare=false") as transport:
        with pytest.raises(TransportError, match="create it, or leave out declare=false"):
            await transport.declare(topic, ["g"])
    async with connect(kafka.url) as transport:
        await transport.declare(topic, ["g"])
    async with connect(f"{kafka.url}?declare=false") as transport:
        await transport.declare(topic, ["g"])


async def test_records_of_other_programs_are_read(url: str, topic: str) -> None:
    """Without our headers a record has its place as id; CloudEvents attributes are read as such."""
    async with connect(url) as transport, transport.subscribe(topic, group="g", prefetch=9, lease=30.0) as subscription:
        async with AIOKafkaProducer(bootstrap_servers=address(url)) as producer:
            await producer.send_and_wait(topic, b"plain", key=b"\xff", partition=2)
            await producer.send_and_wait(topic, None, key=b"k", headers=[("ce_id", b"7"), ("none", None)], partition=2)
        first, second = (delivery.wire for delivery in await take(subscription, 2))
        assert (first.id, first.body, first.key) == (f"{topic}-2-0", b"plain", "\\xff")
        assert (second.id, second.body, dict(second.headers)) == ("7", b"", {"ce-id": "7", "none": ""})
