"""What every check of the store exam stands on: an open store on empty tables, and a clock that is moved by hand."""

from collections.abc import Awaitable, Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import anyio

from eventbus.limits import Limits
from eventbus.store import Claimed, DeadEntry, DeadFilter, Entry, Interest, NewEntry, Recipient, Settlement, Store

__all__ = ("DAY", "LEASE", "LIMITS", "Check", "Desk", "H", "HandClock", "O", "checks", "equal", "require")

LIMITS = Limits(waiting=8)
"""The limits that the examined store is to be made with."""
LEASE = 30.0
DAY = 86_400.0
H = Recipient("svc/plain")
"""A handler that is not ordered; the desk has announced it for the type ``t``."""
O = Recipient("svc/ordered", ordered=True)  # noqa: E741 - stands beside H
"""An ordered handler, announced for the type ``o``."""


class HandClock:
    """Stand still until moved; ``jump`` moves the wall clock alone, as an operator does."""

    def __init__(self, start: float = 1_800_000_000.0) -> None:
        self._now = start
        self._monotonic = 1_000.0

    def now(self) -> float:
        """Return the wall-clock time in seconds since the epoch."""
        return self._now

    def monotonic(self) -> float:
        """Return seconds that only ever grow."""
        return self._monotonic

    async def sleep(self, seconds: float) -> None:
        """Wait in real time: no check needs it."""
        await anyio.sleep(seconds)

    def move_on_after(self, seconds: float) -> AbstractContextManager[anyio.CancelScope]:
        """Return a scope in real time: no check needs it."""
        return anyio.move_on_after(seconds)

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self._now += seconds
        self._monotonic += seconds

    def jump(self, seconds: float) -> None:
        """Set the wall clock forward, or back."""
        self._now += seconds


@dataclass(frozen=True, slots=True)
class Desk:
    """Hold an open store that keeps nothing yet, and the clock that it is bound to."""

    store: Store
    clock: HandClock

    async def publish(self, *ids: str, type: str = "t", key: str | None = None, delay: float = 0.0) -> None:
        """Write a message of each id in a transaction of its own."""
        for id_ in ids:
            await self.store.add([NewEntry(message_id=id_, type=type, body=id_.encode(), key=key, delay=delay)])

    async def take(self, recipient: Recipient = H, *, limit: int = 100, owner: str = "w") -> list[Entry]:
        """Claim until the store has nothing (more) or the limit is reached."""
        taken: list[Entry] = []
        claimed = Claimed()
        for _ in range(1_000):
            free = limit - len(taken)
            claimed = await self.store.claim(recipient, owner=owner, limit=free, lease=LEASE, cursor=claimed.cursor)
            taken += claimed.entries
            if len(taken) >= limit or not (claimed.cursor or claimed.entries):
                return taken
        raise AssertionError("the store never says that it has nothing more")

    async def one(self, recipient: Recipient = H) -> Entry:
        """Claim exactly one."""
        taken = await self.take(recipient)
        require(len(taken) == 1, f"one entry is due, not {ids(taken)}")
        return taken[0]

    async def ids(self, recipient: Recipient = H) -> list[str]:
        """Claim all that is due and return the message ids."""
        return ids(await self.take(recipient))

    async def settle(self, entry: Entry, outcome: str = "done", *, after: float = 0.0, blocks: bool = False) -> bool:
        """Write one settlement; False if its lease was lost."""
        error = "boom" if outcome in {"again", "dead"} else None
        told: Any = outcome  # checks go through outcomes as texts
        return not await self.store.settle([Settlement(entry.seq, entry.claims, told, after, error, blocks)])

    async def kill(self, *ids_: str, blocks: bool = False) -> list[DeadEntry]:
        """Publish messages for ``H`` and let them die, a second apart; return the dead of ``H``."""
        for id_ in ids_:
            await self.publish(id_)
            for entry in await self.take():
                await self.settle(entry, "dead", blocks=blocks)
            self.clock.advance(1.0)
        return list(await self.store.dead(DeadFilter(handler=H.name)))


@dataclass(frozen=True, slots=True)
class Check:
    """Be one question of the exam."""

    title: str
    run: Callable[[Desk], Awaitable[None]]

    def __str__(self) -> str:
        return self.title


def checks(*runs: Callable[[Desk], Awaitable[None]]) -> tuple[Check, ...]:
    """Return the questions that functions ask; the first line of each docstring is its title."""
    return tuple(Check((run.__doc__ or "").splitlines()[0], run) for run in runs)


def ids(entries: Iterable[Entry]) -> list[str]:
    """Return the message ids of entries."""
    return [entry.message_id for entry in entries]


def equal(found: Any, wanted: Any, what: str) -> None:
    """Raise ``AssertionError`` unless two things are equal."""
    if found != wanted:
        raise AssertionError(f"{what}: {found!r}, not {wanted!r}")


def require(fact: object, otherwise: str) -> None:
    """Raise ``AssertionError`` unless something is so."""
    if not fact:
        raise AssertionError(otherwise)


ANNOUNCED = (Interest(H.name, "t"), Interest(O.name, "o", ordered=True))
"""What the desk announces before a check begins."""
