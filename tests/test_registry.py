"""The wiring as a whole: every fault in one error, and who gets what once there is none."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Generic, Protocol, TypeVar

import pytest
from fastapi import Depends, Header, Request
from pydantic import BaseModel, ConfigDict, computed_field

from eventbus import Command, Event, EventBus, Limits, Module, Transaction, UnknownMessageError, WiringError, message
from eventbus.registry import Registry, Subject
from eventbus.stores.sqlite import SQLiteSession
from eventbus.transport import Transport
from eventbus.transports.memory import MemoryTransport

T = TypeVar("T")
Register = Callable[[Module], object]


class Row:
    """Be nothing that pydantic knows."""


class Session:
    """Be no store's session."""


class Executes(Protocol):
    async def execute(self, sql: str) -> object: ...


class Place(Command[int], name="shop.place"):
    sku: str = ""


class Remind(Command, name="shop.remind"):
    pass


class Fact(Event, name="shop.fact"):
    pass


class Placed(Fact, name="shop.placed", key="order"):
    order: int = 0


class Paid(Event, name="shop.paid"):
    pass


class Secret(Event, name="shop.secret"):
    model_config = ConfigDict(arbitrary_types_allowed=True)
    row: Row


@dataclass
class Plain:
    pass


def broker(**capabilities: Any) -> Transport:
    """Return what the wiring takes for a broker."""
    transport = MemoryTransport()
    transport.capabilities = replace(transport.capabilities, **capabilities)
    return transport


def compiled(*modules: Module, **arguments: Any) -> Registry:
    """Return the frozen registry of a bus."""
    return EventBus(*modules, **arguments).engine.registry


def faults(*modules: Module, **arguments: Any) -> tuple[str, ...]:
    """Return what is wrong with a wiring."""
    try:
        compiled(*modules, **arguments)
    except WiringError as error:
        return error.faults
    return ()


def handlers(subject: Subject) -> tuple[list[str], list[str]]:
    """Return the names of the inline and of the routed handlers."""
    return [one.handler.name for one in subject.inline], [one.handler.name for one in subject.routed]


async def take(message: Any) -> Any:
    """Be a handler of anything."""


async def take_transaction(event: Event, tx: Transaction) -> None:  # type: ignore[type-arg]  # any session
    """Want a transaction."""


async def take_sqlite(event: Event, tx: Transaction[SQLiteSession]) -> None:
    """Want a transaction of the right store."""


async def take_session(event: Event, tx: Transaction[Session]) -> None:
    """Want a transaction of another store."""


async def take_either(event: Event, tx: Transaction[SQLiteSession | Session]) -> None:
    """Want a transaction of one of two stores."""


async def take_protocol(event: Event, tx: Transaction[Executes]) -> None:
    """Want a transaction of a store that can do something."""


def take_plainly(message: Any) -> None:
    """Be a plain function."""


def module(*registered: tuple[type, Any] | tuple[type, Any, dict[str, Any]], name: str = "shop", **rest: Any) -> Module:
    """Return a module with handlers, each named after its message unless it says another name."""
    made = Module(name, **rest)
    for type_, func, *options in registered:
        given = {"name": type_.__name__.lower(), **(options[0] if options else {})}
        (made.handles if issubclass(type_, Command) else made.on)(type_, **given)(func)
    return made


# One fault at a time.


def test_missing_command_handler() -> None:
    """A command that somebody speaks and nobody handles is a fault, also on routes that stay at home."""
    expected = "command Place has no handler: decorate one with @module.handles(Place), or route it to a broker"
    speaking = Module("shop", messages=[Place])
    assert (expected,) == faults(speaking)
    assert (expected,) == faults(speaking, routes={Place: "memory"})
    assert (expected,) == faults(speaking, routes={Place: "store"}, store="sqlite:///shop.db", name="shop")
    assert (expected,) == faults(speaking, routes={Place: ["memory", "store"]}, store="sqlite:///shop.db", name="shop")


def test_command_handled_elsewhere() -> None:
    """A command routed to a broker may be handled by another service."""
    assert faults(routes={Place: "events"}, transports={"events": broker()}, name="shop") == ()


def test_duplicate_command_handler() -> None:
    """A second handler of a command is a fault that names both and where they are."""
    (fault,) = faults(module((Place, take)), module((Place, take), name="again"))
    head, _, places = fault.partition(": ")
    assert "command Place has 2 handlers, and a command has exactly one" == head
    assert ["shop.place", "again.place"] == [place.split(" ")[0] for place in places.split(", ")]
    assert places.count(f"{Path(__file__).name}:{take.__code__.co_firstlineno}") == 2


def test_signature_and_result() -> None:
    """A handler that takes or returns something else is a fault."""

    async def wrong(event: Paid) -> None: ...

    async def answer(cmd: Place) -> str:
        return ""

    first, second = faults(module((Placed, wrong), (Place, answer)))
    assert first.startswith("handler shop.placed: its first parameter is Paid, but it is registered for Placed (")
    assert second.startswith("handler shop.place: it returns str, but Place promises int (")


def test_transaction_without_store() -> None:
    """A Transaction needs a store, wherever in the dependencies it is asked for."""
    expected = "handler shop.paid takes a Transaction, but the bus has no store: EventBus(store='sqlite:///shop.db')"

    def below(tx: Transaction[Any]) -> int:
        return 0

    async def deep(event: Paid, number: Annotated[int, Depends(below)]) -> None: ...

    for func in (take_transaction, take_sqlite, deep):
        assert (expected,) == faults(module((Paid, func)))


def test_transaction_of_another_store() -> None:
    """A Transaction[S] whose S is not the store's session is a fault that names both."""
    expected = "handler shop.paid takes Transaction[Session], but the store's session is SQLiteSession"
    assert (expected,) == faults(module((Paid, take_session)), store="sqlite:///shop.db")
    for func in (take_transaction, take_sqlite, take_either, take_protocol):
        assert faults(module((Paid, func)), store="sqlite:///shop.db") == ()


def test_unresolvable_dependency() -> None:
    """A parameter that nobody fills is a fault."""

    async def asking(event: Paid, colour: str) -> None: ...

    (fault,) = faults(module((Paid, asking)))
    assert fault.startswith("handler shop.paid: parameter 'colour' is not one that the bus can fill")


def test_dependency_on_a_request() -> None:
    """A dependency that needs an HTTP request, however deep, is a fault that says what to do."""

    def reader(request: Request, language: Annotated[str, Header()]) -> str:
        return ""

    async def asking(event: Paid, name: Annotated[str, Depends(reader)]) -> None: ...

    found = faults(module((Paid, asking)))
    assert 2 == len(found)
    for fault in found:
        assert fault.startswith("handler shop.paid: dependency reader: parameter")
        assert fault.endswith("pass the value in the message, or override the dependency")


def test_equal_wire_names() -> None:
    """Two classes of one name on the wire are a fault that names both by their paths."""

    class Other(Event, name="shop.paid"):
        pass

    expected = (
        f"{__name__}.Paid and {__name__}.test_equal_wire_names.<locals>.Other are both called 'shop.paid' on the wire: "
        "give one of them another name="
    )
    assert (expected,) == faults(module((Paid, take)), Module("other", messages=[Other]))


def test_equal_handler_names() -> None:
    """Two handlers of one name, or a name that is another's alias, are a fault."""
    same = module((Paid, take, {"name": "it"}), (Placed, take, {"name": "it"}))
    alias = module((Paid, take, {"aliases": ["placed"]}), (Placed, take))
    aliases = module((Paid, take, {"aliases": ["old"]}), (Placed, take, {"aliases": ["shop.old"]}))
    for wiring, name in ((same, "shop.it"), (alias, "shop.placed"), (aliases, "shop.old")):
        (fault,) = faults(wiring)
        assert fault.startswith(f"two handlers answer to {name!r} (")
        assert fault.endswith("a handler's name is its identity, say name='...' on one of them")


def test_own_alias() -> None:
    """A handler may list its present name among the former ones."""
    assert faults(module((Paid, take, {"aliases": ["paid", "paid"]}))) == ()


def test_equal_module_names() -> None:
    """Two modules of one name are a fault, once."""
    expected = "two modules are called 'shop': a module's name is the first part of its handlers' identity"
    assert (expected,) == faults(Module("shop"), Module("shop"), Module("shop"))


def test_unknown_and_tied_routes() -> None:
    """Rules that go nowhere known, match nothing or tie are faults."""
    wiring = module((Paid, take))
    unknown = faults(wiring, routes={"shop.paid": "evnts"}, transports={"events": broker()}, name="shop")
    assert ("routes['shop.paid'] in code names an unknown transport 'evnts': did you mean 'events'?",) == unknown
    unmatched = faults(wiring, routes={"shop.piad": "memory"})
    assert ("routes['shop.piad'] in code matches no registered message: did you mean 'shop.paid'?",) == unmatched
    tied = faults(wiring, routes={"shop.pa*": "memory", "*hop.paid": "inline", "shop.*aid": "memory"})
    rules = "'*hop.paid' -> inline and 'shop.*aid' -> memory"
    assert (f"routes: equally specific rules in code disagree on 'shop.paid': {rules}",) == tied


def test_body_without_schema() -> None:
    """A body for which pydantic builds no JSON schema is a fault once it is routed, and none inline."""
    wiring = module((Secret, take))
    assert faults(wiring) == ()
    (fault,) = faults(wiring, routes={"shop.*": "memory"})
    assert fault.startswith("message Secret is routed, but its body cannot travel: pydantic builds no JSON schema")


@pytest.mark.parametrize("store", [None, "sqlite:///shop.db"], ids=["alone", "with a store"])
def test_order_that_cannot_be_kept(store: str | None) -> None:
    """An ordered handler on a transport that keeps no order is a fault, with a store too."""
    expected = (
        "handler shop.placed takes 'shop.placed' from 'events', which keeps no order, and it is ordered=True: "
        "route it to another transport"
    )
    arguments: dict[str, Any] = {"name": "shop", "store": store, "routes": {Placed: "events"}}
    for order, found in (("none", (expected,)), ("key", ()), ("exclusive", ())):
        wiring = module((Placed, take, {"ordered": True}))
        assert found == faults(wiring, transports={"events": broker(order=order)}, **arguments)
    assert faults(module((Placed, take)), transports={"events": broker(order="none")}, **arguments) == ()


@pytest.mark.parametrize(
    ("capabilities", "options", "sentence"),
    [
        ({"attempts": False}, {}, "counts no attempts, so a message that kills its process would come for ever"),
        ({}, {"on_dead": "block"}, 'cannot keep on_dead="block": that needs a store'),
    ],
    ids=["attempts", "block"],
)
def test_promises_of_a_broker_alone(capabilities: dict[str, Any], options: dict[str, Any], sentence: str) -> None:
    """What a broker cannot keep by itself is a fault, and none once a store keeps it."""
    wiring = module((Paid, take, options))
    arguments: dict[str, Any] = {"routes": {Paid: "events"}, "name": "shop"}
    (fault,) = faults(wiring, transports={"events": broker(**capabilities)}, **arguments)
    assert fault.startswith(f"handler shop.paid takes 'shop.paid' from 'events', which {sentence}")
    with_store = {**arguments, "transports": {"events": broker(**capabilities)}, "store": "sqlite:///shop.db"}
    assert faults(wiring, **with_store) == ()


@pytest.mark.parametrize("store", [{}, {"store": "sqlite:///shop.db"}], ids=["alone", "with store"])
def test_a_broker_without_groups(store: dict[str, Any]) -> None:
    """Nobody can take a message from a transport that only broadcasts, not into a store either."""
    arguments: dict[str, Any] = {"routes": {Paid: "events"}, "name": "shop", **store}
    (fault,) = faults(module((Paid, take)), transports={"events": broker(groups=False)}, **arguments)
    assert "'events', which has no consumer groups" in fault


def test_promises_of_further_transports() -> None:
    """Only the transport that a handler takes from has to keep what it asks for."""
    wiring = module((Placed, take, {"ordered": True}))
    weak = {"events": broker(groups=False, attempts=False, order="none")}
    assert faults(wiring, routes={Placed: ["memory", "events"]}, transports=weak, name="shop") == ()
    assert faults(wiring, routes={Placed: ["inline", "events"]}, transports=weak, name="shop") == ()
    first = module((Placed, take, {"ordered": True, "inline": True}))
    assert faults(first, routes={Placed: "events"}, transports=weak, name="shop") == ()


def test_block_from_memory() -> None:
    """A queue in memory cannot stop a key for good, whatever store stands beside it."""
    wiring = module((Placed, take, {"on_dead": "block"}))
    expected = (
        "handler shop.placed takes 'shop.placed' from 'memory', which cannot keep on_dead=\"block\": that needs a store"
    )
    assert (expected,) == faults(wiring, routes={Placed: "memory"})
    assert (expected,) == faults(wiring, routes={Placed: "memory"}, store="sqlite:///shop.db")
    assert faults(wiring) == ()


def test_timeout_of_a_plain_function() -> None:
    """A plain function runs in a thread that nobody can stop, so it has no timeout."""
    expected = (
        "handler shop.paid: timeout= cannot be kept for a plain def, whose thread goes on: "
        "make it async, or put the limit into the blocking call"
    )
    assert (expected,) == faults(module((Paid, take_plainly, {"timeout": 5})))
    assert faults(module((Paid, take_plainly))) == ()


def test_no_name() -> None:
    """A bus from which something leaves needs a name; one that keeps everything in memory does not."""
    wiring = module((Paid, take))
    expected = "{} leaves the process, so the bus needs a name: EventBus(..., name='shop')"
    for target in ("store", "events"):
        found = faults(wiring, routes={Paid: target}, transports={"events": broker()}, store="sqlite:///shop.db")
        assert (expected.format("routes[Paid] in code"),) == found
    assert faults(wiring, routes={Paid: "memory"}, transports={"events": broker()}, store="sqlite:///shop.db") == ()


def test_route_to_no_store() -> None:
    """A route to the store needs one."""
    expected = "routes['shop.*'] in code goes to 'store', but the bus has none: EventBus(store=...)"
    assert (expected,) == faults(module((Paid, take), (Placed, take)), routes={"shop.*": "store"}, name="shop")


def test_inline_not_first() -> None:
    """Handlers have one source, the first of the route, so inline cannot come later."""
    expected = "routes[Paid] in code: 'inline' must come first; a handler has one source, the first of the route"
    assert (expected,) == faults(module((Paid, take)), routes={Paid: ["memory", "inline"]})


class Keyed(Event, key="whole"):
    half: int = 1

    @computed_field  # type: ignore[prop-decorator]  # as pydantic documents it
    @property
    def whole(self) -> int:
        return 2 * self.half


class Cached(Event, key="text"):
    @cached_property
    def text(self) -> str:
        return "a"


@message(key="text")
@dataclass
class Held:
    text: str


@message(key="text")
class Foreign(BaseModel):
    text: str


class Lost(Event, key="colour"):
    size: int = 0


class Method(Event, key="model_dump"):
    pass


@message(key="colour")
@dataclass
class LostToo:
    size: int = 0


@pytest.mark.parametrize("type_", [Placed, Keyed, Cached, Held, Foreign], ids=lambda type_: type_.__name__)
def test_key_is_a_field(type_: type) -> None:
    """A key may be a field or a property."""
    assert faults(Module("shop", messages=[type_])) == ()


@pytest.mark.parametrize("type_", [Lost, Method, LostToo], ids=lambda type_: type_.__name__)
def test_key_is_no_field(type_: type) -> None:
    """A key that is neither a field nor a property is a fault."""
    (fault,) = faults(Module("shop", messages=[type_]))
    assert fault.startswith(f"message {type_.__name__}: key='")
    assert fault.endswith("is not one of its fields")


def returning(annotation: Any) -> Callable[..., Any]:
    """Return a listener with a return annotation."""

    async def listen(event: Paid) -> Any: ...

    listen.__annotations__["return"] = annotation
    return listen


@pytest.mark.parametrize(
    "annotation",
    [Remind, Remind | None, list[Remind], list[Remind | Placed], "Remind"],
    ids=["one", "optional", "list", "list of several", "text"],
)
def test_returned_command_without_route(annotation: Any) -> None:
    """A listener that returns a command has it enqueued, so the command needs a route."""
    expected = "handler shop.paid returns the command Remind for later, and it has no route"
    wiring = module((Paid, returning(annotation)), (Remind, take))
    assert (expected,) == faults(wiring)
    assert faults(wiring, routes={Remind: "memory"}) == ()


def test_returned_messages() -> None:
    """A class on our bases that a listener returns is a message that the bus knows; any other class has to be named."""
    wiring = module((Paid, returning(list[Placed | Plain | Row] | None)))
    registry = compiled(wiring)
    assert ([Placed], True) == (list(registry.known[0].returns), Placed in registry.subjects)
    registry = compiled(wiring, Module("other", messages=[Plain]))
    assert [Placed, Plain] == list(registry.known[0].returns)


@pytest.mark.parametrize("base", [Event, Command], ids=lambda base: base.__name__)
def test_returned_base(base: type) -> None:
    """The bases themselves are no messages that a handler could return."""
    assert compiled(module((Paid, returning(base)))).known[0].returns == ()


def test_unknown_import() -> None:
    """A file that is not there is a fault."""
    expected = (
        "module 'shop': importing 'no_such_place.handlers' failed: ModuleNotFoundError: No module named 'no_such_place'"
    )
    assert (expected,) == faults(Module("shop", imports=["no_such_place.handlers"]))


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], None]]:
    """Return what writes a Python module that can be imported during the test."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)

    def write(name: str, text: str) -> None:
        (tmp_path / f"{name}.py").write_text(text)

    yield write
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def test_imports(write: Callable[[str, str], None]) -> None:
    """A module's files are imported when the bus compiles, so that their handlers are there."""
    write("imported_module", "from eventbus import Module\nshop = Module('shop', imports=['imported_handlers'])\n")
    write(
        "imported_handlers",
        "from eventbus import Event\nfrom imported_module import shop\nclass Sold(Event): ...\n"
        "@shop.on(Sold)\nasync def listen(event: Sold) -> None: ...\n",
    )
    from imported_module import shop

    assert ["shop.listen"] == [one.handler.name for one in compiled(shop).known]


def test_import_cycle(write: Callable[[str, str], None]) -> None:
    """Handlers may import the file that makes the bus, which names them in imports."""
    write(
        "cycle_app",
        "from eventbus import EventBus, Module\nshop = Module('shop', imports=['cycle_handlers'])\n"
        "bus = EventBus(shop)\nbus.compile()\n",
    )
    write(
        "cycle_handlers",
        "from eventbus import Event\nfrom cycle_app import bus, shop\nclass Sold(Event): ...\n"
        "@shop.on(Sold)\nasync def listen(event: Sold) -> None: ...\n",
    )
    from cycle_app import bus

    assert ["shop.listen"] == [one.handler.name for one in bus.engine.registry.known]


def test_failing_import(write: Callable[[str, str], None]) -> None:
    """A file that fails is a fault beside all others, and its own error is the cause."""
    write("failing_handlers", "1 / 0\n")
    with pytest.raises(WiringError) as caught:
        compiled(Module("shop", imports=["failing_handlers"], messages=[Place]))
    assert (
        "module 'shop': importing 'failing_handlers' failed: ZeroDivisionError: division by zero",
        "command Place has no handler: decorate one with @module.handles(Place), or route it to a broker",
    ) == caught.value.faults
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_no_cause_without_failing_import() -> None:
    """Faults of the wiring alone have no cause."""
    with pytest.raises(WiringError) as caught:
        compiled(Module("shop", messages=[Place]))
    assert caught.value.__cause__ is None


# All at once.


def test_every_fault_at_once() -> None:
    """One error lists everything that is wrong, each with its sentence and none twice."""

    async def wrong(event: Paid) -> None: ...

    async def answer(cmd: Place) -> str:
        return ""

    async def asking(event: Event, colour: str, request: Request) -> None: ...

    class Twin(Event, name="shop.paid"):
        pass

    shop = module(
        (Placed, wrong),
        (Place, answer),
        (Paid, take_transaction, {"aliases": ["placed"]}),
        (Fact, asking),
        (Lost, take_plainly, {"timeout": 5}),
        (Secret, returning(Remind), {"ordered": True, "on_dead": "block"}),
        messages=[Remind],
        imports=["no_such_place"],
    )
    again = module((Place, take), (Plain, take))
    rules = {
        "shop.placed": "evnts", "shop.f*": "inline", "*p.fact": "memory", "Plain": ["events", "inline"],
        "shop.secret": ["events", "store"], Keyed: "memory", "shop.nothing": "memory",
    }  # fmt: skip
    weak = {"events": broker(groups=False, attempts=False, order="none")}
    found = faults(shop, again, Module("twin", messages=[Twin]), routes=rules, transports=weak)
    sentences = [
        "module 'shop': importing 'no_such_place' failed: ModuleNotFoundError",
        "handler shop.placed: its first parameter is Paid, but it is registered for Placed (",
        "handler shop.place: it returns str, but Place promises int (",
        "handler shop.fact: parameter 'colour' is not one that the bus can fill",
        "handler shop.fact: parameter 'request' asks for Request",
        "handler shop.secret: its first parameter is Paid, but it is registered for Secret (",
        "two modules are called 'shop'",
        f"{__name__}.Paid and {__name__}.test_every_fault_at_once.<locals>.Twin are both called 'shop.paid'",
        "two handlers answer to 'shop.placed' (",
        "two handlers answer to 'shop.place' (",
        "routes['shop.placed'] in code names an unknown transport 'evnts'",
        "routes['shop.nothing'] in code matches no registered message",
        "routes: equally specific rules in code disagree on 'shop.fact'",
        "command Place has 2 handlers, and a command has exactly one",
        "message Lost: key='colour' is not one of its fields",
        "routes['shop.secret'] in code goes to 'store', but the bus has none",
        "routes['shop.secret'] in code leaves the process, so the bus needs a name",
        "message Secret is routed, but its body cannot travel",
        "command Remind has no handler",
        "routes['shop.placed'] in code leaves the process, so the bus needs a name",
        "routes['Plain'] in code: 'inline' must come first",
        "routes['Plain'] in code leaves the process, so the bus needs a name",
        "handler shop.paid takes a Transaction, but the bus has no store",
        "handler shop.lost: timeout= cannot be kept for a plain def",
        "handler shop.secret returns the command Remind for later, and it has no route",
        "handler shop.secret takes 'shop.secret' from 'events', which keeps no order",
        "handler shop.secret takes 'shop.secret' from 'events', which cannot keep on_dead=\"block\"",
        "handler shop.secret takes 'shop.secret' from 'events', which has no consumer groups",
        "handler shop.secret takes 'shop.secret' from 'events', which counts no attempts",
        "handler shop.plain takes 'Plain' from 'events', which has no consumer groups",
        "handler shop.plain takes 'Plain' from 'events', which counts no attempts",
    ]
    assert sorted(sentences) == sorted(
        next((sentence for sentence in sentences if fault.startswith(sentence)), fault) for fault in found
    )
    assert len(set(found)) == len(found)


def test_text_of_many_faults() -> None:
    """The error's text counts the faults and has one line for each."""
    with pytest.raises(WiringError) as caught:
        compiled(Module("shop", messages=[Place, Remind]))
    head, *lines = str(caught.value).splitlines()
    assert "2 faults in the wiring:" == head
    assert [f"  - {fault}" for fault in caught.value.faults] == lines


# Who gets what.


class Old(Place, name="shop.place.old"):
    pass


class Load(Command[T], Generic[T]):
    pass


def test_inline_and_routed_handlers() -> None:
    """Handlers take a message from the first transport of its route, but for those that insist on inline."""
    wiring = module((Placed, take), (Fact, take, {"inline": True}), (Event, take))
    carriers: dict[str, Any] = {"transports": {"events": broker()}, "name": "shop"}
    assert (["shop.placed", "shop.fact", "shop.event"], []) == handlers(compiled(wiring).subject(Placed))
    first = compiled(wiring, routes={Placed: ["memory", "events"]}, **carriers).subject(Placed)
    assert (["shop.fact"], ["shop.placed", "shop.event"]) == handlers(first)
    assert ("memory", ("memory", "events")) == (first.source, first.targets)
    second = compiled(wiring, routes={Placed: ["inline", "events"]}, **carriers).subject(Placed)
    assert (["shop.placed", "shop.fact", "shop.event"], []) == handlers(second)
    assert (None, ("events",)) == (second.source, second.targets)


def test_base_class_handlers() -> None:
    """A listener of a base class gets every subclass, one that nobody registered included."""
    registry = compiled(module((Fact, take), (Placed, take)))

    class Unregistered(Placed):
        pass

    assert (["shop.fact", "shop.placed"], []) == handlers(registry.subject(Unregistered))
    assert (["shop.fact"], []) == handlers(registry.subject(Fact))
    assert ([], []) == handlers(registry.subject(Paid))


def test_commands_are_not_listened_to() -> None:
    """A listener of everything that pydantic knows gets no commands."""
    registry = compiled(module((BaseModel, take), (Place, take)))
    assert (["shop.place"], []) == handlers(registry.subject(Place))
    assert (["shop.basemodel"], []) == handlers(registry.subject(Paid))
    assert ([], []) == handlers(registry.subject(Remind))


def test_nearest_command_handler() -> None:
    """A command goes to its own handler, else to that of the nearest command above it."""
    registry = compiled(module((Place, take), (Old, take), (Load, take)))

    class Older(Old):
        pass

    class Newer(Place):
        pass

    assert ["shop.old"] == handlers(registry.subject(Old))[0]
    assert ["shop.old"] == handlers(registry.subject(Older))[0]
    assert ["shop.place"] == handlers(registry.subject(Newer))[0]
    assert ["shop.load"] == handlers(registry.subject(Load[int]))[0]
    assert [] == handlers(registry.subject(Remind))[0]


def test_registered_types() -> None:
    """What is handled, named, returned or routed is registered; a route's base class is only if it has no subclass."""
    wiring = module((Paid, returning(Secret)), messages=[Plain])
    registry = compiled(wiring, routes={Keyed: "memory", Event: "inline"})
    assert [Paid, Secret, Plain, Keyed] == list(registry.subjects)
    based = compiled(module((Placed, take)), routes={Fact: "memory"})
    assert [Placed] == list(based.subjects)


def test_type_of() -> None:
    """A wire name leads to its class; unknown names and newer versions do not."""
    registry = compiled(module((Paid, take)))
    assert Paid is registry.type_of("shop.paid")
    with pytest.raises(UnknownMessageError) as unknown:
        registry.type_of("shop.piad")
    with pytest.raises(UnknownMessageError) as newer:
        registry.type_of("shop.paid", 2)
    assert ("shop.piad", None, None) == (unknown.value.name, unknown.value.version, unknown.value.known)
    assert ("shop.paid", 2, 1) == (newer.value.name, newer.value.version, newer.value.known)


def test_names_in_queues() -> None:
    """A handler is called after its bus in stores and queues, and after "bus" as long as nothing leaves."""
    wiring = module((Paid, take))
    for name, queue in (("till", "till/shop.paid"), (None, "bus/shop.paid")):
        registry = compiled(wiring, name=name)
        assert queue == registry.queue(registry.known[0].handler)


def test_middleware_order() -> None:
    """The bus's middleware goes around that of the module."""

    async def outer(ctx: Any, call_next: Any) -> Any: ...

    async def inner(ctx: Any, call_next: Any) -> Any: ...

    registry = compiled(module((Paid, take), middleware=[inner]), middleware=[outer])
    assert (outer, inner) == registry.known[0].middleware


@pytest.mark.parametrize(("route", "leaves"), [("memory", True), ("inline", False)])
def test_leaves(route: str, leaves: bool) -> None:
    """Correlation follows as soon as one message has a route."""
    assert leaves is compiled(module((Paid, take)), routes={Paid: route}).leaves


# How long a transaction may keep others out.


def test_default_timeout_of_transactions() -> None:
    """A handler whose transaction keeps other writers out ends within a third of the lease; others have no limit."""
    wiring = module((Paid, take_transaction), (Placed, take), (Fact, take_transaction, {"timeout": 2}))
    registry = compiled(wiring, store="sqlite:///shop.db", limits=Limits(lease=12.0))
    assert [4.0, None, 2] == [known.timeout for known in registry.known]


def test_too_long_a_transaction() -> None:
    """A timeout of more than a third of the lease is a fault there, and none without a transaction."""
    arguments: dict[str, Any] = {"store": "sqlite:///shop.db", "limits": Limits(lease=12.0)}
    expected = (
        "handler shop.paid: timeout=4.5 is more than a third of the lease (4 s), and its transaction keeps all other "
        "writers out: lower it or raise Limits(lease=...)"
    )
    assert (expected,) == faults(module((Paid, take_transaction, {"timeout": 4.5})), **arguments)
    assert faults(module((Paid, take_transaction, {"timeout": 4.0})), **arguments) == ()
    assert faults(module((Paid, take, {"timeout": 4.5})), **arguments) == ()
