"""NATS passes the exam on a real server, and heals, refuses and hands over as only it can."""

import pytest
from nats.aio.client import Client

from eventbus.testing.transport_exam import Bench, Check, checks_for, examine
from eventbus.transport import Transport, connect
from eventbus.transports import _nats_address as names
from eventbus.transports.nats import NatsCoreTransport, NatsTransport
from tests.servers.server import Server

CAPABILITIES = NatsTransport.from_url("nats://localhost").capabilities

CORE = NatsCoreTransport.from_url("nats+core://localhost").capabilities


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    """Run on asyncio: the client knows no other."""
    return "asyncio"


@pytest.fixture
def bench(nats: Server) -> Bench:
    async def dead(transport: Transport, topic: str, group: str) -> list[tuple[str, str]]:
        return await buried(nats.url, topic, group)

    return Bench(make=lambda: connect(nats.url), dead=dead, quiet=0.2)


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


@pytest.mark.parametrize("check", checks_for(CORE), ids=str)
async def test_exam_of_core_nats(nats: Server, check: Check) -> None:
    await examine(Bench(make=lambda: connect(f"nats+core{nats.url.removeprefix('nats')}"), quiet=0.05), check)
