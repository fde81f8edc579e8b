"""Live events for WebSockets and server-sent events: bounded per reader, at most once, after commit."""

from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from anyio.lowlevel import current_token

from eventbus._loop import here
from eventbus._signal import Signal
from eventbus.errors import Lost, SlowConsumerError, WrongLoopError

__all__ = ("Gap", "Live", "Stream")

E = TypeVar("E")


@dataclass(frozen=True, slots=True)
class Gap:
    """Tell a reader how many events it missed here: it was too slow, or the link to other processes was."""

    missed: int
    """How many at least; 0: the link was lost for a while, and nobody can tell."""


class Stream(Generic[E]):
    """Iterate over live events in the order of their publishing; ends when the bus stops."""

    def __init__(self, types: tuple[type, ...], buffer: int, slow: Literal["drop", "disconnect"]) -> None:
        self.types = types
        self._buffer: deque[E | Gap] = deque()
        self._size = buffer
        self._slow = slow
        self._missed = 0
        self._parted = False
        self._ended = False
        self._news = Signal()
        self._reading = 0
        self.taken = 0
        """How often a reader has come for the next event."""
        self._home = current_token()

    def __aiter__(self) -> AsyncIterator[E]:
        return self

    async def __anext__(self) -> E:
        """Wait for the next event.

        With ``slow="disconnect"`` raises ``SlowConsumerError`` after falling behind, and ``Lost`` once events of other
        processes are missing.
        """
        self.taken += 1
        self._reading += 1
        try:
            while not (self._buffer or self._ended or self._missed or self._parted):
                await self._news.wait()
        finally:
            self._reading -= 1
        if self._missed and self._slow == "disconnect":
            raise SlowConsumerError(self._name, self._size)
        if self._parted:
            raise Lost(
                f"stream({self._name}) has missed events of other processes, whose link was lost or too slow: open it "
                'again, or use slow="drop" to be told of gaps instead'
            )
        if self._missed:
            gap, self._missed = Gap(self._missed), 0
            return gap  # type: ignore[return-value]  # E includes Gap where slow="drop", see EventBus.stream
        if self._buffer:
            return self._buffer.popleft()  # type: ignore[return-value]  # as above
        raise StopAsyncIteration

    @property
    def behind(self) -> bool:
        """Tell whether a reader waits here who has something to read by now."""
        return self._reading > 0 and bool(self._buffer or self._missed or self._ended or self._parted)

    @property
    def _name(self) -> str:
        return ", ".join(one.__name__ for one in self.types)

    def feed(self, event: E) -> None:
        """Take an event in; when the buffer is full the oldest gives way, and the reader will be told.

        Raises ``WrongLoopError`` outside the event loop of the reader, who could not be woken.
        """
        if self._ended:
            return
        if here() != self._home:
            raise WrongLoopError("publishing an event that a live stream follows", "another event loop or thread")
        self._append(event)

    def miss(self, events: int) -> None:
        """Note that so many events of other processes are missing here; 0 for nobody knows how many."""
        if self._ended:
            return
        if self._slow == "disconnect":
            self._parted = True
            self._news.fire()
        elif self._buffer and isinstance(last := self._buffer[-1], Gap):
            self._buffer[-1] = Gap(last.missed + events)
        else:
            self._append(Gap(events))

    def _append(self, item: E | Gap) -> None:
        if len(self._buffer) >= self._size:
            first = self._buffer.popleft()
            self._missed += max(first.missed, 1) if isinstance(first, Gap) else 1
        self._buffer.append(item)
        self._news.fire()

    def end(self) -> None:
        """Let the reader finish what it has and stop."""
        self._ended = True
        self._news.fire()


class Live:
    """Feed the open streams of one bus."""

    def __init__(self) -> None:
        self.streams: list[Stream[object]] = []

    def open(self, types: tuple[type, ...], buffer: int, slow: Literal["drop", "disconnect"]) -> Stream[object]:
        """Return a new stream that is fed from now on. Raises ``ValueError``."""
        if isinstance(buffer, bool) or buffer < 1:
            raise ValueError(f"stream(buffer=...) takes a whole number from 1, not {buffer!r}")
        if slow not in ("drop", "disconnect"):
            raise ValueError(f'stream(slow=...) takes "drop" or "disconnect", not {slow!r}')
        stream: Stream[object] = Stream(types, buffer, slow)
        self.streams.append(stream)
        return stream

    def close(self, stream: Stream[object]) -> None:
        """End one stream and forget it."""
        stream.end()
        self.streams.remove(stream)

    def feed(self, event: object) -> None:
        """Give an event to every stream that wants its type."""
        for stream in self.streams:
            if isinstance(event, stream.types):
                stream.feed(event)

    def miss(self, type: type, events: int) -> None:
        """Tell every stream that wants a type that events of other processes are missing."""
        for stream in self.streams:
            if issubclass(type, stream.types):
                stream.miss(events)

    def behind(self) -> int:
        """Count the streams whose readers have been woken and have not gone on yet."""
        return sum(stream.behind for stream in self.streams)

    def taken(self) -> int:
        """Count how often the readers of the open streams have come for the next event."""
        return sum(stream.taken for stream in self.streams)

    def end(self) -> None:
        """End all streams: the bus stops."""
        for stream in self.streams:
            stream.end()
