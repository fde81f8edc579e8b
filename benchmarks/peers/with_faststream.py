# mypy: ignore-errors
# pyright: basic, reportMissingImports=false
# The library is not there where types are checked.

"""Do the work with FastStream, on its in-memory test broker."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from faststream.redis import RedisBroker, TestRedisBroker
from pydantic import BaseModel

from benchmarks.measure import Loop, calls
from benchmarks.peers.work import PUBLISHES, SEND, handlers_for


class Ask(BaseModel):
    number: int


def taking(handler):
    async def take(event: Ask) -> None:
        await handler(event)

    return take


def publishing(broker: RedisBroker, name: str) -> Loop:
    for handler in handlers_for(name):
        broker.subscriber(name)(taking(handler))

    async def publish(event: Ask) -> None:
        await broker.publish(event, name)

    return calls(publish, Ask(number=1))


@asynccontextmanager
async def opened() -> AsyncGenerator[dict[str, Loop]]:
    """Yield the loops."""
    broker = RedisBroker()

    @broker.subscriber("ask")
    async def handle(_: Ask) -> int:
        return 1

    async def send(ask: Ask) -> None:
        await broker.request(ask, "ask")

    publishes = {name: publishing(broker, name) for name in PUBLISHES}
    async with TestRedisBroker(broker):
        yield {SEND: calls(send, Ask(number=1)), **publishes}
