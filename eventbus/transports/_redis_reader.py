"""Be a subscription, whatever it reads, and own all that is open: readers, the line, and the tasks they run in."""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import anyio
from anyio.abc import TaskGroup

from eventbus._loop import check_opening
from eventbus._signal import Signal
from eventbus.errors import Lost, TransportError
from eventbus.transport import Delivery
from eventbus.transports._redis_link import Address, Line, Session

__all__ = ("POLL", "Hub", "Reader")

log = logging.getLogger("eventbus")

POLL = 0.2
"""Seconds that one fetch waits for news: what stop() may take, since a fetch is never cut."""

GRACE = 1.0
"""Seconds that closing gives to what is to be handed back."""


class Reader:
    """Be a subscription: ``run``, in a task of the transport, fetches until it is stopped, left or lost."""

    def __init__(self, address: Address, stream: str) -> None:
        self.address = address
        self.stream = stream
        self.opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.ended = asyncio.Event()
        """Set when nothing more will come."""
        self.left = False
        self.error: str | None = None
        self.buffer: deque[Delivery] = deque()
        """What nobody has received yet."""
        self.stopping = False
        self.over = asyncio.Event()
        """Set when it was left or lost."""
        self._news = Signal()
        self._room = asyncio.Event()

    async def receive(self) -> Delivery:
        """Return the next delivery."""
        while True:
            if self.error is not None:
                raise Lost(self.error)
            if self.buffer:
                return self.buffer.popleft()
            if self.ended.is_set():
                raise anyio.EndOfStream
            await self._news.wait()

    async def stop(self) -> None:
        """Take no more in; what was fetched already can still be received."""
        self.stopping = True
        self.settled()
        await self.ended.wait()

    def lose(self, why: str) -> None:
        """Let receivers raise ``Lost``; whoever fetches comes back within a poll and hands back what is unreceived."""
        self.error = self.error or why
        self.stopping = True
        self.over.set()
        self.settled()
        self._news.fire()

    def leave(self, why: str) -> None:
        """End it for good."""
        if self.left:
            return
        self.left = True
        self.lose(why)
        if self.ended.is_set():
            self.farewell()

    async def run(self) -> None:
        """Fetch until the end, and tell everybody which end it was."""
        session, why = Session(self.address), f"the transport to {self.address} was closed"
        try:
            await session.open()
            await self.begin(session)
            if not self.opened.done():
                self.opened.set_result(None)
            while not self.stopping:
                await self.step(session)
            self.ended.set()
            self._news.fire()
            await self.linger(session)
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
            self._news.fire()
            await session.close()

    async def begin(self, session: Session) -> None:
        """Do what comes before the first fetch."""

    async def step(self, session: Session) -> None:
        """Fetch once, or wait until there is room."""
        raise NotImplementedError

    async def linger(self, session: Session) -> None:
        """Do what must go on behind ``stop()``, until it is over."""

    def farewell(self) -> None:
        """Give back what nobody will handle here; perhaps again later."""

    def admit(self, delivery: Delivery) -> None:
        """Put a delivery into the buffer."""
        self.buffer.append(delivery)
        self._news.fire()

    def settled(self) -> None:
        """Note that there may be room."""
        self._room.set()

    async def room(self, seconds: float | None) -> None:
        """Wait until something was settled, or the end comes, or time is over."""
        self._room.clear()
        if not self.stopping:
            with anyio.move_on_after(seconds):
                await self._room.wait()


class Hub:
    """Own the line and the readers of one transport while it is open."""

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
        check_opening(f"the transport to {self.address}", is_open=self._tasks is not None)
        line, tasks = Line(self.address), anyio.create_task_group()
        self._line, self._tasks = line, await tasks.__aenter__()
        tasks.start_soon(self._run, line, name=f"eventbus line to {self.address}")
        try:
            await line.opened
        except BaseException:
            await self.close()
            raise

    async def _run(self, line: Line) -> None:
        """Run the line; nothing can be settled without it, so that all readers end with it."""
        try:
            await line.run()
        finally:
            for reader in list(self._readers):
                reader.lose(line.error or f"the transport to {self.address} was closed")

    async def close(self) -> None:
        """End every subscription, fail every waiter with ``Lost``, and hand back what nobody has received."""
        tasks, line = self._tasks, self._line
        if tasks is None or line is None:
            return
        self._tasks = self._line = None
        readers = list(self._readers)
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
        self._tasks.start_soon(self._read, reader, name=f"eventbus reader of {reader.stream}")
        try:
            await asyncio.shield(reader.opened)
            yield reader
        finally:
            reader.leave("the subscription was left")

    async def _read(self, reader: Reader) -> None:
        """Run a reader, and know it until it has ended: closing waits for its last words."""
        try:
            await reader.run()
        finally:
            self._readers.pop(reader, None)
