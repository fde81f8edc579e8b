"""Handlers: what can be one, what it is called, and whether it fits the message it is registered for."""

import functools
import importlib
import sys
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NewType, Optional, Protocol, TypeVar, Union
from uuid import UUID

import pytest

from eventbus import Command, Event, Retry
from eventbus.handler import Handler, Options, describe, returned_messages, signature_faults

T = TypeVar("T")
HERE = Path(__file__).name


class Place(Command[UUID]):
    sku: str


class Drop(Command):
    pass


class Order:
    pass


class BigOrder(Order):
    pass


class Placed(Event):
    sku: str


class Paid(Event):
    pass


class PaidTwice(Paid):
    pass


@dataclass
class Plain:
    pass


class Sized(Protocol):
    sku: str


def described(func: Any, *types: type, **options: Any) -> Handler:
    """Return the description of a function, by default as a listener."""
    return describe("shop", func, types or (Placed,), Options(**options))


def faults(func: Any, *types: type) -> list[str]:
    """Return what is wrong with a signature, without the place."""
    return [fault.partition(" (/")[0] for fault in signature_faults(described(func, *types, name="it"))]


async def listen(event: Placed) -> None:
    """Be a coroutine function."""


def listen_plainly(event: Placed) -> None:
    """Be a plain function."""


class Shop:
    async def listen(self, event: Placed) -> None:
        """Be a method."""

    @staticmethod
    async def listen_static(event: Placed) -> None:
        """Be a static method."""

    @classmethod
    async def listen_class(cls, event: Placed) -> None:
        """Be a class method."""

    async def __call__(self, event: Placed) -> None:
        """Be called."""


@functools.wraps(listen)
async def wrapped(*args: Any) -> None:
    """Be a wrapper."""


@pytest.mark.parametrize(
    ("func", "name"),
    [
        (listen, "shop.listen"),
        (listen_plainly, "shop.listen_plainly"),
        (Shop().listen, "shop.listen"),
        (Shop.listen_static, "shop.listen_static"),
        (Shop().listen_static, "shop.listen_static"),
        (Shop.listen_class, "shop.listen_class"),
        (wrapped, "shop.listen"),
    ],
    ids=["async", "def", "bound method", "static method of a class", "static method", "class method", "wrapper"],
)
def test_own_name(func: Callable[..., Any], name: str) -> None:
    """A function or method brings its own name."""
    assert name == described(func).name
    assert faults(func) == []


@pytest.mark.parametrize(
    "func", [functools.partial(listen), Shop(), lambda event: None], ids=["partial", "instance", "lambda"]
)
def test_no_name(func: Callable[..., Any]) -> None:
    """What has no name of its own needs one, and works with it."""
    with pytest.raises(TypeError, match="has no name of its own, and a handler's name is its identity: say name="):
        described(func)
    assert "shop.third" == described(func, name="third").name
    assert faults(func) == []


@pytest.mark.parametrize(
    "func", [staticmethod(listen), classmethod(listen), Shop.listen], ids=["static", "class", "plain"]
)
def test_class_body(func: Any) -> None:
    """A decorator in a class body is refused with the way to do it: there is no instance yet."""
    with pytest.raises(TypeError, match=r"in a class body: register the bound method, module.on\(Event\)"):
        described(func, name="it")


def test_function_with_self() -> None:
    """A function that merely calls its first parameter self is no method."""

    async def loner(self: Placed) -> None: ...

    assert "shop.loner" == described(loner).name


def test_class() -> None:
    """A class is refused: every message would make an instance."""
    with pytest.raises(TypeError, match=r"class Shop cannot be a handler: register an instance with __call__"):
        described(Shop)


@pytest.mark.parametrize("thing", [None, 5, "shop.listen"])
def test_nothing_to_call(thing: Any) -> None:
    """What cannot be called is refused."""
    with pytest.raises(TypeError, match="cannot be a handler: it cannot be called"):
        described(thing, name="it")


def test_no_message_type() -> None:
    """A handler is registered for messages only."""
    with pytest.raises(TypeError, match="Order is neither a pydantic model nor a dataclass"):
        described(listen, Order)


@pytest.mark.parametrize(
    "func",
    [listen, Shop().listen, Shop(), functools.partial(listen), functools.partial(Shop().listen), wrapped],
    ids=["function", "method", "instance", "partial", "partial of a method", "wrapper"],
)
def test_where(func: Callable[..., Any]) -> None:
    """The place of any kind of handler is the file and line of its code."""
    path, _, line = described(func, name="it").where.rpartition(":")
    assert (HERE, True) == (Path(path).name, line.isdecimal())


def test_where_without_code() -> None:
    """A handler without Python code is shown as it is."""
    assert "<built-in function print>" == described(print).where


def test_aliases() -> None:
    """A former name without a dot is one of the same module, one with a dot stands as it is."""
    handler = described(listen, aliases=("heard", "store.heard"))
    assert ("shop.heard", "store.heard") == handler.options.aliases


BAD_OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "empty name": ({"name": ""}, "name= takes printable text"),
    "blank name": ({"name": " it"}, "name= takes printable text"),
    "name with slash": ({"name": "a/b"}, "name= takes printable text without '/'"),
    "number as name": ({"name": 5}, "name= takes printable text"),
    "empty alias": ({"aliases": ("",)}, "aliases= takes former names of handlers, not ''"),
    "number as alias": ({"aliases": (5,)}, "aliases= takes former names of handlers, not 5"),
    "no timeout": ({"timeout": 0}, "timeout= takes seconds greater than zero, not 0"),
    "negative timeout": ({"timeout": -1.0}, "timeout= takes seconds"),
    "endless timeout": ({"timeout": float("inf")}, "timeout= takes seconds"),
    "no number": ({"timeout": float("nan")}, "timeout= takes seconds"),
    "text as timeout": ({"timeout": "5"}, "timeout= takes seconds greater than zero, not '5'"),
    "truth as timeout": ({"timeout": True}, "timeout= takes seconds"),
    "no concurrency": ({"concurrency": 0}, "concurrency= takes a whole number from 1, not 0"),
    "half a concurrency": ({"concurrency": 1.5}, "concurrency= takes a whole number"),
    "text as concurrency": ({"concurrency": "8"}, "concurrency= takes a whole number"),
    "truth as concurrency": ({"concurrency": True}, "concurrency= takes a whole number"),
    "unknown end": ({"on_dead": "stop"}, 'on_dead= takes "continue" or "block", not \'stop\''),
    "number as retry": ({"retry": 3}, "retry= takes a Retry, not 3"),
    "none as retry": ({"retry": None}, "retry= takes a Retry, not None"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_options(case: str) -> None:
    """An option that cannot work is refused where it is written, with the value."""
    options, sentence = BAD_OPTIONS[case]
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the sentence is compared below
        Options(**options)
    assert str(caught.value).startswith(sentence)


def test_default_options() -> None:
    """Without options a handler is retried five times and limited in nothing."""
    options = Options()
    assert (Retry(), None, None, False, "continue", False) == (
        options.retry, options.timeout, options.concurrency, options.ordered, options.on_dead, options.inline,
    )  # fmt: skip


async def first_untyped(event, sku: str = ""): ...  # type: ignore[no-untyped-def]
async def first_any(event: Any): ...
async def first_object(event: object): ...
async def first_base(event: Event): ...
async def first_annotated(event: Annotated[Placed, "note"]): ...
async def first_union(event: Placed | Paid): ...
async def first_typing_union(event: Union[Placed, Paid]): ...  # noqa: UP007 - the old way is read too
async def first_optional(event: Optional[Placed]): ...  # noqa: UP045 - the old way is read too
async def first_protocol(event: Sized): ...
async def first_typevar(event: T): ...
async def first_text(event: "Placed"): ...
async def first_unknown(event: "Checked"): ...  # noqa: F821 - for type checkers only
async def first_star(*events: Placed): ...
async def first_positional(event: Placed, /): ...


@pytest.mark.parametrize(
    "func",
    [
        first_untyped, first_any, first_object, first_base, first_annotated, first_union, first_typing_union,
        first_optional, first_protocol, first_typevar, first_text, first_unknown, first_star, first_positional,
    ],
    ids=lambda func: func.__name__,
)  # fmt: skip
def test_first_parameter_fits(func: Callable[..., Any]) -> None:
    """A first parameter that takes the message, or cannot be judged, is no fault."""
    assert faults(func) == []


async def wrong_class(event: Paid): ...
async def wrong_subclass(event: PaidTwice): ...
async def wrong_union(event: Paid | Plain): ...
async def wrong_text(event: "Paid"): ...
async def wrong_builtin(event: dict[str, Any]): ...
async def no_parameter(): ...
async def by_name_only(*, event: Placed): ...
async def names_only(**fields: Any): ...


@pytest.mark.parametrize(
    ("func", "message", "shown"),
    [
        (wrong_class, Placed, "Paid"),
        (wrong_subclass, Paid, "PaidTwice"),
        (wrong_union, Placed, f"{Paid.__module__}.Paid | {Plain.__module__}.Plain"),
        (wrong_text, Placed, "Paid"),
        (wrong_builtin, Placed, "dict[str, typing.Any]"),
    ],
    ids=["class", "subclass", "union", "text", "builtin"],
)
def test_first_parameter_does_not_fit(func: Callable[..., Any], message: type, shown: str) -> None:
    """A first parameter of another type is a fault that names both."""
    expected = f"handler shop.it: its first parameter is {shown}, but it is registered for {message.__name__}"
    assert [expected] == faults(func, message)


@pytest.mark.parametrize("func", [no_parameter, by_name_only, names_only], ids=lambda func: func.__name__)
def test_no_first_parameter(func: Callable[..., Any]) -> None:
    """A handler without a positional parameter cannot take its message."""
    assert ["handler shop.it: its first parameter must take the message"] == faults(func)


def test_several_types() -> None:
    """Each registered type that the first parameter does not take is a fault of its own."""
    assert faults(first_union, Placed, Paid) == []
    assert [
        f"handler shop.it: its first parameter is Paid, but it is registered for {name}" for name in ("Placed", "Plain")
    ] == faults(wrong_class, Placed, Paid, PaidTwice, Plain)


def test_partial_takes_the_first_parameter() -> None:
    """What a partial fills is not the message's place any more."""

    async def second(shop: str, event: Placed) -> None: ...

    assert faults(functools.partial(second, "main")) == []
    assert len(faults(second)) == 1


def test_unreadable_signature() -> None:
    """A callable whose signature cannot be read is a fault, not a crash."""

    class Odd:
        __signature__ = "none"

        def __call__(self, event: Placed) -> None: ...

    (fault,) = faults(Odd())
    assert fault.startswith("handler shop.it: its signature cannot be read (")


def returning(annotation: Any) -> Callable[..., Any]:
    """Return a handler of every message with a return annotation."""

    async def it(message: Any) -> Any: ...

    it.__annotations__["return"] = annotation
    return it


class Loading(Command[Order]):
    pass


class Finding(Command[Order | None]):
    pass


class Listing(Command[list[str]]):
    pass


class Weighing(Command[float]):
    pass


class Naming(Command["Nowhere"]):
    pass


Grams = NewType("Grams", float)


@pytest.mark.parametrize(
    ("command", "given"),
    [
        (Place, UUID),
        (Place, "UUID"),
        (Place, Any),
        (Place, object),
        (Place, Annotated[UUID, "note"]),
        (Place, "Unknown"),
        (Place, Coroutine[Any, Any, UUID]),
        (Place, Awaitable[UUID]),
        (Place, T),
        (Drop, None),
        (Drop, "None"),
        (Loading, BigOrder),
        (Finding, Order),
        (Finding, None),
        (Finding, BigOrder | None),
        (Finding, Optional[Order]),  # noqa: UP045 - the old way is read too
        (Listing, list[str]),
        (Listing, list),
        (Weighing, int),
        (Weighing, Grams),
        (Weighing, Literal[1]),
        (Naming, int),
    ],
    ids=lambda given: str(given) if not isinstance(given, str) else f"text {given}",
)
def test_result_fits(command: type, given: Any) -> None:
    """A handler that returns what its command promises, or what cannot be judged, is no fault."""
    assert faults(returning(given), command) == []


def test_result_not_annotated() -> None:
    """A handler without a return annotation is no fault."""
    assert faults(first_any, Place) == []


@pytest.mark.parametrize(
    ("command", "given", "sentence"),
    [
        (Place, int, "it returns int, but Place promises UUID"),
        (Place, None, "it returns None, but Place promises UUID"),
        (Place, "str", "it returns str, but Place promises UUID"),
        (Place, UUID | None, "it returns uuid.UUID | None, but Place promises UUID"),
        (Drop, UUID, "it returns UUID, but Drop promises None"),
        (Loading, Coroutine[Any, Any, str], "it returns str, but Loading promises Order"),
        (Listing, tuple[str, ...], "it returns tuple[str, ...], but Listing promises list[str]"),
        (Weighing, str, "it returns str, but Weighing promises float"),
    ],
    ids=["class", "none", "text", "optional", "something for nothing", "coroutine", "container", "number"],
)
def test_result_does_not_fit(command: type, given: Any, sentence: str) -> None:
    """A handler that returns something else is a fault that names both."""
    assert [f"handler shop.it: {sentence}"] == faults(returning(given), command)


def test_fault_names_the_place() -> None:
    """A fault ends with the file and line of the handler."""
    (fault,) = signature_faults(described(wrong_class))
    assert fault.endswith(f"{HERE}:{wrong_class.__code__.co_firstlineno})")


def test_names_of_the_enclosing_function() -> None:
    """Annotations as text may use what the enclosing function knows, even if it comes later or never."""

    def make(bind: bool) -> Callable[..., Any]:
        async def it(event: "Local") -> "Local":
            return Local()

        if bind:

            class Local(Event):
                pass

        return it

    assert ["handler shop.it: its first parameter is Local, but it is registered for Placed"] == faults(make(True))
    assert faults(make(False)) == []


def test_postponed_annotations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Postponed annotations are read in the handler's own file; names for type checkers only are not judged."""
    (tmp_path / "postponed_handlers.py").write_text(
        "from __future__ import annotations\n"
        "from typing import TYPE_CHECKING\n"
        "from eventbus import Event\n"
        "if TYPE_CHECKING:\n"
        "    from nowhere import Session\n"
        "class Sold(Event): ...\n"
        "async def wrong(event: Sold, session: Session) -> Session: ...\n"
        "class Caller:\n"
        "    async def __call__(self, event: Sold) -> None: ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("postponed_handlers")
    try:
        assert faults(module.wrong, module.Sold) == []
        for func in (module.wrong, module.Caller()):
            assert ["handler shop.it: its first parameter is Sold, but it is registered for Placed"] == faults(func)
    finally:
        del sys.modules["postponed_handlers"]


@pytest.mark.parametrize(
    ("given", "classes"),
    [
        (Paid, (Paid,)),
        (None, (type(None),)),
        (Paid | None, (Paid, type(None))),
        (Optional[Paid], (Paid, type(None))),  # noqa: UP045 - the old way is read too
        (list[Paid], (Paid,)),
        (list[Paid | Plain] | None, (Paid, Plain, type(None))),
        (tuple[Paid, Plain], (Paid, Plain)),
        (tuple[Paid, ...], (Paid,)),
        (Annotated[Paid, "note"], (Paid,)),
        (Sequence[Paid], (Paid,)),
        ("list[Paid]", (Paid,)),
        (Any, ()),
        (dict[str, Paid], ()),
        ("Unknown", ()),
    ],
    ids=str,
)
def test_returned_messages(given: Any, classes: tuple[type, ...]) -> None:
    """What a listener returns is read alone, optional, in a union, and in sequences."""
    assert classes == returned_messages(described(returning(given), name="it"))


def test_command_handler_returns_its_result() -> None:
    """A command's handler answers; what it returns is nobody's message."""
    assert returned_messages(described(returning(Paid), Place)) == ()
    assert [True, False] == [described(listen, one).is_command_handler for one in (Place, Placed)]
