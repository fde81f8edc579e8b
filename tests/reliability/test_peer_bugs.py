"""Bugs that others had, as tests that no other file has: docs/reliability.md lists all of them."""

import asyncio
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import anyio
import anyio.lowlevel
import pytest

from eventbus import Event, EventBus, Module
from eventbus.stores.sqlite import SQLiteStore
from eventbus.transport import PublishError, Refused, Wire
from eventbus.transports.memory import MemoryTransport


class Paid(Event, name="peers.paid", key="number"):
    number: int


class Picky(MemoryTransport):
    """Refuse one message for ever, as a broker does with what is too large for it."""

    def __init__(self) -> None:
        super().__init__()
        self.out, self.refusals, self.all_out = list[bytes](), 0, anyio.Event()

    async def publish(self, topic: str, wires: Sequence[Wire]) -> None:
        """Take all but number 3."""
        bad = {index for index, wire in enumerate(wires) if b'"number":3' in wire.body}
        self.out += [wire.body for index, wire in enumerate(wires) if index not in bad]
        self.refusals += len(bad)
        if len(self.out) >= 9 and self.refusals:
            self.all_out.set()
        if bad:
            raise PublishError(dict.fromkeys(bad, Refused("too large")))


async def test_b09_two_buses_are_strangers() -> None:
    """Who awaits an event in a handler drains no other bus of the process. Refuses: browser-use/browser-use#5509."""
    one, other, order = Module("one"), Module("other"), list[str]()
    gate = anyio.Event()

    @one.on(Paid)
    async def inner(event: Paid) -> None:
        order.append("inner")

    @other.on(Paid)
    async def slow(event: Paid) -> None:
        await gate.wait()
        order.append("slow")

    asking = EventBus(one)
    queued = EventBus(other, name="other", routes={Paid: "memory"})
    async with queued.running():
        for number in range(150):
            await queued.publish(Paid(number=number))
        with anyio.fail_after(5):
            await asking.publish(Paid(number=0))
        assert order == ["inner"]
        gate.set()
    assert order.count("slow") == 150


def handled(seen: list[int]) -> EventBus:
    module = Module("m")

    @module.on(Paid)
    async def book(event: Paid) -> None:
        seen.append(event.number)

    return EventBus(module, name="m", routes={Paid: "memory"})


async def works(bus: EventBus, seen: list[int]) -> None:
    async with bus.running():
        await bus.publish(Paid(number=1))
    assert seen == [1]


async def test_b16_a_stop_while_it_starts_is_not_lost() -> None:
    """A bus that is cancelled as it starts, at any step, stops and starts again. Refuses: procrastinate PR#1564."""
    seen = list[int]()
    bus = handled(seen)

    async def stop(scope: anyio.CancelScope, steps: int) -> None:
        for _ in range(steps):
            await anyio.lowlevel.checkpoint()
        scope.cancel()

    for steps in range(12):
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as group:
                group.start_soon(stop, scope, steps)
                async with bus.running():
                    await anyio.sleep_forever()
        assert scope.cancelled_caught
    await works(bus, seen)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_b16_nor_is_one_of_asyncio(anyio_backend: str) -> None:
    """Nor is asyncio's own cancellation lost, which pierces shields. Refuses: procrastinate PR#1564."""
    seen = list[int]()
    bus = handled(seen)

    async def live() -> None:
        async with bus.running():
            await anyio.sleep_forever()

    for steps in range(12):
        task = asyncio.get_running_loop().create_task(live())
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    await works(bus, seen)


async def test_b21_one_message_that_cannot_be_sent_starves_nobody(tmp_path: Path) -> None:
    """What its broker refuses fails alone and is counted; all others go out once. Refuses: MassTransit PR#6216."""
    picky = Picky()
    bus = EventBus(
        Module("m", messages=[Paid]), name="shop", store=SQLiteStore(tmp_path / "s.db"), transports={"out": picky},
        routes={Paid: "out"},
    )  # fmt: skip
    async with bus.running():
        async with bus.transaction():
            for number in range(10):
                await bus.publish(Paid(number=number))
        await picky.all_out.wait()
    assert sorted(picky.out) == [f'{{"number":{number}}}'.encode() for number in range(10) if number != 3]
    with closing(sqlite3.connect(tmp_path / "s.db")) as database:
        failures = database.execute("SELECT failures FROM eventbus_entry ORDER BY failures").fetchall()
    assert failures == [(0,)] * 9 + [(picky.refusals,)]
