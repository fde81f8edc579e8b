"""What the memory transport is made of: queues, the line of publishers before them, and who receives from them.

Nothing in here suspends unless it has to wait, and nothing is shared between two event loops.
"""

import heapq
import math
import sys
from bisect import bisect
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import count, islice
from operator import attrgetter

import anyio
from anyio.lowlevel import checkpoint

from eventbus._signal import Signal
from eventbus.clock import Clock
from eventbus.errors import Lost, QueueFullError, SettleError
from eventbus.limits import Limits
from eventbus.store import DeadEntry, DeadFilter
from eventbus.transport import Delivery, Wire

__all__ = ("FAIR", "Copy", "Publisher", "Queue", "Reader", "Shelf", "Topic")

FAIR = 64
"""Calls between two sure visits to the event loop, each of which costs as much as a message."""


class Shelf:
    """Hold what the queues of one transport share: ceilings, places, the delayed and the dead."""

    def __init__(self, limits: Limits, clock: Clock) -> None:
        self.limits = limits
        self.clock = clock
        self.places = count()
        self.deaths = count(1)
        self.calls = 0
        self.delayed: list[tuple[float, int, Copy]] = []
        self.dead: dict[int, tuple[Copy, DeadEntry]] = {}
        self.nap: anyio.CancelScope | None = None

    def delay(self, after: float, copy: "Copy") -> None:
        """Keep a copy until it is due."""
        heapq.heappush(self.delayed, (self.clock.monotonic() + after, copy.place, copy))
        if self.nap is not None and self.delayed[0][2] is copy:
            self.nap.cancel()

    async def ripen(self) -> None:
        """Put what is due back into its queue, for ever."""
        while True:
            with anyio.CancelScope() as self.nap:
                if not self.delayed:
                    await anyio.sleep_forever()
                wait = self.delayed[0][0] - self.clock.monotonic()
                if wait > 0:
                    await self.clock.sleep(wait)
            now = self.clock.monotonic()
            while self.delayed and self.delayed[0][0] <= now:
                copy = heapq.heappop(self.delayed)[2]
                copy.queue.restore(copy)

    def bury(self, copy: "Copy", reason: str) -> None:
        """Keep a copy among the dead."""
        number, queue, wire = next(self.deaths), copy.queue, copy.wire
        entry = DeadEntry(
            id=f"memory-{number}",
            message_id=wire.id,
            message=queue.topic.name,
            handler=queue.group or "",
            failures=copy.attempt,
            error=reason[: self.limits.error],
            time=datetime.fromtimestamp(self.clock.now(), UTC),
            body=wire.body,
        )
        self.dead[number] = (copy.again(0), entry)
        queue.dead += 1

    def exhume(self, chosen: DeadFilter) -> list["Copy"]:
        """Take chosen copies out of the dead."""
        copies = [self.dead.pop(number)[0] for number, _ in self.find(chosen)]
        for copy in copies:
            copy.queue.dead -= 1
        return copies

    def find(self, chosen: DeadFilter) -> list[tuple[int, DeadEntry]]:
        """Return chosen dead entries, oldest first, with their numbers."""
        kind, _, last = (chosen.after or "memory-0").partition("-")
        if kind != "memory" or not last.isdecimal():
            raise ValueError(f"after= takes the id of a message that is dead in memory, not {chosen.after!r}")
        later = ((number, entry) for number, (_, entry) in self.dead.items() if number > int(last))
        return list(islice((found for found in later if matches(chosen, found[1])), chosen.limit))


def matches(chosen: DeadFilter, entry: DeadEntry) -> bool:
    """Tell whether a dead entry is among the chosen ones."""
    return (
        (chosen.ids is None or entry.id in chosen.ids)
        and chosen.message in (None, entry.message)
        and chosen.handler in (None, entry.handler)
        and (chosen.since is None or entry.time >= chosen.since)
        and (chosen.error or "") in entry.error
    )


@dataclass(slots=True, eq=False)
class Queue:
    """Hold what one group, or one broadcast subscriber, has not settled: ready (by place), delayed or held."""

    shelf: Shelf
    topic: "Topic"
    group: str | None
    ready: deque["Copy"] = field(default_factory=deque["Copy"])
    size: int = 0
    held: int = 0
    dead: int = 0
    heirs: list["Reader"] = field(default_factory=list["Reader"])
    """Open ordered subscriptions, of which only the first receives."""
    news: Signal = field(default_factory=Signal)
    """Has all receivers look again, so that none relies on another that is cancelled meanwhile."""

    def append(self, wires: Sequence[Wire]) -> None:
        """Add new wires at the end."""
        for wire in wires:
            self.ready.append(Copy(self, wire, next(self.shelf.places), 0))
        self.size += len(wires)
        self.news.fire()

    def restore(self, copy: "Copy") -> None:
        """Put a copy back at its place, which is nearly always the first."""
        if not self.ready or copy.place < self.ready[0].place:
            self.ready.appendleft(copy)
        else:
            self.ready.insert(bisect(self.ready, copy.place, key=attrgetter("place")), copy)
        self.news.fire()

    def stalled(self) -> int:
        """Count what is ready and has to wait until some of the dead are replayed or discarded."""
        full = self.group is not None and self.dead + self.held >= self.shelf.limits.dead
        return len(self.ready) if full else 0

    def ease(self) -> None:
        """Let publishers and receivers go on, now that something was settled."""
        if self.topic.line:
            self.topic.feed()
        if self.ready:
            self.news.fire()


@dataclass(slots=True, eq=False)
class Publisher:
    """Be one call of ``publish`` in line, with what is not in the queues yet and the queue its handler drains."""

    wires: deque[Wire]
    drains: str | None
    event: anyio.Event = field(default_factory=anyio.Event)
    error: QueueFullError | None = None


@dataclass(slots=True, eq=False)
class Topic:
    """Hold the queues that a wire goes to, and the line of publishers before them."""

    name: str
    limit: int
    queues: dict[str, Queue] = field(default_factory=dict[str, Queue])
    readers: tuple["Reader", ...] = ()
    line: deque[Publisher] = field(default_factory=deque[Publisher])

    def room(self) -> int:
        """Return how many wires every group can take now."""
        return min([self.limit - queue.size for queue in self.queues.values()], default=sys.maxsize)

    def put(self, wires: Sequence[Wire]) -> None:
        """Put wires into every queue."""
        for queue in self.queues.values():
            queue.append(wires)
        for reader in self.readers:
            if reader.queue.size + len(wires) > self.limit:
                reader.lose(f"the subscriber fell more than {self.limit} messages behind")
            else:
                reader.queue.append(wires)

    def feed(self) -> None:
        """Let the line in as far as there is room, a wire into all groups or into none."""
        while self.line and (room := self.room()) > 0:
            first = self.line[0]
            self.put([first.wires.popleft() for _ in range(min(room, len(first.wires)))])
            if not first.wires:
                self.line.popleft().event.set()


class Copy:
    """Be a wire in one queue, then in the hands of one subscriber; what comes back is a new copy at the old place."""

    __slots__ = ("attempt", "place", "queue", "reader", "settled", "wire")

    def __init__(self, queue: Queue, wire: Wire, place: int, attempt: int) -> None:
        self.queue = queue
        self.wire = wire
        self.place = place
        self.attempt = attempt
        self.reader: Reader | None = None
        self.settled = False

    def again(self, attempt: int) -> "Copy":
        """Return a copy that nobody has, delivered so many times."""
        return Copy(self.queue, self.wire, self.place, attempt)

    async def ack(self) -> None:
        """Settle it as done."""
        if self._settle():
            self.queue.size -= 1
            self.queue.ease()

    async def retry(self, after: float) -> None:
        """Settle it as to come again in ``after`` seconds; 0 hands it back to its place and counts no attempt."""
        if not 0 <= after < math.inf:
            raise ValueError(f"retry() takes the seconds to wait, 0 or more, not {after!r}")
        if self._settle():
            if after:
                self.queue.shelf.delay(after, self.again(self.attempt))
                self.queue.ease()
            else:
                self.queue.restore(self.again(self.attempt - 1))

    async def reject(self, reason: str) -> None:
        """Settle it as dead; what was broadcast is only dropped."""
        if self._settle():
            self.queue.size -= 1
            if self.queue.group is not None:
                self.queue.shelf.bury(self, reason)
            self.queue.ease()

    async def extend(self) -> None:
        """Do nothing: the open subscription is the lease."""

    def _settle(self) -> bool:
        """Use the right to settle; False if an earlier verb did. Raises ``SettleError`` if the message went back."""
        if self.settled:
            return False
        if self.reader is None or self.reader.lost:
            raise SettleError("the subscription is over, so the message went back")
        self.settled = True
        self.reader.open.remove(self)
        self.queue.held -= 1
        return True


class Reader:
    """Be one subscription; an ordered one keeps the others of its group waiting until it is left."""

    __slots__ = ("graves", "lost", "open", "ordered", "prefetch", "queue", "stopped")

    def __init__(self, queue: Queue, prefetch: int, ordered: bool) -> None:
        self.queue = queue
        self.prefetch = prefetch
        self.ordered = ordered
        self.graves = sys.maxsize if queue.group is None else queue.shelf.limits.dead
        self.open: set[Copy] = set()
        self.stopped = False
        self.lost = ""

    async def receive(self) -> Delivery:
        """Return the oldest message; never holds so many that the dead could outgrow their ceiling."""
        queue = self.queue
        queue.shelf.calls += 1
        if not queue.shelf.calls % FAIR:
            await checkpoint()
        while True:
            if self.lost:
                raise Lost(self.lost)
            if self.stopped:
                raise anyio.EndOfStream
            if (
                queue.ready
                and len(self.open) < self.prefetch
                and queue.dead + queue.held < self.graves
                and (not self.ordered or queue.heirs[0] is self)
            ):
                copy = queue.ready.popleft()
                copy.attempt += 1
                copy.reader = self
                self.open.add(copy)
                queue.held += 1
                return copy
            await queue.news.wait()

    async def stop(self) -> None:
        """Take no more in; what nobody received stays in the queue."""
        self.stopped = True
        self.queue.news.fire()

    def lose(self, why: str) -> None:
        """End the subscription: what is unsettled goes back to its place, or is dropped if it was broadcast."""
        if self.lost:
            return
        self.lost, queue, shelf = why, self.queue, self.queue.shelf
        queue.held -= len(self.open)
        if queue.group is None:
            queue.topic.readers = tuple(reader for reader in queue.topic.readers if reader is not self)
            queue.ready.clear()
            shelf.delayed = [entry for entry in shelf.delayed if entry[2].queue is not queue]
            heapq.heapify(shelf.delayed)
        else:
            queue.heirs = [heir for heir in queue.heirs if heir is not self]
            for copy in sorted(self.open, key=attrgetter("place"), reverse=True):
                queue.restore(copy.again(copy.attempt))
        self.open.clear()
        queue.news.fire()
