"""The memory route, from publish to the last attempt: isolation, retry, delay, order, back-pressure, poison."""

import gc
from collections import defaultdict
from datetime import UTC, datetime
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint
from hypothesis import example, given, settings
from hypothesis import strategies as st

from eventbus import (
    Command,
    Context,
    Event,
    EventBus,
    Limits,
    Module,
    QueueFullError,
    Reject,
    Retry,
    RetryLater,
    WiringError,
)
from eventbus.engine import Engine
from eventbus.testing.harness import Harness, harness
from eventbus.transport import Wire

MEMORY = {"r.*": "memory"}
STEADY = Retry(attempts=4, initial=1.0, maximum=100.0, factor=2.0, jitter=False)


class Paid(Event, name="r.paid", key="account"):
    """State that something was paid."""

    number: int = 0
    account: str = "a"


class Refunded(Event, name="r.refunded"):
    """State that something was paid back."""

    number: int = 0


class Pay(Command[int], name="r.pay"):
    """Ask to pay."""

    number: int = 0


# retry


async def test_attempts_come_at_their_times() -> None:
    """A failing message is tried after 1, 3 and 7 seconds, exactly, and counts its attempts; then it is dead."""
    module, seen = Module("m"), list[tuple[int, float]]()

    @module.on(Paid, retry=STEADY)
    async def fails(event: Paid, ctx: Context) -> None:
        seen.append((ctx.attempt, t.clock.monotonic()))
        raise ValueError("no")

    async with harness(EventBus(module, routes=MEMORY)) as t:
        await t.publish(Paid())
        await t.settled()
        assert [(1, 0.0)] == seen
        await t.advance(0.5)
        await t.advance(0.5)
        assert [(1, 0.0), (2, 1.0)] == seen
        await t.advance(60)
        assert [(1, 0.0), (2, 1.0), (3, 3.0), (4, 7.0)] == seen
        (dead,) = t.dead
        assert (4, "failed 4 times; last: ValueError: no", "r.paid") == (dead.failures, dead.error, dead.message)
        await t.advance(3600)
        assert len(seen) == 4


async def test_one_failing_handler_leaves_its_siblings_alone() -> None:
    """Each handler has a queue of its own: the retries of one never run another again, nor keep it waiting."""
    module, seen = Module("m"), list[str]()

    @module.on(Paid, retry=STEADY)
    async def fails(event: Paid, ctx: Context) -> None:
        seen.append(f"fails {ctx.attempt}")
        if ctx.attempt < 3:
            raise ValueError

    @module.on(Paid)
    async def works(event: Paid) -> None:
        seen.append("works")

    async with harness(EventBus(module, routes=MEMORY)) as t:
        await t.publish(Paid())
        await t.settled()
        assert ["fails 1", "works"] == sorted(seen)
        await t.advance(10)
        assert len(t.failed(fails)) == 2
    assert ["fails 1", "fails 2", "fails 3", "works"] == sorted(seen)


async def test_one_failing_message_leaves_the_others_alone() -> None:
    """While one message waits for its next attempt the others of its handler go on."""
    module, seen = Module("m"), list[tuple[int, float]]()

    @module.on(Paid, retry=STEADY, concurrency=1)
    async def sometimes(event: Paid, ctx: Context) -> None:
        seen.append((event.number, t.clock.monotonic()))
        if event.number == 0 and ctx.attempt < 3:
            raise ValueError

    async with harness(EventBus(module, routes=MEMORY)) as t:
        for number in range(5):
            await t.publish(Paid(number=number))
        await t.advance(10)
        assert len(t.failed(sometimes)) == 2
    assert [(0, 0.0), (1, 0.0), (2, 0.0), (3, 0.0), (4, 0.0), (0, 1.0), (0, 3.0)] == seen


async def test_same_seed_same_times() -> None:
    """Jitter is decided by the seed: one seed gives the same attempts twice, another gives others."""

    async def times(seed: int) -> list[float]:
        module, seen = Module("m"), list[float]()

        @module.on(Paid, retry=Retry(attempts=6, initial=1.0))
        async def fails(event: Paid) -> None:
            seen.append(t.clock.monotonic())
            raise ValueError

        async with harness(EventBus(module, routes=MEMORY), seed=seed) as t:
            for number in range(3):
                await t.publish(Paid(number=number))
            await t.advance(100)
            assert len(t.dead) == 3
        return seen

    assert await times(1) == await times(1) != await times(2)


async def test_reject_and_retry_later() -> None:
    """Reject is dead at once with its reason; RetryLater comes again then, and counts."""
    module, seen = Module("m"), list[tuple[int, int, float]]()

    @module.on(Paid, retry=Retry(attempts=3))
    async def decides(event: Paid, ctx: Context) -> None:
        seen.append((event.number, ctx.attempt, t.clock.monotonic()))
        raise Reject("stolen") if event.number == 1 else RetryLater(100)

    async with harness(EventBus(module, routes=MEMORY)) as t:
        await t.publish(Paid(number=1))
        await t.publish(Paid(number=2))
        await t.settled()
        assert ["Reject: stolen"] == [dead.error for dead in t.dead]
        await t.advance(1000)
        assert [(1, 1, 0.0), (2, 1, 0.0), (2, 2, 100.0), (2, 3, 200.0)] == sorted(seen)
        assert ["Reject: stolen", "failed 3 times; last: RetryLater: again in 100 s"] == [one.error for one in t.dead]


async def test_retry_without_waiting_still_counts() -> None:
    """A policy that waits no time at all, and RetryLater(0), end after their attempts and do not spin for ever."""
    module, seen = Module("m"), list[int]()

    @module.on(Paid, retry=Retry(attempts=4, initial=0.0, maximum=0.0))
    async def fails(event: Paid, ctx: Context) -> None:
        seen.append(ctx.attempt)
        raise RetryLater(0) if event.number else ValueError

    async with harness(EventBus(module, routes=MEMORY)) as t:
        await t.publish(Paid(number=0))
        await t.advance(1)
        await t.publish(Paid(number=1))
        await t.advance(1)
        assert [1, 2, 3, 4] * 2 == seen
        assert len(t.dead) == 2


@pytest.mark.parametrize("kind", [SystemExit, GeneratorExit, "cancelled", "group"])
async def test_handler_that_raises_anything_keeps_the_worker_alive(kind: Any) -> None:
    """Exits, stray cancellations and groups of them are failures of their message; its neighbours are handled."""
    module, seen = Module("m"), list[tuple[int, int]]()

    async def cancellation() -> BaseException:
        with anyio.CancelScope() as scope:
            scope.cancel()
            try:
                await checkpoint()
            except anyio.get_cancelled_exc_class() as error:
                return error
        raise AssertionError

    @module.on(Paid, retry=Retry(attempts=2, initial=1), concurrency=1)
    async def wild(event: Paid, ctx: Context) -> None:
        seen.append((event.number, ctx.attempt))
        if event.number == 0:
            if kind == "cancelled":
                raise await cancellation()
            if kind == "group":
                raise BaseExceptionGroup("", [ValueError(), await cancellation(), SystemExit()])
            raise kind

    async with harness(EventBus(module, routes=MEMORY)) as t:
        await t.publish(Paid(number=0))
        await t.publish(Paid(number=1))
        await t.advance(10)
        await t.publish(Paid(number=2))
        await t.settled()
        assert len(t.dead) == 1
    assert [(0, 1), (1, 1), (0, 2), (2, 1)] == seen


# delay


async def test_delayed_message_comes_at_its_time_with_all_its_attempts() -> None:
    """A delay is kept exactly, is no attempt, and takes none away."""
    module, seen = Module("m"), list[tuple[int, float]]()

    @module.on(Paid, retry=Retry(attempts=3, initial=1, jitter=False))
    async def fails(event: Paid, ctx: Context) -> None:
        seen.append((ctx.attempt, t.clock.monotonic()))
        raise ValueError

    async with harness(EventBus(module, routes=MEMORY)) as t:
        await t.publish(Paid(), delay=60.5)
        await t.advance(60)
        assert [] == seen
        await t.advance(60)
        assert [(1, 60.5), (2, 61.5), (3, 63.5)] == seen
        assert len(t.dead) == 1


async def test_delayed_message_keeps_no_key_waiting() -> None:
    """A delayed message is in no order: later ones of its key go before it."""
    module, seen = Module("m"), list[int]()

    @module.on(Paid, ordered=True)
    async def paid(event: Paid) -> None:
        seen.append(event.number)

    async with harness(EventBus(module, routes=MEMORY)) as t:
        await t.publish(Paid(number=1), delay=5)
        await t.publish(Paid(number=2))
        await t.settled()
        assert [2] == seen
        await t.advance(5)
        assert [2, 1] == seen


async def test_many_delays_come_in_the_order_of_their_times() -> None:
    """However they were published, delayed messages come when each is due."""
    module, seen = Module("m"), list[tuple[int, float]]()

    @module.on(Paid)
    async def paid(event: Paid) -> None:
        seen.append((event.number, t.clock.monotonic()))

    async with harness(EventBus(module, routes=MEMORY)) as t:
        for number in (5, 1, 3, 2, 4):
            await t.publish(Paid(number=number), delay=number * 0.1)
        await t.advance(0.5)
        assert [1, 2, 3, 4, 5] == [number for number, _ in seen]
        assert [0.1, 0.2, 0.3, 0.4, 0.5] == pytest.approx([moment for _, moment in seen], abs=1e-6)


# order


async def test_failing_head_keeps_its_key_and_nobody_else() -> None:
    """While the first of a key is tried again the rest of it waits; other keys, and no key, are not delayed."""
    module, seen = Module("m"), list[tuple[str, int, float]]()

    @module.on(Paid, ordered=True, retry=STEADY, concurrency=2)
    async def paid(event: Paid, ctx: Context) -> None:
        seen.append((event.account, event.number, t.clock.monotonic()))
        if (event.account, event.number) == ("a", 0) and ctx.attempt < 3:
            raise ValueError

    async with harness(EventBus(module, routes=MEMORY)) as t:
        for number in range(3):
            for account in ("a", "b"):
                await t.publish(Paid(number=number, account=account))
        await t.advance(10)
        assert t.failed(paid)
    assert [("b", 0, 0.0), ("b", 1, 0.0), ("b", 2, 0.0)] == [one for one in seen if one[0] == "b"]
    expected = [("a", 0, 0.0), ("a", 0, 1.0), ("a", 0, 3.0), ("a", 1, 3.0), ("a", 2, 3.0)]
    assert expected == [one for one in seen if one[0] == "a"]


async def test_key_goes_on_after_a_death() -> None:
    """When the first of a key dies the next of it comes, in order."""
    module, seen = Module("m"), list[int]()

    @module.on(Paid, ordered=True, retry=Retry(attempts=1))
    async def paid(event: Paid) -> None:
        seen.append(event.number)
        if event.number == 0:
            raise ValueError

    async with harness(EventBus(module, routes=MEMORY)) as t:
        for number in range(3):
            await t.publish(Paid(number=number))
        await t.settled()
        assert [0, 1, 2] == seen
        assert len(t.dead) == 1


async def test_one_of_a_key_at_a_time_whatever_the_concurrency() -> None:
    """Two of one key never run at once; of different keys they do."""
    module, inside, most = Module("m"), defaultdict[str, int](int), 0

    @module.on(Paid, ordered=True, concurrency=8)
    async def paid(event: Paid) -> None:
        nonlocal most
        inside[event.account] += 1
        assert inside[event.account] == 1
        most = max(most, sum(inside.values()))
        for _ in range(3):
            await checkpoint()
        inside[event.account] -= 1

    async with harness(EventBus(module, routes=MEMORY)) as t:
        for number in range(10):
            for account in "abcd":
                await t.publish(Paid(number=number, account=account))
        await t.settled()
        assert len(t.handled("m.paid")) == 40
    assert 2 <= most <= 4


async def test_many_followers_of_a_failing_head_do_not_keep_others_out() -> None:
    """A thousand messages behind one failing head do not delay another key's."""
    module, seen = Module("m"), list[tuple[str, float]]()

    @module.on(Paid, ordered=True, retry=STEADY, concurrency=1)
    async def paid(event: Paid, ctx: Context) -> None:
        seen.append((event.account, t.clock.monotonic()))
        if event.number == 0 and event.account == "a" and ctx.attempt < 2:
            raise ValueError

    async with harness(EventBus(module, routes=MEMORY)) as t:
        for number in range(1_000):
            await t.publish(Paid(number=number))
        await t.publish(Paid(number=0, account="b"))
        await t.settled()
        assert [("a", 0.0), ("b", 0.0)] == seen
        await t.advance(1)
        assert len(seen) == 1_002
        assert t.failed(paid)


PLANS = st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 4)), min_size=1, max_size=12)


@given(PLANS, st.integers(1, 4))
@example([("a", 2), ("b", 0), ("a", 0)], 1)
@example([("a", 4), ("a", 1), ("b", 4), ("b", 0)], 2)
@settings(max_examples=30, deadline=None)
async def test_order_and_times_under_failures(plan: list[tuple[str, int]], slots: int) -> None:
    """Whichever messages fail however often, each attempt comes at the very time that its key and its policy say."""
    module, seen = Module("m"), defaultdict[str, list[tuple[int, int, float]]](list)

    @module.on(Paid, ordered=True, retry=STEADY, concurrency=slots)
    async def paid(event: Paid, ctx: Context) -> None:
        await checkpoint()
        seen[event.account].append((event.number, ctx.attempt, t.clock.monotonic()))
        if ctx.attempt <= plan[event.number][1]:
            raise ValueError

    async with harness(EventBus(module, routes=MEMORY)) as t:
        for number, (account, _) in enumerate(plan):
            await t.publish(Paid(number=number, account=account))
        await t.advance(1_000)
        dead = len(t.dead)
        t.failed(paid)
    expected, due = defaultdict[str, list[tuple[int, int, float]]](list), defaultdict[str, float](float)
    for number, (account, failures) in enumerate(plan):
        for attempt in range(1, min(failures + 1, STEADY.attempts) + 1):
            expected[account].append((number, attempt, due[account]))
            if attempt <= failures and attempt < STEADY.attempts:
                due[account] += 2.0 ** (attempt - 1)
    assert expected == seen
    assert dead == sum(failures >= STEADY.attempts for _, failures in plan)


# back-pressure


async def test_publishers_wait_while_the_queue_is_full() -> None:
    """At Limits.queue publishers wait, in line, and go on as messages are handled; none is lost."""
    module, gate, published = Module("m"), anyio.Event(), list[int]()

    @module.on(Paid, concurrency=1)
    async def paid(event: Paid) -> None:
        await gate.wait()

    async def publish(number: int) -> None:
        await t.publish(Paid(number=number))
        published.append(number)

    async with harness(EventBus(module, routes=MEMORY, limits=Limits(queue=3))) as t:
        async with anyio.create_task_group() as group:
            for number in range(6):
                group.start_soon(publish, number)
                await anyio.wait_all_tasks_blocked()
            assert [0, 1, 2] == published
            gate.set()
        await t.settled()
        assert [0, 1, 2, 3, 4, 5] == published
        assert [0, 1, 2, 3, 4, 5] == [event.number for event in t.handled("m.paid")]


async def test_publisher_that_is_cancelled_in_line_has_not_published() -> None:
    """A publisher that gives up waiting leaves nothing behind."""
    module, gate = Module("m"), anyio.Event()

    @module.on(Paid, concurrency=1)
    async def paid(event: Paid) -> None:
        await gate.wait()

    async with harness(EventBus(module, routes=MEMORY, limits=Limits(queue=1))) as t:
        await t.publish(Paid(number=1))
        with anyio.move_on_after(0.01) as scope:
            await t.publish(Paid(number=2))
        assert scope.cancelled_caught
        gate.set()
        await t.settled()
        assert [1] == [event.number for event in t.handled("m.paid")]


@pytest.mark.parametrize("how", ["publish", "send", "publish inline"])
async def test_handler_that_publishes_into_its_own_full_queue_is_told(how: str) -> None:
    """A handler that would wait for the queue it drains gets a QueueFullError, also through an inline send."""
    module, errors = Module("m"), list[Exception]()

    @module.on(Paid, concurrency=1)
    async def paid(event: Paid, bus: EventBus) -> None:
        if event.number:
            return
        try:
            for number in range(1, 4):
                if how == "publish":
                    await bus.publish(Paid(number=number))
                elif how == "send":
                    await bus.send(Pay(number=number))
                else:
                    await bus.publish(Refunded(number=number))
        except (QueueFullError, ExceptionGroup) as error:
            errors.append(error)

    @module.handles(Pay)
    async def pay(cmd: Pay, bus: EventBus) -> int:
        await bus.publish(Paid(number=cmd.number))
        return 0

    @module.on(Refunded)
    async def refunded(event: Refunded, bus: EventBus) -> None:
        await bus.publish(Paid(number=event.number))

    async with harness(EventBus(module, routes={Paid: "memory"}, limits=Limits(queue=2))) as t:
        await t.publish(Paid())
        with anyio.fail_after(5):
            await t.settled()
        assert [0, 1] == [event.number for event in t.handled("m.paid")]
    (error,) = errors
    leaf = error.exceptions[0] if isinstance(error, ExceptionGroup) else error
    assert isinstance(leaf, QueueFullError)
    assert leaf.size == 2


async def test_two_handlers_that_fill_each_others_queues_do_not_hang() -> None:
    """Ping and pong, each publishing two for one, end in QueueFullErrors instead of a standstill."""
    module, count = Module("m"), 0

    @module.on(Paid, concurrency=1, retry=Retry(attempts=1))
    async def ping(event: Paid, bus: EventBus) -> None:
        nonlocal count
        count += 1
        if count < 50:
            await bus.publish(Refunded())
            await bus.publish(Refunded())

    @module.on(Refunded, concurrency=1, retry=Retry(attempts=1))
    async def pong(event: Refunded, bus: EventBus) -> None:
        await bus.publish(Paid())
        await bus.publish(Paid())

    async with harness(EventBus(module, routes=MEMORY, limits=Limits(queue=3))) as t:
        await t.publish(Paid())
        with anyio.fail_after(10):
            await t.settled()
        assert t.dead
        assert all("QueueFullError" in one.error for one in t.dead)


# poison


async def put(engine: Engine, topic: str, *wires: Wire) -> None:
    """Put wires on a queue, past the bus."""
    await engine.links["memory"].transport.publish(topic, wires)


def wire(t: Harness, **facts: Any) -> Wire:
    """Return what a publish of a Paid would have put on the queue, with some facts changed."""
    headers = {
        "ce-specversion": "1.0", "ce-id": "x", "ce-type": "r.paid", "ce-source": "elsewhere",
        "ce-time": "2026-01-01T00:00:00Z", "content-type": "application/json",
    }  # fmt: skip
    return Wire("x", facts.pop("body", b'{"number": 7}'), {**headers, **facts})


async def test_poison_dies_with_a_reason_and_its_neighbours_live() -> None:
    """Whatever lies on a queue, it dies alone and visibly."""
    module = Module("m")

    @module.on(Paid)
    async def paid(event: Paid) -> None: ...

    async with harness(EventBus(module, routes=MEMORY)) as t:
        await t.publish(Paid(number=1))
        await put(
            t.bus.engine,
            "r.paid",
            Wire("1", b"garbage"),
            Wire("2", b"\xff" * 1_000, {"ce-specversion": "1.0"}),
            wire(t, body=b'{"number": "many"}'),
            wire(t, body=b"[" * 200_000),
            wire(t, **{"ce-time": "yesterday"}),
            wire(t),
        )
        await t.publish(Paid(number=2))
        await t.settled()
        assert [1, 7, 2] == [event.number for event in t.handled("m.paid")]
        assert len(t.dead) == 5
        assert all(one.error and one.failures == 1 for one in t.dead)
        assert b"garbage" in {one.body for one in t.dead}


@pytest.mark.parametrize("facts", [{"ce-type": "r.unheard_of"}, {"ce-dataversion": "9"}], ids=str)
async def test_what_nobody_knows_yet_is_released_for_a_day(facts: dict[str, str]) -> None:
    """An unknown name or a newer version is not failed but put off; after a day it is dead and says why."""
    module = Module("m")

    @module.on(Paid)
    async def paid(event: Paid) -> None: ...

    async with harness(EventBus(module, routes=MEMORY, limits=Limits(unknown=3600.0))) as t:
        await put(t.bus.engine, "r.paid", wire(t, **{"ce-time": stamp(t.clock.now()), **facts}))
        await t.publish(Paid(number=2))
        await t.advance(3599)
        assert [] == t.dead
        assert [2] == [event.number for event in t.handled("m.paid")]
        await t.advance(60)
        (dead,) = t.dead
        assert "r.unheard_of" in dead.error or "arrived in version 9" in dead.error


def stamp(moment: float) -> str:
    """Return a time as CloudEvents writes it."""
    return datetime.fromtimestamp(moment, UTC).isoformat().replace("+00:00", "Z")


# circles and growth


async def test_headers_are_those_of_the_moment_of_publishing() -> None:
    """What the publisher does with its own headers afterwards changes nothing, and no handler can change them."""
    module, seen = Module("m"), list[Any]()

    @module.on(Paid)
    async def look(event: Paid, ctx: Context) -> None:
        seen.append(dict(ctx.headers))
        with pytest.raises(TypeError):
            ctx.headers["tenant"] = "c"  # type: ignore[index]

    async with harness(EventBus(module, name="x", routes=MEMORY)) as t:
        headers = {"tenant": "a"}
        await t.bus.publish(Paid(), headers=headers)
        headers["tenant"] = "b"
        await t.settled()
    assert [{"tenant": "a"}] == seen


async def test_handlers_in_a_circle_through_queues_do_not_grow() -> None:
    """Events that cause each other for ever through queues leave neither stack nor memory behind, and others pass."""
    module, rounds = Module("m"), 0

    @module.on(Paid)
    async def ping(event: Paid, bus: EventBus) -> None:
        nonlocal rounds
        rounds += 1
        if rounds < 1_000:
            await bus.publish(Refunded())

    @module.on(Refunded)
    async def pong(event: Refunded, bus: EventBus) -> None:
        await bus.publish(Paid())

    bus, sizes = EventBus(module, routes=MEMORY), list[int]()
    async with bus.running():
        await bus.publish(Paid())
        for mark in (200, 1_000):
            while rounds < mark:
                await checkpoint()
            gc.collect()
            sizes.append(len(gc.get_objects()))
    assert sizes[1] - sizes[0] < 800


async def test_handlers_cannot_be_added_while_the_bus_runs() -> None:
    """A handler that registers another one is told that it comes too late; nothing else is disturbed."""
    module, errors = Module("m"), list[Exception]()

    @module.on(Paid)
    async def paid(event: Paid) -> None:
        try:

            @module.on(Paid)
            async def late(event: Paid) -> None: ...
        except WiringError as error:
            errors.append(error)

    async with harness(EventBus(module, routes=MEMORY)) as t:
        await t.publish(Paid())
        await t.settled()
        assert len(t.handled("m.paid")) == 1
    assert len(errors) == 1
