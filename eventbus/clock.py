"""Time, chance and identity as the engine gets them, so that tests can hold them still."""

import os
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from random import Random
from typing import Protocol

import anyio

__all__ = ("Clock", "Ids", "Runtime", "SystemClock", "new_id")

CHANCE = 10
"""Random bytes of an id."""
FETCHED = 64
"""Ids for which chance is fetched at once."""


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


def new_id() -> str:
    """Return a UUID of version 7 (RFC 9562 §5.7) as text: unique, and ordered by the millisecond of its making."""
    return _uuid7(os.urandom(CHANCE).hex())


class Ids:
    """Make ids as ``new_id`` does, from chance that is fetched for many at once.

    Fetching lets other threads run, and waiting for them takes longer than all the rest. A process that was forked
    off would make the same ids again: ``forget`` lets go of what was fetched before.
    """

    def __init__(self) -> None:
        self._fetched: deque[str] = deque()

    def __call__(self) -> str:
        """Return a new id; safe from any thread."""
        try:
            return _uuid7(self._fetched.pop())
        except IndexError:
            chance = os.urandom(CHANCE * FETCHED).hex()
            self._fetched.extend(chance[start : start + 2 * CHANCE] for start in range(0, len(chance), 2 * CHANCE))
            return new_id()

    def forget(self) -> None:
        """Let go of the chance fetched so far."""
        self._fetched.clear()


def _uuid7(chance: str) -> str:
    moment = f"{time.time_ns() // 1_000_000 & 0xFFFF_FFFF_FFFF:012x}"
    variant = "89ab"[int(chance[3], 16) & 3]
    return f"{moment[:8]}-{moment[8:]}-7{chance[:3]}-{variant}{chance[4:7]}-{chance[7:19]}"


@dataclass(frozen=True, slots=True)
class Runtime:
    """Hold the time, chance and identity of one bus."""

    clock: Clock = field(default_factory=SystemClock)
    ids: Callable[[], str] = field(default_factory=Ids)
    random: Random = field(default_factory=Random)
