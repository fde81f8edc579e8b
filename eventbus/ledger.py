"""Write what becomes of claimed entries: settlements and leases of one moment, whoever's they are, together."""

import logging

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
        """Renew a lease; False if it was lost. A store in trouble loses nothing yet: the next round tries again."""
        ticket = _Ticket(Settlement(seq, claims, "done"))
        self._extensions.append(ticket)
        self._news.fire()
        await ticket.event.wait()
        return ticket.kept

    async def run(self) -> None:
        """Write what comes, until cancelled."""
        while True:
            if not self._tickets and not self._extensions:
                await self._news.wait()
            await checkpoint()  # whoever settles in this moment too joins the statement
            if self._extensions:
                await self._extend_all()
            if not self._tickets:
                continue
            tickets, self._tickets = self._tickets[: self.limits.batch], self._tickets[self.limits.batch :]
            lost: frozenset[int] = frozenset()
            failed: StoreError | None = None
            try:
                lost = await self.store.settle([ticket.settlement for ticket in tickets])
            except Exception as error:
                log.warning("settling %d entries failed, their leases decide: %s", len(tickets), error)
                failed = error if isinstance(error, StoreError) else StoreError(f"{type(error).__name__}: {error}")
            for ticket in tickets:
                ticket.kept = ticket.settlement.seq not in lost
                ticket.failed = failed
                ticket.event.set()

    async def dead(self, recipient: str, *, fresh: bool) -> int:
        """Return how many of a recipient's messages are dead: ``fresh``, or as of the last sweep at the latest."""
        now = self.runtime.clock.monotonic()
        if fresh or now - self._counted >= self.limits.sweep:
            self._counted = now
            self._dead = {one.recipient: one.dead for one in await self.store.backlog()}
        return self._dead.get(recipient, 0)

    async def _extend_all(self) -> None:
        tickets, self._extensions = self._extensions, []
        held = [(ticket.settlement.seq, ticket.settlement.claims) for ticket in tickets]
        lost: frozenset[int] = frozenset()
        try:
            lost = await self.store.extend(held, self.limits.lease)
        except Exception as error:
            log.warning("%d leases could not be extended: %s", len(held), error)
        for ticket in tickets:
            ticket.kept = ticket.settlement.seq not in lost
            ticket.event.set()
