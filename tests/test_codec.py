"""The codec: what it writes it reads back, and what it refuses it refuses with a reason that tells no secrets."""

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from enum import Enum
from typing import Annotated, Any, Generic, Literal, TypeVar
from uuid import UUID

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    Json,
    PlainSerializer,
    RootModel,
    SecretStr,
    computed_field,
    field_validator,
)

from eventbus import Command, Event
from eventbus.codec import JSONCodec
from eventbus.errors import DecodeError, EncodeError
from eventbus.limits import Limits
from eventbus.message import message

T = TypeVar("T")


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


class Line(BaseModel):
    sku: str
    price: Decimal
    tags: frozenset[str] = frozenset()


class Everything(Event, name="test.everything", key="id"):
    id: UUID
    text: str
    whole: int
    real: float
    maybe: float | None
    truth: bool
    moment: datetime
    day: date
    span: timedelta
    colour: Colour
    lines: tuple[Line, ...]
    counts: dict[int, list[float]]
    anything: Any
    nick: str = Field("", alias="nickName")


@message(name="test.plain")
@dataclass(frozen=True)
class Plain:
    id: UUID
    names: list[str]
    share: float | None = None
    parts: dict[str, "Plain | None"] = field(default_factory=dict)


class Paid(Event, name="shop.paid"):
    sum: int = Field(ge=0)
    note: str = ""


ALL_TEXT = st.text(st.characters(codec=None), max_size=20)
ALL_FLOATS = st.floats()
FINITE = st.floats(allow_nan=False, allow_infinity=False)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | ALL_FLOATS | ALL_TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.integers() | ALL_TEXT, inner, max_size=3),
    max_leaves=8,
)
LINES = st.builds(
    Line, sku=ALL_TEXT, price=st.decimals(allow_nan=False, allow_infinity=False), tags=st.frozensets(ALL_TEXT)
)
EVERYTHING = st.builds(
    Everything,
    id=st.uuids(),
    text=ALL_TEXT,
    whole=st.integers(),
    real=ALL_FLOATS,
    maybe=st.none() | ALL_FLOATS,
    truth=st.booleans(),
    moment=st.datetimes(timezones=st.just(UTC)),
    day=st.dates(),
    span=st.timedeltas(timedelta(days=-99_999), timedelta(days=99_999)),
    colour=st.sampled_from(Colour),
    lines=st.lists(LINES, max_size=3).map(tuple),
    counts=st.dictionaries(st.integers(), st.lists(ALL_FLOATS, max_size=3), max_size=3),
    anything=ANYTHING,
    nickName=ALL_TEXT,
)
PLAIN: st.SearchStrategy[Plain] = st.deferred(
    lambda: st.builds(
        Plain,
        id=st.uuids(),
        names=st.lists(ALL_TEXT, max_size=3),
        share=st.none() | ALL_FLOATS,
        parts=st.dictionaries(ALL_TEXT, st.none() | PLAIN, max_size=2),
    )
)


@pytest.fixture(scope="module")
def codec() -> JSONCodec:
    return JSONCodec(Limits())


def plain_json(value: object) -> object:
    """Return what is left of a free value in JSON, where every key is a text."""
    if isinstance(value, dict):
        return {str(key): plain_json(inner) for key, inner in value.items()}
    return [plain_json(inner) for inner in value] if isinstance(value, list) else value


@given(EVERYTHING | PLAIN)
def test_accepted_message_comes_back(original: Everything | Plain) -> None:
    """A message is refused when encoded, or it comes back as it was: nothing is lost in between."""
    codec = JSONCodec(Limits())
    try:
        body = codec.encode(original)
    except EncodeError:
        return
    back = codec.decode(body, type(original))
    if isinstance(original, Everything):
        assert plain_json(original.anything) == back.anything
        original, back = (one.model_copy(update={"anything": None}) for one in (original, back))
    assert original == back


@given(
    st.builds(
        Plain,
        id=st.uuids(),
        names=st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=5),
        share=st.none() | FINITE,
    )
)
@example(Plain(UUID(int=0), ["null"], None))
@example(Plain(UUID(int=0), ["**********"], None))
@example(Plain(UUID(int=0), ["\ufffd"], None))
@example(Plain(UUID(int=0), ["NaN", "\0", "\u2028"], 1e308))
def test_ordinary_message_is_accepted(original: Plain) -> None:
    """Every text of Unicode and every finite number travels."""
    codec = JSONCodec(Limits())
    assert original == codec.decode(codec.encode(original), Plain)


class Aliased(BaseModel):
    order_id: int = Field(alias="orderId")


class Counted(BaseModel):
    model_config = ConfigDict(extra="forbid")
    a: int

    @computed_field  # type: ignore[prop-decorator]
    @property
    def twice(self) -> int:
        return self.a * 2


class Strict(BaseModel):
    model_config = ConfigDict(strict=True)
    id: UUID
    moment: datetime


class Packed(BaseModel):
    inner: Json[list[int]]


class Page(BaseModel, Generic[T]):
    items: list[T]


class Revealed(BaseModel):
    password: Annotated[SecretStr, PlainSerializer(SecretStr.get_secret_value, return_type=str)]


class Sets(BaseModel):
    names: set[str]


class PlaceOrder(Command[UUID], name="shop.place_order"):
    sku: str


@dataclass
class Loose:
    share: float


@pytest.mark.parametrize(
    "original",
    [
        Aliased(orderId=1),
        Counted(a=1),
        Strict(id=UUID(int=1), moment=datetime(2030, 1, 1, tzinfo=UTC)),
        Packed(inner="[1, 2]"),
        Page[int](items=[1]),
        RootModel[list[int]]([1, 2]),
        Revealed(password=SecretStr("x")),
        Sets(names={str(n) for n in range(100)}),
        PlaceOrder(sku="a"),
        Loose(1),
    ],
    ids=lambda value: type(value).__name__,
)
def test_ways_of_pydantic_travel(codec: JSONCodec, original: object) -> None:
    """Aliases, computed fields, strict models, generics, root models and plain dataclasses come back as they were."""
    assert codec.prepare(type(original)) is None
    assert original == codec.decode(codec.encode(original), type(original))


class Free(Event, name="test.free"):
    value: Any = None
    share: float | None = None


class Base(BaseModel):
    a: int = 1


class Derived(Base):
    b: int = 2


class Masked(BaseModel):
    password: SecretStr


class Renamed(BaseModel):
    model_config = ConfigDict(populate_by_name=True)
    sku: str = Field("", validation_alias="sku_in", serialization_alias="sku_out")


class Growing(BaseModel):
    text: str

    @field_validator("text", mode="before")
    @classmethod
    def _grow(cls, value: str) -> str:
        return value + "!"


class Excluded(BaseModel):
    hidden: int = Field(exclude=True)


class Loop:
    def __init__(self) -> None:
        self.self = self


def nested(depth: int) -> list[Any]:
    """Return lists in lists."""
    value: list[Any] = []
    for _ in range(depth - 1):
        value = [value]
    return value


LOOP: list[Any] = []
LOOP.append(LOOP)

UNWRITABLE = {
    "NaN": (Free(share=math.nan), "not finite"),
    "infinity": (Free(share=math.inf), "not finite"),
    "NaN in a free field": (Free(value=[{"a": (1.0, -math.inf)}]), "not finite"),
    "NaN in a deque": (Free(value=deque([math.nan])), "not finite"),
    "an object": (Free(value=object()), "cannot write"),
    "a lone surrogate": (Free(value="\ud800"), "cannot write"),
    "a lone surrogate in a key": (Free(value={"\ud800": 1}), "cannot write"),
    "a lone surrogate in a typed key": (Plain(UUID(int=0), [], None, {"a\ud800": None}), "lone surrogate"),
    "bytes that are no text": (Free(value=b"\xff"), "cannot write"),
    "a circle": (Free(value=LOOP), "cannot write"),
    "too many digits": (Free(value=10**4_300), "4300 digits"),
    "two keys that look alike": (Free(value={1: "a", "1": "b"}), "duplicate keys"),
    "64 levels below the message": (Free(value=nested(64)), "nested"),
    "a thousand levels": (Free(value=nested(1_000)), "cannot write"),
    "too large": (Free(value="x" * 262_144), "more than Limits(body=262144)"),
    "a secret": (Masked(password=SecretStr("x")), "masked"),
    "a value that was never valid": (Paid.model_construct(sum=-1), "sum (greater_than_equal)"),
    "a dataclass of wrong types": (Plain(id=5, names="a"), "does not accept"),  # type: ignore[arg-type]
    "another name on the way out": (Renamed(sku="a"), "not come back"),
    "a required field left out": (Excluded(hidden=1), "hidden (missing)"),
    "a validator that changes": (Growing(text="a"), "not come back"),
    "no message": (Loop(), "no JSON schema for Loop"),
}


@pytest.mark.parametrize(("original", "reason"), UNWRITABLE.values(), ids=UNWRITABLE)
def test_message_that_would_be_lost_is_refused(codec: JSONCodec, original: object, reason: str) -> None:
    """What would not arrive as it was sent is refused at publish, with the reason."""
    with pytest.raises(EncodeError) as caught:
        codec.encode(original)
    assert reason in caught.value.reason


def test_encode_error_names_the_message(codec: JSONCodec) -> None:
    """The error has the name on the wire."""
    with pytest.raises(EncodeError) as caught:
        codec.encode(Free(value=object()))
    assert caught.value.message == "test.free"


@pytest.mark.parametrize("size", [-1, 0, 1])
def test_size_is_exact(size: int) -> None:
    """A body at its ceiling is written, one byte more is refused."""
    codec, original = JSONCodec(Limits(body=100)), Free(value="x" * (100 - 25 + size))
    if size > 0:
        with pytest.raises(EncodeError, match="body"):
            codec.encode(original)
    else:
        assert 100 + size == len(codec.encode(original))


UNREADABLE = {
    "nothing": (b"", "no JSON"),
    "no object": (b"[]", "Paid does not accept body (model_type)"),
    "missing": (b"{}", "Paid does not accept sum (missing)"),
    "wrong": (b'{"sum":"hunter2"}', "sum (int_parsing)"),
    "constraint": (b'{"sum":-12345}', "sum (greater_than_equal)"),
    "two": (b'{"sum":{},"note":[]}', "sum (int_type), note (string_type)"),
    "NaN": (b'{"sum":NaN}', "NaN"),
    "infinity ignored by the type": (b'{"sum":1,"x":[1e999]}', "bounds"),
    "duplicate": (b'{"sum":1,"sum":2}', "duplicate"),
    "duplicate ignored by the type": (b'{"sum":1,"x":{"a":1,"a":1}}', "duplicate"),
    "deep": (b'{"sum":1,"x":' + b"[" * 64 + b"]" * 64 + b"}", "nested"),
    "lone surrogate": (b'{"sum":1,"note":"\\ud800"}', "surrogate"),
    "digits": (b'{"sum":' + b"9" * 4_301 + b"}", "digits"),
    "UTF-8": (b'{"sum":1,"note":"\xc3"}', "no UTF-8"),
    "rest": (b'{"sum":1},"x":{}', "no JSON"),
    "pickle": (b"cos\nsystem\n(S'true'\ntR.", "no JSON"),
    "gzip": (b"\x1f\x8b\x08\x00", "no UTF-8"),
}


@pytest.mark.parametrize(("body", "reason"), UNREADABLE.values(), ids=UNREADABLE)
def test_wrong_body_is_refused(codec: JSONCodec, body: bytes, reason: str) -> None:
    """Bytes that are no such message are refused, with the fields but nothing of what they hold."""
    with pytest.raises(DecodeError) as caught:
        codec.decode(body, Paid)
    assert reason in caught.value.reason
    assert not {"hunter2", "12345"} & set(str(caught.value).split("'"))
    assert None is caught.value.__cause__


class Cat(BaseModel):
    kind: Literal["cat"]


class Dog(BaseModel):
    kind: Literal["dog"]


class Owner(BaseModel):
    model_config = ConfigDict(extra="forbid")
    pet: Annotated[Cat | Dog, Field(discriminator="kind")]
    prices: dict[str, int] = {}
    many: list[int] = []

    @field_validator("prices")
    @classmethod
    def _crash(cls, value: dict[str, int]) -> dict[str, int]:
        if "crash" in value:
            raise KeyError(f"secret {value['crash']}")
        if "refuse" in value:
            raise ValueError(f"secret {value['refuse']}")
        return value


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'{"pet":{"kind":"secret"}}', "Owner does not accept pet (union_tag_invalid)"),
        (b'{"pet":{"kind":"cat"},"prices":{"refuse":1234}}', "Owner does not accept prices (value_error)"),
        (b'{"pet":{"kind":"cat"},"prices":{"crash":1234}}', "a validator raised KeyError"),
        (
            b'{"pet":{"kind":"cat"},"prices":{"a\\n\\u001b[1m":"x"}}',
            "Owner does not accept prices.a??[1m (int_parsing)",
        ),
        (
            b'{"pet":{"kind":"cat"},"many":["a","b","c","d","e","f","g"]}',
            f"Owner does not accept {', '.join(f'many.{n} (int_parsing)' for n in range(5))} and 2 more",
        ),
    ],
    ids=["tag", "refusing validator", "crashing validator", "key of a dict", "many"],
)
def test_reason_quotes_nothing(codec: JSONCodec, body: bytes, expected: str) -> None:
    """The reason is one short line of field names and kinds of error, whatever validators say."""
    with pytest.raises(DecodeError) as caught:
        codec.decode(body, Owner)
    assert expected == str(caught.value)


class Handle:
    pass


class Arbitrary(BaseModel):
    model_config = ConfigDict(arbitrary_types_allowed=True)
    handle: Handle


class Calling(BaseModel):
    call: Callable[[], None]


class Unknown(BaseModel):
    later: "NowhereDefined"  # type: ignore[name-defined]  # noqa: F821


class Defaulted(BaseModel):
    model_config = ConfigDict(arbitrary_types_allowed=True)
    share: float | None = Field(default_factory=lambda: None)
    odd: int = Handle()  # type: ignore[assignment]


@pytest.mark.parametrize("kind", [Arbitrary, Calling, Unknown, Handle])
def test_type_without_schema_is_a_fault(codec: JSONCodec, kind: type) -> None:
    """A type for which pydantic builds no JSON schema is told in one sentence at start-up."""
    fault = codec.prepare(kind) or ""
    assert f"pydantic builds no JSON schema for {kind.__name__}" == fault.partition(":")[0]
    assert len(fault.splitlines()) == 1


@pytest.mark.parametrize("kind", [Everything, Plain, Paid, Page[int], PlaceOrder, Defaulted])
def test_type_with_schema_is_no_fault(codec: JSONCodec, kind: type) -> None:
    """A type that can travel has no fault, and preparing it twice changes nothing."""
    assert [codec.prepare(kind), codec.prepare(kind)] == [None, None]


class SameAlias(BaseModel):
    """Write two fields under one name."""

    first: int = Field(alias="a")
    second: int = Field(alias="a")


class AliasOfAnother(BaseModel):
    """Write one field under the name of another."""

    first: int = Field(1, serialization_alias="second")
    second: int = 1


@dataclass
class Around:
    """Have one of them inside."""

    inside: list[SameAlias | None]


@pytest.mark.parametrize(
    "original", [SameAlias(a=1), AliasOfAnother(), Around([SameAlias(a=1)])], ids=lambda one: type(one).__name__
)
def test_two_fields_under_one_name_are_a_fault(original: Any) -> None:
    """An object that would be written with one key twice is found at start-up, and is not written."""
    assert "under one name" in (JSONCodec().prepare(type(original)) or "")
    with pytest.raises(EncodeError, match="under one name"):
        JSONCodec().encode(original)


def test_unprepared_type_is_prepared_when_needed() -> None:
    """A codec that was never prepared works the same."""
    assert Paid(sum=1) == JSONCodec().decode(JSONCodec().encode(Paid(sum=1)), Paid)
    with pytest.raises(DecodeError, match="no JSON schema"):
        JSONCodec().decode(b"{}", Arbitrary)


@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(body: bytes) -> None:
    """Whatever the bytes are, nothing but a message or a decode error comes out."""
    codec = JSONCodec()
    for kind in (Paid, Free, Plain):
        try:
            found = codec.decode(body, kind)
        except DecodeError:
            continue
        assert kind is type(found)
