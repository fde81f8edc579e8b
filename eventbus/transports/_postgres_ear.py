"""Write a wire as the payload of a NOTIFY, read it again, and keep what is heard until somebody receives it."""

import asyncio
import json
from base64 import b64decode, b64encode
from hashlib import sha256

from eventbus._mailbox import Mailbox
from eventbus.transport import Wire

__all__ = ("Ear", "frame", "short", "unframe")

NAME = 63
"""Bytes of a channel's name."""


def short(topic: str) -> str:
    """Return the channel of a topic: its name, or its beginning and a digest.

    >>> short("shop.live.order_placed")
    'shop.live.order_placed'
    """
    text = topic.encode()
    if len(text) <= NAME:
        return topic
    return f"{text[: NAME - 17].decode(errors='ignore')}~{sha256(text).hexdigest()[:16]}"


def frame(wire: Wire) -> str:
    r"""Return a wire as a payload: a line with id and key, then the body; what is no text is base64.

    >>> frame(Wire("1", b"{}", key="k")), frame(Wire("1", b"\0"))
    ('["1", "k"]\n{}', '["1", null, "base64"]\nAA==')
    """
    try:
        text = wire.body.decode()
    except UnicodeDecodeError:
        text = "\0"
    if "\0" not in text:
        return f"{json.dumps([wire.id, wire.key])}\n{text}"
    return f"{json.dumps([wire.id, wire.key, 'base64'])}\n{b64encode(wire.body).decode()}"


def unframe(payload: str) -> Wire:
    r"""Return a payload as a wire; one that another program sent is all body, without an id.

    >>> unframe('["1", null]\n{}').id, unframe("hello").body
    ('1', b'hello')
    """
    line, found, text = payload.partition("\n")
    try:
        match json.loads(line) if found else None:
            case [str(id), None | str() as key]:
                return Wire(id, text.encode(), key=key)
            case [str(id), None | str() as key, "base64"]:
                return Wire(id, b64decode(text), key=key)
            case _:
                return Wire("", payload.encode())
    except (ValueError, RecursionError):
        return Wire("", payload.encode())


class Ear(Mailbox):
    """Be a subscription to a channel."""

    def __init__(self, limit: int) -> None:
        super().__init__(limit)
        self.opened = asyncio.Event()
        """Set when it hears, or never will."""

    def lose(self, why: str) -> None:
        """End it, also for who waits until it hears."""
        super().lose(why)
        self.opened.set()
