"""What is special to Kafka: partitions that move, commits without gaps, a broker that goes away or stands still."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient

from eventbus.clock import Runtime, new_id
from eventbus.errors import Lost, PublishError, SettleError, TransportError
from eventbus.limits import Limits
from eventbus.link import Link
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


CHILD = """
import asyncio, sys
from eventbus.transport import connect

async def main(url, topic):
    async with connect(url) as transport:
        async with transport.subscribe(topic, group="g", prefetch=5, lease=6.0) as subscription:
            for _ in range(5):
                await subscription.receive()
            print("holding", flush=True)
            await asyncio.sleep(600)

asyncio.run(main(*sys.argv[1:]))
"""


async def test_a_killed_consumer_gives_its_messages_back(url: str, topic: str) -> None:
    """What a process held that was killed comes to another within the lease and a little more."""
    async with connect(url) as transport:
        await transport.declare(topic, ["g"])
        sent = wires(5)
        await transport.publish(topic, sent)
        child = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", CHILD, url, topic),
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        assert await child.stdout.readline() == b"holding\n"
        child.kill()
        await child.wait()
        async with transport.subscribe(topic, group="g", prefetch=5, lease=6.0) as subscription:
            got = await take(subscription, 5, within=6.0 + 4.0)
            assert sorted(delivery.wire.id for delivery in got) == sorted(wire.id for wire in sent)


async def test_a_broker_that_stands_still_is_lost(kafka: Server, url: str, topic: str) -> None:
    """With the link up and no answer, publish ends in 10 s, receive in 15 s, and closing in 2 s; then all goes on."""
    if kafka.foreign:
        pytest.skip("the kafka server is not ours to stop")
    ends: dict[str, float] = {}
    started = anyio.current_time()

    async def publish() -> None:
        with pytest.raises(PublishError) as caught:
            await transport.publish(topic, wires(1))
        assert isinstance(caught.value.failed[0], Lost)
        ends["publish"] = anyio.current_time() - started

    async def receive() -> None:
        async with transport.subscribe(topic, group="g", prefetch=5, lease=6.0) as subscription:
            ready.set()
            with pytest.raises(Lost):
                await subscription.receive()
            ends["receive"] = anyio.current_time() - started

    before = len(anyio.get_running_tasks())
    ready = anyio.Event()
    transport = connect(url)
    await transport.__aenter__()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(receive)
        await ready.wait()
        os.kill(kafka.pid, signal.SIGSTOP)
        try:
            started = anyio.current_time()
            tasks.start_soon(publish)
            await until(lambda: len(ends) == 2, 15.0)
            with pytest.raises(Lost):
                await transport.declare(topic, [])
            closing = anyio.current_time()
            await transport.__aexit__(None, None, None)
            assert anyio.current_time() - closing < 2.5
        finally:
            os.kill(kafka.pid, signal.SIGCONT)
    assert ends["publish"] < 10.0
    await until(lambda: len(anyio.get_running_tasks()) <= before, 5.0)
    await comes_back(url, topic)


async def comes_back(url: str, topic: str) -> None:
    """Open again as long as it is lost, as the engine does, until a message comes through."""
    with anyio.fail_after(30.0):
        while True:
            try:
                async with (
                    connect(url) as transport,
                    transport.subscribe(topic, group="g", prefetch=5, lease=6.0) as subscription,
                ):
                    await transport.publish(topic, wires(1))
                    await take(subscription, 1, within=20.0)
                    return
            except Lost:
                await anyio.sleep(0.2)


@pytest.fixture
def restarts() -> int:
    return 2 if os.environ.get("CI") else 1


@pytest.fixture(scope="session")
def hand(kafka: Server) -> Iterator[Executor]:
    """Return a thread that lives as long as what it starts: a server ends with the thread that started it."""
    with ThreadPoolExecutor(1) as executor:
        yield executor


async def test_nothing_is_lost_over_restarts(
    kafka: Server, url: str, topic: str, restarts: int, hand: Executor
) -> None:
    """A hundred publishers and one consumer group live through kills of the broker: every id arrives."""
    total, publishers = 10_000 if restarts > 1 else 2_000, 100
    sent: set[str] = set()
    got: list[str] = []
    losses: list[str] = []
    link = Link("events", connect(url), Runtime(), Limits(connect=60.0))
    link.topics[topic] = ("g",)

    async def publish(count: int) -> None:
        for wire in wires(count):
            while True:
                try:
                    await link.publish(topic, [wire])
                except TransportError:
                    await anyio.sleep(0.1)
                else:
                    break
            sent.add(wire.id)
            await anyio.sleep(0.1)

    async def consume() -> None:
        while True:
            try:
                async with link.subscribe(topic, group="g", prefetch=100, lease=6.0, ordered=False) as subscription:
                    while True:
                        delivery = await subscription.receive()
                        got.append(delivery.wire.id)
                        await delivery.ack()
            except TransportError as error:
                losses.append(str(error))
                await anyio.sleep(0.2)

    async with anyio.create_task_group() as tasks:
        await tasks.start(link.keep)
        tasks.start_soon(consume)
        async with anyio.create_task_group() as senders:
            for _ in range(publishers):
                senders.start_soon(publish, total // publishers)
            for number in range(restarts):
                await until(lambda: len(got) > total * (number + 1) // (restarts + 2), 60.0)  # noqa: B023
                kafka.kill()
                await asyncio.get_running_loop().run_in_executor(hand, kafka.start)
        await until(lambda: set(got) >= sent, 60.0)
        tasks.cancel_scope.cancel()
    assert len(sent) == total
    assert set(got) == sent
