"""Measure the memory transport filled with 100,000 messages and then emptied, beside a bare anyio memory stream."""

import gc
import tracemalloc
from asyncio import Event as Flag
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from time import perf_counter

from anyio import create_memory_object_stream

from benchmarks.measure import Effort, Goal, Row, quiet_gc, turns
from eventbus import Event, EventBus, Limits, Module
from eventbus.transport import Wire
from eventbus.transports.memory import MemoryTransport

__all__ = ("rows",)

MESSAGES = 100_000
KEPT = 10_000
"""Messages that are weighed."""
BODY = b'{"number":1}'


class Told(Event, name="bench.told"):
    number: int


async def take(_: object) -> None:
    pass


async def through_stream(count: int) -> None:
    """Fill a stream, then empty it as one does: by iterating over it."""
    send, receive = create_memory_object_stream[Told](count)
    with receive:
        with send:
            for number in range(count):
                send.send_nowait(Told(number=number))
        async for event in receive:
            await take(event)


async def through_nowait_stream(count: int) -> None:
    """Fill and empty a stream without ever going to the event loop."""
    send, receive = create_memory_object_stream[Told](count)
    with send, receive:
        for number in range(count):
            send.send_nowait(Told(number=number))
        for _ in range(count):
            await take(receive.receive_nowait())


async def through_transport(count: int) -> None:
    """Fill a queue of the transport, and empty it, acknowledging each message."""
    async with MemoryTransport(limits=Limits(queue=count)) as transport:
        await transport.declare("told", ["bench"])
        for _ in range(count):
            await transport.publish("told", [Wire("1", BODY)])
        async with transport.subscribe("told", group="bench", prefetch=16, lease=30.0) as subscription:
            for _ in range(count):
                delivery = await subscription.receive()
                await take(delivery.wire)
                await delivery.ack()


def bus_of(count: int) -> tuple[EventBus, Flag]:
    """Return a bus whose one handler sets a flag after so many events."""
    module, left, done = Module("bench"), count, Flag()

    @module.on(Told)
    async def take_told(_: Told) -> None:
        nonlocal left
        left -= 1
        if not left:
            done.set()

    return EventBus(module, routes={Told: "memory"}, limits=Limits(queue=count)), done


async def through_bus(count: int) -> None:
    """Publish, and handle all that was published: encoded, decoded and validated like on any transport."""
    bus, done = bus_of(count)
    async with bus.running(consume=False):
        for number in range(count):
            await bus.publish(Told(number=number))
    async with bus.running():
        await done.wait()


def timing(run: Callable[[int], Awaitable[None]], count: int) -> Callable[[], Awaitable[float]]:
    async def take_time() -> float:
        with quiet_gc():
            start = perf_counter()
            await run(count)
            return (perf_counter() - start) / count

    return take_time


async def weigh_stream(count: int) -> float:
    """Return the bytes of one event that waits in a stream, the event included."""
    send, receive = create_memory_object_stream[Told](count)
    with send, receive:
        before = _traced()
        for number in range(count):
            send.send_nowait(Told(number=number))
        return (_traced() - before) / count


async def weigh_bus(count: int) -> float:
    """Return the bytes of one event that was published and waits in the memory transport."""
    bus, _ = bus_of(count)
    async with bus.running(consume=False):
        before = _traced()
        for number in range(count):
            await bus.publish(Told(number=number))
        return (_traced() - before) / count


def _traced() -> int:
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


async def rows(effort: Effort) -> Sequence[Row]:
    """Return the comparisons."""
    count = effort.of(MESSAGES)
    runs = (through_stream, through_nowait_stream, through_transport, through_bus)
    took = await turns(effort.some(5), {run.__name__: timing(run, count) for run in runs})
    tracemalloc.start()
    try:
        weighs = (weigh_stream, weigh_bus)
        bytes_of = await turns(1, {weigh.__name__: partial(weigh, effort.of(KEPT)) for weigh in weighs})
    finally:
        tracemalloc.stop()
    carried, published = took["through_transport"], took["through_bus"]
    floors = {
        "send_nowait, async for": took["through_stream"],
        "send_nowait, receive_nowait": took["through_nowait_stream"],
    }
    goals = {"send_nowait, async for": Goal(3, peer="pyee 2.5")}
    by_transport, by_bus = f"transport: publish, receive, ack {count:,}", f"bus: publish, handle {count:,}"
    return [
        *(Row(by_transport, carried, name, floor, goals.get(name)) for name, floor in floors.items()),
        *(Row(by_bus, published, name, floor, goals.get(name)) for name, floor in floors.items()),
        Row("bytes of a waiting event", bytes_of["weigh_bus"], "in a stream", bytes_of["weigh_stream"], unit="B"),
    ]
