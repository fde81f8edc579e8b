"""Keep entries in an SQLite file, with the standard library alone."""

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self, TypeVar
from urllib.parse import unquote

import anyio

from eventbus._urls import options_of, split_url
from eventbus.clock import Clock, Setback
from eventbus.errors import StoreError
from eventbus.limits import Limits
from eventbus.store import (
    Backlog,
    Claimed,
    DeadEntry,
    DeadFilter,
    Interest,
    NewEntry,
    Recipient,
    Settlement,
)
from eventbus.stores._sqlite_file import File
from eventbus.stores._sqlite_line import Job, Line, Verb
from eventbus.stores._sqlite_rows import Rows
from eventbus.stores._sqlite_sweeping import hasten, look, sweep
from eventbus.stores._sqlite_unit import SQLiteSession, SQLiteUnit

__all__ = ("SQLiteSession", "SQLiteStore")

T = TypeVar("T")

POLL = 0.1
"""Seconds between two looks at whether another process has written."""
BATCH = 1_000
"""Rows that one step of ``forget``, or of a rename, writes before it lets others write."""
DEFAULTS = Limits()


def _version(rows: Rows, now: int) -> int:  # noqa: ARG001 - every verb takes it
    version: int = rows.connection.execute("PRAGMA data_version").fetchone()[0]
    return version


class SQLiteStore:
    """Keep entries in an SQLite file: durable at commit, shared by the processes of one machine.

    Args:
        path: the file; created, readable by its owner only, when it is not there. A symbolic link is refused.
        synchronous: ``"full"``, or ``"normal"`` for those who accept to lose the last moments at a power loss.
        limits: ``lease`` is also how long another process, or a silent transaction, may keep the file locked;
            ``waiting`` is the ceiling of a silent handler; ``batch`` is how many verbs are committed together.

    Verbs raise ``StoreFullError`` when there is no room, ``StoreError`` when the file is read-only, corrupt, gone,
    locked for too long or of a newer schema; nothing that was confirmed is lost, and when the cause is gone the store
    goes on.

    >>> SQLiteStore("shop.db").shared
    True
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        synchronous: Literal["full", "normal"] = "full",
        limits: Limits = DEFAULTS,
    ) -> None:
        if synchronous not in ("full", "normal"):
            raise ValueError('synchronous= is "full" or "normal"')
        if not os.fspath(path) or os.fspath(path) == ":memory:":
            raise ValueError("an SQLite store needs a file; what is to live in memory only is memory://")
        self._path = Path(path).absolute()
        self._synchronous = synchronous
        self._limits = limits
        self._clock: Clock | None = None
        self._setback = Setback(None)
        self._lines: tuple[Line, Line] | None = None

    @classmethod
    def from_url(cls, url: str, *, limits: Limits = DEFAULTS) -> Self:
        """Return the store of ``sqlite:///relative.db`` or ``sqlite:////absolute.db``, ``?synchronous=normal``.

        Raises ``ValueError`` for anything else.
        """
        parts = split_url(url)
        if parts.scheme != "sqlite" or parts.netloc or parts.fragment:
            raise ValueError("an SQLite store is named sqlite:///relative.db or sqlite:////absolute.db")
        synchronous: Any = options_of(parts, ("synchronous",)).get("synchronous", "full")
        return cls(unquote(parts.path[1:]), synchronous=synchronous, limits=limits)

    @property
    def shared(self) -> bool:
        """Tell that other processes see this store."""
        return True

    @property
    def exclusive(self) -> bool:
        """Tell that an open transaction keeps every other writer out."""
        return True

    @property
    def sessions(self) -> tuple[type, ...]:
        """Return what ``Transaction[S]`` may name."""
        return (SQLiteSession,)

    def bind(self, clock: Clock | None) -> None:
        """Take times from ``clock`` instead of this machine; None goes back."""
        self._clock, self._setback = clock, Setback(clock)

    async def __aenter__(self) -> Self:
        """Open the file. Raises ``StoreError``."""
        if self._lines is not None and self._lines[0].is_open:
            raise StoreError(f"the store of {self._path} is open already")
        file, lines = File(self._path, self._synchronous, self._limits), list[Line]()
        try:
            for begin in ("BEGIN IMMEDIATE", "BEGIN"):
                lines.append(Line(file, begin))
                await lines[-1].open()
        except BaseException:
            for line in lines:
                await line.close()
            raise
        self._lines = (lines[0], lines[1])
        return self

    async def __aexit__(self, *exc: object) -> None:
        """Close; what was committed stays, open transactions are rolled back."""
        if self._lines is not None:
            (writer, reader), self._lines = self._lines, None
            try:
                await reader.close()
            finally:  # the writer goes last, so that what is in the log goes into the file
                await writer.close()

    def begin(self, session: object | None = None) -> AbstractAsyncContextManager[SQLiteUnit]:
        """Return a transaction; it takes the writer at its first statement, not before.

        Raises ``ValueError`` for a session: this store makes its own.
        """
        if session is not None:
            raise ValueError("an SQLite store makes its own sessions: open the transaction without session=")
        return SQLiteUnit(self._open()[0], self._now)

    async def add(self, entries: Sequence[NewEntry]) -> frozenset[str]:
        """Write entries; return the recipients written to."""
        return await self._write(partial(Rows.add, entries=tuple(entries)))

    async def claim(self, recipient: Recipient, *, owner: str, limit: int, lease: float, cursor: str = "") -> Claimed:
        """Lease up to ``limit`` due entries; if the caller is cancelled meanwhile they are released."""
        verb = partial(Rows.claim, recipient=recipient, owner=owner, limit=limit, lease=lease, cursor=cursor)
        return await self._write(verb, self._give_back)

    def _give_back(self, claimed: Claimed) -> None:
        released = [Settlement(entry.seq, entry.claims, "release") for entry in claimed.entries]
        if released and self._lines is not None and self._lines[0].is_open:
            self._lines[0].put(Job(partial(Rows.settle, settlements=released), self._now()))

    async def settle(self, settlements: Sequence[Settlement]) -> frozenset[int]:
        """Write many settlements; return the seqs whose lease was lost."""
        return await self._write(partial(Rows.settle, settlements=tuple(settlements)))

    async def extend(self, held: Sequence[tuple[int, int]], lease: float) -> frozenset[int]:
        """Renew leases; return the seqs whose lease was lost."""
        return await self._write(partial(Rows.extend, held=tuple(held), lease=lease))

    async def announce(self, interests: Sequence[Interest], *, aliases: Sequence[tuple[str, str]] = ()) -> None:
        """Write interests with the time; move entries of old names to the new ones."""
        await self._write(partial(Rows.announce, interests=tuple(interests)))
        for old, new in aliases:
            while old != new and await self._write(partial(Rows.rename, old=old, new=new, batch=BATCH)):
                pass

    async def forget(self, recipient: str) -> int:
        """Drop a recipient's interests and make its waiting entries dead; return how many."""
        forgotten = more = await self._write(partial(Rows.forget, name=recipient, batch=BATCH))
        while more:
            more = await self._write(partial(Rows.forget, name=recipient, batch=BATCH))
            forgotten += more
        return forgotten

    async def due(self, recipients: Sequence[str]) -> dict[str, float]:
        """Return for each recipient with waiting entries the seconds until its first can be claimed."""
        return await self._read(partial(Rows.due, recipients=tuple(recipients)))

    async def sweep(self, *, retention: float, lease: float, batch: int) -> int:
        """Prune what is older than ``retention``, and mend what a clock that jumped has done."""
        swept = await self._write(partial(sweep, retention=retention, lease=lease, batch=batch))

        async def mend(back: int) -> int:
            return await self._write(partial(hasten, back=back, lease=round(lease * 1000), batch=batch))

        return swept + await self._setback.mend(lambda: self._read(look), mend, batch)

    async def backlog(self) -> Sequence[Backlog]:
        """Count what waits and what is dead, per recipient."""
        return await self._read(Rows.backlog)

    async def dead(self, chosen: DeadFilter) -> Sequence[DeadEntry]:
        """Return chosen dead entries, oldest first."""
        return await self._read(partial(Rows.dead, chosen=chosen))

    async def replay(self, chosen: DeadFilter) -> Mapping[str, int]:
        """Make chosen dead entries due now, failures forgotten; return how many per recipient."""
        return await self._write(partial(Rows.replay, chosen=chosen))

    async def discard(self, chosen: DeadFilter) -> int:
        """Forget chosen dead entries but for their ids; return how many."""
        return await self._write(partial(Rows.discard, chosen=chosen))

    async def listen(self, wake: Callable[[], None]) -> None:
        """Call ``wake`` when the file was written to, until cancelled; with a bound clock nothing else writes."""
        seen: int | None = None
        while self._clock is None:
            version = seen
            with contextlib.suppress(StoreError):  # the verbs will tell
                version = await self._read(_version)
            if version != seen is not None:
                wake()
            seen = version
            await anyio.sleep(POLL)
        await anyio.sleep_forever()

    def _now(self) -> int | None:
        return None if self._clock is None else round(self._clock.now() * 1000)

    def _open(self) -> tuple[Line, Line]:
        if self._lines is None:
            raise StoreError(f"the store of {self._path} is not open: use it within `async with store:`")
        return self._lines

    async def _write(self, verb: Verb[T], undo: Callable[[T], object] | None = None) -> T:
        return await self._open()[0].call(verb, self._now(), undo)

    async def _read(self, verb: Verb[T]) -> T:
        return await self._open()[1].call(verb, self._now())
