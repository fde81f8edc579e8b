"""What stands around a handler: its timeout, its concurrency, its middleware."""

import time
from importlib import import_module
from typing import Any

import anyio
import anyio.from_thread
import pytest
from anyio.lowlevel import checkpoint

from eventbus import Command, Context, Event, EventBus, HandlerTimeoutError, Limits, Module, QueueFullError, Retry
from eventbus.middleware import CallNext
from eventbus.testing.harness import harness


class Work(Command[str], name="i.work"):
    """Ask for some work."""

    depth: int = 0


class Other(Command[str], name="i.other"):
    """Ask for other work."""

    depth: int = 0


class Third(Command[str], name="i.third"):
    """Ask for a third kind of work."""


class Happened(Event, name="i.happened"):
    """State that something happened."""

    number: int = 0


# timeout


async def test_timeout_ends_a_send() -> None:
    """A handler that takes too long is cancelled, and the sender gets a TimeoutError that names it."""
    module, ended = Module("m"), list[str]()

    @module.handles(Work, timeout=0.01)
    async def slow(cmd: Work) -> str:
        try:
            await anyio.sleep_forever()
        finally:
            ended.append("slow")
        return "never"

    with pytest.raises(HandlerTimeoutError, match=r"handler 'm\.slow' .* timeout of 0\.01 s") as caught:
        await EventBus(module).send(Work())
    assert isinstance(caught.value, TimeoutError)
    assert ("m.slow", 0.01) == (caught.value.handler, caught.value.seconds)
    assert ["slow"] == ended


async def test_timeout_of_one_handler_leaves_its_siblings_alone() -> None:
    """In an inline publish only the slow handler times out; the others finish."""
    module, done = Module("m"), list[str]()

    @module.on(Happened, timeout=0.01)
    async def slow(event: Happened) -> None:
        await anyio.sleep_forever()

    @module.on(Happened)
    async def sibling(event: Happened) -> None:
        await anyio.sleep(0.03)
        done.append("sibling")

    with pytest.raises(ExceptionGroup) as caught:
        await EventBus(module).publish(Happened())
    assert [HandlerTimeoutError] == [type(error) for error in caught.value.exceptions]
    assert ["in handler m.slow of i.happened"] == caught.value.exceptions[0].__notes__
    assert ["sibling"] == done


async def test_handler_in_time_keeps_its_result_and_its_own_errors() -> None:
    """A timeout that is not reached changes nothing, and a TimeoutError of the handler's own stays what it is."""
    module, own = Module("m"), TimeoutError("the bank's")

    @module.handles(Work, timeout=5)
    async def work(cmd: Work) -> str:
        await checkpoint()
        if cmd.depth:
            raise own
        return "done"

    bus = EventBus(module)
    assert await bus.send(Work()) == "done"
    with pytest.raises(TimeoutError) as caught:
        await bus.send(Work(depth=1))
    assert caught.value is own


async def test_handler_that_ends_well_in_spite_of_its_timeout_has_ended_well() -> None:
    """A handler that answers the cancellation with a result has a result."""
    module = Module("m")

    @module.handles(Work, timeout=0.01)
    async def late(cmd: Work) -> str:
        with anyio.CancelScope(shield=True):
            await anyio.sleep(0.03)
        return "late"

    assert await EventBus(module).send(Work()) == "late"


async def test_handler_that_blocks_past_its_timeout_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """What a handler that never suspends has done counts, and a warning says that nothing could stop it."""
    module = Module("m")

    @module.handles(Work, timeout=0.01)
    async def blocks(cmd: Work) -> str:
        began = time.monotonic()
        while time.monotonic() - began < 0.03:
            pass
        return "done"

    assert await EventBus(module).send(Work()) == "done"
    assert [True] == ["'m.blocks' returned after" in message for message in caplog.messages]


async def test_cancellation_from_outside_is_no_timeout() -> None:
    """Whoever cancels the sender sees a cancellation, although the handler has a timeout."""
    module = Module("m")

    @module.handles(Work, timeout=5)
    async def work(cmd: Work) -> str:
        await anyio.sleep_forever()
        return "never"

    with anyio.move_on_after(0.01) as scope:
        await EventBus(module).send(Work())
    assert scope.cancelled_caught


async def test_each_attempt_has_the_whole_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind a queue the timeout counts from the start of each attempt, and ends in a failure like any other."""
    monkeypatch.setattr(import_module("eventbus.testing.settling"), "HUNG", 0.05)
    module, starts = Module("m"), list[float]()

    @module.on(Happened, timeout=5, retry=Retry(attempts=2, initial=1, jitter=False))
    async def hangs(event: Happened) -> None:
        starts.append(t.clock.monotonic())
        await anyio.sleep_forever()

    async with harness(EventBus(module, routes={Happened: "memory"})) as t:
        await t.publish(Happened())
        await t.advance(4)
        assert [] == t.dead
        await t.advance(100)
        assert [0, 6] == starts
        (dead,) = t.dead
        assert dead.error.startswith("failed 2 times; last: HandlerTimeoutError: handler 'm.hangs' did not finish")


async def test_timeout_is_not_spent_waiting_for_a_slot() -> None:
    """The time in line for one of the concurrency slots is nobody's handling."""
    module = Module("m")

    @module.handles(Work, timeout=5, concurrency=1)
    async def work(cmd: Work) -> str:
        await t.clock.sleep(4)
        return "done"

    results = list[str]()

    async def send() -> None:
        results.append(await t.send(Work()))

    async with harness(EventBus(module)) as t, anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(send)
        for _ in range(3):
            await t.advance(4)
        assert ["done"] * 3 == results


# concurrency


class Gauge:
    """Count how many are inside at once."""

    def __init__(self) -> None:
        self.inside = 0
        self.most = 0
        self.total = 0

    async def pass_through(self) -> None:
        """Go in, stay for a few turns of the event loop, go out."""
        self.inside += 1
        self.total += 1
        self.most = max(self.most, self.inside)
        try:
            for _ in range(5):
                await checkpoint()
        finally:
            self.inside -= 1


@pytest.mark.parametrize("slots", [1, 3])
async def test_concurrency_bounds_sends_and_publishes(slots: int) -> None:
    """However many send and publish at once, no more than so many handlings run; all get their turn."""
    module, commands, events = Module("m"), Gauge(), Gauge()

    @module.handles(Work, concurrency=slots)
    async def work(cmd: Work) -> str:
        await commands.pass_through()
        return "done"

    @module.on(Happened, concurrency=slots)
    async def happened(event: Happened) -> None:
        await events.pass_through()

    bus = EventBus(module)
    async with anyio.create_task_group() as group:
        for _ in range(20):
            group.start_soon(bus.send, Work())
            group.start_soon(bus.publish, Happened())
    assert [slots, 20] == [commands.most, commands.total]
    assert [slots, 20] == [events.most, events.total]


async def test_concurrency_is_shared_by_queue_and_sends() -> None:
    """What comes out of a queue and what is sent now share the slots of their handler."""
    module, gauge = Module("m"), Gauge()

    @module.handles(Work, concurrency=2)
    async def work(cmd: Work) -> str:
        await gauge.pass_through()
        return "done"

    async with harness(EventBus(module, routes={Work: "memory"})) as t:
        async with anyio.create_task_group() as group:
            for _ in range(10):
                group.start_soon(t.bus.send, Work())
                group.start_soon(t.bus.enqueue, Work())
        await t.settled()
    assert [2, 20] == [gauge.most, gauge.total]


async def test_routed_handlers_run_as_many_at_once_as_the_limits_say() -> None:
    """Without a concurrency of its own a routed handler has that of Limits."""
    module, gauge = Module("m"), Gauge()

    @module.on(Happened)
    async def happened(event: Happened) -> None:
        await gauge.pass_through()

    async with harness(EventBus(module, routes={Happened: "memory"}, limits=Limits(concurrency=3))) as t:
        for _ in range(20):
            await t.publish(Happened())
        await t.settled()
    assert [3, 20] == [gauge.most, gauge.total]


async def test_handler_that_sends_to_itself_does_not_hang() -> None:
    """A handler whose slots are all held above itself gets a QueueFullError."""
    module = Module("m")

    @module.handles(Work, concurrency=1)
    async def again(cmd: Work, bus: EventBus) -> str:
        return await bus.send(Work(depth=cmd.depth + 1))

    with anyio.fail_after(5), pytest.raises(QueueFullError, match=r"'m\.again' holds its maximum of 1") as caught:
        await EventBus(module).send(Work())
    assert ("m.again", 1) == (caught.value.queue, caught.value.size)


async def test_handler_may_send_to_itself_while_slots_are_free() -> None:
    """With three slots two levels of recursion are fine, and the third is refused."""
    module, deepest = Module("m"), 0

    @module.handles(Work, concurrency=3)
    async def again(cmd: Work, bus: EventBus) -> str:
        nonlocal deepest
        deepest = cmd.depth
        return "bottom" if cmd.depth == 2 else await bus.send(Work(depth=cmd.depth + 1))

    bus = EventBus(module)
    assert await bus.send(Work()) == "bottom"
    with pytest.raises(QueueFullError):
        await bus.send(Work(depth=-1))
    assert deepest == 1
    assert await bus.send(Work()) == "bottom"


async def test_handler_that_publishes_to_itself_does_not_hang() -> None:
    """The same through an inline publish, where the refusal arrives in the group."""
    module = Module("m")

    @module.on(Happened, concurrency=1)
    async def again(event: Happened, bus: EventBus) -> None:
        await bus.publish(Happened(number=event.number + 1))

    with anyio.fail_after(5), pytest.raises(ExceptionGroup) as caught:
        await EventBus(module).publish(Happened())
    assert caught.group_contains(QueueFullError, depth=2)


async def test_plain_function_that_sends_to_itself_does_not_hang() -> None:
    """The same from a worker thread."""
    module = Module("m")

    @module.handles(Work, concurrency=1)
    def again(cmd: Work, bus: EventBus) -> str:
        return anyio.from_thread.run(bus.send, Work())

    with anyio.fail_after(5), pytest.raises(QueueFullError):
        await EventBus(module).send(Work())


async def test_handlers_that_wait_for_each_other_do_not_hang() -> None:
    """When a holds its slot and waits for b's while b waits for a's, one of them is refused and the other goes on."""
    module, both = Module("m"), anyio.Event()
    outcome = list[str]()

    @module.handles(Work, concurrency=1)
    async def a(cmd: Work, bus: EventBus) -> str:
        if cmd.depth:
            return "inner a"
        await both.wait()
        return await bus.send(Other(depth=1))

    @module.handles(Other, concurrency=1)
    async def b(cmd: Other, bus: EventBus) -> str:
        if cmd.depth:
            return "inner b"
        both.set()
        return await bus.send(Work(depth=1))

    bus = EventBus(module)

    async def send(command: Command[str]) -> None:
        try:
            outcome.append(await bus.send(command))
        except QueueFullError:
            outcome.append("refused")

    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            group.start_soon(send, Work())
            await anyio.wait_all_tasks_blocked()
            group.start_soon(send, Other())
    assert "refused" in outcome
    assert len(set(outcome) - {"refused"}) == 1


async def test_circle_of_three_with_siblings_does_not_hang() -> None:
    """A circle over three handlers is found though one of them waits in a publish beside others."""
    module, here = Module("m"), anyio.Event()
    outcome = list[str]()

    @module.handles(Work, concurrency=1)
    async def a(cmd: Work, bus: EventBus) -> str:
        await here.wait()
        await bus.publish(Happened())
        return "a"

    @module.on(Happened)
    async def quiet(event: Happened) -> None:
        await checkpoint()

    @module.on(Happened)
    async def onward(event: Happened, bus: EventBus) -> None:
        await bus.send(Other())

    @module.handles(Other, concurrency=1)
    async def b(cmd: Other, bus: EventBus) -> str:
        return await bus.send(Third())

    @module.handles(Third, concurrency=1)
    async def c(cmd: Third, bus: EventBus) -> str:
        here.set()
        for _ in range(20):
            await checkpoint()
        return await bus.send(Work())

    bus = EventBus(module)

    async def send(command: Command[str]) -> None:
        try:
            outcome.append(await bus.send(command))
        except* QueueFullError:
            outcome.append("refused")

    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            group.start_soon(send, Work())
            await anyio.wait_all_tasks_blocked()
            group.start_soon(send, Third())
    assert "refused" in outcome
    assert len(outcome) == 2


async def test_waiting_for_a_slot_that_comes_free_is_no_circle() -> None:
    """A handler that holds a slot may wait for another's that is only busy."""
    module, go = Module("m"), anyio.Event()

    @module.handles(Work, concurrency=1)
    async def a(cmd: Work, bus: EventBus) -> str:
        return await bus.send(Other())

    @module.handles(Other, concurrency=1)
    async def b(cmd: Other, bus: EventBus) -> str:
        await go.wait()
        return "b"

    bus, results = EventBus(module), list[str]()

    async def send(command: Command[str]) -> None:
        results.append(await bus.send(command))

    async with anyio.create_task_group() as group:
        group.start_soon(send, Other())
        await anyio.wait_all_tasks_blocked()
        group.start_soon(send, Work())
        group.start_soon(send, Work())
        await anyio.wait_all_tasks_blocked()
        go.set()
    assert ["b"] * 3 == results


async def test_slot_comes_back_after_failure_and_cancellation() -> None:
    """Handlings that fail, are cancelled, or are cancelled while waiting in line leave their slots free."""
    module = Module("m")

    @module.handles(Work, concurrency=1)
    async def work(cmd: Work) -> str:
        if cmd.depth == 1:
            raise ValueError
        if cmd.depth == 2:
            await anyio.sleep_forever()
        return "done"

    bus = EventBus(module)
    with pytest.raises(ValueError):  # noqa: PT011
        await bus.send(Work(depth=1))
    async with anyio.create_task_group() as group:
        group.start_soon(bus.send, Work(depth=2))
        group.start_soon(bus.send, Work(depth=2))
        await anyio.wait_all_tasks_blocked()
        group.cancel_scope.cancel()
    with anyio.fail_after(5):
        assert await bus.send(Work()) == "done"


def test_slots_belong_to_one_event_loop(anyio_backend_name: str) -> None:
    """The same bus limits each of several event loops, one after the other, by itself."""
    module, gauge = Module("m"), Gauge()

    @module.handles(Work, concurrency=1)
    async def work(cmd: Work) -> str:
        await gauge.pass_through()
        return "done"

    bus = EventBus(module)

    async def main() -> None:
        async with anyio.create_task_group() as group:
            for _ in range(3):
                group.start_soon(bus.send, Work())

    for _ in range(3):
        anyio.run(main, backend=anyio_backend_name)
    assert [1, 9] == [gauge.most, gauge.total]


# middleware


async def test_limits_are_inside_the_middleware() -> None:
    """Middleware sees the timeout of its handler as an error, and is not bound by it."""
    module, seen = Module("m"), list[str]()

    async def notes(ctx: Context, call_next: CallNext) -> Any:
        try:
            return await call_next(ctx)
        except HandlerTimeoutError:
            await anyio.sleep(0.03)
            seen.append("slow but through")
            return "instead"

    @module.handles(Work, timeout=0.01)
    async def work(cmd: Work) -> str:
        await anyio.sleep_forever()
        return "never"

    assert await EventBus(module, middleware=[notes]).send(Work()) == "instead"
    assert ["slow but through"] == seen


async def test_middleware_that_does_not_call_on_keeps_the_handler_from_running() -> None:
    """A middleware may answer by itself."""
    module = Module("m")

    async def answers(ctx: Context, call_next: CallNext) -> Any:
        return "answered"

    @module.handles(Work)
    async def work(cmd: Work) -> str:
        raise AssertionError

    assert await EventBus(module, middleware=[answers]).send(Work()) == "answered"


async def test_middleware_that_fails_is_a_failure_of_the_handling() -> None:
    """Behind a queue a failing middleware is tried again with its handler, and counted."""
    module, attempts = Module("m"), list[int]()

    async def stumbles(ctx: Context, call_next: CallNext) -> Any:
        attempts.append(ctx.attempt)
        if ctx.attempt == 1:
            raise OSError("not yet")
        return await call_next(ctx)

    @module.on(Happened)
    async def happened(event: Happened) -> None: ...

    async with harness(EventBus(module, middleware=[stumbles], routes={Happened: "memory"})) as t:
        await t.publish(Happened())
        await t.advance(1)
        assert [Happened()] == t.handled("m.happened")
        assert len(t.failed(happened)) == 1
    assert [1, 2] == attempts


async def test_middleware_passes_cancellation_on() -> None:
    """A cancelled sender cancels handler and middleware, from the inside out."""
    module, ended = Module("m"), list[str]()

    async def notes(ctx: Context, call_next: CallNext) -> Any:
        try:
            return await call_next(ctx)
        finally:
            ended.append("middleware")

    @module.handles(Work)
    async def work(cmd: Work) -> str:
        try:
            await anyio.sleep_forever()
        finally:
            ended.append("handler")
        return "never"

    with anyio.move_on_after(0.01):
        await EventBus(module, middleware=[notes]).send(Work())
    assert ["handler", "middleware"] == ended
