"""NATS passes the exam on a real server, and heals, refuses and hands over as only it can."""

from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, cast

import pytest
from nats.aio.client import Client

from eventbus.errors import Refused
from eventbus.testing.transport_exam import Bench, Check, broker_checks_for, checks_for, examine
from eventbus.transport import Transport, Wire, connect
from eventbus.transports import _nats_address as names
from eventbus.transports import _nats_topology
from eventbus.transports._nats_wire import Message, head_of, to_wire
from eventbus.transports.nats import NatsCoreTransport, NatsTransport
from tests.servers.proxy import Proxy
from tests.servers.server import Server
from tests.transports.brokers import broker_at

CAPABILITIES = NatsTransport.from_url("nats://localhost").capabilities

CORE = NatsCoreTransport.from_url("nats+core://localhost").capabilities
CRASHED = 19
"""Asks what the broker keeps of a subscriber that crashed, which NATS cannot be asked without telling subscribers."""


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    """Run on asyncio: the client knows no other."""
    return "asyncio"


@contextmanager
def faulty(transport: Transport) -> Iterator[None]:
    """Have JetStream refuse what has the body of a fault."""
    line = cast("NatsTransport", transport)._hull.line()
    request = line.request

    def refuse(subject: str, payload: bytes, head: bytes = b"") -> Any:
        if payload != b"fault":
            return request(subject, payload, head)
        answer = line.loop.create_future()
        answer.set_result(Message(subject, "", b'{"error": {"code": 503, "description": "no"}}'))
        return answer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(line, "request", refuse)
        yield


@pytest.fixture
def bench(nats: Server, messages: int, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """Return a bench on the real server, which forgets a subscriber that crashed within a second."""
    monkeypatch.setattr(_nats_topology, "DEPARTED", 1.0)

    async def dead(transport: Transport, topic: str, group: str) -> list[tuple[str, str]]:
        return await buried(nats.url, topic, group)

    async def delete(topic: str, group: str) -> None:
        async with administered(nats.url) as stream:
            await stream.delete_consumer(names.stream_of(topic), names.consumer_of(group))

    async def delete_dead(topic: str, group: str) -> None:
        async with administered(nats.url) as stream:
            await stream.delete_stream(names.dead_stream_of(topic))

    async def left(topic: str) -> list[str]:
        async with administered(nats.url) as stream:
            return [consumer.name for consumer in await stream.consumers_info(names.stream_of(topic))]

    broker = broker_at(
        nats, "nats://127.0.0.1:{port}", proxy=lambda: Proxy(nats.port), delete=delete, delete_dead=delete_dead,
        left=left, count=messages,
    )  # fmt: skip
    return Bench(make=lambda: connect(nats.url), dead=dead, quiet=0.2, faulty=faulty, broker=broker)


@asynccontextmanager
async def administered(url: str) -> AsyncGenerator[Any]:
    """Yield what manages streams, as an operator does."""
    client = Client()
    await client.connect(url)
    try:
        yield client.jsm()
    finally:
        await client.close()


async def buried(url: str, topic: str, group: str) -> list[tuple[str, str]]:
    """Return id and reason of the dead of a group, as any client of NATS finds them."""
    client = Client()
    await client.connect(url)
    try:
        listener = await client.jetstream().subscribe(names.dead_subject_of(topic, group), ordered_consumer=True)
        found: list[tuple[str, str]] = []
        while (await listener.consumer_info()).num_pending + listener.pending_msgs:
            message = await listener.next_msg()
            assert message.headers is not None
            found.append((message.headers["eventbus-id"], message.headers["eventbus-reason"]))
        return found
    finally:
        await client.close()


@pytest.mark.parametrize("check", checks_for(CAPABILITIES), ids=str)
async def test_exam(bench: Bench, check: Check) -> None:
    await examine(bench, check)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("check", broker_checks_for(CAPABILITIES), ids=str)
async def test_exam_of_the_broker(bench: Bench, check: Check, nats: Server) -> None:
    """Whatever happens to the broker, what is declared is kept."""
    try:
        await examine(bench, check)
    finally:
        nats.start()


@pytest.mark.parametrize("check", checks_for(CORE), ids=str)
async def test_exam_of_core_nats(nats: Server, check: Check) -> None:
    await examine(Bench(make=lambda: connect(f"nats+core{nats.url.removeprefix('nats')}"), quiet=0.05), check)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("check", [one for one in broker_checks_for(CORE) if one.number != CRASHED], ids=str)
async def test_exam_of_the_broker_of_core_nats(nats: Server, messages: int, check: Check) -> None:
    """Whatever happens to the server, core NATS keeps what it promises."""

    async def nothing(topic: str, group: str = "") -> list[str]:
        raise NotImplementedError(f"nothing is kept of {topic!r}")

    async def delete(topic: str, group: str) -> None:
        await nothing(topic, group)

    there = "nats+core://127.0.0.1:{port}"
    broker = broker_at(
        nats, there, proxy=lambda: Proxy(nats.port), delete=delete, delete_dead=delete, left=nothing, count=messages
    )  # fmt: skip
    try:
        await examine(Bench(make=lambda: connect(there.format(port=nats.port)), quiet=0.05, broker=broker), check)
    finally:
        nats.start()


@pytest.mark.parametrize(
    ("headers", "key", "why"),
    [
        ({"a": "b", "Nats-TTL": "1"}, None, "takes no header 'Nats-TTL'"),
        ({"a": "b", "": "c"}, None, "takes no header ''"),
        ({"a": "b", "c d": "e"}, None, "takes no header 'c d'"),
        ({"a": "b", "c": " d"}, None, "value of header 'c'"),
        ({"a": "b", "c": "d\n"}, None, "value of header 'c'"),
        ({"a": "b", "c": "d\u2028"}, None, "value of header 'c'"),
        ({"a": "b", "c": "d" * 4_096}, None, "together are larger"),
        ({"a": "b", "c": "é" * 2_100}, None, "together are larger"),
        ({"a": "b"}, "é" * 700, "together are larger"),
        ({"a": "b", "sonats-": "d e"}, "é", ""),
        ({"a": "b", "c": "é", "d": ""}, "k", ""),
        ({"a": "b"}, "k", ""),
    ],
)
async def test_impossible_headers_are_found_among_usual_ones(
    headers: dict[str, str], key: str | None, why: str
) -> None:
    """One header that cannot travel refuses its message, however usual the others are."""
    wire = Wire("1", b"{}", headers, key)
    if why:
        with pytest.raises(Refused, match=why):
            head_of(wire, 2)
    else:
        assert to_wire(Message("", "", b"{}", head_of(wire, 2)), "") == wire


@pytest.mark.parametrize(
    ("head", "id", "headers"),
    [
        (b"NATS/1.0\r\nName:Value\r\nb:\t c : d  \r\n\r\n", "otherwise", {"Name": "Value", "b": "c : d"}),
        (b"NATS/1.0\r\nNats-Msg-Id: 7\r\nNats-Stream: s\r\na: Nats-\r\n\r\n", "7", {"a": "Nats-"}),
        (b"NATS/1.0\r\na b: c\r\n\xc3\xa9: c\r\nnothing\r\na: \xff\xc3\xa9\r\n\r\n", "otherwise", {"a": "\ufffdé"}),
        (b"NATS/1.0\r\na: 1\r\na: 2\r\neventbus-key: %20\r\n\r\n", "otherwise", {"a": "2"}),
        (b"", "otherwise", {}),
    ],
)
async def test_headers_of_others_are_read_as_far_as_they_can_be(head: bytes, id: str, headers: dict[str, str]) -> None:
    """A header without a name that others may have is left out, and so are those that the server adds."""
    wire = to_wire(Message("s", "", b"{}", head), "otherwise")
    assert (wire.id, dict(wire.headers), wire.body) == (id, headers, b"{}")
    assert wire.key == (" " if b"key" in head else None)
