"""Carry wires over RabbitMQ: one topic exchange, a quorum queue for each group, confirmed publishing.

A topic is a routing key of the exchange, a group has the queue ``topic@group`` and, for what is dead,
``topic@group.dead``. Delays are kept by RabbitMQ itself, in queues that all groups share. A broadcast subscriber has
a queue that ends with its connection.
"""

import asyncio
import ssl
from collections.abc import AsyncGenerator, Collection, Sequence
from contextlib import asynccontextmanager
from typing import Self
from urllib.parse import SplitResult, quote

from eventbus._loop import check_opening
from eventbus._urls import options_of, split_url
from eventbus.errors import Lost, PublishError, Refused
from eventbus.limits import Limits
from eventbus.transport import Capabilities, Subscription, Wire
from eventbus.transports._rabbitmq_line import Address, Line
from eventbus.transports._rabbitmq_names import GRAIN, LONGEST, short
from eventbus.transports._rabbitmq_reader import Reader
from eventbus.transports._rabbitmq_wire import LARGEST

__all__ = ("RabbitMQTransport",)

OPTIONS = ("cafile", "certfile", "declare", "exchange", "heartbeat", "keyfile", "timeout")
"""What a URL may set."""

DEFAULTS = Limits()


class RabbitMQTransport:
    """Carry wires over RabbitMQ 3.10 or newer, on asyncio.

    The URL is that of AMQP: ``amqp://user:password@host:5672/vhost``, or ``amqps://`` with TLS, whose certificate is
    always verified. Options: ``exchange`` (default ``eventbus``), ``heartbeat`` and ``timeout`` (of one step on the
    network) in seconds (15 and 10), ``declare=false`` where somebody else makes queues and exchanges, and ``cafile``,
    ``certfile``, ``keyfile`` for TLS.

    >>> RabbitMQTransport("amqp://shop:secret@broker.internal/orders")
    RabbitMQTransport('amqp://broker.internal/orders')
    """

    capabilities = Capabilities(
        confirm="stored", unheard="refused", groups=True, broadcast=True, returns="link", settle="each",
        attempts=True, retry=LONGEST, grain=GRAIN, dead=True, order="exclusive", headers=True, max_bytes=LARGEST,
    )  # fmt: skip

    def __init__(self, url: str) -> None:
        self._address = parse(url)
        self._line: Line | None = None

    def __repr__(self) -> str:
        return f"RabbitMQTransport({self._address.shown!r})"

    @classmethod
    def from_url(cls, url: str, *, limits: Limits = DEFAULTS) -> Self:
        """Return the transport of a URL. Raises ``ValueError`` for what it does not know."""
        return cls(url)

    async def __aenter__(self) -> Self:
        """Connect. Raises ``Lost`` if RabbitMQ is away, and ``Refused`` if it does not let us in."""
        check_opening(repr(self), is_open=self._line is not None)
        line = self._line = Line(self._address)
        try:
            await line.open()
        except BaseException:
            self._line = None
            raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        """Fail every waiter with ``Lost``, then close, within 2 s."""
        line, self._line = self._line, None
        if line is not None:
            await line.close("the transport was closed")

    async def declare(self, topic: str, groups: Sequence[str], *, ordered: Collection[str] = ()) -> None:
        """Create the exchange, the queues and the bindings that are missing.

        Raises ``Refused`` if a queue is there with other settings, for example not ordered, and ``Lost``.
        """
        line = self._open_line()
        await line.own(line.declare(_checked(topic), groups, ordered))

    async def publish(self, topic: str, wires: Sequence[Wire]) -> None:
        """Return when RabbitMQ has confirmed all wires, persistent and in every bound queue.

        Raises ``PublishError``: ``Refused`` for what is too large, ``Lost`` for everything else, also where no queue
        is bound to the topic.
        """
        line, key = self._line, short(_checked(topic))
        if line is None:
            failed: dict[int, Lost | Refused] = dict.fromkeys(range(len(wires)), Lost(f"{self!r} is not open"))
        else:
            failed = await line.publish(self._address.exchange, key, wires)
        if failed:
            raise PublishError(failed)

    @asynccontextmanager
    async def subscribe(
        self, topic: str, *, group: str | None, prefetch: int, lease: float, ordered: bool = False
    ) -> AsyncGenerator[Subscription]:
        """Subscribe to a group's queue, or with None to what is published from now on; the connection is the lease."""
        if not 0 < prefetch < 65_536:
            raise ValueError(f"subscribe(prefetch=...) takes a whole number from 1 to 65535, not {prefetch!r}")
        line = self._open_line()
        reader = Reader(line, _checked(topic), group, prefetch, ordered)
        try:
            await line.own(reader.open())
            yield reader
        finally:
            reader.lose("the subscription was left")
            if line.over is None:
                await asyncio.wait((line.spawn(reader.leave()),))

    def _open_line(self) -> Line:
        if self._line is None:
            raise Lost(f"{self!r} is not open")
        if self._line.over is not None:
            raise Lost(self._line.over)
        return self._line


def parse(url: str) -> Address:
    """Return what a URL says. Raises ``ValueError``, which never shows the URL: it may hold a password."""
    parts = split_url(url)
    options = options_of(parts, OPTIONS)
    if "" in options.values():
        raise ValueError(f"{parts.scheme}:// takes each option with a value")
    if parts.scheme not in ("amqp", "amqps") or not parts.hostname or parts.fragment or not _is_place(parts):
        raise ValueError("RabbitMQ is at amqp://user:password@host:port/vhost, or amqps:// with TLS")
    if options.get("declare", "true") not in ("true", "false"):
        raise ValueError("declare= is true or false")
    heartbeat = round(_seconds(options, "heartbeat", 15.0))
    query = f"heartbeat={heartbeat}"
    return Address(
        url=f"{parts.scheme}://{parts.netloc}{parts.path}?{query}",
        shown=f"{parts.scheme}://{_host(parts)}{parts.path}",
        context=_context(parts, options),
        exchange=options.get("exchange", "eventbus"),
        timeout=_seconds(options, "timeout", 10.0),
        passive=options.get("declare") == "false",
    )


def _is_place(parts: SplitResult) -> bool:
    """Tell whether what would be shown is a place, and not the half of a password with a slash in it."""
    try:
        return parts.port != 0 and "@" not in parts.path
    except ValueError:
        return False


def _host(parts: SplitResult) -> str:
    return quote(parts.netloc.rpartition("@")[2], safe=":[]")


def _seconds(options: dict[str, str], name: str, default: float) -> float:
    try:
        value = float(options.get(name, default))
    except ValueError:
        value = 0.0
    if not 1 <= value <= 3_600:
        raise ValueError(f"{name}= takes seconds from 1 to 3600")
    return value


def _context(parts: SplitResult, options: dict[str, str]) -> ssl.SSLContext | None:
    given = [name for name in ("cafile", "certfile", "keyfile") if name in options]
    if parts.scheme == "amqp":
        if given:
            raise ValueError(f"{', '.join(given)} are for amqps://, which has TLS")
        return None
    try:
        context = ssl.create_default_context(cafile=options.get("cafile"))
        if "certfile" in options:
            context.load_cert_chain(options["certfile"], options.get("keyfile"))
    except (OSError, ValueError) as error:
        raise ValueError(f"amqps://: cafile, certfile or keyfile cannot be used: {error}") from error
    return context


def _checked(topic: str) -> str:
    if not {"*", "#"}.isdisjoint(topic.split(".")):
        raise ValueError(f"{topic!r} is a pattern for RabbitMQ, not the name of a topic")
    return topic
