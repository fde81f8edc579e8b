"""Settling is exact: streams, handlers in other tasks, calls to the store, and days that pass in no time."""

import logging
import threading
from pathlib import Path

import anyio
import pytest
from anyio.lowlevel import checkpoint

from eventbus import Command, Event, EventBus, Module, Retry, Transaction
from eventbus.limits import Limits
from eventbus.stores.memory import MemoryStore
from eventbus.stores.sqlite import SQLiteSession, SQLiteStore
from eventbus.testing import harness

DAY = 86_400.0


class Placed(Event, name="s.placed", key="number"):
    """State that something was placed."""

    number: int = 0


class Wait(Command[None], name="s.wait"):
    """Ask to wait."""


async def test_reader_of_a_stream_is_waited_for() -> None:
    """When settled returns, whoever waits at a stream has what was published."""
    got = list[int]()
    async with harness(EventBus(Module("m", messages=[Placed]))) as t, t.bus.stream(Placed) as events:

        async def read() -> None:
            async for event in events:
                for _ in range(3):
                    await checkpoint()
                got.append(event.number)

        async with anyio.create_task_group() as group:
            group.start_soon(read)
            await t.settled()
            for number in range(20):
                await t.publish(Placed(number=number))
            await t.settled()
            assert got == list(range(20))
            group.cancel_scope.cancel()


async def test_stream_that_nobody_reads_is_nothing_to_wait_for() -> None:
    """A stream with events that nobody waits for at the moment settles."""
    async with harness(EventBus(Module("m", messages=[Placed]))) as t, t.bus.stream(Placed) as events:
        await t.publish(Placed(number=1))
        await t.settled()
        assert (await anext(events)).number == 1


async def test_inline_handler_in_another_task_is_waited_for() -> None:
    """A command that another task has sent is running work, also between two of its steps."""
    module, done = Module("m"), list[str]()

    @module.handles(Wait)
    async def wait(cmd: Wait) -> None:
        await anyio.sleep(0.05)
        done.append("done")

    async with harness(EventBus(module)) as t, anyio.create_task_group() as group:
        group.start_soon(t.send, Wait())
        await checkpoint()
        await checkpoint()
        await t.settled()
        assert done == ["done"]


async def test_call_to_the_store_is_waited_for(tmp_path: Path) -> None:
    """While a call to the store has not come back, nothing is settled."""
    release = threading.Event()

    class Slow(MemoryStore):
        async def sweep(self, *, retention: float, lease: float, batch: int) -> int:
            await anyio.to_thread.run_sync(lambda: release.wait(0.2))
            swept.append(1)
            return await super().sweep(retention=retention, lease=lease, batch=batch)

    swept = list[int]()
    async with harness(EventBus(Module("m", messages=[Placed]), name="shop", store=Slow())) as t:
        await t.advance(5)
        assert swept == [1, 1]


@pytest.mark.parametrize("kind", ["memory", "store", "sqlite"])
async def test_days_pass_in_no_time(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Over a week the clock stops where something is due, at each such time, and not at every look at the store."""
    caplog.set_level(logging.CRITICAL)
    module, times = Module("m"), list[float]()

    @module.on(Placed, ordered=True, retry=Retry(attempts=3, initial=DAY, maximum=9 * DAY, jitter=False))
    async def fails(event: Placed) -> None:
        times.append(t.clock.monotonic())
        raise ValueError

    store = {"memory": None, "store": MemoryStore(), "sqlite": SQLiteStore(tmp_path / "x.db")}[kind]
    routes = {"s.*": "memory" if kind == "memory" else "store"}
    async with harness(EventBus(module, name="shop", routes=routes, store=store)) as t:
        jumps = list[float]()
        jump = t.clock.jump
        t.clock.jump = lambda moment: (jumps.append(moment), jump(moment))[1]  # type: ignore[method-assign]
        await t.publish(Placed(), delay=3600)
        await t.advance(7 * DAY)
        assert times == pytest.approx([3600, 3600 + DAY, 3600 + 3 * DAY], abs=0.01)
        assert len(t.dead) == 1
        assert len(jumps) < 20


async def test_chores_are_done_in_time() -> None:
    """What is done is forgotten when its window is over, however far the clock was moved at once."""
    module, seen = Module("m"), list[int]()

    @module.on(Placed)
    async def place(event: Placed) -> None:
        seen.append(event.number)

    store = MemoryStore()
    bus = EventBus(module, name="shop", routes={"s.*": "store"}, store=store, limits=Limits(retention=DAY))
    async with harness(bus) as t:
        await t.publish(Placed())
        await t.advance(DAY / 2)
        assert len(store._rows) == 1
        await t.advance(DAY)
        assert len(store._rows) == 0


async def test_lease_is_kept_while_a_handler_waits_for_its_timeout() -> None:
    """A handler that does nothing for longer than its lease is not started twice: its lease is renewed on the way."""
    module, started = Module("m"), list[float]()

    @module.on(Placed, timeout=100, retry=Retry(attempts=1))
    async def hangs(event: Placed) -> None:
        started.append(t.clock.monotonic())
        await anyio.sleep_forever()

    async with harness(EventBus(module, name="shop", routes={"s.*": "store"}, store=MemoryStore())) as t:
        await t.publish(Placed())
        await t.advance(200)
        assert started == [0]
        assert len(t.dead) == 1


@pytest.mark.parametrize("kind", ["memory", "store"])
async def test_many_tests_one_after_another(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """Five hundred harnesses, with retries and delays of hours, all see exactly the same."""
    caplog.set_level(logging.CRITICAL)
    module, seen = Module("m"), list[tuple[str, float]]()

    @module.on(Placed, retry=Retry(attempts=4, initial=3600, maximum=DAY, jitter=False))
    async def fails(event: Placed, bus: EventBus) -> None:
        seen.append(("fails", t.clock.monotonic()))
        if len(seen) < 4:
            await bus.publish(Placed(number=1), delay=7200, atomic=False)
            raise ValueError

    bus = EventBus(module, name="shop", routes={"s.*": kind}, store=MemoryStore() if kind == "store" else None)
    first: list[tuple[str, float]] = []
    for _ in range(500):
        seen.clear()
        async with harness(bus, store=MemoryStore() if kind == "store" else None) as t:
            await t.publish(Placed(), delay=600)
            await t.advance(2 * DAY)
            assert t.failed("m.fails")
            first = first or [*seen]
            assert [(name, round(when, 2)) for name, when in seen] == [(name, round(when, 2)) for name, when in first]
    assert len(first) == 7


async def test_store_keeps_its_own_transactions(tmp_path: Path) -> None:
    """The store of the application works as it does elsewhere: what is rolled back has not happened."""
    module = Module("m")

    @module.handles(Wait)
    async def wait(cmd: Wait, tx: Transaction[SQLiteSession], bus: EventBus) -> None:
        await bus.publish(Placed(number=1))
        raise KeyError

    bus = EventBus(module, Module("n", messages=[Placed]), name="shop", store=SQLiteStore(tmp_path / "x.db"))
    async with harness(bus) as t:
        with pytest.raises(KeyError):
            await t.send(Wait())
        assert not t.published(Placed)
