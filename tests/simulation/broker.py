"""One broker that several simulated processes share, and the link through which each of them reaches it."""

from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Self, TypeVar

import anyio

from eventbus.errors import Lost, PublishError, Refused, SettleError
from eventbus.transport import Delivery, Subscription, Wire
from eventbus.transports._memory_queue import Reader
from eventbus.transports.memory import MemoryTransport

if TYPE_CHECKING:
    from tests.simulation.world import Process, World

__all__ = ("OTHERS", "Broker", "Link")

T = TypeVar("T")
OTHERS = "others"
"""The group of another service, which hears everything and never answers."""


class Broker:
    """Keep queues; a process reaches them through its ``Link``."""

    def __init__(self, world: "World") -> None:
        self.world = world
        self.server = MemoryTransport(limits=world.limits, clock=world)  # type: ignore[arg-type]
        self.readers: dict[Reader, Process] = {}
        self.heard: Counter[str] = Counter()

    def disconnect(self, process: "Process | None") -> None:
        """Break the subscriptions of a process, or of all of them; what is unsettled goes back."""
        for reader, owner in list(self.readers.items()):
            if process in (None, owner):
                reader.lose("the link broke")


class Link:
    """Be the broker as one process sees it: late, failing, away, delivering twice."""

    def __init__(self, process: "Process") -> None:
        self.process = process
        self.world = process.world
        self.broker = process.world.broker
        promises = self.broker.server.capabilities
        self.capabilities = replace(promises, confirm="stored", unheard="kept", backends=frozenset({"trio"}))

    async def call(self, what: str, effect: Callable[[], Awaitable[T]], lost: Callable[[str], Exception] = Lost) -> T:
        """Do something at the broker, unless a fault prevents it; its answer may get lost."""
        process, world = self.process, self.world
        await process.gate()
        fault = world.fault("broker")
        await world.latency()
        await process.gate()
        if not process.alive:
            raise Lost("this process is dead")
        if fault == "before":
            world.note(process.name, f"{what} fails")
            raise lost(f"{what} failed")
        result = await effect()
        world.note(process.name, what)
        if fault == "after":
            world.note(process.name, f"{what} fails afterwards")
            raise lost(f"the answer to {what} got lost")
        await world.latency()
        await process.gate()
        return result

    async def __aenter__(self) -> Self:
        await self.call("open", anyio.lowlevel.checkpoint)
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.broker.disconnect(self.process)

    async def declare(self, topic: str, groups: Sequence[str], *, ordered: Collection[str] = ()) -> None:
        """Create queues."""
        await self.call(f"declare {topic}", lambda: self.broker.server.declare(topic, groups))

    async def publish(self, topic: str, wires: Sequence[Wire]) -> None:
        """Publish, sometimes twice."""

        async def effect() -> None:
            refused = self.world.oracle.refuses(wires[0].id)
            if refused:
                self.world.note(self.process.name, f"{wires[0].id} is refused")
                raise PublishError({0: Refused("not today")})
            await self.broker.server.publish(topic, wires)
            self.broker.heard.update(wire.id for wire in wires)
            self.world.oracle.went_out(wires)
            if self.world.faulty and self.world.random.random() < self.world.traits.errors:
                await self.broker.server.publish(topic, wires)

        def lost(why: str) -> PublishError:
            return PublishError(dict.fromkeys(range(len(wires)), Lost(why)))

        await self.call("publish " + " ".join(wire.id for wire in wires), effect, lost)

    @asynccontextmanager
    async def subscribe(
        self, topic: str, *, group: str | None, prefetch: int, lease: float, ordered: bool = False
    ) -> AsyncGenerator[Subscription]:
        """Subscribe."""
        await self.call(f"subscribe {topic}", anyio.lowlevel.checkpoint)
        async with self.broker.server.subscribe(
            topic, group=group, prefetch=prefetch, lease=lease, ordered=ordered
        ) as reader:
            if not isinstance(reader, Reader):
                raise TypeError("the memory transport has another kind of subscription now")
            self.broker.readers[reader] = self.process
            try:
                yield _Line(self, reader)
            finally:
                del self.broker.readers[reader]


class _Line:
    """Be one subscription."""

    def __init__(self, link: Link, reader: Reader) -> None:
        self._link = link
        self._reader = reader

    async def receive(self) -> Delivery:
        """Return the next delivery."""
        parcel = _Parcel(self._link, self._reader, await self._reader.receive())
        self._link.world.note(self._link.process.name, f"receives {parcel.wire.id}")
        await self._link.process.gate()
        return parcel

    async def stop(self) -> None:
        """Take no more in."""
        await self._link.call("stop", self._reader.stop)


class _Parcel:
    """Be one delivery; a settlement that fails means that the link is broken, and what it carried goes back."""

    def __init__(self, link: Link, reader: Reader, inner: Delivery) -> None:
        self._link = link
        self._reader = reader
        self._inner = inner
        self.wire = inner.wire
        self.attempt = inner.attempt

    async def ack(self) -> None:
        """Settle it as done."""
        self._link.world.oracle.acknowledged(self.wire.id)
        await self._settle(f"ack {self.wire.id}", self._inner.ack)

    async def retry(self, after: float) -> None:
        """Give it back."""
        await self._settle(f"retry {self.wire.id}", lambda: self._inner.retry(after))

    async def reject(self, reason: str) -> None:
        """Settle it as dead."""
        await self._settle(f"reject {self.wire.id}", lambda: self._inner.reject(reason))

    async def extend(self) -> None:
        """Do nothing: the open subscription is the lease."""

    async def _settle(self, what: str, effect: Callable[[], Awaitable[None]]) -> None:
        try:
            await self._link.call(what, effect, SettleError)
        except SettleError:
            self._reader.lose("the link broke")
            raise
