"""Carry live events to the other processes of one bus, and bring in theirs: bounded, at most once, waited for by none.

What is published here is fed here at once and goes out besides, so its echo is dropped by the id of this process. Every
event says which of its type it is, counted by its process: a number that is missing is a gap that readers are told of,
wherever it was lost, and a number that comes again is a duplicate.
"""

import logging
from collections import Counter, deque
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager

import anyio
from anyio.abc import TaskGroup
from anyio.lowlevel import EventLoopToken, checkpoint, current_token

from eventbus._loop import here
from eventbus._signal import Signal
from eventbus.clock import Runtime
from eventbus.context import Identity, Seed, origin_of
from eventbus.entries import unwrap, wrap
from eventbus.envelope import Envelope
from eventbus.errors import DecodeError, EventBusError, Lost, PublishError, TransportError, WrongLoopError
from eventbus.link import Backoff, Link
from eventbus.live import Live
from eventbus.registry import Registry
from eventbus.transport import Wire

__all__ = ("Broadcast", "Follower", "live_topic")

log = logging.getLogger("eventbus")

HEADER = "eventbus-live"
"""The header with the id of the publishing process, and which of its type the event is."""

TOGETHER = 32
"""Events that are encoded and published at once."""

PEERS = 1_000
"""Processes whose numbers are remembered per type; the one that was silent the longest gives way."""


def live_topic(owner: str, name: str) -> str:
    """Return the topic of live events: no consumer of the message itself may get their copies.

    >>> live_topic("shop", "order_placed")
    'shop.live.order_placed'
    """
    return f"{owner}.live.{name}"


class Broadcast:
    """Publish the events of this process, and follow those of the others while a stream wants their type."""

    def __init__(self, registry: Registry, link: Link, runtime: Runtime, live: Live) -> None:
        self.link = link
        self.topics: dict[type, str] = {
            subject.type: live_topic(registry.owner, subject.spec.name)
            for subject in registry.subjects.values()
            if not subject.command
        }
        """Event type -> its topic."""
        self.dropped = 0
        """Events of this process that did not get out."""
        self.changed = Signal()
        """Fires whenever an event went out or came in."""
        self.process = ""
        """Who we are among the processes of this bus, anew in every lifetime."""
        self.registry = registry
        self.runtime = runtime
        self.live = live
        self.listening = 0
        """Followers that have not left their subscription yet."""
        self._followers: dict[str, Follower] = {}
        self._waiting: deque[tuple[str, int, object, Identity]] = deque()
        self._sending = 0
        self._news = Signal()
        self._counts: Counter[str] = Counter()
        self._troubled = False
        self._staff: TaskGroup | None = None
        self._home: EventLoopToken | None = None
        promises = link.transport.capabilities
        self._by_key = promises.order == "key"
        self._shy = promises.unheard == "refused"

    def open(self, staff: TaskGroup) -> None:
        """Begin a lifetime: publish from now on, by a task of ``staff``."""
        self.process = self.runtime.ids()
        self._waiting.clear()
        self._followers = {}
        self._staff, self._home = staff, current_token()
        staff.start_soon(self._publish_all, name="eventbus live")

    def deafen(self) -> None:
        """Follow nobody any more: the streams have ended."""
        for follower in self._followers.values():
            follower.leave()

    async def flush(self, seconds: float) -> None:
        """Give what waits so many seconds to get out, and those who have been told to leave to be gone."""
        with self.runtime.clock.move_on_after(seconds):
            while self.link.is_up and (self.outstanding() or self.listening):
                await self.changed.wait()

    def close(self) -> None:
        """End the lifetime."""
        self._staff = self._home = None

    def outstanding(self) -> int:
        """Count what waits to go out."""
        return len(self._waiting) + self._sending

    def __iter__(self) -> Iterator["Follower"]:
        return iter(self._followers.values())

    def carries(self, type: type) -> bool:
        """Tell whether events of a type go out now."""
        return self._staff is not None and type in self.topics

    def offer(self, seed: Seed) -> None:
        """Let an event go out without waiting; where too many wait, the oldest gives way.

        Raises ``WrongLoopError`` outside the event loop of the bus, which could not be woken.
        """
        if here() != self._home:
            raise WrongLoopError("publishing an event that live= carries", "another event loop or thread")
        topic, most = self.topics[type(seed[0])], self.registry.wiring.limits.queue
        self._counts[topic] += 1
        if len(self._waiting) >= most:
            self._waiting.popleft()
            self._drop(1, f"{most} are waiting already")
        self._waiting.append((topic, self._counts[topic], seed[0], origin_of(seed).identity))
        self._news.fire()

    @asynccontextmanager
    async def followed(self, types: tuple[type, ...]) -> AsyncGenerator[None]:
        """Follow some types in the other processes; entered when they are followed, or the transport is away.

        Raises ``ValueError`` for a type of which no event could be read here.
        """
        for type_ in types:
            if not any(issubclass(known, type_) for known in self.topics):
                raise ValueError(
                    f"stream({type_.__name__}): with live= it follows other processes too, and the bus cannot read "
                    f"what it does not know: list the type in Module(messages=[{type_.__name__}])"
                )
        joined = [self._join(type_) for type_ in self.topics if issubclass(type_, types)]
        try:
            if self.link.is_up:
                with self.runtime.clock.move_on_after(self.registry.wiring.limits.connect):
                    for follower in joined:
                        await follower.tried.wait()
            yield
        finally:
            for follower in joined:
                self._leave(follower)

    def _join(self, type_: type) -> "Follower":
        topic = self.topics[type_]
        follower = self._followers.get(topic)
        if follower is None:
            follower = self._followers[topic] = Follower(self, type_)
            if self._staff is not None:
                self._staff.start_soon(follower.run, name=f"eventbus live {topic}")
        follower.readers += 1
        return follower

    def _leave(self, follower: "Follower") -> None:
        follower.readers -= 1
        if not follower.readers:
            follower.leave()
            if self._followers.get(follower.topic) is follower:
                del self._followers[follower.topic]

    async def _publish_all(self) -> None:
        """Publish what waits, one topic at a time, in its order; what fails is dropped and not tried again."""
        while True:
            while not self._waiting:
                await self._news.wait()
            if not await self._reached():
                left = len(self._waiting)
                self._waiting.clear()
                self._drop(left, f"transport {self.link.name!r} is not reachable")
            else:
                await self._publish_some()
            self.changed.fire()
            await checkpoint()

    async def _reached(self) -> bool:
        if not self.link.is_up:
            with self.runtime.clock.move_on_after(self.registry.wiring.limits.connect):
                await self.link.up()
        return self.link.is_up

    async def _publish_some(self) -> None:
        topic = self._waiting[0][0]
        wires: list[Wire] = []
        while self._waiting and self._waiting[0][0] == topic and len(wires) < (1 if self._by_key else TOGETHER):
            _, count, message, identity = self._waiting.popleft()
            self._sending += 1
            try:
                wires.append(self._wire(count, message, identity))
            except Exception as error:  # whatever it is, the publisher has long gone on
                self._drop(1, f"{type(message).__name__}: {error}")
        try:
            if wires:
                await self.link.publish(topic, wires)
                self._went_out()
        except TransportError as error:
            failures = [*error.failed.values()] if isinstance(error, PublishError) else [error] * len(wires)
            if self._shy and self.link.is_up and all(isinstance(failure, Lost) for failure in failures):
                return  # nobody listens, which is no trouble of anybody's
            self._drop(len(failures), str(error))
        except Exception:
            log.exception("live: publishing %s failed", topic)
            self._drop(len(wires), "the transport failed")
        finally:
            self._sending = 0

    def _wire(self, count: int, message: object, identity: Identity) -> Wire:
        """Return an event as it goes out; the key is the process, whose order is what its readers see."""
        spec = self.registry.subjects[type(message)].spec
        envelope = Envelope(
            id=identity.id,
            name=spec.name,
            version=spec.version,
            time=identity.time,
            source=self.registry.owner,
            correlation=identity.correlation,
            causation=identity.causation,
            key=self.process if self._by_key else None,
            headers={HEADER: f"{self.process} {count}"},
            body=self.registry.wiring.codec.encode(message),
        )
        return wrap(envelope, self.link.transport.capabilities)

    def _drop(self, events: int, why: str) -> None:
        self.dropped += events
        if not self._troubled:
            self._troubled = True
            log.warning("live: events do not get out to other processes: %s", why)

    def _went_out(self) -> None:
        if self._troubled:
            self._troubled = False
            log.warning("live: events get out again; %d were dropped so far", self.dropped)


class Follower:
    """Follow one event type in the other processes, for as long as a stream of this one wants it."""

    def __init__(self, broadcast: Broadcast, type: type) -> None:
        self.type = type
        self.topic = broadcast.topics[type]
        self.readers = 0
        self.over = False
        self.tried = anyio.Event()
        """Set when the first attempt to subscribe has ended, one way or the other."""
        self.connected = False
        self.taken = 0
        """Events of other processes."""
        self.backoff = Backoff(broadcast.runtime)
        self._broadcast = broadcast
        self._seen: dict[str, int] = {}
        self._waits = anyio.CancelScope()

    def leave(self) -> None:
        """Follow no more; the subscription is left in peace, and not by cancelling who is in it."""
        self.over = True
        self._waits.cancel()

    async def run(self) -> None:
        """Follow until nobody wants it any more; subscribe again after every loss."""
        self._broadcast.listening += 1
        try:
            while not self.over:
                await self._follow()
        finally:
            self._broadcast.listening -= 1
            self._broadcast.changed.fire()

    async def _follow(self) -> None:
        """Follow until the link is lost, and pause."""
        try:
            with anyio.CancelScope() as self._waits:
                await self._broadcast.link.up()
            if not self.over:
                await self._listen()
        except EventBusError as error:
            log.warning("live %s: %s", self.topic, error)
        except anyio.EndOfStream:
            log.warning("live %s: the subscription ended", self.topic)
        except Exception:
            log.exception("live %s failed", self.topic)
        finally:
            self.connected = False
            self._broadcast.changed.fire()
        self.tried.set()
        if not self.over:
            self.backoff.failed()
            with anyio.CancelScope() as self._waits:
                await self._broadcast.runtime.clock.sleep(self.backoff.pause())

    async def _listen(self) -> None:
        link, limits = self._broadcast.link, self._broadcast.registry.wiring.limits
        async with link.subscribe(
            self.topic, group=None, prefetch=limits.batch, lease=limits.lease, ordered=False
        ) as subscription:
            with anyio.CancelScope() as self._waits:
                if not self.over:
                    self._broadcast.live.miss(self.type, 0)  # who has been reading by now did so without the others
                    self.connected = True
                    self.backoff.opened()
                    self.tried.set()
                while not self.over:
                    delivery = await subscription.receive()
                    if not self.over:
                        self.take(delivery.wire)
                    await delivery.ack()
                    self._broadcast.changed.fire()

    def take(self, wire: Wire) -> None:
        """Feed an event of another process to the streams; what cannot be read is a gap."""
        owner, registry = self._broadcast, self._broadcast.registry
        missed, message = 0, None
        try:
            envelope, ours = unwrap(wire, registry.wiring.limits, owner.runtime.clock)
            process, count = _numbered(envelope.headers.get(HEADER, ""))
            if process == owner.process:
                return
            fresh = self._missed(process, count)
            if fresh is None:
                return
            missed = fresh
            type_ = registry.type_of(envelope.name, envelope.version)
            message = (registry.wiring.codec.reread if ours else registry.wiring.codec.decode)(envelope.body, type_)
        except DecodeError as error:
            log.warning("live %s: message %s cannot be read: %s", self.topic, wire.id, error)
            missed += 1
        if missed:
            owner.live.miss(self.type, missed)
        if message is not None:
            self.taken += 1
            owner.live.feed(message)

    def _missed(self, process: str, count: int) -> int | None:
        """Return how many of a process are missing before its event of this number; None: it came before."""
        if not process:
            return 0
        before = self._seen.pop(process, count - 1)
        self._seen[process] = max(count, before)
        if len(self._seen) > PEERS:
            del self._seen[next(iter(self._seen))]
        return count - before - 1 if count > before else None


def _numbered(text: str) -> tuple[str, int]:
    """Return the process and the number in a header; no process if it has not our form."""
    process, _, count = text.partition(" ")
    return (process, int(count)) if count.isascii() and count.isdecimal() and len(count) < 19 else ("", 0)
