"""Be a subscription, whatever it reads: a buffer, room for so many unsettled messages, and one task that fetches."""

import asyncio
import json
import logging
import math
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager

import anyio
from anyio.abc import TaskGroup

from eventbus.context import EMPTY
from eventbus.errors import Lost, TransportError
from eventbus.transport import Delivery, Wire
from eventbus.transports._redis_link import Address, Line, Session, refusal, texts

__all__ = ("POLL", "Copy", "Hub", "Listener", "Reader", "decode", "encode")

log = logging.getLogger("eventbus")

GRACE = 1.0
"""Seconds that closing gives to what is to be handed back."""

POLL = 0.2
"""Seconds that one fetch waits for news: what stop() may take, since a fetch is never cut."""

def encode(wire: Wire) -> tuple[str | bytes, ...]:
    """Return a wire as the fields and values of an entry."""
    fields: tuple[str | bytes, ...] = ("id", wire.id)
    if wire.key is not None:
        fields += ("key", wire.key)
    if wire.headers:
        fields += ("headers", json.dumps(dict(wire.headers)))
    return (*fields, "body", wire.body)


def decode(entry: bytes, flat: Sequence[bytes]) -> Wire:
    """Return an entry as a wire; what another program wrote goes on as it is, to be refused where wires are decoded."""
    fields = dict(zip(flat[::2], flat[1::2], strict=False))
    id, key, raw = fields.get(b"id", entry), fields.get(b"key"), fields.get(b"headers")
    try:
        headers = texts(json.loads(raw)) if raw else EMPTY
    except ValueError:
        headers = EMPTY
    return Wire(id.decode(errors="replace"), fields.get(b"body", b""), headers,
                None if key is None else key.decode(errors="replace"))  # fmt: skip


class Copy:
    """Be one delivery of one entry."""

    __slots__ = ("attempt", "count", "entry", "reader", "settled", "wire")

    def __init__(self, reader: "Reader", entry: bytes, wire: Wire, count: int) -> None:
        self.reader = reader
        self.entry = entry
        self.wire = wire
        self.attempt = count
        self.count = count
        """What the server counts, and by which it knows that this is the latest delivery."""
        self.settled = False

    async def ack(self) -> None:
        """Settle it as done."""
        if self._first():
            await self.reader.settle(self, None)

    async def retry(self, after: float) -> None:
        """Settle it as to come again in ``after`` seconds, at most a lease; 0 hands it back and counts no attempt."""
        if not 0 <= after < math.inf:
            raise ValueError(f"retry() takes the seconds to wait, 0 or more, not {after!r}")
        if self._first():
            await self.reader.settle(self, after)

    async def reject(self, reason: str) -> None:
        """Settle it as dead: copied, with the reason, and acknowledged at once."""
        if self._first():
            await self.reader.bury(self, reason)

    async def extend(self) -> None:
        """Keep it for another lease from now."""
        if not self.settled:
            await self.reader.keep(self)

    def _first(self) -> bool:
        first, self.settled = not self.settled, True
        return first


class Reader:
    """Be a subscription: ``run`` fetches as many as may be unsettled, in a task of the transport."""

    def __init__(self, address: Address, stream: str, prefetch: int) -> None:
        self.stream = stream
        self.opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.ended = asyncio.Event()
        """Set when nothing more will come."""
        self.left = False
        self.error: str | None = None
        self.prefetch = prefetch
        self.held: dict[bytes, Copy] = {}
        """What is unsettled, in the buffer too."""
        self._address = address
        self._buffer: deque[Copy] = deque()
        self._stopping = False
        self._news = asyncio.Event()
        self._room = asyncio.Event()

    async def receive(self) -> Delivery:
        """Return the next delivery."""
        while True:
            if self.error is not None:
                raise Lost(self.error)
            if self._buffer:
                return self._buffer.popleft()
            if self.ended.is_set():
                raise anyio.EndOfStream
            await self._news.wait()

    async def stop(self) -> None:
        """Take no more in; what was fetched already can still be received."""
        self._stopping = True
        self._room.set()
        await self.ended.wait()

    def leave(self, why: str) -> None:
        """End it now; whoever fetches comes back within a poll and hands back what nobody has received."""
        if self.left:
            return
        self.left = True
        self.lose(why)
        self._stopping = True
        self._room.set()
        if self.ended.is_set():
            self.farewell()

    def lose(self, why: str) -> None:
        """Let every receiver raise ``Lost``."""
        self.error = self.error or why
        self._wake()

    async def run(self) -> None:
        """Fetch until stopped, left or lost."""
        session, why = Session(self._address), f"the transport to {self._address} was closed"
        try:
            await session.open()
            await self.begin(session)
            if not self.opened.done():
                self.opened.set_result(None)
            while not self._stopping:
                await self.step(session)
            why = ""
        except TransportError as error:
            why = str(error)
            if not self.opened.done():
                self.opened.set_exception(error)
        except Exception as error:
            log.exception("reading %s failed", self.stream)
            why = f"reading {self.stream!r} failed: {error}"
        finally:
            if why:
                self.lose(why)
            if not self.opened.done():
                self.opened.set_exception(Lost(why or "the subscription was left"))
                self.opened.exception()  # nobody may wait for it any more
            if self.error is not None:
                self.farewell()
            self.ended.set()
            self._wake()
            await session.close()

    async def begin(self, session: Session) -> None:
        """Look where to begin."""
        raise NotImplementedError

    async def step(self, session: Session) -> None:
        """Fetch once."""
        raise NotImplementedError

    async def settle(self, copy: Copy, after: float | None) -> None:
        """Settle a delivery."""
        raise NotImplementedError

    async def bury(self, copy: Copy, reason: str) -> None:
        """Settle a delivery as dead."""
        raise NotImplementedError

    async def keep(self, copy: Copy) -> None:
        """Extend the lease of a delivery."""
        raise NotImplementedError

    def farewell(self) -> None:
        """Give back what nobody will handle here."""
        raise NotImplementedError

    def admit(self, copy: Copy) -> None:
        """Put a delivery into the buffer."""
        self.held[copy.entry] = copy
        self.append(copy)

    def append(self, copy: Copy) -> None:
        """Put a delivery that nobody will settle into the buffer."""
        self._buffer.append(copy)
        self._wake()

    def release(self, copy: Copy) -> None:
        """Let another in for one that is settled."""
        if self.held.get(copy.entry) is copy:
            del self.held[copy.entry]
            self._room.set()

    async def room(self, seconds: float | None = None) -> None:
        """Wait until something was settled, or the end comes, or time is over."""
        self._room.clear()
        if self._stopping:
            return
        try:
            async with asyncio.timeout(seconds):
                await self._room.wait()
        except TimeoutError:
            return

    def take_unreceived(self) -> list[Copy]:
        """Return what nobody has received, and forget it."""
        copies = list(self._buffer)
        self._buffer.clear()
        return copies

    def _wake(self) -> None:
        self._news.set()
        self._news = asyncio.Event()


class Listener(Reader):
    """Take what is published from now on, for itself; nothing that it drops comes back."""

    def __init__(self, address: Address, stream: str, prefetch: int) -> None:
        super().__init__(address, stream, prefetch)
        self._last = b"0-0"

    async def begin(self, session: Session) -> None:
        """Begin behind the last message there is."""
        [reply] = await session.ask([("XREVRANGE", self.stream, "+", "-", "COUNT", 1)])
        if (why := refusal(reply)) is not None:
            raise Lost(f"reading {self.stream!r}: {why}")
        self._last = reply[0][0] if reply else b"0-0"

    async def step(self, session: Session) -> None:
        """Read what there is room for."""
        room = self.prefetch - len(self.held)
        if room <= 0:
            await self.room()
            return
        block = math.ceil(1_000 * POLL)
        [found] = await session.ask(
            [("XREAD", "COUNT", room, "BLOCK", block, "STREAMS", self.stream, self._last)], POLL
        )
        if (why := refusal(found)) is not None:
            raise Lost(f"reading {self.stream!r}: {why}")
        for entry, flat in found[0][1] if found else ():
            self._last = entry
            self.admit(Copy(self, entry, decode(entry, flat), 1))

    async def settle(self, copy: Copy, after: float | None) -> None:
        """Make room for the next."""
        self.release(copy)

    async def bury(self, copy: Copy, reason: str) -> None:
        """Make room for the next."""
        self.release(copy)

    async def keep(self, copy: Copy) -> None:
        """Need no lease."""

    def farewell(self) -> None:
        """Leave nothing behind."""


class Hub:
    """Own the line and the readers of one transport while it is open, and the tasks in which they run."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self._readers: dict[Reader, None] = {}
        self._tasks: TaskGroup | None = None
        self._line: Line | None = None

    @property
    def line(self) -> Line:
        """Return the open line. Raises ``Lost``."""
        if self._line is None:
            raise Lost(f"the transport to {self.address} is not open")
        return self._line

    async def open(self) -> None:
        """Open the line on which everything but reading goes; the task that opens it also closes it."""
        if self._tasks is not None:
            raise TransportError(f"the transport to {self.address} is open already")
        try:
            self._line = Line(self.address)
        except RuntimeError as error:
            raise TransportError(f"the transport to {self.address} runs on asyncio, and this event loop is not") from error
        tasks = anyio.create_task_group()
        self._tasks = await tasks.__aenter__()
        tasks.start_soon(self._line.run, name=f"eventbus line to {self.address}")
        try:
            await self._line.opened
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """End every subscription, fail every waiter with ``Lost``, and hand back what nobody has received."""
        tasks, line = self._tasks, self._line
        if tasks is None or line is None:
            return
        self._tasks = self._line = None
        readers, self._readers = self._readers, {}
        for reader in readers:
            reader.leave(f"the transport to {self.address} was closed")
        try:
            with anyio.move_on_after(GRACE, shield=True):
                for reader in readers:
                    await reader.ended.wait()
                await line.settle()
        finally:
            tasks.cancel_scope.cancel()
            await tasks.__aexit__(None, None, None)

    @asynccontextmanager
    async def reading(self, reader: Reader) -> AsyncGenerator[Reader]:
        """Run a reader in a task of the transport until the subscription is left."""
        if self._tasks is None:
            raise Lost(f"the transport to {self.address} is not open")
        self._readers[reader] = None
        self._tasks.start_soon(reader.run, name=f"eventbus reader of {reader.stream}")
        try:
            await asyncio.shield(reader.opened)
            yield reader
        finally:
            self._readers.pop(reader, None)
            reader.leave("the subscription was left")
