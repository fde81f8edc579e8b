"""Context: what a handler is told, and how one message follows from another."""

import itertools
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from threading import Barrier, BrokenBarrierError
from typing import Any

import pytest

from eventbus import Command, Context, Event, EventBus, Module
from eventbus.clock import Runtime, SystemClock
from eventbus.context import Origin, current, draining, origin_of, seed_of


class Placed(Event, name="shop.placed", version=3, key="order"):
    order: int | None = None


class Paid(Event):
    pass


class Begin(Command, name="shop.begin"):
    pass


class Clock(SystemClock):
    """Stand still."""

    def now(self) -> float:
        """Return a moment in 2030."""
        return datetime(2030, 5, 17, tzinfo=UTC).timestamp()


def runtime() -> Runtime:
    """Return a runtime whose ids count."""
    return Runtime(clock=Clock(), ids=map(str, itertools.count(1)).__next__)


def test_of() -> None:
    """A unit test makes a context as if its message had just been sent."""
    context = Context.of(Placed(order=7), handler="shop.audit", attempt=2, headers={"tenant": "a"})
    assert ("shop.placed", 3, "7", "shop.audit", 2, {"tenant": "a"}) == (
        context.name, context.version, context.key, context.handler, context.attempt, context.headers,
    )  # fmt: skip
    assert Placed(order=7) == context.message
    assert (context.message_id, None) == (context.correlation_id, context.causation_id)
    assert UTC is context.time.tzinfo


def test_defaults() -> None:
    """A context of nothing but a message is a first attempt without headers."""
    context = Context.of(Paid())
    assert ("Paid", 1, None, "", 1, {}) == (
        context.name, context.version, context.key, context.handler, context.attempt, dict(context.headers),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("order", "given", "key"), [(7, None, "7"), (7, "a", "a"), (None, None, None), (None, "a", "a")]
)
def test_key(order: int | None, given: str | None, key: str | None) -> None:
    """A key given when publishing beats that of the message."""
    assert key == Context.of(Placed(order=order), key=given).key


def test_identity_is_made_once() -> None:
    """The identity is made at the first look and stays the same."""
    made = runtime()
    origin = Origin(Paid(), made)
    seed = seed_of(origin)
    first, second = Context(seed, "a"), Context(seed, "b", 2)
    assert "1" == made.ids()
    assert ["2", "2", "2"] == [first.message_id, second.message_id, second.correlation_id]
    assert datetime(2030, 5, 17, tzinfo=UTC) == first.time == second.time


def test_threads_that_look_at_once_see_one_identity() -> None:
    """Who looks first while another thread does sees the same identity as that."""
    counted, inside = itertools.count(1), Barrier(2)

    def slowly() -> str:
        with suppress(BrokenBarrierError):
            inside.wait(0.5)  # until both threads are making one
        return str(next(counted))

    seed = [Paid(), None, None, 0, Runtime(clock=Clock(), ids=slowly)]
    with ThreadPoolExecutor(2) as threads:
        seen = {*threads.map(lambda name: Context(seed, name).message_id, "ab")}
    assert {Context(seed, "c").message_id} == seen


def test_threads_that_look_at_once_grow_one_origin() -> None:
    """The origin that a seed grows is one for all threads."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as threads:
            for _ in range(500):
                seed = [Paid(), None, None, 0, runtime()]
                assert len({*threads.map(lambda _, seed=seed: id(origin_of(seed)), range(4))}) == 1
    finally:
        sys.setswitchinterval(interval)


def test_cause() -> None:
    """A message has what was handled meanwhile as its cause, and the first of all as its correlation."""
    made = runtime()
    first = Origin(Placed(), made)
    second = Origin(Paid(), made, first)
    third = Origin(Paid(), made, second)
    assert ("3", "1", "2") == (third.identity.id, third.identity.correlation, third.identity.causation)
    assert ("2", "1", "1") == (second.identity.id, second.identity.correlation, second.identity.causation)
    assert ("1", "1", None) == (first.identity.id, first.identity.correlation, first.identity.causation)


READ_ONLY = [
    *("message", "handler", "attempt", "message_id", "correlation_id", "causation_id", "time"),
    *("name", "version", "key", "headers"),
]


@pytest.mark.parametrize("name", READ_ONLY)
def test_read_only(name: str) -> None:
    """Nothing in a context can be changed, and nothing added."""
    context = Context.of(Paid())
    with pytest.raises(AttributeError):
        setattr(context, name, None)
    with pytest.raises(AttributeError):
        context.user = "a"  # type: ignore[attr-defined]  # that is the point


def test_default_headers_are_read_only() -> None:
    """The headers of messages without any are shared, so nobody can write to them."""
    with pytest.raises(TypeError):
        Context.of(Paid()).headers["a"] = "b"  # type: ignore[index]  # that is the point


def test_text() -> None:
    """A context shows which message is handled by whom, without the message's content."""
    assert "Context('shop.placed', handler='shop.audit', attempt=2)" == repr(
        Context.of(Placed(order=7), handler="shop.audit", attempt=2)
    )


def test_nothing_is_handled_here() -> None:
    """Outside of a handler no message is being handled, and no queue drained."""
    assert (None, None) == (current.get(), draining.get())


async def test_handlers_see_their_cause() -> None:
    """Through send and publish each handler sees the message that began it all, and the one that caused its own."""
    seen: list[Context] = []
    shop = Module("shop")

    @shop.handles(Begin)
    async def begin(cmd: Begin, bus: EventBus, ctx: Context) -> None:
        seen.append(ctx)
        await bus.publish(Placed(order=7), key="first", headers={"tenant": "a"})

    @shop.on(Placed)
    async def placed(event: Placed, bus: EventBus, ctx: Context) -> None:
        seen.append(ctx)
        await bus.publish(Paid())

    @shop.on(Paid)
    async def paid(event: Paid, ctx: Context) -> None:
        seen.append(ctx)

    await EventBus(shop).send(Begin())
    assert ["shop.begin", "shop.placed", "shop.paid"] == [one.handler for one in seen]
    assert {seen[0].message_id} == {one.correlation_id for one in seen}
    assert [None, seen[0].message_id, seen[1].message_id] == [one.causation_id for one in seen]
    assert [("first", {"tenant": "a"}), (None, {})] == [(one.key, dict(one.headers)) for one in seen[1:]]
    assert current.get() is None


async def test_siblings_have_one_identity() -> None:
    """All handlers of one event see the same message id, and two events have different ones."""
    seen: list[Any] = []
    shop = Module("shop")

    def listener(name: str) -> None:
        @shop.on(Paid, name=name)
        async def listen(event: Paid, ctx: Context) -> None:
            seen.append(ctx.message_id)

    names: Iterator[str] = iter("abc")
    for name in names:
        listener(name)
    bus = EventBus(shop)
    await bus.publish(Paid())
    await bus.publish(Paid())
    assert [3, 3] == [seen.count(one) for one in dict.fromkeys(seen)]
