"""Import the client library of RabbitMQ, or say which extra installs it; and reach what it shows only half."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

from eventbus._extras import require

if TYPE_CHECKING:
    import aio_pika
    import aiormq
    from aio_pika.abc import AbstractConnection
else:
    aio_pika = require("aio_pika", extra="rabbitmq", what="RabbitMQ (amqp://)")
    aiormq = require("aiormq", extra="rabbitmq", what="RabbitMQ (amqp://)")

__all__ = ("aio_pika", "aiormq", "channel_of", "link_of", "reason", "when_closed", "write")


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


async def write(channel: "aiormq.Channel", frames: Sequence[Any]) -> None:
    """Hand frames over in one piece, so that they leave in one write; there is a verb only for single ones."""
    piece: Any = aiormq.abc.ChannelFrame
    await cast("Any", channel).write_queue.put(piece.marshall(channel_number=channel.number, frames=frames))


def reason(error: BaseException | None) -> str:
    """Return what an error says, or its kind if it says nothing."""
    return "closed" if error is None else str(error) or type(error).__name__
