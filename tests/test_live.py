"""Live streams: bounded, in order, told of gaps, after commit, over when the bus stops."""

import threading
from collections.abc import AsyncIterator
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

from eventbus import Event, EventBus, Gap, Module, NotRunningError, SlowConsumerError, Transaction, WrongLoopError
from eventbus.live import Live, Stream
from eventbus.stores.memory import MemoryStore
from eventbus.testing.harness import harness


class Moved(Event, name="l.moved"):
    """State that something moved."""

    number: int = 0


class MovedFast(Moved, name="l.moved_fast"):
    """State that it moved fast."""


class Stopped(Event, name="l.stopped"):
    """State that it stopped."""

    number: int = 0


@pytest.fixture
async def bus() -> AsyncIterator[EventBus]:
    """Return a running bus."""
    bus = EventBus(Module("m", messages=[Moved, Stopped]))
    async with bus.running():
        yield bus


async def take(stream: Stream[Any], count: int) -> list[Any]:
    """Take so many from a stream."""
    with anyio.fail_after(5):
        return [await anext(stream) for _ in range(count)]


async def test_stream_gives_what_is_published(bus: EventBus) -> None:
    """Every reader gets every event of the type from its opening on, in the order of publishing."""
    await bus.publish(Moved(number=0))
    async with bus.stream(Moved) as first, bus.stream(Moved) as second:
        for number in range(1, 4):
            await bus.publish(Moved(number=number))
        for stream in (first, second):
            assert [1, 2, 3] == [event.number for event in await take(stream, 3)]


async def test_stream_of_a_base_class_and_of_several_types(bus: EventBus) -> None:
    """Subclasses belong to a stream of their base; a stream of several types keeps one order; others do not come."""
    async with bus.stream(Moved) as moved, bus.stream(MovedFast, Stopped) as two:
        published = [Moved(number=1), MovedFast(number=2), Stopped(number=3), MovedFast(number=4)]
        await bus.publish_many(published)
        assert [1, 2, 4] == [event.number for event in await take(moved, 3)]
        assert published[1:] == await take(two, 3)


async def test_reader_waits_for_the_next(bus: EventBus) -> None:
    """A reader that has everything waits, and is woken by the next event."""
    seen = list[Any]()

    async def read() -> None:
        async with bus.stream(Moved) as stream:
            async for event in stream:
                seen.append(event)
                if len(seen) == 3:
                    return

    async with anyio.create_task_group() as group:
        group.start_soon(read)
        await anyio.wait_all_tasks_blocked()
        for number in range(3):
            await bus.publish(Moved(number=number))
            await anyio.wait_all_tasks_blocked()
            assert len(seen) == number + 1


async def test_slow_reader_is_told_of_its_gap(bus: EventBus) -> None:
    """Beyond its buffer the oldest events give way, and a Gap says how many, in their place."""
    async with bus.stream(Moved, buffer=3) as stream:
        for number in range(10):
            await bus.publish(Moved(number=number))
        assert [Gap(7), Moved(number=7), Moved(number=8)] == await take(stream, 3)
        for number in range(10, 13):
            await bus.publish(Moved(number=number))
        assert [Gap(1), Moved(number=10), Moved(number=11), Moved(number=12)] == await take(stream, 4)


async def test_slow_reader_does_not_hold_up_the_others(bus: EventBus) -> None:
    """A reader that never reads costs its buffer and nothing else."""
    async with bus.stream(Moved, buffer=2), bus.stream(Moved) as quick:
        for number in range(50):
            await bus.publish(Moved(number=number))
            assert [Moved(number=number)] == await take(quick, 1)


async def test_slow_reader_is_disconnected_if_it_wants(bus: EventBus) -> None:
    """With slow="disconnect" falling behind is an error, at this read and every later one."""
    async with bus.stream(Moved, Stopped, buffer=2, slow="disconnect") as stream:
        await bus.publish_many([Moved(number=number) for number in range(2)])
        assert [Moved(number=0)] == await take(stream, 1)
        await bus.publish_many([Moved(number=number) for number in range(2, 5)])
        for _ in range(2):
            with pytest.raises(SlowConsumerError, match=r"stream\(Moved, Stopped\) fell more than 2") as caught:
                await anext(stream)
        assert caught.value.buffer == 2


@pytest.mark.parametrize("buffer", [0, -1, True])
async def test_buffer_that_cannot_be(bus: EventBus, buffer: Any) -> None:
    """A buffer is a whole number from 1."""
    with pytest.raises(ValueError, match="buffer="):
        async with bus.stream(Moved, buffer=buffer):
            pass


async def test_policy_that_cannot_be(bus: EventBus) -> None:
    """There are two policies for slow readers."""
    with pytest.raises(ValueError, match="slow="):
        async with bus.stream(Moved, slow="wait"):  # type: ignore[call-overload]
            pass


async def test_stream_ends_when_the_bus_stops() -> None:
    """A reader finishes what it has, and its loop ends; nobody has to cancel it."""
    bus, seen, opened = EventBus(), list[Any](), anyio.Event()

    async def read() -> None:
        async with bus.stream(Moved) as stream:
            opened.set()
            async for event in stream:
                seen.append(event)
        seen.append("over")

    async with anyio.create_task_group() as group, bus.running():
        group.start_soon(read)
        await opened.wait()
        await bus.publish(Moved(number=1))
    assert [Moved(number=1), "over"] == seen


async def test_stream_of_an_ended_life_gets_nothing_of_the_next() -> None:
    """A stream that was not closed in time stays over, though the bus runs again."""
    bus = EventBus()
    async with bus.running():
        context = bus.stream(Moved)
        stream = await context.__aenter__()
    async with bus.running(), bus.stream(Moved) as fresh:
        await bus.publish(Moved())
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
        assert [Moved()] == await take(fresh, 1)
        await context.__aexit__(None, None, None)


async def test_stream_needs_a_running_bus() -> None:
    """Before the start and after the stop there is nothing to follow."""
    bus = EventBus()
    with pytest.raises(NotRunningError, match=r"bus\.stream\(\)"):
        async with bus.stream(Moved):
            pass
    async with bus.running():
        pass
    with pytest.raises(NotRunningError, match="stopped"):
        async with bus.stream(Moved):
            pass


async def test_reader_may_be_cancelled_and_read_on(bus: EventBus) -> None:
    """A cancelled read loses nothing; the next one gets the next event."""
    async with bus.stream(Moved) as stream:
        for number in range(3):
            with anyio.move_on_after(0.001) as scope:
                await anext(stream)
            assert scope.cancelled_caught
            await bus.publish(Moved(number=number))
            assert [Moved(number=number)] == await take(stream, 1)


async def test_two_readers_of_one_stream_share_it(bus: EventBus) -> None:
    """Two tasks on one stream get each event once, and both go on."""
    seen = list[int]()

    async def read() -> None:
        async for event in stream:
            seen.append(event.number)

    async with anyio.create_task_group() as group, bus.stream(Moved) as stream:
        group.start_soon(read)
        group.start_soon(read)
        for number in range(10):
            await bus.publish(Moved(number=number))
            await checkpoint()
    assert list(range(10)) == sorted(seen)


async def test_closed_stream_is_forgotten(bus: EventBus) -> None:
    """Leaving a stream, also by an error, ends it and leaves nothing behind."""
    with pytest.raises(KeyError):
        async with bus.stream(Moved) as stream:
            raise KeyError
    assert [] == bus.engine.live.streams
    with pytest.raises(StopAsyncIteration):
        await anext(stream)


async def test_events_come_in_the_order_in_which_they_were_published() -> None:
    """What an inline handler publishes comes after what it handled; a failing handler does not unpublish."""
    module = Module("m")

    @module.on(Moved)
    async def stops(event: Moved, bus: EventBus) -> None:
        await bus.publish(Stopped(number=event.number))
        raise ValueError

    bus = EventBus(module)
    async with bus.running(), bus.stream(Moved, Stopped) as stream:
        with pytest.raises(ExceptionGroup):
            await bus.publish(Moved(number=1))
        assert [Moved(number=1), Stopped(number=1)] == await take(stream, 2)


async def test_routed_event_is_live_when_it_is_published() -> None:
    """A stream follows routed events too, once each, when they are published and not when they are handled."""
    module = Module("m")

    @module.on(Moved)
    async def moved(event: Moved) -> None: ...

    async with harness(EventBus(module, routes={Moved: "memory"})) as t, t.bus.stream(Moved) as stream:
        await t.publish(Moved(number=1))
        assert [Moved(number=1)] == await take(stream, 1)
        await t.settled()
        with anyio.move_on_after(0.001) as scope:
            await anext(stream)
        assert scope.cancelled_caught


async def test_stream_is_fed_after_commit_only() -> None:
    """What is published in a transaction is live after its commit, in order, and never after a rollback."""
    async with harness(EventBus(store=MemoryStore(), name="live")) as t, t.bus.stream(Moved, Stopped) as stream:
        with pytest.raises(KeyError):
            async with t.bus.transaction():
                await t.bus.publish(Moved(number=1))
                raise KeyError
        async with t.bus.transaction() as transaction:
            assert isinstance(transaction, Transaction)
            await t.bus.publish(Moved(number=2))
            with pytest.raises(KeyError):
                async with t.bus.transaction():
                    await t.bus.publish(Moved(number=3))
                    raise KeyError
            await t.bus.publish(Stopped(number=4))
            with anyio.move_on_after(0.001) as scope:
                await anext(stream)
            assert scope.cancelled_caught
        assert [Moved(number=2), Stopped(number=4)] == await take(stream, 2)


async def test_publisher_in_another_thread_is_told(bus: EventBus, anyio_backend_name: str) -> None:
    """An event that a stream follows cannot be published from another event loop: its reader would not be woken."""
    errors = list[BaseException]()

    def elsewhere() -> None:
        try:
            anyio.run(bus.publish, Moved(), backend=anyio_backend_name)
        except WrongLoopError as error:
            errors.append(error)

    async with bus.stream(Stopped):
        await anyio.to_thread.run_sync(threading.Thread(target=elsewhere).run)
        assert [] == errors
        async with bus.stream(Moved) as stream:
            await anyio.to_thread.run_sync(threading.Thread(target=elsewhere).run)
            assert len(errors) == 1
            await bus.publish(Moved(number=1))
            assert [Moved(number=1)] == await take(stream, 1)


async def test_live_alone() -> None:
    """A stream is fed until it ends, and what it has can still be read."""
    live = Live()
    stream = live.open((Moved,), 2, "drop")
    live.feed(Moved(number=1))
    live.feed("something else")
    live.end()
    live.feed(Moved(number=2))
    assert [Moved(number=1)] == [event async for event in stream]
    live.close(stream)
    assert [] == live.streams


async def test_gap_of_the_link_stands_where_it_was() -> None:
    """What other processes published and was lost is told in its place, at once with what is missing there already."""
    live = Live()
    stream, fast = live.open((Moved,), 3, "drop"), live.open((MovedFast,), 3, "drop")
    live.feed(Moved(number=1))
    for missed in (0, 2, 1):
        live.miss(Moved, missed)
    live.feed(Moved(number=2))
    assert [Moved(number=1), Gap(3), Moved(number=2)] == await take(stream, 3)
    live.end()
    live.miss(MovedFast, 1)
    assert [] == [event async for event in fast]


@pytest.mark.parametrize(("lost", "told"), [(0, 2), (5, 6)])
async def test_gap_that_gives_way_is_not_forgotten(lost: int, told: int) -> None:
    """A gap that the buffer has no more room for counts among what gave way, an uncounted one as one."""
    live = Live()
    stream = live.open((Moved,), 2, "drop")
    live.miss(Moved, lost)
    for number in range(3):
        live.feed(Moved(number=number))
    assert [Gap(told), Moved(number=1), Moved(number=2)] == await take(stream, 3)
