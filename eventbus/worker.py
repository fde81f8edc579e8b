"""Own the tasks of all sources, from start to drain."""

from collections.abc import Sequence

import anyio

from eventbus._signal import Signal
from eventbus.channel import Channel, Source
from eventbus.clock import Runtime
from eventbus.limits import Limits

__all__ = ("Worker",)


class Worker:
    """Own the tasks of all sources, from start to drain."""

    def __init__(self, sources: Sequence[Source], runtime: Runtime, limits: Limits) -> None:
        self.changed = Signal()
        """Fires whenever something was settled or parked."""
        self.channels = [Channel(source, runtime, self.changed) for source in sources]
        self._limits = limits

    async def run(self) -> None:
        """Run all sources until ``drain`` has ended them."""
        async with anyio.create_task_group() as group:
            for channel in self.channels:
                group.start_soon(channel.run, name=f"eventbus {channel.source.name}")

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
