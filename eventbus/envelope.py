"""What travels, and its two wire forms: CloudEvents 1.0 structured (one JSON document) and binary (headers and body).

The body is never read here: it is spliced in and out byte for byte, and the codec checks it.
"""

import base64
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any
from urllib.parse import quote, unquote_to_bytes

from eventbus._strict_json import dump_json, member, parse_json
from eventbus.errors import DecodeError, EncodeError
from eventbus.limits import Limits

__all__ = (
    "TEXT",
    "Envelope",
    "binary",
    "check_headers",
    "check_key",
    "from_binary",
    "from_structured",
    "structured",
)

TEXT = 200
"""Characters of an id, name or key: a store's index has to hold them."""

TRACE = ("traceparent", "tracestate")
"""W3C headers that other libraries read, so they travel unescaped."""

_NONE: Mapping[str, str] = MappingProxyType({})
_ATTRIBUTES = {"content-type": "datacontenttype"} | {
    f"ce-{name}": name
    for name in (
        *("specversion", "id", "type", "source", "time", "dataversion", "correlationid", "causationid"),
        *("partitionkey", "attempt", "dueat", "replyto"),
    )
}
_TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_PRINTABLE = re.compile(r"[ -~]*")
_PLAIN = re.compile(r"[!#$&-~]*")
_SAFE = "".join(chr(code) for code in range(0x21, 0x7F) if chr(code) not in '"%')
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_WHOLE = re.compile(r"[0-9]{1,10}")
_TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,20})?(Z|[+-][0-9]{2}:[0-9]{2})")
_JSON = re.compile(r"application/(json|[!#$&^_.+\-0-9a-z]+\+json) *(; *charset=\"?utf-8\"? *)?", re.IGNORECASE)


def check_headers(headers: Mapping[str, str], limits: Limits, message: str = "message") -> None:
    """Raise ``EncodeError`` unless every transport can carry the headers of a message unchanged.

    Names are ASCII tokens that differ by more than case, are not ``content-type`` and do not begin with ``ce-``;
    values are any text, but printable ASCII in ``traceparent`` and ``tracestate``.

    Args:
        headers: what the publisher attached.
        limits: what is too much.
        message: the name of the message, for the error.
    """
    if headers and (fault := _header_fault(headers, limits)):
        raise EncodeError(message, fault)


def check_key(key: str, message: str = "message") -> None:
    """Raise ``EncodeError`` unless ``key`` can order messages: 1 to ``TEXT`` characters, no control characters."""
    if not 0 < len(key) <= TEXT or _CONTROL.search(key):
        raise EncodeError(message, f"a key is 1 to {TEXT} characters without control characters, not {key[:50]!r}")


def structured(envelope: "Envelope") -> bytes:
    """Return an envelope as one JSON document, its body spliced in as ``data``.

    A body that is no JSON object travels as ``data_base64``. Raises ``EncodeError``.
    """
    attributes = _attributes(envelope)
    if envelope.headers:
        others = dict(envelope.headers)
        attributes.update({name: others.pop(name) for name in TRACE if name in others})
        if others:
            attributes["headers"] = dump_json(others)
    head = ",".join([f'"{name}":{dump_json(value)}' for name, value in attributes.items()])
    numbers = f'"dataversion":{envelope.version},"attempt":{envelope.attempt}'
    try:
        start = f"{{{head},{numbers}".encode()
    except UnicodeEncodeError:
        raise EncodeError(envelope.name, "an attribute or a header has a lone surrogate") from None
    body = envelope.body
    if body.startswith(b"{") and body.endswith(b"}"):
        return b'%b,"data":%b}' % (start, body)
    return b'%b,"data_base64":"%b"}' % (start, base64.b64encode(body))


def from_structured(data: bytes, limits: Limits, now: Callable[[], float] | None = None) -> "Envelope":
    """Return the envelope in one JSON document, ours or any other CloudEvent of JSON.

    Args:
        data: the document.
        limits: what is too much.
        now: the time in seconds since the epoch of an event that tells none; without it such an event is refused.

    Raises ``DecodeError``. The body is taken out unread.
    """
    if len(data) > limits.body * 4 // 3 + limits.headers * limits.header * 8 + 65_536:
        raise DecodeError(f"a document of {len(data)} bytes is too large for Limits(body={limits.body})")
    head, found, rest = data.partition(b',"data":')
    # An attribute is never an object: if the document ends in two braces, nothing stands behind the data.
    if found and rest.startswith(b"{") and rest.endswith(b"}}"):
        attributes = _head(head + b"}")
        if attributes is not None:
            return _envelope(attributes, {}, rest[:-1], limits, now)
    members: dict[str, Any] | None = parse_json(data, limits.depth + 1)
    if not isinstance(members, dict):
        raise DecodeError("no CloudEvent: the document is no JSON object")
    return _envelope(members, {}, _body(members, data), limits, now)


def binary(envelope: "Envelope") -> tuple[dict[str, str], bytes]:
    """Return an envelope as headers and body, for a transport that has headers.

    Attributes become ``ce-`` headers and the envelope's headers stand beside them; all are printable ASCII, other
    characters percent-encoded. Raises ``EncodeError``.
    """
    try:
        headers = {f"ce-{name}": _quoted(value) for name, value in _attributes(envelope).items()}
        headers["ce-dataversion"] = str(envelope.version)
        headers["ce-attempt"] = str(envelope.attempt)
        headers["content-type"] = headers.pop("ce-datacontenttype")
        for name, value in envelope.headers.items():
            headers[name] = value if name in TRACE else _quoted(value)
    except UnicodeEncodeError:
        raise EncodeError(envelope.name, "an attribute or a header has a lone surrogate") from None
    return headers, envelope.body


def from_binary(
    headers: Mapping[str, str], body: bytes, limits: Limits, now: Callable[[], float] | None = None
) -> "Envelope":
    """Return the envelope in headers and body; where the content type says so, in the body alone.

    Args:
        headers: as they arrived.
        body: as it arrived; it is not read.
        limits: what is too much.
        now: the time in seconds since the epoch of an event that tells none; without it such an event is refused.

    Raises ``DecodeError``.
    """
    attributes: dict[str, Any] = {}
    others: dict[str, str] = {}
    for name, value in headers.items():
        attribute = _ATTRIBUTES.get(name) or _attribute(name)
        if attribute is None:
            others[name] = value if name in TRACE else _unquoted(value)
        elif attribute in attributes:
            raise DecodeError(f"the attribute {attribute[:50]!r} is there twice")
        else:
            attributes[attribute] = _unquoted(value) if "%" in value else value
    if str(attributes.get("datacontenttype")).lower().startswith("application/cloudevents+json"):
        return from_structured(body, limits, now)
    return _envelope(attributes, others, body, limits, now)


def _attribute(header: str) -> str | None:
    lower = header.lower()
    return "datacontenttype" if lower == "content-type" else lower[3:] if lower.startswith("ce-") else None


def _attributes(envelope: "Envelope") -> dict[str, str]:
    attributes = {
        "specversion": "1.0",
        "id": envelope.id,
        "type": envelope.name,
        "source": envelope.source,
        "time": _stamp(envelope.time, envelope.name),
        "datacontenttype": "application/json",
        "correlationid": envelope.correlation,
    }
    if envelope.causation is not None:
        attributes["causationid"] = envelope.causation
    if envelope.key is not None:
        attributes["partitionkey"] = envelope.key
    if envelope.due is not None:
        attributes["dueat"] = _stamp(envelope.due, envelope.name)
    if envelope.replyto is not None:
        attributes["replyto"] = envelope.replyto
    return attributes


def _envelope(
    attributes: Mapping[str, Any],
    headers: dict[str, str],
    body: bytes,
    limits: Limits,
    now: Callable[[], float] | None,
) -> "Envelope":
    if attributes.get("specversion") != "1.0":
        raise DecodeError("no CloudEvent: the attribute 'specversion' is not '1.0'")
    if not _JSON.fullmatch(_text(attributes, "datacontenttype", TEXT) or "application/json"):
        raise DecodeError("the attribute 'datacontenttype' is not JSON in UTF-8")
    if len(body) > limits.body:
        raise DecodeError(f"a body of {len(body)} bytes is more than Limits(body={limits.body})")
    id = _required(attributes, "id", TEXT)
    time = _moment(attributes, "time")
    if time is None:
        if now is None:
            raise DecodeError("the attribute 'time' is missing")
        time = datetime.fromtimestamp(now(), UTC)
    return Envelope(
        id=id,
        name=_required(attributes, "type", TEXT),
        version=_number(attributes, "dataversion"),
        time=time,
        source=_required(attributes, "source", limits.header),
        correlation=_text(attributes, "correlationid", TEXT) or id,
        causation=_text(attributes, "causationid", TEXT),
        key=_text(attributes, "partitionkey", TEXT),
        attempt=_number(attributes, "attempt"),
        due=_moment(attributes, "dueat"),
        replyto=_text(attributes, "replyto", limits.header),
        headers=_headers(attributes, headers, limits),
        body=body,
    )


def _headers(attributes: Mapping[str, Any], headers: dict[str, str], limits: Limits) -> Mapping[str, str]:
    packed = attributes.get("headers")
    if packed is not None:
        unpacked = parse_json(packed.encode("utf-8", "surrogatepass"), 1) if isinstance(packed, str) else None
        if not isinstance(unpacked, dict):
            raise DecodeError("the attribute 'headers' is no JSON object in a text")
        headers = {**unpacked, **headers}
    for name in TRACE:
        if attributes.get(name) is not None:
            headers.setdefault(name, attributes[name])
    if not headers:
        return _NONE
    if fault := _header_fault(headers, limits):
        raise DecodeError(fault)
    return headers


def _head(text: bytes) -> dict[str, Any] | None:
    try:
        attributes: dict[str, Any] = parse_json(text, 1)
    except DecodeError:
        return None  # It may be right in another order, and if not, the long way knows why.
    return None if "data" in attributes or "data_base64" in attributes else attributes


def _body(attributes: Mapping[str, Any], data: bytes) -> bytes:
    encoded = attributes.get("data_base64")
    if "data" in attributes:
        if encoded is not None:
            raise DecodeError("the event has both 'data' and 'data_base64'")
        return member(data, "data")
    if encoded is None:
        return b""
    try:
        return base64.b64decode(encoded, validate=True)
    except (TypeError, ValueError):
        raise DecodeError("the member 'data_base64' is no base64") from None


def _text(attributes: Mapping[str, Any], name: str, longest: int) -> str | None:
    value = attributes.get(name)
    if value is None:
        return None
    if not isinstance(value, str) or not 0 < len(value) <= longest:
        raise DecodeError(f"the attribute {name!r} is no text of 1 to {longest} characters")
    if not value.isprintable() and _CONTROL.search(value):
        raise DecodeError(f"the attribute {name!r} has a control character or a lone surrogate")
    return value


def _required(attributes: Mapping[str, Any], name: str, longest: int) -> str:
    value = _text(attributes, name, longest)
    if value is None:
        raise DecodeError(f"the attribute {name!r} is missing")
    return value


def _number(attributes: Mapping[str, Any], name: str) -> int:
    value = attributes.get(name, 1)
    if isinstance(value, str) and _WHOLE.fullmatch(value):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
        raise DecodeError(f"the attribute {name!r} is no whole number from 1")
    return value


def _moment(attributes: Mapping[str, Any], name: str) -> datetime | None:
    value = _text(attributes, name, TEXT)
    if value is None:
        return None
    value = value.upper()
    try:
        time = datetime.fromisoformat(value).astimezone(UTC) if _TIME.fullmatch(value) else None
    except (OverflowError, ValueError):
        time = None
    if time is None:
        raise DecodeError(f"the attribute {name!r} is no time of RFC 3339")
    return time


def _stamp(time: datetime, message: str) -> str:
    if time.tzinfo is not UTC:
        if time.utcoffset() is None:
            raise EncodeError(message, "its time has no time zone")
        time = time.astimezone(UTC)
    return f"{time.isoformat()[:-6]}Z"


def _quoted(value: str) -> str:
    return value if _PLAIN.fullmatch(value) else quote(value, safe=_SAFE)


def _unquoted(value: str) -> str:
    try:
        return unquote_to_bytes(value).decode() if "%" in value else value
    except UnicodeError:
        raise DecodeError("a header that is no percent-encoded UTF-8") from None


def _header_fault(headers: Mapping[Any, Any], limits: Limits) -> str | None:
    if len(headers) > limits.headers:
        return f"{len(headers)} headers are more than Limits(headers={limits.headers})"
    seen: set[str] = set()
    for name, value in headers.items():
        if not isinstance(name, str) or not _TOKEN.fullmatch(name):
            return f"a header name is letters, digits and !#$%&'*+-.^_`|~, not {str(name)[:50]!r}"
        lower = name.lower()
        if reason := "it is there twice" if lower in seen else _reserved(lower) or _value_fault(lower, value, limits):
            return f"header {name[:50]!r}: {reason}"
        seen.add(lower)
    return None


def _reserved(name: str) -> str | None:
    return "the name is reserved" if name == "content-type" or name.startswith("ce-") else None


def _value_fault(name: str, value: object, limits: Limits) -> str | None:
    if not isinstance(value, str):
        return "its value is no text"
    if len(name) + len(value) > limits.header:
        return f"longer than Limits(header={limits.header})"
    if name in TRACE and not _PRINTABLE.fullmatch(value):
        return "its value is not printable ASCII"
    return "its value has a lone surrogate" if not value.isascii() and _SURROGATE.search(value) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Envelope:
    """Hold one message as it travels: who it is, where it comes from, and its encoded body.

    >>> from datetime import UTC, datetime
    >>> day = datetime(2030, 1, 2, tzinfo=UTC)
    >>> event = Envelope(id="1", name="shop.paid", time=day, source="shop", correlation="1", body=b'{"sum":5}')
    >>> from_structured(structured(event), Limits()) == event
    True
    """

    id: str
    name: str
    version: int = 1
    time: datetime
    source: str
    correlation: str
    causation: str | None = None
    key: str | None = None
    attempt: int = 1
    due: datetime | None = None
    """Not to be handled before."""
    replyto: str | None = None
    """Where an answer would go; reserved."""
    headers: Mapping[str, str] = field(default_factory=lambda: _NONE)
    body: bytes
