"""Turn wires into messages of NATS and back: id, key and headers travel as headers."""

import re
from types import MappingProxyType
from urllib.parse import quote, unquote

from eventbus.context import EMPTY
from eventbus.transport import Wire
from eventbus.transports._nats_line import Message

__all__ = ("FRAME", "ID", "KEY", "ORIGIN", "REASON", "dead_headers", "from_wire", "to_wire", "unfit")

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
HEADER = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")


def from_wire(wire: Wire) -> dict[str, str]:
    """Return the headers that a wire travels with."""
    headers = {**wire.headers, ID: wire.id}
    if wire.key is not None:
        headers[KEY] = quote(wire.key, safe=PLAIN)
    return headers


def to_wire(message: Message, otherwise: str) -> Wire:
    """Return what arrived; one that somebody else published without an id is called ``otherwise``."""
    found = message.headers
    if not found:
        return Wire(otherwise, message.data)
    key = found.get(KEY)
    headers = {name: value for name, value in found.items() if name != KEY and not name.startswith("Nats-")}
    return Wire(
        found.get(ID) or otherwise,
        message.data,
        MappingProxyType(headers) if headers else EMPTY,
        None if key is None else unquote(key),
    )


def dead_headers(wire: Wire, id: str, reason: str) -> dict[str, str]:
    """Return the headers of a dead copy, which the dead stream knows by ``id``."""
    return {
        **from_wire(wire),
        ID: id,
        ORIGIN: wire.id,
        REASON: quote(reason.strip(), safe=f"{PLAIN} ")[:LONGEST].strip(),
    }


def unfit(wire: Wire, largest: int) -> str:
    """Return why a wire can never travel, or nothing."""
    size = len(wire.body)
    if size > largest:
        return f"its body of {size} bytes is larger than the {largest} that the server takes"
    if not wire.id or wire.id != wire.id.strip() or not wire.id.isprintable():
        return f"NATS cannot carry the id {wire.id!r}"
    if _is_plain(wire):
        return ""
    for name, value in wire.headers.items():
        if not HEADER.fullmatch(name) or name.lower().startswith("nats-"):
            return f"NATS takes no header {name!r}"
        if value != value.strip() or "\n" in value or "\r" in value:
            return f"NATS cannot carry the value of header {name!r}: it has blanks around it, or line breaks"
    if (
        size + sum(len(name) + len(value.encode()) + 4 for name, value in from_wire(wire).items())
        > largest + FRAME // 2
    ):
        return "its headers and its body together are larger than the server takes"
    return ""


def _is_plain(wire: Wire) -> bool:
    """Tell whether a wire's headers are short ASCII without blanks, as most are: one look instead of one at each."""
    names, values = "".join(wire.headers), "".join(wire.headers.values())
    most = len(names) + len(values) + 4 * len(wire.headers) + 12 * (len(wire.id) + len(wire.key or "")) + 64
    return (
        most <= FRAME // 2
        and values.isascii()
        and values.isprintable()
        and " " not in values
        and "" not in wire.headers
        and HEADER.fullmatch(names) is not None
        and "nats-" not in names.lower()
    )
