"""What is being handled now; correlation and causation follow from it by themselves."""

from collections.abc import Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any, NamedTuple

from eventbus.clock import Runtime
from eventbus.errors import CircleError
from eventbus.message import MessageSpec, spec_of

__all__ = ("EMPTY", "Context", "Identity", "Origin", "Seed", "current", "draining", "follow", "origin_of", "seed_of")

EMPTY: Mapping[str, str] = MappingProxyType({})

NESTED = 50
"""Messages of which each was sent or published while the one before was handled, all in one call."""

Seed = list[Any]
"""``[message, origin or None, seed of the cause or None, how deep it is nested, runtime]``: what an origin grows from.

One is made for every message, and most are never looked at: a list display is what Python makes quickest.
"""


class Identity(NamedTuple):
    """Identify one message on its way."""

    id: str
    correlation: str
    causation: str | None
    time: datetime


class Origin:
    """Carry one message and, once somebody looks, its identity.

    The engine keeps the seed of what is being handled in ``current``; a message sent or published meanwhile has it
    as its cause. The origin and its identity are made at the first look.
    """

    __slots__ = ("_identities", "cause", "headers", "key", "message", "runtime")

    def __init__(
        self,
        message: object,
        runtime: Runtime,
        cause: "Origin | None" = None,
        key: str | None = None,
        headers: Mapping[str, str] = EMPTY,
        identity: Identity | None = None,
    ) -> None:
        self.message = message
        self.runtime = runtime
        self.cause = cause
        self.key = key
        self.headers = headers
        self._identities: list[Identity] = [] if identity is None else [identity]

    @property
    def identity(self) -> Identity:
        """Return who this message is, the same at every look."""
        if not self._identities:
            cause = None if self.cause is None else self.cause.identity  # first, so that ids and times keep their order
            made = self.runtime.ids()
            time = datetime.fromtimestamp(self.runtime.clock.now(), UTC)
            identity = Identity(made, cause.correlation if cause else made, cause.id if cause else None, time)
            self._identities.append(identity)  # threads may look at once: the first that gets here has made it
        return self._identities[0]


def follow(message: object, cause: Seed, runtime: Runtime) -> Seed:
    """Return the seed of a message that is sent while ``cause`` is handled.

    Raises ``CircleError`` for one of more than ``NESTED`` messages each handled inside the one before.
    """
    depth = cause[3] + 1
    if depth >= NESTED:
        raise CircleError(spec_of(type(message)).name, depth + 1)
    return [message, None, cause, depth, runtime]


def origin_of(seed: Seed) -> Origin:
    """Return the origin that grows from a seed, the same at every look."""
    origin: Origin | None = seed[1]
    if origin is None:
        cause: Seed | None = seed[2]
        seed.append(Origin(seed[0], seed[4], None if cause is None else origin_of(cause)))
        made: Origin = seed[5]  # threads may look at once: the first that has come so far has made it
        origin = seed[1] = made
    return origin


def seed_of(origin: Origin) -> Seed:
    """Return the seed of an origin that is there already and was caused elsewhere."""
    return [origin.message, origin, None, 0, origin.runtime]


class Receipt:
    """Acknowledge a publish; ``id`` is the message's id, made when somebody first asks for it.

    It cannot be confused with a result: it has no truth value and no other attribute.
    """

    __slots__ = ("_seed",)

    def __init__(self, seed: Seed) -> None:
        self._seed = seed

    @property
    def id(self) -> str:
        """The id of the message, the same in every context, store and queue."""
        return origin_of(self._seed).identity.id

    def __bool__(self) -> bool:
        raise TypeError("a Receipt is no result: only send() returns what a handler returned")

    def __repr__(self) -> str:
        return f"Receipt(id={self.id!r})"


class Context:
    """Tell a handler, a dependency or a middleware what is being handled.

    The bus makes contexts; the unit test of a handler makes one with ``Context.of(message)``. Read-only.

    >>> from eventbus import Event
    >>> Context.of(Event(), handler="orders.audit", attempt=2).attempt
    2
    """

    __slots__ = ("_attempt", "_handler", "_seed")

    def __init__(self, seed: Seed, handler: str, attempt: int = 1) -> None:
        self._seed = seed
        self._handler = handler
        self._attempt = attempt

    @classmethod
    def of(
        cls, message: object, *, handler: str = "", attempt: int = 1, key: str | None = None,
        headers: Mapping[str, str] = EMPTY,
    ) -> "Context":  # fmt: skip
        """Return a context for ``message`` as if it had just been sent."""
        return cls(seed_of(Origin(message, Runtime(), None, key, headers)), handler, attempt)

    @property
    def message(self) -> Any:
        """The message being handled."""
        return self._seed[0]

    @property
    def handler(self) -> str:
        """The stable name of the handler."""
        return self._handler

    @property
    def attempt(self) -> int:
        """Which attempt this is, from 1."""
        return self._attempt

    @property
    def message_id(self) -> str:
        """The id of the message: the same at every attempt and for every handler."""
        return origin_of(self._seed).identity.id

    @property
    def correlation_id(self) -> str:
        """The id of the message that all this began with."""
        return origin_of(self._seed).identity.correlation

    @property
    def causation_id(self) -> str | None:
        """The id of the message whose handling sent this one, or None."""
        return origin_of(self._seed).identity.causation

    @property
    def time(self) -> datetime:
        """When the message was sent or published (UTC)."""
        return origin_of(self._seed).identity.time

    @property
    def _spec(self) -> MessageSpec:
        message: object = self._seed[0]
        return spec_of(type(message))

    @property
    def name(self) -> str:
        """The wire name of the message type."""
        return self._spec.name

    @property
    def version(self) -> int:
        """The version of the message type."""
        return self._spec.version

    @property
    def key(self) -> str | None:
        """The key whose order is kept, or None."""
        given = origin_of(self._seed).key
        if given is not None:
            return given
        return self._spec.key_of(self.message)

    @property
    def headers(self) -> Mapping[str, str]:
        """What the publisher attached."""
        return origin_of(self._seed).headers

    def __repr__(self) -> str:
        return f"Context({self.name!r}, handler={self._handler!r}, attempt={self._attempt})"


current: ContextVar[Seed | None] = ContextVar("eventbus_current", default=None)
"""The seed of the message being handled by this task, the cause of what it sends."""

draining: ContextVar[str | None] = ContextVar("eventbus_draining", default=None)
"""The queue from which this task took what it handles; waiting for room in it would never end."""
