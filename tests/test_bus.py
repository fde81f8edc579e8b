"""The bus itself: its arguments, when it compiles, and how a test swaps its parts."""

import inspect
import traceback
from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import Annotated, Any

import anyio
import pytest
from fastapi import Depends

from eventbus import (
    Command,
    Context,
    Event,
    EventBus,
    Limits,
    MissingExtraError,
    Module,
    NoHandlerError,
    NotRunningError,
    Receipt,
    WiringError,
)
from eventbus.clock import Runtime
from eventbus.middleware import CallNext
from eventbus.routes import Routes
from eventbus.stores.sqlite import SQLiteStore
from eventbus.transports.memory import MemoryTransport


class Double(Command[int], name="math.double"):
    number: int


class Lonely(Command):
    pass


class Doubled(Event, name="math.doubled"):
    number: int


def factor() -> int:
    """Say by how much."""
    return 2


async def double(cmd: Double, factor: Annotated[int, Depends(factor)]) -> int:
    """Be the one handler."""
    return cmd.number * factor


async def middleware(ctx: Context, call_next: CallNext) -> Any:
    """Go on."""
    return await call_next(ctx)


def math() -> Module:
    """Return a module with one handler."""
    module = Module("math", messages=[Doubled])
    module.handles(Double)(double)
    return module


BAD: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "no module": (lambda: EventBus("math"), TypeError, "EventBus(...) takes modules first, not 'math'"),
    "a list of modules": (lambda: EventBus([Module("a")]), TypeError, "takes modules first, not [Module("),
    "number as name": (lambda: EventBus(name=5), ValueError, "a bus name is printable text"),
    "empty name": (lambda: EventBus(name=""), ValueError, "a bus name is printable text"),
    "blanks around name": (lambda: EventBus(name=" a"), ValueError, "a bus name is printable text"),
    "slash in name": (lambda: EventBus(name="a/b"), ValueError, "without / > @ * and blanks at its ends, not 'a/b'"),
    "arrow in name": (lambda: EventBus(name="a>b"), ValueError, "without / > @ *"),
    "at in name": (lambda: EventBus(name="a@b"), ValueError, "without / > @ *"),
    "star in name": (lambda: EventBus(name="a*"), ValueError, "without / > @ *"),
    "control in name": (lambda: EventBus(name="a\nb"), ValueError, "a bus name is printable text"),
    "unknown store": (lambda: EventBus(store="oracle://x"), ValueError, "no store for oracle://: known are"),
    "path as store": (lambda: EventBus(store="shop.db"), ValueError, "no store for a text without scheme://"),
    "an engine as store": (lambda: EventBus(store=object()), TypeError, "store= takes a URL or a Store, not <object"),
    "class as store": (lambda: EventBus(store=5), TypeError, "store= takes a URL or a Store, not 5"),
    "inline as transport": (
        lambda: EventBus(transports={"inline": MemoryTransport()}), ValueError, "transports: 'inline' is built in",
    ),
    "memory as transport": (lambda: EventBus(transports={"memory": "memory://"}), ValueError, "'memory' is built in"),
    "store as transport": (lambda: EventBus(transports={"store": "x://"}), ValueError, "call yours another name"),
    "empty transport name": (lambda: EventBus(transports={"": "memory://"}), ValueError, "a name is printable"),
    "number as transport name": (lambda: EventBus(transports={5: "x"}), ValueError, "transports: a name is printable"),
    "unknown transport": (lambda: EventBus(transports={"a": "ftp://x"}), ValueError, "no transport for ftp://: known"),
    "nearly a store": (lambda: EventBus(store="postgres://h/d"), ValueError, "did you mean postgresql://? Known are"),
    "nearly a transport": (lambda: EventBus(transports={"a": "amq://h"}), ValueError, "did you mean amqp://? Known"),
    "number as transport": (lambda: EventBus(transports={"a": 5}), TypeError, "'a' takes a URL or a Transport, not 5"),
    "one middleware": (lambda: EventBus(middleware=middleware), TypeError, "EventBus: middleware= takes a list"),
    "no middleware": (lambda: EventBus(middleware=[5]), TypeError, "a function of ctx and call_next, not 5"),
    "numbers as limits": (lambda: EventBus(limits={"lease": 5}), TypeError, "limits= takes a Limits, not {'lease': 5}"),
    "misspelt": (lambda: EventBus(transport={}), TypeError, "unexpected keyword argument 'transport'"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_argument(case: str) -> None:
    """An argument that can never work is refused when the bus is made."""
    make, kind, sentence = BAD[case]
    with pytest.raises(kind) as caught:
        make()
    assert sentence in str(caught.value)


def test_everything_is_optional() -> None:
    """A bus needs no argument at all."""
    bus = EventBus()
    bus.compile()
    assert (None, Limits()) == (bus.name, bus.limits)
    assert "EventBus(name=None, modules=[])" == repr(bus)


def test_arguments_arrive() -> None:
    """What the bus was given stands in its wiring, URLs as what they name."""
    limits, transport = Limits(lease=5), MemoryTransport()
    bus = EventBus(
        Module("a"), Module("b"), name="shop", store="sqlite:///shop.db", middleware=[middleware], limits=limits,
        transports={"events": transport, "others": "memory://?queue=5"},
    )  # fmt: skip
    wiring = bus.wiring
    assert ["a", "b"] == [module.name for module in wiring.modules]
    assert isinstance(wiring.store, SQLiteStore)
    assert ["events", "others", "memory"] == list(wiring.transports)
    assert transport is wiring.transports["events"]
    assert isinstance(wiring.transports["others"], MemoryTransport)
    assert (("shop", limits), (middleware,)) == ((bus.name, bus.limits), wiring.middleware)
    assert "EventBus(name='shop', modules=['a', 'b'])" == repr(bus)


def test_store_object() -> None:
    """A store may be given as itself."""
    store = SQLiteStore("shop.db")
    assert store is EventBus(store=store).wiring.store


def test_routes_are_copied() -> None:
    """Changing the mapping of routes afterwards changes nothing."""
    routes: dict[Any, str] = {}
    bus = EventBus(math(), routes=routes)
    routes[Double] = "memory"
    assert ("inline",) == bus.explain(Double).messages[0].route


def test_nothing_is_checked_before_compile() -> None:
    """A wiring may be made in any order: its faults come with compile, and again as long as they are there."""
    module = Module("math", messages=[Lonely])
    bus = EventBus(module)
    for _ in range(2):
        with pytest.raises(WiringError, match="command Lonely has no handler"):
            bus.compile()
    with pytest.raises(WiringError):
        bus.explain()
    with pytest.raises(WiringError):
        anyio.run(bus.send, Lonely())

    @module.handles(Lonely)
    async def comfort(cmd: Lonely) -> None: ...

    bus.compile()


def test_compile_once() -> None:
    """Compiling again keeps what is compiled, so that everybody shares one engine."""
    bus = EventBus(math())
    bus.compile()
    engine = bus.engine
    bus.compile()
    assert engine is bus.engine


async def test_first_use_compiles() -> None:
    """Inline sends and publishes need neither compile() nor a running bus."""
    assert 42 == await EventBus(math()).send(Double(number=21))
    assert isinstance(await EventBus(math()).publish(Doubled(number=1)), Receipt)
    assert 2 == len(await EventBus(math()).publish_many([Doubled(number=1), Doubled(number=2)]))


async def test_starting_compiles() -> None:
    """A wiring with faults does not start."""
    bus = EventBus(Module("math", messages=[Lonely]))
    with pytest.raises(WiringError):
        async with bus.running():
            raise AssertionError("it started")


async def test_running_gives_the_bus() -> None:
    """The lifetime gives the bus itself, which is running inside and not outside."""
    bus = EventBus(math())
    async with bus.running() as running:
        assert (bus, True) == (running, bus.health().healthy)
    assert False is bus.health().healthy


NOT_RUNNING: dict[str, tuple[str, Callable[[EventBus], Any]]] = {
    "routed publish": ("publishing 'math.doubled', which has a route,", lambda bus: bus.publish(Doubled(number=1))),
    "routed publish_many": ("publishing 'math.doubled'", lambda bus: bus.publish_many([Doubled(number=1)])),
    "enqueue": ("publishing 'math.double', which has a route,", lambda bus: bus.enqueue(Double(number=1))),
    "dead": ("bus.dead", lambda bus: bus.dead.find()),
}


@pytest.mark.parametrize("case", NOT_RUNNING)
async def test_not_running(case: str) -> None:
    """What needs a running bus says so before it runs, and after."""
    operation, act = NOT_RUNNING[case]
    bus = EventBus(math(), routes={"math.*": "memory"})
    for state in ("not started", "stopped"):
        with pytest.raises(NotRunningError) as caught:
            await act(bus)
        assert (True, state) == (caught.value.operation.startswith(operation), caught.value.state)
        async with bus.running():
            pass


@pytest.mark.parametrize("name", ["transaction", "stream"])
async def test_not_running_contexts(name: str) -> None:
    """Transactions and streams need a running bus."""
    bus = EventBus(math())
    with pytest.raises(NotRunningError) as caught:
        async with bus.transaction() if name == "transaction" else bus.stream(Doubled):
            raise AssertionError("it opened")
    assert f"bus.{name}()" == caught.value.operation


async def test_wrong_kind() -> None:
    """Events are not sent, commands are not published, and the error names the right verb."""
    bus: Any = EventBus(math())
    cases = {
        "send() takes a command; Doubled is an event: publish() it": lambda: bus.send(Doubled(number=1)),
        "publish() takes an event; Double is a command: send() or enqueue() it": lambda: bus.publish(Double(number=1)),
        "enqueue() takes a command; Doubled is an event: publish() it": lambda: bus.enqueue(Doubled(number=1)),
        "int is neither a pydantic model nor a dataclass": lambda: bus.publish(5),
    }
    for sentence, act in cases.items():
        with pytest.raises(TypeError) as caught:
            await act()
        assert str(caught.value).startswith(sentence)


async def test_no_handler() -> None:
    """A command that nobody handles here is one error, which says how to change that."""
    with pytest.raises(NoHandlerError, match="no handler for command 'Lonely' in this process") as caught:
        await EventBus(math()).send(Lonely())
    assert "KeyError" not in "".join(traceback.format_exception(caught.value))


async def test_enqueue_without_route() -> None:
    """A command without a route cannot wait anywhere."""
    with pytest.raises(ValueError, match="the command has no route, so nothing would keep it for later"):
        await EventBus(math()).enqueue(Double(number=1))


def test_verbs_are_coroutine_functions() -> None:
    """Frameworks that look, as background tasks do, see what must be awaited."""
    for name in ("send", "publish", "publish_many", "enqueue"):
        assert inspect.iscoroutinefunction(getattr(EventBus, name))
        assert inspect.iscoroutinefunction(getattr(EventBus(), name))


# The test kit's doors.


async def test_rewired() -> None:
    """Everybody who holds the bus sees other parts for a while, and then those of before."""
    bus = EventBus(math(), name="shop", routes={"math.*": "store"}, store="sqlite:///shop.db")
    bus.compile()
    engine, wiring = bus.engine, bus.wiring
    runtime = Runtime(ids=lambda: "7", random=Random(1))
    with bus.rewired(runtime, store=None, routes=Routes({})):
        assert (None, ("inline",)) == (bus.wiring.store, bus.explain(Double).messages[0].route)
        assert runtime is bus.engine.runtime
        assert "7" == (await bus.publish(Doubled(number=1))).id
        assert 42 == await bus.send(Double(number=21))
    assert (engine, wiring) == (bus.engine, bus.wiring)


def test_rewired_ends_with_an_error() -> None:
    """The parts of before come back whatever happens."""
    bus = EventBus(math())
    engine = bus.engine
    with pytest.raises(ZeroDivisionError), bus.rewired(Runtime(), store=None):
        assert engine is not bus.engine
        _ = 1 / 0
    assert engine is bus.engine


def test_rewired_within() -> None:
    """Parts may be swapped within a swap."""
    bus = EventBus(math())
    first, second = Runtime(), Runtime()
    with bus.rewired(first):
        with bus.rewired(second):
            assert second is bus.engine.runtime
        assert first is bus.engine.runtime


def test_rewired_compiles_anew() -> None:
    """Parts that do not fit the wiring are faults, and those of before are still good."""
    bus = EventBus(math())
    bus.compile()
    with bus.rewired(Runtime(), routes=Routes({"math.nothing": "memory"})), pytest.raises(WiringError):
        bus.compile()
    bus.compile()


async def test_overrides() -> None:
    """A replacement of a dependency is found at every handling, also if it comes after compiling."""
    bus = EventBus(math())
    assert 2 == await bus.send(Double(number=1))
    bus.overrides[factor] = lambda: 5
    assert 5 == await bus.send(Double(number=1))
    del bus.overrides[factor]
    assert 2 == await bus.send(Double(number=1))


async def test_share_overrides() -> None:
    """A shared mapping is looked up by reference, before and after compiling."""
    bus, shared = EventBus(math()), dict[Any, Any]()
    bus.compile()
    bus.share_overrides(shared)
    assert shared is bus.overrides
    shared[factor] = lambda: 3
    assert 3 == await bus.send(Double(number=1))


async def test_share_overrides_too_late() -> None:
    """While the bus runs its engine cannot be replaced."""
    bus = EventBus(math())
    async with bus.running():
        with pytest.raises(WiringError, match="call install"):
            bus.share_overrides({})
    bus.share_overrides({})


def test_wiring_is_frozen() -> None:
    """What a bus was given cannot be changed behind its back."""
    wiring = EventBus(math()).wiring
    with pytest.raises(AttributeError):
        wiring.name = "other"  # type: ignore[misc]  # that is the point
    assert "other" == replace(wiring, name="other").name


def test_missing_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """A transport whose library is missing is refused with the line that installs it."""

    def missing(url: str, limits: Limits) -> Any:
        raise MissingExtraError("eventbus.transports.redis", "redis")

    monkeypatch.setattr("eventbus.transport.connect", missing)
    with pytest.raises(MissingExtraError, match=r"pip install 'eventbus\[redis\]'"):
        EventBus(transports={"events": "redis://localhost"})
