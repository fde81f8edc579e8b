"""Routes: the most specific rule wins, ties and misspellings are faults."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from eventbus import Command, Event
from eventbus.errors import WiringError
from eventbus.routes import Route, Routes


class Fact(Event, name="shop.fact"):
    pass


class Placed(Fact, name="shop.order.placed"):
    pass


class Shipped(Placed, name="shop.order.shipped"):
    pass


class Audited:
    pass


class Booked(Audited, Fact, name="bank.booked"):
    pass


class Place(Command[int], name="shop.place"):
    pass


@dataclass
class Plain:
    pass


TYPES: dict[type, str] = {
    Fact: "shop.fact",
    Placed: "shop.order.placed",
    Shipped: "shop.order.shipped",
    Booked: "bank.booked",
    Place: "shop.place",
    Plain: "Plain",
}
KNOWN = ("events", "audit")
ALL = ("audit", "events", "inline", "memory", "store")


def target(code: Mapping[Any, Any], config: Mapping[str, Any] | None = None, type: type = Shipped) -> tuple[str, ...]:
    """Return where a message goes."""
    return Routes(code, config).resolve(type, TYPES[type]).transports


def oracle(code: Mapping[Any, Any], config: Mapping[str, Any], type: type, name: str) -> tuple[str, ...] | None:
    """Return where a message goes by scoring every rule; None for a tie."""
    scored: list[tuple[tuple[int, int, int], tuple[str, ...]]] = []
    for layer, rules in enumerate((code, config)):
        for key, value in rules.items():
            to = (value,) if isinstance(value, str) else tuple(value)
            if key in (type, name):
                scored.append(((layer, 2, 0), to))
            elif isinstance(key, str):
                if "*" in key and re.fullmatch(".*".join(map(re.escape, key.split("*"))), name, re.DOTALL):
                    scored.append(((layer, 0, len(key.replace("*", ""))), to))
            elif issubclass(type, key):
                scored.append(((layer, 1, -type.__mro__.index(key)), to))
    if not scored:
        return ("inline",)
    best = max(score for score, _ in scored)
    found = {to for score, to in scored if score == best}
    return found.pop() if len(found) == 1 else None


VALUES = st.sampled_from(["store", "events", "audit", ["store"], ["store", "events"], ["events", "store"]])
NAMES = st.sampled_from(sorted(TYPES.values()))
PATTERNS = st.builds(
    lambda name, cuts: "".join("*" if n in cuts else letter for n, letter in enumerate(name)),
    NAMES,
    st.sets(st.integers(0, 18), min_size=1, max_size=12),
) | st.text("*shop.", max_size=6)
CLASSES = st.sampled_from([*TYPES, Event, BaseModel, object, Audited, Command])


@given(
    st.dictionaries(CLASSES | NAMES | PATTERNS, VALUES, max_size=6),
    st.dictionaries(NAMES | PATTERNS, VALUES, max_size=3),
    st.sampled_from(sorted(TYPES.items(), key=str)),
)
def test_most_specific_rule_wins(code: dict[Any, Any], config: dict[str, Any], subject: tuple[type, str]) -> None:
    """A message goes where scoring every single rule says, and a tie is refused and a fault."""
    routes, expected = Routes(code, config), oracle(code, config, *subject)
    if expected is None:
        with pytest.raises(WiringError, match="disagree"):
            routes.resolve(*subject)
        assert any("disagree" in fault for fault in routes.faults(dict([subject]), KNOWN))
    else:
        assert expected == routes.resolve(*subject).transports
        assert not any("disagree" in fault for fault in routes.faults(dict([subject]), KNOWN))


@pytest.mark.parametrize(
    ("code", "config", "expected"),
    [
        ({}, {}, "inline"),
        ({"*": "events"}, {}, "events"),
        ({"*": "events", "shop.*": "store"}, {}, "store"),
        ({"shop.*": "events", Event: "store"}, {}, "store"),
        ({Event: "events", Fact: "store"}, {}, "store"),
        ({Fact: "events", Placed: "store"}, {}, "store"),
        ({Placed: "events", Shipped: "store"}, {}, "store"),
        ({Placed: "events", "shop.order.shipped": "store"}, {}, "store"),
        ({Shipped: "events"}, {"*": "store"}, "store"),
        ({Shipped: "events"}, {"bank.*": "store"}, "events"),
        ({"shop.order.*": "store", "*.shipped": "events"}, {}, "store"),
        ({"s*d": "store", "*": "events"}, {}, "store"),
        ({"shop": "events", "*.order": "events", "order.*": "events"}, {}, "inline"),
        ({"shop?order*": "events", "shop.[o]*": "events"}, {}, "inline"),
    ],
)
def test_precedence(code: dict[Any, str], config: dict[str, str], expected: str) -> None:
    """Configuration beats code; then the exact rule, the nearest base class, the pattern with most literals."""
    assert (expected,) == target(code, config)


def test_pattern_needs_its_parts_in_order_and_apart() -> None:
    """A star stands for any text, none too, but the literal parts do not overlap."""
    routes = Routes({"aba*aba": "store", "x*y*z": "events", "p*aa*aa*q": "audit"})
    expected = {
        "ababa": "inline", "abaaba": "store", "xyz": "events", "xzy": "inline", "x.y.y.z": "events",
        "paaaq": "inline", "paaaaq": "audit",
    }  # fmt: skip
    assert expected == {name: routes.resolve(Plain, name).transports[0] for name in expected}


def test_equal_targets_are_no_tie() -> None:
    """Rules that agree may be as many as they like."""
    assert target({Shipped: "store", "shop.order.shipped": ["store"]}) == ("store",)
    assert target({"shop.order.*": "store", "*order.shippe*": "store", "shop.orde*d": "store"}) == ("store",)


@pytest.mark.parametrize(
    "code",
    [
        {Shipped: "store", "shop.order.shipped": "events"},
        {Shipped: ["store", "events"], "shop.order.shipped": ["events", "store"]},
        {"shop.*": "store", "*er.sh*": "store", "*.ship*": "events", "*ippe*": "store", "sho*d": "events"},
    ],
    ids=["class and name", "order", "patterns"],
)
def test_tie_is_refused(code: dict[Any, Any]) -> None:
    """Equally specific rules that disagree are an error that names the message and the rules."""
    longest = {key: len(key.replace("*", "")) for key in code if isinstance(key, str) and "*" in key}
    with pytest.raises(WiringError) as caught:
        target(code)
    assert len(caught.value.faults) == 1
    assert "'shop.order.shipped'" in str(caught.value)
    assert all(repr(key) in str(caught.value) for key in longest if longest[key] == max(longest.values()))


def test_hidden_tie_is_no_fault() -> None:
    """A tie among rules that a more specific one overrides does no harm."""
    code = {
        "shop.order*": "store",
        "*order.ship*": "events",
        "*hop.order.*": "audit",
        Shipped: "store",
        Placed: "store",
    }
    assert Routes(code).faults({Shipped: "shop.order.shipped", Placed: "shop.order.placed"}, KNOWN) == []


@pytest.mark.parametrize(
    ("code", "config", "rule"),
    [
        ({}, {}, "no rule"),
        ({Placed: "store"}, {}, "routes[Placed] in code"),
        ({"shop.*": "store"}, {}, "routes['shop.*'] in code"),
        ({"shop.*": "store"}, {"*": "events"}, "routes['*'] in configuration"),
    ],
)
def test_route_tells_its_rule(code: dict[Any, str], config: dict[str, str], rule: str) -> None:
    """A route says which rule it comes from."""
    assert rule == Routes(code, config).resolve(Shipped, "shop.order.shipped").rule


def test_route_is_a_record() -> None:
    """Routes are equal by value."""
    assert Route(("store", "events"), "routes[Fact] in code") == Routes({Fact: ["store", "events"]}).resolve(Fact, "x")


FAULTS: dict[str, tuple[dict[Any, Any], dict[Any, Any], list[str]]] = {
    "none": ({Fact: "store", "shop.*": ["memory", "events"], "shop.place": "inline", "*.later": "audit"}, {}, []),
    "rules that wait": ({"nothing.*": "store", Event: "store", Command: "store", BaseModel: "events"}, {}, []),
    "memory beside others": ({Fact: ["memory", "events"], Place: ["store", "memory"]}, {}, []),
    "unknown transport": (
        {Fact: "evens"},
        {},
        ["routes[Fact] in code names an unknown transport 'evens': did you mean 'events'?"],
    ),
    "unlike any transport": (
        {},
        {"*": ["store", "xyz"]},
        [
            f"routes['*'] in configuration names an unknown transport 'xyz' (known are {', '.join(ALL)})",
        ],
    ),
    "misspelt name": (
        {"shop.order.plcaed": "store"},
        {},
        ["routes['shop.order.plcaed'] in code matches no registered message: did you mean 'shop.order.placed'?"],
    ),
    "misspelt in configuration": (
        {},
        {"shop.factt": "store"},
        ["routes['shop.factt'] in configuration matches no registered message: did you mean 'shop.fact'?"],
    ),
    "class of no message": (
        {int: "store"},
        {},
        ["routes[int] in code matches no registered message: name its messages in Module(messages=[...])"],
    ),
    "empty": ({Fact: []}, {}, ["routes[Fact] in code names no transport: remove it, or say 'inline'"]),
    "twice": (
        {Fact: ["store", "events", "store"]},
        {},
        ["routes[Fact] in code names a transport twice: store, events, store"],
    ),
    "wrong key": ({1: "store"}, {}, ["routes[1] in code: the key is neither a message name nor a pattern nor a class"]),
    "empty key": (
        {"": "store"},
        {},
        ["routes[''] in code: the key is neither a message name nor a pattern nor a class"],
    ),
    "class in configuration": (
        {},
        {Fact: "store"},
        ["routes[Fact] in configuration: the key is neither a message name nor a pattern"],
    ),
    "wrong value": (
        {Fact: 1, Placed: None, Shipped: ["store", 2], Booked: b"store"},
        {},
        [
            f"routes[{name}] in code: the value is neither a transport name nor a list of them"
            for name in ("Fact", "Placed", "Shipped", "Booked")
        ],
    ),
    "tie": (
        {"shop.*e": "store", "s*place": "events"} | {Placed: "store"},
        {},
        ["routes: equally specific rules in code disagree on 'shop.place': 'shop.*e' -> store and 's*place' -> events"],
    ),
    "several": (
        {Fact: [], "nothing": "store"},
        {"*": "evens"},
        [
            "routes['*'] in configuration names an unknown transport 'evens': did you mean 'events'?",
            "routes[Fact] in code names no transport: remove it, or say 'inline'",
            f"routes['nothing'] in code matches no registered message (known are {', '.join(sorted(TYPES.values()))})",
        ],
    ),
}


@pytest.mark.parametrize(("code", "config", "expected"), FAULTS.values(), ids=FAULTS)
def test_faults(code: dict[Any, Any], config: dict[Any, Any], expected: list[str]) -> None:
    """Every fault is one sentence that names the rule and, where it can, the cure."""
    assert expected == Routes(code, config).faults(TYPES, KNOWN)


def test_types_are_the_messages_that_rules_name() -> None:
    """Message classes with a rule of their own can be registered from the routes."""
    assert (Fact, Plain) == Routes({Fact: "store", Plain: "store", Event: "store", int: "store", "x": "store"}).types


def test_command_goes_by_its_base() -> None:
    """A rule for all commands covers commands of any result, and no event."""
    assert (target({Command: "store"}, type=Place), target({Command: "store"}, type=Fact)) == (("store",), ("inline",))
    assert target({Command[int]: "store"}, type=Place) == ("store",)


def test_hostile_pattern_takes_no_time() -> None:
    """A pattern of many stars is matched without trying every split."""
    pattern = "*a" * 100 + "*b"
    assert Routes({pattern: "store"}).resolve(Plain, "a" * 200).transports == ("inline",)
