"""What a test has seen, and what it is told when it has not looked: who caused what, and what there was instead."""

from typing import Any

import pytest

from eventbus import Command, Event, EventBus, Module, Reject, Retry, RetryLater
from eventbus.stores.memory import MemoryStore
from eventbus.testing import UnobservedError, harness
from tests.doubles import raised


class Placed(Event, name="r.placed"):
    """State that something was placed."""

    number: int = 0


class Shipped(Event, name="r.shipped"):
    """State that something was shipped."""

    number: int = 0


class Place(Command[None], name="r.place"):
    """Ask to place something."""

    number: int = 0


def shop(*, fails: int = 0, store: bool = False) -> EventBus:
    """Return a bus in which one thing leads to another, and shipping fails so many times."""
    module, left = Module("m"), [fails]

    @module.handles(Place)
    async def place(cmd: Place, bus: EventBus) -> None:
        await bus.publish(Placed(number=cmd.number), atomic=False)

    @module.on(Placed)
    async def ship(event: Placed, bus: EventBus) -> None:
        await bus.publish(Shipped(number=event.number), delay=60, atomic=False)

    @module.on(Placed)
    async def bill(event: Placed) -> None: ...

    @module.on(Shipped, retry=Retry(attempts=3, initial=10, jitter=False))
    async def deliver(event: Shipped) -> None:
        if left[0]:
            left[0] -= 1
            raise ConnectionError(f"{left[0]} more")

    routes = {"r.*": "store" if store else "memory"}
    return EventBus(module, name="shop", routes=routes, store=MemoryStore() if store else None)


# errors that nobody looked at


@pytest.mark.parametrize("store", [False, True])
async def test_failure_that_was_tried_again_fails_the_test(store: bool) -> None:
    """A handler that failed once and then succeeded fails the test that did not look, and says who caused what."""
    with raised(UnobservedError) as caught:
        async with harness(shop(fails=1, store=store)) as t:
            await t.enqueue(Place(number=7))
            await t.advance(100)
            assert t.handled("m.deliver") == [Shipped(number=7)]
    lines = str(caught[0]).splitlines()
    assert lines[:2] == [
        "1 failure(s) unobserved:",
        "  r.shipped in m.deliver, attempt 1 at 60 s: ConnectionError: 0 more",
    ]
    tree = [
        "what caused what:",
        "  r.place Place(number=7)",
        "    m.place, attempt 1 at 0 s: done",
        "      r.placed Placed(number=7)",
        "        m.bill, attempt 1 at 0 s: done",
        "        m.ship, attempt 1 at 0 s: done",
        "          r.shipped Shipped(number=7)",
        "            m.deliver, attempt 1 at 60 s: ConnectionError: 0 more",
        "            m.deliver, attempt 2 at 70 s: done",
    ]
    assert sorted(tree) == sorted(lines[2:-1])
    assert lines.index("          r.shipped Shipped(number=7)") == 1 + lines.index(
        "        m.ship, attempt 1 at 0 s: done"
    )
    assert isinstance(caught[0].__cause__, ConnectionError)


async def test_failure_at_the_very_end_is_noticed() -> None:
    """A failure whose next attempt is still to come fails the test as well."""
    with pytest.raises(UnobservedError, match=r"m\.deliver, attempt 1 at 60 s"):
        async with harness(shop(fails=3)) as t:
            await t.publish(Placed())
            await t.advance(60)


async def test_looking_is_observing() -> None:
    """Failures that the test has asked for, by name or function, are its business; others are not."""
    async with harness(shop(fails=1)) as t:
        await t.publish(Placed())
        await t.advance(100)
        assert [str(error) for error in t.failed("m.deliver")] == ["0 more"]
        assert t.failed("m.bill") == []
    with pytest.raises(UnobservedError):
        async with harness(shop(fails=1)) as t:
            await t.publish(Placed())
            await t.advance(100)
            assert t.failed("m.bill") == []
    async with harness(shop()) as t:
        with pytest.raises(ValueError, match=r"no handler 'm\.nobody'; known are m\.bill, m\.deliver, m\.place"):
            t.failed("m.nobody")


async def test_looking_at_the_dead_covers_their_attempts() -> None:
    """Whoever has seen that a message died knows of every attempt."""
    async with harness(shop(fails=3)) as t:
        await t.publish(Placed())
        await t.advance(1000)
        assert len(t.dead) == 1


@pytest.mark.parametrize("store", [False, True])
async def test_replaying_is_observing(store: bool) -> None:
    """Whoever replays or discards what is dead knows of it."""
    for verb in ("replay", "discard"):
        async with harness(shop(fails=3, store=store)) as t:
            await t.publish(Placed())
            await t.advance(1000)
            assert await getattr(t.bus.dead, verb)(handler="m.deliver") == 1
            await t.settled()


async def test_orders_and_caught_errors_are_no_failures() -> None:
    """RetryLater is an order; what reaches a caller is the caller's; neither fails a test."""
    module, asked = Module("m"), list[int]()

    @module.on(Placed)
    async def later(event: Placed) -> None:
        asked.append(1)
        if len(asked) == 1:
            raise RetryLater(5)

    @module.handles(Place)
    async def place(cmd: Place) -> None:
        raise KeyError(cmd.number)

    @module.on(Shipped)
    async def careful(event: Shipped, bus: EventBus) -> None:
        with pytest.raises(KeyError):
            await bus.send(Place(number=1))

    async with harness(EventBus(module, routes={Placed: "memory", Shipped: "memory"})) as t:
        await t.publish(Placed())
        await t.publish(Shipped())
        with pytest.raises(KeyError):
            await t.send(Place(number=2))
        await t.advance(10)
        assert asked == [1, 1]


async def test_error_of_the_test_is_told_about_handlers() -> None:
    """A test that fails by itself is told what failed in handlers meanwhile."""
    with raised(KeyError) as caught:
        async with harness(shop(fails=1)) as t:
            await t.publish(Placed())
            await t.advance(60)
            raise KeyError
    [note] = caught[0].__notes__
    assert note.startswith("meanwhile, in handlers:\n1 failure(s) unobserved:")


async def test_tree_of_everything() -> None:
    """The tree can be printed at any time, from the messages that the test began with."""
    async with harness(shop()) as t:
        await t.publish(Placed(number=1))
        await t.publish(Shipped(number=2))
        await t.settled()
        lines = t.tree().splitlines()
    assert sorted(line for line in lines if line.startswith("  r.")) == [
        "  r.placed Placed(number=1)",
        "  r.shipped Shipped(number=2)",
    ]


# searching


async def test_search_that_finds_nothing_says_what_there_was() -> None:
    """An empty result shows what was published, sent or handled instead, and is an empty list all the same."""
    async with harness(shop()) as t:
        await t.enqueue(Place(number=1))
        await t.settled()
        assert t.published(Placed, number=2) == []
        assert not t.published(Placed, number=2)
        shown = "[] (no Placed with number=2 was published; published instead: Placed(number=1))"
        assert repr(t.published(Placed, number=2)) == shown
        assert "published instead: Placed(number=1), Shipped(number=1)" in repr(t.published(Other))
        assert "Placed has no colour" in repr(t.published(Placed, colour="red"))
        assert "handled instead: Place(number=1)" in repr(t.sent(Place, number=3))
        assert "m.place" in repr(t.handled("m.deliver"))
        assert repr(t.published(Placed)) == "[Placed(number=1)]"


async def test_one() -> None:
    """The only one is returned as itself; none, or several, is an error that says what there was."""
    async with harness(shop()) as t:
        for number in (1, 2):
            await t.enqueue(Place(number=number))
        await t.settled()
        assert t.published(Placed, number=2).one() == Placed(number=2)
        with pytest.raises(AssertionError, match="2 x Placed was published, not one"):
            t.published(Placed).one()
        with pytest.raises(AssertionError, match=r"no Placed with number=3 was published; .* Placed\(number=1\)"):
            t.published(Placed, number=3).one()


async def test_failed_handling_is_told_instead() -> None:
    """Asking what a handler has handled, when it failed, shows how."""
    module = Module("m")

    @module.on(Placed)
    async def dies(event: Placed) -> None:
        raise Reject("never")

    async with harness(EventBus(module, routes={Placed: "memory"})) as t:
        await t.publish(Placed())
        await t.settled()
        assert "it failed: m.dies, attempt 1 at 0 s: Reject: never" in repr(t.handled(dies))
        assert len(t.dead) == 1


class Other(Event, name="r.other"):
    """Be something else."""


# stand-ins


async def test_stub_stands_in_for_a_handler() -> None:
    """A stub answers instead of a handler, notes what came, and is gone with the harness."""
    bus = shop(fails=1)
    async with harness(bus) as t:
        stub = t.stub("m.deliver")
        await t.publish(Shipped(number=3))
        await t.settled()
        assert stub.messages == [Shipped(number=3)]
        assert t.handled("m.deliver") == [Shipped(number=3)]
    with pytest.raises(UnobservedError):
        async with harness(bus) as t:
            await t.publish(Shipped())


async def test_stub_returns_raises_and_calls() -> None:
    """A stub returns a value, raises an error, or calls a function, which may be async; nothing else is opened."""
    module, opened = Module("m"), list[str]()

    @module.handles(Count)
    async def count(cmd: Count, bus: EventBus) -> int:
        opened.append("handler")
        return 0

    async def double(cmd: Count) -> int:
        return cmd.number * 2

    async with harness(EventBus(module)) as t:
        t.stub(count, returns=5)
        assert await t.send(Count(number=1)) == 5
        t.stub(count, calls=lambda cmd: cmd.number + 1)
        assert await t.send(Count(number=1)) == 2
        t.stub("m.count", calls=double)
        assert await t.send(Count(number=4)) == 8
        t.stub(count, raises=KeyError("no"))
        with pytest.raises(KeyError):
            await t.send(Count())
        with pytest.raises(ValueError, match="no handler"):
            t.stub("m.cuont")
    assert opened == []


class Count(Command[int], name="r.count"):
    """Ask for a number."""

    number: int = 0


async def test_middleware_is_around_a_stub() -> None:
    """What is around the handler is around its stub."""
    seen = list[str]()

    async def around(ctx: Any, call_next: Any) -> Any:
        seen.append(ctx.handler)
        return await call_next(ctx)

    module = Module("m", middleware=[around])

    @module.handles(Count)
    async def count(cmd: Count) -> int:
        return 0

    async with harness(EventBus(module)) as t:
        t.stub(count, returns=1)
        await t.send(Count())
    assert seen == ["m.count"]


async def test_override_of_a_handler() -> None:
    """A handler is replaced by another with parameters of its own, under the same name, and comes back."""
    module = Module("m")

    @module.handles(Count)
    async def count(cmd: Count) -> int:
        return 1

    async def fake(cmd: Count, bus: EventBus) -> int:
        await bus.publish(Placed(number=cmd.number))
        return 2

    bus = EventBus(module)
    async with harness(bus, overrides={count: fake}) as t:
        assert await t.send(Count(number=9)) == 2
        assert t.published(Placed, number=9)
        assert t.handled("m.count") == [Count(number=9)]
        assert t.handled(fake) == [Count(number=9)]
    assert await bus.send(Count()) == 1
