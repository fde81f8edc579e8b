"""Know exactly what is outstanding, and move time from one due moment to the next."""

import math

import anyio
from anyio.lowlevel import checkpoint

from eventbus.bus import EventBus
from eventbus.testing.clock import VirtualClock
from eventbus.testing.record import Record
from eventbus.testing.watched import WatchedStore
from eventbus.transport import Delivery

__all__ = ("NotSettledError", "Settling")

PATIENCE = 30.0
"""Real seconds after which work that does not end is reported instead of waited for."""

HUNG = 1.0
"""Real seconds after which handlers that do nothing seem to wait for their timeout, which only time can bring."""

STEPS = 10
"""Turns of the event loop, without anything left to do, after which every task has set its next timer."""


class NotSettledError(AssertionError):
    """Say what was still going on when the patience of ``settled()`` ended."""


class Settling:
    """Wait until nothing is left to do at this moment of the held clock, and move the clock on."""

    def __init__(self, bus: EventBus, clock: VirtualClock, record: Record, store: WatchedStore | None) -> None:
        self._bus = bus
        self._clock = clock
        self._record = record
        self._store = store
        self._hung: set[Delivery] = set()

    def outstanding(self) -> int:
        """Count what runs or could start now: deliveries, handlers, calls to the store, readers of streams."""
        engine = self._bus.engine
        queued = 0 if engine.worker is None else engine.outstanding()
        calls = 0 if self._store is None else self._store.calls
        return queued + calls + self._record.inline + engine.live.behind()

    async def settle(self, *, moving: bool = False) -> None:
        """Return when nothing is outstanding; ``moving``: what waits for its timeout is left to it."""
        with anyio.move_on_after(PATIENCE) as scope:
            await self._quiet(moving)
        if scope.cancelled_caught:
            raise NotSettledError(f"after {PATIENCE:g} s still going on: {self._what()}{self._hint(moving)}")

    async def advance(self, seconds: float) -> None:
        """Move the clock, stopping at every due time on the way, and settle at each."""
        if not 0 <= seconds < math.inf:
            raise ValueError(f"advance() takes the seconds to move on, 0 or more, not {seconds!r}")
        target = self._clock.monotonic() + seconds
        await self.settle(moving=True)
        while (due := await self._next_due()) is not None and due <= target:
            self._clock.jump(due)
            await self.settle(moving=True)
        self._clock.jump(target)
        await self.settle(moving=True)

    async def _next_due(self) -> float | None:
        """Return the next moment at which anything can happen.

        Looking for what is due, and renewing leases, is a chore: where nothing is held, and the store says when its
        first entry is due, hours of them change nothing, and the last of them is done in time.
        """
        engine, clock = self._bus.engine, self._clock
        if self.outstanding() or clock.timed or engine.worker is None:
            return clock.next_due()
        moments = [clock.next_due(chores=False)]
        if self._store is not None and engine.claims:
            waits = (await self._store.store.due(list(engine.claims))).values()
            if any(wait <= 0 for wait in waits):  # due, and nobody takes it yet: only looking again will tell
                return clock.next_due()
            moments += [clock.monotonic() + wait for wait in waits]
        return min((moment for moment in moments if moment is not None), default=None)

    async def _quiet(self, moving: bool) -> None:
        engine, steps, taken = self._bus.engine, 0, -1
        while steps < STEPS:
            await checkpoint()
            left, before, taken = self.outstanding(), taken, engine.live.taken()
            steps = 0 if left or self._clock.waking or taken != before else steps + 1
            if engine.worker is None or not left or self._clock.waking or engine.live.behind():
                continue
            if not moving:
                await engine.worker.changed.wait()
                continue
            running = {delivery for channel in engine.worker.channels for delivery in channel.running}
            if running and running == self._hung and self._held_up():
                return
            with anyio.move_on_after(HUNG) as scope:
                await engine.worker.changed.wait()
            if scope.cancelled_caught and self._held_up():
                self._hung = running
                return

    def _held_up(self) -> bool:
        """Tell whether all that is outstanding has a timeout running, or waits for one that has."""
        timed = self._clock.timed
        return timed > 0 and self.outstanding() - self._record.inline <= timed

    def _what(self) -> str:
        worker = self._bus.engine.worker
        running = [
            f"{len(channel.running)} x {channel.source.name}"
            for channel in (worker.channels if worker else [])
            if channel.running
        ]
        running += [f"{self._record.inline} x inline"] if self._record.inline else []
        running += [f"{self._store.calls} x the store"] if self._store is not None and self._store.calls else []
        return ", ".join(running) or "messages that nobody took"

    def _hint(self, moving: bool) -> str:
        return "; a timeout= runs out in advance() only" if self._clock.timed and not moving else ""
