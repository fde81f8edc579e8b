"""Import the client library of RabbitMQ, or say which extra installs it; and reach what it shows only half."""

import asyncio
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, cast

from eventbus._extras import require

if TYPE_CHECKING:
    import aio_pika
    import aiormq
    from aio_pika.abc import AbstractConnection
    from pamqp.commands import Basic

    Properties = Basic.Properties
else:
    aio_pika = require("aio_pika", extra="rabbitmq", what="RabbitMQ (amqp://)")
    aiormq = require("aiormq", extra="rabbitmq", what="RabbitMQ (amqp://)")

__all__ = ("Pen", "Tap", "aio_pika", "aiormq", "channel_of", "link_of", "reason", "when_closed")

CROWDED = 0.001
"""Seconds until the next look whether the library takes something."""


def link_of(connection: "AbstractConnection") -> "aiormq.Connection":
    """Return the connection of AMQP itself. Raises ``ConnectionError`` if it is closed."""
    link = connection.transport.connection if connection.transport is not None else None
    if not isinstance(link, aiormq.Connection):
        raise ConnectionError("the connection was closed")
    return link


async def channel_of(connection: "AbstractConnection") -> "aiormq.Channel":
    """Open a channel with confirmations, on which what nobody gets is an error; return that of AMQP itself."""
    outer = await connection.channel(on_return_raises=True)
    channel = await outer.get_underlay_channel()
    if not isinstance(channel, aiormq.Channel):
        raise ConnectionError("the channel was closed")
    return channel


def when_closed(thing: "aiormq.Connection | aiormq.Channel", then: Callable[[str], None]) -> None:
    """Call back with the reason when a connection or a channel is closed, by whomever."""

    def closed(closing: Any) -> None:
        then(reason(None if closing.cancelled() else closing.exception()))

    cast("Any", thing).closing.add_done_callback(closed)


class Pen:
    """Write what one turn of the event loop brings to a connection in one piece; the library has a write for each."""

    def __init__(self, link: "aiormq.Connection") -> None:
        self._link = link
        self._queue: asyncio.Queue[Any] = cast("Any", link).write_queue
        self._pieces: list[bytes] = []
        self._loop = asyncio.get_running_loop()

    def write(self, pieces: Iterable[bytes]) -> None:
        """Have frames written before long, in the order of the calls."""
        if not self._pieces:
            self._loop.call_soon(self._flush)
        self._pieces += pieces

    async def flush(self) -> None:
        """Hand over what there is, as soon as the library takes it."""
        if self._pieces:
            await self._queue.put(self._frame())

    def _flush(self) -> None:
        if not self._pieces or self._link.is_closed:
            return
        if self._queue.full():
            self._loop.call_later(CROWDED, self._flush)
        else:
            self._queue.put_nowait(self._frame())

    def _frame(self) -> Any:
        frame = aiormq.abc.ChannelFrame(b"".join(self._pieces), should_close=False)
        self._pieces.clear()
        return frame


class Tap:
    """Stand before the frames of a channel that consumes and take the deliveries out; the library has a task for each.

    The frames of a message come one behind the other, first that of its delivery.
    """

    def __init__(self, channel: "aiormq.Channel", arrive: "Callable[[int, Properties, bytes], None]") -> None:
        place: Any = channel
        rest: asyncio.Queue[Any] = place.frames
        self.get, self.task_done, self._rest = rest.get, rest.task_done, rest
        self._arrive = arrive
        self._tag: int | None = None
        self._properties: Properties | None = None
        self._parts: list[bytes] = []
        self._left = 0
        place.frames = self

    async def put(self, item: tuple[int, Any]) -> None:
        """Take a frame from the connection."""
        frame = item[1]
        if type(frame) is aiormq.spec.Basic.Deliver:
            self._tag = frame.delivery_tag
        elif self._tag is None:
            await self._rest.put(item)
        elif self._properties is None:
            self._properties, self._left = frame.properties, frame.body_size
            if not self._left:
                self._whole()
        else:
            self._parts.append(frame.value)
            self._left -= len(frame.value)
            if self._left <= 0:
                self._whole()

    def _whole(self) -> None:
        tag, properties, body = self._tag, self._properties, b"".join(self._parts)
        self._tag = self._properties = None
        self._parts.clear()
        if tag is not None and properties is not None:
            self._arrive(tag, properties, body)


def reason(error: BaseException | None) -> str:
    """Return what an error says, or its kind if it says nothing."""
    return "closed" if error is None else str(error) or type(error).__name__
