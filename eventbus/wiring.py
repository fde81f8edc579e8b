"""What a bus was given, before anything is checked or built of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from eventbus.limits import Limits
from eventbus.middleware import Middleware
from eventbus.module import Module
from eventbus.routes import Routes
from eventbus.store import Store
from eventbus.transport import Transport

if TYPE_CHECKING:
    from eventbus.codec import Codec

__all__ = ("Wiring",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wiring:
    """Hold what the bus was given, before anything is checked."""

    name: str | None
    modules: tuple[Module, ...]
    store: Store | None
    transports: Mapping[str, Transport]
    routes: Routes
    middleware: tuple[Middleware, ...]
    limits: Limits
    codec: "Codec"
    overrides: Mapping[Callable[..., Any], Callable[..., Any]]
    bus_type: type
    live: str | None = None
    """The transport that carries live events across processes."""
