"""What the engine asks of a transport: carry wires, and nothing else.

An adapter never decides about retry or death and has no loop that reconnects: it raises ``Lost`` and the worker's
supervisor opens it again. Rules of use: the first settling verb wins and later ones do nothing; ``extend`` does not
settle; verbs may be called from any task, also after ``stop()``, not after leaving the subscription; every network
step has a timeout of the adapter's own, and runs in a task that the adapter owns, so that cancelling a caller never
cuts a client library in the middle.
"""

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Literal, Protocol, Self, runtime_checkable

from eventbus._extras import build
from eventbus._urls import split_url
from eventbus.context import EMPTY
from eventbus.errors import Lost, PublishError, Refused, SettleError, TransportError
from eventbus.limits import Limits

__all__ = (
    "Capabilities",
    "Delivery",
    "Lost",
    "PublishError",
    "Refused",
    "SettleError",
    "Subscription",
    "Transport",
    "TransportError",
    "Wire",
    "check_prefetch",
    "connect",
    "shut_out",
)

SCHEMES: dict[str, str] = {
    "memory": "eventbus.transports.memory:MemoryTransport",
    "amqp": "eventbus.transports.rabbitmq:RabbitMQTransport",
    "amqps": "eventbus.transports.rabbitmq:RabbitMQTransport",
    "redis": "eventbus.transports.redis:RedisTransport",
    "redis+pubsub": "eventbus.transports.redis:RedisPubSubTransport",
    "rediss": "eventbus.transports.redis:RedisTransport",
    "rediss+pubsub": "eventbus.transports.redis:RedisPubSubTransport",
    "kafka": "eventbus.transports.kafka:KafkaTransport",
    "kafka+ssl": "eventbus.transports.kafka:KafkaTransport",
    "nats": "eventbus.transports.nats:NatsTransport",
    "nats+core": "eventbus.transports.nats:NatsCoreTransport",
    "postgresql+notify": "eventbus.transports.postgres:PostgreSQLNotifyTransport",
}
"""URL scheme -> "module:class"; the class is built from the whole URL by ``from_url``."""

GROUP = "eventbus.transports"
"""The entry-point group in which other packages offer schemes."""


@dataclass(frozen=True, slots=True)
class Wire:
    """Hold one message as it travels: raw, so that decoding fails in one place only."""

    id: str
    body: bytes
    headers: Mapping[str, str] = field(default_factory=lambda: EMPTY)
    key: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """Say what a transport promises; the wiring is compared with it before anything opens."""

    confirm: Literal["stored", "settled", "none"]
    """What the return of ``publish`` means."""
    unheard: Literal["kept", "refused", "lost"]
    """What becomes of a message published before any group was declared."""
    groups: bool
    """Consumers of one group compete, and each group gets everything."""
    broadcast: bool
    """``group=None`` reaches every subscriber."""
    returns: Literal["link", "lease", "rebalance", "none"]
    """What brings back a delivery that nobody settled."""
    settle: Literal["each", "prefix", "none"]
    """Which deliveries can be settled."""
    attempts: bool
    """Deliveries are counted."""
    retry: float
    """The longest delay of ``Delivery.retry`` in seconds; 0: none, the engine holds the delivery."""
    grain: float
    """Delays are rounded up to this many seconds."""
    dead: bool
    """``Delivery.reject`` keeps a dead copy with its reason."""
    order: Literal["key", "exclusive", "none"]
    """How ``ordered=True`` keeps one key in one process."""
    headers: bool
    """Wires may carry headers (binary mode); otherwise everything travels in the body."""
    max_bytes: int
    """The largest body."""
    backends: frozenset[str] = frozenset({"asyncio"})
    """The event loops it runs on."""
    local: bool = False
    """What is published comes back as the very same ``Wire`` objects: nothing leaves this process."""


class Delivery(Protocol):
    """Be one message in this process's hands until it is settled."""

    @property
    def wire(self) -> Wire:
        """Return what arrived, undecoded."""
        ...

    @property
    def attempt(self) -> int:
        """Return the number of deliveries so far: 1 is the first, 0 is unknown."""
        ...

    async def ack(self) -> None:
        """Settle it as done. Raises ``SettleError`` if it is no longer ours."""
        ...

    async def retry(self, after: float) -> None:
        """Settle it as to be delivered again in ``after`` seconds; 0 hands it back."""
        ...

    async def reject(self, reason: str) -> None:
        """Settle it as dead: the dead copy is safe first."""
        ...

    async def extend(self) -> None:
        """Keep it for another lease; nothing where the link is the lease."""
        ...


class Subscription(Protocol):
    """Be the stream of deliveries of one group."""

    async def receive(self) -> Delivery:
        """Return the next delivery. Raises ``Lost``, and ``anyio.EndOfStream`` after ``stop()``."""
        ...

    async def stop(self) -> None:
        """Take no more in; return when nothing more will come. Settling still works."""
        ...


@runtime_checkable
class Transport(Protocol):
    """Carry wires between processes, or within one."""

    @property
    def capabilities(self) -> Capabilities:
        """Return what this transport promises."""
        ...

    async def __aenter__(self) -> Self:
        """Make the first contact. Raises ``Lost`` if the broker is away, ``Refused`` if it does not let us in.

        What is ``Lost`` is tried again until it opens; anything else ends the start of a bus.
        """
        ...

    async def __aexit__(self, *exc: object) -> None:
        """Fail every waiter with ``Lost``, then close, within 2 s."""
        ...

    async def declare(self, topic: str, groups: Sequence[str], *, ordered: Collection[str] = ()) -> None:
        """Create what is missing; delete and change nothing; safe to repeat.

        ``ordered`` names those of the groups that will be subscribed with ``ordered=True``: some brokers have to know
        when they make a queue.
        """
        ...

    async def publish(self, topic: str, wires: Sequence[Wire]) -> None:
        """Return when all wires are confirmed. Raises ``PublishError`` naming those that are not."""
        ...

    def subscribe(
        self, topic: str, *, group: str | None, prefetch: int, lease: float, ordered: bool = False
    ) -> AbstractAsyncContextManager[Subscription]:
        """Return a subscription; ``prefetch`` counts unsettled deliveries. Leaving it is death to what is unsettled."""
        ...


def shut_out(place: object, why: object) -> Refused:
    """Return the error of an opening to which a broker, at an address without secrets, says no."""
    return Refused(
        f"{place} does not let us in: {str(why).rstrip('.')}; correct the user name, the password (percent-encoded in "
        "a URL: @ is %40, / is %2F) or what the user may do"
    )


def check_prefetch(prefetch: int) -> None:
    """Raise ``ValueError`` unless ``prefetch`` lets a subscription hold a delivery: every transport asks first."""
    if prefetch < 1:
        raise ValueError(f"subscribe(prefetch=...) takes a whole number from 1, not {prefetch!r}")


def connect(url: str, limits: Limits | None = None) -> Transport:
    """Return the transport that a URL names, not opened yet.

    The scheme chooses the adapter, ours first, then the entry-point group ``eventbus.transports``; it is built by
    ``from_url(url, limits=limits)``.
    Raises ``ValueError`` for a scheme that nobody offers and ``MissingExtraError`` with the install line for one
    whose library is not installed.

    >>> connect("memory://").capabilities.confirm
    'none'
    """
    built: Transport = build("transport", split_url(url).scheme, url, SCHEMES, GROUP, limits or Limits())
    return built
