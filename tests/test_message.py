"""Messages: what a class is called on the wire, what it promises, and what can be none."""

import dataclasses
import importlib
import sys
from pathlib import Path
from typing import Annotated, Any, Generic, NamedTuple, TypedDict, TypeVar
from uuid import UUID

import pydantic
import pytest
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass

from eventbus import Command, Event, message
from eventbus.message import MessageSpec, check_message_type, is_command, result_type, spec_of

T = TypeVar("T")
U = TypeVar("U")


class Row:
    """Stand for a class mapped by an ORM, of which pydantic knows nothing."""


class Bare(Command):
    pass


class Nothing(Command[None]):
    pass


class Place(Command[UUID], name="shop.place", version=3, key="customer"):
    customer: str


class Load(Command[Row]):
    pass


class Find(Command["Row | None"]):
    pass


class Base(Command[T]):
    pass


class Number(Base[int]):
    pass


class Listing(Command[list[T]], Generic[T]):
    pass


class Names(Listing[str]):
    pass


class Table(Command[dict[U, list[T]]], Generic[T, U]):
    pass


class Prices(Table[int, str]):
    pass


class Deeper(Prices):
    pass


class Either(Command[T | None], Generic[T]):
    pass


class Maybe(Either[bytes]):
    pass


class Placed(Event, name="shop.placed", version=2, key="order"):
    order: int
    note: str = ""


class PlacedAbroad(Placed):
    country: str = "FR"


class Loud(Event):
    pass


@pytest.mark.parametrize(
    ("command", "result"),
    [
        (Bare, type(None)),
        (Command, type(None)),
        (Nothing, type(None)),
        (Place, UUID),
        (Load, Row),
        (Number, int),
        (Base[bytes], bytes),
        (Names, list[str]),
        (Listing[int], list[int]),
        (Prices, dict[str, list[int]]),
        (Deeper, dict[str, list[int]]),
        (Maybe, bytes | None),
    ],
    ids=lambda given: getattr(given, "__name__", str(given)),
)
def test_result_type(command: type, result: Any) -> None:
    """The result type is read off the class, through generic bases of any depth."""
    assert result == result_type(command)


def test_result_type_forward_reference() -> None:
    """A result named by a forward reference stays that reference."""
    assert "Row | None" == getattr(result_type(Find), "__forward_arg__", result_type(Find))


def test_result_type_with_unhashable_metadata() -> None:
    """A result annotated with what cannot be hashed is read all the same."""

    class Odd(Command[Annotated[list[str], ["unhashable"]]]):
        pass

    assert Annotated[list[str], ["unhashable"]] == result_type(Odd)


@pytest.mark.parametrize(
    ("cls", "spec"),
    [
        (Place, MessageSpec("shop.place", 3, "customer")),
        (Placed, MessageSpec("shop.placed", 2, "order")),
        (Loud, MessageSpec("Loud", 1, None)),
        (Command, MessageSpec("Command", 1, None)),
        (PlacedAbroad, MessageSpec("PlacedAbroad", 1, "order")),
        (Base[int], MessageSpec("Base[int]", 1, None)),
    ],
    ids=lambda given: getattr(given, "__name__", ""),
)
def test_spec(cls: type, spec: MessageSpec) -> None:
    """Name, version and key come from the class keywords; a name is a class's own, a key is inherited."""
    assert spec == spec_of(cls)


def test_key_overridden() -> None:
    """A subclass may be ordered by another field than its base."""

    class Noted(Placed, name="shop.noted", key="note"):
        pass

    assert MessageSpec("shop.noted", 1, "note") == spec_of(Noted)


def test_key_inherited_through_undeclared_class() -> None:
    """A key reaches a declared class below one that says nothing."""

    class Farther(PlacedAbroad, name="shop.farther"):
        pass

    assert MessageSpec("shop.farther", 1, "order") == spec_of(Farther)


def test_misspelt_keyword() -> None:
    """A class keyword that nobody knows is refused; those of pydantic's configuration work as ever."""
    with pytest.raises(TypeError) as caught:

        class Misspelt(Event, nmae="x", verison=2):
            pass

    assert "class Misspelt takes the keywords name, version and key, not nmae, verison" == str(caught.value)

    class Forbidding(Event, name="shop.forbidding", extra="forbid"):
        pass

    assert "forbid" == Forbidding.model_config.get("extra")


@pytest.mark.parametrize("name", ["", " shop", "shop ", "shop.*", "a\nb", "a\0b", "x" * 201, 5, b"shop", ["shop"]])
def test_bad_name(name: Any) -> None:
    """A name that cannot stand on the wire or in a route is refused."""
    with pytest.raises(TypeError, match="a message name"):
        type("Bad", (Event,), {}, name=name)
    with pytest.raises(TypeError, match="a message name"):
        message(name=name)(dataclasses.make_dataclass("Bad", []))


@pytest.mark.parametrize("version", [0, -1, True, 1.0, "one"])
def test_bad_version(version: Any) -> None:
    """A version that is no whole number from 1 is refused."""
    with pytest.raises(TypeError, match="a message version is a whole number from 1"):
        type("Bad", (Command,), {}, version=version)
    with pytest.raises(TypeError, match="a message version is a whole number from 1"):
        message(version=version)(dataclasses.make_dataclass("Bad", []))


@pytest.mark.parametrize("key", ["", "order.id", "7", ("order",)])
def test_bad_key(key: Any) -> None:
    """A key that cannot be the name of a field is refused."""
    with pytest.raises(TypeError, match="key= names a field of the message"):
        type("Bad", (Event,), {}, key=key)
    with pytest.raises(TypeError, match="key= names a field of the message"):
        message(key=key)(dataclasses.make_dataclass("Bad", []))


def test_keys_of_messages() -> None:
    """The key of a message is the text of its field; no field and None make no key."""

    class Moved(Event, key="where"):
        where: UUID | None = None

    assert "7" == spec_of(Placed).key_of(Placed(order=7))
    assert str(UUID(int=1)) == spec_of(Moved).key_of(Moved(where=UUID(int=1)))
    assert spec_of(Moved).key_of(Moved()) is None
    assert spec_of(Loud).key_of(Loud()) is None


@pytest.mark.parametrize("one", [Place(customer="a"), Placed(order=1)], ids=["command", "event"])
def test_frozen(one: Any) -> None:
    """Messages on our bases cannot be changed, and can be hashed."""
    with pytest.raises(ValidationError, match="frozen"):
        one.customer = one.order = "b"
    assert hash(one) == hash(one.model_copy())


def test_user_configuration() -> None:
    """A class may configure pydantic as usual and stays frozen."""

    class Strict(Event, name="shop.strict"):
        model_config = ConfigDict(extra="forbid")
        order: int

    with pytest.raises(ValidationError, match="Extra inputs"):
        Strict(order=1, sku="x")  # type: ignore[call-arg]  # that is the point
    assert True is Strict.model_config.get("frozen")


def test_pydantic_hook_still_runs() -> None:
    """A class may have pydantic's own subclass hook beside our keywords."""
    seen: list[str] = []

    class Root(Event):
        @classmethod
        def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
            seen.append(cls.__name__)

    class Leaf(Root, name="shop.leaf"):
        pass

    assert ["Leaf"] == seen
    assert "shop.leaf" == spec_of(Leaf).name


def test_message_on_dataclass() -> None:
    """A dataclass gets its name, version and key, and stays the class it is."""

    @dataclasses.dataclass(frozen=True)
    class Invoiced:
        invoice: str

    decorated = message(name="billing.invoiced", version=2, key="invoice")(Invoiced)
    assert decorated is Invoiced
    assert MessageSpec("billing.invoiced", 2, "invoice") == spec_of(Invoiced)
    assert "7" == spec_of(Invoiced).key_of(Invoiced("7"))


def test_message_on_slotted_dataclass() -> None:
    """A dataclass with slots is no exception."""

    @message(name="billing.slotted")
    @dataclasses.dataclass(frozen=True, slots=True)
    class Slotted:
        invoice: str

    assert "billing.slotted" == spec_of(Slotted).name


def test_message_bare() -> None:
    """Without arguments the decorator gives the class name."""

    @message
    @dataclasses.dataclass
    class Plain:
        pass

    assert MessageSpec("Plain") == spec_of(Plain)


def test_message_on_foreign_classes() -> None:
    """Somebody else's pydantic model, and a pydantic dataclass, can be named from outside."""

    class Foreign(BaseModel):
        size: int

    @pydantic_dataclass
    class Mixed:
        size: int

    message(name="foreign.model", key="size")(Foreign)
    message(name="foreign.dataclass")(Mixed)
    assert MessageSpec("foreign.model", 1, "size") == spec_of(Foreign)
    assert "foreign.dataclass" == spec_of(Mixed).name


def test_message_twice() -> None:
    """Saying the same twice is fine, saying something else is refused: two teams would speak of two things."""

    class Foreign(BaseModel):
        size: int

    message(name="one")(Foreign)
    message(name="one")(Foreign)
    with pytest.raises(TypeError, match="Foreign is declared already, as 'one': declare it once"):
        message(name="two")(Foreign)
    with pytest.raises(TypeError, match=r"Placed is declared already, as 'shop\.placed'"):
        message(key="note")(Placed)


def test_subclass_of_declared_dataclass() -> None:
    """A subclass of a declared dataclass has a name of its own and the key of its base."""

    @message(name="billing.paid", key="invoice")
    @dataclasses.dataclass
    class Paid:
        invoice: str

    @dataclasses.dataclass
    class PaidTwice(Paid):
        pass

    assert MessageSpec("PaidTwice", 1, "invoice") == spec_of(PaidTwice)


class Shape(TypedDict):
    size: int


class Point(NamedTuple):
    size: int


@pytest.mark.parametrize("cls", [Shape, Point, Row, int, dict, Exception, object])
def test_no_message_class(cls: type) -> None:
    """A class that is neither a pydantic model nor a dataclass is refused, with a word on the order of decorators."""
    with pytest.raises(TypeError, match="a message is an instance"):
        check_message_type(type)
    expected = (
        f"{cls.__name__} is neither a pydantic model nor a dataclass, so it cannot be a message "
        "(@message stands above @dataclass)"
    )
    for check in (check_message_type, message, message(name="x")):
        with pytest.raises(TypeError) as caught:
            check(cls)
        assert expected == str(caught.value)


@pytest.mark.parametrize("thing", [None, "Placed", Placed(order=1), list[int], lambda: None])
def test_no_class(thing: Any) -> None:
    """What is no class is refused by its representation."""
    with pytest.raises(TypeError, match="a message type is a class, not"):
        check_message_type(thing)


def test_kinds() -> None:
    """A command is what derives from Command; everything else is an event."""
    assert [True, True, False, False] == [is_command(cls) for cls in (Place, Names, Placed, Shape)]


def test_open_api_name() -> None:
    """A command's JSON schema has its own class name and none of our documentation."""
    schema = Place.model_json_schema()
    assert "Place" == schema["title"]
    assert "description" not in schema


def test_deferred_annotations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages work in a file with postponed annotations and a result defined below them."""
    (tmp_path / "deferred_messages.py").write_text(
        "from __future__ import annotations\n"
        "from eventbus import Command, Event\n"
        "class Load(Command['Row'], name='deferred.load', key='id'):\n"
        "    id: Number\n"
        "class Row: ...\n"
        "Number = int\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("deferred_messages")
    try:
        module.Load.model_rebuild()
        assert MessageSpec("deferred.load", 1, "id") == spec_of(module.Load)
        assert 7 == module.Load(id="7").id
    finally:
        del sys.modules["deferred_messages"]


def test_bases_are_not_messages_by_themselves() -> None:
    """Making a generic command concrete declares nothing."""
    assert "__eventbus_message__" not in Command[int].__dict__
    assert pydantic.BaseModel in Command.__mro__
