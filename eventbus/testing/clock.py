"""A clock that stands still until a test moves it."""

import heapq
from collections.abc import Callable, Generator
from contextlib import contextmanager
from itertools import count

import anyio
import anyio.lowlevel

from eventbus.context import current

__all__ = ("Chore", "VirtualClock")

MOMENT = 1e-6
"""Seconds within which two times are the same one: sums of the same waits differ by less."""


class Chore(float):
    """Be seconds after which somebody looks whether there is anything to do; a fraction of them is a chore too.

    >>> type(Chore(30.0) / 3).__name__, type(Chore(30.0) + 1).__name__
    ('Chore', 'float')
    """

    __slots__ = ()

    def __truediv__(self, other: float) -> "Chore":
        return Chore(float(self) / other)


class VirtualClock:
    """Hold time still; ``jump`` fires every timer up to a moment.

    >>> VirtualClock(start=100.0).now()
    100.0
    """

    def __init__(self, start: float = 1_767_225_600.0) -> None:
        self._start = start
        self._passed = 0.0
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._chores: list[tuple[float, int, Callable[[], None]]] = []
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

        number = self._at(self._passed + seconds, fire, chore=isinstance(seconds, Chore))
        try:
            await event.wait()
        finally:
            if event.is_set():
                self.waking -= 1
            else:
                self._cancelled.add(number)

    @contextmanager
    def move_on_after(self, seconds: float) -> Generator[anyio.CancelScope]:
        """Return a scope that is cancelled when the clock has been moved so far."""
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

            number = self._at(self._passed + seconds, fire, chore=isinstance(seconds, Chore) and not handling)
            self.timed += handling
            try:
                yield scope
            finally:
                self.timed -= handling
                if fired:
                    self.waking -= 1
                else:
                    self._cancelled.add(number)

    def next_due(self, *, chores: bool = True) -> float | None:
        """Return when, in ``monotonic`` time, the next timer fires, or None; ``chores=False`` looks past chores."""
        heads = [timers[0][0] for timers in (self._timers, self._chores)[: 1 + chores] if self._tidy(timers)]
        return min(heads, default=None)

    def jump(self, moment: float) -> None:
        """Move to ``moment`` of ``monotonic`` time, never back, and fire what is due by then."""
        self._passed = max(self._passed, moment)
        while (due := self.next_due()) is not None and due <= self._passed + MOMENT:
            self._passed = max(self._passed, due)
            heads = [timers for timers in (self._timers, self._chores) if self._tidy(timers)]
            heapq.heappop(min(heads))[2]()

    def _tidy(self, timers: list[tuple[float, int, Callable[[], None]]]) -> bool:
        """Forget what was cancelled at the head; tell whether anything is left."""
        while timers and timers[0][1] in self._cancelled:
            self._cancelled.discard(heapq.heappop(timers)[1])
        return bool(timers)

    def _at(self, moment: float, fire: Callable[[], None], *, chore: bool = False) -> int:
        number = next(self._count)
        heapq.heappush(self._chores if chore else self._timers, (moment, number, fire))
        return number
