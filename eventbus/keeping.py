"""Keep house in the store: announce who listens, sweep what is old."""

import logging

from eventbus.errors import StoreError
from eventbus.ledger import Ledger
from eventbus.registry import Registry
from eventbus.routes import STORE
from eventbus.store import Interest

__all__ = ("StoreKeeper",)

log = logging.getLogger("eventbus")

ROUNDS = 100
"""Batches that one round of sweeping prunes at most."""
ANNOUNCE = 3600.0
"""Seconds between two announcements of our handlers."""


class StoreKeeper:
    """Do what a store needs from every process that uses it."""

    def __init__(self, registry: Registry, ledger: Ledger) -> None:
        self._registry = registry
        self._ledger = ledger

    async def announce(self) -> None:
        """Tell the store which handlers there are, and which names they had before."""
        registry = self._registry
        interests = [
            Interest(registry.queue(known.handler), subject.spec.name, known.handler.options.ordered)
            for subject in registry.subjects.values()
            if subject.source == STORE
            for known in subject.routed
        ]
        aliases = [
            (f"{registry.owner}/{alias}", registry.queue(known.handler))
            for known in registry.known
            for alias in known.handler.options.aliases
        ]
        await self._ledger.store.announce(interests, aliases=aliases)

    async def _sweep(self) -> None:
        """Sweep batch after batch, so that a busy store is pruned as fast as it fills, within a round's bound."""
        limits = self._ledger.limits
        for _ in range(ROUNDS):
            swept = await self._ledger.store.sweep(retention=limits.retention, lease=limits.lease, batch=limits.batch)
            self._ledger.heard()
            if swept < limits.batch:
                return

    async def keep(self) -> None:
        """Sweep at once, then sweep and announce until cancelled; a store in trouble is tried at the next round."""
        clock, limits = self._ledger.runtime.clock, self._ledger.limits
        announced = clock.monotonic()
        while True:
            try:
                await self._sweep()
                if clock.monotonic() - announced >= ANNOUNCE:
                    await self.announce()
                    announced = clock.monotonic()
            except StoreError as error:
                self._ledger.heard(troubled=True)
                log.warning("sweeping the store: %s", error)
            await clock.sleep(limits.sweep)
