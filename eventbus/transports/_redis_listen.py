"""Listen to what is published from now on, in a stream or in a channel; nothing that a listener drops comes back."""

import math

from eventbus._mailbox import Presettled
from eventbus.errors import Lost
from eventbus.transport import Wire
from eventbus.transports._redis_entry import decode, unframe
from eventbus.transports._redis_link import Address, Session, refusal
from eventbus.transports._redis_reader import POLL, Reader

__all__ = ("ChannelListener", "StreamListener")


class Heard:
    """Be one delivery to a listener: any verb that settles it makes room for the next."""

    __slots__ = ("reader", "wire")
    attempt = 1

    def __init__(self, reader: "StreamListener", wire: Wire) -> None:
        self.reader = reader
        self.wire = wire

    async def ack(self, *_: object, **__: object) -> None:
        """Drop it."""
        self.reader.drop(self)

    retry = reject = ack

    async def extend(self) -> None:
        """Need no lease."""


class StreamListener(Reader):
    """Listen to a stream, and read no more than may be unsettled."""

    def __init__(self, address: Address, stream: str, prefetch: int) -> None:
        super().__init__(address, stream)
        self._prefetch = prefetch
        self._held: set[Heard] = set()
        self._last = b"0-0"

    async def begin(self, session: Session) -> None:
        """Begin behind the last entry there is."""
        [reply] = await session.ask([("XREVRANGE", self.stream, "+", "-", "COUNT", 1)])
        if (why := refusal(reply)) is not None:
            raise Lost(f"reading {self.stream!r}: {why}")
        self._last = reply[0][0] if reply else b"0-0"

    async def step(self, session: Session) -> None:
        """Read what there is room for."""
        room = self._prefetch - len(self._held)
        if room <= 0:
            await self.room(None)
            return
        block = math.ceil(1_000 * POLL)
        [found] = await session.ask(
            [("XREAD", "COUNT", room, "BLOCK", block, "STREAMS", self.stream, self._last)], POLL
        )
        if (why := refusal(found)) is not None:
            raise Lost(f"reading {self.stream!r}: {why}")
        for entry, flat in found[0][1] if found else ():
            self._last = entry
            heard = Heard(self, decode(entry, flat))
            self._held.add(heard)
            self.admit(heard)

    def drop(self, heard: Heard) -> None:
        """Make room for another."""
        self._held.discard(heard)
        self.settled()


class ChannelListener(Reader):
    """Listen to a channel; who is slower than the others by ``most`` messages is told so, and ended."""

    def __init__(self, address: Address, channel: str, most: int) -> None:
        super().__init__(address, channel)
        self._most = most
        self._silent = 0.0

    async def begin(self, session: Session) -> None:
        """Wait until the server has us among the listeners."""
        [reply] = await session.ask([("SUBSCRIBE", self.stream)])
        if (why := refusal(reply)) is not None:
            raise Lost(f"listening to {self.stream!r}: {why}")

    async def step(self, session: Session) -> None:
        """Take one message; after a long silence ask whether the server is still there."""
        message, timeout = await session.listen(POLL), self.address.timeout
        if message is None:
            self._silent += POLL
            if self._silent >= 2 * timeout:
                raise Lost(f"{self.address} did not answer within {timeout:g} s")
            if self._silent >= timeout > self._silent - POLL:
                await session.tell("PING")
            return
        self._silent = 0.0
        if message[0] == b"message":
            if len(self.buffer) >= self._most:
                raise Lost(f"this listener to {self.stream!r} fell more than {self._most} messages behind")
            self.admit(Presettled(unframe(message[2])))
