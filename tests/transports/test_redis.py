"""The Redis transports pass the exam on a real server, and do what only they can."""

from collections.abc import Sequence

import pytest
from redis.asyncio import Redis

from eventbus.testing.transport_exam import Bench, Check, checks_for, examine
from eventbus.transport import Transport
from eventbus.transports.redis import RedisTransport
from tests.servers.server import Server

STREAMS = RedisTransport("redis://localhost").capabilities


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    """Run on asyncio: the client knows nothing else."""
    return "asyncio"


@pytest.fixture
def bench(valkey: Server) -> Bench:
    async def buried(transport: Transport, topic: str, group: str) -> Sequence[tuple[str, str]]:
        async with Redis.from_url(valkey.url) as client:
            entries = await client.xrange(f"{topic}@{group}.dead")
        return [(fields[b"id"].decode(), fields[b"reason"].decode()) for _, fields in entries]

    return Bench(make=lambda: RedisTransport(valkey.url), quiet=0.5, dead=buried)


@pytest.mark.parametrize("check", checks_for(STREAMS), ids=str)
async def test_exam(check: Check, bench: Bench) -> None:
    """Streams pass the exam."""
    await examine(bench, check)
