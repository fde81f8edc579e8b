"""Keep one transport open, and open it again when it is lost: the only loop that reconnects."""

import logging
import sys
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from typing import NamedTuple

import anyio
import anyio.abc

from eventbus.clock import Runtime
from eventbus.limits import Limits
from eventbus.retry import Retry
from eventbus.transport import Lost, PublishError, Refused, Subscription, Transport, TransportError, Wire

__all__ = ("Backoff", "Link", "Outage", "Progress")

log = logging.getLogger("eventbus")

PAUSES = Retry(attempts=1, initial=0.1, maximum=10.0)
"""How long to wait before the n-th attempt to open again."""


class Backoff:
    """Say how long to wait before something is opened again; what did not last counts as failed."""

    def __init__(self, runtime: Runtime) -> None:
        self.failures = 0
        """Openings in a row that failed or did not last."""
        self._runtime = runtime
        self._opened: float | None = None

    def opened(self) -> None:
        """Note that it opened."""
        self._opened = self._runtime.clock.monotonic()

    def failed(self) -> None:
        """Note that it did not open, or is lost."""
        now = self._runtime.clock.monotonic()
        lasted = self._opened is not None and now - self._opened >= PAUSES.maximum
        self.failures = 1 if lasted else self.failures + 1
        self._opened = None

    def pause(self) -> float:
        """Return the seconds to wait before the next attempt."""
        return PAUSES.wait(max(self.failures, 1), self._runtime.random)


class Progress(NamedTuple):
    """Say how a source gets on that asks for what it gets; the times are the clock's monotonic ones."""

    asked: float | None
    """Since when it waits for an answer."""
    answered: float | None
    """When it got the last one."""
    paused: bool
    """Whether it asks for nothing, or gets rid of nothing."""


class Outage:
    """Say when to try again what many do at once, so that a short outage costs a short wait, however many meet it."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._failures = 0
        self._until = 0.0

    def failed(self) -> float:
        """Return the seconds to wait after a failure; what fails before they are over waits for the same moment."""
        now = self._runtime.clock.monotonic()
        if not self._failures or now >= self._until:
            self._failures += 1
            self._until = now + PAUSES.wait(self._failures, self._runtime.random)
        return self._until - now

    def lasts(self, grace: float) -> bool:
        """Tell whether the last wait is not over, nor the seconds of grace after it."""
        return self._failures > 0 and self._runtime.clock.monotonic() < self._until + grace

    def over(self) -> None:
        """Note that something went well."""
        self._failures = 0


class Link:
    """Hold one transport by its name; ``keep`` runs for the life of the bus, everybody else waits until it is up."""

    def __init__(self, name: str, transport: Transport, runtime: Runtime, limits: Limits) -> None:
        self.name = name
        self.transport = transport
        self.topics: dict[str, tuple[str, ...]] = {}
        """Topic -> groups to declare at every opening."""
        self.ordered: dict[str, tuple[str, ...]] = {}
        """Topic -> those of its groups that have one key in one process."""
        self.backoff = Backoff(runtime)
        self._runtime = runtime
        self._limits = limits
        self._up = anyio.Event()
        self._down = anyio.Event()
        self._probed: set[str] = set()

    @property
    def is_up(self) -> bool:
        """Tell whether the transport is open now."""
        return self._up.is_set()

    def misplaced(self) -> str | None:
        """Return what is wrong with opening the transport in this event loop, or None."""
        asyncio = sys.modules.get("asyncio")  # whoever runs on it has imported it, and it takes its time
        try:
            here = "trio" if asyncio is None or asyncio.get_running_loop() is None else "asyncio"
        except RuntimeError:
            here = "trio"
        offered = self.transport.capabilities.backends
        if here in offered:
            return None
        return f"transport {self.name!r} runs on {' and '.join(sorted(offered))}, and this event loop is {here}'s"

    async def keep(self, *, task_status: anyio.abc.TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Open the transport, and again after every loss, until cancelled; started after the first attempt.

        A first attempt that ends in anything but ``Lost`` raises it, ``Refused`` if the broker does not let us in:
        waiting would not mend that. Later it is tried again, for a password that was changed comes back too.
        """
        self._up, first = anyio.Event(), True
        while True:
            try:
                async with self.transport:
                    await self._declare()
                    self._down = anyio.Event()
                    self.backoff.opened()
                    self._up.set()
                    if first:
                        first = False
                        task_status.started()
                    await self._down.wait()
            except TransportError as error:
                if first and not isinstance(error, Lost):
                    raise Refused(f"transport {self.name}: {error}") from error
                log.warning("transport %s: %s; it is tried again until it opens", self.name, str(error).rstrip("."))
            except Exception:
                if first:
                    raise
                log.exception("transport %s failed", self.name)
            finally:
                self._close()
            self.backoff.failed()
            if first:
                first = False
                task_status.started()
            await self._runtime.clock.sleep(self.backoff.pause())

    async def up(self) -> None:
        """Wait until the transport is open."""
        while not self.is_up:
            await self._up.wait()

    async def publish(self, topic: str, wires: Sequence[Wire]) -> None:
        """Publish through the open transport. Raises ``Lost`` if it does not come up in ``Limits.connect`` seconds."""
        if not self.is_up:
            with self._runtime.clock.move_on_after(self._limits.connect):
                await self.up()
            if not self.is_up:
                raise Lost(f"transport {self.name!r} has not been reachable for {self._limits.connect:g} s: try later")
        life = self._up
        try:
            await self.transport.publish(topic, wires)
        except TransportError as error:
            failures = error.failed.values() if isinstance(error, PublishError) else [error]
            if any(isinstance(failure, Lost) for failure in failures) and life is self._up:
                await self._probe(topic)
            raise

    async def declare(self) -> None:
        """Open the transport for as long as it takes to declare all topics. Raises ``TransportError``."""
        async with self.transport:
            for topic in self.topics:
                await self._declare_one(topic)

    @asynccontextmanager
    async def subscribe(
        self, topic: str, *, group: str | None, prefetch: int, lease: float, ordered: bool
    ) -> AsyncGenerator[Subscription]:
        """Subscribe to a topic once the transport is open; what was deleted meanwhile is declared anew."""
        await self.up()
        life = self._up
        try:
            groups = () if group is None else (group,)
            await self.transport.declare(topic, groups, ordered=groups if ordered else ())
        except Lost:
            self._lost(life)
            raise
        async with self.transport.subscribe(
            topic, group=group, prefetch=prefetch, lease=lease, ordered=ordered
        ) as subscription:
            yield subscription

    async def _declare(self) -> None:
        """Declare all topics; one that the broker refuses is the trouble of its own subscribers and publishers."""
        for topic in self.topics:
            try:
                await self._declare_one(topic)
            except Lost:
                raise
            except TransportError as error:
                log.warning("transport %s: declaring %s: %s", self.name, topic, error)

    async def _declare_one(self, topic: str) -> None:
        await self.transport.declare(topic, self.topics.get(topic, ()), ordered=self.ordered.get(topic, ()))

    async def _probe(self, topic: str) -> None:
        """Declare a topic anew, which heals one that was deleted; a link that cannot even do this is lost."""
        if topic in self._probed:
            return
        self._probed.add(topic)
        life = self._up
        try:
            await self._declare_one(topic)
        except Lost as error:
            log.warning("transport %s: %s", self.name, error)
            self._lost(life)
        except TransportError as error:
            log.warning("transport %s: declaring %s: %s", self.name, topic, error)
        finally:
            self._probed.discard(topic)

    def _lost(self, life: anyio.Event) -> None:
        """End one life of the transport, unless it is over already."""
        if life is self._up:
            self._close()
            self._down.set()

    def _close(self) -> None:
        if self._up.is_set():
            self._up = anyio.Event()
