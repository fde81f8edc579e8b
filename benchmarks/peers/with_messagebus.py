# mypy: ignore-errors
# pyright: basic, reportMissingImports=false
# The library is not there where types are checked.

"""Do the work with messagebus, inside a unit of work without repositories."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from messagebus import AsyncAbstractUnitOfWork, AsyncMessageBus, Command, Event, Metadata

from benchmarks.measure import Loop, calls
from benchmarks.peers.work import PUBLISHES, SEND, answer, handlers_for


class Ask(Command):
    number: int
    metadata: Metadata = Metadata(name="ask", schema_version=1)


class Told(Event):
    number: int
    metadata: Metadata = Metadata(name="told", schema_version=1)


class Unit(AsyncAbstractUnitOfWork):
    async def commit(self) -> None:
        pass

    async def rollback(self) -> None:
        pass


def handling(bus: AsyncMessageBus, message) -> Loop:
    async def handle(message) -> None:
        async with Unit() as unit:
            await bus.handle(message, unit)
            await unit.commit()

    return calls(handle, message)


def listening(kind: type, handlers) -> AsyncMessageBus:
    bus = AsyncMessageBus()
    for handler in handlers:
        bus.add_listener(kind, listener(handler))
    return bus


def listener(handler):
    async def listen(message, _):
        return await handler(message)

    return listen


@asynccontextmanager
async def opened() -> AsyncGenerator[dict[str, Loop]]:
    """Yield the loops."""
    publishes = {name: handling(listening(Told, handlers_for(name)), Told(number=1)) for name in PUBLISHES}
    yield {SEND: handling(listening(Ask, [answer]), Ask(number=1)), **publishes}
