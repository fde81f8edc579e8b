"""A Kafka transport that ends leaves no connection and no task behind, whatever its client was just doing."""

import asyncio
import gc
import socket
import warnings
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import anyio
import pytest
from aiokafka import conn
from aiokafka.errors import KafkaConnectionError

from eventbus.clock import new_id
from eventbus.errors import Lost, PublishError
from eventbus.transport import Transport, Wire, connect
from eventbus.transports._kafka_connections import Connections
from tests.servers.kafka import BEHIND, PROXY
from tests.servers.proxy import Fault, Proxy
from tests.servers.server import Server

pytestmark = pytest.mark.timeout(120)

HELLO, METADATA = b"\x00\x12\x00", b"\x00\x03\x00"
"""How two requests begin: the first on a connection, and the one behind it where it is the first of a client."""

Left = Callable[[], list[str]]


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def topic() -> str:
    return f"test.{new_id()}"


@pytest.fixture
async def proxy(kafka: Server) -> AsyncIterator[Proxy]:
    if kafka.foreign:
        pytest.skip("a Kafka of somebody else does not tell its clients where the proxy is")
    async with Proxy(kafka.port + BEHIND, kafka.port + PROXY).running() as between:
        yield between


@pytest.fixture
def through(proxy: Proxy) -> Transport:
    """Return a transport that goes through the proxy."""
    return connect(f"kafka://127.0.0.1:{proxy.port}?partitions=4")


@pytest.fixture
async def left(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Left]:
    """Yield what names the connections and the tasks that are left; behind the test the collector finds none either."""
    held: dict[Any, Any] = {}
    opened, closed = conn.AIOKafkaProtocol.connection_made, conn.AIOKafkaProtocol.connection_lost

    def hold(self: Any, transport: Any) -> None:
        held[self] = transport
        opened(self, transport)

    def release(self: Any, error: Exception | None) -> None:
        del held[self]
        closed(self, error)

    def names() -> list[str]:
        tasks = [(task.get_name(), task.get_coro()) for task in asyncio.all_tasks()]
        found = [f"{name} {coro.__qualname__}" for name, coro in tasks if "kafka " in name or is_clients(coro)]
        return [*found, *map(repr, held.values())]

    monkeypatch.setattr(conn.AIOKafkaProtocol, "connection_made", hold)
    monkeypatch.setattr(conn.AIOKafkaProtocol, "connection_lost", release)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        yield names
        held.clear()
        gc.collect()
        await asyncio.sleep(0)
    assert [str(one.message) for one in found] == []


def is_clients(job: Any) -> bool:
    """Tell whether a coroutine is one of the client library."""
    return "/aiokafka/" in job.cr_code.co_filename


async def publishing(transport: Transport, topic: str, body: bytes = b"{}") -> None:
    """Publish what is never confirmed."""
    with pytest.raises(PublishError):
        await transport.publish(topic, [Wire(new_id(), body)])


async def test_a_producer_that_waits_for_an_answer(proxy: Proxy, through: Transport, topic: str, left: Left) -> None:
    """A producer is closed also while it waits for an answer that does not come."""
    async with anyio.create_task_group() as tasks, through:
        await through.declare(topic, [])
        await through.publish(topic, [Wire(new_id(), b"{}")])
        proxy.inject(Fault(does="black-hole"))
        tasks.start_soon(publishing, through, topic)
        await anyio.wait_all_tasks_blocked()
    assert left() == []


@pytest.mark.parametrize("given_up", [False, True])
async def test_a_producer_that_is_still_writing(
    proxy: Proxy, through: Transport, topic: str, left: Left, given_up: bool
) -> None:
    """A connection is closed that takes nothing more in, with the rest unwritten; also one that was given up before."""
    async with anyio.create_task_group() as tasks, through:
        await through.declare(topic, [])
        await through.publish(topic, [Wire(new_id(), b"{}")])
        [link] = through._sender._producer.client._conns.values()
        writer = link._writer
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4_096)
        proxy.inject(Fault(does="delay", seconds=60.0, after=1))
        tasks.start_soon(publishing, through, topic, bytes(900_000))
        await proxy.struck()
        assert writer.transport.get_write_buffer_size()
        if given_up:
            link.close()
    assert left() == []


async def test_a_consumer_whose_farewell_is_not_answered(
    proxy: Proxy, through: Transport, topic: str, left: Left
) -> None:
    """A consumer is closed also where nobody answers that it leaves its group."""
    async with through:
        async with through.subscribe(topic, group="g", prefetch=1, lease=30.0):
            proxy.inject(Fault(does="black-hole"))
        assert len(left()) == len(left())
    assert left() == []


async def test_a_consumer_that_pauses_behind_a_failed_fetch(
    through: Transport, topic: str, left: Left, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A consumer is closed also while it waits before it tries again, where its client forgets to hang up."""
    async with through, through.subscribe(topic, group="g", prefetch=1, lease=30.0) as subscription:
        client, failed = subscription.consumer._client, anyio.Event()
        send = client.send

        async def fail(node: object, request: object, **others: Any) -> Any:
            if type(request).__name__.startswith("Fetch"):
                failed.set()
                raise KafkaConnectionError
            return await send(node, request, **others)

        monkeypatch.setattr(client, "send", fail)
        monkeypatch.setattr(subscription.consumer._fetcher, "_retry_backoff", 60.0)
        await failed.wait()
        await anyio.wait_all_tasks_blocked()
    assert left() == []


@pytest.mark.parametrize("group", ["g", None])
async def test_a_consumer_that_is_connecting(
    proxy: Proxy, through: Transport, topic: str, left: Left, group: str | None
) -> None:
    """No connection is made behind the close, nor one that was being made kept."""
    async with through:
        async with through.subscribe(topic, group=group, prefetch=1, lease=30.0):
            proxy.inject(Fault(does="reset"))
            proxy.inject(Fault(does="black-hole", at=HELLO))
            await proxy.struck()
        proxy.heal()
    assert left() == []


async def test_a_consumer_whose_own_task_failed(
    through: Transport, topic: str, left: Left, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A consumer is closed also where closing it fails half-way."""
    async with through, through.subscribe(topic, group="g", prefetch=1, lease=30.0) as subscription:

        async def fail() -> None:
            raise RuntimeError("torn")

        monkeypatch.setattr(subscription.consumer._coordinator, "close", fail)
    assert left() == []


async def test_a_subscription_that_is_cut_while_it_opens(
    proxy: Proxy, through: Transport, topic: str, left: Left
) -> None:
    """The first connection of a consumer is closed too, where the transport ends before it is answered."""
    async with anyio.create_task_group() as tasks, through:
        await through.declare(topic, ["g"])

        async def subscribe() -> None:
            with pytest.raises(Lost):
                async with through.subscribe(topic, group="g", prefetch=1, lease=30.0):
                    raise AssertionError("it opened")

        proxy.inject(Fault(does="black-hole", at=METADATA, behind=HELLO))
        tasks.start_soon(subscribe)
        await proxy.struck()
    assert left() == []


async def test_a_commit_that_is_connecting(proxy: Proxy, through: Transport, topic: str, left: Left) -> None:
    """What a commit connects is closed too, though its client lets that run on where the commit is cut."""
    async with through, through.subscribe(topic, group="g", prefetch=1, lease=30.0) as subscription:
        await through.publish(topic, [Wire(new_id(), b"{}")])
        with anyio.fail_after(10):
            delivery = await subscription.receive()
        proxy.inject(Fault(does="black-hole", at=HELLO))
        for link in subscription.consumer._client._conns.values():
            link.close()
        await delivery.ack()
        await proxy.struck()
    assert left() == []


class Client:
    """Be a client whose one connection is made when the test says so."""

    def __init__(self) -> None:
        self.asked, self.made = anyio.Event(), anyio.Event()
        self.reached = 0
        self._conns: dict[tuple[int, int], Any] = {}

    async def _get_conn(self, node: int, *, group: int) -> Any:
        self.asked.set()
        await self.made.wait()
        self.reached += 1
        self._conns[node, group] = link = Link()
        return link


class Link:
    """Be a connection of it."""

    def __init__(self) -> None:
        self.open, self._writer = True, SimpleNamespace(transport=self)

    def connected(self) -> bool:
        return self.open

    def close(self) -> None:
        self.open = False

    def abort(self) -> None:
        assert not self.open


async def test_a_connection_that_is_made_at_the_end() -> None:
    """A connection that comes when it is too late is closed, and none is made afterwards."""
    client = Client()
    connections = Connections(client, {})
    connecting = asyncio.ensure_future(client._get_conn(1, group=0))
    await client.asked.wait()
    client.made.set()
    connections.cut()
    assert await connecting is None
    assert not client._conns[1, 0].open
    assert await client._get_conn(2, group=0) is None
    assert client.reached == 1


async def test_a_client_that_is_cut_ends_in_order() -> None:
    """Who waits for the cluster goes on without it, and does what it has still to do."""
    client, ended = Client(), anyio.Event()

    async def stop() -> None:
        assert await client._get_conn(1, group=0) is None
        await asyncio.sleep(0)
        ended.set()

    await Connections(client, {}).end(stop(), 0.1)
    assert ended.is_set()
