"""Hold what came from one partition: in which order, and what of it is settled."""

from collections import deque
from typing import Protocol

from eventbus.errors import SettleError, TransportError
from eventbus.transport import Wire

__all__ = ("Copy", "Track")


class Track:
    """Be one partition in the hands of this consumer: what came of it in order, and what of that is settled."""

    __slots__ = ("committed", "done", "line", "lost", "next", "open")

    def __init__(self) -> None:
        self.line: deque[int] = deque()
        """Offsets that came, from the first unsettled one."""
        self.done: set[int] = set()
        """Offsets settled beyond the first unsettled one."""
        self.open = 0
        """How many are delivered and unsettled."""
        self.next: int | None = None
        """The offset behind everything that came."""
        self.committed: int | None = None
        """The last position that was committed, or that was found when the partition came."""
        self.lost = False

    @property
    def position(self) -> int | None:
        """Return the offset below which everything is settled, or None if nothing came yet."""
        return self.line[0] if self.line else self.next

    def came(self, offset: int) -> None:
        """Note a record."""
        self.line.append(offset)
        self.next = offset + 1
        if self.committed is None:
            self.committed = offset

    def settle(self, offset: int) -> None:
        """Note that a record is settled."""
        self.done.add(offset)
        while self.line and self.line[0] in self.done:
            self.done.remove(self.line.popleft())


class Holder(Protocol):
    """Be who holds what is delivered and unsettled."""

    async def bury(self, wire: Wire, reason: str) -> None:
        """Keep a dead copy. Raises ``TransportError`` if that is not confirmed."""
        ...

    def finish(self, copy: "Copy") -> None:
        """Take a settled record out of what is held."""
        ...

    def restore(self, copy: "Copy") -> None:
        """Put a record back to its place."""
        ...

    def lose(self, why: str) -> None:
        """End the subscription."""
        ...


class Copy:
    """Be a record in the hands of this process."""

    __slots__ = ("offset", "place", "reader", "settled", "track", "wire")

    attempt = 0
    """Kafka counts no deliveries."""

    def __init__(self, reader: Holder, track: Track, wire: Wire, offset: int, place: int) -> None:
        self.reader = reader
        self.track = track
        self.wire = wire
        self.offset = offset
        self.place = place
        self.settled = False

    def __lt__(self, other: "Copy") -> bool:
        return self.place < other.place

    async def ack(self) -> None:
        """Settle it as done; it is committed together with others as soon as nothing before it is unsettled."""
        if self._settle():
            self.reader.finish(self)

    async def retry(self, after: float) -> None:
        """Hand it back: it comes again at its place. A delay is held by whoever asks for one, not by Kafka."""
        if after:
            raise ValueError(f"Kafka holds no delay: retry() takes 0, not {after!r}")
        if self._settle():
            self.reader.restore(self)

    async def reject(self, reason: str) -> None:
        """Settle it as dead once its dead copy is confirmed; without a group it is only dropped."""
        if not self._settle():
            return
        try:
            await self.reader.bury(self.wire, reason)
        except TransportError as error:
            self.reader.lose(f"the dead copy of message {self.wire.id} could not be kept: {error}")
            raise SettleError(f"message {self.wire.id} comes again, its dead copy could not be kept") from error
        except BaseException:
            self.settled = False
            raise
        if self.track.lost:
            raise SettleError("its partition moved to another consumer, which gets the message again")
        self.reader.finish(self)

    async def extend(self) -> None:
        """Do nothing: membership in the group is the lease."""

    def _settle(self) -> bool:
        """Use the right to settle; False if an earlier verb did. Raises ``SettleError`` if it is somebody else's."""
        if self.settled:
            return False
        if self.track.lost:
            raise SettleError("its partition moved to another consumer, or the subscription is over")
        self.settled = True
        return True
