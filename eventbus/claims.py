"""Take entries out of a store: a subscription made of claims.

A claim brings no more than the free slots of its handler plus what it starts, at its recent pace, within a tenth of
the lease: fast handlers get batches, slow ones do not hoard. A wake-up carries nothing; only a claim gives the right
to run. Behind every wake-up stands a look at the store every ``Limits.sweep`` seconds.
"""

import heapq
import logging
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, TypeVar

import anyio

from eventbus._signal import Signal
from eventbus.clock import Runtime
from eventbus.delivery import Done, Gone, Postponed, Verdict
from eventbus.errors import SettleError, StoreError
from eventbus.ledger import Answer, Ledger
from eventbus.link import Progress
from eventbus.retry import Again, Dead
from eventbus.store import Entry, Recipient, Settlement, Transaction, Unit
from eventbus.transport import Subscription, Wire

__all__ = ("ClaimedDelivery", "Claims")

log = logging.getLogger("eventbus")

LEASE_LOST = (
    "%s: the lease of message %s is lost, so it may be handled twice: this process stood still for longer than "
    "Limits(lease=...); a handler that blocks the event loop is written as `def`, which runs in a thread"
)

T = TypeVar("T")

LONGEST = 3_650 * 86_400.0
"""Seconds after which an entry comes again at the latest."""
SOON = 0.02
"""Seconds after which to look again when something became due while nobody looked."""


class ClaimedDelivery:
    """Be one claimed entry until it is settled; ``(seq, claims)`` is the right to."""

    __slots__ = ("_claims", "_lost", "_transaction", "_until", "attempt", "entry", "settled", "wire")

    def __init__(self, claims: "Claims", entry: Entry, until: float) -> None:
        self._claims = claims
        self._until = until
        self.entry = entry
        self.wire = Wire(entry.message_id, entry.body, key=entry.lane)
        self.attempt = entry.failures + 1
        self.settled = False
        self._lost = False
        self._transaction: Transaction[Any] | None = None

    @property
    def lapsed(self) -> bool:
        """Tell whether its lease has run out by this process's own clock: it stood still, or the store did."""
        return self._claims.ledger.runtime.clock.monotonic() > self._until

    async def lock(self, unit: Unit) -> bool:
        """Take the row lock of the entry, the first thing in its handler's transaction."""
        return await unit.lock(self.entry.seq, self.entry.claims)

    async def settle(self, unit: Unit, transaction: Transaction[Any]) -> bool:
        """Write "done" in the handler's transaction."""
        self._transaction = transaction
        return await unit.settle(Settlement(self.entry.seq, self.entry.claims, "done"))

    async def ack(self) -> None:
        """Settle it as done. Raises ``SettleError`` if the lease was lost."""
        await self._surely(Done())

    async def retry(self, after: float) -> None:
        """Release it for later, uncounted."""
        await self._surely(Postponed(after))

    async def reject(self, reason: str) -> None:
        """Settle it as dead."""
        await self._surely(Dead(reason))

    async def extend(self) -> None:
        """Keep it for another lease."""
        if self.settled or self._lost or self._claims.transactional:
            return
        until = self._claims.until()
        try:
            held = await self._claims.ledger.extend(self.entry.seq, self.entry.claims)
        except StoreError:
            return  # said by the ledger; the next round tries again
        if not held:
            self._lost = True
            raise SettleError(f"the lease of message {self.wire.id} is lost")
        self._until = until

    def post(self, verdict: Verdict, told: Callable[[bool], object]) -> None:
        """Have it written what becomes of it; ``told`` hears whether it was, this once."""
        if self.settled:
            told(True)
            return
        self.settled = True
        if self._transaction is not None and self._transaction.committed:
            self._written(verdict, told, True)  # whatever went wrong after the commit, it is done
        elif isinstance(verdict, Gone):
            self._written(verdict, told, False)
        else:
            self._claims.ledger.settle(self._settlement(verdict), partial(self._written, verdict, told))

    def _written(
        self, verdict: Verdict, told: Callable[[bool], object], kept: bool, failed: StoreError | None = None
    ) -> None:
        if failed is not None:
            log.warning("message %s is left to its lease: %s", self.wire.id, failed)
        elif not kept:
            log.warning(LEASE_LOST, self._claims.recipient.name, self.wire.id)
        self._claims.settled(verdict)
        told(kept and failed is None)

    async def write(self, verdict: Verdict) -> bool:
        """Write what becomes of it; False if somebody else's claim, or the lease, decides."""
        answer = Answer()
        self.post(verdict, answer)
        return await answer.wait()

    async def _surely(self, verdict: Verdict) -> None:
        if not await self.write(verdict):
            raise SettleError(f"the lease of message {self.wire.id} is lost")

    def _settlement(self, verdict: Verdict) -> Settlement:
        seq, claims = self.entry.seq, self.entry.claims
        match verdict:
            case Again(after=after):
                return Settlement(seq, claims, "again", min(after, LONGEST))
            case Postponed(after=after):
                return Settlement(seq, claims, "release", min(after, LONGEST))
            case Dead(reason=reason):
                blocks = self._claims.blocks and self.entry.lane is not None
                return Settlement(seq, claims, "dead", error=reason, blocks=blocks)
            case Done():
                return Settlement(seq, claims, "done")
            case _:
                raise TypeError(f"{verdict!r} is nothing that a store could keep")


class Claims:
    """Be the subscription of one recipient."""

    def __init__(
        self, ledger: Ledger, recipient: Recipient, slots: int, *, transactional: bool = False, blocks: bool = False
    ) -> None:
        self.ledger = ledger
        self.recipient = recipient
        self.transactional = transactional
        """Whether its handler's transaction, and not a heartbeat, keeps the lease."""
        self.blocks = blocks
        """Whether a dead entry blocks its lane."""
        self.quiet: Callable[[], None] = lambda: None
        """Called when a look at the store came back empty."""
        self._slots = slots
        self._buffer: deque[ClaimedDelivery] = deque()
        self._unsettled = 0
        self._news = Signal()
        self._woken = True
        self._cursor = ""
        self._stopped = False
        self._claiming = False
        self._resting = False
        self._dues: list[float] = []
        self._missed = False
        self._paused = False
        self._died = 0
        """How many are dead here: 0 before the first death, then counted, anew at the ceiling."""
        self._pace = _Pace(ledger.runtime)
        self._asked: float | None = None
        self._answered: float | None = None

    @asynccontextmanager
    async def open(self) -> AsyncGenerator[Subscription]:
        """Subscribe anew; what an earlier subscription claimed is still ours, whatever became of the store."""
        self._stopped = False
        self._woken = True
        yield self

    def progress(self) -> Progress:
        """Return since when the store owes an answer, when it gave the last one, and whether the dead are too many."""
        return Progress(self._asked, self._answered, self._paused)

    async def _ask(self, answer: Awaitable[T]) -> T:
        """Wait for the store, and note it."""
        clock = self.ledger.runtime.clock
        self._asked = clock.monotonic()
        try:
            answered = await answer
            self._answered = clock.monotonic()
        finally:
            self._asked = None
        return answered

    def busy(self) -> int:
        """Count what is in hand, and a look at the store that has not come back empty yet."""
        return self._unsettled + (self._woken or not self._resting)

    def wake(self) -> None:
        """Look at the store again: something may have come."""
        self._woken = True
        self._news.fire()

    async def receive(self) -> ClaimedDelivery:
        """Return the next entry. Raises ``StoreError``, and ``EndOfStream`` after ``stop``."""
        while True:
            if self._stopped:
                raise anyio.EndOfStream
            if self._buffer:
                return self._buffer.popleft()
            room = self._room()
            if room <= 0:
                await self._news.wait()
            elif await self._is_full():
                self._woken = False  # nothing is claimed before some of the dead are gone
                await self._nap(self.ledger.limits.sweep)
            elif not await self._claim(room) and not self._stopped:
                await self._rest()

    async def stop(self) -> None:
        """Claim no more, and hand back what was claimed and not received."""
        self._stopped = True
        self._news.fire()
        while self._claiming:
            await self._news.wait()
        await self._return()

    async def _return(self) -> None:
        """Hand back what was claimed and not received."""
        answers = [Answer() for _ in self._buffer]
        for answer in answers:
            self._buffer.popleft().post(Postponed(0.0), answer)
        for answer in answers:
            await answer.wait()

    def settled(self, verdict: Verdict) -> None:
        """Count one entry less in hand, and look again: its slot, and perhaps its lane, is free."""
        self._unsettled -= 1
        self._pace.note()
        if isinstance(verdict, Dead):
            self._died = self._died + 1 if self._died else self.ledger.limits.dead
        if isinstance(verdict, Again | Postponed):
            self._forget_past()  # one that is never idle would remember them all
            heapq.heappush(self._dues, self.ledger.runtime.clock.monotonic() + verdict.after)
        if self.recipient.ordered or not isinstance(verdict, Done):
            self._woken = True
        self._news.fire()

    def _forget_past(self) -> None:
        while self._dues and self._dues[0] <= self.ledger.runtime.clock.monotonic():
            heapq.heappop(self._dues)

    async def _is_full(self) -> bool:
        """Tell whether the dead of this handler have reached their ceiling, so that it has to pause."""
        ceiling = self.ledger.limits.dead
        if self._died < ceiling:
            return False
        self._died = await self._ask(self.ledger.dead(self.recipient.name, fresh=not self._paused))
        if self._died >= ceiling and not self._paused:
            log.error("%s pauses: %d dead, replay or discard some", self.recipient.name, self._died)
        self._paused = self._died >= ceiling
        return self._paused

    def _room(self) -> int:
        """Return how many entries may be claimed now: a free slot at once, a hoard only when half of it is gone."""
        lease, batch = self.ledger.limits.lease, self.ledger.limits.batch
        most = min(self._slots + int(self._pace.per_second() * lease / 10), max(batch, self._slots))
        free = most - self._unsettled
        return free if self._unsettled < self._slots or free > most // 2 else 0

    def until(self) -> float:
        """Return when, by this process's own clock, a lease ends that is asked for now: at the earliest."""
        return self.ledger.runtime.clock.monotonic() + self.ledger.limits.lease

    async def _claim(self, room: int) -> bool:
        self._claiming, self._woken = True, False
        limits, until = self.ledger.limits, self.until()
        try:
            claimed = await self._ask(
                self.ledger.store.claim(
                    self.recipient, owner=self.ledger.owner, limit=min(room, limits.batch), lease=limits.lease,
                    cursor=self._cursor,
                )
            )  # fmt: skip
        finally:
            self._claiming = False
            self._news.fire()
        self.ledger.note()
        more = claimed.cursor != ""
        self._cursor = claimed.cursor
        self._unsettled += len(claimed.entries)
        self._buffer.extend(ClaimedDelivery(self, entry, until) for entry in claimed.entries)
        if self._stopped:
            await self._return()
        return bool(claimed.entries) or more

    async def _rest(self) -> None:
        """Wait until somebody wakes us, something is due, or it is time to look again."""
        if self._woken:
            return
        clock, wait = self.ledger.runtime.clock, self.ledger.limits.sweep
        due = (await self._ask(self.ledger.store.due([self.recipient.name]))).get(self.recipient.name, wait)
        self._forget_past()
        ours = self._dues[0] - clock.monotonic() if self._dues else wait
        missed, self._missed = due <= 0 and not self._missed, due <= 0
        wait = SOON if missed else min(one for one in (wait, due, ours) if one > 0)
        await self._nap(wait)

    async def _nap(self, seconds: float) -> None:
        if self._woken or self._stopped:
            return
        self._resting = True
        self.quiet()
        with self.ledger.runtime.clock.move_on_after(seconds):
            while not self._woken and not self._stopped:
                await self._news.wait()
        self._resting = False


class _Pace:
    """Know how many entries were settled per second lately."""

    __slots__ = ("_clock", "_count", "_rate", "_since")

    def __init__(self, runtime: Runtime) -> None:
        self._clock = runtime.clock
        self._since = runtime.clock.monotonic()
        self._count = 0
        self._rate = 0.0

    def note(self) -> None:
        self._count += 1
        if self._count % 16 == 0:
            now = self._clock.monotonic()
            self._rate = self._count / max(now - self._since, 0.001)
            if now - self._since > 1.0:
                self._since, self._count = now, 0

    def per_second(self) -> float:
        if self._clock.monotonic() - self._since > 10.0:
            self._since, self._count, self._rate = self._clock.monotonic(), 0, 0.0
        return self._rate
