"""Keep entries in this process's memory: for tests and first steps, with the semantics of every other store."""

import heapq
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Self

import anyio
from anyio.lowlevel import checkpoint

from eventbus._urls import split_url
from eventbus.clock import Clock, Setback, farthest
from eventbus.errors import StoreError, StoreFullError, TransactionClosedError
from eventbus.limits import Limits
from eventbus.store import DAY, Backlog, Claimed, DeadEntry, DeadFilter, Interest, NewEntry, Recipient, Settlement
from eventbus.stores._memory_box import Box, Row, choose

__all__ = ("MemorySession", "MemoryStore")

DEFAULTS = Limits()


class MemorySession:
    """Be what ``Transaction[MemorySession]`` gives a handler: a store in memory keeps no data of its users."""

    __slots__ = ()


class _Unit:
    """Be one transaction: what is written in it happens at its end, or not at all."""

    def __init__(self, store: "MemoryStore") -> None:
        self._store = store
        self._closed = False
        self._written: list[Sequence[NewEntry] | Settlement] = []
        self._locked: list[Row] = []
        self.session = MemorySession()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: object, error: object, trace: object) -> None:
        self._closed = True
        for row in self._locked:
            row.locked = False
        if kind is None:
            self._store.commit(self._written)

    async def lock(self, seq: int, claims: int) -> bool:
        """Keep a claim until the end; False if the lease is lost."""
        self._check_open("locking an entry")
        await checkpoint()
        row = self._store.held(seq, claims)
        if row is not None and not row.locked:
            row.locked = True
            self._locked.append(row)
        return row is not None and row in self._locked

    async def add(self, entries: Sequence[NewEntry]) -> frozenset[str]:
        """Write entries with the commit; return the recipients that may get something to do."""
        self._check_open("publishing")
        self._written.append(tuple(entries))
        return frozenset(one.name for new in entries for one in self._store.recipients(new))

    def stands(self) -> Callable[[], bool]:
        """Return yes: nobody but the unit makes savepoints here."""
        return lambda: True

    def watch(self, committed: Callable[[], object]) -> bool:
        """Return no: the end of this unit is the commit."""
        return False

    async def settle(self, settlement: Settlement) -> bool:
        """Write a settlement; False if the lease is lost."""
        settled = any(isinstance(one, Settlement) and one.seq == settlement.seq for one in self._written)
        if settled or not await self.lock(settlement.seq, settlement.claims):
            return False
        self._written.append(settlement)
        return True

    @asynccontextmanager
    async def savepoint(self) -> AsyncGenerator[None]:
        """Return a savepoint: rolled back on an exception, released otherwise."""
        self._check_open("a savepoint")
        mark = len(self._written)
        try:
            yield
        except BaseException:
            del self._written[mark:]
            raise

    def _check_open(self, operation: str) -> None:
        if self._closed:
            raise TransactionClosedError(operation)


class MemoryStore:
    """Keep entries in this process's memory.

    Args:
        limits: ``waiting`` is the ceiling of a silent handler.
        capacity: entries kept at most; at the ceiling the memory of what is done goes first, oldest first, then new
            entries raise ``StoreFullError``. Nothing waiting or dead is dropped.

    >>> MemoryStore().shared
    False
    """

    shared = False
    exclusive = False
    sessions: tuple[type, ...] = (MemorySession,)

    def __init__(self, *, limits: Limits = DEFAULTS, capacity: int = 200_000) -> None:
        self._limits = limits
        self._capacity = capacity
        self._clock: Clock | None = None
        self._setback = Setback(None)
        self._seq = 0
        self._rows: dict[int, Row] = {}
        self._once: dict[tuple[str, str], Row] = {}
        self._boxes: dict[str, Box] = {}
        self._owned: dict[int, Row] = {}
        self._dead: dict[int, Row] = {}
        self._over: list[tuple[int, int]] = []
        self._interests: dict[str, dict[str, Recipient]] = {}
        self._seen: dict[str, int] = {}

    @classmethod
    def from_url(cls, url: str, *, limits: Limits = DEFAULTS) -> Self:
        """Return the store of ``memory://``. Raises ``ValueError`` for anything behind it."""
        if split_url(url)[1:] != ("", "", "", ""):
            raise ValueError("memory:// takes nothing behind it")
        return cls(limits=limits)

    def bind(self, clock: Clock | None) -> None:
        """Take times from ``clock`` instead of this machine; None goes back."""
        self._clock, self._setback = clock, Setback(clock)

    async def __aenter__(self) -> Self:
        """Open; what was kept before is still there."""
        return self

    async def __aexit__(self, *exc: object) -> None:
        """Close; what is kept stays."""

    def begin(self, session: object | None = None) -> _Unit:
        """Return a transaction. Raises ``ValueError`` for a session: this store makes its own."""
        if session is not None:
            raise ValueError("a memory store makes its own sessions: open the transaction without session=")
        return _Unit(self)

    async def add(self, entries: Sequence[NewEntry]) -> frozenset[str]:
        """Write entries; return the recipients that got something to do."""
        await checkpoint()
        return self.commit([tuple(entries)])

    def commit(self, written: Sequence[Sequence[NewEntry] | Settlement]) -> frozenset[str]:
        """Write everything or nothing; return the recipients that got something to do."""
        settled = [one for one in written if isinstance(one, Settlement)]
        added = [new for one in written if not isinstance(one, Settlement) for new in one]
        if any(self.held(one.seq, one.claims) is None for one in settled):
            raise StoreError("the lease of an entry that this transaction settles was taken away")
        self._make_room(sum(len(self.recipients(new)) for new in added))
        for one in settled:
            self._settle(one)
        return frozenset(name for new in added for name in self._add(new))

    def recipients(self, new: NewEntry) -> tuple[Recipient, ...]:
        """Return who is to get an entry."""
        wanted = self._interests.get(new.type, {}) if new.subscribers else {}
        return (*new.recipients, *wanted.values())

    def held(self, seq: int, claims: int) -> Row | None:
        """Return the row of a claim that still holds."""
        row = self._owned.get(seq)
        return row if row is not None and row.claims == claims else None

    def _make_room(self, count: int) -> None:
        while len(self._rows) + count > self._capacity:
            if not self._over:
                raise StoreFullError(f"the memory store holds {len(self._rows)} of {self._capacity} entries")
            self._erase(self._rows[heapq.heappop(self._over)[1]])

    def _erase(self, row: Row) -> None:
        del self._rows[row.seq]
        self._once.pop((row.new.message_id, row.recipient), None)

    def _add(self, new: NewEntry) -> list[str]:
        written: list[str] = []
        now = self._now()
        due = now + max(round(new.delay * 1000), 0)
        for recipient in self.recipients(new):
            name = recipient.name
            if (new.message_id, name) in self._once:
                continue
            self._seq += 1
            lane = new.key or None if recipient.ordered and due == now else None
            row = self._rows[self._seq] = Row(self._seq, new, name, lane, due)
            self._once[new.message_id, name] = row
            if self._seen.get(name, now) < now - DAY and len(self._box(name).rows) >= self._limits.waiting:
                row.lane = None
                self._bury(row, "silent handler")
            else:
                self._box(name).put(row)
                written.append(name)
        return written

    def _box(self, name: str) -> Box:
        return self._boxes.setdefault(name, Box())

    async def claim(self, recipient: Recipient, *, owner: str, limit: int, lease: float, cursor: str = "") -> Claimed:
        """Lease what has been due for longest, of each lane the head only; there is no scan, so no cursor."""
        await checkpoint()
        box, now = self._box(recipient.name), self._now()
        if box.lanes and not recipient.ordered:
            box.unlane()
        taken = sorted(box.take(now, limit), key=lambda row: row.seq)
        for row in taken:
            row.due, row.claims, row.owner = now + round(lease * 1000), row.claims + 1, owner
            self._owned[row.seq] = row
            box.put(row)
        return Claimed([row.as_entry() for row in taken])

    async def settle(self, settlements: Sequence[Settlement]) -> frozenset[int]:
        """Write settlements; return the seqs whose lease was lost."""
        await checkpoint()
        return frozenset(one.seq for one in settlements if not self._settle(one))

    def _settle(self, one: Settlement) -> bool:
        row = self.held(one.seq, one.claims)
        if row is None or row.locked:
            return False
        del self._owned[row.seq]
        row.owner, row.heard, row.error = None, row.claims, one.error or row.error
        if one.outcome == "done":
            self._end(row, "done")
        elif one.outcome == "dead":
            row.failures += 1
            self._box(row.recipient).drop(row, blocks=one.blocks)
            self._bury(row, one.error)
        else:
            row.failures += one.outcome == "again"
            row.due = self._now() + round(one.after * 1000)
            self._box(row.recipient).put(row)
        return True

    def _end(self, row: Row, state: str) -> None:
        self._box(row.recipient).drop(row)
        row.state, row.due, row.new, row.error = state, self._now(), row.new._replace(body=b""), None
        heapq.heappush(self._over, (row.due, row.seq))

    def _bury(self, row: Row, error: str | None) -> None:
        row.state, row.due, row.error = "dead", self._now(), error
        self._dead[row.seq] = row

    async def extend(self, held: Sequence[tuple[int, int]], lease: float) -> frozenset[int]:
        """Renew leases; return the seqs whose lease was lost."""
        await checkpoint()
        lost: set[int] = set()
        for seq, claims in held:
            row = self.held(seq, claims)
            if row is None:
                lost.add(seq)
            else:
                row.due = self._now() + round(lease * 1000)
                self._box(row.recipient).put(row)
        return frozenset(lost)

    async def announce(self, interests: Sequence[Interest], *, aliases: Sequence[tuple[str, str]] = ()) -> None:
        """Write interests with the time; move waiting and dead entries of old names to the new ones."""
        await checkpoint()
        for one in interests:
            self._interests.setdefault(one.type, {})[one.name] = Recipient(one.name, one.ordered)
            self._seen[one.name] = max(self._now(), self._seen.get(one.name, 0))
        for old, new in aliases:
            if old != new:
                self._leave(old)
                self._rename(old, new)

    def _leave(self, name: str) -> None:
        self._seen.pop(name, None)
        for wanted in self._interests.values():
            wanted.pop(name, None)

    def _rename(self, old: str, new: str) -> None:
        dead = [row for row in self._dead.values() if row.recipient == old]
        for row in [*self._boxes.pop(old, Box()).rows.values(), *dead]:
            if (row.new.message_id, new) in self._once:
                self._owned.pop(row.seq, None)
                self._dead.pop(row.seq, None)
                self._erase(row)
                continue
            del self._once[row.new.message_id, old]
            self._once[row.new.message_id, new] = row
            row.recipient = new
            if row.state == "ready":
                self._box(new).put(row)
            elif row.lane is not None:
                self._box(new).line_up(row)

    async def forget(self, recipient: str) -> int:
        """Drop a recipient's interests and make its waiting entries dead; return how many."""
        await checkpoint()
        self._leave(recipient)
        rows = list(self._box(recipient).rows.values())
        for row in rows:
            self._owned.pop(row.seq, None)
            self._box(recipient).drop(row)
            row.claims, row.heard, row.owner = row.claims + 1, row.claims + 1, None
            self._bury(row, "no handler")
        return len(rows)

    async def due(self, recipients: Sequence[str]) -> dict[str, float]:
        """Return for each recipient with waiting entries the seconds until its first can be claimed."""
        await checkpoint()
        firsts = {name: self._boxes[name].first() for name in recipients if name in self._boxes}
        return {name: (row.due - self._now()) / 1000 for name, row in firsts.items() if row is not None}

    async def sweep(self, *, retention: float, lease: float, batch: int) -> int:
        """Prune what is older than ``retention``, and mend what a clock that jumped has done."""
        await checkpoint()
        now, swept = self._now(), 0
        while swept < batch and self._over and self._over[0][0] < now - round(retention * 1000):
            self._erase(self._rows[heapq.heappop(self._over)[1]])
            swept += 1
        swept += self._free(now, now + farthest(lease))

        async def look() -> tuple[int, int]:
            return self._now(), max(self._seen.values(), default=0)

        async def hasten(back: int) -> int:
            freed = self._free(now, now + round(lease * 2000))
            return freed + self._hasten(now, now + back + round(lease * 1000), batch)

        return swept + await self._setback.mend(look, hasten, batch)

    def _free(self, now: int, latest: int) -> int:
        found = [row for row in self._owned.values() if row.due > latest]
        for row in found:
            row.due = now
            self._box(row.recipient).put(row)
        return len(found)

    def _hasten(self, now: int, until: int, batch: int) -> int:
        waiting = (row for box in self._boxes.values() for row in box.rows.values() if row.owner is None)
        found = [row for row in waiting if now < row.due <= until][:batch]
        for row in found:
            row.due = now
            self._box(row.recipient).put(row)
        if len(found) < batch:
            self._seen = {name: min(seen, now) for name, seen in self._seen.items()}
        return len(found)

    async def backlog(self) -> Sequence[Backlog]:
        """Count what waits, leased entries included, and what is dead, per recipient."""
        await checkpoint()
        now, dead = self._now(), Counter(row.recipient for row in self._dead.values())
        found: list[Backlog] = []
        for name in sorted({*self._boxes, *dead, *self._seen}):
            rows, seen = self._box(name).rows.values(), self._seen.get(name)
            oldest = min((row.due for row in rows), default=now + 1)
            age = (now - oldest) / 1000 if oldest <= now else None
            found.append(Backlog(name, len(rows), dead[name], age, seen is not None and seen >= now - DAY))
        return found

    async def dead(self, chosen: DeadFilter) -> Sequence[DeadEntry]:
        """Return chosen dead entries, those first that died first."""
        await checkpoint()
        return [row.as_dead() for row in choose(self._dead.values(), chosen)]

    async def replay(self, chosen: DeadFilter) -> Mapping[str, int]:
        """Make chosen dead entries due now, failures forgotten; return how many per recipient."""
        await checkpoint()
        rows = choose(self._dead.values(), chosen)
        for row in rows:
            del self._dead[row.seq]
            row.state, row.due, row.failures, row.error = "ready", self._now(), 0, None
            row.claims, row.heard = row.claims + 1, row.claims + 1
            self._box(row.recipient).put(row)
        return Counter(row.recipient for row in rows)

    async def discard(self, chosen: DeadFilter) -> int:
        """Forget chosen dead entries but for their ids; return how many."""
        await checkpoint()
        rows = choose(self._dead.values(), chosen)
        for row in rows:
            del self._dead[row.seq]
            self._end(row, "discarded")
        return len(rows)

    async def listen(self, wake: Callable[[], None]) -> None:
        """Wait until cancelled: no other process writes here."""
        await anyio.sleep_forever()

    def _now(self) -> int:
        return round((time.time() if self._clock is None else self._clock.now()) * 1000)
