"""Listen to one Pub/Sub channel."""

import json
from typing import cast

from eventbus.errors import Lost
from eventbus.transport import Wire
from eventbus.transports._redis_link import Address, Session
from eventbus.transports._redis_reader import POLL, Copy, Reader

__all__ = ("Ear", "frame")


def frame(wire: Wire) -> bytes:
    """Return a wire as one message: a line with id and key, then the body.

    >>> frame(Wire("1", b"{}", key="k"))
    b'["1", "k"]\\n{}'
    """
    return json.dumps([wire.id, wire.key]).encode() + b"\n" + wire.body


def unframe(message: bytes) -> Wire:
    """Return a message as a wire; one that another program sent is all body, without an id.

    >>> unframe(b'["1", null]\\n{}').id, unframe(b"hello").body
    ('1', b'hello')
    """
    line, found, body = message.partition(b"\n")
    try:
        parts = json.loads(line) if found else None
    except ValueError:
        parts = None
    match parts:
        case [str(), None | str()]:
            id, key = cast("tuple[str, str | None]", parts)
            return Wire(id, body, key=key)
        case _:
            return Wire("", message)


class Ear(Reader):
    """Take what is published from now on; who is slower than the others by too much is told so and ended."""

    def __init__(self, address: Address, stream: str, most: int) -> None:
        super().__init__(address, stream, most)
        self._silent = 0.0

    async def begin(self, session: Session) -> None:
        """Wait until the server has us among the listeners."""
        [reply] = await session.ask([("SUBSCRIBE", self.stream)])
        if isinstance(reply, Exception):
            raise Lost(f"listening to {self.stream!r}: {reply}")

    async def step(self, session: Session) -> None:
        """Take one message; after a long silence ask whether the server is still there."""
        message = await session.listen(POLL)
        if message is None:
            self._silent += POLL
            if self._silent >= 2 * self._address.timeout:
                raise Lost(f"{self._address} did not answer within {self._address.timeout:g} s")
            if self._silent >= self._address.timeout > self._silent - POLL:
                await session.tell("PING")
            return
        self._silent = 0.0
        if message[0] != b"message":
            return
        if len(self._buffer) >= self.prefetch:
            raise Lost(f"this listener to {self.stream!r} fell more than {self.prefetch} messages behind")
        self.append(Copy(self, b"", unframe(message[2]), 0))

    async def settle(self, copy: Copy, after: float | None) -> None:
        """Need nothing: there is nothing to settle."""

    async def bury(self, copy: Copy, reason: str) -> None:
        """Need nothing: there is nothing to settle."""

    async def keep(self, copy: Copy) -> None:
        """Need no lease."""

    def farewell(self) -> None:
        """Leave nothing behind."""
