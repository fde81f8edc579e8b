"""Listen to a subject of core NATS: what arrives is there once, and nobody settles it."""

import asyncio
from collections import deque
from typing import Any

import anyio

from eventbus.clock import new_id
from eventbus.errors import Lost
from eventbus.transport import Delivery, Wire
from eventbus.transports._nats_line import Line, Message
from eventbus.transports._nats_wire import to_wire

__all__ = ("Listener",)


class Heard:
    """Be one message; all verbs do nothing, since the server has forgotten it."""

    __slots__ = ("wire",)
    attempt = 0

    def __init__(self, wire: Wire) -> None:
        self.wire = wire

    async def ack(self) -> None:
        """Do nothing."""

    async def retry(self, after: float) -> None:
        """Do nothing."""

    async def reject(self, reason: str) -> None:
        """Do nothing."""

    async def extend(self) -> None:
        """Do nothing."""


class Listener:
    """Be a subscription to a subject, with a bounded buffer."""

    def __init__(self, line: Line, subject: str, limit: int) -> None:
        self._line = line
        self._subject = subject
        self._limit = limit
        self._lost = ""
        self._stopped = False
        self._buffer: deque[Heard] = deque()
        self._news = asyncio.Event()
        self._listener: Any = None

    async def open(self) -> None:
        """Begin to listen; returns when the server knows, so that nothing published after it is missed."""
        self._listener = await self._line.listen(self._subject, self._arrive)
        self._line.pumps.add(self)
        echo = await self._line.request(self._line.inbox(), b"")
        if isinstance(echo, Lost):
            await self.close()
            raise echo

    async def receive(self) -> Delivery:
        """Return the next message."""
        while True:
            if self._lost:
                raise Lost(self._lost)
            if self._buffer:
                return self._buffer.popleft()
            if self._stopped:
                raise anyio.EndOfStream
            self._news.clear()
            await self._news.wait()

    async def stop(self) -> None:
        """Take no more in."""
        self._stopped = True
        self._buffer.clear()
        self._news.set()
        await self.close()

    async def close(self) -> None:
        """Listen no more."""
        self._line.pumps.discard(self)
        listener, self._listener = self._listener, None
        if listener is not None and not self._line.lost:
            await self._line.run(listener.unsubscribe)

    def lose(self, why: str) -> None:
        """End it."""
        self._lost = self._lost or why
        self._buffer.clear()
        self._news.set()

    def pulse(self, now: float) -> None:
        """Do nothing: the line itself notices its end."""

    async def _arrive(self, message: Message) -> None:
        if self._stopped or self._lost:
            return
        if len(self._buffer) >= self._limit:
            self.lose(f"the subscriber fell more than {self._limit} messages behind")
            return
        self._buffer.append(Heard(to_wire(message, new_id())))
        self._news.set()
