"""Send wires through one producer, a lane for each topic, so that a topic in trouble delays no other."""

import asyncio
from collections import deque
from collections.abc import Sequence
from functools import partial
from itertools import chain
from typing import Any

from eventbus.errors import Lost, PublishError, Refused
from eventbus.transport import Wire
from eventbus.transports._kafka_cluster import aiokafka, failure
from eventbus.transports._kafka_connections import Connections
from eventbus.transports._kafka_records import outgoing
from eventbus.transports._kafka_tasks import Tasks

__all__ = ("Sender",)

CONFIRM = 8.0
"""Seconds for a confirmation, within which the client itself tries again."""


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

    def lose(self, why: str) -> None:
        """Give up waiting."""
        for index in sorted(self.open):
            self.note(index, Lost(why))


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
        self._lanes: dict[str, deque[Parcel]] = {}
        self._news: dict[str, asyncio.Event] = {}
        self._parcels: set[Parcel] = set()
        self._pumps: list[asyncio.Task[None]] = []

    def watch(self) -> None:
        """Fail what waits when the producer's own task fails; its own way to do so stumbles without transactions."""
        sender = self._producer._sender
        sender.sender_task.remove_done_callback(sender._fail_all)
        sender.sender_task.add_done_callback(self._ended)

    async def send(self, topic: str, wires: Sequence[Wire]) -> None:
        """Return when all wires are confirmed. Raises ``PublishError``."""
        parcel = Parcel(wires)
        if self.broken:
            parcel.lose(self.broken)
            raise PublishError(parcel.failed)
        if topic not in self._lanes:
            self._lanes[topic], self._news[topic] = deque(), asyncio.Event()
            self._pumps.append(self._tasks.start(self._pump(topic), f"publishing to {topic}"))
        self._parcels.add(parcel)
        self._lanes[topic].append(parcel)
        self._news[topic].set()
        deadline = asyncio.get_running_loop().call_later(CONFIRM, self._expire, topic, parcel)
        try:
            await parcel.future
        finally:
            deadline.cancel()
            self._parcels.discard(parcel)
        if parcel.failed:
            raise PublishError(parcel.failed)

    async def close(self, why: str, seconds: float) -> None:
        """Fail every waiter, then close the producer: in order while there is time, then at once."""
        self.broken = why
        for parcel in [*self._parcels]:
            parcel.lose(why)
        for pump in self._pumps:
            pump.cancel()

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

    def _expire(self, topic: str, parcel: Parcel) -> None:
        if parcel.open:
            self.broken = f"{topic}: no confirmation within {CONFIRM:g} s"
            parcel.lose(self.broken)

    async def _pump(self, topic: str) -> None:
        lane, news = self._lanes[topic], self._news[topic]
        while True:
            while lane:
                parcel = lane.popleft()
                for index, wire in enumerate(parcel.wires):
                    if parcel.future.done():
                        break
                    await self._hand_over(topic, parcel, index, wire)
            news.clear()
            await news.wait()

    async def _hand_over(self, topic: str, parcel: Parcel, index: int, wire: Wire) -> None:
        if len(wire.body) > self._max_bytes:
            what = f"its body of {len(wire.body)} bytes is larger than kafka://...?max_bytes={self._max_bytes}"
            parcel.note(index, Refused(what))
            return
        try:
            future = await self._producer.send(topic, **outgoing(wire))
        except Exception as error:
            parcel.note(index, failure(error, topic))
        else:
            future.add_done_callback(partial(self._confirmed, topic, parcel, index))

    def _confirmed(self, topic: str, parcel: Parcel, index: int, future: asyncio.Future[Any]) -> None:
        error = asyncio.CancelledError() if future.cancelled() else future.exception()
        if error is None:
            parcel.note(index)
            return
        found = failure(error, topic)
        if isinstance(found, Lost):
            self.broken = str(found)
        parcel.note(index, found)
