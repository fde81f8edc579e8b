"""Turn wires into messages of AMQP and back."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from eventbus.clock import new_id
from eventbus.errors import Refused
from eventbus.transport import Wire
from eventbus.transports._rabbitmq_client import aiormq

if TYPE_CHECKING:
    from aiormq.abc import DeliveredMessage
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

SHORT = 255
"""Bytes of a short text in AMQP."""

TYPE = "content-type"


def to_amqp(wire: Wire, room: int, **extra: str | int) -> "Basic.Properties":
    """Return the properties of a message that keeps a wire. Raises ``Refused`` if its headers exceed ``room`` bytes."""
    headers: dict[str, Any] = {
        f"{ESCAPED}{name}" if name.startswith(MEANT) else name: value for name, value in wire.headers.items()
    }
    if wire.key is not None:
        headers[KEY] = wire.key
    type_ = headers.pop(TYPE, None)
    if type_ is not None and len(type_.encode()) > SHORT:
        headers[TYPE], type_ = type_, None
    id = wire.id
    if not 0 < len(id.encode()) <= SHORT:
        headers[ID], id = id, new_id()
    if long := [name for name in headers if len(name) > SHORT]:
        raise Refused(f"a header's name of {len(long[0])} characters is longer than the {SHORT} that AMQP takes")
    size = sum(len(name) + len(value) for name, value in headers.items())
    if 4 * size > room and (size := _bytes(headers)) > room:
        raise Refused(f"its headers of {size} bytes are more than the {room} that RabbitMQ takes in one frame")
    return aiormq.spec.Basic.Properties(
        message_id=id, content_type=type_, headers={**headers, **extra}, delivery_mode=2
    )


def from_amqp(message: "DeliveredMessage") -> tuple[Wire, int]:
    """Return the wire of a message, ours or anybody's, and how often it was delivered before."""
    properties = message.header.properties
    found: Mapping[str, Any] = properties.headers or {}
    headers: dict[str, str] = {}
    if properties.content_type:
        headers[TYPE] = properties.content_type
    for name, value in found.items():
        if name.startswith(ESCAPED):
            headers[name.removeprefix(ESCAPED)] = _text(value)
        elif not name.startswith((OURS, *THEIRS)):
            headers[name] = _text(value)
    key = found.get(KEY)
    id = found.get(ID, properties.message_id)
    wire = Wire("" if id is None else _text(id), message.body, headers, None if key is None else _text(key))
    return wire, _count(found, ATTEMPTS) + _count(found, "x-delivery-count")


def _count(headers: Mapping[str, Any], name: str) -> int:
    value = headers.get(name, 0)
    return value if isinstance(value, int) and value > 0 else 0


def _text(value: object) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes | bytearray) else str(value)


def _bytes(headers: Mapping[str, str]) -> int:
    return sum(len(name.encode()) + len(value.encode()) + 6 for name, value in headers.items())
