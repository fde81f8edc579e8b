"""The virtual clock: time passes only when it is told to, and everything due then happens in order."""

from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint
from hypothesis import given
from hypothesis import strategies as st

from eventbus.clock import Clock, SystemClock
from eventbus.testing import VirtualClock


async def turns() -> None:
    """Let everybody else go on until they wait for something."""
    for _ in range(20):
        await checkpoint()


def test_time_stands_still() -> None:
    """Wall-clock time starts where it is told, monotonic time at zero; both move together, never back."""
    clock: Clock = VirtualClock(start=1_000.0)
    assert (1_000.0, 0.0) == (clock.now(), clock.monotonic())
    assert isinstance(clock, VirtualClock)
    clock.jump(2.5)
    assert (1_002.5, 2.5) == (clock.now(), clock.monotonic())
    clock.jump(1.0)
    assert (1_002.5, 2.5) == (clock.now(), clock.monotonic())


async def test_sleepers_wake_at_their_times() -> None:
    """A jump wakes all whose time has come, and nobody else."""
    clock, woken = VirtualClock(), list[int]()

    async def sleeps(seconds: int) -> None:
        await clock.sleep(seconds)
        woken.append(seconds)

    async with anyio.create_task_group() as group:
        for seconds in (3, 1, 2):
            group.start_soon(sleeps, seconds)
        await turns()
        assert clock.next_due() == 1.0
        clock.jump(1.999)
        assert clock.waking == 1
        await turns()
        assert ([1], 0, 2.0) == (woken, clock.waking, clock.next_due())
        clock.jump(10)
        await turns()
        assert [1, 2, 3] == sorted(woken)
    assert clock.next_due() is None


async def test_sleeping_no_time_is_a_checkpoint() -> None:
    """Zero or less takes no time, but lets others go on."""
    clock, seen = VirtualClock(), list[str]()

    async def other() -> None:
        seen.append("other")

    async with anyio.create_task_group() as group:
        group.start_soon(other)
        while not seen:
            await clock.sleep(0)
        await clock.sleep(-1)
    assert clock.next_due() is None


async def test_scope_is_cancelled_in_time() -> None:
    """A scope ends what is in it when its time has come; one that was left in time never fires."""
    clock, ended = VirtualClock(), list[float]()

    async def waits(seconds: float) -> None:
        with clock.move_on_after(seconds) as scope:
            await anyio.sleep_forever()
        assert scope.cancelled_caught
        ended.append(seconds)

    with clock.move_on_after(1) as scope:
        await checkpoint()
    assert not scope.cancelled_caught
    assert clock.next_due() is None
    async with anyio.create_task_group() as group:
        group.start_soon(waits, 5)
        group.start_soon(waits, 7)
        await turns()
        clock.jump(6)
        await turns()
        assert [5] == ended
        clock.jump(7)
    assert [5, 7] == ended
    assert (0, 0) == (clock.waking, clock.timed)


@pytest.mark.parametrize("seconds", [0, -1])
async def test_scope_without_time_is_cancelled_at_once(seconds: float) -> None:
    """A scope of no time cancels at its first checkpoint, without any jump."""
    with VirtualClock().move_on_after(seconds) as scope:
        await anyio.sleep_forever()
    assert scope.cancelled_caught


async def test_cancelled_sleeper_leaves_no_timer() -> None:
    """Whoever is cancelled while sleeping is forgotten."""
    clock = VirtualClock()
    for _ in range(3):
        with anyio.move_on_after(0.001):
            await clock.sleep(5)
    assert clock.next_due() is None
    clock.jump(10)
    assert clock.waking == 0


async def test_cancelled_in_the_moment_of_waking() -> None:
    """Whoever is woken and cancelled at once is counted as gone on."""
    clock = VirtualClock()
    async with anyio.create_task_group() as group:
        group.start_soon(clock.sleep, 1)
        await turns()
        clock.jump(1)
        group.cancel_scope.cancel()
    assert clock.waking == 0


def test_same_moment() -> None:
    """Times that differ only by the rounding of sums are one moment."""
    clock, fired = VirtualClock(), list[int]()
    clock._at(0.1 + 0.2, lambda: fired.append(1))
    clock.jump(0.3)
    assert [1] == fired
    assert clock.monotonic() == 0.1 + 0.2


@given(st.lists(st.tuples(st.floats(0.001, 100), st.booleans()), max_size=20))
async def test_timers_fire_in_order_and_once(plan: list[tuple[float, bool]]) -> None:
    """Whatever sleeps and is cancelled, walking through the due times wakes the rest in order, each at its time."""
    clock, woken = VirtualClock(), list[tuple[float, float]]()

    async def sleeps(seconds: float, scope: anyio.CancelScope) -> None:
        with scope:
            await clock.sleep(seconds)
            woken.append((seconds, clock.monotonic()))

    async with anyio.create_task_group() as group:
        scopes = [anyio.CancelScope() for _ in plan]
        for (seconds, _), scope in zip(plan, scopes, strict=True):
            group.start_soon(sleeps, seconds, scope)
        await turns()
        for (_, cancelled), scope in zip(plan, scopes, strict=True):
            if cancelled:
                scope.cancel()
        await turns()
        while (due := clock.next_due()) is not None:
            clock.jump(due)
            await turns()
    expected = sorted(seconds for seconds, cancelled in plan if not cancelled)
    assert expected == sorted(seconds for seconds, _ in woken)
    moments = [moment for _, moment in woken]
    assert sorted(moments) == moments
    assert all(abs(moment - seconds) < 1e-5 for seconds, moment in woken)


async def test_system_clock_keeps_real_time() -> None:
    """The system's clock sleeps and cancels for real."""
    clock: Any = SystemClock()
    before = clock.monotonic()
    await clock.sleep(0.01)
    assert 0.005 < clock.monotonic() - before < 20
    with clock.move_on_after(0.01) as scope:
        await anyio.sleep_forever()
    assert scope.cancelled_caught
    assert clock.now() > 1_700_000_000
