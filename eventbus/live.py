"""Live events for WebSockets and server-sent events: bounded per reader, at most once, after commit."""

from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from anyio.lowlevel import current_token

from eventbus.errors import SlowConsumerError, WrongLoopError
from eventbus.lanes import Signal

__all__ = ("Gap", "Live", "Stream")

E = TypeVar("E")


@dataclass(frozen=True, slots=True)
class Gap:
    """Tell a reader that was too slow how many events it missed here."""

    missed: int


class Stream(Generic[E]):
    """Iterate over live events in the order of their publishing; ends when the bus stops."""

    def __init__(self, types: tuple[type, ...], buffer: int, slow: Literal["drop", "disconnect"]) -> None:
        self.types = types
        self._buffer: deque[E] = deque()
        self._size = buffer
        self._slow = slow
        self._missed = 0
        self._ended = False
        self._news = Signal()
        self._reading = 0
        self.taken = 0
        """How often a reader has come for the next event."""
        self._home = current_token()

    def __aiter__(self) -> AsyncIterator[E]:
        return self

    async def __anext__(self) -> E:
        """Wait for the next event. Raises ``SlowConsumerError`` after falling behind with ``slow="disconnect"``."""
        self.taken += 1
        self._reading += 1
        try:
            while not (self._buffer or self._ended or self._missed):
                await self._news.wait()
        finally:
            self._reading -= 1
        if self._missed and self._slow == "disconnect":
            raise SlowConsumerError(", ".join(one.__name__ for one in self.types), self._size)
        if self._missed:
            gap, self._missed = Gap(self._missed), 0
            return gap  # type: ignore[return-value]  # E includes Gap where slow="drop", see EventBus.stream
        if self._buffer:
            return self._buffer.popleft()
        raise StopAsyncIteration

    @property
    def behind(self) -> bool:
        """Tell whether a reader waits here who has something to read by now."""
        return self._reading > 0 and bool(self._buffer or self._missed or self._ended)

    def feed(self, event: E) -> None:
        """Take an event in; when the buffer is full the oldest gives way, and the reader will be told.

        Raises ``WrongLoopError`` outside the event loop of the reader, who could not be woken.
        """
        if self._ended:
            return
        try:
            here = current_token()
        except RuntimeError:
            here = None
        if here != self._home:
            raise WrongLoopError("publishing an event that a live stream follows", "another event loop or thread")
        if len(self._buffer) >= self._size:
            self._buffer.popleft()
            self._missed += 1
        self._buffer.append(event)
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
