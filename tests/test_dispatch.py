"""Sending, publishing and enqueueing: who runs, where, with which facts, and what the caller gets."""

import contextvars
import inspect
import threading
import traceback
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import anyio
import anyio.from_thread
import pytest
from anyio.lowlevel import checkpoint

from eventbus import (
    CircleError,
    Command,
    Context,
    EncodeError,
    Event,
    EventBus,
    Limits,
    Module,
    NoHandlerError,
    NotRunningError,
    Receipt,
    Reject,
    RetryLater,
    Transaction,
    message,
)
from eventbus.middleware import CallNext
from eventbus.stores.memory import MemoryStore
from eventbus.testing.harness import harness


class Double(Command[int], name="d.double"):
    """Ask for twice a number."""

    number: int


class DoubleLoudly(Double, name="d.double_loudly"):
    """Ask for it in a subclass."""


class Later(Command[None], name="d.later", key="lane"):
    """Ask for something that may wait."""

    number: int = 0
    lane: str = "a"


class Placed(Event, name="d.placed", key="order"):
    """State that something was placed."""

    order: str = "1"


class Shipped(Event, name="d.shipped"):
    """State that something was shipped."""

    order: str = "1"


class Express(Shipped, name="d.express"):
    """State that it was shipped fast."""


@message(name="d.invoiced", key="invoice")
@dataclass(frozen=True)
class Invoiced:
    """State, in a dataclass, that something was invoiced."""

    invoice: int


# send


async def test_send_returns_what_the_handler_returned() -> None:
    """The result comes back as it is, without a running bus."""
    module = Module("m")

    @module.handles(Double)
    async def double(cmd: Double) -> int:
        return cmd.number * 2

    assert await EventBus(module).send(Double(number=21)) == 42


async def test_send_raises_what_the_handler_raised() -> None:
    """The very exception arrives, with neither group nor note, and nothing is tried again."""
    module, wrong, calls = Module("m"), ValueError("no"), 0

    @module.handles(Double)
    async def double(cmd: Double) -> int:
        nonlocal calls
        calls += 1
        raise wrong

    with pytest.raises(ValueError, match="no") as caught:
        await EventBus(module).send(Double(number=1))
    assert caught.value is wrong
    assert not hasattr(wrong, "__notes__")
    assert calls == 1


@pytest.mark.parametrize("order", [Reject("bad"), RetryLater(3), ExceptionGroup("two", [ValueError()])], ids=repr)
async def test_orders_to_the_worker_reach_the_sender(order: Exception) -> None:
    """There is no worker in a send, so Reject and RetryLater arrive like any error."""
    module = Module("m")

    @module.handles(Double)
    async def double(cmd: Double) -> int:
        raise order

    with pytest.raises(type(order)) as caught:
        await EventBus(module).send(Double(number=1))
    assert caught.value is order


async def test_send_needs_a_handler() -> None:
    """A command that nobody handles here is told so, with its wire name."""
    with pytest.raises(NoHandlerError, match=r"d\.double") as caught:
        await EventBus().send(Double(number=1))
    assert caught.value.message == "d.double"


async def test_send_takes_commands_only() -> None:
    """An event, and what is no message at all, is refused with the way out."""
    with pytest.raises(TypeError, match=r"Placed is an event: publish\(\) it"):
        await EventBus().send(Placed())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="int is neither"):
        await EventBus().send(3)  # type: ignore[arg-type]


async def test_subclass_of_a_command_goes_to_its_handler() -> None:
    """A command without a handler of its own is handled by that of its base class."""
    module = Module("m")

    @module.handles(Double)
    async def double(cmd: Double) -> int:
        return cmd.number * 2

    assert await EventBus(module).send(DoubleLoudly(number=4)) == 8


async def test_send_is_a_coroutine_function() -> None:
    """Whoever asks whether send has to be awaited is told yes, and awaiting twice over works."""
    module = Module("m")

    @module.handles(Double)
    async def double(cmd: Double) -> int:
        return cmd.number * 2

    bus = EventBus(module)
    assert inspect.iscoroutinefunction(bus.send)
    assert inspect.iscoroutinefunction(bus.publish)
    sent = bus.send(Double(number=1))
    assert inspect.iscoroutine(sent)
    assert await sent == 2


async def test_send_in_a_background_task_of_a_response() -> None:
    """Starlette's background tasks await send instead of running it in a thread."""
    fastapi = pytest.importorskip("fastapi")
    module, seen = Module("m"), list[str]()

    @module.handles(Double)
    async def double(cmd: Double) -> int:
        seen.append(threading.current_thread().name)
        return cmd.number

    bus = EventBus(module)
    app = fastapi.FastAPI()

    @app.post("/")
    async def endpoint(tasks: fastapi.BackgroundTasks) -> None:
        tasks.add_task(bus.send, Double(number=1))

    async with harness(bus, app=app) as t:
        assert (await t.client.post("/")).status_code == 200
    assert [threading.current_thread().name] == seen


async def test_send_while_handling_a_send() -> None:
    """A handler may send; results and errors pass through it."""
    module = Module("m")

    @module.handles(Double)
    async def double(cmd: Double) -> int:
        if cmd.number == 0:
            raise KeyError("zero")
        return cmd.number * 2

    @module.handles(Later)
    async def later(cmd: Later, bus: EventBus) -> None:
        seen.append(await bus.send(Double(number=cmd.number)))

    bus, seen = EventBus(module), list[int]()
    await bus.send(Later(number=3))
    with pytest.raises(KeyError):
        await bus.send(Later(number=0))
    assert [6] == seen


# publish, inline


async def test_publish_runs_every_handler_side_by_side() -> None:
    """Handlers of one event run concurrently, and publish returns when all are through."""
    module, met = Module("m"), list[str]()
    first, second = anyio.Event(), anyio.Event()

    @module.on(Placed)
    async def a(event: Placed) -> None:
        first.set()
        await second.wait()
        met.append("a")

    @module.on(Placed)
    async def b(event: Placed) -> None:
        await first.wait()
        second.set()
        met.append("b")

    with anyio.fail_after(5):
        receipt = await EventBus(module).publish(Placed())
    assert isinstance(receipt, Receipt)
    assert ["a", "b"] == sorted(met)


async def test_publish_without_handlers_is_no_fault() -> None:
    """An event that concerns nobody is published all the same."""
    assert isinstance(await EventBus().publish(Placed()), Receipt)


async def test_publish_takes_events_only() -> None:
    """A command, and what is no message at all, is refused."""
    with pytest.raises(TypeError, match=r"Double is a command: send\(\) or enqueue\(\) it"):
        await EventBus().publish(Double(number=1))
    with pytest.raises(TypeError, match="str is neither"):
        await EventBus().publish("placed")


async def test_publish_to_handlers_of_base_classes_and_of_several_types() -> None:
    """A handler gets what it is registered for and every subclass; one registered for several types gets each once."""
    module, seen = Module("m"), list[tuple[str, str]]()

    @module.on(Shipped)
    async def base(event: Shipped) -> None:
        seen.append(("base", type(event).__name__))

    @module.on(Express)
    async def exact(event: Express) -> None:
        seen.append(("exact", type(event).__name__))

    @module.on(Placed, Shipped, Express)
    async def several(event: Placed | Shipped) -> None:
        seen.append(("several", type(event).__name__))

    @module.on(Invoiced)
    async def foreign(event: Invoiced) -> None:
        seen.append(("foreign", type(event).__name__))

    bus = EventBus(module)
    await bus.publish(Express())
    assert [("base", "Express"), ("exact", "Express"), ("several", "Express")] == sorted(seen)
    seen.clear()
    await bus.publish(Shipped())
    await bus.publish(Placed())
    await bus.publish(Invoiced(invoice=3))
    expected = [("base", "Shipped"), ("foreign", "Invoiced"), ("several", "Placed"), ("several", "Shipped")]
    assert expected == sorted(seen)


async def test_failures_arrive_together_in_registration_order() -> None:
    """All handlers run although some fail; the group has the failures in order, each naming its handler."""
    module, wrong, done = Module("m"), [ValueError("slow"), KeyError("fast")], list[str]()

    @module.on(Placed)
    async def fails_late(event: Placed) -> None:
        for _ in range(5):
            await checkpoint()
        raise wrong[0]

    @module.on(Placed)
    async def works(event: Placed) -> None:
        for _ in range(10):
            await checkpoint()
        done.append("works")

    @module.on(Placed)
    async def fails_early(event: Placed) -> None:
        raise wrong[1]

    with pytest.raises(ExceptionGroup, match=r"2 inline handler\(s\) of d\.placed failed") as caught:
        await EventBus(module).publish(Placed())
    assert tuple(wrong) == caught.value.exceptions
    assert ["in handler m.fails_late of d.placed"] == wrong[0].__notes__
    assert ["in handler m.fails_early of d.placed"] == wrong[1].__notes__
    assert ["works"] == done


async def test_failures_of_transaction_handlers_keep_their_places() -> None:
    """Handlers with a transaction run one after another, and their failures still stand in registration order."""
    module = Module("m")

    @module.on(Placed)
    async def first(event: Placed) -> None:
        raise ValueError("1")

    @module.on(Placed)
    async def second(event: Placed, tx: Transaction[Any]) -> None:
        raise ValueError("2")

    @module.on(Placed)
    async def third(event: Placed) -> None:
        raise ValueError("3")

    @module.on(Placed)
    async def fourth(event: Placed, tx: Transaction[Any]) -> None:
        raise ValueError("4")

    async with harness(EventBus(module, store=MemoryStore(), name="shop")) as t:
        with pytest.raises(ExceptionGroup) as caught:
            await t.publish(Placed())
    assert ["1", "2", "3", "4"] == [str(error) for error in caught.value.exceptions]


async def test_one_error_raised_again_and_again_gathers_one_note() -> None:
    """An error object that a handler raises every time is not written full."""
    module, wrong = Module("m"), ValueError("the same")

    @module.on(Placed)
    async def fails(event: Placed) -> None:
        raise wrong

    for _ in range(3):
        with pytest.raises(ExceptionGroup):
            await EventBus(module).publish(Placed())
    assert ["in handler m.fails of d.placed"] == wrong.__notes__


@pytest.mark.parametrize("order", [Reject("bad"), RetryLater(3)], ids=repr)
async def test_orders_to_the_worker_reach_the_publisher(order: Exception) -> None:
    """There is no worker in an inline publish, so Reject and RetryLater arrive in the group."""
    module = Module("m")

    @module.on(Placed)
    async def fails(event: Placed) -> None:
        raise order

    with pytest.raises(ExceptionGroup) as caught:
        await EventBus(module).publish(Placed())
    assert (order,) == caught.value.exceptions


@pytest.mark.parametrize("leaving", [SystemExit(3), KeyboardInterrupt()], ids=repr)
async def test_exit_of_a_handler_ends_its_siblings_and_reaches_the_publisher(leaving: BaseException) -> None:
    """An exit stops the other handlers at once and arrives in a BaseExceptionGroup, with what failed before it."""
    module, stopped, wrong = Module("m"), list[str](), ValueError()

    @module.on(Placed)
    async def leaves(event: Placed) -> None:
        await checkpoint()
        raise leaving

    @module.on(Placed)
    async def waits(event: Placed) -> None:
        try:
            await anyio.sleep_forever()
        finally:
            stopped.append("waits")

    @module.on(Placed)
    async def fails(event: Placed) -> None:
        raise wrong

    with pytest.raises(BaseExceptionGroup) as caught:
        await EventBus(module).publish(Placed())
    assert (leaving, wrong) == caught.value.exceptions
    assert ["waits"] == stopped


async def test_exit_keeps_the_next_event_from_starting() -> None:
    """After an exit no further event of the same call is handled."""
    module, seen = Module("m"), list[str]()

    @module.on(Placed)
    async def leaves(event: Placed) -> None:
        seen.append(event.order)
        raise SystemExit

    with pytest.raises(BaseExceptionGroup):
        await EventBus(module).publish_many([Placed(order="1"), Placed(order="2")])
    assert ["1"] == seen


async def test_cancelling_the_publisher_cancels_its_handlers() -> None:
    """A cancelled publish ends all its handlers promptly and does not return."""
    module, ended = Module("m"), list[str]()

    async def waits(name: str) -> None:
        try:
            await anyio.sleep_forever()
        finally:
            ended.append(name)

    @module.on(Placed)
    async def a(event: Placed) -> None:
        await waits("a")

    @module.on(Placed)
    async def b(event: Placed) -> None:
        await waits("b")

    with anyio.move_on_after(0.01) as scope:
        await EventBus(module).publish(Placed())
        ended.append("returned")
    assert scope.cancelled_caught
    assert ["a", "b"] == sorted(ended)


async def test_handlers_do_not_see_each_others_context() -> None:
    """A context variable of the publisher is seen by every handler; what one sets is seen by nobody else."""
    module, tenant = Module("m"), contextvars.ContextVar("tenant", default="none")
    seen = list[str]()

    @module.on(Placed)
    async def a(event: Placed) -> None:
        seen.append(tenant.get())
        tenant.set("a")

    @module.on(Placed)
    async def b(event: Placed) -> None:
        await checkpoint()
        seen.append(tenant.get())
        tenant.set("b")

    tenant.set("acme")
    await EventBus(module).publish(Placed())
    assert ["acme", "acme"] == seen
    assert tenant.get() == "acme"


async def test_publish_many_runs_one_event_after_the_other() -> None:
    """Several events are handled in their order, all of them although some fail, and each has a receipt."""
    module, seen = Module("m"), list[str]()

    @module.on(Placed)
    async def notes(event: Placed) -> None:
        await checkpoint()
        seen.append(event.order)
        if event.order != "2":
            raise ValueError(event.order)

    bus = EventBus(module)
    with pytest.raises(ExceptionGroup) as caught:
        await bus.publish_many([Placed(order="1"), Placed(order="2"), Placed(order="3")])
    assert ["1", "2", "3"] == seen
    assert ["1", "3"] == [str(error) for error in caught.value.exceptions]
    receipts = await bus.publish_many([Placed(order="2"), Shipped()])
    assert len({receipt.id for receipt in receipts}) == 2
    assert [] == await bus.publish_many([])


async def test_publish_many_checks_all_before_it_begins() -> None:
    """One that cannot be published keeps all from being published."""
    module, seen = Module("m"), list[str]()

    @module.on(Placed)
    async def notes(event: Placed) -> None:
        seen.append(event.order)

    with pytest.raises(TypeError):
        await EventBus(module).publish_many([Placed(), Double(number=1)])
    assert [] == seen


@pytest.mark.parametrize("delay", [-1, float("inf"), float("nan")])
async def test_delay_that_cannot_be(delay: float) -> None:
    """A delay is a finite number of seconds, not below zero."""
    with pytest.raises(ValueError, match="delay="):
        await EventBus(routes={Placed: "memory"}).publish(Placed(), delay=delay)


async def test_delay_needs_a_route() -> None:
    """Nothing keeps an inline message for later; no delay at all is fine."""
    with pytest.raises(ValueError, match="Placed has no route, and nothing keeps an inline message for 5 s"):
        await EventBus().publish(Placed(), delay=5)
    await EventBus().publish(Placed(), delay=0)


@pytest.mark.parametrize("key", ["", 3])
async def test_key_that_cannot_be(key: Any) -> None:
    """A key is text that is not empty."""
    with pytest.raises(ValueError, match="key="):
        await EventBus().publish(Placed(), key=key)


async def test_headers_are_checked_inline_too() -> None:
    """Headers that could not travel are refused wherever the event goes."""
    with pytest.raises(EncodeError):
        await EventBus().publish(Placed(), headers={"bad name": "x"})
    with pytest.raises(EncodeError):
        await EventBus(limits=Limits(headers=1)).publish(Placed(), headers={"a": "1", "b": "2"})


async def test_publishing_in_a_circle_is_stopped() -> None:
    """Handlers that publish each other's events inline for ever end in an error that fits a screen."""
    module, depth = Module("m"), 0

    @module.on(Placed)
    async def ping(event: Placed, bus: EventBus) -> None:
        nonlocal depth
        depth += 1
        await bus.publish(Shipped())

    @module.on(Shipped)
    async def pong(event: Shipped, bus: EventBus) -> None:
        await bus.publish(Placed())

    with pytest.raises(ExceptionGroup) as caught:
        await EventBus(module).publish(Placed())
    assert depth == 25
    (error,) = caught.value.exceptions
    assert isinstance(error, CircleError)
    assert "in a circle" in str(error)
    assert len(error.__notes__) == 1
    assert len(traceback.format_exception(caught.value)) < 40


@pytest.mark.parametrize("others", [0, 2])
async def test_publishing_in_a_circle_is_stopped_though_nobody_looks(others: int) -> None:
    """Neither does it go on for ever where the handlers take the message alone and suspend."""
    module, depth = Module("m"), 0

    @module.on(Placed)
    async def again(event: Placed) -> None:
        nonlocal depth
        depth += 1
        await checkpoint()
        if depth < 500:
            await bus.publish(Placed(), key="a" if depth % 2 else None)

    for number in range(others):
        module.on(Placed, name=f"other{number}")(suspends)

    bus = EventBus(module)
    with pytest.raises(ExceptionGroup) as caught:
        await bus.publish(Placed())
    assert depth == 50
    (error,) = caught.value.exceptions
    assert isinstance(error, CircleError)


async def suspends(event: Placed) -> None:
    """Handle an event with a suspension."""
    await checkpoint()


async def test_sending_in_a_circle_is_stopped() -> None:
    """Handlers that send each other's commands for ever end in a CircleError."""
    module = Module("m")

    @module.handles(Later)
    async def again(cmd: Later, bus: EventBus, ctx: Context) -> None:
        await bus.send(Later(number=cmd.number + 1))

    with pytest.raises(CircleError):
        await EventBus(module).send(Later())


# enqueue


async def test_enqueue_needs_a_route() -> None:
    """Without a route nothing would keep the command, and the message says both ways out."""
    module = Module("m")

    @module.handles(Later)
    async def later(cmd: Later) -> None:
        raise AssertionError

    with pytest.raises(ValueError, match=r"no route.*routes=.*or send\(\) it now"):
        await EventBus(module).enqueue(Later())
    with pytest.raises(TypeError, match=r"Placed is an event: publish\(\) it"):
        await EventBus(module).enqueue(Placed())  # type: ignore[arg-type]


async def test_enqueue_runs_later_and_drops_the_result() -> None:
    """The command goes through its route; the caller has a receipt, the handler its id, nobody the result."""
    module, seen = Module("m"), list[tuple[int, str]]()

    @module.handles(Double)
    async def double(cmd: Double, ctx: Context) -> int:
        seen.append((cmd.number, ctx.message_id))
        return cmd.number * 2

    async with harness(EventBus(module, routes={Double: "memory"})) as t:
        receipt = await t.bus.enqueue(Double(number=4))
        assert [] == seen
        await t.settled()
        assert [(4, receipt.id)] == seen
        assert await t.send(Double(number=5)) == 10


# receipts and facts


async def test_receipt_is_no_result() -> None:
    """A receipt has an id, made when somebody asks, the same ever after; it has no truth and nothing else."""
    receipt = await EventBus().publish(Placed())
    assert receipt.id == receipt.id
    assert len(receipt.id) == 36
    with pytest.raises(TypeError, match="no result"):
        bool(receipt)
    with pytest.raises(AttributeError):
        receipt.value  # type: ignore[attr-defined]  # noqa: B018
    assert receipt != await EventBus().publish(Placed())


async def test_receipt_and_context_agree() -> None:
    """The id on the receipt is the id the handlers saw."""
    module, seen = Module("m"), list[str]()

    @module.on(Placed)
    async def a(event: Placed, ctx: Context) -> None:
        seen.append(ctx.message_id)

    @module.on(Placed)
    async def b(event: Placed, ctx: Context) -> None:
        seen.append(ctx.message_id)

    receipt = await EventBus(module).publish(Placed())
    assert [receipt.id, receipt.id] == seen


async def test_facts_of_an_inline_message() -> None:
    """The context tells name, version, key, headers, time, handler and the first attempt."""
    module, seen = Module("m"), list[Context]()

    @module.on(Placed)
    async def keeps(event: Placed, ctx: Context) -> None:
        assert ctx.message is event
        seen.append(ctx)

    bus = EventBus(module)
    before = datetime.now(UTC)
    await bus.publish(Placed(order="7"), headers={"tenant": "acme"})
    await bus.publish(Placed(order="7"), key="other")
    first, second = seen
    assert ("d.placed", 1, "7", "m.keeps", 1) == (first.name, first.version, first.key, first.handler, first.attempt)
    assert {"tenant": "acme"} == dict(first.headers)
    assert {} == dict(second.headers)
    assert before - timedelta(seconds=1) < first.time <= datetime.now(UTC)
    assert second.key == "other"
    assert first.correlation_id == first.message_id != second.message_id
    assert first.causation_id is None


async def test_correlation_follows_inline_from_a_plain_handler() -> None:
    """What a handler publishes is caused by what it handles, though the handler itself asks for no context."""
    module, seen = Module("m"), list[Context]()

    @module.handles(Later)
    async def plain(cmd: Later) -> None:
        await bus.publish(Placed())

    @module.on(Placed)
    async def passes_on(event: Placed, bus: EventBus) -> None:
        await bus.publish(Shipped())

    @module.on(Placed)
    async def looks(event: Placed, ctx: Context) -> None:
        seen.append(ctx)

    @module.on(Shipped)
    async def looks_too(event: Shipped, ctx: Context) -> None:
        seen.append(ctx)

    bus = EventBus(module)
    await bus.send(Later())
    placed, shipped = sorted(seen, key=lambda ctx: ctx.name)
    assert placed.causation_id == placed.correlation_id == shipped.correlation_id
    assert placed.causation_id is not None
    assert shipped.causation_id == placed.message_id


async def test_correlation_follows_through_queues() -> None:
    """Send, publish, queue, handler, publish: one correlation, and each message caused by the one before."""
    module, seen = Module("m"), dict[str, Context]()

    @module.handles(Later)
    async def later(cmd: Later, ctx: Context, bus: EventBus) -> None:
        seen["later"] = ctx
        await bus.publish(Placed(), headers={"tenant": "acme"})

    @module.on(Placed)
    async def placed(event: Placed, ctx: Context, bus: EventBus) -> None:
        seen["placed"] = ctx
        await bus.publish(Shipped())

    @module.on(Shipped)
    async def shipped(event: Shipped, ctx: Context) -> None:
        seen["shipped"] = ctx

    async with harness(EventBus(module, routes={Placed: "memory"})) as t:
        await t.send(Later())
        await t.settled()
        second = await t.publish(Placed(order="2"))
        await t.settled()
        assert seen["placed"].message_id == second.id
    later_, placed_, shipped_ = seen["later"], seen["placed"], seen["shipped"]
    assert later_.causation_id is None
    assert placed_.causation_id is None
    assert shipped_.causation_id == placed_.message_id
    assert shipped_.correlation_id == placed_.correlation_id == placed_.message_id
    assert {} == dict(placed_.headers)


async def test_routed_message_keeps_the_identity_it_was_published_with() -> None:
    """Id, correlation, cause, time, key and headers are the same before and behind the queue."""
    module, seen = Module("m"), list[Context]()

    @module.handles(Later)
    async def later(cmd: Later, ctx: Context, bus: EventBus) -> None:
        seen.append(ctx)
        receipts.append(await bus.publish(Placed(order="9"), headers={"tenant": "acme"}))
        receipts.append(await bus.publish(Placed(order="9"), key="mine"))

    @module.on(Placed)
    async def placed(event: Placed, ctx: Context) -> None:
        seen.append(ctx)

    bus, receipts = EventBus(module, routes={Placed: "memory"}), list[Receipt]()
    async with harness(bus) as t:
        await t.send(Later())
        await t.settled()
        cause, first, second = seen
        assert [receipt.id for receipt in receipts] == [first.message_id, second.message_id]
        assert {cause.message_id} == {first.causation_id, second.correlation_id, cause.correlation_id}
        assert ["9", "mine"] == [first.key, second.key]
        assert {"tenant": "acme"} == dict(first.headers)
        assert first.time == datetime.fromtimestamp(t.clock.now(), UTC)


# middleware


async def test_middleware_is_passed_bus_first_and_outermost_first() -> None:
    """The bus's middleware goes around the module's, the first of each around the next."""
    steps = list[str]()

    def note(name: str) -> Any:
        async def middleware(ctx: Context, call_next: CallNext) -> Any:
            steps.append(f"{name} {ctx.handler}")
            try:
                return await call_next(ctx)
            finally:
                steps.append(f"/{name}")

        return middleware

    module = Module("m", middleware=[note("c"), note("d")])
    other = Module("other", middleware=[note("x")])

    @module.handles(Double)
    async def double(cmd: Double) -> int:
        steps.append("handler")
        return cmd.number * 2

    bus = EventBus(module, other, middleware=[note("a"), note("b")])
    assert await bus.send(Double(number=2)) == 4
    names = [step.split()[0] for step in steps]
    assert ["a", "b", "c", "d", "handler", "/d", "/c", "/b", "/a"] == names
    assert steps[0] == "a m.double"


async def test_middleware_may_answer_change_and_swallow() -> None:
    """What the middleware returns is the result, and what it swallows did not fail."""
    module = Module("m")

    async def saves(ctx: Context, call_next: CallNext) -> Any:
        try:
            return (await call_next(ctx)) + 1
        except ValueError:
            return -1

    @module.handles(Double)
    async def double(cmd: Double) -> int:
        if cmd.number < 0:
            raise ValueError
        return cmd.number * 2

    bus = EventBus(module, middleware=[saves])
    assert await bus.send(Double(number=2)) == 5
    assert await bus.send(Double(number=-2)) == -1


async def test_middleware_goes_around_every_handler_of_an_event() -> None:
    """Each handler has a passage of its own, inline and behind a queue alike."""
    module, seen = Module("m"), list[tuple[str, str, int]]()

    async def notes(ctx: Context, call_next: CallNext) -> Any:
        seen.append((ctx.handler, ctx.name, ctx.attempt))
        return await call_next(ctx)

    @module.on(Placed, Shipped)
    async def a(event: Placed | Shipped) -> None: ...

    @module.on(Placed, Shipped)
    async def b(event: Placed | Shipped) -> None: ...

    async with harness(EventBus(module, middleware=[notes], routes={Placed: "memory"})) as t:
        await t.publish(Shipped())
        await t.publish(Placed())
        await t.settled()
    expected = [("m.a", "d.placed", 1), ("m.a", "d.shipped", 1), ("m.b", "d.placed", 1), ("m.b", "d.shipped", 1)]
    assert expected == sorted(seen)


# what handlers return


async def test_returned_messages_are_published_inline() -> None:
    """A message that a handler is annotated to return, or a list of them, is published with its success."""
    module, seen = Module("m"), list[tuple[str, str | None]]()

    @module.on(Placed)
    async def one(event: Placed) -> Shipped:
        return Shipped(order=f"one of {event.order}")

    @module.on(Placed)
    async def several(event: Placed) -> list[Shipped]:
        return [Shipped(order="a"), Express(order="b")]

    @module.on(Placed)
    async def perhaps(event: Placed) -> Shipped | None:
        return None

    @module.on(Placed)
    async def something_else(event: Placed) -> str:
        return "no message"

    @module.on(Shipped)
    async def shipped(event: Shipped, ctx: Context) -> None:
        seen.append((event.order, ctx.causation_id))

    receipt = await EventBus(module).publish(Placed(order="1"))
    assert [("a", receipt.id), ("b", receipt.id), ("one of 1", receipt.id)] == sorted(seen)


async def test_nothing_is_returned_by_a_handler_that_fails() -> None:
    """What a handler would have returned is not published if it fails afterwards."""
    module, seen = Module("m"), list[str]()

    @module.on(Placed)
    async def fails(event: Placed) -> Shipped:
        raise ValueError

    @module.on(Shipped)
    async def shipped(event: Shipped) -> None:
        seen.append("shipped")

    with pytest.raises(ExceptionGroup):
        await EventBus(module).publish(Placed())
    assert [] == seen


async def test_failure_of_a_returned_message_is_the_failure_of_who_returned_it() -> None:
    """A handler whose returned message cannot be handled inline has failed."""
    module = Module("m")

    @module.on(Placed)
    async def returns(event: Placed) -> Shipped:
        return Shipped()

    @module.on(Shipped)
    async def fails(event: Shipped) -> None:
        raise ValueError("no")

    with pytest.raises(ExceptionGroup) as caught:
        await EventBus(module).publish(Placed())
    (inner,) = caught.value.exceptions
    assert isinstance(inner, ExceptionGroup)
    assert ["in handler m.returns of d.placed"] == inner.__notes__


async def test_returned_messages_of_a_routed_handler() -> None:
    """Behind a queue what is returned is published, and a command enqueued, once it has succeeded."""
    module, seen, attempts = Module("m"), list[str](), list[int]()

    @module.on(Placed)
    async def placed(event: Placed, ctx: Context) -> list[Shipped | Later]:
        attempts.append(ctx.attempt)
        if ctx.attempt == 1:
            raise ValueError
        return [Shipped(order="s"), Later(number=7)]

    @module.on(Shipped)
    async def shipped(event: Shipped) -> None:
        seen.append(event.order)

    @module.handles(Later)
    async def later(cmd: Later) -> None:
        seen.append(f"later {cmd.number}")

    async with harness(EventBus(module, routes={Placed: "memory", Later: "memory"})) as t:
        await t.publish(Placed())
        await t.settled()
        assert [] == seen
        await t.advance(1)
        assert ["later 7", "s"] == sorted(seen)
        assert [1, 2] == attempts
        assert len(t.failed(placed)) == 1


# plain functions


async def test_plain_functions_run_in_threads() -> None:
    """A plain def does not block the event loop, and publishes and sends from its thread."""
    module, seen = Module("m"), list[Any]()

    @module.handles(Double)
    def double(cmd: Double, bus: EventBus) -> int:
        assert threading.current_thread() is not main
        anyio.from_thread.run(bus.publish, Placed(order="t"))
        return cmd.number * 2

    @module.on(Placed)
    def placed(event: Placed, bus: EventBus, ctx: Context) -> None:
        seen.append((ctx.causation_id, anyio.from_thread.run(bus.send, DoubleLoudly(number=1))))

    @module.handles(DoubleLoudly)
    async def loudly(cmd: DoubleLoudly, ctx: Context) -> int:
        assert threading.current_thread() is main
        seen.append(ctx.correlation_id)
        return 8

    main = threading.current_thread()
    assert await EventBus(module).send(Double(number=3)) == 6
    correlation, (cause, result) = seen
    assert correlation == cause
    assert result == 8


async def test_plain_functions_publish_to_queues_from_their_threads() -> None:
    """What a plain def publishes to a queue arrives, caused by what it handled."""
    module, seen = Module("m"), list[str | None]()

    @module.on(Placed)
    def placed(event: Placed, bus: EventBus) -> None:
        anyio.from_thread.run(bus.publish, Shipped())

    @module.on(Shipped)
    async def shipped(event: Shipped, ctx: Context) -> None:
        seen.append(ctx.causation_id)

    async with harness(EventBus(module, routes={"d.*": "memory"})) as t:
        receipt = await t.publish(Placed())
        await t.settled()
        assert [receipt.id] == seen


async def test_error_of_a_plain_function_arrives_unchanged() -> None:
    """The exception of a thread is the exception of the send."""
    module, wrong = Module("m"), LookupError("in a thread")

    @module.handles(Double)
    def double(cmd: Double) -> int:
        raise wrong

    with pytest.raises(LookupError) as caught:
        await EventBus(module).send(Double(number=1))
    assert caught.value is wrong


# routes


async def test_routed_publish_needs_a_running_bus_and_inline_does_not() -> None:
    """Before the start only what stays in the caller's task works; the error says how to start."""
    module = Module("m")

    @module.on(Placed)
    async def placed(event: Placed) -> None: ...

    bus = EventBus(module, routes={Placed: "memory"})
    with pytest.raises(NotRunningError, match=r"not started.*bus\.running\(\)"):
        await bus.publish(Placed())
    await bus.publish(Shipped())


async def test_inline_handler_of_a_routed_event_runs_at_once() -> None:
    """inline=True handles in the publisher's task, though the event has a route for the others."""
    module, seen = Module("m"), list[str]()

    @module.on(Placed, inline=True)
    async def now(event: Placed) -> None:
        seen.append("now")

    @module.on(Placed)
    async def later(event: Placed) -> None:
        seen.append("later")

    async with harness(EventBus(module, routes={Placed: "memory"})) as t:
        await t.publish(Placed())
        assert "now" in seen
        await t.settled()
        assert ["later", "now"] == sorted(seen)


async def test_routed_event_of_an_unknown_type_is_told_to_register() -> None:
    """A type with a route that nobody registered before the bus compiled cannot travel."""
    async with harness(EventBus(Module("m", messages=[Placed]), routes={"d.*": "memory"})) as t:
        with pytest.raises(EncodeError, match=r"Module\(messages=\[\.\.\.\]\)"):
            await t.publish(Shipped())
