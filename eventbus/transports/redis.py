"""Carry wires through Redis or Valkey: Streams, which keep them, or Pub/Sub, which only tells who listens now.

One stream per topic, one consumer group per group, created from the stream's beginning. An unsettled message comes
back when its lease has passed, which is also how a retry is delayed: its lease is set to pass then. What every group
has settled is trimmed away.
"""

import os
import socket
from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from itertools import count
from typing import Self

from eventbus.clock import new_id
from eventbus.errors import Lost, PublishError, Refused, TransportError
from eventbus.limits import Limits
from eventbus.transport import Capabilities, Subscription, Wire, check_prefetch
from eventbus.transports._redis_entry import encode, frame
from eventbus.transports._redis_group import GroupReader, Membership
from eventbus.transports._redis_link import Command, client, read_url, refusal
from eventbus.transports._redis_listen import ChannelListener, StreamListener
from eventbus.transports._redis_reader import Hub

__all__ = ("RedisPubSubTransport", "RedisTransport")

MAX_BYTES = 16 * 1024 * 1024
"""The server takes more, but one such body keeps everybody else waiting."""

DEFAULTS = Limits()


class RedisTransport:
    """Carry wires through the streams of one Redis (6.2 or newer) or Valkey server.

    >>> RedisTransport("redis://localhost/0").capabilities.confirm
    'stored'
    """

    def __init__(self, url: str, *, limits: Limits | None = None) -> None:
        self.address, options = read_url(url, "redis", ("prefix", "trim"))
        trim = options.get("trim", "yes")
        if trim not in ("yes", "no"):
            raise ValueError("redis://...?trim= takes yes or no")
        client("redis.asyncio")
        client("hiredis")
        self._prefix = options.get("prefix", "")
        self._trim = trim == "yes"
        self._hub = Hub(self.address)
        self._numbers = count(1)
        self._process = f"{socket.gethostname()}.{os.getpid()}.{new_id()[-8:]}"
        self.capabilities = Capabilities(
            confirm="stored", unheard="kept", groups=True, broadcast=True, returns="lease", settle="each",
            attempts=True, retry=(limits or DEFAULTS).lease, grain=0.001, dead=True, order="exclusive", headers=True,
            max_bytes=MAX_BYTES,
        )  # fmt: skip

    @classmethod
    def from_url(cls, url: str, *, limits: Limits = DEFAULTS) -> Self:
        """Return the transport of a URL. Raises ``ValueError`` for what it does not know."""
        return cls(url, limits=limits)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.address)!r})"

    @property
    def writes(self) -> int:
        """Return how many times the open line has written: what a turn of the event loop brings is one write."""
        return self._hub.line.writes

    async def __aenter__(self) -> Self:
        """Make the first contact. Raises ``Lost``, and ``Refused`` if the server does not let us in."""
        await self._hub.open()
        return self

    async def __aexit__(self, *exc: object) -> None:
        """End every subscription, fail every waiter with ``Lost``, and hand back what nobody has received."""
        await self._hub.close()

    async def declare(self, topic: str, groups: Sequence[str], *, ordered: Collection[str] = ()) -> None:
        """Create the groups that are missing, each from the first message there is."""
        stream = self._prefix + topic
        commands: list[Command] = [("XGROUP", "CREATE", stream, group, "0", "MKSTREAM") for group in groups]
        for group, reply in zip(groups, await self._hub.line.call(commands), strict=True):
            why = refusal(reply)
            if why is None or "BUSYGROUP" in why:
                continue
            lasting = "WRONGTYPE" in why or "permission" in why
            kind = TransportError if lasting else Lost
            raise kind(f"declaring group {group!r} of stream {stream!r} at {self.address}: {why}")

    async def publish(self, topic: str, wires: Sequence[Wire]) -> None:
        """Return when the server has all wires. Raises ``PublishError``."""
        stream = self._prefix + topic
        await tell(self._hub, wires, lambda wire: ("XADD", stream, "*", *encode(wire)))

    @asynccontextmanager
    async def subscribe(
        self, topic: str, *, group: str | None, prefetch: int, lease: float, ordered: bool = False
    ) -> AsyncGenerator[Subscription]:
        """Subscribe for a group, or with None to what is published from now on; the lease is in seconds."""
        check_prefetch(prefetch)
        stream, line = self._prefix + topic, self._hub.line
        if group is None:
            async with self._hub.reading(StreamListener(self.address, stream, prefetch)) as listener:
                yield listener
            return
        await self.declare(topic, (group,))
        member = Membership(stream, group, f"{self._process}.{next(self._numbers)}", lease)
        reader = GroupReader(line, member, prefetch=prefetch, ordered=ordered, trim=self._trim)
        async with self._hub.reading(reader) as subscription:
            yield subscription


class RedisPubSubTransport:
    """Tell whoever listens at this moment, through the Pub/Sub channels of one server: at most once, nothing is kept.

    >>> RedisPubSubTransport("redis+pubsub://localhost/0").capabilities.groups
    False
    """

    def __init__(self, url: str, *, limits: Limits | None = None) -> None:
        self.address, options = read_url(url, "redis+pubsub", ("prefix",))
        client("redis.asyncio")
        client("hiredis")
        self._prefix = options.get("prefix", "")
        self._most = (limits or DEFAULTS).queue
        self._hub = Hub(self.address)
        self.capabilities = Capabilities(
            confirm="none", unheard="lost", groups=False, broadcast=True, returns="none", settle="none",
            attempts=False, retry=0.0, grain=0.0, dead=False, order="none", headers=False, max_bytes=MAX_BYTES,
        )  # fmt: skip

    @classmethod
    def from_url(cls, url: str, *, limits: Limits = DEFAULTS) -> Self:
        """Return the transport of a URL. Raises ``ValueError`` for what it does not know."""
        return cls(url, limits=limits)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.address)!r})"

    async def __aenter__(self) -> Self:
        """Make the first contact. Raises ``Lost``, and ``Refused`` if the server does not let us in."""
        await self._hub.open()
        return self

    async def __aexit__(self, *exc: object) -> None:
        """End every subscription and fail every waiter with ``Lost``."""
        await self._hub.close()

    async def declare(self, topic: str, groups: Sequence[str], *, ordered: Collection[str] = ()) -> None:
        """Declare nothing, but find out whether the server is there. Raises ``TransportError`` for a group."""
        self._refuse(topic, *groups)
        await self._hub.line.call([("PING",)])

    async def publish(self, topic: str, wires: Sequence[Wire]) -> None:
        """Return when the server has told who listens, be it nobody. Raises ``PublishError``."""
        channel = self._prefix + topic
        await tell(self._hub, wires, lambda wire: ("PUBLISH", channel, frame(wire)))

    @asynccontextmanager
    async def subscribe(
        self, topic: str, *, group: str | None, prefetch: int, lease: float, ordered: bool = False
    ) -> AsyncGenerator[Subscription]:
        """Subscribe to what is published from now on. Raises ``TransportError`` for a group, or for order."""
        if group is not None:
            self._refuse(topic, group)
        if ordered:
            raise TransportError(f"subscribing to {topic!r}: Redis Pub/Sub keeps no order; use redis:// (Streams)")
        async with self._hub.reading(ChannelListener(self.address, self._prefix + topic, self._most)) as subscription:
            yield subscription

    def _refuse(self, topic: str, *groups: str) -> None:
        if groups:
            raise TransportError(
                f"group {groups[0]!r} of {topic!r}: Redis Pub/Sub has no groups and keeps nothing, so nobody can take "
                "a message later or share the work; use redis:// (Streams)"
            )


async def tell(hub: Hub, wires: Sequence[Wire], command: Callable[[Wire], Command]) -> None:
    """Run one command for each wire. Raises ``PublishError`` with those that failed, and how."""
    failed: dict[int, Lost | Refused] = {}
    commands: dict[int, Command] = {}
    weight = 0
    for index, wire in enumerate(wires):
        size = len(wire.body)
        if size > MAX_BYTES:
            failed[index] = Refused(f"its body of {size} bytes is larger than {MAX_BYTES}")
            continue
        try:
            commands[index] = command(wire)
            weight += size
        except ValueError as error:
            failed[index] = Refused(f"JSON cannot carry its headers: {error}")
    if commands:
        try:
            replies = await hub.line.call([*commands.values()], weight)
        except Lost as error:
            failed |= dict.fromkeys(commands, error)
        else:
            for index, reply in zip(commands, replies, strict=True):
                if (why := refusal(reply)) is not None:
                    failed[index] = Lost(f"{hub.address}: {why}")
    if failed:
        raise PublishError(failed)
