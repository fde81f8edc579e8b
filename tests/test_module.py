"""Modules: handlers under a name, checked as they are registered."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from pydantic import BaseModel

from eventbus import Command, Context, Event, EventBus, Module, Retry, WiringError
from eventbus.middleware import CallNext


class Place(Command[int]):
    sku: str = ""


class Placed(Event):
    sku: str = ""


class Paid(Event):
    pass


@dataclass
class Plain:
    pass


class Foreign(BaseModel):
    pass


async def middleware(ctx: Context, call_next: CallNext) -> Any:
    """Go on."""
    return await call_next(ctx)


async def place(cmd: Place) -> int:
    """Be a handler."""
    return 7


async def listen(event: Event) -> None:
    """Be a listener."""


def test_decorators_return_the_function() -> None:
    """What is decorated is the same object afterwards."""
    module = Module("shop")
    instance = functools.partial(listen)
    assert place is module.handles(Place)(place)
    assert listen is module.on(Placed, Paid)(listen)
    assert instance is module.on(Placed, name="third")(instance)
    assert ["shop.place", "shop.listen", "shop.third"] == [handler.name for handler in module.handlers]


def test_decorated_function_is_called_as_before() -> None:
    """A decorated function can be called and awaited like any other, message by name included."""
    decorated = Module("shop").handles(Place)(place)
    assert inspect.iscoroutinefunction(decorated)
    coroutine = decorated(cmd=Place())  # type: ignore[call-arg]  # type checkers see it positional only
    with pytest.raises(StopIteration) as caught:
        coroutine.send(None)
    assert 7 == caught.value.value


def test_options_arrive() -> None:
    """Everything that a decorator is told stands in the handler's options."""
    module, retry = Module("shop"), Retry(attempts=2)
    given: dict[str, Any] = {"retry": retry, "timeout": 3, "concurrency": 4, "ordered": True, "on_dead": "block"}
    module.handles(Place, name="first", aliases=["old"], **given)(place)
    module.on(Placed, name="second", aliases=("new.old",), inline=True, **given)(listen)
    first, second = (handler.options for handler in module.handlers)
    assert given == {name: getattr(first, name) for name in given}
    assert given == {name: getattr(second, name) for name in given}
    assert (("shop.old",), ("new.old",)) == (first.aliases, second.aliases)
    assert (False, True) == (first.inline, second.inline)


def test_default_retry() -> None:
    """A handler that says nothing about retry gets the default one."""
    module = Module("shop")
    module.handles(Place)(place)
    assert Retry() == module.handlers[0].options.retry


@pytest.mark.parametrize("types", [(Placed,), (Placed, Paid), (Event,), (Plain, Foreign, Placed, Paid)], ids=str)
def test_types(types: tuple[type, ...]) -> None:
    """A listener may take one event, several, or a base class, of any kind of message class."""
    module = Module("shop")
    module.on(*types)(listen)
    assert types == module.handlers[0].types


BAD_NAMES: list[Any] = ["", " shop", "shop ", "a/b", "a\nb", None, 5]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_bad_name(name: Any) -> None:
    """A module's name is the first part of every identity, so it is checked at once."""
    with pytest.raises(ValueError, match="a module's name is printable text without '/'"):
        Module(name)


REFUSED: dict[str, tuple[Callable[[Module], object], type[Exception], str]] = {
    "event to handles": (lambda m: m.handles(Placed), TypeError, "takes a command; Placed is an event: use on()"),
    "foreign model to handles": (lambda m: m.handles(Foreign), TypeError, "takes a command; Foreign is an event"),
    "base to handles": (lambda m: m.handles(Command), TypeError, "handles() takes one command class"),
    "function to handles": (lambda m: m.handles(place), TypeError, "a message type is a class, not <function place"),
    "no message to handles": (lambda m: m.handles(int), TypeError, "int is neither a pydantic model nor a dataclass"),
    "command to on": (lambda m: m.on(Place), TypeError, "on() takes events; Place is a command: use handles()"),
    "command among events": (lambda m: m.on(Placed, Place), TypeError, "on() takes events; Place is a command"),
    "function to on": (lambda m: m.on(listen), TypeError, "a message type is a class, not <function listen"),
    "instance to on": (lambda m: m.on(Placed()), TypeError, "a message type is a class, not Placed("),
    "event twice": (lambda m: m.on(Placed, Paid, Placed), TypeError, "on() names Placed, Paid, Placed: each type once"),
    "class as handler": (lambda m: m.on(Placed)(Plain), TypeError, "class Plain cannot be a handler"),
    "lambda as handler": (lambda m: m.on(Placed)(lambda e: e), TypeError, "has no name of its own"),
    "text as aliases": (lambda m: m.on(Placed, aliases="old"), ValueError, "aliases= takes a list of names: ['old']"),
    "zero as retry": (lambda m: m.on(Placed, retry=0), ValueError, "retry= takes a Retry, not 0"),
    "false as retry": (lambda m: m.handles(Place, retry=False), ValueError, "retry= takes a Retry, not False"),
    "bad timeout": (lambda m: m.handles(Place, timeout=0), ValueError, "timeout= takes seconds"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    """What can never work is refused where it is written, and registers nothing."""
    act, kind, sentence = REFUSED[case]
    module = Module("shop")
    with pytest.raises(kind) as caught:
        act(module)
    assert sentence in str(caught.value)
    assert module.handlers == ()


@pytest.mark.parametrize(
    ("arguments", "kind", "sentence"),
    [
        ({"messages": Placed}, ValueError, "Module('shop'): messages= and imports= take a list"),
        ({"imports": "shop.handlers"}, ValueError, "Module('shop'): messages= and imports= take a list"),
        ({"messages": [int]}, TypeError, "int is neither a pydantic model nor a dataclass"),
        ({"messages": ["Placed"]}, TypeError, "a message type is a class, not 'Placed'"),
        ({"middleware": middleware}, TypeError, "Module('shop'): middleware= takes a list"),
        ({"middleware": ["log"]}, TypeError, "a middleware is a function of ctx and call_next, not 'log'"),
        ({"middleware": [Plain]}, TypeError, "a middleware is a function of ctx and call_next, not <class"),
    ],
    ids=["one message", "one import", "no message", "text", "one middleware", "no middleware", "middleware class"],
)  # fmt: skip
def test_bad_arguments(arguments: dict[str, Any], kind: type[Exception], sentence: str) -> None:
    """A module's arguments are checked when it is made."""
    with pytest.raises(kind) as caught:
        Module("shop", **arguments)
    assert sentence in str(caught.value)


def test_records() -> None:
    """A module keeps copies of what it was given."""
    messages, imports = [Placed], ["shop.handlers"]
    module = Module("shop", messages=messages, imports=imports, middleware=[middleware])
    messages.clear()
    imports.clear()
    assert ("shop", (Placed,), ("shop.handlers",), (middleware,)) == (
        module.name, module.messages, module.imports, module.middleware,
    )  # fmt: skip
    assert "Module('shop', 0 handlers)" == repr(module)


def test_handler_after_compile() -> None:
    """A handler that comes after the bus compiled is refused, with the way to bring it in time."""
    module = Module("shop")
    EventBus(module).compile()
    with pytest.raises(WiringError) as caught:
        module.on(Placed)(listen)
    expected = (
        "handler shop.listen came after the bus compiled module 'shop': import its file before, "
        "or name it in Module('shop', imports=[...])"
    )
    assert (expected,) == caught.value.faults
    assert module.handlers == ()


def test_handler_after_failed_compile() -> None:
    """A wiring that did not compile can still be completed."""
    module = Module("shop", messages=[Place])
    bus = EventBus(module)
    with pytest.raises(WiringError):
        bus.compile()
    module.handles(Place)(place)
    bus.compile()
    assert ["shop.place"] == [handler.name for handler in bus.explain(Place).messages[0].handlers]


def test_one_module_in_two_buses() -> None:
    """Two buses may share a module."""
    module = Module("shop")
    module.handles(Place)(place)
    for bus in (EventBus(module), EventBus(module)):
        bus.compile()
        assert 1 == len(bus.explain(Place).messages[0].handlers)
