"""A clock that stands still until a test moves it."""

import heapq
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from itertools import count

import anyio
import anyio.lowlevel

from eventbus.context import current

__all__ = ("VirtualClock",)

MOMENT = 1e-6
"""Seconds within which two times are the same one: sums of the same waits differ by less."""


class VirtualClock:
    """Hold time still; ``jump`` fires every timer up to a moment.

    >>> VirtualClock(start=100.0).now()
    100.0
    """

    def __init__(self, start: float = 1_767_225_600.0) -> None:
        self._start = start
        self._passed = 0.0
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._cancelled: set[int] = set()
        self._count = count()
        self.waking = 0
        """Sleepers and scopes whose time has come and that have not gone on yet."""
        self.timed = 0
        """Handlings under way that this clock will end: their timeouts."""

    def now(self) -> float:
        """Return the held time in seconds since the epoch."""
        return self._start + self._passed

    def monotonic(self) -> float:
        """Return the seconds passed since the clock was made."""
        return self._passed

    async def sleep(self, seconds: float) -> None:
        """Wait until the clock has been moved so far."""
        if seconds <= 0:
            await anyio.lowlevel.checkpoint()
            return
        event = anyio.Event()

        def fire() -> None:
            self.waking += 1
            event.set()

        number = self._at(self._passed + seconds, fire)
        try:
            await event.wait()
        finally:
            if event.is_set():
                self.waking -= 1
            else:
                self._cancelled.add(number)

    def move_on_after(self, seconds: float) -> AbstractContextManager[anyio.CancelScope]:
        """Return a scope that is cancelled when the clock has been moved so far."""
        return self._scope(seconds)

    @contextmanager
    def _scope(self, seconds: float) -> Generator[anyio.CancelScope]:
        handling = current.get() is not None
        with anyio.CancelScope() as scope:
            if seconds <= 0:
                scope.cancel()
                yield scope
                return
            fired = False

            def fire() -> None:
                nonlocal fired
                fired = True
                self.waking += 1
                scope.cancel()

            number = self._at(self._passed + seconds, fire)
            self.timed += handling
            try:
                yield scope
            finally:
                self.timed -= handling
                if fired:
                    self.waking -= 1
                else:
                    self._cancelled.add(number)

    def next_due(self) -> float | None:
        """Return when, in ``monotonic`` time, the next timer fires, or None."""
        while self._timers and self._timers[0][1] in self._cancelled:
            self._cancelled.discard(heapq.heappop(self._timers)[1])
        return self._timers[0][0] if self._timers else None

    def jump(self, moment: float) -> None:
        """Move to ``moment`` of ``monotonic`` time, never back, and fire what is due by then."""
        self._passed = max(self._passed, moment)
        while (due := self.next_due()) is not None and due <= self._passed + MOMENT:
            self._passed = max(self._passed, due)
            heapq.heappop(self._timers)[2]()

    def _at(self, moment: float, fire: Callable[[], None]) -> int:
        number = next(self._count)
        heapq.heappush(self._timers, (moment, number, fire))
        return number
