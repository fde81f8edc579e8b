"""Make an OpenTelemetry span of every handling, linked to whoever published the message, in whatever process."""

from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

try:
    from opentelemetry import trace
    from opentelemetry.context import Context as Ambient
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
except ModuleNotFoundError as error:
    from eventbus.errors import MissingExtraError

    if error.name is None or error.name.partition(".")[0] != "opentelemetry":
        raise
    raise MissingExtraError("eventbus.middlewares.tracing", "otel") from error

from eventbus.context import Context, draining
from eventbus.middleware import CallNext

__all__ = ("Tracing",)

IDLE = (trace.NoOpTracerProvider, trace.ProxyTracerProvider)
"""Providers that record nothing; the second is what stands there until one is set."""

_inside: ContextVar[bool] = ContextVar("eventbus_traced", default=False)
"""Whether this task is in a handling that has a span already."""


class Tracing:
    """Trace every handling, and let the trace of a publisher travel along with what has a route.

    What came by a route begins a trace of its own, with a link to the publisher's span: that has ended long ago, and
    many handlings may follow from it. What is handled at once is a child of the caller's span. Belongs into the
    ``middleware`` of the bus, not of a module. Without a provider that records, nothing is made.

    Args:
        provider: makes the tracer; None: the global one, also if that is set later.

    >>> from eventbus import EventBus
    >>> bus = EventBus(middleware=[Tracing()])
    """

    def __init__(self, provider: trace.TracerProvider | None = None) -> None:
        self._provider = provider
        self._known: tuple[trace.TracerProvider, trace.Tracer] | None = None
        self._carrier = TraceContextTextMapPropagator()

    async def __call__(self, ctx: Context, call_next: CallNext) -> Any:
        """Go on within a span."""
        provider = self._provider or trace.get_tracer_provider()
        if isinstance(provider, IDLE):
            return await call_next(ctx)
        if self._known is None or self._known[0] is not provider:
            self._known = provider, provider.get_tracer("eventbus")
        arrived = draining.get() is not None and not _inside.get()
        publisher = trace.get_current_span(self._carrier.extract(ctx.headers, Ambient())).get_span_context()
        token = _inside.set(True)
        try:
            with self._known[1].start_as_current_span(
                f"process {ctx.name}",
                context=Ambient() if arrived else None,
                kind=trace.SpanKind.CONSUMER if arrived else trace.SpanKind.INTERNAL,
                links=[trace.Link(publisher)] if publisher.is_valid else None,
                attributes={
                    "messaging.system": "eventbus",
                    "messaging.operation.type": "process",
                    "messaging.destination.name": ctx.name,
                    "messaging.message.id": ctx.message_id,
                    "messaging.message.conversation_id": ctx.correlation_id,
                    "eventbus.handler": ctx.handler,
                    "eventbus.attempt": ctx.attempt,
                },
            ):
                return await call_next(ctx)
        finally:
            _inside.reset(token)

    def outgoing(self) -> Mapping[str, str]:
        """Return the W3C headers of the current span, if there is one."""
        headers: dict[str, str] = {}
        self._carrier.inject(headers)
        return headers
