"""What is being handled now; correlation and causation follow from it by themselves."""

from collections.abc import Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any, NamedTuple

from eventbus.clock import Runtime
from eventbus.message import spec_of

__all__ = ("EMPTY", "Context", "Identity", "Origin", "current", "draining")

EMPTY: Mapping[str, str] = MappingProxyType({})


class Identity(NamedTuple):
    """Identify one message on its way."""

    id: str
    correlation: str
    causation: str | None
    time: datetime


class Origin:
    """Carry one message and, once somebody looks, its identity.

    The engine keeps the origin of what is being handled in ``current``; a message sent or published meanwhile has
    it as its cause. The identity is made at the first look, because most messages are never looked at.
    """

    __slots__ = ("_identity", "cause", "headers", "key", "message", "runtime")

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
        self._identity = identity

    @property
    def identity(self) -> Identity:
        """Return who this message is, the same at every look."""
        identity = self._identity
        if identity is None:
            cause = None if self.cause is None else self.cause.identity  # first, so that ids and times keep their order
            made = self.runtime.ids()
            time = datetime.fromtimestamp(self.runtime.clock.now(), UTC)
            identity = Identity(made, cause.correlation if cause else made, cause.id if cause else None, time)
            self._identity = identity
        return identity


class Context:
    """Tell a handler, a dependency or a middleware what is being handled.

    The bus makes contexts; the unit test of a handler makes one with ``Context.of(message)``. Read-only.

    >>> from eventbus import Event
    >>> Context.of(Event(), handler="orders.audit", attempt=2).attempt
    2
    """

    __slots__ = ("_attempt", "_handler", "_origin")

    def __init__(self, origin: Origin, handler: str, attempt: int = 1) -> None:
        self._origin = origin
        self._handler = handler
        self._attempt = attempt

    @classmethod
    def of(
        cls, message: object, *, handler: str = "", attempt: int = 1, key: str | None = None,
        headers: Mapping[str, str] = EMPTY,
    ) -> "Context":  # fmt: skip
        """Return a context for ``message`` as if it had just been sent."""
        return cls(Origin(message, Runtime(), None, key, headers), handler, attempt)

    @property
    def message(self) -> Any:
        """The message being handled."""
        return self._origin.message

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
        return self._origin.identity.id

    @property
    def correlation_id(self) -> str:
        """The id of the message that all this began with."""
        return self._origin.identity.correlation

    @property
    def causation_id(self) -> str | None:
        """The id of the message whose handling sent this one, or None."""
        return self._origin.identity.causation

    @property
    def time(self) -> datetime:
        """When the message was sent or published (UTC)."""
        return self._origin.identity.time

    @property
    def name(self) -> str:
        """The wire name of the message type."""
        return spec_of(type(self._origin.message)).name

    @property
    def version(self) -> int:
        """The version of the message type."""
        return spec_of(type(self._origin.message)).version

    @property
    def key(self) -> str | None:
        """The key whose order is kept, or None."""
        if self._origin.key is not None:
            return self._origin.key
        return spec_of(type(self._origin.message)).key_of(self._origin.message)

    @property
    def headers(self) -> Mapping[str, str]:
        """What the publisher attached."""
        return self._origin.headers

    def __repr__(self) -> str:
        return f"Context({self.name!r}, handler={self._handler!r}, attempt={self._attempt})"


current: ContextVar[Origin | None] = ContextVar("eventbus_current", default=None)
"""The message being handled by this task, the cause of what it sends."""

draining: ContextVar[str | None] = ContextVar("eventbus_draining", default=None)
"""The queue from which this task took what it handles; waiting for room in it would never end."""
