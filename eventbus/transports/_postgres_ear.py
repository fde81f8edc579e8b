"""Write a wire as the payload of a NOTIFY, read it again, and keep what is heard until somebody receives it."""

import asyncio
import json
from base64 import b64decode, b64encode
from collections import deque
from hashlib import sha256

import anyio

from eventbus.errors import Lost
from eventbus.transport import Delivery, Wire

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


class Heard:
    """Be one message; all verbs do nothing, since the server has forgotten it."""

    attempt = 0

    def __init__(self, wire: Wire) -> None:
        self.wire = wire

    async def ack(self, *_: object, **__: object) -> None:
        """Do nothing."""

    retry = reject = extend = ack


class Ear:
    """Be a subscription to a channel, with a bounded buffer."""

    def __init__(self, limit: int) -> None:
        self.opened = asyncio.Event()
        """Set when it hears, or never will."""
        self.stopped = False
        self._limit, self._lost = limit, ""
        self._buffer: deque[Heard] = deque()
        self._news = asyncio.Event()

    async def receive(self) -> Delivery:
        """Return the next message."""
        while not self._lost:
            if self.stopped:
                raise anyio.EndOfStream
            if self._buffer:
                return self._buffer.popleft()
            self._news.clear()
            await self._news.wait()
        raise Lost(self._lost)

    async def stop(self) -> None:
        """Take no more in."""
        self.stopped = True
        self._news.set()

    def hear(self, wire: Wire) -> None:
        """Take a message in, or end it where too many wait."""
        if len(self._buffer) >= self._limit:
            self.lose(f"the subscriber fell more than {self._limit} messages behind")
        elif not self.stopped and not self._lost:
            self._buffer.append(Heard(wire))
            self._news.set()

    def lose(self, why: str) -> None:
        """End it."""
        self._lost = self._lost or why
        self._buffer.clear()
        self._news.set()
        self.opened.set()
