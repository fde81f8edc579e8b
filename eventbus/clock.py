"""Time, chance and identity as the engine gets them, so that tests can hold them still."""

import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from random import Random
from typing import Protocol
from uuid import UUID

import anyio

__all__ = ("Clock", "Runtime", "SystemClock", "new_id")


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
    bits = (time.time_ns() // 1_000_000 & 0xFFFF_FFFF_FFFF) << 80 | int.from_bytes(os.urandom(10))
    bits = bits & ~(0xF << 76) | 0x7 << 76
    bits = bits & ~(0x3 << 62) | 0x2 << 62
    return str(UUID(int=bits))


@dataclass(frozen=True, slots=True)
class Runtime:
    """Hold the time, chance and identity of one bus."""

    clock: Clock = field(default_factory=SystemClock)
    ids: Callable[[], str] = new_id
    random: Random = field(default_factory=Random)
