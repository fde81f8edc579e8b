"""Turn wires into messages of AMQP and back."""

from collections.abc import Mapping
from struct import Struct
from typing import TYPE_CHECKING, Any

from eventbus.context import EMPTY
from eventbus.errors import Refused
from eventbus.transport import Wire

if TYPE_CHECKING:
    from pamqp.commands import Basic

OURS = "x-eventbus-"
"""Begins every header of this adapter."""

KEY, ID, ATTEMPTS, REASON, FAILURES, TOPIC = (
    f"{OURS}{name}" for name in ("key", "id", "attempts", "reason", "failures", "topic")
)
ESCAPED = f"{OURS}header-"
"""Stands before a header whose name means something to RabbitMQ."""

THEIRS = ("x-death", "x-first-death-", "x-last-death-", "x-delivery-count", "x-acquired-count", "x-opt-")
"""Begin the headers that RabbitMQ adds on the way."""

MEANT = ("CC", "BCC", "x-delay", "x-match", OURS, *THEIRS)
"""Begin the names of headers that RabbitMQ, or this adapter, would obey."""

LARGEST = 16 * 1024 * 1024
"""Bytes of a body that every version of RabbitMQ takes unless it is told otherwise."""

SHORT = 255
"""Bytes of a short text in AMQP."""

TYPE = "content-type"


_BASIC, _PUBLISH, _MANDATORY = 60, 40, 1
_METHOD, _HEADER, _BODY, _END = 1, 2, 3, b"\xce"
"""The kinds of frames, and what each ends with."""
_TYPED, _USUAL = 0x8000, 0x3080
"""There is a content type; there are headers, the mode of delivery and an id."""
_pack_method = Struct(">BHIHHH").pack
_pack_header = Struct(">BHIHHQH").pack
_pack_body = Struct(">BHI").pack


def beginning(channel: int, exchange: str, key: str) -> bytes:
    """Return the frame that begins a message which has to reach a queue. Raises ``Refused`` for a long name."""
    place, way = exchange.encode(), key.encode()
    if len(place) > SHORT or len(way) > SHORT:
        raise Refused(f"a name is longer than the {SHORT} bytes that AMQP takes: {exchange!r}, {key!r}")
    rest = b"%c%b%c%b%c" % (len(place), place, len(way), way, _MANDATORY)
    return _pack_method(_METHOD, channel, 6 + len(rest), _BASIC, _PUBLISH, 0) + rest + _END


def to_amqp(wire: Wire, id: str, channel: int, room: int, extra: Mapping[str, str | int] = EMPTY) -> list[bytes]:
    """Return the further frames of a message that keeps a wire.

    Args:
        wire: what is to be kept.
        id: by what RabbitMQ shall know it.
        channel: the number of the channel.
        room: how many bytes a frame has room for.
        extra: headers of this adapter.

    Raises ``Refused`` for a body or headers that RabbitMQ does not take, and ``ValueError`` for what is no text.
    """
    body, size = wire.body, len(wire.body)
    if size > LARGEST:
        raise Refused(f"its body of {size} bytes is larger than {LARGEST}")
    headers: dict[str, str | int] = {
        f"{ESCAPED}{name}" if name.startswith(MEANT) else name: value for name, value in wire.headers.items()
    }
    if wire.key is not None:
        headers[KEY] = wire.key
    if id != wire.id:
        headers[ID] = wire.id
    headers.update(extra)
    kind = wire.headers.get(TYPE, "").encode()
    if is_typed := 0 < len(kind) <= SHORT:
        del headers[TYPE]
    rows: list[bytes] = []
    for name, value in headers.items():
        label = name.encode()
        if len(label) > SHORT:
            raise Refused(f"a header's name of {len(label)} bytes is longer than the {SHORT} that AMQP takes")
        if isinstance(value, int):
            rows.append(b"%c%bl%b" % (len(label), label, value.to_bytes(8)))
        else:
            text = value.encode()
            rows.append(b"%c%bS%b%b" % (len(label), label, len(text).to_bytes(4), text))
    table, known = b"".join(rows), id.encode()
    start = b"%c%b" % (len(kind), kind) if is_typed else b""
    head = b"%b%b%b\2%c%b" % (start, len(table).to_bytes(4), table, len(known), known)
    if (taken := 14 + len(head)) > room:
        raise Refused(f"its headers of {taken} bytes are more than the {room} that RabbitMQ takes in one frame")
    flags = _USUAL | _TYPED if is_typed else _USUAL
    frames = [_pack_header(_HEADER, channel, taken, _BASIC, 0, size, flags), head, _END]
    for first in range(0, size, room):
        part = body[first : first + room]
        frames += _pack_body(_BODY, channel, len(part)), part, _END
    return frames


def from_amqp(properties: "Basic.Properties", body: bytes) -> tuple[Wire, int]:
    """Return the wire of a message, ours or anybody's, and how often it was delivered before."""
    found: Mapping[str, Any] = properties.headers or {}
    headers: dict[str, str] = {}
    if properties.content_type:
        headers[TYPE] = properties.content_type
    for name, value in found.items():
        text = value if type(value) is str else _text(value)
        if not name.startswith("x-"):  # neither ours nor theirs
            headers[name] = text
        elif name.startswith(ESCAPED):
            headers[name.removeprefix(ESCAPED)] = text
        elif not name.startswith((OURS, *THEIRS)):
            headers[name] = text
    key = found.get(KEY)
    id = found.get(ID, properties.message_id)
    wire = Wire("" if id is None else _text(id), body, headers, None if key is None else _text(key))
    return wire, _count(found, ATTEMPTS) + _count(found, "x-delivery-count")


def _count(headers: Mapping[str, Any], name: str) -> int:
    value = headers.get(name, 0)
    return value if isinstance(value, int) and value > 0 else 0


def _text(value: object) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes | bytearray) else str(value)
