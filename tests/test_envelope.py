"""Envelopes: both wire forms give back what they were given, and refuse what is no event."""

import base64
import json
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from eventbus.cloudevents import binary, from_binary, from_structured, structured
from eventbus.envelope import TEXT, Envelope, check_headers, check_key
from eventbus.errors import DecodeError, EncodeError
from eventbus.limits import Limits

LIMITS = Limits()
NOON = datetime(2030, 5, 17, 12, 30, 15, 123456, tzinfo=UTC)
MINIMAL = {
    "specversion": "1.0",
    "id": "7",
    "type": "shop.paid",
    "source": "till",
    "time": "2030-05-17T12:30:15.123456Z",
}
FULL = Envelope(
    id="7", name="shop.paid", version=3, time=NOON, source="till", correlation="5", causation="6", key="k 1",
    attempt=2, due=NOON + timedelta(hours=1), replyto="here", body=b'{"sum":1.50}',
    headers={"tenant": "a b", "traceparent": "00-0a-0b-01", "tracestate": "v=a%20b, w=1"},
)  # fmt: skip

TEXTS = st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1, max_size=TEXT)
TOKENS = st.text("!#$%&'*+-.^_`|~09azAZ", min_size=1, max_size=20).filter(
    lambda name: not name.lower().startswith("ce-") and name.lower() != "content-type"
)
HEADERS = st.dictionaries(TOKENS, st.text(st.characters(exclude_categories=["Cs"]), max_size=200), max_size=8).filter(
    lambda headers: len({name.lower() for name in headers}) == len(headers)
)
TRACES = st.fixed_dictionaries(
    {}, optional=dict.fromkeys(("traceparent", "tracestate"), st.from_regex(r"[ -~]{0,50}", fullmatch=True))
)
MOMENTS = st.datetimes(timezones=st.sampled_from([UTC, timezone(timedelta(hours=-3))]), min_value=datetime(2, 1, 1))  # noqa: DTZ001
JSON = st.dictionaries(TEXTS, st.integers() | TEXTS | st.none(), max_size=4).map(
    lambda value: json.dumps(value).encode()
)
NUMBERS = st.from_regex(r"(-?[1-9][0-9]{0,30}\.[0-9]{1,30}|\[1\.0, \"},\"\])", fullmatch=True).map(str.encode)
ENVELOPES = st.builds(
    Envelope,
    id=TEXTS,
    name=TEXTS,
    version=st.integers(1, 2**31 - 1),
    time=MOMENTS,
    source=TEXTS,
    correlation=TEXTS,
    causation=st.none() | TEXTS,
    key=st.none() | TEXTS,
    attempt=st.integers(1, 2**31 - 1),
    due=st.none() | MOMENTS,
    replyto=st.none() | TEXTS,
    headers=st.builds(lambda headers, traces: headers | traces, HEADERS, TRACES),
    body=JSON
    | st.binary(max_size=50)
    | st.sampled_from([b"{}", b"{", b"}", b'{},"id":"x","data":{}', b'[1,"data":{}}']),
)


def document(**members: Any) -> bytes:
    """Write a CloudEvent with some members changed, or gone for None."""
    event = {**MINIMAL, "data": {"sum": 1}, **members}
    return json.dumps({name: value for name, value in event.items() if value is not None}).encode()


def ce(**attributes: str | None) -> dict[str, str]:
    """Return binary-mode headers with some attributes changed, or gone for None."""
    return {f"ce-{name}": value for name, value in {**MINIMAL, **attributes}.items() if value is not None}


@given(ENVELOPES)
@example(FULL)
def test_structured_mode_is_lossless(envelope: Envelope) -> None:
    """An envelope written as one document is read back equal, whatever its texts, headers and body are."""
    assert envelope == from_structured(structured(envelope), LIMITS)


@given(ENVELOPES)
@example(FULL)
def test_binary_mode_is_lossless(envelope: Envelope) -> None:
    """An envelope written as headers and body is read back equal, whatever its texts, headers and body are."""
    headers, body = binary(envelope)
    assert envelope == from_binary(headers, body, LIMITS)


@given(ENVELOPES)
def test_wire_headers_are_printable_ascii(envelope: Envelope) -> None:
    """No header on the wire can break a line, hide a character or need an encoding."""
    for name, value in binary(envelope)[0].items():
        assert ((name + value).isascii(), (name + value).isprintable()) == (True, True)


@given(ENVELOPES, JSON | NUMBERS, st.sampled_from([b"", b" ", b"\r\n\t"]), st.data())
def test_any_member_order_is_read(envelope: Envelope, body: bytes, blank: bytes, data: st.DataObject) -> None:
    """A document is understood in any legal order and layout, its data taken out byte for byte."""
    members = json.loads(structured(envelope._replace(body=b"{}")))
    pieces = {name: json.dumps(value).encode() for name, value in members.items()} | {"data": body}
    written = [b'"%b"%b:%b' % (name.encode(), blank, piece) for name, piece in pieces.items()]
    inside = (blank + b"," + blank).join(data.draw(st.permutations(written)))
    assert envelope._replace(body=body) == from_structured(b"{%b%b}%b" % (blank, inside, blank), LIMITS)


@pytest.mark.parametrize("name", ["id", "name", "source", "correlation", "causation", "key", "replyto"])
def test_lone_surrogate_cannot_be_written(name: str) -> None:
    """A text that is no text in any encoding is refused when written, in both modes."""
    envelope = Envelope(
        **{"id": "7", "name": "n", "source": "s", "correlation": "7", name: "\ud800"}, time=NOON, body=b""
    )
    for write in (structured, binary):
        with pytest.raises(EncodeError, match="surrogate"):
            write(envelope)


@given(
    st.builds(
        Envelope,
        id=st.text("ab. ~", max_size=3) | st.just("x" * (TEXT + 1)),
        name=st.text("ab. ~", min_size=1, max_size=3),
        time=MOMENTS,
        source=st.text("ab. ~", min_size=1, max_size=3),
        correlation=st.just("c"),
        causation=st.none() | st.just("d"),
        key=st.none(),
        headers=st.just({}),
        due=st.none(),
        replyto=st.none(),
        version=st.integers(1, 9) | st.sampled_from([2**31 - 1, 2**31]),
        attempt=st.integers(0, 9),
        body=st.sampled_from([b"{}", b'{"a":{"b":1}}', b'{},"data":{}', b'{},"partitionkey":"k","x":{}', b"5"]),
    ),
    st.none()
    | st.tuples(
        st.integers(1, 250) | st.just(1000), st.integers(0, 2), st.sampled_from([b"", b"0", b" ", b'"', b"\\", b"}"])
    ),
)
def test_form_that_we_write_is_read_as_any_other(envelope: Envelope, change: tuple[int, int, bytes] | None) -> None:
    """What is read quickly is read, or refused, as the same document with a blank more, which is not."""
    data = structured(envelope)
    if change is not None:
        start, cut, junk = change
        data = data[:start] + junk + data[start + cut :]

    def outcome(document: bytes) -> Envelope | None:
        try:
            return from_structured(document, LIMITS)
        except DecodeError:
            return None

    assert outcome(b"{ " + data[1:]) == outcome(data)


def test_structured_form() -> None:
    """The document has the attributes of CloudEvents 1.0 and its extensions, and the body verbatim at its end."""
    expected = (
        '{"specversion":"1.0","id":"7","type":"shop.paid","source":"till","time":"2030-05-17T12:30:15.123456Z",'
        '"datacontenttype":"application/json","correlationid":"5","causationid":"6","partitionkey":"k 1",'
        '"dueat":"2030-05-17T13:30:15.123456Z","replyto":"here","traceparent":"00-0a-0b-01",'
        '"tracestate":"v=a%20b, w=1","headers":"{\\"tenant\\":\\"a b\\"}","dataversion":3,"attempt":2,'
        '"data":{"sum":1.50}}'
    )
    assert expected == structured(FULL).decode()


def test_binary_form() -> None:
    """The headers have the attributes under ce-, the user's own beside them, and what is not plain is escaped."""
    expected = {
        "ce-specversion": "1.0", "ce-id": "7", "ce-type": "shop.paid", "ce-source": "till",
        "ce-time": "2030-05-17T12:30:15.123456Z", "content-type": "application/json", "ce-correlationid": "5",
        "ce-causationid": "6", "ce-partitionkey": "k%201", "ce-dueat": "2030-05-17T13:30:15.123456Z",
        "ce-replyto": "here", "ce-dataversion": "3", "ce-attempt": "2", "tenant": "a%20b",
        "traceparent": "00-0a-0b-01", "tracestate": "v=a%20b, w=1",
    }  # fmt: skip
    assert (expected, FULL.body) == binary(FULL)


def test_percent_encoding_follows_cloudevents() -> None:
    """Blank, quote, percent, control and other characters are escaped as the HTTP binding says, and nothing else."""
    envelope = Envelope(
        id="7", name="n", time=NOON, source="s", correlation="7", body=b"", headers={"h": 'Euro € 😀 "50%"\r\n!#$&~'}
    )
    assert binary(envelope)[0]["h"] == "Euro%20%E2%82%AC%20%F0%9F%98%80%20%2250%25%22%0D%0A!#$&~"


def test_time_is_written_in_utc() -> None:
    """A time of another zone is written as the same moment in UTC, and a time of no zone is refused."""
    east = Envelope(
        id="7", name="n", source="s", correlation="7", body=b"", time=NOON.astimezone(timezone(timedelta(hours=5)))
    )
    assert binary(east)[0]["ce-time"] == "2030-05-17T12:30:15.123456Z"
    nowhere = Envelope(id="7", name="n", source="s", correlation="7", body=b"", time=NOON.replace(tzinfo=None))
    with pytest.raises(EncodeError, match="no time zone"):
        structured(nowhere)


def test_foreign_event_is_completed() -> None:
    """An event without our extensions is version 1, attempt 1, and the begin of its own correlation."""
    expected = Envelope(id="7", name="shop.paid", time=NOON, source="till", correlation="7", body=b'{"sum": 1}')
    assert expected == from_structured(document(subject="x", comexample=5), LIMITS)
    assert expected == from_binary(ce(subject="x"), b'{"sum": 1}', LIMITS)


FOREIGN = {
    "null is absent": (document(partitionkey=None, causationid=None)[:-1] + b',"partitionkey":null}', {}),
    "base64": (document(data=None, data_base64=base64.b64encode(b'{"a":1}').decode()), {"body": b'{"a":1}'}),
    "no data": (document(data=None), {"body": b""}),
    "digits of data": (
        document(data=None)[:-1] + b',"data":1.0000000000000000001}',
        {"body": b"1.0000000000000000001"},
    ),
    "data before": (b'{"data":{"id":"x","data":1} , ' + document(data=None)[1:], {"body": b'{"id":"x","data":1}'}),
    "data amidst": (document(subject="x", data=None)[:-1] + b',"data":{},"zone":"x"}', {"body": b"{}"}),
    "content type": (document(datacontenttype="Application/JSON; charset=UTF-8"), {}),
    "content type of JSON": (document(datacontenttype="application/vnd.shop+json"), {}),
    "number as text": (document(dataversion="2", attempt="3"), {"version": 2, "attempt": 3}),
    "time with offset": (document(time="2030-05-17t14:30:15.123456+02:00"), {}),
    "time with nanoseconds": (document(time="2030-05-17T12:30:15.123456789Z"), {}),
    "time without fraction": (document(time="2030-05-17T12:30:15Z"), {"time": NOON.replace(microsecond=0)}),
    "trace": (document(traceparent="00-1-2-01"), {"headers": {"traceparent": "00-1-2-01"}}),
}


@pytest.mark.parametrize(("data", "expected"), FOREIGN.values(), ids=FOREIGN)
def test_foreign_event_is_understood(data: bytes, expected: dict[str, Any]) -> None:
    """What CloudEvents permits and we would not write is read all the same."""
    plain = {"id": "7", "name": "shop.paid", "time": NOON, "source": "till", "correlation": "7", "body": b'{"sum": 1}'}
    assert Envelope(**plain | expected) == from_structured(data, LIMITS)


def test_missing_time_is_the_time_of_arrival() -> None:
    """An event that tells no time gets the one given, and is refused if none is."""
    assert from_structured(document(time=None), LIMITS, NOON.timestamp).time == NOON
    assert from_binary(ce(time=None), b"{}", LIMITS, NOON.timestamp).time == NOON
    with pytest.raises(DecodeError, match="'time' is missing"):
        from_structured(document(time=None), LIMITS)


def test_binary_reader_forgives_case_and_finds_structured_bodies() -> None:
    """Header names count in any case, a trace may be an attribute, and the content type may name structured mode."""
    envelope = from_binary({name.upper(): value for name, value in ce(traceparent="00").items()}, b"{}", LIMITS)
    assert (envelope.id, envelope.name, envelope.headers) == ("7", "shop.paid", {"traceparent": "00"})
    assert from_binary({"Content-Type": "application/cloudevents+json"}, structured(FULL), LIMITS) == FULL


REFUSED_ATTRIBUTES: dict[str, tuple[dict[str, Any], str]] = {
    "no specversion": ({"specversion": None}, "'specversion'"),
    "another specversion": ({"specversion": "0.3"}, "'specversion'"),
    "no id": ({"id": None}, "'id' is missing"),
    "empty id": ({"id": ""}, "'id'"),
    "long id": ({"id": "x" * (TEXT + 1)}, "'id'"),
    "NUL in id": ({"id": "a\0b"}, "'id' has a control"),
    "no type": ({"type": None}, "'type' is missing"),
    "empty type": ({"type": ""}, "'type'"),
    "line break in type": ({"type": "a\r\nb"}, "'type' has a control"),
    "no source": ({"source": None}, "'source' is missing"),
    "empty key": ({"partitionkey": ""}, "'partitionkey'"),
    "empty correlation": ({"correlationid": ""}, "'correlationid'"),
    "wrong time": ({"time": "yesterday"}, "'time' is no time"),
    "time of no zone": ({"time": "2030-05-17T12:30:15"}, "'time' is no time"),
    "time in ISO 8601 only": ({"time": "20300517T123015Z"}, "'time' is no time"),
    "month 13": ({"time": "2030-13-17T12:30:15Z"}, "'time' is no time"),
    "time before the calendar": ({"time": "0001-01-01T00:00:00+23:59"}, "'time' is no time"),
    "time in other digits": ({"time": "２０３０-05-17T12:30:15Z"}, "'time' is no time"),
    "wrong due": ({"dueat": "soon"}, "'dueat' is no time"),
    "version 0": ({"dataversion": "0"}, "'dataversion'"),
    "version of text": ({"dataversion": "1.0"}, "'dataversion'"),
    "version in other digits": ({"dataversion": "２"}, "'dataversion'"),
    "huge attempt": ({"attempt": str(2**31)}, "'attempt'"),
    "another content type": ({"datacontenttype": "text/plain"}, "'datacontenttype'"),
    "another charset": ({"datacontenttype": "application/json; charset=latin-1"}, "'datacontenttype'"),
    "pickle": ({"datacontenttype": "application/x-python-serialize"}, "'datacontenttype'"),
    "broken trace": ({"traceparent": "00\r\nx: y"}, "printable"),
    "headers of no object": ({"headers": "[1]"}, "'headers'"),
    "headers of no JSON": ({"headers": "x"}, "no JSON"),
    "header of no text": ({"headers": '{"a": 1}'}, "no text"),
    "header with a lone surrogate": ({"headers": '{"a": "\\ud800"}'}, "surrogate"),
    "header with a wrong name": ({"headers": '{"a b": "1"}'}, "header name"),
    "header with an empty name": ({"headers": '{"": "1"}'}, "header name"),
    "header twice": ({"headers": '{"a": "1", "a": "2"}'}, "duplicate"),
    "header twice by case": ({"headers": '{"a": "1", "A": "2"}'}, "twice"),
    "reserved header": ({"headers": '{"ce-id": "1"}'}, "reserved"),
    "too many headers": ({"headers": json.dumps({f"h{n}": "" for n in range(LIMITS.headers + 1)})}, "headers are more"),
    "too large a header": ({"headers": json.dumps({"h": "x" * LIMITS.header})}, "longer"),
}

REFUSED_DOCUMENTS: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "no JSON"),
    "no object": (b"[]", "no JSON object"),
    "truncated": (structured(FULL)[:-1], "no JSON"),
    "invalid UTF-8": (document(data=None)[:-1] + b',"subject":"\xff"}', "no UTF-8"),
    "attribute twice": (document()[:-1] + b',"id":"8"}', "duplicate"),
    "data twice": (b'{"data":{},' + structured(FULL)[1:], "duplicate"),
    "data and base64": (document(data_base64="e30="), "both"),
    "data and base64 before": (b'{"data_base64":"e30=",' + structured(FULL)[1:], "both"),
    "wrong base64": (document(data=None, data_base64="e30"), "no base64"),
    "base64 of no text": (document(data=None, data_base64=1), "no base64"),
    "id of no text": (document(id=7), "'id'"),
    "type of no text": (document(type=["a"]), "'type'"),
    "key of no text": (document(partitionkey={}), "'partitionkey'"),
    "version of truth": (document(dataversion=True), "'dataversion'"),
    "version of float": (document(dataversion=1.0), "'dataversion'"),
    "negative version": (document(dataversion=-1), "'dataversion'"),
    "time of no text": (document(time=0), "'time'"),
    "trace of no text": (document(traceparent=1), "no text"),
    "headers of no text": (document(headers={"a": "1"}), "'headers'"),
    "lone surrogate": (document(id="\ud800"), "surrogate"),
    "number beyond all bounds": (document(data=None)[:-1] + b',"x":1e999}', "bounds"),
    "NaN": (document(x=float("nan")), "NaN"),
    "too many digits": (document(data=None)[:-1] + b',"x":' + b"9" * 5_000 + b"}", "digits"),
    "too deep": (document(data=None)[:-1] + b',"x":' + b"[" * 70 + b"]" * 70 + b"}", "nested"),
    "too large a body": (document(data={"a": "x" * LIMITS.body}), "Limits(body="),
    "too large a document": (b" " * 4_000_000, "too large"),
}


@pytest.mark.parametrize(("changed", "reason"), REFUSED_ATTRIBUTES.values(), ids=REFUSED_ATTRIBUTES)
def test_wrong_attribute_is_refused_in_both_modes(changed: dict[str, Any], reason: str) -> None:
    """An attribute that is missing, empty, of the wrong kind or too large is refused with the reason."""
    with pytest.raises(DecodeError) as caught:
        from_structured(document(**changed), LIMITS)
    assert reason in str(caught.value)
    with pytest.raises(DecodeError) as caught:
        from_binary(ce(**changed), b"{}", LIMITS)
    assert reason in str(caught.value)


@pytest.mark.parametrize(("data", "reason"), REFUSED_DOCUMENTS.values(), ids=REFUSED_DOCUMENTS)
def test_wrong_document_is_refused(data: bytes, reason: str) -> None:
    """A document that is no event of JSON, or an ambiguous one, is refused with the reason."""
    with pytest.raises(DecodeError) as caught:
        from_structured(data, LIMITS)
    assert reason in str(caught.value)


REFUSED_HEADERS = {
    "twice by case": ({"ce-id": "7", "CE-ID": "7"}, "twice"),
    "no UTF-8": ({"ce-id": "%FF"}, "percent-encoded"),
    "user header no UTF-8": ({"tenant": "%C3"}, "percent-encoded"),
    "escaped surrogate": ({"ce-id": "%ED%A0%80"}, "percent-encoded"),
    "raw surrogate": ({"ce-source": "\udc80"}, "surrogate"),
    "raw surrogate in a user header": ({"tenant": "\udc80"}, "surrogate"),
    "raw surrogate in headers": ({"ce-headers": '{"a":"\udc80"}'}, "no UTF-8"),
    "a wrong name": ({"a\r\nb": "1"}, "header name"),
    "too many": ({f"h{n}": "" for n in range(LIMITS.headers + 1)}, "headers are more"),
    "too large": ({"h": "x" * LIMITS.header}, "longer"),
    "batch": ({"content-type": "application/cloudevents-batch+json"}, "specversion"),
}


@pytest.mark.parametrize(("headers", "reason"), REFUSED_HEADERS.values(), ids=REFUSED_HEADERS)
def test_wrong_headers_are_refused(headers: dict[str, str], reason: str) -> None:
    """Headers that cannot be read in one way are refused with the reason."""
    start = {} if "content-type" in headers else ce()
    with pytest.raises(DecodeError) as caught:
        from_binary(start | headers, b"{}", LIMITS)
    assert reason in str(caught.value)


@pytest.mark.parametrize("size", [-1, 0, 1])
def test_body_ceiling_is_exact(size: int) -> None:
    """A body at its ceiling is read in both modes, one byte more is refused in both."""
    body = b'{"a":"%b"}' % (b"x" * (LIMITS.body - 8 + size))
    envelope = Envelope(id="7", name="n", time=NOON, source="s", correlation="7", body=body)
    headers, _ = binary(envelope)
    for read in (lambda: from_structured(structured(envelope), LIMITS), lambda: from_binary(headers, body, LIMITS)):
        if size > 0:
            with pytest.raises(DecodeError, match="body"):
                read()
        else:
            assert body == read().body


@given(st.binary(max_size=200), st.integers(0, len(structured(FULL))), st.integers(0, 20))
def test_damaged_document_is_read_or_refused(junk: bytes, start: int, cut: int) -> None:
    """Whatever happens to a document on its way, nothing but an envelope or a decode error comes out."""
    whole = structured(FULL)
    try:
        found = from_structured(whole[:start] + junk + whole[start + cut :], LIMITS)
    except DecodeError:
        return
    assert all((found.id, found.name, found.source, found.correlation))


@given(
    st.dictionaries(st.sampled_from(sorted(binary(FULL)[0])) | st.text(max_size=5), st.text(max_size=30)), st.binary()
)
def test_damaged_headers_are_read_or_refused(headers: dict[str, str], body: bytes) -> None:
    """Whatever the headers are, nothing but an envelope or a decode error comes out."""
    try:
        found = from_binary(binary(FULL)[0] | headers, body, LIMITS)
    except DecodeError:
        return
    assert body == found.body


PLAIN = Envelope(
    id="7", name="n", time=NOON, source="s", correlation="7", causation="6", key="k", body=b"", version=2, attempt=3
)  # fmt: skip
ODD = ("", "\n", "a\nb", "%41", "%", "é", " ", "0", "1", "x" * TEXT, "x" * (TEXT + 1), "x" * (LIMITS.header + 1))


@pytest.mark.parametrize("more", [{}, {"h": "v"}])
@pytest.mark.parametrize("value", [None, *ODD, "application/json;charset=utf-8", "2030-02-31T00:00:00Z"])
@pytest.mark.parametrize("name", sorted(binary(PLAIN)[0]))
def test_usual_headers_are_read_as_any_others(name: str, value: str | None, more: dict[str, str]) -> None:
    """Headers as they are mostly written get no other answer than the same ones in capitals."""
    headers = {**binary(PLAIN)[0], name: value, **more}
    told = {name: value for name, value in headers.items() if value is not None}

    def read(headers: dict[str, str]) -> object:
        try:
            return from_binary(headers, b"{}", LIMITS)
        except DecodeError as error:
            return str(error)

    assert read(told) == read({name.upper() if name != "h" else name: value for name, value in told.items()})


@given(HEADERS, TRACES)
def test_checked_headers_travel(headers: dict[str, str], traces: dict[str, str]) -> None:
    """Headers that are permitted at publish are read back equal in both modes."""
    check_headers(headers | traces, LIMITS, "n")
    envelope = Envelope(id="7", name="n", time=NOON, source="s", correlation="7", headers=headers | traces, body=b"{}")
    assert headers | traces == from_structured(structured(envelope), LIMITS).headers
    assert headers | traces == from_binary(*binary(envelope), LIMITS).headers


@pytest.mark.parametrize(
    ("headers", "reason"),
    [
        ({"ce-id": "1"}, "reserved"),
        ({"CE-anything": "1"}, "reserved"),
        ({"Content-Type": "text/plain"}, "reserved"),
        ({"": "1"}, "header name"),
        ({"a b": "1"}, "header name"),
        ({"a\r\nb": "1"}, "header name"),
        ({"ä": "1"}, "header name"),
        ({1: "1"}, "header name"),
        ({"a": 1}, "no text"),
        ({"a": None}, "no text"),
        ({"a": "1", "A": "2"}, "twice"),
        ({"A": "1", "a": "2"}, "twice"),
        ({"a": "x\ud800"}, "surrogate"),
        ({"traceparent": "ä"}, "printable"),
        ({"tracestate": "a\nb"}, "printable"),
        ({"a": "x" * LIMITS.header}, "longer"),
        ({f"h{n}": "" for n in range(10_000)}, "headers are more"),
    ],
    ids=repr,
)
def test_header_is_refused_at_publish(headers: Any, reason: str) -> None:
    """A header that some transport could not carry unchanged is refused, naming the message and the reason."""
    with pytest.raises(EncodeError) as caught:
        check_headers(headers, LIMITS, "shop.paid")
    assert caught.value.message == "shop.paid"
    assert reason in caught.value.reason


def test_header_ceilings_are_exact() -> None:
    """As many and as long headers as permitted are accepted."""
    check_headers({f"h{n:02}": "x" * (LIMITS.header - 3) for n in range(LIMITS.headers)}, LIMITS)


@pytest.mark.parametrize("key", ["", "\0", "a\nb", "\x9f", "\ud800", "x" * (TEXT + 1)], ids=repr)
def test_key_is_refused_at_publish(key: str) -> None:
    """A key that a store or a broker could not keep apart from others is refused."""
    with pytest.raises(EncodeError, match="a key is 1 to 200 characters"):
        check_key(key, "shop.paid")


@given(TEXTS)
def test_checked_key_travels(key: str) -> None:
    """A key that is permitted at publish is read back equal in both modes."""
    check_key(key)
    envelope = Envelope(id="7", name="n", time=NOON, source="s", correlation="7", key=key, body=b"{}")
    assert key == from_structured(structured(envelope), LIMITS).key
    assert key == from_binary(*binary(envelope), LIMITS).key


def test_name_from_the_wire_imports_nothing() -> None:
    """A type that is a dotted path is a text like any other."""
    for name in ("os.system", "builtins.eval", "../../x", "antigravity"):
        assert name == from_structured(document(type=name), LIMITS).name
