"""Strict JSON: what it refuses, quickly, and what it leaves alone."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from eventbus._strict_json import check_json, member, parse_json
from eventbus.errors import DecodeError

ROOT = Path(__file__).parents[1]

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=20,
)

REFUSED = {
    "nothing": (b"", "no JSON"),
    "no JSON": (b"{a: 1}", "no JSON"),
    "a rest": (b"{} {}", "no JSON: Extra data"),
    "truncated": (b'{"a": "b', "no JSON"),
    "a byte order mark": (b"\xef\xbb\xbf{}", "no JSON"),
    "a raw control character": (b'"\x00"', "no JSON"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "no UTF-8"),
    "a wrong byte": (b'"\xff"', "no UTF-8 (byte 1)"),
    "an encoded surrogate": (b'"\xed\xa0\x80"', "no UTF-8"),
    "a lone surrogate": (b'"\\ud800"', "lone surrogate"),
    "a lone surrogate in capitals": (b'"\\uDC00"', "lone surrogate"),
    "a lone surrogate in a key": (b'{"\\uDbff": 1}', "lone surrogate"),
    "a surrogate pair turned round": (b'"\\udc00\\ud800"', "lone surrogate"),
    "NaN": (b"[NaN]", "NaN is no JSON"),
    "Infinity": (b"[Infinity]", "Infinity is no JSON"),
    "minus Infinity": (b"[-Infinity]", "-Infinity is no JSON"),
    "1e999": (b"[1e999]", "beyond all bounds"),
    "-1e999": (b"[-1e999]", "beyond all bounds"),
    "many digits and a point": (b"9" * 400 + b".0", "beyond all bounds"),
    "4,301 digits": (b"9" * 4_301, "more than 4300 digits"),
    "minus 4,301 digits": (b"-" + b"9" * 4_301, "more than 4300 digits"),
    "a key twice": (b'{"a": 1, "a": 1}', "duplicate keys"),
    "a key twice, escaped": (b'{"a": 1, "\\u0061": 2}', "duplicate keys"),
    "a key twice, deep inside": (b'[{"b": [{"a": 1, "a": 2}]}]', "duplicate keys"),
    "5 levels": (b"[[[[[]]]]]", "nested more than 4 levels"),
    "5 levels of objects": (b'{"a":{"a":{"a":{"a":{}}}}}', "nested more than 4 levels"),
    "5 levels behind a bracket in a text": (b'["]]]]\\"]", [[[[]]]]]', "nested more than 4 levels"),
}

ACCEPTED = {
    "4 levels": b"[[[[1]]]]",
    "brackets in texts": b'["[[[[[[", "{{{{\\"{{{{", {"[[[": "\\\\"}]',
    "many brackets side by side": b"[[], [], [], {}, {}, {}]",
    "4,300 digits": b"-" + b"9" * 4_300,
    "a surrogate pair": b'"\\ud83d\\ude00 \\\\ud800"',
    "blanks": b' \t\r\n{"a": 1}\n',
    "one key in two objects": b'[{"a": 1}, {"a": 1}]',
}


@pytest.mark.parametrize(("data", "reason"), REFUSED.values(), ids=REFUSED)
def test_ambiguous_text_is_refused(data: bytes, reason: str) -> None:
    """A text that readers could understand differently, or not at all, is refused with the reason."""
    with pytest.raises(DecodeError) as caught:
        parse_json(data, depth=4)
    assert reason in str(caught.value)


@pytest.mark.parametrize("data", ACCEPTED.values(), ids=ACCEPTED)
def test_legal_text_is_read(data: bytes) -> None:
    """What looks dangerous but is not gets through unchanged."""
    assert json.loads(data) == parse_json(data, depth=4)


@given(VALUES)
def test_every_value_is_read(value: object) -> None:
    """What a JSON writer writes is read back equal."""
    assert value == parse_json(json.dumps(value).encode(), depth=100)
    assert value == parse_json(json.dumps(value, ensure_ascii=False).encode(), depth=100)


def nesting(value: object) -> int:
    """Count levels the slow way."""
    if not isinstance(value, list | dict):
        return 0
    return 1 + max(map(nesting, value.values() if isinstance(value, dict) else value), default=0)


@given(VALUES)
@example(["[" * 100])
def test_depth_is_exact(value: object) -> None:
    """The permitted depth is read and one level less is refused."""
    data, depth = json.dumps(value).encode(), nesting(value)
    assert value == parse_json(data, depth)
    if depth:
        with pytest.raises(DecodeError, match="nested"):
            parse_json(data, depth - 1)


@given(st.binary(max_size=40) | st.text('"\\[]{}:,0eu ud8-.', max_size=40).map(str.encode))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    """Whatever the bytes are, nothing but a value or a decode error comes out."""
    try:
        value = parse_json(data, depth=8)
    except DecodeError:
        return
    assert json.loads(data) == value


MEMBERS = st.tuples(st.text("ab{,:}", max_size=2), st.text('ab{},:"', max_size=3) | st.integers() | st.none())


@given(
    st.lists(MEMBERS, max_size=4).map(
        lambda them: f"{{{','.join(f'{json.dumps(k)}:{json.dumps(v)}' for k, v in them)}}}"
    )
    | st.text('"{}:,01-.ab', max_size=20).map(lambda text: f'{{"a":{text}}}')
)
@example('{"a":",","b":1,"b":2}')
@example('{":":",",":":""}')
@example('{"a":1,}')
@example('{"a":01}')
@example('{"a":1.}')
@example('{"a":1"b":2}')
def test_a_look_decides_as_reading_does(text: str) -> None:
    """What passes at a look is what would be read, and what would be refused is refused for the same reason."""
    said: list[str] = []
    for look in (check_json, parse_json):
        try:
            look(text.encode(), depth=4)
        except DecodeError as error:
            said.append(str(error))
        else:
            said.append("")
    assert said[0] == said[1]


@given(
    st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=5), VALUES, min_size=1),
    st.sampled_from(["", " ", "\n\t"]),
    st.data(),
)
def test_member_is_verbatim(value: dict[str, object], blank: str, data: st.DataObject) -> None:
    """A member is taken out byte for byte, wherever it stands and however the text is laid out."""
    name = data.draw(st.sampled_from(sorted(value)))
    pieces = {key: json.dumps(inner, indent=2, ensure_ascii=False) for key, inner in value.items()}
    inside = f"{blank},{blank}".join(f"{json.dumps(key)}{blank}:{blank}{piece}" for key, piece in pieces.items())
    assert pieces[name].encode() == member(f"{blank}{{{blank}{inside}{blank}}}".encode(), name)


def test_deep_text_is_refused_at_once() -> None:
    """A text nested a million levels deep is refused by every reader, and the process lives."""
    program = """
from eventbus import Event, Limits
from eventbus._strict_json import parse_json
from eventbus.codec import JSONCodec
from eventbus.cloudevents import from_binary, from_structured
from eventbus.errors import DecodeError

class Anything(Event):
    value: object

deep = 10**6
head = b'{"specversion":"1.0","id":"1","type":"t","source":"s","time":"2030-01-01T00:00:00Z"'
for limits in (Limits(), Limits(body=10**8)):
    for opening, closing in ((b"[", b"]"), (b'{"a":', b"}"), (b"[", b"")):
        nested = opening * deep + b"1" + closing * deep
        for read in (
            lambda: parse_json(nested, limits.depth),
            lambda: parse_json(nested, 10 * deep),
            lambda: from_structured(nested, limits),
            lambda: from_structured(head + b',"x":' + nested + b"}", limits),
            lambda: from_structured(head + b',"x":' + nested + b',"data":{}}', limits),
            lambda: from_structured(b'{"data":' + nested + b"," + head[1:] + b"}", limits),
            lambda: JSONCodec(limits).decode(b'{"value":' + nested + b"}", Anything),
        ):
            try:
                read()
            except DecodeError as error:
                print(error)
            else:
                raise SystemExit("accepted")
print("alive")
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT, timeout=100)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == "alive"


@pytest.mark.parametrize("piece", [b'\\"', b'"', b"\\", b'"\\', b'[{"', b"[]", b'"",'], ids=repr)
def test_hostile_text_takes_linear_time(piece: bytes) -> None:
    """Quotes, backslashes and brackets in bulk, closed or not, cost no more than the size of the text."""
    for data in (b'"' + piece * 200_000, b"[" * 9 + piece * 200_000, piece * 200_000):
        with pytest.raises(DecodeError):
            parse_json(data, depth=8)
