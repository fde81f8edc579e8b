"""Kafka and its consumers are killed, frozen and started again; every message arrives."""

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import anyio
import pytest

from eventbus.clock import new_id
from eventbus.errors import Lost, PublishError
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
