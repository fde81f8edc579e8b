"""Turn wires into messages of NATS and back: id, key and headers travel as headers."""

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple
from urllib.parse import quote, unquote

from eventbus.context import EMPTY
from eventbus.errors import Refused
from eventbus.transport import Wire

__all__ = ("FRAME", "Message", "dead_head", "frame_of", "head_of", "header", "status", "to_wire")

ID = "Nats-Msg-Id"
"""By it a stream knows what it has stored already."""
KEY = "eventbus-key"
REASON = "eventbus-reason"
ORIGIN = "eventbus-id"
"""The id of what is dead, whose copy has an id of its own."""
PLAIN = "!#$&'()*+,/:;=?@[]~"
"""What stays as it is in a key and a reason, beside letters and digits."""
FRAME = 8_192
"""Bytes that headers may add to a body: half of them those of its wire, half of them those of a dead copy."""
LONGEST = 3_000
"""Characters of a reason as it is written."""
BLANK = " \t\n\r\v\f"
"""What may stand around a value, and is no part of it."""
HEADER = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")


class Message(NamedTuple):
    """Hold what arrived; ``head`` is its headers as they travelled, or empty."""

    subject: str
    reply: str
    data: bytes
    head: bytes = b""


def head_of(wire: Wire, largest: int) -> bytes:
    """Return the headers that a wire travels with, as they travel. Raises ``Refused`` for what never can."""
    size, id = len(wire.body), wire.id
    if size > largest:
        raise Refused(f"its body of {size} bytes is larger than the {largest} that the server takes")
    if not id or id != id.strip() or not id.isprintable():
        raise Refused(f"NATS cannot carry the id {id!r}")
    names, values = "".join(wire.headers), "".join(wire.headers.values())
    if not (
        values.isascii()
        and values.isprintable()
        and " " not in values
        and "" not in wire.headers
        and HEADER.fullmatch(names)
        and "nats-" not in names.lower()
    ):  # which is one look at all, since most are plain; now one at each
        for name, value in wire.headers.items():
            _check(name, value)
    head = _written(wire, id)
    if size + len(head) > largest + FRAME // 2:
        raise Refused("its headers and its body together are larger than the server takes")
    return head


def frame_of(subject: str, reply: str, head: bytes, payload: bytes) -> bytes:
    """Return a message as it is sent."""
    if head:
        line = f"HPUB {subject} {reply} {len(head)} {len(head) + len(payload)}\r\n"
    else:
        line = f"PUB {subject} {reply} {len(payload)}\r\n"
    return b"".join((line.encode(), head, payload, b"\r\n"))


def dead_head(wire: Wire, id: str, reason: str) -> bytes:
    """Return the headers of a dead copy, which the dead stream knows by ``id``."""
    why = quote(reason.strip(), safe=f"{PLAIN} ")[:LONGEST].strip()
    return _written(wire, id, {ORIGIN: wire.id, REASON: why})


def to_wire(message: Message, otherwise: str) -> Wire:
    """Return what arrived; one that somebody else published without an id is called ``otherwise``."""
    if not message.head:
        return Wire(otherwise, message.data)
    headers: dict[str, str] = {}
    for line in message.head.decode(errors="replace").split("\r\n")[1:]:
        name, colon, value = line.partition(":")
        if colon:
            headers[name] = value.strip(BLANK)
    id, key = headers.pop(ID, ""), headers.pop(KEY, None)
    names = "".join(headers)
    if "Nats-" in names or " " in names or not (names.isascii() and names.isprintable()):
        headers = {name: value for name, value in headers.items() if _is_name(name)}
    return Wire(
        id or otherwise,
        message.data,
        MappingProxyType(headers) if headers else EMPTY,
        None if key is None else unquote(key),
    )


def status(message: Message) -> tuple[str, str]:
    """Return the status that a server says instead of a message, and its words; both empty: it is a message."""
    _, _, said = message.head.partition(b"\r\n")[0].decode().partition(" ")
    code, _, words = said.partition(" ")
    return code, words


def header(message: Message, name: str) -> str:
    """Return a header that a server wrote, or nothing."""
    _, _, rest = message.head.partition(f"\r\n{name}: ".encode())
    return rest.partition(b"\r\n")[0].decode()


def _is_name(text: str) -> bool:
    return text.isascii() and text.isprintable() and " " not in text and not text.startswith("Nats-")


def _written(wire: Wire, id: str, more: Mapping[str, str] = EMPTY) -> bytes:
    headers = {**wire.headers, ID: id, **more}
    if wire.key is not None:
        headers[KEY] = quote(wire.key, safe=PLAIN)
    lines = [f"{name}: {value}\r\n" for name, value in headers.items()]
    return f"NATS/1.0\r\n{''.join(lines)}\r\n".encode()


def _check(name: str, value: str) -> None:
    if not HEADER.fullmatch(name) or name.lower().startswith("nats-"):
        raise Refused(f"NATS takes no header {name!r}")
    if value != value.strip() or "\n" in value or "\r" in value:
        raise Refused(f"NATS cannot carry the value of header {name!r}: it has blanks around it, or line breaks")
