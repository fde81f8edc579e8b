"""Carry wires within one process: a real transport without a network, and the reference of the port.

Each group of a topic has one bounded queue, always in the order of publication. A wire goes into the queues of all
groups at once or of none; while one is full, publishers wait in line. A broadcast subscriber has a queue of its own
that nobody waits for: when it is full, the subscriber has fallen behind, and its next ``receive`` says so.
"""

import math
from collections import deque
from collections.abc import AsyncGenerator, Collection, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Self

import anyio
from anyio.abc import TaskGroup
from anyio.lowlevel import checkpoint

from eventbus._urls import options_of, split_url
from eventbus.clock import Clock, SystemClock
from eventbus.context import draining
from eventbus.errors import Lost, PublishError, QueueFullError, Refused, TransportError
from eventbus.limits import Limits
from eventbus.store import DeadEntry, DeadFilter
from eventbus.transport import Capabilities, Subscription, Wire, check_prefetch
from eventbus.transports._memory_queue import FAIR, Publisher, Queue, Reader, Shelf, Topic

__all__ = ("MemoryTransport", "queue_id")

OPTIONS = ("queue", "dead", "body")
"""The ceilings of ``Limits`` that a URL may set."""


def queue_id(topic: str, group: str) -> str:
    """Return what a group's queue is called in errors; ``eventbus.context.draining`` may hold it, or the group.

    >>> queue_id("shop.order_placed", "shop/billing.invoice")
    'shop.order_placed@shop/billing.invoice'
    """
    return f"{topic}@{group}"


DEFAULTS = Limits()


class MemoryTransport:
    """Carry wires between the tasks of one process.

    A queue holds ``Limits.queue`` unsettled messages; beyond it publishers wait, but a handler that would wait for
    the queue it drains gets ``QueueFullError``. A group with ``Limits.dead`` dead messages pauses until some are
    replayed or discarded. Whatever is queued, delayed or dead outlives closing and opening again, not the process.

    >>> MemoryTransport(limits=Limits(queue=100)).capabilities.unheard
    'refused'
    """

    def __init__(self, *, limits: Limits | None = None, clock: Clock | None = None) -> None:
        self._limits = limits or Limits()
        self._shelf = Shelf(self._limits, clock or SystemClock())
        self._topics: dict[str, Topic] = {}
        self._readers: dict[Reader, None] = {}
        self._tasks: TaskGroup | None = None
        self.capabilities = Capabilities(
            confirm="none", unheard="refused", groups=True, broadcast=True, returns="link", settle="each",
            attempts=True, retry=math.inf, grain=0.001, dead=True, order="exclusive", headers=True,
            max_bytes=self._limits.body, backends=frozenset({"asyncio", "trio"}), local=True,
        )  # fmt: skip

    @classmethod
    def from_url(cls, url: str, *, limits: Limits = DEFAULTS) -> Self:
        """Return the transport of ``memory://?queue=1000``. Raises ``ValueError`` for what it does not know."""
        parts = split_url(url)
        given = options_of(parts, OPTIONS)
        if not all(map(str.isdecimal, given.values())) or parts.netloc or parts.path or parts.fragment:
            raise ValueError(f"memory:// takes whole numbers for {', '.join(OPTIONS)}, each once, and nothing else")
        return cls(limits=replace(limits, **{name: int(value) for name, value in given.items()}))

    async def __aenter__(self) -> Self:
        """Open, with what the last opening left; the task that opens it also closes it."""
        if self._tasks is not None:
            raise TransportError("the memory transport is open already")
        self._tasks = await anyio.create_task_group().__aenter__()
        self._tasks.start_soon(self._shelf.ripen, name="eventbus memory timer")
        return self

    async def __aexit__(self, *exc: object) -> None:
        """End every subscription and fail every waiting publisher with ``Lost``."""
        tasks, self._tasks = self._tasks, None
        for reader in self._readers:
            reader.lose("the memory transport was closed")
        for topic in self._topics.values():
            while topic.line:
                topic.line.popleft().event.set()
        if tasks is not None:
            tasks.cancel_scope.cancel()
            await tasks.__aexit__(None, None, None)

    async def declare(self, topic: str, groups: Sequence[str], *, ordered: Collection[str] = ()) -> None:
        """Create the queues that are missing; every one can be ordered."""
        road = self._topics.setdefault(topic, Topic(topic, self._limits.queue))
        for group in groups:
            road.queues.setdefault(group, Queue(self._shelf, road, group))
        self._untie()

    async def publish(self, topic: str, wires: Sequence[Wire]) -> None:
        """Put wires into the queue of every group, waiting for room; cancelling takes back what is still in line.

        Raises ``PublishError`` with ``Refused`` for what is too large and ``Lost`` where nobody listens or the
        transport is closed, and ``QueueFullError`` if the calling handler would wait for itself.
        """
        self._shelf.calls += 1
        if not self._shelf.calls % FAIR:
            await checkpoint()
        road, largest, left, why = self._topics.get(topic), self._limits.body, 0, "the memory transport is not open"
        fit = [wire for wire in wires if len(wire.body) <= largest]
        if self._tasks is None:
            left = len(fit)
        elif road is None or not (road.queues or road.readers):
            left, why = len(fit), f"nobody listens to {topic!r}: declare a group or subscribe first"
        elif fit and road.room() < len(fit):
            left = await self._wait(road, fit)
        else:
            road.put(fit)
        if left or len(fit) < len(wires):
            failed: dict[int, Lost | Refused] = {}
            for index, wire in enumerate(wires):
                if len(wire.body) > largest:
                    failed[index] = Refused(f"its body of {len(wire.body)} bytes is larger than Limits(body={largest})")
            small = [index for index in range(len(wires)) if index not in failed]
            raise PublishError(failed | dict.fromkeys(small[len(small) - left :], Lost(why)))

    @asynccontextmanager
    async def subscribe(
        self, topic: str, *, group: str | None, prefetch: int, lease: float, ordered: bool = False
    ) -> AsyncGenerator[Subscription]:
        """Subscribe to what a group gets, or with None to what is published from now on; no lease ever runs out."""
        check_prefetch(prefetch)
        if self._tasks is None:
            raise Lost("the memory transport is not open")
        await self.declare(topic, () if group is None else (group,))
        road = self._topics[topic]
        queue = Queue(self._shelf, road, None) if group is None else road.queues[group]
        reader = Reader(queue, prefetch, ordered)
        self._readers[reader] = None
        if group is None:
            road.readers = (*road.readers, reader)
        if ordered:
            queue.heirs.append(reader)
        try:
            yield reader
        finally:
            del self._readers[reader]
            reader.lose("the subscription was left")

    def outstanding(self, now: float | None = None) -> int:
        """Count what is delivered and unsettled, or could be delivered at ``now`` (monotonic; None: this moment)."""
        queues = [queue for road in self._topics.values() for queue in road.queues.values()]
        queues += [reader.queue for road in self._topics.values() for reader in road.readers]
        return sum(queue.size - queue.stalled() for queue in queues) - self.delayed(now)

    def delayed(self, now: float | None = None) -> int:
        """Count what is due only after ``now`` (monotonic; None: this moment)."""
        moment = self._shelf.clock.monotonic() if now is None else now
        return sum(due > moment for due, _, _ in self._shelf.delayed)

    async def dead(self, chosen: DeadFilter) -> Sequence[DeadEntry]:
        """Return chosen dead entries, oldest first; ``message`` is the topic there, and ``handler`` the group."""
        return [entry for _, entry in self._shelf.find(chosen)]

    async def replay(self, chosen: DeadFilter) -> Mapping[str, int]:
        """Put chosen dead messages back at their places, attempts forgotten; return how many per group."""
        replayed: dict[str, int] = {}
        for copy in self._shelf.exhume(chosen):
            copy.queue.size += 1
            copy.queue.restore(copy)
            group = copy.queue.group or ""
            replayed[group] = replayed.get(group, 0) + 1
        self._untie()
        return replayed

    async def discard(self, chosen: DeadFilter) -> int:
        """Forget chosen dead messages; return how many."""
        copies = self._shelf.exhume(chosen)
        for copy in copies:
            copy.queue.news.fire()
        return len(copies)

    async def _wait(self, topic: Topic, wires: Sequence[Wire]) -> int:
        """Wait in line until all is in; return how many wires are not, because the transport was closed."""
        publisher = Publisher(deque(wires), draining.get())
        topic.line.append(publisher)
        if publisher.drains is not None:
            self._untie(publisher)
        topic.feed()
        try:
            await publisher.event.wait()
        except BaseException:
            if publisher in topic.line:
                topic.line.remove(publisher)
            raise
        if publisher.error is not None:
            raise publisher.error
        return len(publisher.wires)

    def _untie(self, newest: Publisher | None = None) -> None:
        """Fail the publishers in line that wait for themselves: only the newest can, unless queues grew or came."""
        for topic, need, publisher in [*self._lines()]:
            if publisher.drains is not None and newest in (None, publisher):
                full = self._circle(publisher.drains, topic, need, set())
                if full is not None:
                    reason = "the handler that publishes would wait for itself"
                    publisher.error = QueueFullError(full, self._limits.queue, reason)
                    topic.line.remove(publisher)
                    publisher.event.set()

    def _lines(self) -> Iterator[tuple[Topic, int, Publisher]]:
        """Yield every publisher in line with the room that must come free before it is through."""
        for topic in self._topics.values():
            need = 0
            for publisher in topic.line:
                need += len(publisher.wires)
                yield topic, need, publisher

    def _circle(self, drains: str, topic: Topic, need: int, seen: set[Queue]) -> str | None:
        """Return the queue without room in a topic that waits, through handlers in line, for one who drains ``drains``.

        That other handlers may drain the same queues is not looked at: whether they do is chance.
        """
        for group, queue in topic.queues.items():
            name = queue_id(topic.name, group)
            if queue in seen or self._limits.queue - queue.size >= need:
                continue
            seen.add(queue)
            if drains in (name, group):
                return name
            for other, room, publisher in self._lines():
                if publisher.drains in (name, group) and self._circle(drains, other, room, seen):
                    return name
        return None
