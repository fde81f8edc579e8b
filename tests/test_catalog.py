"""Explaining: who handles a message, where it goes and what is promised there, as data and as text."""

import math
from dataclasses import FrozenInstanceError, asdict
from typing import Any

import pytest

from eventbus import Command, Event, EventBus, Module, Retry, UnknownMessageError
from eventbus.catalog import PLACES, PROMISES, HandlerFacts, MessageFacts, kept_by
from eventbus.transports.memory import MemoryTransport
from tests.doubles import Flaky


class Place(Command[int], name="shop.place", version=2):
    sku: str


class Placed(Event, name="shop.placed", key="order"):
    order: int


class Paid(Event, name="shop.paid"):
    pass


class Silent(Event, name="shop.silent"):
    pass


shop = Module("shop", messages=[Silent])


@shop.handles(Place, timeout=2.5, concurrency=1)
async def place(cmd: Place) -> int:
    """Answer."""
    return 7


@shop.on(Placed, Paid, retry=Retry(attempts=1), ordered=True)
async def ship(event: Placed | Paid) -> None:
    """Listen to two events."""


@shop.on(Placed, inline=True)
async def audit(event: Placed) -> None:
    """Listen at once."""


def bus(store: str | None = "sqlite:///shop.db", **routes: str | list[str]) -> EventBus:
    """Return a bus with routes by the last part of the message's name."""
    rules = {f"shop.{name}": route for name, route in routes.items()}
    return EventBus(shop, name="shop", store=store, transports={"events": MemoryTransport()}, routes=rules)


def facts(bus: EventBus, what: Any) -> MessageFacts:
    """Return the facts of one message."""
    (found,) = bus.explain(what).messages
    return found


def test_inline_command() -> None:
    """An inline command has no retry, and only the limits that were set."""
    expected = MessageFacts(
        name="shop.place",
        type=f"{__name__}.Place",
        kind="command",
        version=2,
        key=None,
        route=("inline",),
        rule="no rule",
        handlers=(HandlerFacts("shop.place", "inline", None, False, 2.5, 1),),
        promises={promise: kept[0] for promise, kept in PROMISES.items()},
    )
    assert expected == facts(bus(), Place)


def test_routed_event() -> None:
    """A routed event shows which handler takes it from where, and which one is handled at once."""
    found = facts(bus(placed=["store", "events"]), Placed)
    assert ("event", "order", ("store", "events"), "routes['shop.placed'] in code") == (
        found.kind, found.key, found.route, found.rule,
    )  # fmt: skip
    assert (
        HandlerFacts("shop.audit", "inline", None, False, None, None),
        HandlerFacts("shop.ship", "store", 1, True, None, 8),
    ) == found.handlers


@pytest.mark.parametrize(
    ("route", "store", "place"),
    [
        ("inline", None, "inline"),
        (["inline", "events"], None, "inline"),
        ("memory", None, "memory"),
        (["memory", "events"], "sqlite:///shop.db", "memory"),
        ("store", "sqlite:///shop.db", "store"),
        (["store", "events"], "sqlite:///shop.db", "store"),
    ],
    ids=str,
)
def test_promises(route: str | list[str], store: str | None, place: str) -> None:
    """What is promised follows from where the handlers take the message, and from the store."""
    expected = {promise: kept[PLACES.index(place)] for promise, kept in PROMISES.items()}
    assert expected == facts(bus(store, paid=route), Paid).promises


WITH_STORE = {"delays": "any, by the store", "dead letters": "in the store"}
ALONE = {
    "P2 at least once": "once confirmed", "P4 order": "per key, in one process",
    "P5 recovery": "when its connection ends", "delays": "to 6,553.5 s, then held", "dead letters": "in the broker",
}  # fmt: skip


@pytest.mark.parametrize(
    ("broker", "store", "differs"),
    [
        ({}, "sqlite:///shop.db", WITH_STORE),
        ({"order": "none"}, "sqlite:///shop.db", WITH_STORE | {"P4 order": "refused"}),
        ({"confirm": "none"}, "sqlite:///shop.db", WITH_STORE | {"P2 at least once": "no"}),
        ({"returns": "none"}, "sqlite:///shop.db", WITH_STORE | {"P2 at least once": "no"}),
        ({}, None, ALONE),
        ({"confirm": "none"}, None, ALONE | {"P2 at least once": "no"}),
        ({"order": "key"}, None, ALONE | {"P4 order": "per key, keys shared out"}),
        ({"order": "none"}, None, ALONE | {"P4 order": "refused"}),
        ({"returns": "lease"}, None, ALONE | {"P5 recovery": "when its lease lapses"}),
        ({"returns": "rebalance"}, None, ALONE | {"P5 recovery": "when its group is dealt anew"}),
        ({"returns": "none"}, None, ALONE | {"P2 at least once": "no", "P5 recovery": "no"}),
        ({"settle": "prefix"}, None, ALONE | {"P9 duplicates": "all behind the oldest unsettled"}),
        ({"settle": "none"}, None, ALONE | {"P9 duplicates": "none"}),
        ({"retry": math.inf}, None, ALONE | {"delays": "any"}),
        ({"retry": 0}, None, ALONE | {"delays": "held", "P10 clock": "process clock"}),
        ({"dead": False}, None, ALONE | {"dead letters": "no"}),
    ],
    ids=str,
)
def test_promises_of_a_broker(broker: dict[str, Any], store: str | None, differs: dict[str, str]) -> None:
    """In front of a store every broker is alike, and alone each keeps what it declares."""
    module = Module("shop", messages=[Paid])
    events = Flaky(**{"retry": 6553.5, **broker})
    routed = EventBus(module, name="shop", store=store, transports={"events": events}, routes={Paid: "events"})
    explained = routed.explain(Paid)
    place = PLACES.index("broker with store" if store else "broker alone")
    expected = {promise: kept[place] for promise, kept in PROMISES.items()} | differs
    assert expected == explained.messages[0].promises
    assert [f"    {promise}: {kept}" for promise, kept in expected.items()] == str(explained).splitlines()[3:]


@pytest.mark.parametrize(("lacks", "why"), [("groups", "no groups"), ("attempts", "counts no attempts")])
def test_broker_that_takes_no_handlers(lacks: str, why: str) -> None:
    """Where ``compile()`` would refuse every handler, the promise says so."""
    assert kept_by(Flaky(**{lacks: False}).capabilities, stored=False)["P11 same semantics"] == f"refused: {why}"


def test_promise_table() -> None:
    """Every promise says something about every place, in the order of their numbers."""
    assert [f"P{number}" for number in range(1, 13)] == [promise.split(" ")[0] for promise in PROMISES]
    assert {len(PLACES)} == {len(kept) for kept in PROMISES.values()}
    assert all(word for kept in PROMISES.values() for word in kept)


def test_by_name_and_by_type() -> None:
    """A message is explained by its class or by its name, also that of its class where only one has it."""
    assert bus().explain(Placed) == bus().explain("shop.placed") == bus().explain("Placed")


def test_by_a_class_name_that_two_have() -> None:
    """A class name that two messages share explains neither."""
    placed: type[Event] = type("Placed", (Event,), {"__module__": __name__}, name="other.placed")
    with pytest.raises(UnknownMessageError):
        EventBus(Module("shop", messages=[Placed, placed])).explain("Placed")


def test_everything() -> None:
    """Without an argument every message is explained, in the order of registration."""
    explained = bus().explain()
    assert ["shop.place", "shop.placed", "shop.paid", "shop.silent"] == [one.name for one in explained.messages]
    assert "shop" == explained.bus


def test_unregistered_subclass() -> None:
    """A class that nobody registered is explained by the handlers of its base."""

    class Replaced(Placed):
        pass

    assert ["shop.ship", "shop.audit"] == [one.name for one in facts(bus(), Replaced).handlers]


def test_unknown_name() -> None:
    """A name that is not registered is an error that says so."""
    with pytest.raises(UnknownMessageError, match=r"no message is registered under the name 'shop\.plaecd'"):
        bus().explain("shop.plaecd")


@pytest.mark.parametrize("what", [int, 5, [Placed]], ids=str)
def test_no_message(what: Any) -> None:
    """What is no message class is refused."""
    with pytest.raises(TypeError):
        bus().explain(what)


def test_text_of_everything() -> None:
    """The text has a line for each message and each of its handlers."""
    expected = """\
bus shop: 4 messages
command shop.place v2 -> inline (no rule)
  shop.place [inline, timeout 2.5 s, 1 at once]
event shop.placed, key order -> store, events (routes['shop.placed'] in code)
  shop.audit [inline]
  shop.ship [store, 1 attempt, ordered, 8 at once]
event shop.paid -> memory (routes['shop.paid'] in code)
  shop.ship [memory, 1 attempt, ordered, 8 at once]
event shop.silent -> inline (no rule)
  (no handler here)"""
    assert expected == str(bus(placed=["store", "events"], paid="memory").explain())


def test_text_of_one() -> None:
    """The text of one message ends with what is promised where it is handled."""
    head, *lines = str(bus(placed="store").explain(Placed)).splitlines()
    assert "bus shop: 1 message" == head
    assert [f"    {promise}: {kept[PLACES.index('store')]}" for promise, kept in PROMISES.items()] == lines[3:]


def test_text_without_name() -> None:
    """A bus without a name is explained as one."""
    assert "bus (no name): 0 messages" == str(EventBus().explain())


def test_records() -> None:
    """An explanation is frozen, and plain data on request."""
    explained = bus().explain(Paid)
    with pytest.raises(FrozenInstanceError):
        explained.bus = "other"  # type: ignore[misc]  # that is the point
    data = asdict(explained)
    assert ("shop", "shop.paid", "shop.ship") == (
        data["bus"], data["messages"][0]["name"], data["messages"][0]["handlers"][0]["name"],
    )  # fmt: skip


def test_live_transport_is_shown() -> None:
    """Events show the transport that carries them to the streams of other processes, commands have none."""
    live = EventBus(shop, name="shop", store="sqlite:///shop.db", transports={"push": MemoryTransport()}, live="push")
    assert ("push", None) == (facts(live, Placed).live, facts(live, Place).live)
    assert "event shop.placed, key order -> inline (no rule), live through push" in str(live.explain(Placed))
    assert facts(bus(), Placed).live is None
