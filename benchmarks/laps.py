"""Time what a contender does on a broker: publish, consume, both at once, and one message at a time."""

from asyncio import Event as Flag
from asyncio import sleep
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from statistics import median
from time import perf_counter

from anyio import create_task_group

from benchmarks.measure import quiet_gc

__all__ = ("RATE", "TASKS", "Contender", "Laps", "Publish", "spread")

TASKS = 64
"""Messages on their way at once, and handlings at once."""
RATE = 200
"""Messages a second where latency is measured."""
Publish = Callable[[int], Awaitable[object]]
"""Return when so many messages are confirmed."""
Contender = Callable[[bool, Callable[[], None]], AbstractAsyncContextManager[Publish]]
"""Connect, and consume or do not: each message is decoded, validated, told to the function, then acknowledged."""


async def spread(count: int, publish: Callable[[int], Awaitable[object]]) -> None:
    """Publish message after message in so many tasks."""
    if count == 1:
        await publish(0)
        return

    async def some(first: int) -> None:
        for number in range(first, count, TASKS):
            await publish(number)

    async with create_task_group() as group:
        for first in range(TASKS):
            group.start_soon(some, first)


class Laps:
    """Be one contender's stop-watch; each lap returns the seconds of one message."""

    def __init__(self, contender: Contender) -> None:
        self._open = contender
        self._expect(0)

    def _expect(self, count: int) -> None:
        self._left, self._done, self._taken = count, Flag(), list[float]()

    def _take(self) -> None:
        self._taken.append(perf_counter())
        self._left -= 1
        if not self._left:
            self._done.set()

    async def publish(self, count: int) -> float:
        """Time the publishing; ``consume`` then finds as many."""
        async with self._open(False, self._take) as publish:
            with quiet_gc():
                start = perf_counter()
                await publish(count)
                return (perf_counter() - start) / count

    async def consume(self, count: int) -> float:
        """Time from the first handling to the last, so that connecting and joining a group are not in it."""
        self._expect(count)
        with quiet_gc():
            async with self._open(True, self._take):
                await self._done.wait()
        return (self._taken[-1] - self._taken[0]) / (count - 1)

    async def whole(self, count: int) -> float:
        """Time publishing and, meanwhile, handling."""
        async with self._open(True, self._take) as publish:
            await self._warm_up(publish)
            self._expect(count)
            with quiet_gc():
                start = perf_counter()
                async with create_task_group() as group:
                    group.start_soon(publish, count)
                    await self._done.wait()
                return (perf_counter() - start) / count

    async def latency(self, count: int) -> float:
        """Return the median from before a publish to the beginning of the handling, at a low rate."""
        sent: list[float] = []
        async with self._open(True, self._take) as publish:
            await self._warm_up(publish)
            self._expect(count)
            for _ in range(count):
                sent.append(perf_counter())
                await publish(1)
                await sleep(1 / RATE)
            await self._done.wait()
        return median(end - start for start, end in zip(sent, self._taken, strict=True))

    async def _warm_up(self, publish: Publish) -> None:
        """Wait until messages come through."""
        self._expect(1)
        await publish(1)
        await self._done.wait()
