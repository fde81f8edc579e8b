"""Fanning out: side by side as in a task group, each in a context of its own, errors in order."""

import asyncio
import contextvars
import gc
from asyncio import CancelledError
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from functools import partial
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

from eventbus.fanout import FanOut, cut_short, failure_in, isolated

Fan = Callable[[Sequence[Callable[[], Awaitable[Any]]]], Awaitable[list[BaseException | None]]]

asyncio_only = pytest.mark.parametrize("anyio_backend", ["asyncio"])
place: contextvars.ContextVar[str] = contextvars.ContextVar("place", default="nowhere")


async def fan_out(calls: Sequence[Callable[[], Awaitable[Any]]]) -> list[BaseException | None]:
    """Be our fan-out of calls that take nothing."""

    async def taking_nothing(call: Callable[[], Awaitable[Any]], _: None) -> None:
        await call()

    failures = await FanOut([partial(taking_nothing, call) for call in calls]).run(None)
    return [failures.get(index) for index in range(len(calls))]


async def spread_fan_out(calls: Sequence[Callable[[], Awaitable[Any]]]) -> list[BaseException | None]:
    """Be our fan-out, once more after it has seen that calls suspend."""

    async def taking_nothing(call: Callable[[], Awaitable[Any]], _: None) -> None:
        await call()

    now = [partial(taking_nothing, checkpoint)] * 2
    fan = FanOut(now)
    await fan.run(None)
    now[:] = [partial(taking_nothing, call) for call in calls]
    failures = await fan.run(None)
    return [failures.get(index) for index in range(len(calls))]


async def plain_group(calls: Sequence[Callable[[], Awaitable[Any]]]) -> list[BaseException | None]:
    """Be the yardstick: a child for each call, whose errors are collected."""
    errors: list[BaseException | None] = [None] * len(calls)

    async def child(index: int) -> None:
        try:
            await calls[index]()
        except Exception as error:
            errors[index] = error

    async with anyio.create_task_group() as group:
        for index in range(len(calls)):
            group.start_soon(child, index)
    return errors


@pytest.fixture(params=[fan_out, spread_fan_out, plain_group])
def fan(request: pytest.FixtureRequest) -> Fan:
    """Return each way to fan out."""
    return request.param


async def quiet() -> None:
    """Finish without suspending."""


async def fails(error: BaseException) -> None:
    """Suspend once, then raise."""
    await checkpoint()
    raise error


async def test_nothing_to_call(fan: Fan) -> None:
    """No calls have no errors."""
    assert [] == await fan([])


async def test_calls_start_in_order(fan: Fan, anyio_backend_name: str) -> None:
    """Calls start in their order, where the event loop starts tasks in order."""
    begun = list[int]()

    async def begin(number: int) -> None:
        begun.append(number)
        await checkpoint()

    await fan([partial(begin, number) for number in range(10)])
    assert list(range(10)) == (begun if anyio_backend_name == "asyncio" else sorted(begun))


async def test_really_concurrent(fan: Fan) -> None:
    """Each of two calls can wait for what the other does."""
    first, second = anyio.Event(), anyio.Event()

    async def ping() -> None:
        first.set()
        await second.wait()

    async def pong() -> None:
        await first.wait()
        second.set()

    with anyio.fail_after(5):
        assert [None, None] == await fan([ping, pong])


async def test_many_concurrent(fan: Fan) -> None:
    """Two hundred fan-outs of five at once do not get into each other's way."""
    done = list[tuple[int, int]]()

    async def note(outer: int, inner: int) -> None:
        for _ in range(inner):
            await checkpoint()
        done.append((outer, inner))

    async with anyio.create_task_group() as group:
        for outer in range(200):
            group.start_soon(fan, [partial(note, outer, inner) for inner in range(5)])
    assert [(outer, inner) for outer in range(200) for inner in range(5)] == sorted(done)


async def test_errors_come_back_in_order_and_all_run(fan: Fan) -> None:
    """Every call finishes though others fail, and each error stands at its place."""
    first, third, done = ValueError(1), KeyError(3), list[str]()

    async def slow() -> None:
        for _ in range(5):
            await checkpoint()
        done.append("slow")

    async def at_once() -> None:
        raise third

    assert [first, None, third, None] == await fan([partial(fails, first), slow, at_once, quiet])
    assert ["slow"] == done


async def test_group_raised_by_a_call_stays_one_error(fan: Fan) -> None:
    """An exception group of one call is not taken apart."""
    group = ExceptionGroup("two", [ValueError(), KeyError()])
    assert [group, None] == await fan([partial(fails, group), quiet])


async def test_deadline_is_inherited(fan: Fan) -> None:
    """A call sees the deadline around the fan-out, and ends by it."""
    seen, looked = list[float](), anyio.Event()

    async def look() -> None:
        seen.append(anyio.current_effective_deadline())
        if len(seen) == 2:
            looked.set()
        await anyio.sleep_forever()

    with anyio.move_on_after(3600) as scope:
        deadline = scope.deadline

        async def expire() -> None:
            await looked.wait()
            scope.deadline = anyio.current_time()
            await anyio.sleep_forever()

        await fan([look, look, expire])
    assert scope.cancelled_caught
    assert [deadline] * 2 == seen


async def test_shield_inside_a_call_holds(fan: Fan) -> None:
    """What a call shields runs to its end though everything around is cancelled."""
    done, inside = list[str](), anyio.Event()

    async def shielded() -> None:
        with anyio.CancelScope(shield=True):
            inside.set()
            await anyio.sleep(0.02)
            done.append("shielded")
        await checkpoint()
        done.append("not reached")

    with anyio.CancelScope() as scope:
        async with anyio.create_task_group() as group:
            group.start_soon(fan, [shielded, anyio.sleep_forever])
            await inside.wait()
            scope.cancel()
    assert ["shielded"] == done


async def test_external_cancel_reaches_all_calls(fan: Fan) -> None:
    """Cancelling the publisher cancels every call, and the fan-out does not return."""
    ended = list[str]()

    async def waits(name: str) -> None:
        try:
            await anyio.sleep_forever()
        finally:
            ended.append(name)

    async def publisher() -> None:
        await fan([partial(waits, "a"), partial(waits, "b"), quiet, partial(waits, "c")])
        ended.append("returned")

    async with anyio.create_task_group() as group:
        group.start_soon(publisher)
        await anyio.wait_all_tasks_blocked()
        group.cancel_scope.cancel()
    assert ["a", "b", "c"] == sorted(ended)


async def test_errors_during_cancellation_do_not_hide_it(fan: Fan) -> None:
    """A call that answers its cancellation with an error of its own does not turn it into one."""

    async def bitter() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            raise ValueError("while cleaning up")

    with anyio.move_on_after(0.01) as scope:
        await fan([bitter, anyio.sleep_forever])
    assert scope.cancelled_caught


@asyncio_only
async def test_native_cancel(fan: Fan) -> None:
    """Asyncio's own cancellation of the publisher's task ends every call and arrives as such."""
    ended = list[int]()

    async def waits(number: int) -> None:
        try:
            await asyncio.sleep(100)
        except asyncio.CancelledError:
            ended.append(number)
            raise

    async def publisher() -> None:
        await fan([partial(waits, number) for number in range(3)])

    task = asyncio.create_task(publisher())
    await anyio.wait_all_tasks_blocked()
    task.cancel()
    with pytest.raises(CancelledError):
        await task
    assert [0, 1, 2] == sorted(ended)
    assert task.cancelled()


@asyncio_only
@pytest.mark.parametrize("others", [0, 1, 3])
async def test_native_cancel_not_yet_delivered(others: int) -> None:
    """A publisher's task that was cancelled before it suspends is cancelled, and no call is blamed for it."""

    async def publisher() -> None:
        ends_task()
        await fan_out([checkpoint] * (1 + others))

    task = asyncio.create_task(publisher())
    with pytest.raises(CancelledError):
        await task
    assert task.cancelled()


@asyncio_only
async def test_native_cancel_by_a_call_that_does_not_suspend() -> None:
    """A call in the publisher's task that cancels this task cancels the publisher, not the call behind it."""

    async def cancels() -> None:
        ends_task()

    async def publisher() -> None:
        await fan_out([cancels, checkpoint, checkpoint])

    task = asyncio.create_task(publisher())
    with pytest.raises(CancelledError):
        await task
    assert task.cancelled()


@asyncio_only
async def test_asyncio_timeout_inside_a_call(fan: Fan) -> None:
    """A call may use asyncio's timeout: it ends that call only."""

    async def hurried() -> None:
        async with asyncio.timeout(0.01):
            await asyncio.sleep(100)

    slow = partial(asyncio.sleep, 0.03)
    assert [TimeoutError, type(None), TimeoutError] == [*map(type, await fan([hurried, slow, hurried]))]


@asyncio_only
async def test_asyncio_timeout_around(fan: Fan) -> None:
    """Asyncio's timeout around a fan-out ends all its calls."""
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await fan([partial(asyncio.sleep, 100)] * 3)


async def test_fail_after_inside_a_call(fan: Fan) -> None:
    """A call may set itself a deadline: it ends that call only."""

    async def hurried() -> None:
        with anyio.fail_after(0.01):
            await anyio.sleep_forever()

    assert [TimeoutError, type(None), TimeoutError] == [*map(type, await fan([hurried, quiet, hurried]))]


async def test_move_on_after_inside_a_call(fan: Fan) -> None:
    """A scope that is cancelled in one call goes unnoticed in the others."""
    done, moved = list[str](), anyio.Event()

    async def moves_on() -> None:
        with anyio.move_on_after(0.005):
            await anyio.sleep_forever()
        done.append("moved on")
        moved.set()

    async def stays() -> None:
        await moved.wait()
        await checkpoint()
        done.append("stayed")

    assert [None, None] == await fan([moves_on, stays])
    assert ["moved on", "stayed"] == done


async def test_lock_held_over_suspension(fan: Fan) -> None:
    """A lock keeps calls apart, and each may release what it acquired."""
    lock, inside, most = anyio.Lock(), 0, 0

    async def guarded() -> None:
        nonlocal inside, most
        async with lock:
            inside += 1
            most = max(most, inside)
            await checkpoint()
            inside -= 1

    assert [None] * 5 == await fan([guarded] * 5)
    assert most == 1


async def test_nested_task_group(fan: Fan) -> None:
    """A call may open a task group over several suspensions, whose failures are its own."""

    async def opens(error: Exception | None) -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(checkpoint)
            if error is not None:
                group.start_soon(fails, error)
            await checkpoint()

    wrong = ValueError("inner")
    outcome = await fan([partial(opens, None), partial(opens, wrong), partial(opens, None)])
    assert [None, None] == [outcome[0], outcome[2]]
    assert isinstance(outcome[1], ExceptionGroup)
    assert (wrong,) == outcome[1].exceptions


async def test_nested_fan_out(fan: Fan) -> None:
    """A call may fan out again, three deep."""
    leaves = list[tuple[int, ...]]()

    async def branch(*path: int) -> None:
        if len(path) == 3:
            await checkpoint()
            leaves.append(path)
        else:
            assert [None] * 3 == await fan([partial(branch, *path, number) for number in range(3)])

    await branch()
    assert [(a, b, c) for a in range(3) for b in range(3) for c in range(3)] == sorted(leaves)


async def test_event_set_from_outside(fan: Fan) -> None:
    """A call waits for an event that somebody else sets later."""
    event = anyio.Event()

    async def setter() -> None:
        await anyio.wait_all_tasks_blocked()
        event.set()

    async with anyio.create_task_group() as group:
        group.start_soon(setter)
        assert [None, None] == await fan([event.wait, event.wait])


async def test_scope_of_the_publisher_cancelled_by_a_call(fan: Fan) -> None:
    """A call that cancels a scope which the publisher opened ends the fan-out, siblings included."""
    with anyio.CancelScope() as scope:

        async def cancels() -> None:
            await checkpoint()
            scope.cancel()

        await fan([cancels, anyio.sleep_forever])
        pytest.fail("the fan-out returned")
    assert scope.cancelled_caught


async def test_current_task_is_one_and_the_same(fan: Fan) -> None:
    """A call stays in one task from its first step to its last."""

    async def stays() -> None:
        task = anyio.get_current_task().id
        for _ in range(5):
            await checkpoint()
            assert anyio.get_current_task().id == task

    assert [None] * 4 == await fan([stays, quiet, stays, stays])


async def test_contexts_are_isolated(fan: Fan) -> None:
    """A call sees the publisher's context variables; what it sets is seen by nobody else."""
    seen = list[str]()

    async def moves(to: str) -> None:
        seen.append(place.get())
        place.set(to)
        await checkpoint()
        assert place.get() == to

    async def looks() -> None:
        await checkpoint()
        seen.append(place.get())

    token = place.set("home")
    assert [None] * 4 == await fan([partial(moves, "a"), partial(moves, "b"), looks, looks])
    assert ["home"] * 4 == seen
    assert place.get() == "home"
    place.reset(token)


async def test_reset_inside_a_call(fan: Fan) -> None:
    """A call can reset what it set, whatever happened in between."""

    async def sets_and_resets() -> None:
        token = place.set("away")
        await checkpoint()
        place.reset(token)

    assert [None] * 3 == await fan([sets_and_resets] * 3)


class Exit(BaseException):
    """Be what no handler may swallow."""


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), Exit()], ids=repr)
async def test_exit_of_a_call_ends_the_others_and_comes_back(error: BaseException) -> None:
    """What is no Exception stops the siblings at once and stands at its place, with what failed before."""
    stopped, first = list[str](), ValueError()

    async def sibling() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            stopped.append("sibling")

    async def at_once() -> None:
        raise first

    assert [first, error, None] == await fan_out([at_once, partial(fails, error), sibling])
    assert ["sibling"] == stopped


async def test_cancellation_that_a_call_made_up_is_its_failure() -> None:
    """A call that raises a cancellation nobody asked for has failed; its siblings go on."""
    done = list[str]()

    async def sibling() -> None:
        for _ in range(5):
            await checkpoint()
        done.append("sibling")

    invented, none = await fan_out([invents_cancellation, sibling])
    assert isinstance(invented, RuntimeError)
    assert isinstance(invented.__cause__, anyio.get_cancelled_exc_class())
    assert none is None
    assert ["sibling"] == done


@asyncio_only
async def test_call_that_cancels_its_own_task_has_failed() -> None:
    """A call in a task of its own that cancels this task natively has failed; its siblings go on."""
    done = list[str]()

    async def ends_itself() -> None:
        await checkpoint()
        ends_task()
        await checkpoint()

    async def sibling() -> None:
        for _ in range(5):
            await checkpoint()
        done.append("sibling")

    none, failure, also_none = await fan_out([sibling, ends_itself, sibling])
    assert isinstance(failure, RuntimeError)
    assert none is also_none is None
    assert ["sibling"] * 2 == done
    assert not cut_short()


def ends_task() -> None:
    """Cancel the current task natively."""
    task = asyncio.current_task()
    assert task is not None
    task.cancel()


@asyncio_only
@pytest.mark.parametrize("swallows", [False, True])
@pytest.mark.parametrize("siblings", [0, 2])
async def test_first_call_that_cancels_its_task_cancels_the_publisher(siblings: int, swallows: bool) -> None:
    """The first call that suspends is in the publisher's task, whose cancellation it cannot swallow either."""
    returned = False

    async def ends_publisher() -> None:
        await checkpoint()
        ends_task()
        try:
            await checkpoint()
        except CancelledError:
            if not swallows:
                raise

    async def publisher() -> None:
        nonlocal returned
        await fan_out([ends_publisher, *[anyio.sleep_forever] * siblings])
        returned = True

    task = asyncio.create_task(publisher())
    with pytest.raises(CancelledError):
        await task
    assert task.cancelled()
    assert not returned


async def invents_cancellation() -> None:
    """Raise the cancellation of a scope that is over."""
    kept: BaseException | None = None
    with anyio.CancelScope() as scope:
        scope.cancel()
        try:
            await checkpoint()
        except anyio.get_cancelled_exc_class() as error:
            kept = error
    assert kept is not None
    raise kept


async def test_what_is_a_failure() -> None:
    """Exceptions are failures, also out of a group with cancellations; exits are not."""
    cancelled = anyio.get_cancelled_exc_class()
    value = ValueError()
    with anyio.CancelScope() as scope:
        scope.cancel()
        try:
            await checkpoint()
        except cancelled as error:
            cancellation = error
    mixed = failure_in(BaseExceptionGroup("", [value, cancellation]))
    assert isinstance(mixed, ExceptionGroup)
    assert (value,) == mixed.exceptions
    assert isinstance(failure_in(BaseExceptionGroup("", [cancellation])), RuntimeError)
    assert isinstance(failure_in(cancellation), RuntimeError)
    assert failure_in(value) is value
    assert failure_in(SystemExit()) is None
    assert failure_in(BaseExceptionGroup("", [value, SystemExit()])) is None


async def test_cut_short_by_a_scope() -> None:
    """A task is cut short from its scope's cancellation to its end, and not under a shield."""
    assert not cut_short()
    with anyio.CancelScope() as scope:
        scope.cancel()
        assert cut_short()
        with anyio.CancelScope(shield=True):
            await checkpoint()
            assert not cut_short()
    assert not cut_short()


@asyncio_only
async def test_cut_short_natively() -> None:
    """A task is cut short by asyncio's own cancellation too, until it is taken back."""
    seen = list[bool]()

    async def waits() -> None:
        try:
            await asyncio.sleep(100)
        except asyncio.CancelledError:
            seen.append(cut_short())
            raise

    task = asyncio.create_task(waits())
    await anyio.wait_all_tasks_blocked()
    task.cancel()
    with pytest.raises(CancelledError):
        await task
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.001):
            await asyncio.sleep(100)
    assert [True] == seen
    assert not cut_short()


def test_cut_short_without_an_event_loop() -> None:
    """Where no event loop runs any more, everything is cut short."""
    assert cut_short()


# isolated


async def test_isolated_returns_and_raises() -> None:
    """What is isolated returns its result, or raises its error."""

    async def doubles(number: int) -> int:
        await checkpoint()
        return number * 2

    assert await isolated(partial(doubles, 21)) == 42
    wrong = ValueError()
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        await isolated(partial(fails, wrong))
    assert wrong is caught.value


async def test_isolated_keeps_its_context_to_itself() -> None:
    """What is set inside stays there over suspensions and can be reset; what is set outside is seen."""

    async def moves() -> str:
        before = place.get()
        token = place.set("inside")
        await checkpoint()
        assert place.get() == "inside"
        place.reset(token)
        place.set("left inside")
        return before

    place.set("outside")
    assert await isolated(moves) == "outside"
    assert place.get() == "outside"


async def test_isolated_stays_in_its_task() -> None:
    """The task is the caller's; its scopes, locks and groups work, also over suspensions."""
    task, lock = anyio.get_current_task().id, anyio.Lock()

    async def works() -> str:
        assert anyio.get_current_task().id == task
        with anyio.move_on_after(0.005) as scope:
            await anyio.sleep_forever()
        assert scope.cancelled_caught
        async with lock, anyio.create_task_group() as group:
            group.start_soon(anyio.sleep, 0)
            await checkpoint()
        with pytest.raises(TimeoutError), anyio.fail_after(0.005):
            await anyio.sleep_forever()
        assert anyio.get_current_task().id == task
        return "done"

    assert await isolated(works) == "done"


async def test_isolated_is_cancelled_from_outside() -> None:
    """A cancellation reaches what is isolated at its await, and may be cleaned up after there."""
    ended = list[str]()

    async def waits() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                await checkpoint()
            ended.append(place.get())

    place.set("here")
    with anyio.move_on_after(0.005) as scope:
        await isolated(waits)
    assert scope.cancelled_caught
    assert ["here"] == ended


async def test_tasks_started_in_isolation_inherit_its_context() -> None:
    """A task started inside sees what was set inside."""
    seen = list[str]()

    async def looks() -> None:
        seen.append(place.get())

    async def starts() -> None:
        place.set("inside")
        async with anyio.create_task_group() as group:
            group.start_soon(looks)

    await isolated(starts)
    assert ["inside"] == seen


@asyncio_only
async def test_asyncio_timeout_in_isolation() -> None:
    """Asyncio's timeout works inside, and its native cancellation ends only what it is around."""

    async def hurried() -> str:
        try:
            async with asyncio.timeout(0.005):
                await asyncio.sleep(100)
        except TimeoutError:
            await asyncio.sleep(0)
        return "on time"

    assert await isolated(hurried) == "on time"


def test_isolated_is_a_good_coroutine() -> None:
    """Values sent and errors thrown arrive inside, in the inner context; closing closes inside."""
    seen = list[object]()

    class Yields:
        def __await__(self) -> Any:
            return (yield place.get())

    async def steps() -> str:
        place.set("inside")
        seen.append(await Yields())
        try:
            await Yields()
        except KeyError as error:
            seen.extend([error, place.get()])
        try:
            await Yields()
        finally:
            seen.append(place.get())
        return "never"

    async def outer() -> str:
        return await isolated(steps)

    thrown, coroutine = KeyError(), outer()
    assert coroutine.send(None) == "inside"
    assert coroutine.send("sent") == "inside"
    assert coroutine.throw(thrown) == "inside"
    coroutine.close()
    assert ["sent", thrown, "inside", "inside"] == seen
    assert place.get() == "nowhere"


def test_isolated_result_right_after_a_throw() -> None:
    """A coroutine that returns in answer to an error thrown into it has returned."""

    class Yields:
        def __await__(self) -> Any:
            yield

    async def forgives() -> str:
        try:
            await Yields()
        except KeyError:
            return "forgiven"
        return "never"

    async def outer() -> str:
        return await isolated(forgives)

    coroutine = outer()
    coroutine.send(None)
    with pytest.raises(StopIteration) as stopped:
        coroutine.throw(KeyError())
    assert stopped.value.value == "forgiven"


def test_isolated_left_unfinished_is_closed() -> None:
    """A coroutine that is dropped half way runs its clean-up in its own context."""
    seen = list[str]()

    class Yields:
        def __await__(self) -> Any:
            yield

    async def waits() -> None:
        place.set("inside")
        try:
            await Yields()
        finally:
            seen.append(place.get())

    async def outer() -> None:
        await isolated(waits)

    coroutine: Coroutine[Any, Any, None] | None = outer()
    assert coroutine is not None
    coroutine.send(None)
    coroutine = None
    gc.collect()
    assert ["inside"] == seen
