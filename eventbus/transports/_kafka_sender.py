"""Send wires through one producer: what is published meanwhile travels in one batch for each partition.

A topic has a lane of its own, so that one in trouble delays no other. Of a partition one batch is on its way, as the
client would have it anyway; the next is filled until that is confirmed.
"""

import asyncio
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable, Sequence
from functools import lru_cache, partial
from itertools import chain
from random import choice
from typing import Any

from eventbus.errors import Lost, PublishError, Refused
from eventbus.transport import Wire
from eventbus.transports._kafka_cluster import aiokafka, failure, topic_name
from eventbus.transports._kafka_connections import Connections
from eventbus.transports._kafka_records import outgoing
from eventbus.transports._kafka_tasks import Tasks

__all__ = ("Sender",)

CONFIRM = 8.0
"""Seconds for a confirmation, within which the client itself tries again."""
KEYS = 4_096
"""Keys whose hash is remembered: to compute one takes longer than all else that is done for a message."""

Make = Callable[[str], Awaitable[None]]


class Parcel:
    """Be one call of publish that waits for the confirmation of each of its wires."""

    __slots__ = ("failed", "future", "open", "wires")

    def __init__(self, wires: Sequence[Wire]) -> None:
        self.wires = wires
        self.open = set(range(len(wires)))
        self.failed: dict[int, Lost | Refused] = {}
        self.future: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def note(self, index: int, error: Lost | Refused | None = None) -> None:
        """Note what became of one wire."""
        self.open.discard(index)
        if error is not None:
            self.failed[index] = error
        if not self.open and not self.future.done():
            self.future.set_result(None)

    def lose(self, error: Lost | Refused) -> None:
        """Give up waiting."""
        for index in sorted(self.open):
            self.note(index, error)


class Box:
    """Be a batch, with who waits for what of it."""

    __slots__ = ("batch", "places")

    def __init__(self, batch: Any, *places: tuple[Parcel, int]) -> None:
        self.batch = batch
        self.places = [*places]

    def note(self, error: Lost | Refused | None) -> None:
        """Note what became of it."""
        for parcel, index in self.places:
            parcel.note(index, error)


class Lane:
    """Be what waits for one topic, and what of it is on its way."""

    __slots__ = ("away", "boxes", "led", "make", "news", "parcels", "partitions", "topic")

    def __init__(self, topic: str, make: Make | None) -> None:
        self.topic = topic
        self.make = make
        self.partitions = 0
        self.led: list[int] = []
        """The partitions that have a leader."""
        self.parcels: deque[Parcel] = deque()
        self.boxes: defaultdict[int, deque[Box]] = defaultdict(deque)
        """Partition -> what is not on its way yet."""
        self.away: set[int] = set()
        """The partitions of which a batch is on its way."""
        self.news = asyncio.Event()


class Pending(set[Any]):
    """Batches on their way; aiokafka takes one out again that waits to be sent again when its time is over."""

    def remove(self, element: Any) -> None:
        """Take an element out, if it is in."""
        self.discard(element)


class Sender:
    """Hold a started producer."""

    def __init__(self, producer: Any, connections: Connections, max_bytes: int, tasks: Tasks) -> None:
        self.broken = ""
        """Why this producer is not trusted any more: it may still deliver late what it was said to have lost."""
        self._producer = producer
        self._connections = connections
        batches = producer._message_accumulator
        batches._pending_batches = Pending(batches._pending_batches)
        self._max_bytes = max_bytes
        self._tasks = tasks
        self._lanes: dict[str, Lane] = {}
        self._parcels: dict[Parcel, tuple[float, str]] = {}
        """Who waits, oldest first -> until when, for which topic."""
        self._alarm: asyncio.TimerHandle | None = None
        """For the oldest: one for each call would take a tenth of what it costs to publish."""
        self._pumps: list[asyncio.Task[None]] = []
        self._place_of = lru_cache(KEYS)(aiokafka().partitioner.murmur2)

    def watch(self) -> None:
        """Fail what waits when the producer's own task fails; its own way to do so stumbles without transactions."""
        sender = self._producer._sender
        sender.sender_task.remove_done_callback(sender._fail_all)
        sender.sender_task.add_done_callback(self._ended)

    async def send(self, topic: str, wires: Sequence[Wire], make: Make | None = None) -> None:
        """Return when all wires are confirmed; ``make`` creates the topic if it is missing. Raises ``PublishError``."""
        parcel = Parcel(wires)
        if self.broken:
            parcel.lose(Lost(self.broken))
            raise PublishError(parcel.failed)
        lane = self._lanes.get(topic)
        if lane is None:
            lane = self._lanes[topic] = Lane(topic_name(topic), make)
            self._pumps.append(self._tasks.start(self._pump(lane), f"publishing to {topic}"))
        lane.parcels.append(parcel)
        lane.news.set()
        loop = asyncio.get_running_loop()
        self._parcels[parcel] = loop.time() + CONFIRM, topic
        if self._alarm is None:
            self._alarm = loop.call_later(CONFIRM, self._expire)
        try:
            await parcel.future
        finally:
            del self._parcels[parcel]
        if parcel.failed:
            raise PublishError(parcel.failed)

    async def close(self, why: str, seconds: float) -> None:
        """Fail every waiter, then close the producer: in order while there is time, then at once."""
        self.broken = why
        for parcel in self._parcels:
            parcel.lose(Lost(why))
        for pump in self._pumps:
            pump.cancel()
        if self._alarm is not None:
            self._alarm.cancel()

        def give_up() -> None:  # else it tries for ever to deliver what nobody waits for any more
            self._fail_all(aiokafka().errors.ProducerClosed(why))

        producer = self._producer
        await self._connections.end(producer.stop(), seconds, producer._sender, give_up=give_up)

    def _ended(self, task: "asyncio.Task[Any]") -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self.broken = f"the producer gave up: {type(error).__name__}: {error}"
            self._fail_all(error)

    def _fail_all(self, error: BaseException) -> None:
        batches = self._producer._message_accumulator
        batches.fail_all(error)
        for batch in chain(batches._pending_batches, *batches._batches.values()):
            batch._drain_waiter.exception()  # which nobody waits for any more

    def _expire(self) -> None:
        self._alarm, loop = None, asyncio.get_running_loop()
        for parcel, (deadline, topic) in self._parcels.items():
            if deadline > loop.time():
                self._alarm = loop.call_at(deadline, self._expire)
                return
            if parcel.open:
                self.broken = f"{topic}: no confirmation within {CONFIRM:g} s"
                parcel.lose(Lost(self.broken))

    async def _pump(self, lane: Lane) -> None:
        cluster = self._producer.client.cluster
        while True:
            await lane.news.wait()
            lane.news.clear()
            try:
                if lane.make is not None and cluster.partitions_for_topic(lane.topic) is None:
                    await lane.make(lane.topic)
                lane.partitions = len(await self._producer.partitions_for(lane.topic))
                lane.led = [*cluster.available_partitions_for_topic(lane.topic)]
            except Exception as error:
                for parcel in lane.parcels:
                    parcel.lose(failure(error, lane.topic))
                lane.parcels.clear()
                continue
            while lane.parcels:
                self._pack(lane, lane.parcels.popleft())
            for partition, boxes in lane.boxes.items():
                while boxes and partition not in lane.away:
                    await self._ship(lane, partition, boxes.popleft())

    def _pack(self, lane: Lane, parcel: Parcel) -> None:
        if parcel.future.done():
            return
        for index, wire in enumerate(parcel.wires):
            try:
                self._box(lane, wire).places.append((parcel, index))
            except UnicodeError as error:
                parcel.note(index, Refused(f"{lane.topic}: {error}"))
            except Exception as error:
                parcel.note(index, failure(error, lane.topic))

    def _box(self, lane: Lane, wire: Wire) -> Box:
        """Return the box of its partition with the wire in it. Raises ``Refused`` if it is too large for any."""
        if len(wire.body) > self._max_bytes:
            raise Refused(f"its body of {len(wire.body)} bytes is larger than kafka://...?max_bytes={self._max_bytes}")
        record = outgoing(wire)
        if wire.key is None:
            partition = choice(lane.led or range(lane.partitions))
        else:
            partition = (self._place_of(record["key"]) & 0x7FFFFFFF) % lane.partitions
        boxes = lane.boxes[partition]
        if boxes and boxes[-1].batch.append(timestamp=None, **record) is not None:
            return boxes[-1]
        boxes.append(self._boxed(record))
        return boxes[-1]

    def _boxed(self, record: dict[str, Any], *places: tuple[Parcel, int]) -> Box:
        box = Box(self._producer.create_batch(), *places)
        box.batch.append(timestamp=None, **record)
        return box

    async def _ship(self, lane: Lane, partition: int, box: Box) -> None:
        box.batch.close()
        try:
            future = await self._producer.send_batch(box.batch, lane.topic, partition=partition)
        except Exception as error:
            box.note(failure(error, lane.topic))
        else:
            lane.away.add(partition)
            future.add_done_callback(partial(self._arrived, lane, partition, box))

    def _arrived(self, lane: Lane, partition: int, box: Box, future: asyncio.Future[Any]) -> None:
        error = asyncio.CancelledError() if future.cancelled() else future.exception()
        found = None if error is None else failure(error, lane.topic)
        waiting = lane.boxes[partition]
        if isinstance(found, Refused):
            self._unsaid(lane.topic, partition, len(box.places))
        if isinstance(found, Refused) and len(box.places) > 1:  # for one of them, or for all together: each tries alone
            alone = [self._boxed(outgoing(parcel.wires[index]), (parcel, index)) for parcel, index in box.places]
            waiting.extendleft(reversed(alone))
        else:
            box.note(found)
        if isinstance(found, Lost):
            self.broken = str(found)
        lane.away.discard(partition)
        if waiting:
            lane.news.set()

    def _unsaid(self, topic: str, partition: int, count: int) -> None:
        """Take back the numbers of what was refused: the client counts it as taken, and the broker misses it then."""
        numbers = self._producer._txn_manager
        numbers.increment_sequence_number(aiokafka().TopicPartition(topic, partition), -count)
