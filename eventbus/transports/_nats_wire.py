"""Turn wires into messages of NATS and back: id, key and headers travel as headers."""

import re
from types import MappingProxyType
from typing import NamedTuple
from urllib.parse import quote, unquote

from eventbus.context import EMPTY
from eventbus.errors import Refused
from eventbus.transport import Wire

__all__ = ("FRAME", "ID", "KEY", "ORIGIN", "REASON", "Message", "dead_head", "head_of", "header", "status", "to_wire")

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
FIRST = "NATS/1.0"
"""The line before the headers, on which a server also says the status of what is no message of anybody."""
BLANK = " \t\n\r\v\f"
"""What may stand around a value, and is no part of it."""
NAME = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
HEADER = re.compile(NAME)
USUAL = re.compile(rf"{FIRST}\r\n(?:{NAME}: [!-~]*\r\n)+\r\n")
"""Headers of ASCII without blanks, as most are: one look instead of one at each."""


class Message(NamedTuple):
    """Hold what arrived; ``head`` is its headers as they travelled, or empty."""

    subject: str
    reply: str
    data: bytes
    head: bytes = b""


def head_of(wire: Wire, largest: int) -> bytes:
    """Return the headers that a wire travels with, as they travel. Raises ``Refused`` for what never can."""
    size, id, given = len(wire.body), wire.id, wire.headers
    if size > largest:
        raise Refused(f"its body of {size} bytes is larger than the {largest} that the server takes")
    if not id or id != id.strip() or not id.isprintable():
        raise Refused(f"NATS cannot carry the id {id!r}")
    headers = _headers(wire, id)
    text = _written(headers)
    if (
        USUAL.fullmatch(text) is None
        or text.count("\n") != len(headers) + 2
        or text.lower().count("\nnats-") != 1
        or ID in given
    ):
        _check(wire)
    head = text.encode()
    if size + len(head) > largest + FRAME // 2:
        raise Refused("its headers and its body together are larger than the server takes")
    return head


def dead_head(wire: Wire, id: str, reason: str) -> bytes:
    """Return the headers of a dead copy, which the dead stream knows by ``id``."""
    why = quote(reason.strip(), safe=f"{PLAIN} ")[:LONGEST].strip()
    return _written({**_headers(wire, id), ORIGIN: wire.id, REASON: why}).encode()


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


def _headers(wire: Wire, id: str) -> dict[str, str]:
    headers = {**wire.headers, ID: id}
    if wire.key is not None:
        headers[KEY] = quote(wire.key, safe=PLAIN)
    return headers


def _written(headers: dict[str, str]) -> str:
    lines = [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([FIRST, *lines, "", ""])


def _check(wire: Wire) -> None:
    for name, value in wire.headers.items():
        if not HEADER.fullmatch(name) or name.lower().startswith("nats-"):
            raise Refused(f"NATS takes no header {name!r}")
        if value != value.strip() or "\n" in value or "\r" in value:
            raise Refused(f"NATS cannot carry the value of header {name!r}: it has blanks around it, or line breaks")
