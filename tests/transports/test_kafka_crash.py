"""Kafka and its consumers are killed, frozen and started again; every message arrives."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path

import anyio
import pytest

from eventbus.clock import Runtime, new_id
from eventbus.errors import Lost, PublishError, TransportError
from eventbus.limits import Limits
from eventbus.link import Link
from eventbus.transport import connect
from eventbus.transports import _kafka_sender
from tests.servers.server import Server
from tests.transports.test_kafka_broker import take, until, wires

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


CHILD = """
import asyncio, sys
from eventbus.transport import connect
from eventbus.transports import _kafka_sender

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


async def test_a_broker_that_stands_still_is_lost(
    kafka: Server, url: str, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the link up and no answer, publish and receive end in time, and closing in 2 s; then all goes on."""
    assert _kafka_sender.CONFIRM < 10
    monkeypatch.setattr(_kafka_sender, "CONFIRM", 3.0)
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
    assert ends["publish"] < 3.0 + 2.0
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
