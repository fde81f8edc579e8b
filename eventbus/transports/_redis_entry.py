"""Write a wire as an entry of a stream, or as a message of a channel, and read it again."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

from pydantic_core import from_json, to_json

from eventbus.context import EMPTY
from eventbus.transport import Wire

__all__ = ("decode", "encode", "frame", "unframe")


def encode(wire: Wire) -> tuple[str | bytes, ...]:
    """Return a wire as the fields and values of an entry.

    >>> encode(Wire("1", b"{}", {"x": "y"}))
    ('id', '1', 'headers', b'{"x":"y"}', 'body', b'{}')
    """
    fields: tuple[str | bytes, ...] = ("id", wire.id)
    if wire.key is not None:
        fields += ("key", wire.key)
    if wire.headers:
        fields += ("headers", to_json(dict(wire.headers)))
    return (*fields, "body", wire.body)


def decode(entry: bytes, flat: Sequence[bytes]) -> Wire:
    """Return an entry as a wire; one that another program wrote goes on, to be refused where wires are decoded.

    >>> decode(b"5-0", [b"body", b"{}", b"headers", b"[1]"])
    Wire(id='5-0', body=b'{}', headers=mappingproxy({}), key=None)
    """
    fields = dict(zip(flat[::2], flat[1::2], strict=False))
    id, key, headers = fields.get(b"id", entry), fields.get(b"key"), fields.get(b"headers")
    return Wire(
        id.decode(errors="replace"),
        fields.get(b"body", b""),
        EMPTY if headers is None else texts(headers),
        None if key is None else key.decode(errors="replace"),
    )


def texts(data: bytes) -> Mapping[str, str]:
    """Return what is a JSON object of texts; of anything else, nothing."""
    try:
        found: Any = from_json(data)
    except ValueError:
        return EMPTY
    if not isinstance(found, dict):
        return EMPTY
    pairs = cast("dict[str, Any]", found)
    return pairs if {*map(type, pairs.values())} <= {str} else EMPTY


def frame(wire: Wire) -> bytes:
    r"""Return a wire as one message: a line with id and key, then the body.

    >>> frame(Wire("1", b"{}", key="k"))
    b'["1", "k"]\n{}'
    """
    return json.dumps([wire.id, wire.key]).encode() + b"\n" + wire.body


def unframe(message: bytes) -> Wire:
    r"""Return a message as a wire; one that another program sent is all body, without an id.

    >>> unframe(b'["1", null]\n{}').id, unframe(b"hello").body
    ('1', b'hello')
    """
    line, found, body = message.partition(b"\n")
    try:
        parts = json.loads(line) if found else None
    except (ValueError, RecursionError):
        parts = None
    match parts:
        case [str(), None | str()]:
            id, key = cast("tuple[str, str | None]", parts)
            return Wire(id, body, key=key)
        case _:
            return Wire("", message)
