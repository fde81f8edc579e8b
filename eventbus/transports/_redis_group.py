"""Read a stream for a group: its members compete, or take turns as its owner where order is kept."""

import asyncio
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from time import monotonic
from typing import Any

import anyio

from eventbus.errors import Lost, SettleError
from eventbus.transport import Wire
from eventbus.transports._redis_entry import decode
from eventbus.transports._redis_link import Command, Line, Session, refusal
from eventbus.transports._redis_reader import POLL, Reader
from eventbus.transports._redis_scripts import ACK, CLAIM, KEEP, LEAVE, OWN, REJECT, TAKE, TIDY

__all__ = ("GroupReader", "Membership")

log = logging.getLogger("eventbus")

TIDY_EVERY = 10.0
"""Seconds between two visits to what all groups have settled."""

FORGET_AFTER = 3_600_000
"""Milliseconds of silence after which a consumer without messages is forgotten."""


@dataclass(frozen=True, slots=True)
class Membership:
    """Say who reads, for whom, and for how long what it takes is its own."""

    stream: str
    group: str
    consumer: str
    """Its name: no other subscription has it, before or after."""
    lease: float

    @property
    def milliseconds(self) -> int:
        """Return the lease as the server counts it."""
        return math.ceil(self.lease * 1_000)

    @property
    def owner(self) -> str:
        """Return the key that names the owner of the group, while ordered readers take turns."""
        return f"{self.stream}@{self.group}.owner"

    @property
    def dead(self) -> str:
        """Return the stream of the group's dead messages."""
        return f"{self.stream}@{self.group}.dead"


class Copy:
    """Be one delivery of one entry."""

    __slots__ = ("attempt", "desk", "entry", "settled", "wire")

    def __init__(self, desk: "Desk", entry: bytes, wire: Wire, count: int) -> None:
        self.desk = desk
        self.entry = entry
        self.wire = wire
        self.attempt = count
        self.settled = False

    async def ack(self) -> None:
        """Settle it as done."""
        if self._first():
            await self.desk.ack(self)

    async def retry(self, after: float) -> None:
        """Settle it as to come again in ``after`` seconds, at most a lease; 0 hands it back and counts no attempt."""
        lease = self.desk.member.milliseconds
        wait = math.ceil(after * 1_000) if 0 <= after < math.inf else lease + 1
        if wait > lease:
            raise ValueError(f"retry() takes the seconds to wait, from 0 to a lease, not {after!r}")
        if self._first():
            await self.desk.write(self, lease - wait, uncounted=not wait)

    async def reject(self, reason: str) -> None:
        """Settle it as dead: copied, with the reason, and acknowledged, in one step of the server."""
        if self._first():
            await self.desk.bury(self, reason)

    async def extend(self) -> None:
        """Keep it for another lease from now."""
        if not self.settled:
            await self.desk.write(self, 0)

    def _first(self) -> bool:
        first, self.settled = not self.settled, True
        return first


class Batch:
    """Gather what is written about entries within one turn of the event loop, and write it by one command."""

    def __init__(self, desk: "Desk", command: Command) -> None:
        self._desk = desk
        self._command = command
        self._rows: list[tuple[Copy, float | None, asyncio.Future[str]]] = []
        self._arguments: list[str | bytes | int] = []

    async def add(self, copy: Copy, after: float | None, arguments: Sequence[str | bytes | int]) -> None:
        """Write about an entry, which may come again in ``after`` seconds. Raises ``SettleError``."""
        if self._desk.left():
            raise SettleError("the subscription was left, so the message went back")
        told: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        if not self._rows:
            self._send(self._rows)
        self._rows.append((copy, after, told))
        self._arguments += arguments
        if why := await told:
            raise SettleError(why)

    def _send(self, rows: list[tuple[Copy, float | None, "asyncio.Future[str]"]]) -> None:
        def commands() -> list[Command]:
            arguments, self._rows, self._arguments = self._arguments, [], []
            return [(*self._command, *arguments)]

        def done(future: "asyncio.Future[list[Any]]") -> None:
            if self._rows is rows:
                self._rows, self._arguments = [], []
            failure = future.exception() or refusal(future.result()[0])
            lost = frozenset[bytes]() if failure else frozenset[bytes](future.result()[0])
            for copy, after, told in rows:
                kept = not failure and copy.entry not in lost
                self._desk.written(copy, after, kept=kept)
                if not told.done():
                    lapsed = f"the lease of message {copy.wire.id} is over: another consumer may have it"
                    told.set_result("" if kept else str(failure or lapsed))

        try:
            self._desk.line.put(commands).add_done_callback(done)
        except Lost as error:
            raise SettleError(str(error)) from error


class Desk:
    """Settle what one reader has taken: all of one turn of the event loop in one command, each if it is still ours."""

    def __init__(self, line: Line, member: Membership, reader: "GroupReader", most: int) -> None:
        self.line = line
        self.member = member
        self._reader = reader
        who = (1, member.stream, member.group, member.consumer)
        self._acks = Batch(self, ("EVAL", ACK, *who, most))
        self._keeps = Batch(self, ("EVAL", KEEP, *who))

    async def ack(self, copy: Copy) -> None:
        """Acknowledge an entry."""
        await self._acks.add(copy, None, (copy.entry,))

    async def write(self, copy: Copy, idle: int, *, uncounted: bool = False) -> None:
        """Let an entry have been idle for so many milliseconds, this delivery counted or not."""
        after = self.member.lease - idle / 1_000
        await self._keeps.add(copy, after, (copy.entry, idle, int(uncounted)))

    def left(self) -> bool:
        """Tell whether the subscription was left."""
        return self._reader.left

    def written(self, copy: Copy, after: float | None, *, kept: bool) -> None:
        """Note what became of an entry, whether or not anybody still waits to know."""
        if copy.settled or not kept:
            self._reader.release(copy, after if kept else None)

    async def bury(self, copy: Copy, reason: str) -> None:
        """Copy an entry to the group's dead with the reason, and acknowledge it."""
        member = self.member
        command: Command = (
            "EVAL", REJECT, 2, member.stream, member.dead, member.group, member.consumer, copy.entry,
            "reason", reason, "attempt", copy.attempt,
        )  # fmt: skip
        if self._reader.left:
            raise SettleError("the subscription was left, so the message went back")
        try:
            future = self.line.put(lambda: [command])
            future.add_done_callback(lambda _: self._reader.release(copy, None))
            [reply] = await asyncio.shield(future)
        except Lost as error:
            raise SettleError(str(error)) from error
        if (why := refusal(reply)) is not None:
            raise SettleError(f"message {copy.wire.id} cannot be kept in {member.dead!r}: {why}")
        if not reply:
            raise SettleError(f"the lease of message {copy.wire.id} is over: another consumer may have it")


class GroupReader(Reader):
    """Take what its group has not had, and what others of the group left behind; an ordered one only as its owner.

    Ordered readers of one group take turns: one owns the group, by a key on the server that expires with the lease,
    and first takes over whatever its predecessor had not settled, so that no message overtakes an earlier one.
    """

    def __init__(self, line: Line, member: Membership, *, prefetch: int, ordered: bool, trim: bool) -> None:
        super().__init__(line.address, member.stream)
        self.member = member
        self._desk = Desk(line, member, self, prefetch)
        self._prefetch = prefetch
        self._ordered = ordered
        self._trim = trim
        self._held: dict[bytes, Copy] = {}
        """What is unsettled, in the buffer too."""
        self._away: set[bytes] = set()
        """What an ordered reader will have again, and keeps room for: others of its key wait for it here."""
        self._every = min(max(member.lease / 10, 0.1), 1.0)
        self._claim_at = 0.0
        self._dues: list[float] = []
        self._tidy_at = monotonic() + TIDY_EVERY
        self._owner = not ordered
        self._owned_until = math.inf
        """When another may own the group: a lease after it was last asked for, for the answer may take its time."""
        self._inherit: bytes | None = None
        """How far it has taken over from its predecessor; None: as far as there is."""
        self._last = b"0-0"
        """The newest entry that it knows to be taken."""

    async def step(self, session: Session) -> None:
        """Own the group, take over, claim what lapsed, read what is new: whatever there is room for."""
        if not self._owner:
            await self._become_owner(session)
            return
        now, room = monotonic(), self._prefetch - len(self._held)
        new = room - len(self._away)
        if now >= self._tidy_at:
            await self._tidy(session)
        if new > 0 and self._inherit is not None:
            self._inherit = await self._claim(session, self._inherit, 0, new)
        elif room > 0 and now >= self._next_claim():
            await self._claim_lapsed(session, now)
        elif self._ordered:
            await self._read_as_owner(session, room, new)
        elif new > 0:
            await self._read(session, new)
        else:
            await self.room(None)

    async def _become_owner(self, session: Session) -> None:
        member = self.member
        found = await self._run(
            session, "EVAL", OWN, 2, member.stream, member.owner, member.group, member.consumer, member.milliseconds
        )
        if found is None:
            await self.room(POLL)
        else:
            self._owner, self._inherit, self._last = True, b"0-0", found

    async def _claim_lapsed(self, session: Session, now: float) -> None:
        due = 0
        while self._dues and self._dues[0] <= now:
            heappop(self._dues)
            due += 1
        self._claim_at = now + self._every
        cursor: bytes | None = b"0-0"
        while cursor is not None:
            room = self._prefetch - len(self._held)
            free = min(room, room - len(self._away) + due)
            if free <= 0:
                break
            cursor = await self._claim(session, cursor, self.member.milliseconds, free)

    async def _claim(self, session: Session, cursor: bytes, idle: int, count: int) -> bytes | None:
        """Take what others left, from a cursor on; return the next cursor, None at the end."""
        member = self.member
        keys = (2, self.stream, member.owner) if self._ordered else (1, self.stream)
        what = (member.group, member.consumer, idle, cursor, count, member.milliseconds)
        cursor, entries, counts, gone = await self._run(session, "EVAL", CLAIM, *keys, *what)
        for (entry, flat), times in zip(entries, counts, strict=True):
            self._away.discard(entry)
            if entry not in self._held:  # else its lease lapsed while it was here, and now it is ours once more
                self._take_in(entry, flat, times)
        if gone:
            self._away.difference_update(gone)
            log.warning(
                "%s: %d message(s) were deleted before %s had settled them", self.stream, len(gone), member.group
            )
        return None if cursor == b"0-0" else cursor

    async def _read(self, session: Session, count: int) -> None:
        member = self.member
        found = await self._run(
            session, "XREADGROUP", "GROUP", member.group, member.consumer, "COUNT", count, "BLOCK", self._patience(),
            "STREAMS", self.stream, ">",
        )  # fmt: skip
        self._take_in_all(found)

    async def _read_as_owner(self, session: Session, room: int, count: int) -> None:
        """Take in one step with the proof that the group is still ours, and wait for news without taking it."""
        found = await self._take(session, max(count, 0))
        if found:
            self._take_in_all(found)
        elif count > 0:
            await self._run(session, "XREAD", "COUNT", 1, "BLOCK", self._patience(), "STREAMS", self.stream, self._last)
        else:
            await self.room(self._patience() / 1_000 if room > 0 else self.member.lease / 4)

    async def _take(self, session: Session, count: int) -> Any:
        """Return so many new entries; in any case the group is ours for another lease."""
        member = self.member
        return await self._run(
            session,
            "EVAL",
            TAKE,
            2,
            self.stream,
            member.owner,
            member.group,
            member.consumer,
            member.milliseconds,
            count,
        )

    async def linger(self, session: Session) -> None:
        """Stay the owner while what was taken is still being handled."""
        while self._ordered and self._owner and not self.over.is_set():
            await self._take(session, 0)
            with anyio.move_on_after(self.member.lease / 4):
                await self.over.wait()

    def _take_in_all(self, found: Any) -> None:
        for entry, flat in found[0][1] if found else ():
            self._last = entry
            self._take_in(entry, flat or (), 1)

    def _take_in(self, entry: bytes, flat: Any, count: int) -> None:
        copy = Copy(self._desk, entry, decode(entry, flat), count)
        self._held[entry] = copy
        self.admit(copy)

    def _next_claim(self) -> float:
        return min(self._claim_at, self._dues[0]) if self._dues else self._claim_at

    def _patience(self) -> int:
        """Return the milliseconds that a fetch may wait."""
        return math.ceil(1_000 * min(POLL, self.member.lease / 4, max(self._next_claim() - monotonic(), 0.001)))

    async def _tidy(self, session: Session) -> None:
        """Trim what every group has settled, and forget consumers that died; a server that forbids it is let be."""
        self._tidy_at = monotonic() + TIDY_EVERY
        command: Command = ("EVAL", TIDY, 1, self.stream, FORGET_AFTER, int(self._trim))
        [reply] = await session.ask([command], 0.0, self._owned_until - monotonic())
        if (why := refusal(reply)) is not None:
            self._tidy_at = math.inf
            log.warning("%s is not trimmed from here: %s", self.stream, why)

    async def _run(self, session: Session, *command: str | bytes | int) -> Any:
        began = monotonic()
        [reply] = await session.ask([command], POLL, self._owned_until - began)
        if (why := refusal(reply)) is None:
            if self._ordered and command[0] == "EVAL":  # each of these owns the group for another lease
                self._owned_until = began + self.member.lease
            return reply
        if "NOTOWNER" in why:
            lease = self.member.lease
            raise Lost(
                f"group {self.member.group!r} of {self.stream!r} has another owner: this one hung for {lease:g} s"
            )
        raise Lost(f"reading {self.stream!r} for group {self.member.group!r}: {why}")

    def release(self, copy: Copy, after: float | None) -> None:
        """Let another in for one that is settled; it may come again in ``after`` seconds."""
        if after is not None:
            heappush(self._dues, monotonic() + after)
            if self._ordered:
                self._away.add(copy.entry)
        if self._held.get(copy.entry) is copy:
            del self._held[copy.entry]
        self.settled()

    def farewell(self) -> None:
        """Hand back what nobody received, let the next own the group, and be forgotten if nothing is left."""
        member = self.member
        back = [copy.entry for copy in self.buffer if isinstance(copy, Copy)]
        self.buffer.clear()
        command: Command = (
            "EVAL", LEAVE, 2, self.stream, member.owner, member.group, member.consumer, member.milliseconds, *back,
        )  # fmt: skip
        self._desk.line.leave([command])
