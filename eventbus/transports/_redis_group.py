"""Read a stream for a group: its members compete, or take turns as its owner where order is kept."""

import asyncio
import logging
import math
from heapq import heappop, heappush
from time import monotonic
from typing import Any

from eventbus.errors import Lost, SettleError
from eventbus.transports._redis_link import Command, Job, Line, Session, refusal
from eventbus.transports._redis_reader import POLL, Copy, Reader, decode
from eventbus.transports._redis_scripts import CLAIM, LEAVE, OWN, REJECT, SETTLE, TAKE, TIDY

__all__ = ("GroupReader",)

log = logging.getLogger("eventbus")

TIDY_EVERY = 10.0
"""Seconds between two visits to what all groups have settled."""

FORGET_AFTER = 3_600_000
"""Milliseconds of silence after which a consumer without messages is forgotten."""


class Batch:
    """Gather what is settled before the line writes next, so that it goes out as one command."""

    __slots__ = ("copies", "job", "reader")

    def __init__(self, reader: "GroupReader") -> None:
        self.reader = reader
        self.copies: list[tuple[Copy, int, int, asyncio.Future[bool]]] = []
        self.job: Job = reader.line.put(self.commands)
        self.job.future.add_done_callback(self.done)

    def commands(self) -> list[Command]:
        """Return the command, and take no more in."""
        reader = self.reader
        reader.batch = None
        arguments: list[str | bytes | int] = []
        for copy, idle, count, _ in self.copies:
            arguments += (copy.entry, copy.count, idle, count)
        return [("EVAL", SETTLE, 1, reader.stream, reader.group, reader.name, *arguments)]

    def done(self, future: "asyncio.Future[list[Any]]") -> None:
        """Tell everybody how it ended."""
        self.reader.batch = None if self.reader.batch is self else self.reader.batch
        error: BaseException | None = None if future.cancelled() else future.exception()
        reply: Any = None if future.cancelled() or error is not None else future.result()[0]
        for index, (_, _, _, told) in enumerate(self.copies):
            if told.done():
                continue
            if isinstance(reply, list):
                told.set_result(bool(reply[index]))
            else:
                told.set_exception(SettleError(f"{self.reader.stream!r}: {error or refusal(reply)}"))


class GroupReader(Reader):
    """Take what its group has not had, and what others of the group left behind; an ordered one only as its owner.

    Ordered readers of one group take turns: one owns the group, by a key on the server that expires with the lease,
    and first takes over whatever its predecessor had not settled, so that no message overtakes an earlier one.
    """

    def __init__(
        self, line: Line, stream: str, group: str, name: str, *, prefetch: int, lease: float, ordered: bool, trim: bool
    ) -> None:
        super().__init__(line.address, stream, prefetch)
        self.line = line
        self.group = group
        self.name = name
        self.lease = lease
        self.batch: Batch | None = None
        self._ordered = ordered
        self._trim = trim
        self._milliseconds = math.ceil(lease * 1_000)
        self._every = min(max(lease / 10, 0.1), 1.0)
        self._claim_at = 0.0
        self._dues: list[float] = []
        self._away: set[bytes] = set()
        """What an ordered reader will have again, and keeps room for: others of the key wait for it."""
        self._inherit: bytes | None = None
        """How far it has taken over from its predecessor; None: as far as there is."""
        self._owner = not ordered
        self._owned_until = 0.0
        self._tidy_at = monotonic() + TIDY_EVERY * (hash(name) % 100) / 100
        self._last = b"0-0"

    @property
    def owner(self) -> str:
        """Return the key that names the owner of the group."""
        return f"{self.stream}@{self.group}.owner"

    @property
    def dead(self) -> str:
        """Return the stream of the group's dead messages."""
        return f"{self.stream}@{self.group}.dead"

    async def begin(self, session: Session) -> None:
        """Need nothing: the group remembers."""

    async def step(self, session: Session) -> None:
        """Own the group, take over, claim what lapsed, read what is new: whatever there is room for."""
        if not self._owner:
            await self._become_owner(session)
            return
        now = monotonic()
        if now >= self._tidy_at:
            self._tidy_at = now + TIDY_EVERY
            await self._run(session, "EVAL", TIDY, 1, self.stream, FORGET_AFTER, int(self._trim))
        if len(self.held) >= self.prefetch:
            if self._ordered:
                await self._take(session, 0)
            await self.room(self.lease / 4 if self._ordered else None)
            return
        if self._inherit is not None:
            self._inherit = await self._claim(session, self._inherit, 0)
        elif now >= self._claim_at or (self._dues and now >= self._dues[0]):
            await self._claim_lapsed(session, now)
        elif self._ordered:
            await self._read_as_owner(session)
        else:
            await self._read(session)

    async def _become_owner(self, session: Session) -> None:
        if await self._run(session, "EVAL", OWN, 1, self.owner, self.name, self._milliseconds):
            self._owner, self._inherit = True, b"0-0"
        else:
            await self.room(POLL)

    async def _claim_lapsed(self, session: Session, now: float) -> None:
        cursor: bytes | None = b"0-0"
        while cursor is not None and len(self.held) < self.prefetch:
            cursor = await self._claim(session, cursor, self._milliseconds)
        self._claim_at = now + self._every
        while self._dues and self._dues[0] <= now:
            heappop(self._dues)

    async def _claim(self, session: Session, cursor: bytes, idle: int) -> bytes | None:
        """Take what others left from a cursor on; return the next cursor, None at the end."""
        room = self.prefetch - len(self.held)
        keys = (2, self.stream, self.owner) if self._ordered else (1, self.stream)
        what = (self.group, self.name, idle, cursor, room, self._milliseconds)
        cursor, entries, counts, gone = await self._run(session, "EVAL", CLAIM, *keys, *what)
        for (entry, flat), count in zip(entries, counts, strict=True):
            self._away.discard(entry)
            held = self.held.get(entry)
            if held is not None:  # its lease lapsed while it was here, and nobody else came: it is ours once more
                held.count = count
            else:
                self.admit(Copy(self, entry, decode(entry, flat), count))
        if gone:
            self._away.difference_update(gone)
            log.warning("%d message(s) of %s were deleted before %s had settled them",
                        len(gone), self.stream, self.group)  # fmt: skip
        return None if cursor == b"0-0" else cursor

    async def _read(self, session: Session) -> None:
        room = self.prefetch - len(self.held)
        block = math.ceil(1_000 * min(POLL, max(self._next_claim() - monotonic(), 0.001)))
        found = await self._run(
            session, "XREADGROUP", "GROUP", self.group, self.name, "COUNT", room, "BLOCK", block,
            "STREAMS", self.stream, ">",
        )  # fmt: skip
        self._admit_new(found)

    async def _read_as_owner(self, session: Session) -> None:
        """Wait for news without taking it, then take it in one step with the proof that the group is still ours."""
        if await self._take(session, self.prefetch - len(self.held) - len(self._away)):
            return
        block = math.ceil(1_000 * min(POLL, self.lease / 4, max(self._next_claim() - monotonic(), 0.001)))
        if len(self.held) + len(self._away) >= self.prefetch:
            await self.room(block / 1_000)
        else:
            await self._run(session, "XREAD", "COUNT", 1, "BLOCK", block, "STREAMS", self.stream, self._last)

    async def _take(self, session: Session, room: int) -> bool:
        found = await self._run(
            session, "EVAL", TAKE, 2, self.stream, self.owner, self.group, self.name, self._milliseconds, room
        )
        return self._admit_new(found)

    def _admit_new(self, found: Any) -> bool:
        entries = found[0][1] if found else ()
        for entry, flat in entries:
            self._last = entry
            self.admit(Copy(self, entry, decode(entry, flat or ()), 1))
        return bool(entries)

    def _next_claim(self) -> float:
        return min(self._claim_at, self._dues[0]) if self._dues else self._claim_at

    async def _run(self, session: Session, *command: str | bytes | int) -> Any:
        [reply] = await session.ask([command], POLL)
        if (why := refusal(reply)) is None:
            return reply
        if "NOTOWNER" in why:
            raise Lost(f"another consumer owns {self.stream}@{self.group} now: this one was silent for {self.lease:g} s")
        raise Lost(f"reading {self.stream!r} for group {self.group!r}: {why}")

    async def settle(self, copy: Copy, after: float | None) -> None:
        """Acknowledge a delivery, or let it lapse in ``after`` seconds, together with all others of this turn."""
        if after is None:
            await self._settle(copy, -1, 0)
        elif after == 0:
            await self._settle(copy, self._milliseconds, copy.count - 1)
        else:
            await self._settle(copy, max(self._milliseconds - math.ceil(after * 1_000), 0), copy.count, after)

    async def _settle(self, copy: Copy, idle: int, count: int, after: float = 0.0) -> None:
        told = self._add(copy, idle, count)
        told.add_done_callback(lambda told: self._settled(copy, told, None if idle < 0 else after))
        self._judge(copy, await told)

    def _settled(self, copy: Copy, told: "asyncio.Future[bool]", after: float | None) -> None:
        """Note what became of a delivery, whether or not its handler still waits to know."""
        kept = not told.cancelled() and told.exception() is None and told.result()
        if after is not None and (kept or told.cancelled()):
            heappush(self._dues, monotonic() + after)
            if self._ordered:
                self._away.add(copy.entry)
        self.release(copy)

    async def keep(self, copy: Copy) -> None:
        """Let the lease of a delivery begin again."""
        self._judge(copy, await self._add(copy, 0, copy.count))

    async def bury(self, copy: Copy, reason: str) -> None:
        """Copy a delivery to the group's dead with its reason, and acknowledge it, in one step."""
        command = (
            "EVAL", REJECT, 2, self.stream, self.dead, self.group, self.name, copy.entry, copy.count,
            "reason", reason, "attempt", copy.attempt,
        )  # fmt: skip
        self._check()
        try:
            job = self.line.put(lambda: [command])
            job.future.add_done_callback(lambda _: self.release(copy))
            [reply] = await job.future
        except Lost as error:
            raise SettleError(str(error)) from error
        if (why := refusal(reply)) is not None:
            raise SettleError(f"message {copy.wire.id} cannot be kept in {self.dead!r}: {why}")
        self._judge(copy, bool(reply))

    def _add(self, copy: Copy, idle: int, count: int) -> "asyncio.Future[bool]":
        self._check()
        told: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        try:
            if self.batch is None:
                self.batch = Batch(self)
        except Lost as error:
            raise SettleError(str(error)) from error
        self.batch.copies.append((copy, idle, count, told))
        return told

    def _check(self) -> None:
        if self.left:
            raise SettleError("the subscription was left, so the message went back")

    def _judge(self, copy: Copy, kept: bool) -> None:
        if not kept:
            raise SettleError(f"the lease of message {copy.wire.id} is over: another consumer may have it")

    def farewell(self) -> None:
        """Hand back what nobody received, let the next own the group, and be forgotten if nothing is left."""
        back: list[str | bytes | int] = []
        for copy in self.take_unreceived():
            back += (copy.entry, copy.count - 1)
        what = (2, self.stream, self.owner, self.group, self.name, self._milliseconds, *back)
        try:
            job = self.line.put(lambda: [("EVAL", LEAVE, *what)], last=True)
        except Lost:
            return  # the line is gone: the lease will bring everything back
        job.future.add_done_callback(lambda future: future.cancelled() or future.exception())
