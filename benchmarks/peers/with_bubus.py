# mypy: ignore-errors
# pyright: basic, reportMissingImports=false
# The library is not there where types are checked.

"""Do the work with bubus; each event is made anew, because it cannot be dispatched twice."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from bubus import BaseEvent, EventBus

from benchmarks.measure import Loop
from benchmarks.peers.work import FORGET, PUBLISHES, SEND, answer, handlers_for


class Ask(BaseEvent[int]):
    number: int


def bus_of(handlers) -> EventBus:
    bus = EventBus(parallel_handlers=True)
    for number, handler in enumerate(handlers):
        handler.__name__ = f"take_{number}"
        bus.on(Ask, handler)
    return bus


def sending(bus: EventBus) -> Loop:
    async def send(passes: int) -> None:
        for _ in range(passes):
            event = await bus.dispatch(Ask(number=1))
            await event.event_result()

    return send


def publishing(bus: EventBus) -> Loop:
    async def publish(passes: int) -> None:
        for _ in range(passes):
            await bus.dispatch(Ask(number=1))

    return publish


def forgetting(bus: EventBus) -> Loop:
    async def forget(passes: int) -> None:
        for first in range(0, passes, 50):  # what it takes at most
            for _ in range(first, min(first + 50, passes)):
                bus.dispatch(Ask(number=1))
            await bus.wait_until_idle()

    return forget


@asynccontextmanager
async def opened() -> AsyncGenerator[dict[str, Loop]]:
    """Yield the loops."""
    buses = {name: bus_of(handlers_for(name)) for name in PUBLISHES}
    one, other = bus_of([answer]), bus_of([answer])
    loops = {name: publishing(bus) for name, bus in buses.items()}
    try:
        yield {SEND: sending(one), **loops, FORGET: forgetting(other)}
    finally:
        for bus in (one, other, *buses.values()):
            await bus.stop()
