"""Read one queue: a channel whose prefetch is RabbitMQ's own, and settlements that leave together."""

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from eventbus._mailbox import Mailbox
from eventbus.errors import Lost, Refused, SettleError
from eventbus.transport import Wire
from eventbus.transports._rabbitmq_client import Tap, aiormq, when_closed
from eventbus.transports._rabbitmq_line import Line
from eventbus.transports._rabbitmq_names import dead_queue, queue_of
from eventbus.transports._rabbitmq_wire import ATTEMPTS, FAILURES, REASON, TOPIC, from_amqp

if TYPE_CHECKING:
    from aiormq import Channel
    from pamqp.commands import Basic


class Reader(Mailbox):
    """Be a subscription; with ``group`` None to everything that is published from now on."""

    def __init__(self, line: Line, topic: str, group: str | None, prefetch: int, ordered: bool) -> None:
        super().__init__()
        self.line = line
        self.topic = topic
        self.queue = "" if group is None else queue_of(topic, group)
        self._group = group
        self._prefetch = prefetch
        self._ordered = ordered
        self._channel: Channel | None = None
        self._tag = ""
        self._unsettled: dict[int, None] = {}
        self._acked: set[int] = set()
        self._returned: list[int] = []
        self._due = False
        self._opening = asyncio.Event()

    async def open(self) -> None:
        """Declare the queue and consume it."""
        self.line.ends[self.lose] = None
        try:
            if self._group is not None:
                await self.line.declare(self.topic, (self._group,), (self._group,) if self._ordered else ())
            channel = self._channel = await self.line.inlet()
            when_closed(channel, lambda why: self.lose(f"queue {self.queue!r}: the channel was closed: {why}"))
            channel.on_consumer_cancel_callbacks.add(self._cancelled)
            Tap(channel, self._arrive)
            await self._consume(channel)
        finally:
            self._opening.set()

    async def _consume(self, channel: "Channel") -> None:
        try:
            async with asyncio.timeout(2 * self.line.address.timeout):
                if self._group is None:
                    self.queue = await self.line.topology.listener(channel, self.topic)
                await channel.basic_qos(prefetch_count=self._prefetch)
                consumed = await channel.basic_consume(self.queue, _untapped)
        except Exception as error:
            raise self.line.explain(error) from error
        self._tag = str(consumed.consumer_tag)

    async def _cancelled(self, frame: Any) -> None:
        self.lose(f"queue {self.queue!r} was deleted, or is not available")

    def lose(self, why: str) -> None:
        """End the subscription: what is buffered is RabbitMQ's again."""
        super().lose(why)
        self.line.ends.pop(self.lose, None)

    def _arrive(self, tag: int, properties: "Basic.Properties", body: bytes) -> None:
        if self.lost:
            return
        wire, before = from_amqp(properties, body)
        self._unsettled[tag] = None
        self.put(RabbitDelivery(self, tag, wire, before + 1))

    async def stop(self) -> None:
        """Stop consuming; settling still works."""
        if self.stopped or self.lost:
            return
        await self.line.own(self._stop())

    async def _stop(self) -> None:
        channel = self._channel
        if channel is None or self.lost:
            return
        try:
            await channel.basic_cancel(self._tag, timeout=self.line.address.timeout)
        except Exception as error:
            raise self.line.explain(error) from error
        self.end()

    async def leave(self) -> None:
        """Write what was settled, and close the channel: RabbitMQ delivers the rest to others."""
        await self._opening.wait()
        channel = self._channel
        if channel is None:
            return
        self._settle()
        await self.line.pen.flush()
        await channel.close(None, self.line.address.timeout)

    def ack(self, tag: int) -> None:
        """Acknowledge a message together with all others of this turn of the event loop."""
        self._acked.add(tag)
        self._settle_soon()

    def give_back(self, tag: int) -> None:
        """Return a message to its queue together with all others of this turn of the event loop."""
        self._returned.append(tag)
        self._settle_soon()

    def _settle_soon(self) -> None:
        if not self._due:
            self._due = True
            asyncio.get_running_loop().call_soon(self._settle)

    def _settle(self) -> None:
        self._due = False
        channel: Any = self._channel
        if (frames := self._settlements()) and not channel.is_closed:
            piece: Any = aiormq.abc.ChannelFrame
            self.line.pen.write((piece.marshall(channel.number, frames).payload,))

    def _settlements(self) -> list[Any]:
        """Return what settles all that was settled since the last time, in as few frames as possible."""
        frames: list[Any] = []
        for tag in self._returned:
            self._unsettled.pop(tag, None)
            frames.append(aiormq.spec.Basic.Nack(tag, requeue=True))
        self._returned.clear()
        prefix = 0
        for tag in self._unsettled:
            if tag not in self._acked:
                break
            prefix = tag
        for tag in sorted(self._acked):
            del self._unsettled[tag]
            if tag > prefix:
                frames.append(aiormq.spec.Basic.Ack(tag))
        if prefix:
            frames.append(aiormq.spec.Basic.Ack(prefix, multiple=True))
        self._acked.clear()
        return frames

    async def again(self, delivery: "RabbitDelivery", after: float) -> None:
        """Send a delivery on a detour that ends in its queue, then ack it; what cannot go comes back at once."""
        extra: dict[str, str | int] = {ATTEMPTS: delivery.attempt}
        await self._replace(delivery, await self.line.postpone(self.queue, delivery.wire, after, extra))

    async def bury(self, delivery: "RabbitDelivery", reason: str) -> None:
        """Send a delivery to its dead queue with the reason, then ack it; what cannot go comes back at once."""
        extra: dict[str, str | int] = {REASON: reason, FAILURES: delivery.attempt, TOPIC: self.topic}
        await self._replace(delivery, await self.line.send("", dead_queue(self.queue), delivery.wire, extra))

    async def _replace(self, delivery: "RabbitDelivery", failure: Lost | Refused | None) -> None:
        if failure is None:
            self.ack(delivery.tag)
            return
        self.give_back(delivery.tag)
        raise SettleError(f"message {delivery.wire.id} was handed back at once instead: {failure}")

    @property
    def is_broadcast(self) -> bool:
        """Tell whether nobody else gets what is handed back here."""
        return self._group is None

    def later(self, after: float, work: Callable[[], None]) -> None:
        """Do something in so many seconds, unless the subscription has ended by then."""
        asyncio.get_running_loop().call_later(after, lambda: None if self.lost else work())


async def _untapped(message: object) -> None:
    """Take no delivery: the tap has it."""


class RabbitDelivery:
    """Be one message that RabbitMQ has delivered and that nobody has settled yet."""

    __slots__ = ("_reader", "_settled", "attempt", "tag", "wire")

    def __init__(self, reader: Reader, tag: int, wire: Wire, attempt: int) -> None:
        self.wire = wire
        self.attempt = attempt
        self.tag = tag
        self._reader = reader
        self._settled = False

    def _is_first(self) -> bool:
        if self._settled:
            return False
        if self._reader.lost:
            raise SettleError(f"message {self.wire.id} went back to its queue: {self._reader.lost}")
        self._settled = True
        return True

    async def ack(self) -> None:
        """Settle it as done."""
        if self._is_first():
            self._reader.ack(self.tag)

    async def retry(self, after: float) -> None:
        """Settle it as to be delivered again, to its own group, in ``after`` seconds; 0 hands it back."""
        if not self._is_first():
            return
        if after <= 0:
            self._reader.give_back(self.tag)
        elif self._reader.is_broadcast:
            self._reader.later(after, lambda: self._reader.give_back(self.tag))
        else:
            await self._reader.line.own(self._reader.again(self, after))

    async def reject(self, reason: str) -> None:
        """Settle it as dead: a confirmed copy lies in the dead queue first."""
        if not self._is_first():
            return
        if self._reader.is_broadcast:
            self._reader.ack(self.tag)
        else:
            await self._reader.line.own(self._reader.bury(self, reason))

    async def extend(self) -> None:
        """Do nothing: the connection is the lease."""
