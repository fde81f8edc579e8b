"""The memory transport passes the exam, and bounds, fails and counts as only it can."""

import asyncio
import math
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AbstractContextManager, asynccontextmanager
from datetime import UTC, datetime

import anyio
import pytest
from anyio import create_task_group, wait_all_tasks_blocked
from anyio.lowlevel import checkpoint

from eventbus.context import draining
from eventbus.errors import Lost, PublishError, QueueFullError, Refused, SettleError, TransportError
from eventbus.limits import Limits
from eventbus.store import DeadFilter
from eventbus.testing.transport_exam import CHECKS, Bench, Check, checks_for, examine
from eventbus.transport import Subscription, Transport, Wire, connect
from eventbus.transports.memory import MemoryTransport, queue_id


async def buried(transport: Transport, topic: str, group: str) -> list[tuple[str, str]]:
    entries = await transport.dead(DeadFilter(message=topic, handler=group))
    return [(entry.message_id, entry.error) for entry in entries]


BENCH = Bench(make=MemoryTransport, patience=5.0, quiet=0.02, dead=buried)


@pytest.mark.parametrize("check", checks_for(MemoryTransport().capabilities), ids=str)
async def test_exam(check: Check) -> None:
    await examine(BENCH, check)


def test_nothing_of_the_exam_is_left_out() -> None:
    left_out = {*CHECKS} - {*checks_for(MemoryTransport().capabilities)}
    expected = {34, 35, 7, 11, 13}
    assert {check.number for check in left_out} == expected, "those of a lease, and of a broker's confirmation"
    assert isinstance(connect("memory://"), Transport)


class HandClock:
    """Stand still until ``advance``."""

    def __init__(self) -> None:
        self.time = 1_000.0
        self.sleepers: list[tuple[float, anyio.Event]] = []

    def now(self) -> float:
        return self.time

    def monotonic(self) -> float:
        return self.time

    async def sleep(self, seconds: float) -> None:
        entry = (self.time + seconds, anyio.Event())
        self.sleepers.append(entry)
        try:
            await entry[1].wait()
        finally:
            self.sleepers.remove(entry)

    def move_on_after(self, seconds: float) -> AbstractContextManager[anyio.CancelScope]:
        raise NotImplementedError

    async def advance(self, seconds: float) -> None:
        self.time += seconds
        for due, event in self.sleepers:
            if due <= self.time:
                event.set()
        await wait_all_tasks_blocked()


def wires(*ids: str) -> list[Wire]:
    return [Wire(id, b"{}") for id in ids]


async def take(subscription: Subscription, count: int = 1) -> list[str]:
    """Receive and ack what must be there already."""
    ids: list[str] = []
    with anyio.fail_after(1):
        for _ in range(count):
            delivery = await subscription.receive()
            ids.append(delivery.wire.id)
            await delivery.ack()
    return ids


@asynccontextmanager
async def opened(clock: HandClock | None = None, **limits: int) -> AsyncGenerator[MemoryTransport]:
    async with MemoryTransport(limits=Limits(**limits), clock=clock) as transport:
        yield transport


def group(transport: MemoryTransport, name: str = "g", *, topic: str = "t", prefetch: int = 10, ordered: bool = False):
    return transport.subscribe(topic, group=name, prefetch=prefetch, lease=30.0, ordered=ordered)


async def publish_as(transport: MemoryTransport, drains: str, topic: str, *ids: str) -> None:
    """Publish as a handler that drains a queue does."""
    draining.set(drains)
    await transport.publish(topic, wires(*ids))


class Task:
    """Run something beside the test, and see whether it still waits."""

    def __init__(self, tasks: anyio.abc.TaskGroup, operation: Callable[..., Awaitable[object]], *args: object) -> None:
        self.error: Exception | None = None
        self.done = False
        self.scope = anyio.CancelScope()
        tasks.start_soon(self._run, operation, args)

    async def _run(self, operation: Callable[..., Awaitable[object]], args: Sequence[object]) -> None:
        try:
            with self.scope:
                await operation(*args)
        except Exception as error:
            self.error = error
        self.done = True


@pytest.mark.parametrize(
    "tail", ["?colour=red", "?queue=1&size=2", "?queue", "?queue=x", "?queue=1&queue=2", "host", "/x"]
)
def test_a_url_with_anything_unknown_is_refused(tail: str) -> None:
    with pytest.raises(ValueError, match="queue, dead, body"):
        connect(f"memory://{tail}")


async def test_a_url_sets_ceilings() -> None:
    transport = MemoryTransport.from_url("memory://?body=3&queue=1")
    assert transport.capabilities.max_bytes == 3
    async with transport:
        await transport.declare("t", ["g"])
        with pytest.raises(PublishError) as caught:
            await transport.publish("t", [Wire("1", b"long"), Wire("2", b"ok")])
        assert {index: type(error) for index, error in caught.value.failed.items()} == {0: Refused}
        assert transport.outstanding() == 1


@pytest.mark.parametrize("seconds", [-1, math.inf, math.nan])
async def test_a_delay_that_never_ends_is_refused(seconds: float) -> None:
    async with opened() as transport, group(transport) as subscription:
        await transport.publish("t", wires("1"))
        delivery = await subscription.receive()
        with pytest.raises(ValueError, match="seconds"):
            await delivery.retry(seconds)
        await delivery.ack()
        with pytest.raises(ValueError, match="prefetch"):
            async with group(transport, prefetch=0):
                pass


async def lost(transport: MemoryTransport, topic: str, why: str) -> None:
    with pytest.raises(PublishError, match=why) as caught:
        await transport.publish(topic, wires("1", "2"))
    assert {index: type(error) for index, error in caught.value.failed.items()} == {0: Lost, 1: Lost}


async def test_what_is_not_open_or_not_heard_is_lost() -> None:
    transport = MemoryTransport()
    await transport.declare("t", ["g"])
    await lost(transport, "t", "not open")
    with pytest.raises(Lost, match="not open"):
        async with group(transport):
            pass
    async with transport:
        with pytest.raises(TransportError, match="open already"):
            await transport.__aenter__()
        await transport.declare("deaf", [])
        await lost(transport, "deaf", "nobody listens")
        await lost(transport, "unknown", "nobody listens")
        await transport.publish("t", wires("3"))
    await transport.__aexit__(None, None, None)
    assert transport.outstanding() == 1


async def test_publishers_wait_in_line_and_a_wire_enters_all_groups_or_none() -> None:
    async with opened(queue=2) as transport, group(transport, "g") as slow, group(transport, "h") as fast:
        await transport.publish("t", wires("1", "2"))
        assert await take(fast, 2) == ["1", "2"]
        async with create_task_group() as tasks:
            first = Task(tasks, transport.publish, "t", wires("3", "4", "5"))
            await wait_all_tasks_blocked()
            second = Task(tasks, transport.publish, "t", wires("6"))
            await wait_all_tasks_blocked()
            assert (first.done, second.done, transport.outstanding()) == (False, False, 2)
            assert await take(slow) == ["1"]
            assert transport.outstanding() == 3
            assert await take(slow, 2) == ["2", "3"]
            await wait_all_tasks_blocked()
            assert (first.done, second.done) == (False, False)
            assert await take(fast, 3) == ["3", "4", "5"]
            assert await take(slow, 3) == ["4", "5", "6"]
            assert await take(fast) == ["6"]
        assert (first.done, second.done, transport.outstanding()) == (True, True, 0)


@pytest.mark.parametrize("verb", ["ack", "retry", "hand back", "reject"])
async def test_every_verb_lets_the_next_receiver_in_and_all_that_settle_the_next_publisher(verb: str) -> None:
    async with opened(queue=2) as transport, group(transport, prefetch=1) as subscription, create_task_group() as tasks:
        await transport.publish("t", wires("1", "2"))
        held = await subscription.receive()
        publisher = Task(tasks, transport.publish, "t", wires("3"))
        receiver = Task(tasks, take, subscription)
        await wait_all_tasks_blocked()
        settle = {"ack": held.ack, "retry": lambda: held.retry(60), "hand back": lambda: held.retry(0)}
        await settle.get(verb, lambda: held.reject("bad"))()
        await wait_all_tasks_blocked()
        assert receiver.done
        assert receiver.error is None
        assert publisher.done


@pytest.mark.parametrize("drains", [queue_id("t", "g"), "g"])
async def test_a_handler_cannot_wait_for_the_queue_it_drains(drains: str) -> None:
    async with opened(queue=2) as transport, group(transport) as subscription:
        with pytest.raises(QueueFullError, match="'t@g' holds its maximum of 2"):
            await publish_as(transport, drains, "t", "1", "2", "3")
        assert transport.outstanding() == 0
        await publish_as(transport, drains, "t", "1", "2")
        with pytest.raises(QueueFullError):
            await publish_as(transport, drains, "t", "3")
        assert await take(subscription, 2) == ["1", "2"]
        await publish_as(transport, drains, "t", "4")
        assert await take(subscription) == ["4"]


async def test_only_the_queue_it_drains_must_have_room_for_a_handler_to_wait() -> None:
    async with opened(queue=2) as transport, group(transport, "g") as own, group(transport, "h") as full:
        await transport.publish("t", wires("1", "2"))
        await take(own, 2)
        async with create_task_group() as tasks:
            waits = Task(tasks, publish_as, transport, "g", "t", "3", "4")
            await wait_all_tasks_blocked()
            assert not waits.done
            fails = Task(tasks, publish_as, transport, "g", "t", "5")
            await wait_all_tasks_blocked()
            assert isinstance(fails.error, QueueFullError), "behind 3 and 4 there is no room in its own queue"
            await take(full, 2)
        assert waits.error is None


@pytest.mark.parametrize("length", [2, 3, 5])
async def test_a_circle_of_handlers_is_cut_where_it_closes(length: int) -> None:
    async with opened(queue=1) as transport:
        for number in range(length):
            await transport.declare(f"t{number}", ["g"])
            await transport.publish(f"t{number}", wires("full"))
        async with create_task_group() as tasks:
            waiting = [
                Task(tasks, publish_as, transport, queue_id(f"t{number}", "g"), f"t{number + 1}", "x")
                for number in range(length - 1)
            ]
            outside = Task(tasks, transport.publish, "t0", wires("y"))
            await wait_all_tasks_blocked()
            last = Task(tasks, publish_as, transport, queue_id(f"t{length - 1}", "g"), "t0", "z")
            await wait_all_tasks_blocked()
            assert isinstance(last.error, QueueFullError)
            assert last.error.queue == "t0@g"
            assert not outside.done
            assert [one.done for one in waiting] == [False] * (length - 1)
            tasks.cancel_scope.cancel()


async def test_a_circle_that_a_replay_closes_is_cut() -> None:
    async with opened(queue=2) as transport, group(transport, topic="a") as a, create_task_group() as tasks:
        await transport.publish("a", wires("1"))
        await (await a.receive()).reject("bad")
        await transport.declare("a", ["other"])
        await transport.declare("b", ["g"])
        await transport.publish("a", wires("2", "3"))
        await transport.publish("b", wires("1", "2"))
        await take(a)
        one = Task(tasks, publish_as, transport, queue_id("a", "g"), "b", "x")
        other = Task(tasks, publish_as, transport, queue_id("b", "g"), "a", "y")
        await wait_all_tasks_blocked()
        assert not one.done
        assert not other.done
        await transport.replay(DeadFilter())
        await wait_all_tasks_blocked()
        assert {type(one.error), type(other.error)} == {type(None), QueueFullError}
        tasks.cancel_scope.cancel()


async def cut_by_anyio(operation: Callable[[], Awaitable[object]]) -> None:
    async with create_task_group() as tasks:
        task = Task(tasks, operation)
        await wait_all_tasks_blocked()
        assert not task.done
        task.scope.cancel()


async def cut_natively(operation: Callable[[], Awaitable[object]]) -> None:
    """Cancel the task itself, which only asyncio can."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        await cut_by_anyio(operation)
        return
    task = asyncio.ensure_future(operation())
    await wait_all_tasks_blocked()
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()


@pytest.mark.parametrize("cut", [cut_by_anyio, cut_natively])
async def test_a_cancelled_publisher_leaves_nothing_behind(cut: Callable[..., Awaitable[None]]) -> None:
    async with opened(queue=2) as transport, group(transport) as subscription:
        await transport.publish("t", wires("1"))
        await cut(lambda: transport.publish("t", wires("2", "3", "4")))
        assert await take(subscription, 2) == ["1", "2"]
        assert transport.outstanding() == 0
        await publish_as(transport, "g", "t", "5", "6")
        assert await take(subscription, 2) == ["5", "6"]


@pytest.mark.parametrize("cut", [cut_by_anyio, cut_natively])
async def test_a_cancelled_receiver_takes_nothing_along(cut: Callable[..., Awaitable[None]]) -> None:
    async with opened() as transport, group(transport) as subscription, group(transport) as idle:
        await cut(idle.receive)
        async with create_task_group() as tasks:
            got: list[str] = []

            async def receive(by: Subscription) -> None:
                got.append((await by.receive()).wire.id)

            cancelled = Task(tasks, receive, idle)
            Task(tasks, receive, subscription)
            await wait_all_tasks_blocked()
            await transport.publish("t", wires("1"))
            cancelled.scope.cancel()
            await wait_all_tasks_blocked()
            assert got == ["1"]
            tasks.cancel_scope.cancel()


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_receiver_that_is_cancelled_when_it_is_woken_leaves_the_message_to_another(anyio_backend: str) -> None:
    async with opened() as transport, group(transport) as subscription:
        tasks = [asyncio.ensure_future(subscription.receive()) for _ in range(2)]
        await wait_all_tasks_blocked()
        await transport.publish("t", wires("1"))
        tasks[0].cancel()
        await asyncio.wait(tasks)
        assert tasks[0].cancelled()
        assert tasks[1].result().wire.id == "1"


async def test_closing_tells_each_publisher_which_wires_are_not_in() -> None:
    transport = MemoryTransport(limits=Limits(queue=2, body=10))
    batch = [Wire("2", b"x" * 11), *wires("3", "4", "5")]
    async with create_task_group() as tasks, transport, group(transport) as subscription:
        await transport.publish("t", wires("1"))
        publisher = Task(tasks, transport.publish, "t", batch)
        held = await subscription.receive()
        await wait_all_tasks_blocked()
        await transport.__aexit__(None, None, None)
        with pytest.raises(Lost, match="closed"):
            await subscription.receive()
        with pytest.raises(SettleError, match="went back"):
            await held.ack()
    assert isinstance(publisher.error, PublishError)
    assert {index: type(error) for index, error in publisher.error.failed.items()} == {0: Refused, 2: Lost, 3: Lost}
    async with transport, group(transport) as subscription:
        assert [(await subscription.receive()).attempt for _ in range(2)] == [2, 1]


async def test_what_comes_back_takes_its_place_and_only_a_hand_back_counts_no_attempt() -> None:
    clock = HandClock()
    async with opened(clock) as transport:
        async with group(transport) as subscription:
            await transport.publish("t", wires("1", "2", "3", "4", "5"))
            held = [await subscription.receive() for _ in range(4)]
            await held[1].retry(0)
            await held[2].retry(5)
            await held[3].ack()
            assert transport.outstanding() == 3
            await clock.advance(5)
            assert [(await subscription.receive()).wire.id] == ["2"]
        with pytest.raises(SettleError, match="went back"):
            await held[0].ack()
        await held[1].ack()
        await held[3].retry(0)
        async with group(transport) as subscription:
            again = [await subscription.receive() for _ in range(4)]
            assert [(one.wire.id, one.attempt) for one in again] == [("1", 2), ("2", 2), ("3", 2), ("5", 1)]


async def test_the_clock_that_is_given_decides_what_is_due() -> None:
    clock = HandClock()
    async with opened(clock) as transport, group(transport) as subscription:
        await transport.publish("t", wires("1", "2", "3"))
        for after in (60.0, 10.0, 30.0):
            await (await subscription.receive()).retry(after)
        await wait_all_tasks_blocked()
        assert [due - clock.time for due, _ in clock.sleepers] == [10.0]
        assert (transport.outstanding(), transport.delayed()) == (0, 3)
        assert (transport.outstanding(clock.time + 30), transport.delayed(clock.time + 30)) == (2, 1)
        await clock.advance(9.999)
        assert transport.outstanding() == 0
        await clock.advance(0.001)
        assert await take(subscription) == ["2"]
        clock.time += 60.0
        assert (transport.outstanding(), transport.delayed()) == (2, 0)
        await clock.advance(0)
        assert await take(subscription, 2) == ["1", "3"]
    assert clock.sleepers == []


async def test_the_delayed_and_the_dead_outlive_a_closing() -> None:
    clock = HandClock()
    transport = MemoryTransport(clock=clock)
    async with transport, group(transport) as subscription:
        await transport.publish("t", wires("1", "2"))
        await (await subscription.receive()).retry(5)
        await (await subscription.receive()).reject("bad")
    await clock.advance(60)
    assert clock.sleepers == []
    async with transport, group(transport) as subscription:
        assert await take(subscription) == ["1"]
        assert await buried(transport, "t", "g") == [("2", "bad")]


async def test_a_group_pauses_before_its_dead_outgrow_their_ceiling() -> None:
    async with opened(dead=2) as transport, group(transport) as subscription, create_task_group() as tasks:
        await transport.publish("t", wires("1", "2", "3", "4", "5"))
        got = [await subscription.receive() for _ in range(2)]

        async def receive() -> None:
            while True:
                got.append(await subscription.receive())

        tasks.start_soon(receive)
        for number, reason, then in ((0, "bad", 2), (1, None, 3), (2, "bad", 3)):
            await (got[number].ack() if reason is None else got[number].reject(reason))
            await wait_all_tasks_blocked()
            assert len(got) == then
        assert await transport.discard(DeadFilter(ids=("memory-1",))) == 1
        await wait_all_tasks_blocked()
        assert [one.wire.id for one in got] == ["1", "2", "3", "4"]
        assert await transport.replay(DeadFilter()) == {"g": 1}
        await wait_all_tasks_blocked()
        assert [(one.wire.id, one.attempt) for one in got[4:]] == [("3", 1)]
        assert await buried(transport, "t", "g") == []
        tasks.cancel_scope.cancel()


async def test_the_dead_can_be_found_paged_replayed_and_discarded() -> None:
    clock = HandClock()
    async with opened(clock, error=5) as transport, group(transport, "g") as g, group(transport, "h") as h:
        await transport.publish("t", wires("1", "2"))
        for subscription, reason in ((g, "red"), (h, "green and more")):
            for _ in range(2):
                delivery = await subscription.receive()
                await delivery.reject(reason)
                await delivery.reject("again")
                clock.time += 1
        everything = await transport.dead(DeadFilter())
        assert [(one.id, one.message_id, one.handler, one.failures, one.error) for one in everything] == [
            ("memory-1", "1", "g", 1, "red"),
            ("memory-2", "2", "g", 1, "red"),
            ("memory-3", "1", "h", 1, "green"),
            ("memory-4", "2", "h", 1, "green"),
        ]
        assert (everything[0].message, everything[0].body) == ("t", b"{}")
        assert everything[0].time == datetime.fromtimestamp(1_000, UTC)

        async def found(**filters: object) -> str:
            return "".join(one.id[-1] for one in await transport.dead(DeadFilter(**filters)))  # type: ignore[arg-type]

        assert await found(limit=2) == "12"
        assert await found(limit=2, after="memory-2") == "34"
        assert await found(limit=None, after="memory-4") == ""
        assert await found(ids=("memory-2", "memory-3", "nobody")) == "23"
        assert await found(handler="h", error="ree") == "34"
        assert await found(message="t", since=datetime.fromtimestamp(1_001, UTC)) == "234"
        assert await found(message="u") == ""
        with pytest.raises(ValueError, match="dead in memory"):
            await found(after="17")
        assert await transport.replay(DeadFilter(error="r")) == {"g": 2, "h": 2}
        assert await transport.replay(DeadFilter(error="r")) == {}
        assert await take(g, 2) == await take(h, 2) == ["1", "2"]
        assert await transport.discard(DeadFilter()) == 0
        assert (transport.outstanding(), await found()) == (0, "")


async def test_a_broadcast_subscriber_that_falls_behind_is_told_and_holds_nobody_up() -> None:
    async with opened(queue=3) as transport:
        async with transport.subscribe("t", group=None, prefetch=2, lease=30.0) as slow:
            await transport.publish("t", wires("1", "2", "3"))
            held = [await slow.receive() for _ in range(2)]
            await transport.publish("t", wires("4"))
            assert transport.outstanding() == 0
            with pytest.raises(Lost, match="behind"):
                await slow.receive()
            with pytest.raises(SettleError):
                await held[0].ack()
        await lost(transport, "t", "nobody listens")


async def test_what_one_broadcast_subscriber_settles_is_its_own_affair() -> None:
    clock = HandClock()
    async with opened(clock, dead=1) as transport:
        async with (
            transport.subscribe("t", group=None, prefetch=3, lease=30.0) as one,
            transport.subscribe("t", group=None, prefetch=3, lease=30.0) as other,
        ):
            await transport.publish("t", wires("1", "2", "3"))
            await (await one.receive()).retry(5)
            await (await one.receive()).retry(0)
            await (await one.receive()).reject("bad")
            assert await take(other, 3) == ["1", "2", "3"]
            assert (transport.outstanding(), transport.delayed()) == (1, 1)
            assert await transport.dead(DeadFilter()) == []
        assert (transport.outstanding(), transport.delayed()) == (0, 0)


async def test_only_the_oldest_ordered_subscription_receives() -> None:
    async with opened() as transport, create_task_group() as tasks:
        got: list[str] = []

        async def succeed() -> None:
            async with group(transport, ordered=True) as subscription:
                got.extend(await take(subscription, 2))

        async with group(transport, ordered=True) as oldest:
            tasks.start_soon(succeed)
            await transport.publish("t", wires("1", "2"))
            held = await oldest.receive()
            await oldest.stop()
            with pytest.raises(anyio.EndOfStream):
                await oldest.receive()
            await held.retry(0)
            await wait_all_tasks_blocked()
            assert got == []
        await wait_all_tasks_blocked()
        assert got == ["1", "2"]


async def test_a_busy_loop_lets_others_run() -> None:
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await checkpoint()

    async with opened() as transport, group(transport) as subscription, create_task_group() as tasks:
        tasks.start_soon(count)
        for number in range(1_000):
            await transport.publish("t", wires(str(number)))
        assert turns >= 10
        turns = 0
        await take(subscription, 1_000)
        assert turns >= 10
        tasks.cancel_scope.cancel()


async def test_a_call_that_lets_others_run_and_is_cut_there_has_done_nothing() -> None:
    async with opened() as transport, group(transport) as subscription:
        await transport.publish("t", wires("1"))
        with anyio.CancelScope() as scope:
            scope.cancel()
            for _ in range(200):
                await (await subscription.receive()).retry(0)
        assert scope.cancelled_caught
        assert transport.outstanding() == 1
        assert (await subscription.receive()).attempt == 1
