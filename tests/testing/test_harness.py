"""The harness: the application's own bus in a test, where nothing leaves, time stands still and settling is exact."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib import import_module
from typing import Annotated, Any

import anyio
import pytest
from anyio.lowlevel import checkpoint
from fastapi import BackgroundTasks, Depends, FastAPI, Request

from eventbus import (
    Command,
    Context,
    Event,
    EventBus,
    Module,
    NotRunningError,
    Reject,
    Retry,
    Transaction,
    WiringError,
)
from eventbus.fastapi import BusDep, install
from eventbus.stores.memory import MemoryStore
from eventbus.testing import NotSettledError, UnobservedError, harness
from tests.doubles import Flaky, raised

MODULE = import_module("eventbus.testing.settling")
MEMORY = {"h.*": "memory"}


class Placed(Event, name="h.placed"):
    """State that something was placed."""

    number: int = 0
    sku: str = "a"


class Shipped(Event, name="h.shipped"):
    """State that something was shipped."""

    number: int = 0


class Place(Command[int], name="h.place"):
    """Ask to place something."""

    number: int = 0


class Later(Command[None], name="h.later"):
    """Ask for something later."""

    number: int = 0


# settling


async def test_settled_follows_every_chain_to_its_end() -> None:
    """However long a chain of messages through queues is, settled returns at its end, and no time has passed."""
    module = Module("m")

    @module.on(Placed)
    async def placed(event: Placed, bus: EventBus) -> None:
        if event.number < 30:
            await checkpoint()
            await bus.publish(Placed(number=event.number + 1))
            await bus.enqueue(Later(number=event.number))

    @module.handles(Later)
    async def later(cmd: Later) -> None:
        for _ in range(cmd.number):
            await checkpoint()

    async with harness(EventBus(module, routes=MEMORY)) as t:
        await t.publish(Placed())
        await t.settled()
        assert list(range(31)) == [event.number for event in t.handled("m.placed")]
        assert list(range(30)) == sorted(cmd.number for cmd in t.handled("m.later"))
        assert t.clock.monotonic() == 0


async def test_settled_waits_for_real_work() -> None:
    """A handler that takes real time, in the loop or in a thread, is waited for."""
    module = Module("m")

    @module.on(Placed)
    async def slow(event: Placed) -> None:
        await anyio.sleep(0.03)

    @module.on(Placed)
    def threaded(event: Placed, bus: EventBus) -> None:
        anyio.from_thread.run(bus.publish, Shipped())

    @module.on(Shipped)
    async def shipped(event: Shipped) -> None: ...

    async with harness(EventBus(module, routes=MEMORY)) as t:
        for _ in range(3):
            await t.publish(Placed())
            await t.settled()
        assert [3, 3, 3] == [len(t.handled(f"m.{name}")) for name in ("slow", "threaded", "shipped")]


@pytest.mark.parametrize("store", [False, True])
async def test_settled_has_set_every_timer(store: bool) -> None:
    """When settled returns, the next attempt of what failed is known, whatever the number of turns it took."""
    module = Module("m")

    @module.on(Placed, ordered=True, concurrency=1, retry=Retry(attempts=2, initial=7, jitter=False))
    async def fails_last(event: Placed) -> None:
        for _ in range(event.number):
            await checkpoint()
        if event.sku == "last":
            times.append(t.clock.monotonic())
            raise ValueError

    times = list[float]()
    for count in range(12):
        routes = {"h.*": "store" if store else "memory"}
        bus = EventBus(module, routes=routes, name="shop", store=MemoryStore() if store else None)
        async with harness(bus) as t:
            for number in range(count):
                await t.publish(Placed(number=number))
            await t.publish(Placed(sku="last"))
            await t.advance(20)
            assert len(t.dead) == 1
    assert [0, 7] * 12 == times


async def test_settled_of_an_idle_bus() -> None:
    """A bus without routes, handlers or anything is settled."""
    async with harness(EventBus()) as t:
        await t.settled()
        await t.advance(1e9)


async def test_what_does_not_end_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A handler that hangs is reported by name when patience ends; the harness ends all the same."""
    monkeypatch.setattr(MODULE, "PATIENCE", 0.05)
    module, cut = Module("m"), list[int]()

    @module.on(Placed, concurrency=2)
    async def hangs(event: Placed) -> None:
        try:
            await anyio.sleep_forever()
        finally:
            cut.append(event.number)

    with anyio.fail_after(20), raised(NotSettledError) as caught:
        async with harness(EventBus(module, routes=MEMORY)) as t:
            for number in range(3):
                await t.publish(Placed(number=number))
            await t.settled()
    assert str(caught[0]) == "after 0.05 s still going on: 2 x h.placed@bus/m.hangs"
    assert [0, 1] == sorted(cut)


async def test_what_waits_for_its_timeout_is_told_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hanging handler with a timeout is not settled; the message says that only advance() ends it."""
    monkeypatch.setattr(MODULE, "PATIENCE", 0.05)
    module = Module("m")

    @module.on(Placed, timeout=5)
    async def hangs(event: Placed) -> None:
        await anyio.sleep_forever()

    with anyio.fail_after(20), pytest.raises(NotSettledError, match=r"a timeout= runs out in advance\(\) only"):
        async with harness(EventBus(module, routes=MEMORY)) as t:
            await t.publish(Placed())
            await t.settled()


async def test_failing_test_with_a_hanging_handler_ends() -> None:
    """When the test fails, what still runs is cut, and the test's own error is what comes out."""
    module = Module("m")

    @module.on(Placed)
    async def hangs(event: Placed) -> None:
        await anyio.sleep_forever()

    with anyio.fail_after(20), raised(KeyError):
        async with harness(EventBus(module, routes=MEMORY)) as t:
            await t.publish(Placed())
            raise KeyError


# time


async def test_advance_visits_every_due_time_in_order() -> None:
    """Retries and delays of several handlers happen each at its time, and in the order of the times."""
    module, seen = Module("m"), list[tuple[float, str]]()

    def note(name: str) -> None:
        seen.append((t.clock.monotonic(), name))

    @module.on(Placed, retry=Retry(attempts=3, initial=1, jitter=False))
    async def fails(event: Placed, bus: EventBus) -> None:
        note("fails")
        await bus.publish(Shipped(), delay=0.5)
        raise ValueError

    @module.on(Placed, retry=Retry(attempts=2, initial=2.25, jitter=False))
    async def fails_too(event: Placed) -> None:
        note("fails too")
        raise ValueError

    @module.on(Shipped)
    async def shipped(event: Shipped) -> None:
        note("shipped")

    async with harness(EventBus(module, routes=MEMORY)) as t:
        await t.publish(Placed())
        await t.advance(10)
        assert t.clock.monotonic() == 10
        assert len(t.dead) == 2
    assert sorted(seen[:2]) == [(0.0, "fails"), (0.0, "fails too")]
    rest = [(0.5, "shipped"), (1.0, "fails"), (1.5, "shipped"), (2.25, "fails too"), (3.0, "fails"), (3.5, "shipped")]
    assert rest == seen[2:]


async def test_advance_in_steps_is_advance_at_once() -> None:
    """Fractions that add up to a due time reach it, whatever the sums round to."""
    module, seen = Module("m"), list[float]()

    @module.on(Placed, retry=Retry(attempts=5, initial=0.1, jitter=False))
    async def fails(event: Placed) -> None:
        seen.append(t.clock.monotonic())
        raise ValueError

    for steps in ([0.7], [0.1] * 7, [0.3, 0.4], [0.35, 0.35]):
        seen.clear()
        async with harness(EventBus(module, routes=MEMORY)) as t:
            await t.publish(Placed())
            for step in steps:
                await t.advance(step)
            assert [0, 0.1, 0.3, 0.7] == pytest.approx(seen, abs=1e-5)
            await t.advance(10)
            assert t.dead


async def test_advance_by_nothing_settles() -> None:
    """Advancing by zero is settling."""
    module = Module("m")

    @module.on(Placed)
    async def placed(event: Placed) -> None: ...

    async with harness(EventBus(module, routes=MEMORY)) as t:
        await t.publish(Placed())
        await t.advance(0)
        assert t.handled("m.placed")


@pytest.mark.parametrize("seconds", [-1, float("nan"), float("inf")])
async def test_time_does_not_go_back(seconds: float) -> None:
    """Advancing by less than nothing, or for ever, is refused."""
    async with harness(EventBus()) as t:
        with pytest.raises(ValueError, match=r"advance\(\)"):
            await t.advance(seconds)


@pytest.mark.parametrize("own", [True, False])
async def test_store_lives_in_virtual_time(own: bool) -> None:
    """Retries and delays in a store come when the test says so, on the bus's store or one of the test's."""
    module, seen = Module("m"), list[tuple[int, float]]()

    @module.on(Placed, retry=Retry(attempts=3, initial=60, maximum=1000, jitter=False))
    async def fails(event: Placed, ctx: Context) -> None:
        seen.append((ctx.attempt, t.clock.monotonic()))
        raise ValueError

    bus = EventBus(module, routes={"h.*": "store"}, name="shop", store=MemoryStore())
    async with harness(bus, store=None if own else MemoryStore()) as t:
        await t.publish(Placed(), delay=3600)
        await t.settled()
        assert [] == seen
        await t.advance(4000)
        assert [(1, 3600), (2, 3660), (3, 3780)] == seen
        assert len(t.dead) == 1


# what was seen


async def test_what_was_published_sent_and_handled() -> None:
    """The test can ask for events and commands by type and fields, and for what a handler took."""
    module = Module("m")

    @module.handles(Place)
    async def place(cmd: Place, bus: EventBus) -> int:
        await bus.publish(Placed(number=cmd.number, sku="b"))
        return cmd.number

    @module.on(Placed)
    async def placed(event: Placed) -> None:
        if event.number == 2:
            raise Reject

    async with harness(EventBus(module, routes=MEMORY)) as t:
        assert [1, 2] == [await t.send(Place(number=number)) for number in (1, 2)]
        await t.enqueue(Place(number=3))
        await t.settled()
        assert [1, 2, 3] == [event.number for event in t.published(Placed)]
        assert [Placed(number=2, sku="b")] == t.published(Placed, number=2, sku="b")
        assert [] == t.published(Placed, number=2, sku="c")
        assert [] == t.published(Placed, colour="red")
        assert [] == t.published(Shipped)
        assert [1, 2, 3] == [cmd.number for cmd in t.sent(Place)]
        assert [Place(number=3)] == t.sent(Place, number=3)
        assert [1, 3] == [event.number for event in t.handled("m.placed")]
        assert [] == t.handled("m.nobody")
        failed = [(one.handler, type(one.error)) for one in t.handlings if one.error is not None]
        assert [("m.placed", Reject)] == failed
        assert len(t.dead) == 1


async def test_messages_make_the_journey_as_bytes() -> None:
    """What a queued handler gets is equal to what was published, and not the same object."""
    module, seen = Module("m"), list[Placed]()

    @module.on(Placed)
    async def placed(event: Placed) -> None:
        seen.append(event)

    async with harness(EventBus(module, routes=MEMORY)) as t:
        sent = Placed(number=1)
        await t.publish(sent)
        await t.settled()
        assert [sent] == seen
        assert seen[0] is not sent


async def test_rolled_back_events_were_not_published() -> None:
    """What was published in a transaction that failed is not among the events."""
    async with harness(EventBus(Module("m", messages=[Placed]), name="shop", store=MemoryStore())) as t:
        with pytest.raises(KeyError):
            async with t.bus.transaction():
                await t.publish(Placed(number=1))
                raise KeyError
        async with t.bus.transaction():
            await t.publish(Placed(number=2))
            assert [] == t.published(Placed)
        assert [2] == [event.number for event in t.published(Placed)]


# the dead


def dying() -> Module:
    """Return a module whose handler rejects everything."""
    module = Module("m")

    @module.on(Placed)
    async def dies(event: Placed) -> None:
        raise Reject(f"not {event.number}")

    return module


async def test_death_that_nobody_looked_at_fails_the_test() -> None:
    """A message that died unseen fails the test, with its name, handler and reason, also if it died at the very end."""
    with raised(UnobservedError) as caught:
        async with harness(EventBus(dying(), routes=MEMORY)) as t:
            await t.publish(Placed(number=7))
    assert str(caught[0]).splitlines()[:-1] == [
        "1 message(s) died unobserved:",
        "  h.placed in bus/m.dies: Reject: not 7",
        "what caused what:",
        "  h.placed Placed(number=7, sku='a')",
        "    m.dies, attempt 1 at 0 s: Reject: not 7",
    ]


async def test_looking_at_the_dead_is_observing_them() -> None:
    """Deaths that the test has looked at are its business; one after the look is not."""
    async with harness(EventBus(dying(), routes=MEMORY)) as t:
        await t.publish(Placed(number=1))
        await t.settled()
        assert len(t.dead) == 1
    with pytest.raises(UnobservedError, match=r"1 message\(s\).*\n.*not 2"):
        async with harness(EventBus(dying(), routes=MEMORY)) as t:
            await t.publish(Placed(number=1))
            await t.settled()
            assert len(t.dead) == 1
            await t.publish(Placed(number=2))


async def test_death_behind_a_broker_is_noticed_too() -> None:
    """Where the application has a broker and no store, what dies there fails the test as well."""
    bus = EventBus(dying(), name="shop", transports={"events": Flaky()}, routes={"h.*": "events"})
    with pytest.raises(UnobservedError, match=r"h\.placed in shop/m\.dies"):
        async with harness(bus) as t:
            await t.publish(Placed())


async def test_error_of_the_test_comes_before_the_dead() -> None:
    """A test that fails by itself fails for its own reason."""
    with raised(KeyError):
        async with harness(EventBus(dying(), routes=MEMORY)) as t:
            await t.publish(Placed())
            await t.settled()
            raise KeyError


# the bus


def module_level() -> EventBus:
    """Return a bus as applications have at module level."""
    module = Module("m")

    @module.on(Placed)
    async def placed(event: Placed) -> None:
        if event.number == 13:
            raise Reject

    return EventBus(
        module, name="shop", transports={"events": Flaky()}, routes={Placed: ["events"]}, store=MemoryStore()
    )


def test_one_bus_in_test_after_test() -> None:
    """A bus at module level is used by test after test, on either event loop, and no test sees the one before."""
    bus = module_level()
    before = (bus.wiring, bus.engine)

    async def one(number: int) -> None:
        async with harness(bus, store=MemoryStore()) as t:
            await t.settled()
            assert ([], [], []) == (t.events, t.handlings, t.dead)
            await t.publish(Placed(number=number))
            await t.settled()
            assert [number] == [event.number for event in t.published(Placed)]
            assert bool(t.dead) is (number == 13)

    for number, backend in ((1, "asyncio"), (13, "trio"), (2, "asyncio"), (3, "trio")):
        anyio.run(one, number, backend=backend)
        assert before == (bus.wiring, bus.engine)
    assert bus.wiring.transports["events"].calls["open"] == 0  # type: ignore[attr-defined]


async def test_everything_is_put_back_after_a_failure() -> None:
    """Whatever ends the harness, the bus and its overrides are as they were, and the store has its own time again."""
    bus, bound = module_level(), list[Any]()

    class Noting(MemoryStore):
        def bind(self, clock: Any) -> None:
            bound.append(clock)
            super().bind(clock)

    before, overrides = (bus.wiring, bus.engine), dict(bus.overrides)
    with raised(KeyError):
        async with harness(bus, store=Noting(), overrides={checkpoint: turns}):
            assert bus.overrides
            raise KeyError
    assert before == (bus.wiring, bus.engine)
    assert overrides == bus.overrides
    assert bound[0] is not None
    assert bound[-1] is None


async def turns() -> None:
    """Be a replacement."""


async def test_misuse_is_told() -> None:
    """An unknown mode, a bus that runs, one harness in another, and a client without application are refused."""
    bus = module_level()
    with pytest.raises(ValueError, match=r"inline.*queued"):
        async with harness(bus, mode="fast"):  # type: ignore[arg-type]
            pass
    async with harness(bus) as t:
        with pytest.raises(RuntimeError, match=r"harness\(bus, app=app\)"):
            _ = t.client
        with pytest.raises(RuntimeError, match="runs already"):
            async with harness(bus):
                pass
        await t.publish(Placed())
        await t.settled()
    async with bus.running():
        with pytest.raises(RuntimeError, match="runs already"):
            async with harness(bus):
                pass
    with pytest.raises(NotRunningError):
        await t.publish(Placed())
    with pytest.raises(NotRunningError):
        await t.settled()


async def test_faulty_wiring_is_told() -> None:
    """The wiring is compiled as at start-up, with every fault."""
    bus = EventBus(Module("m", messages=[Placed]), routes={Placed: "nowhere"})
    with raised(WiringError):
        async with harness(bus):
            pass
    assert bus.wiring.store is None


async def test_bus_that_needs_a_store_and_has_none_gets_one() -> None:
    """Transactions and store routes can be tried before there is a database; a bus without need gets nothing."""
    module = Module("m")

    @module.handles(Place)
    async def place(cmd: Place, tx: Transaction, bus: EventBus) -> int:  # type: ignore[type-arg]
        await bus.publish(Placed(number=cmd.number))
        return cmd.number

    @module.on(Placed)
    async def placed(event: Placed) -> None: ...

    bus = EventBus(module, name="shop", routes={Placed: "store"})
    async with harness(bus) as t:
        assert await t.send(Place(number=3)) == 3
        await t.settled()
        assert [3] == [event.number for event in t.handled("m.placed")]
    assert bus.wiring.store is None
    async with harness(EventBus(Module("n", messages=[Placed]))) as t:
        assert t.bus.wiring.store is None


# overrides


def real_price() -> int:
    """Be the dependency."""
    raise AssertionError


async def test_overrides_for_handlers() -> None:
    """A dependency is replaced for all handlers while the test lasts, inline and queued."""
    module, seen = Module("m"), list[int]()

    @module.on(Placed, Shipped)
    async def priced(event: Placed | Shipped, price: Annotated[int, Depends(real_price)]) -> None:
        seen.append(price)

    bus = EventBus(module, routes={Placed: "memory"})
    async with harness(bus, overrides={real_price: lambda: 5}) as t:
        await t.publish(Placed())
        await t.publish(Shipped())
        await t.settled()
    async with harness(bus, overrides={real_price: lambda: 6}) as t:
        await t.publish(Shipped())
    assert [5, 5, 6] == seen
    assert {} == dict(bus.overrides)
    with pytest.raises(ExceptionGroup):
        await bus.publish(Shipped())


# inline


async def test_inline_mode_handles_everything_at_once() -> None:
    """With mode="inline" routes are looked past: whatever is published is handled, in order, before publish returns."""
    module, seen = Module("m"), list[str]()

    @module.on(Placed)
    async def first(event: Placed, bus: EventBus) -> list[Later]:
        seen.append("first")
        await bus.publish(Shipped(), delay=60)
        return [Later(number=1)]

    @module.on(Placed, inline=True)
    async def second(event: Placed) -> None:
        seen.append("second")

    @module.on(Shipped)
    async def shipped(event: Shipped) -> None:
        seen.append("shipped")

    @module.handles(Later)
    async def later(cmd: Later) -> None:
        seen.append(f"later {cmd.number}")

    @module.handles(Place)
    async def place(cmd: Place) -> int:
        seen.append(f"place {cmd.number}")
        return cmd.number

    async with harness(EventBus(module, routes=MEMORY), mode="inline") as t:
        await t.publish(Placed())
        assert {"first", "second", "shipped", "later 1"} == set(seen)
        receipt = await t.enqueue(Place(number=2))
        assert seen[-1] == "place 2"
        assert receipt.id
        assert await t.send(Place(number=3)) == 3
        await t.settled()
        assert [] == t.dead
        assert len(seen) == 6


async def test_inline_mode_raises_what_handlers_raise() -> None:
    """With mode="inline" failures come out of publish and enqueue, and nobody dies."""
    module = dying()

    @module.handles(Later)
    async def later(cmd: Later) -> None:
        raise KeyError(cmd.number)

    bus = EventBus(module, routes=MEMORY)
    async with harness(bus, mode="inline") as t:
        with pytest.raises(ExceptionGroup) as caught:
            await t.publish(Placed(number=1))
        assert ["in handler m.dies of h.placed"] == caught.value.exceptions[0].__notes__
        with pytest.raises(KeyError):
            await t.enqueue(Later())
    async with harness(bus) as t:
        await t.publish(Placed(number=1))
        await t.settled()
        assert len(t.dead) == 1


async def test_inline_mode_needs_no_transaction_for_what_goes_to_the_store() -> None:
    """With mode="inline" nothing is durable, so nothing asks for a transaction."""
    module = Module("m")

    @module.on(Placed)
    async def placed(event: Placed) -> None: ...

    bus = EventBus(module, name="shop", routes={"h.*": "store"}, store=MemoryStore())
    async with harness(bus, mode="inline") as t:
        await t.bus.publish(Placed())
        assert [Placed()] == t.handled("m.placed")


# applications


class Till:
    """Hold an application with a bus, an endpoint or two, and a lifespan."""

    def __init__(self, *, consume: bool = True, installed: bool = True) -> None:
        self.log: list[str] = []
        module = Module("m")

        @module.handles(Place)
        async def place(cmd: Place, bus: EventBus, price: Annotated[int, Depends(real_price)]) -> int:
            await bus.publish(Placed(number=cmd.number))
            return cmd.number * price

        @module.on(Placed)
        async def placed(event: Placed) -> None:
            self.log.append(f"placed {event.number}")

        self.bus = EventBus(module, routes={Placed: "memory"})

        @asynccontextmanager
        async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, str]]:
            self.log.append("up")
            yield {"colour": "red"}
            self.log.append("down")

        self.app = FastAPI(lifespan=lifespan)
        if installed:
            install(self.app, self.bus, consume=consume)

        @self.app.post("/places")
        async def create(body: Place, bus: BusDep) -> int:
            return await bus.send(body)

        @self.app.post("/later")
        async def in_background(body: Place, bus: BusDep, tasks: BackgroundTasks) -> None:
            tasks.add_task(bus.send, body)

        @self.app.get("/colour")
        async def colour(request: Request, price: Annotated[int, Depends(real_price)]) -> str:
            return f"{request.state.colour} {price}"


@pytest.mark.parametrize("consume", [True, False])
async def test_application_in_the_loop_of_the_test(consume: bool) -> None:
    """Requests, bus and test share one loop; the lifespan runs, and even a web-only process consumes here."""
    till = Till(consume=consume)
    async with harness(till.bus, app=till.app, overrides={real_price: lambda: 3}) as t:
        assert ["up"] == till.log
        answer = await t.client.post("/places", json={"number": 2})
        assert (200, 6) == (answer.status_code, answer.json())
        await t.settled()
        assert ["up", "placed 2"] == till.log
        assert t.published(Placed, number=2)
        assert (await t.client.post("/later", json={"number": 4})).status_code == 200
        await t.settled()
        assert till.log[-1] == "placed 4"
        assert (await t.client.get("/colour")).json() == "red 3"
    assert till.log[-1] == "down"
    assert {} == till.app.dependency_overrides
    assert till.bus.engine.state == "not started"


async def test_application_without_an_installed_bus() -> None:
    """An application that does not have the bus installed gets the overrides too, and the bus runs beside it."""
    till = Till(installed=False)
    async with harness(till.bus, app=till.app, overrides={real_price: lambda: 3}) as t:
        assert (await t.client.get("/colour")).json() == "red 3"
        assert await t.send(Place(number=1)) == 3
        await t.settled()
        assert ["up", "placed 1"] == till.log
        with pytest.raises(NotRunningError):
            await t.client.post("/places", json={"number": 2})


def fixed(price: int) -> Callable[[], int]:
    """Return a dependency that is always the same."""
    return lambda: price


async def test_application_in_test_after_test() -> None:
    """One application and its bus serve several harnesses, one after another."""
    till = Till()
    for number in range(3):
        async with harness(till.bus, app=till.app, overrides={real_price: fixed(number)}) as t:
            assert (await t.client.post("/places", json={"number": 2})).json() == 2 * number
            await t.settled()
            assert len(t.published(Placed)) == 1


async def test_error_of_an_endpoint_reaches_the_test() -> None:
    """An endpoint that fails raises in the test, as the client of a test should."""
    till = Till()
    async with harness(till.bus, app=till.app) as t:
        with pytest.raises(AssertionError):
            await t.client.post("/places", json={"number": 2})


async def test_lifespan_that_fails_says_so() -> None:
    """An error at the start of the application comes out as it is, and everything is put back."""
    bus = module_level()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        raise LookupError("no configuration")
        yield

    before = (bus.wiring, bus.engine)
    with raised(LookupError):
        async with harness(bus, app=FastAPI(lifespan=lifespan)):
            pass
    assert before == (bus.wiring, bus.engine)
