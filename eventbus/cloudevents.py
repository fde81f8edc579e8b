"""The two wire forms of an envelope: CloudEvents 1.0 structured (one JSON document) and binary (headers and body).

The body is never read here: it is spliced in and out byte for byte, and the codec checks it.
"""

import base64
import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote, unquote_to_bytes

from eventbus._strict_json import dump_json, member, parse_json
from eventbus.envelope import CONTROL, NO_HEADERS, TEXT, TRACE, Envelope, header_fault
from eventbus.errors import DecodeError, EncodeError
from eventbus.limits import Limits

__all__ = ("binary", "from_binary", "from_structured", "structured")

_ATTRIBUTES = {"content-type": "datacontenttype"} | {
    f"ce-{name}": name
    for name in (
        *("specversion", "id", "type", "source", "time", "dataversion", "correlationid", "causationid"),
        *("partitionkey", "attempt", "dueat", "replyto"),
    )
}
_PLAIN = re.compile(r"[!#$&-~]*")
_SAFE = "".join(chr(code) for code in range(0x21, 0x7F) if chr(code) not in '"%')
_SIMPLE = re.compile(r"[ !#-\[\]-~]*")
"""What JSON takes as it is."""
_OURS = re.compile(
    r'\{"specversion":"1\.0","id":"([ !#-\[\]-~]{1,200}+)","type":"([ !#-\[\]-~]{1,200}+)","source":"([ !#-\[\]-~]++)",'
    r'"time":"([0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(?:\.[0-9]{1,6}+)?Z)",'
    r'"datacontenttype":"application/json","correlationid":"([ !#-\[\]-~]{1,200}+)"'
    r'(?:,"causationid":"([ !#-\[\]-~]{1,200}+)")?(?:,"partitionkey":"([ !#-\[\]-~]{1,200}+)")?'
    r',"dataversion":([1-9][0-9]{0,8}+),"attempt":([1-9][0-9]{0,8}+)'
)
"""What ``structured`` writes before the data of most messages."""
_USUAL = (
    *("ce-specversion", "content-type", "ce-id", "ce-type", "ce-source", "ce-time", "ce-correlationid"),
    *("ce-causationid", "ce-partitionkey", "ce-dataversion", "ce-attempt"),
)
_USUALLY = re.compile(
    r"1\.0\napplication/json\n([!#$&-~]{1,200}+)\n([!#$&-~]{1,200}+)\n([!#$&-~]++)\n"
    r"([0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(?:\.[0-9]{1,6}+)?Z)\n([!#$&-~]{1,200}+)\n"
    r"([!#$&-~]{0,200}+)\n([!#$&-~]{0,200}+)\n([1-9][0-9]{0,8}+)\n([1-9][0-9]{0,8}+)"
)
"""What ``binary`` writes as those headers of most messages, a line each."""
_WHOLE = re.compile(r"[0-9]{1,10}")
_TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,20})?(Z|[+-][0-9]{2}:[0-9]{2})")
_JSON = re.compile(r"application/(json|[!#$&^_.+\-0-9a-z]+\+json) *(; *charset=\"?utf-8\"? *)?", re.IGNORECASE)


def structured(envelope: Envelope) -> bytes:
    """Return an envelope as one JSON document, its body spliced in as ``data``.

    A body that is no JSON object travels as ``data_base64``. Raises ``EncodeError``.

    >>> day = datetime(2030, 1, 2, tzinfo=UTC)
    >>> event = Envelope(id="1", name="shop.paid", time=day, source="shop", correlation="1", body=b'{"sum":5}')
    >>> from_structured(structured(event), Limits()) == event
    True
    """
    try:
        start = _start(envelope).encode()
    except UnicodeEncodeError:
        raise EncodeError(envelope.name, "an attribute or a header has a lone surrogate") from None
    body = envelope.body
    if body.startswith(b"{") and body.endswith(b"}"):
        return b'%b,"data":%b}' % (start, body)
    return b'%b,"data_base64":"%b"}' % (start, base64.b64encode(body))


def _start(envelope: Envelope) -> str:
    """Return a document up to its data."""
    numbers = f'"dataversion":{envelope.version},"attempt":{envelope.attempt}'
    causation, key = envelope.causation, envelope.key
    texts = (envelope.id, envelope.name, envelope.source, envelope.correlation, causation or "", key or "")
    usual = envelope.due is None and envelope.replyto is None and not envelope.headers
    if usual and _SIMPLE.fullmatch("".join(texts)):
        caused = "" if causation is None else f',"causationid":"{causation}"'
        keyed = "" if key is None else f',"partitionkey":"{key}"'
        return (
            f'{{"specversion":"1.0","id":"{envelope.id}","type":"{envelope.name}","source":"{envelope.source}",'
            f'"time":"{_stamp(envelope.time, envelope.name)}","datacontenttype":"application/json",'
            f'"correlationid":"{envelope.correlation}"{caused}{keyed},{numbers}'
        )
    attributes = _attributes(envelope)
    if envelope.headers:
        others = dict(envelope.headers)
        attributes.update({name: others.pop(name) for name in TRACE if name in others})
        if others:
            attributes["headers"] = dump_json(others)
    head = ",".join([f'"{name}":{dump_json(value)}' for name, value in attributes.items()])
    return f"{{{head},{numbers}"


def from_structured(data: bytes, limits: Limits, now: Callable[[], float] | None = None) -> Envelope:
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
        if (quick := _quick(head, rest[:-1], limits)) is not None:
            return quick
        attributes = _head(head + b"}")
        if attributes is not None:
            return _envelope(attributes, {}, rest[:-1], limits, now)
    members: dict[str, Any] | None = parse_json(data, limits.depth + 1)
    if not isinstance(members, dict):
        raise DecodeError("no CloudEvent: the document is no JSON object")
    return _envelope(members, {}, _body(members, data), limits, now)


def _quick(head: bytes, body: bytes, limits: Limits) -> Envelope | None:
    """Return the envelope in a document that begins as ``structured`` writes it; None for the long way."""
    return _read(_OURS.fullmatch(head.decode(errors="replace")), body, limits)


def _read(found: re.Match[str] | None, body: bytes, limits: Limits) -> Envelope | None:
    if found is None or len(body) > limits.body:
        return None
    id, name, source, time, correlation, causation, key, version, attempt = found.groups()
    if len(source) > limits.header:
        return None
    try:
        moment = datetime.fromisoformat(time)
    except ValueError:
        return None
    return Envelope(
        id, name, moment, source, correlation, body, causation or None, key or None, NO_HEADERS, int(version),
        int(attempt),
    )  # fmt: skip


def binary(envelope: Envelope) -> tuple[dict[str, str], bytes]:
    """Return an envelope as headers and body, for a transport that has headers.

    Attributes become ``ce-`` headers and the envelope's headers stand beside them; all are printable ASCII, other
    characters percent-encoded. Raises ``EncodeError``.
    """
    if (quick := _quick_headers(envelope)) is not None:
        return quick, envelope.body
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


def _quick_headers(envelope: Envelope) -> dict[str, str] | None:
    """Return the headers of most messages; None for the long way."""
    id, name, time, source, correlation, _, causation, key, others, version, attempt, due, replyto = envelope
    texts = (id, name, source, correlation, causation or "", key or "")
    if others or due is not None or replyto is not None or not _PLAIN.fullmatch("".join(texts)):
        return None
    headers = {
        "ce-specversion": "1.0", "ce-id": id, "ce-type": name, "ce-source": source, "ce-time": _stamp(time, name),
        "ce-correlationid": correlation, "ce-dataversion": str(version), "ce-attempt": str(attempt),
        "content-type": "application/json",
    }  # fmt: skip
    if causation is not None:
        headers["ce-causationid"] = causation
    if key is not None:
        headers["ce-partitionkey"] = key
    return headers


def from_binary(
    headers: Mapping[str, str], body: bytes, limits: Limits, now: Callable[[], float] | None = None
) -> Envelope:
    """Return the envelope in headers and body; where the content type says so, in the body alone.

    Args:
        headers: as they arrived.
        body: as it arrived; it is not read.
        limits: what is too much.
        now: the time in seconds since the epoch of an event that tells none; without it such an event is refused.

    Raises ``DecodeError``.
    """
    if (quick := _quick_binary(headers, body, limits)) is not None:
        return quick
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


def _quick_binary(headers: Mapping[str, str], body: bytes, limits: Limits) -> Envelope | None:
    """Return the envelope in headers as ``binary`` writes most; None for the long way."""
    if len(headers) > len(_USUAL):
        return None
    values = [headers.get(name, "") for name in _USUAL]
    if len(headers) != len(values) - values.count(""):
        return None
    return _read(_USUALLY.fullmatch("\n".join(values)), body, limits)


def _attribute(header: str) -> str | None:
    lower = header.lower()
    return "datacontenttype" if lower == "content-type" else lower[3:] if lower.startswith("ce-") else None


def _attributes(envelope: Envelope) -> dict[str, str]:
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
) -> Envelope:
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
        return NO_HEADERS
    if fault := header_fault(headers, limits):
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
    if not value.isprintable() and CONTROL.search(value):
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
