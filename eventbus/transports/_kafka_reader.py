"""Read one topic: hold what is unsettled, commit what is settled without a gap, and give partitions up in order.

Nothing here suspends while it changes what is held, so that the tracks are right at every await.
"""

import asyncio
import contextlib
import heapq
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from itertools import count
from typing import Any

import anyio

from eventbus.errors import Lost
from eventbus.transport import Delivery, Wire
from eventbus.transports._kafka_cluster import aiokafka, failure
from eventbus.transports._kafka_connections import Connections
from eventbus.transports._kafka_records import incoming
from eventbus.transports._kafka_track import Copy, Track

__all__ = ("Reader",)

log = logging.getLogger("eventbus")

POLL = 0.2
"""Seconds that one poll waits for records; none is ever cut short."""
PROBE = 2.0
"""Seconds between two questions whether the cluster still answers and the topic still exists."""
PATIENCE = 3.0
"""Seconds within which the cluster answers a question or a commit."""
AHEAD = 10
"""How many times the prefetch may be settled beyond an unsettled message: a crash repeats that many."""

ANEW = "{} begins anew: it was deleted and created again"
NEVER = 2**63


class Reader:
    """Be one subscription; ``run`` is its pump, in a task that the transport owns."""

    def __init__(
        self, consumer: Any, connections: Connections, topic: str, *, prefetch: int, grace: float, grouped: bool,
        bury: Callable[[Wire, str], Awaitable[None]],
    ) -> None:  # fmt: skip
        client = aiokafka()
        self.consumer = consumer
        self._connections = connections
        self._bury = bury
        self.lost = ""
        self._topic = topic
        self._prefetch = prefetch
        self._grace = grace
        self._grouped = grouped
        self._first = client.TopicPartition(topic, 0)
        self._mark: Callable[[int, str], Any] = client.structs.OffsetAndMetadata
        self._client_error: type[Exception] = client.errors.KafkaError
        self._early: list[tuple[Any, Iterable[Any]]] = []
        self._tracks: dict[Any, Track] = {}
        self._ready: deque[Copy] = deque()
        self._returned: list[Copy] = []
        """A heap of what was handed back: it goes before all that came after it."""
        self._places = count()
        self._open = 0
        self._moving = False
        self._stopped = False
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._commits: set[asyncio.Future[None]] = set()
        self._credit = asyncio.Event()
        self._dirty = asyncio.Event()
        self._settled = asyncio.Event()
        self._joined = asyncio.Event()
        if not grouped:
            self._joined.set()

    async def receive(self) -> Delivery:
        """Return the oldest record that is here; while partitions move, none is given out."""
        while True:
            if self.lost:
                raise Lost(self.lost)
            if self._stopped:
                raise anyio.EndOfStream
            while (copy := self._next()) is not None:
                if not copy.track.lost:
                    copy.track.open += 1
                    self._open += 1
                    return copy
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(waiter)
            try:
                await waiter
            except asyncio.CancelledError:
                if waiter.done() and not waiter.cancelled():
                    self._wake()
                raise
            finally:
                if waiter in self._waiting:
                    self._waiting.remove(waiter)

    async def stop(self) -> None:
        """Take no more in; what nobody received was never taken, so there is nothing to hand back."""
        self._stopped = True
        self._wake_all()

    def lose(self, why: str) -> None:
        """End the subscription: whatever is unsettled comes again, here or elsewhere."""
        if self.lost:
            return
        self.lost = why
        for track in self._tracks.values():
            track.lost = True
        self._ready.clear()
        self._returned.clear()
        self._wake_all()
        for event in (self._credit, self._dirty, self._settled, self._joined):
            event.set()

    async def bury(self, wire: Wire, reason: str) -> None:
        """Keep a dead copy, so that it is safe before the record is settled."""
        await self._bury(wire, reason)

    def finish(self, copy: Copy) -> None:
        """Take a settled record out of what is held, and have its partition committed if it moved on."""
        before = copy.track.position
        copy.track.settle(copy.offset)
        self._release(copy)
        if copy.track.position != before:
            self._dirty.set()

    def restore(self, copy: Copy) -> None:
        """Put a record back to its place."""
        self._release(copy)
        heapq.heappush(self._returned, Copy(self, copy.track, copy.wire, copy.offset, copy.place))
        self._wake()

    async def start(self, seconds: float) -> None:
        """Connect, and ask for partitions: a group's come when it has moved them, all others are here at once."""
        try:
            async with asyncio.timeout(seconds):
                await self.consumer.start()
                if self._grouped:
                    self.consumer.subscribe([self._topic], listener=self._listener())
                    return
                there = await self.consumer._client._wait_on_metadata(self._topic)
                self.consumer.assign([self._first._replace(partition=number) for number in sorted(there)])
                await self.consumer.seek_to_end()
        except (self._client_error, OSError) as error:
            raise failure(error, f"subscribing to {self._topic}") from error

    async def joined(self, seconds: float) -> None:
        """Wait until the first partitions are here, or have been asked for so long."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._joined.wait()

    async def run(self) -> None:
        """Take records in, commit, and look whether the cluster is alive, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for job in (self._pump, self._probe, self._keep_committed):
                tasks.create_task(self._watched(job))

    async def give_up(self) -> None:
        """Let what is running finish before its partitions move, but for no longer than the grace."""
        self._moving = True
        try:
            async with asyncio.timeout(self._grace):
                while self._open and not self.lost:
                    self._settled.clear()
                    await self._settled.wait()
        except TimeoutError:
            log.warning("%s: %d message(s) were still at work when partitions moved", self._topic, self._open)
        await self.commit()

    async def take_over(self, assigned: Iterable[Any]) -> None:
        """Go on with partitions that stayed, unless somebody else had them meanwhile; forget those that went."""
        tracks, self._tracks = self._tracks, {}
        for partition in assigned:
            track = tracks.get(partition)
            if track is not None and track.line and track.next is not None and await self._is_ours(partition, track):
                self._tracks[partition] = tracks.pop(partition)
                self.consumer.seek(partition, track.next)
        for track in tracks.values():
            self._forget(track)
        self._moving = False
        self._joined.set()
        early, self._early = self._early, []
        kept = {*self._tracks}
        for partition, records in early:
            if partition not in kept:
                self._admit(partition, records)
        self._dirty.set()
        self._credit.set()
        self._wake_all()

    async def commit(self, seconds: float = PATIENCE) -> None:
        """Commit what is settled without a gap; what a rebalance refuses comes again elsewhere."""
        if not self._grouped:
            return
        positions = self._uncommitted()
        if not positions:
            return
        try:
            await self._commit({tp: self._mark(at, "") for tp, at in positions.items() if at is not None}, seconds)
        except (self._client_error, TimeoutError) as error:
            if type(error).__name__ not in {"CommitFailedError", "IllegalStateError"}:
                self.lose(f"committing {self._topic} failed: {type(error).__name__} {error}".rstrip())
            log.info("%s: not committed: %s", self._topic, error)
            return
        for partition, position in positions.items():
            if (track := self._tracks.get(partition)) is not None:
                track.committed = position

    async def _commit(self, marks: dict[Any, Any], seconds: float) -> None:
        """Commit in a task of its own: where a call is cut, the client leaves an error that nobody looks at."""
        job = asyncio.ensure_future(self.consumer.commit(marks))
        self._commits.add(job)
        job.add_done_callback(self._committed)
        if not (await asyncio.wait([job], timeout=seconds))[0]:
            raise TimeoutError
        job.result()

    def _committed(self, job: "asyncio.Future[None]") -> None:
        self._commits.discard(job)
        if not job.cancelled():
            job.exception()

    async def leave(self, seconds: float) -> None:
        """Commit what is settled and leave the group: in order while there is time, then at once."""
        if not self.lost:
            await self.commit(seconds)
        self.lose("the subscription was left")
        # It may wait for others of its group, or for a cluster that is away; without connections it does not.
        consumer = self.consumer
        await self._connections.end(consumer.stop(), seconds, consumer._coordinator, consumer._fetcher)
        if self._commits:
            await asyncio.wait(self._commits, timeout=0.1)  # their requests have failed by now, and are tried again
            for job in self._commits:
                job.cancel()

    def _listener(self) -> Any:
        reader, base = self, aiokafka().ConsumerRebalanceListener

        class Moves(base):  # type: ignore[misc, valid-type]
            async def on_partitions_revoked(self, revoked: Iterable[Any]) -> None:
                await reader.give_up()

            async def on_partitions_assigned(self, assigned: Iterable[Any]) -> None:
                await reader.take_over(assigned)

        return Moves()

    def _uncommitted(self) -> dict[Any, int | None]:
        return {
            partition: track.position
            for partition, track in self._tracks.items()
            if not track.lost and track.position != track.committed
        }

    async def _is_ours(self, partition: Any, track: Track) -> bool:
        """Tell whether nobody has gone on with a partition in our place."""
        try:
            async with asyncio.timeout(PATIENCE):
                found = await self.consumer.committed(partition)
        except (self._client_error, TimeoutError) as error:
            log.info("%s: %s is read anew: %s", self._topic, partition, error)
            return False
        return found is None or found == track.committed

    def _next(self) -> Copy | None:
        """Return what is to be delivered next; while partitions move, nothing is."""
        ready, returned = self._ready, self._returned
        if self._moving or not (ready or returned):
            return None
        if returned and (not ready or returned[0] < ready[0]):
            return heapq.heappop(returned)
        return ready.popleft()

    def _forget(self, track: Track) -> None:
        track.lost = True
        self._open -= track.open
        track.open = 0
        self._ready = deque(copy for copy in self._ready if copy.track is not track)
        self._returned = [copy for copy in self._returned if copy.track is not track]
        heapq.heapify(self._returned)

    def _release(self, copy: Copy) -> None:
        copy.track.open -= 1
        self._open -= 1
        self._credit.set()
        self._settled.set()

    def _wake(self) -> None:
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return

    def _wake_all(self) -> None:
        while self._waiting:
            self._wake()

    async def _watched(self, job: Callable[[], Awaitable[None]]) -> None:
        try:
            await job()
        except Exception as error:
            log.exception("reading %s failed", self._topic)
            self.lose(f"reading {self._topic} failed: {type(error).__name__}: {error}")

    async def _pump(self) -> None:
        """Fetch no more than there is credit for; a partition too far beyond an unsettled message rests."""
        while not self.lost and not self._stopped:
            room = self._prefetch - self._open - len(self._ready) - len(self._returned)
            resting = {tp for tp, track in self._tracks.items() if len(track.line) >= AHEAD * self._prefetch}
            chosen = self.consumer.assignment() - resting if resting else ()
            if room < 1 or self._moving or (resting and not chosen):
                self._credit.clear()
                await self._credit.wait()
                continue
            try:
                found = await self.consumer.getmany(*chosen, timeout_ms=int(POLL * 1_000), max_records=room)
            except self._client_error as error:
                self.lose(f"reading {self._topic} failed: {type(error).__name__}: {error}")
                return
            if self._moving:
                self._early += found.items()
            elif not self._stopped:
                for partition, records in found.items():
                    self._admit(partition, records)

    def _admit(self, partition: Any, records: Iterable[Any]) -> None:
        track = self._tracks.get(partition)
        if track is None:
            track = self._tracks[partition] = Track()
        for record in records:
            if track.next is not None and record.offset < track.next:
                self.lose(ANEW.format(self._topic))
                return
            track.came(record.offset)
            self._ready.append(Copy(self, track, incoming(record), record.offset, next(self._places)))
            self._wake()

    async def _keep_committed(self) -> None:
        while self._grouped and not self.lost:
            await self._dirty.wait()
            self._dirty.clear()
            await self.commit()

    async def _probe(self) -> None:
        """Notice a dead link, a deleted topic or a new partition, which the client would wait out for ever."""
        while not self.lost:
            await asyncio.sleep(PROBE)
            here = self.consumer.assignment()
            try:
                async with asyncio.timeout(PATIENCE):
                    ends = await self.consumer.end_offsets([*here] or [self._first])
            except (self._client_error, TimeoutError) as error:
                self.lose(f"no word of {self._topic} from the cluster: {type(error).__name__} {error}".rstrip())
                return
            if any((track.next or 0) > ends.get(partition, NEVER) for partition, track in self._tracks.items()):
                self.lose(ANEW.format(self._topic))
            if not self._grouped and len(here) != len(self.consumer.partitions_for_topic(self._topic) or ()):
                self.lose(f"{self._topic} has other partitions than before")
