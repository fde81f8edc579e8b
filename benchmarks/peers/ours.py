"""Do the work with the library that this benchmark belongs to."""

from asyncio import Event as Flag
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from benchmarks.measure import Loop, calls
from benchmarks.peers.work import FORGET, PUBLISHES, SEND, answer, handlers_for
from eventbus import Command, Event, EventBus, Limits, Module


class Ask(Command[int]):
    number: int


class Told(Event):
    number: int


def publishing(name: str) -> Loop:
    module = Module("bench")
    for number, handler in enumerate(handlers_for(name)):
        module.on(Told, name=f"take_{number}")(handler)
    return calls(EventBus(module).publish, Told(number=1))


@asynccontextmanager
async def forgetting() -> AsyncGenerator[Loop]:
    module, handled, due, done = Module("bench"), 0, 0, Flag()

    @module.on(Told)
    async def take(_: Told) -> None:
        nonlocal handled
        handled += 1
        if handled == due:
            done.set()

    async def forget(passes: int) -> None:
        nonlocal due
        due += passes
        done.clear()
        for number in range(passes):
            await bus.publish(Told(number=number))
        await done.wait()

    bus = EventBus(module, routes={Told: "memory"}, limits=Limits(queue=100_000))
    async with bus.running():
        yield forget


@asynccontextmanager
async def opened() -> AsyncGenerator[dict[str, Loop]]:
    """Yield the loops."""
    module = Module("bench")
    module.handles(Ask)(answer)
    async with forgetting() as forget:
        send = calls(EventBus(module).send, Ask(number=1))
        yield {SEND: send, **{name: publishing(name) for name in PUBLISHES}, FORGET: forget}
