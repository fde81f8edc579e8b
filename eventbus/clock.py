"""Time, chance and identity as the engine gets them, so that tests can hold them still."""

import os
import time
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from random import Random
from typing import Protocol

import anyio

__all__ = ("Clock", "Ids", "Runtime", "Setback", "SystemClock", "farthest", "new_id")

CHANCE = 10
"""Random bytes of an id."""
FETCHED = 64
"""Ids for which chance is fetched at once."""
STEADY = 1_000
"""Milliseconds by which a clock may lag behind without having been set back."""
FARTHEST = 3_600.0
"""Seconds from now at which a lease of whatever process may end."""


class Clock(Protocol):
    """Say what the engine asks of time; it never asks the operating system itself."""

    def now(self) -> float:
        """Return the wall-clock time in seconds since the epoch."""
        ...

    def monotonic(self) -> float:
        """Return seconds that only ever grow."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Wait for so many seconds."""
        ...

    def move_on_after(self, seconds: float) -> AbstractContextManager[anyio.CancelScope]:
        """Return a scope that is cancelled after so many seconds (enter it in the task it is for)."""
        ...


class SystemClock:
    """Tell the time of this machine."""

    def now(self) -> float:
        """Return the wall-clock time in seconds since the epoch."""
        return time.time()

    def monotonic(self) -> float:
        """Return seconds that only ever grow."""
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        """Wait for so many seconds."""
        await anyio.sleep(seconds)

    def move_on_after(self, seconds: float) -> AbstractContextManager[anyio.CancelScope]:
        """Return a scope that is cancelled after so many seconds."""
        return anyio.move_on_after(seconds)


def farthest(lease: float) -> int:
    """Return how many milliseconds from now a lease may end, also that of a process with other limits.

    What ends later comes from a clock that jumped.
    """
    return round(1000 * max(2 * lease, FARTHEST))


class Setback:
    """Notice that a store's clock was set back, by this process's monotonic one, and have mended what would freeze."""

    def __init__(self, clock: Clock | None) -> None:
        self._monotonic = time.monotonic if clock is None else clock.monotonic
        self._mark: tuple[int, float] | None = None
        """What the store's clock showed in milliseconds, and this process's own in seconds, at the same moment."""

    async def mend(
        self, look: Callable[[], Awaitable[tuple[int, int]]], hasten: Callable[[int], Awaitable[int]], batch: int
    ) -> int:
        """Have a batch of rows hastened if the clock was set back; return how many.

        ``look`` returns what the store's clock shows, and what somebody saw it show last: the first mark of this
        process. ``hasten`` takes by how much the clock was set back; the mark stays until it finds less than a batch.
        """
        asked = self._monotonic()
        now, seen = await look()
        answered = self._monotonic()  # a slow answer must not look like a clock that was set back
        mark, since = self._mark or (seen, asked)
        self._mark = mark, since
        back = mark + round((asked - since) * 1000) - now
        hastened = await hasten(back) if back > STEADY else 0
        if hastened < batch:
            self._mark = now, answered
        return hastened


def new_id() -> str:
    """Return a UUID of version 7 (RFC 9562 §5.7) as text: unique, and ordered by the millisecond of its making."""
    return _moment(_millisecond()) + _chance(os.urandom(CHANCE).hex())


class Ids:
    """Make ids as ``new_id`` does, from chance that is fetched for many at once.

    Fetching lets other threads run, and waiting for them takes longer than all the rest. A process that was forked
    off would make the same ids again: ``forget`` lets go of what was fetched before.
    """

    def __init__(self) -> None:
        self._fetched: deque[str] = deque()
        self._last = (0, "")

    def __call__(self) -> str:
        """Return a new id; safe from any thread."""
        now, last = _millisecond(), self._last
        if last[0] != now:
            last = self._last = now, _moment(now)
        try:
            return last[1] + self._fetched.pop()
        except IndexError:
            chance = os.urandom(CHANCE * FETCHED).hex()
            self._fetched.extend(_chance(chance[at : at + 2 * CHANCE]) for at in range(0, len(chance), 2 * CHANCE))
            return new_id()

    def forget(self) -> None:
        """Let go of the chance fetched so far."""
        self._fetched.clear()


def _millisecond() -> int:
    return time.time_ns() // 1_000_000


def _moment(millisecond: int) -> str:
    """Return the part of an id that tells when it was made."""
    moment = f"{millisecond & 0xFFFF_FFFF_FFFF:012x}"
    return f"{moment[:8]}-{moment[8:]}"


def _chance(digits: str) -> str:
    """Return the rest of an id, made of random hexadecimal digits."""
    return f"-7{digits[:3]}-{'89ab'[int(digits[3], 16) & 3]}{digits[4:7]}-{digits[7:19]}"


@dataclass(frozen=True, slots=True)
class Runtime:
    """Hold the time, chance and identity of one bus."""

    clock: Clock = field(default_factory=SystemClock)
    ids: Callable[[], str] = field(default_factory=Ids)
    random: Random = field(default_factory=Random)
