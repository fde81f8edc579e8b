"""Spans of handlings: their links across routes, their parents where there is no route, and nothing when idle."""

from typing import Any

import anyio
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from eventbus import Command, Context, Event, EventBus, Limits, Module
from eventbus.middlewares.tracing import Tracing
from eventbus.testing import harness
from tests.doubles import Flaky

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
STARTS = "start_as_current_span"


class Paid(Event, name="t.paid"):
    """State that something was paid."""


class Charge(Command[int], name="t.charge"):
    """Ask for money."""


class Shop:
    """Hold a bus that is traced into a list."""

    def __init__(self, *, traced: bool = True, **options: Any) -> None:
        self.exporter = InMemorySpanExporter()
        self.provider = TracerProvider()
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.tracer = self.provider.get_tracer("t")
        self.headers: list[dict[str, str]] = []
        self.error: Exception | None = None
        module = Module("m")

        @module.on(Paid)
        async def paid(event: Paid, ctx: Context, bus: EventBus) -> None:
            self.headers.append(dict(ctx.headers))
            await bus.send(Charge())

        @module.handles(Charge)
        async def charge(command: Charge) -> int:
            if self.error is not None:
                raise self.error
            return 1

        middleware = [Tracing(self.provider)] if traced else []
        self.bus = EventBus(module, name="shop", middleware=middleware, **options)

    def spans(self) -> dict[str, ReadableSpan]:
        """Return the spans that have ended, by name."""
        return {span.name: span for span in self.exporter.get_finished_spans()}


@pytest.fixture
def noop(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return what is asked of tracers that record nothing, and what spans and links are made."""
    asked: list[str] = []

    def overhear(kind: type, verb: str) -> None:
        whole = getattr(kind, verb)

        def ask(*args: Any, **named: Any) -> Any:
            asked.append(verb)
            return whole(*args, **named)

        monkeypatch.setattr(kind, verb, ask)

    for kind in (trace.NoOpTracer, trace.ProxyTracer):
        overhear(kind, "start_span")
        overhear(kind, STARTS)
    for kind in (trace.NonRecordingSpan, trace.Link):
        overhear(kind, "__init__")
    return asked


@pytest.mark.parametrize("route", ["memory", "store"])
async def test_link_across_a_route(route: str) -> None:
    """What came by a route is a trace of its own, linked to the publisher's span, however the bus was started."""
    shop = Shop(routes={Paid: route}, store="memory://")
    with shop.tracer.start_as_current_span("start"):
        async with harness(shop.bus) as t:
            with shop.tracer.start_as_current_span("request") as request:
                receipt = await t.publish(Paid())
            await t.settled()
    spans = shop.spans()
    handling, nested = spans["process t.paid"], spans["process t.charge"]
    assert (None, trace.SpanKind.CONSUMER) == (handling.parent, handling.kind)
    assert handling.context.trace_id != request.get_span_context().trace_id
    (link,) = handling.links
    assert (link.context.trace_id, link.context.span_id) == (
        request.get_span_context().trace_id, request.get_span_context().span_id,
    )  # fmt: skip
    assert link.context.is_remote
    assert (nested.parent.span_id, trace.SpanKind.INTERNAL, 0) == (
        handling.context.span_id, nested.kind, len(nested.links),
    )  # fmt: skip
    assert {
        "messaging.system": "eventbus", "messaging.operation.type": "process", "messaging.destination.name": "t.paid",
        "messaging.message.id": receipt.id, "messaging.message.conversation_id": receipt.id,
        "eventbus.handler": "m.paid", "eventbus.attempt": 1,
    } == dict(handling.attributes)  # fmt: skip


async def test_header_on_the_wire() -> None:
    """Between processes the publisher's span is a plain W3C header, as other libraries write and read it."""
    transport = Flaky()
    wires: list[Any] = []
    publish = transport.publish

    async def keep(topic: str, sent: Any) -> None:
        wires.extend(sent)
        await publish(topic, sent)

    transport.publish = keep
    shop = Shop(transports={"events": transport}, routes={Paid: "events"})
    async with shop.bus.running():
        with shop.tracer.start_as_current_span("request") as request:
            await shop.bus.publish(Paid())
        with anyio.fail_after(10):
            while not shop.headers:  # noqa: ASYNC110
                await anyio.sleep(0.001)
    here = request.get_span_context()
    assert f"00-{here.trace_id:032x}-{here.span_id:016x}-{here.trace_flags:02x}" == wires[0].headers["traceparent"]
    assert [{"traceparent": wires[0].headers["traceparent"]}] == shop.headers


async def test_child_of_the_caller() -> None:
    """What is handled at once is a part of the caller's span."""
    shop = Shop()
    with shop.tracer.start_as_current_span("request") as request:
        await shop.bus.publish(Paid())
    handling = shop.spans()["process t.paid"]
    assert (handling.parent.span_id, handling.kind) == (request.get_span_context().span_id, trace.SpanKind.INTERNAL)
    assert [{}] == shop.headers


async def test_failure_and_cancellation() -> None:
    """A span of what failed says so; one of what was cancelled does not."""
    shop = Shop()
    shop.error = ValueError("no money")
    with pytest.raises(ValueError, match="no money"):
        await shop.bus.send(Charge())
    (span,) = shop.exporter.get_finished_spans()
    assert (trace.StatusCode.ERROR, ["exception"]) == (span.status.status_code, [event.name for event in span.events])
    shop.exporter.clear()
    module = Module("m")

    @module.handles(Charge)
    async def charge(command: Charge) -> int:
        await anyio.sleep_forever()
        return 1

    with anyio.move_on_after(0):
        await EventBus(module, middleware=[Tracing(shop.provider)]).send(Charge())
    (span,) = shop.exporter.get_finished_spans()
    assert (trace.StatusCode.UNSET, ()) == (span.status.status_code, tuple(span.events))


@pytest.mark.parametrize("provider", [None, trace.NoOpTracerProvider()], ids=["unset", "no-op"])
async def test_nothing_is_made_when_nobody_records(provider: Any, noop: list[str]) -> None:
    """Without a provider that records there is no span, no link and no header, even for what brings a header along."""
    headers: list[Any] = []
    module = Module("m")

    @module.on(Paid)
    async def paid(event: Paid, ctx: Context, bus: EventBus) -> None:
        headers.append(dict(ctx.headers))
        assert not trace.get_current_span().get_span_context().is_valid

    bus = EventBus(module, routes={Paid: "memory"}, middleware=[Tracing(provider)])
    async with harness(bus) as t:
        await t.publish(Paid())
        await t.publish(Paid(), headers={"traceparent": PARENT})
        await t.settled()
    assert [{}, {"traceparent": PARENT}] == headers
    assert [] == noop
    with trace.NoOpTracer().start_as_current_span("x"):
        assert [STARTS, "start_span"] == noop  # it would have been seen


async def test_a_bus_that_is_not_traced_adds_nothing() -> None:
    """Without the middleware a message travels as it was published, whatever span there is."""
    shop = Shop(traced=False, routes={Paid: "memory"})
    assert [] == shop.bus.engine.entries._outgoing
    async with harness(shop.bus) as t:
        with shop.tracer.start_as_current_span("request"):
            await t.publish(Paid())
        await t.settled()
    assert [{}] == shop.headers


async def test_header_of_the_publisher_wins() -> None:
    """A publisher that names its parent itself is believed."""
    shop = Shop(routes={Paid: "memory"})
    async with harness(shop.bus) as t:
        with shop.tracer.start_as_current_span("request"):
            await t.publish(Paid(), headers={"traceparent": PARENT})
        await t.settled()
    assert [{"traceparent": PARENT}] == shop.headers
    (link,) = shop.spans()["process t.paid"].links
    assert PARENT.split("-")[2] == f"{link.context.span_id:016x}"


@pytest.mark.parametrize("headers", [{"a": "1", "b": "2"}, {"Traceparent": PARENT}], ids=["many", "twin"])
async def test_a_message_is_worth_more_than_its_trace(headers: dict[str, str]) -> None:
    """A trace that could not travel with the headers of a message stays behind, and the message arrives."""
    shop = Shop(routes={Paid: "memory"}, limits=Limits(headers=2))
    async with harness(shop.bus) as t:
        with shop.tracer.start_as_current_span("request"):
            await t.publish(Paid(), headers=headers)
        await t.settled()
        assert not t.dead
    assert [headers] == shop.headers


async def test_header_that_is_no_trace() -> None:
    """A header that cannot be read is no link, and no error."""
    shop = Shop(routes={Paid: "memory"})
    async with harness(shop.bus) as t:
        await t.publish(Paid(), headers={"traceparent": "00-zz"})
        await t.settled()
    assert () == tuple(shop.spans()["process t.paid"].links)
