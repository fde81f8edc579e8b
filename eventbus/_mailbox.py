"""Hold what has arrived for a subscriber until it is received, as far as there is room."""

import sys
from collections import deque

import anyio

from eventbus._signal import Signal
from eventbus.errors import Lost
from eventbus.transport import Delivery, Wire

__all__ = ("Mailbox", "Presettled")


class Presettled:
    """Be a message that comes at most once: it was settled when it was sent, and all verbs do nothing."""

    __slots__ = ("wire",)
    attempt = 0

    def __init__(self, wire: Wire) -> None:
        self.wire = wire

    async def ack(self, *_: object, **__: object) -> None:
        """Do nothing."""

    retry = reject = extend = ack


class Mailbox:
    """Be a subscription that is filled from elsewhere, and lost with the first message for which there is no room."""

    def __init__(self, limit: int = sys.maxsize) -> None:
        self.lost = ""
        self.stopped = False
        self._limit = limit
        self._buffer: deque[Delivery] = deque()
        self._news = Signal()

    async def receive(self) -> Delivery:
        """Return the oldest message. Raises ``Lost``, and ``anyio.EndOfStream`` when it is stopped and empty."""
        while not self.lost:
            if self._buffer:
                return self._buffer.popleft()
            if self.stopped:
                raise anyio.EndOfStream
            await self._news.wait()
        raise Lost(self.lost)

    async def stop(self) -> None:
        """Take no more in, and drop what nobody has received."""
        self._buffer.clear()
        self.end()

    def end(self) -> None:
        """Take no more in; what is here can still be received."""
        self.stopped = True
        self._news.fire()

    def put(self, delivery: Delivery) -> None:
        """Take a message in, unless it is over; one too many ends it."""
        if self.stopped or self.lost:
            return
        if len(self._buffer) >= self._limit:
            self.lose(f"the subscriber fell more than {self._limit} messages behind")
        else:
            self._buffer.append(delivery)
            self._news.fire()

    def lose(self, why: str) -> None:
        """End it; the first reason stays."""
        self.lost = self.lost or why
        self._buffer.clear()
        self._news.fire()
