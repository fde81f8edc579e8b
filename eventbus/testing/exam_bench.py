"""What every check of the transport exam stands on: a bench, an open transport on a fresh topic, and patience."""

from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager, asynccontextmanager
from dataclasses import dataclass
from functools import partial

import anyio
from anyio import current_time

from eventbus.clock import new_id
from eventbus.errors import Lost, PublishError, TransportError
from eventbus.transport import Capabilities, Delivery, Subscription, Transport, Wire

__all__ = (
    "Bench",
    "Broker",
    "Check",
    "Desk",
    "Network",
    "always",
    "broker_of",
    "is_loss",
    "is_lost",
    "is_remote",
    "letters",
    "opened",
    "require",
    "until",
)


Make = Callable[[], Transport]
"""Returns a new transport, not opened, on the same broker every time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """Be a way to the broker on which a test can do what networks do; its end cuts every connection."""

    make: Make
    """Returns a new transport that goes this way."""
    swallow: Callable[[], None]
    """Lets all connections stand, and carries nothing any more."""
    delay: Callable[[float], None]
    """Holds whatever a transport writes back for so many seconds, and what it writes meanwhile goes together."""
    pieces: Callable[[], int]
    """Counts the pieces that were held back."""
    connections: Callable[[], int]
    """Counts the connections there are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Broker:
    """Say what a test can do to the broker itself, all of it on the same address and the same data."""

    start: Callable[[], Awaitable[None]]
    """Starts it unless it runs."""
    stop: Callable[[], Awaitable[None]]
    """Ends it in good order."""
    kill: Callable[[], Awaitable[None]]
    """Ends it as a crash would."""
    delete: Callable[[str, str], Awaitable[None]]
    """Deletes what a topic and a group have there: the queue, the stream or the group."""
    delete_dead: Callable[[str, str], Awaitable[None]]
    """Makes it impossible to keep what is dead for a topic and a group, until somebody subscribes again."""
    left: Callable[[str], Awaitable[Collection[str]]]
    """Names all that the broker keeps for the readers of a topic."""
    network: Callable[[], AbstractAsyncContextManager[Network]]
    """Yields a way to the broker."""
    age: float = 0.0
    """Seconds after which what was declared survives a kill."""
    count: int = 1_000
    """Messages that go through restarts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """Say how to get a transport, and how long to wait for it."""

    make: Make
    lease: float = 1.0
    """Passed to ``subscribe``."""
    patience: float = 5.0
    """Seconds within which whatever must come has come."""
    quiet: float = 0.1
    """Seconds after which nothing more will come: longer than two polls of the transport."""
    dead: Callable[[Transport, str, str], Awaitable[Sequence[tuple[str, str]]]] | None = None
    """Returns id and reason of each dead message of a topic and a group; needed if ``dead`` is declared."""
    faulty: Callable[[Transport], AbstractContextManager[object]] | None = None
    """Has the client library fail, in a block, each wire with the body ``b"fault"``; needed if they are confirmed."""
    broker: Broker | None = None
    """What can be done to the broker, for ``BROKER_CHECKS``."""


@dataclass(frozen=True, slots=True)
class Check:
    """Be one question of the exam, asked of transports whose capabilities it ``needs``."""

    number: int
    needs: Callable[[Capabilities], bool]
    run: Callable[[Bench], Awaitable[None]]

    @property
    def title(self) -> str:
        """Return what is asked, in one sentence."""
        return (self.run.__doc__ or "").strip().splitlines()[0]

    def __str__(self) -> str:
        return f"{self.number:02} {self.title}"


def broker_of(bench: Bench) -> Broker:
    """Return what can be done to the broker. Raises ``AssertionError`` if the bench does not say."""
    if bench.broker is None:
        raise AssertionError("this check stops the broker: say how by Bench(broker=...)")
    return bench.broker


def is_remote(capabilities: Capabilities) -> bool:
    """Need a broker behind a network."""
    return not capabilities.local


def always(capabilities: Capabilities) -> bool:
    """Need nothing."""
    return bool(capabilities)


def require(fact: object, otherwise: str) -> None:
    """Raise ``AssertionError`` unless something is so."""
    if not fact:
        raise AssertionError(otherwise)


def letters(count: int, *, key: str | None = None) -> list[Wire]:
    """Return so many different wires."""
    return [Wire(new_id(), b'{"number": %d}' % number, key=key) for number in range(count)]


def is_loss(error: TransportError) -> bool:
    """Tell whether an error says "try later", and nothing else."""
    failed = error.failed.values() if isinstance(error, PublishError) else [error]
    return all(isinstance(one, Lost) for one in failed)


async def is_lost(subscription: Subscription, within: float) -> None:
    """Raise ``AssertionError`` unless a subscription says in time that it is lost."""
    with anyio.move_on_after(within):
        try:
            await subscription.receive()
        except Lost:
            return
        raise AssertionError("something was received")
    raise AssertionError(f"receive said nothing for {within:g} s")


async def until(fact: Callable[[], bool], patience: float, otherwise: str) -> None:
    """Wait until something is so. Raises ``AssertionError`` when patience ends."""
    end = current_time() + patience
    while not fact():
        require(current_time() < end, otherwise)
        await anyio.sleep(0.005)


@dataclass(frozen=True, slots=True)
class Desk:
    """Hold an open transport and a topic that nobody else uses."""

    bench: Bench
    transport: Transport
    topic: str

    async def publish(self, wires: Sequence[Wire]) -> None:
        """Publish to the topic."""
        await self.transport.publish(self.topic, wires)

    def subscribe(
        self, group: str | None = "a", *, topic: str = "", prefetch: int = 100, ordered: bool = False
    ) -> AbstractAsyncContextManager[Subscription]:
        """Subscribe to the topic; where there are no groups, to what is broadcast."""
        group = group if self.transport.capabilities.groups else None
        lease = self.bench.lease
        return self.transport.subscribe(
            topic or self.topic, group=group, prefetch=prefetch, lease=lease, ordered=ordered
        )

    async def take(self, subscription: Subscription, count: int, *, within: float | None = None) -> list[Delivery]:
        """Return the next ``count`` deliveries, unsettled. Raises ``AssertionError`` if they do not come in time."""
        taken: list[Delivery] = []
        patience = self.bench.patience if within is None else within
        with anyio.move_on_after(patience):
            while len(taken) < count:
                taken.append(await subscription.receive())
        require(len(taken) == count, f"{len(taken)} of {count} messages arrived within {patience:g} s")
        return taken

    async def clear(self, subscription: Subscription, count: int) -> list[str]:
        """Take and ack ``count`` deliveries one by one; return their ids."""
        ids: list[str] = []
        for _ in range(count):
            [delivery] = await self.take(subscription, 1)
            await delivery.ack()
            ids.append(delivery.wire.id)
        return ids

    async def silence(self, subscription: Subscription, why: str) -> None:
        """Raise ``AssertionError`` if anything more arrives."""
        with anyio.move_on_after(self.bench.quiet):
            delivery = await subscription.receive()
            raise AssertionError(f"message {delivery.wire.id} arrived (attempt {delivery.attempt}), but {why}")

    async def work(self, subscription: Subscription, done: list[str], pause: float = 0.0) -> None:
        """Handle deliveries for ever: note the id, wait, ack."""
        while True:
            delivery = await subscription.receive()
            done.append(delivery.wire.id)
            await anyio.sleep(pause)
            await delivery.ack()


@asynccontextmanager
async def opened(bench: Bench, *groups: str, ordered: bool = False) -> AsyncGenerator[Desk]:
    """Open a transport and declare a new topic with groups, twice at once and once more, as processes do."""
    which = groups if ordered else ()
    async with bench.make() as transport:
        desk = Desk(bench, transport, f"exam.{new_id()}")
        groups = groups if transport.capabilities.groups else ()
        async with anyio.create_task_group() as tasks:
            for _ in range(2):
                tasks.start_soon(partial(transport.declare, desk.topic, groups, ordered=which))
        await transport.declare(desk.topic, groups, ordered=which)
        yield desk
