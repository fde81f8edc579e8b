"""Own the tasks of all sources, from start to drain."""

import logging
from collections.abc import Sequence
from math import inf

import anyio

from eventbus._signal import Signal
from eventbus.channel import Channel, Source
from eventbus.clock import Runtime, SystemClock
from eventbus.limits import Limits

__all__ = ("Worker",)

log = logging.getLogger("eventbus")

BEAT, STALL, AGAIN = 0.5, 1.0, 60.0
"""Seconds between two looks at the time; by which one is late after a stall; until the same handler is named again."""
UNSEEN = "an endpoint, or a handler without a route"
STALLED = (
    "the event loop stood still for %.1f s while these were at work: %s; one of them may block it: write it as `def`, "
    "which runs in a thread, or call what blocks by anyio.to_thread.run_sync"
)


class Worker:
    """Own the tasks of all sources, from start to drain."""

    def __init__(self, sources: Sequence[Source], runtime: Runtime, limits: Limits) -> None:
        self.changed = Signal()
        """Fires whenever something was settled or parked."""
        self.channels = [Channel(source, runtime, self.changed) for source in sources]
        self.stalls = 0
        """How often the event loop stood still for a second or more, as far as it was noticed."""
        self._limits = limits
        self._clock = runtime.clock

    async def run(self) -> None:
        """Run all sources until ``drain`` has ended them."""
        async with anyio.create_task_group() as watch:
            if isinstance(self._clock, SystemClock):  # any other says nothing about this event loop
                watch.start_soon(self._watch, name="eventbus stalls")
            async with anyio.create_task_group() as group:
                for channel in self.channels:
                    group.start_soon(channel.run, name=f"eventbus {channel.source.name}")
            watch.cancel_scope.cancel()

    async def _watch(self) -> None:
        """Tell of an event loop that stood still, which nobody could interrupt, and of who was at work meanwhile."""
        told: dict[str, float] = {}
        while True:
            handled, began = [channel.handled for channel in self.channels], self._clock.monotonic()
            await self._clock.sleep(BEAT)
            now = self._clock.monotonic()
            if now - began < BEAT + STALL:
                continue
            self.stalls += 1
            pairs = zip(self.channels, handled, strict=True)
            busy = [one.source.name.rpartition("@")[2] for one, before in pairs if one.running or one.handled > before]
            busy = [name for name in busy if "/" in name] or [UNSEEN]
            names = [name for name in busy if now - told.get(name, -inf) >= AGAIN]
            if names:
                told |= dict.fromkeys(names, now)
                log.warning(STALLED, now - began - BEAT, ", ".join(names))

    def cut(self) -> None:
        """Cancel all handlings now, so that a drain has nothing to wait for."""
        for channel in self.channels:
            channel.slots.cancel()
        self.changed.fire()

    async def drain(self) -> None:
        """Stop intake at once, let running handlers finish, hand the rest back: in parallel, one deadline."""
        reserve = min(2.0, self._limits.drain / 4)
        async with anyio.create_task_group() as group:
            for channel in self.channels:
                group.start_soon(channel.drain, self._limits.drain - reserve, reserve, self._left)

    def _left(self) -> bool:
        """Tell whether something runs, or could start now, that would be lost with this process."""
        remaining = {one.source.remaining for one in self.channels if one.source.remaining is not None}
        later = sum(one.later() for one in self.channels if one.source.remaining is not None)
        return any(one.running for one in self.channels) or sum(count() for count in remaining) > later
