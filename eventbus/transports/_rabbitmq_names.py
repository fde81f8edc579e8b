"""Name and declare what RabbitMQ holds: one exchange, two queues for each group, and the levels of delay.

A delay is a number of tenths of a second, and each of its binary digits has a level: an exchange, and a queue whose
messages leave it after 0.1, 0.2, 0.4 ... seconds. A message travels down the levels, through the queues of the digits
that are one and past the others, and at the bottom to the queue of its group. All groups share the levels.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aiormq import Channel
    from aiormq.abc import ArgumentsType

GRAIN = 0.1
"""Seconds; delays are rounded up to it."""

LEVELS = 16
"""Binary digits of a delay."""

LONGEST = (2**LEVELS - 1) * GRAIN
"""The longest delay in seconds: almost two hours."""

NAME = 240
"""Bytes of a name; AMQP allows 255, and some of ours get a suffix."""

BEHIND = 10_000
"""Messages that wait for one process of a broadcast; the oldest give way."""


def short(name: str) -> str:
    """Return a name that AMQP can carry: itself, or its beginning and a digest.

    >>> short("shop.order_placed@shop/billing.invoice")
    'shop.order_placed@shop/billing.invoice'
    """
    text = name.encode()
    if len(text) <= NAME:
        return name
    return f"{text[: NAME - 17].decode(errors='ignore')}~{sha256(text).hexdigest()[:16]}"


def queue_of(topic: str, group: str) -> str:
    """Return the name of a group's queue."""
    return short(f"{topic}@{group}")


def dead_queue(queue: str) -> str:
    """Return the name of the queue where a group's dead messages lie."""
    return f"{queue}.dead"


@dataclass(frozen=True, slots=True)
class Topology:
    """Declare what is missing, on a channel of its own each time: RabbitMQ closes the channel of what it refuses."""

    exchange: str
    passive: bool
    """Only look whether it is there: it belongs to somebody else."""
    endless: bool
    """The server counts deliveries and gives up, unless it is told not to: RabbitMQ 4."""

    @property
    def ripe(self) -> str:
        """Return the exchange that a message reaches when its delay is over."""
        return f"{self.exchange}.delay"

    def level(self, number: int) -> str:
        """Return the name of a level's exchange and queue."""
        return f"{self.exchange}.delay.{number:02}"

    def delay(self, queue: str, after: float) -> tuple[int, str]:
        """Return at which level a message enters, and the routing key that brings it to a queue when it is time."""
        ticks = max(math.ceil(round(after / GRAIN, 6)), 1)
        digits = ".".join(f"{ticks:0{LEVELS}b}")
        return ticks.bit_length() - 1, f"{digits}.{_token(queue)}"

    async def group(self, channel: "Channel", topic: str, groups: Sequence[str], ordered: Collection[str] = ()) -> None:
        """Declare a topic and the queues of its groups."""
        await channel.exchange_declare(self.exchange, exchange_type="topic", durable=True, passive=self.passive)
        if groups and not self.passive:
            await self._bottom(channel)
        for group in groups:
            queue = queue_of(topic, group)
            await self._durable(channel, dead_queue(queue), {})
            await self._durable(channel, queue, self._group_arguments(queue, group in ordered))
            if not self.passive:
                await channel.queue_bind(queue, self.exchange, short(topic))
                await channel.queue_bind(queue, self.ripe, f"#.{_token(queue)}")

    async def listener(self, channel: "Channel", topic: str) -> str:
        """Declare a queue that belongs to this connection and ends with it; return its name."""
        await self.group(channel, topic, ())
        bounds: ArgumentsType = {"x-max-length": BEHIND, "x-overflow": "drop-head"}
        declared = await channel.queue_declare("", exclusive=True, auto_delete=True, arguments=bounds)
        await channel.queue_bind(str(declared.queue), self.exchange, short(topic))
        return str(declared.queue)

    async def levels(self, channel: "Channel", top: int) -> None:
        """Declare the levels of delay, from the bottom up to one."""
        if self.passive:
            await channel.exchange_declare(self.level(top), passive=True)
            return
        await self._bottom(channel)
        for number in range(top + 1):
            level, below = self.level(number), self.level(number - 1) if number else self.ripe
            await channel.exchange_declare(level, exchange_type="topic", durable=True)
            await self._durable(
                channel,
                level,
                {
                    "x-message-ttl": round(2**number * GRAIN * 1_000),
                    "x-dead-letter-exchange": below,
                    "x-dead-letter-strategy": "at-least-once",
                    "x-overflow": "reject-publish",
                },
            )
            before = "*." * (LEVELS - 1 - number)
            await channel.queue_bind(level, level, f"{before}1.#")
            await channel.exchange_bind(below, level, f"{before}0.#")

    async def _bottom(self, channel: "Channel") -> None:
        """Declare where delays end, and a queue for what comes back to a group that is no more.

        Until RabbitMQ has all bindings back after a restart, a group that is there looks like one that is no more. The
        door of that queue does not outlive a restart: what finds it shut waits where it is, and is sent again.
        """
        stray, door = f"{self.exchange}.stray", f"{self.exchange}.stray.door"
        await self._durable(channel, stray, {})
        await channel.exchange_declare(door, exchange_type="fanout", durable=False)
        await channel.queue_bind(stray, door)
        await channel.exchange_declare(stray, exchange_type="fanout", durable=True)
        await channel.exchange_bind(door, stray)
        await channel.queue_unbind(stray, stray)  # the way around the door that there once was
        await channel.exchange_declare(
            self.ripe, exchange_type="topic", durable=True, arguments={"alternate-exchange": stray}
        )

    async def _durable(self, channel: "Channel", name: str, arguments: "ArgumentsType") -> None:
        await channel.queue_declare(
            name, durable=True, passive=self.passive, arguments={"x-queue-type": "quorum", **arguments}
        )

    def _group_arguments(self, queue: str, ordered: bool) -> "ArgumentsType":
        arguments: ArgumentsType = {
            "x-dead-letter-exchange": "",
            "x-dead-letter-routing-key": dead_queue(queue),
            "x-dead-letter-strategy": "at-least-once",
            "x-overflow": "reject-publish",
        }
        if ordered:
            arguments["x-single-active-consumer"] = True
        if self.endless:
            arguments["x-delivery-limit"] = -1
        return arguments


def _token(queue: str) -> str:
    """Return one word for a queue, since dots divide words and the names of queues have dots."""
    return sha256(queue.encode()).hexdigest()[:16]
