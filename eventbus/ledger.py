"""Write what becomes of claimed entries: settlements and leases of one moment, whoever's they are, together."""

import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple

import anyio
from anyio.lowlevel import checkpoint

from eventbus._signal import Signal
from eventbus.clock import Runtime
from eventbus.errors import StoreError
from eventbus.limits import Limits
from eventbus.store import Backlog, Settlement, Store

__all__ = ("Answer", "Ledger")

log = logging.getLogger("eventbus")


Told = Callable[[bool, StoreError | None], object]
"""Hears, once, whether the lease held, or why nobody knows."""


class Answer:
    """Be what became of one settlement, for who waits for it."""

    __slots__ = ("_event", "_failed", "_kept")

    def __init__(self) -> None:
        self._event = anyio.Event()

    def __call__(self, kept: bool, failed: StoreError | None = None) -> None:
        """Hear it."""
        self._kept, self._failed = kept, failed
        self._event.set()

    async def wait(self) -> bool:
        """Return whether the lease held. Raises ``StoreError``."""
        await self._event.wait()
        if self._failed is not None:
            raise self._failed
        return self._kept


class _Ticket(NamedTuple):
    settlement: Settlement
    told: Told


class Ledger:
    """Write the settlements and extensions of all handlers, those of one moment in one statement."""

    def __init__(self, store: Store, runtime: Runtime, limits: Limits) -> None:
        self.store = store
        self.runtime = runtime
        self.limits = limits
        self.owner = runtime.ids()
        """This incarnation of this process, in the store's ``owner`` column."""
        self._tickets: list[_Ticket] = []
        self._extensions: list[_Ticket] = []
        self.answered = runtime.clock.monotonic()
        """When the store last answered the keeper."""
        self.troubled = False
        """Whether it answered with an error since."""
        self.asked: float | None = None
        """Since when it owes an answer to a settlement or a lease."""
        self.wrote = self.answered
        """When it last wrote something for anybody in this process."""
        self._counted = float("-inf")
        self._backlog: Sequence[Backlog] = ()
        self._news = Signal()

    def settle(self, settlement: Settlement, told: Told) -> None:
        """Have a settlement written."""
        self._tickets.append(_Ticket(settlement, told))
        self._news.fire()

    async def extend(self, seq: int, claims: int) -> bool:
        """Renew a lease; False if it was lost. Raises ``StoreError``, which loses nothing yet."""
        answer = Answer()
        self._extensions.append(_Ticket(Settlement(seq, claims, "done"), answer))
        self._news.fire()
        return await answer.wait()

    async def run(self) -> None:
        """Write what comes, until cancelled."""
        while True:
            if not self._tickets and not self._extensions:
                await self._news.wait()
            await checkpoint()  # whoever settles in this moment too joins the statement
            if self._extensions:
                tickets, self._extensions = self._extensions, []
                await self._write(tickets, self._extend_all, "%d leases could not be extended: %s")
            if not self._tickets:
                continue
            tickets, self._tickets = self._tickets[: self.limits.batch], self._tickets[self.limits.batch :]
            await self._write(tickets, self._settle_all, "settling %d entries failed, their leases decide: %s")

    async def dead(self, recipient: str, *, fresh: bool) -> int:
        """Return how many of a recipient's messages are dead: ``fresh``, or as of the last sweep at the latest."""
        return next((one.dead for one in await self.backlog(fresh) if one.recipient == recipient), 0)

    async def backlog(self, fresh: bool = False) -> Sequence[Backlog]:
        """Return what waits and what is dead: ``fresh``, or as of the last sweep at the latest."""
        now = self.runtime.clock.monotonic()
        if fresh or now - self._counted >= self.limits.sweep:
            self._backlog = await self.store.backlog()
            self._counted = now
        return self._backlog

    def heard(self, troubled: bool = False) -> None:
        """Note that the store answered the keeper, or that it is in trouble."""
        self.troubled = troubled
        if not troubled:
            self.note()
            self.answered = self.wrote

    def note(self) -> None:
        """Note that the store has written something."""
        self.wrote = self.runtime.clock.monotonic()

    async def _settle_all(self, tickets: Sequence[_Ticket]) -> frozenset[int]:
        return await self.store.settle([ticket.settlement for ticket in tickets])

    async def _extend_all(self, tickets: Sequence[_Ticket]) -> frozenset[int]:
        held = [(ticket.settlement.seq, ticket.settlement.claims) for ticket in tickets]
        return await self.store.extend(held, self.limits.lease)

    async def _write(
        self, tickets: Sequence[_Ticket], verb: Callable[[Sequence[_Ticket]], Awaitable[frozenset[int]]], warning: str
    ) -> None:
        """Write for many at once; of two claims of one row the newer only, because a store names lost rows alone."""
        newest: dict[int, int] = {}
        for ticket in tickets:
            newest[ticket.settlement.seq] = max(newest.get(ticket.settlement.seq, 0), ticket.settlement.claims)
        current = [ticket for ticket in tickets if newest[ticket.settlement.seq] == ticket.settlement.claims]
        lost: frozenset[int] = frozenset()
        failed: StoreError | None = None
        self.asked = self.runtime.clock.monotonic()
        try:
            lost = await verb(current)
            self.note()
        except Exception as error:
            log.warning(warning, len(current), error)
            failed = error if isinstance(error, StoreError) else StoreError(f"{type(error).__name__}: {error}")
        finally:
            self.asked = None
        for one, told in tickets:
            told(newest[one.seq] == one.claims and one.seq not in lost, failed)
