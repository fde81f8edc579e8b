"""Write what becomes of claimed entries: settlements and leases of one moment, whoever's they are, together."""

import logging
from collections.abc import Awaitable, Callable, Sequence

import anyio
from anyio.lowlevel import checkpoint

from eventbus.clock import Runtime
from eventbus.errors import StoreError
from eventbus.lanes import Signal
from eventbus.limits import Limits
from eventbus.store import Settlement, Store

__all__ = ("Ledger",)

log = logging.getLogger("eventbus")


class _Ticket:
    """Be one settlement on its way."""

    __slots__ = ("event", "failed", "kept", "settlement")

    def __init__(self, settlement: Settlement) -> None:
        self.settlement = settlement
        self.event = anyio.Event()
        self.kept = False
        self.failed: StoreError | None = None


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
        self._counted = float("-inf")
        self._dead: dict[str, int] = {}
        self._news = Signal()

    async def settle(self, settlement: Settlement) -> bool:
        """Write a settlement; False if the lease was lost. Raises ``StoreError``."""
        ticket = _Ticket(settlement)
        self._tickets.append(ticket)
        self._news.fire()
        await ticket.event.wait()
        if ticket.failed is not None:
            raise ticket.failed
        return ticket.kept

    async def extend(self, seq: int, claims: int) -> bool:
        """Renew a lease; False if it was lost. Raises ``StoreError``, which loses nothing yet."""
        ticket = _Ticket(Settlement(seq, claims, "done"))
        self._extensions.append(ticket)
        self._news.fire()
        await ticket.event.wait()
        if ticket.failed is not None:
            raise ticket.failed
        return ticket.kept

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
        now = self.runtime.clock.monotonic()
        if fresh or now - self._counted >= self.limits.sweep:
            self._counted = now
            self._dead = {one.recipient: one.dead for one in await self.store.backlog()}
        return self._dead.get(recipient, 0)

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
        try:
            lost = await verb(current)
        except Exception as error:
            log.warning(warning, len(current), error)
            failed = error if isinstance(error, StoreError) else StoreError(f"{type(error).__name__}: {error}")
        for ticket in tickets:
            one = ticket.settlement
            ticket.kept = newest[one.seq] == one.claims and one.seq not in lost
            ticket.failed = failed
            ticket.event.set()
