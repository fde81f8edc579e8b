"""One life of the link to RabbitMQ: two connections, the tasks that use them, and their common end.

Publishing has a connection of its own, because RabbitMQ stops reading from those that publish when it runs out of
memory or disk, and acknowledgements and declarations must get through all the same.
"""

import asyncio
import ssl
from collections.abc import AsyncGenerator, Callable, Collection, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import anyio

from eventbus.context import EMPTY
from eventbus.errors import Lost, Refused, TransportError
from eventbus.transport import Wire, shut_out
from eventbus.transports._rabbitmq_client import Pen, aio_pika, aiormq, channel_of, link_of, reason, when_closed
from eventbus.transports._rabbitmq_names import Topology
from eventbus.transports._rabbitmq_outlet import Outlet

if TYPE_CHECKING:
    from aio_pika.abc import AbstractConnection
    from aiormq import Channel

T = TypeVar("T")

PROBE = 5.0
"""Seconds between two questions whether the other end still answers."""

FAREWELL = 1.5
"""Seconds for closing in good order."""

UNBOUNDED = 2**31
"""Bytes of a frame where the server sets no limit."""

FRAME = 8
"""Bytes of a frame that belong to AMQP itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Say where RabbitMQ is and how to speak to it; never shows the password."""

    url: str
    """With user and password."""
    shown: str
    """Without them."""
    context: ssl.SSLContext | None
    exchange: str
    timeout: float
    passive: bool

    def __repr__(self) -> str:
        return f"<{self.shown}>"


REFUSALS = (
    aiormq.exceptions.ChannelAccessRefused, aiormq.exceptions.ChannelPreconditionFailed,
    aiormq.exceptions.ChannelLockedResource,
)  # fmt: skip
"""What RabbitMQ answers to what it will never do."""


class Line:
    """Be one life: open it once; whatever breaks one part of it ends the whole."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self.over: str | None = None
        """Why this life has ended; None while it lasts."""
        self.ends: dict[Callable[[str], None], None] = {}
        """Called with the reason when this life ends."""
        self.pen: Pen
        """Writes to the connection that does not publish."""
        self.topology = Topology(address.exchange, address.passive, endless=False)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._connections: list[AbstractConnection] = []
        self._outlet: Outlet | None = None
        self._closing: list[asyncio.Task[None]] = []
        self._prober: asyncio.Task[None] | None = None
        self._levels = -1
        self._building = asyncio.Lock()

    async def open(self) -> None:
        """Connect. Raises ``Lost``, and ``Refused`` if the server does not let us in."""
        try:
            await self.own(self._connect())
        except BaseException:
            await self.close("it did not open")
            raise

    async def _connect(self) -> None:
        for purpose in ("consume", "publish"):
            connection = await self._step(
                aio_pika.connect(
                    self.address.url,
                    ssl_context=self.address.context,
                    client_properties={"connection_name": f"eventbus {purpose}"},
                )
            )
            self._connections.append(connection)
            when_closed(link_of(connection), self._closed)
        self.pen = Pen(link_of(self._connections[0]))
        link = link_of(self._connections[1])
        major = str(link.server_properties.get("version", "0")).partition(".")[0]
        endless = major.isdecimal() and int(major) >= 4
        self.topology = Topology(self.address.exchange, self.address.passive, endless)
        channel = await self._step(channel_of(self._connections[1]))
        when_closed(channel, self._closed)
        room = (link.connection_tune.frame_max or UNBOUNDED) - FRAME
        outlet = self._outlet = Outlet(channel, Pen(link), room, self.address.timeout, self._failure)
        outlet.late = lambda: self.spawn(self._suspect(outlet))
        await self.declare("", ())
        self._prober = self.spawn(self._probe())

    def lose(self, why: str) -> None:
        """End this life, once: every subscription and every waiter hears of it."""
        if self.over is not None:
            return
        self.over = why
        if self._outlet is not None:
            self._outlet.lose(why)
        for end in tuple(self.ends):
            end(why)
        for task in tuple(self._tasks):
            task.cancel()
        self._closing = [self.spawn(_close(connection)) for connection in self._connections]

    async def close(self, why: str) -> None:
        """End this life and leave nothing open, within two seconds."""
        self.lose(why)
        ending, cut = asyncio.get_running_loop().create_task(self._finish(tuple(self._tasks))), None
        with anyio.CancelScope(shield=True):  # an event loop that ends with connections half closed would hang
            while not ending.done():
                try:
                    await asyncio.wait((ending,))
                except asyncio.CancelledError as error:
                    cut = error
        if cut is not None:
            raise cut

    async def _finish(self, tasks: Sequence[asyncio.Task[Any]]) -> None:
        for seconds in (FAREWELL, 0.3):
            if not tasks:
                return
            _, late = await asyncio.wait(tasks, timeout=seconds)
            tasks = tuple(late)
            for task in tasks:
                task.cancel()

    def spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run something in a task that this life owns."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()

    async def own(self, work: Coroutine[Any, Any, T]) -> T:
        """Run something in a task that this life owns, and wait for it; cancelling the wait does not reach it."""
        task = self.spawn(work)
        await asyncio.wait((task,))
        if task.cancelled():
            raise Lost(self.over or "the task was cancelled")
        return task.result()

    async def _step(self, work: Coroutine[Any, Any, T], timeout: float | None = None) -> T:
        """Take one step on the network, within the time for one."""
        try:
            async with asyncio.timeout(timeout or self.address.timeout):
                return await work
        except asyncio.CancelledError:
            if self.over is None and not _is_cancelled():
                raise Lost("the connection was closed") from None
            raise
        except Exception as error:
            raise self.explain(error) from error

    def explain(self, error: Exception) -> Exception:
        """Return what an error of the client library means here."""
        known = aiormq.exceptions
        if isinstance(error, TransportError):
            return error
        if isinstance(error, TimeoutError):
            return Lost(f"{self.address.shown} did not answer within {self.address.timeout:g} s")
        if isinstance(error, known.ProbableAuthenticationError | known.AuthenticationError):
            return shut_out(self.address.shown, reason(error))
        if isinstance(error, known.InvalidFrameError) and self._outlet is None:  # the client keeps the reason to itself
            return Lost(f"{self.address.shown} hangs up: is there this virtual host, and may the user use it?")
        if isinstance(error, known.PublishError):
            return Lost("nobody listens: no queue is bound to this topic, declare a group or subscribe first")
        if isinstance(error, known.DeliveryError):
            return Lost("a queue of this topic takes no more messages")
        if isinstance(error, REFUSALS):
            return Refused(f"{self.address.shown}: {reason(error)}")
        if isinstance(error, ValueError):
            return Refused(f"AMQP cannot carry it: {error}")
        return Lost(f"{self.address.shown}: {reason(error)}")

    def _failure(self, error: Exception) -> Lost | Refused:
        found = self.explain(error)
        return found if isinstance(found, Lost | Refused) else Lost(str(found))

    def _closed(self, why: str) -> None:
        self.lose(f"the connection to {self.address.shown} is lost: {why}")

    @asynccontextmanager
    async def channel(self) -> AsyncGenerator["Channel"]:
        """Open a channel for one purpose; use it within ``own`` only, since cutting it short would break it."""
        channel = await self.inlet()
        try:
            async with asyncio.timeout(2 * self.address.timeout):
                yield channel
        except Exception as error:
            raise self.explain(error) from error
        finally:
            await channel.close(None, self.address.timeout)

    async def inlet(self) -> "Channel":
        """Open a channel that does not publish; whoever asks for it closes it."""
        return await self._step(channel_of(self._connections[0]))

    async def declare(self, topic: str, groups: Sequence[str], ordered: Collection[str] = ()) -> None:
        """Declare a topic and its groups."""
        async with self.channel() as channel:
            try:
                await self.topology.group(channel, topic, groups, ordered)
            except aiormq.exceptions.ChannelNotFoundEntity as error:
                kind = Lost if "inaccessible" in reason(error) else Refused  # it is there, and not ready
                raise kind(f"{self.address.shown}: {reason(error)}") from error

    async def publish(
        self, exchange: str, key: str, wires: Sequence[Wire], extra: Mapping[str, str | int] = EMPTY
    ) -> dict[int, Lost | Refused]:
        """Return those wires that RabbitMQ has not confirmed, when all others are."""
        if self._outlet is None:
            return {index: Lost(self.over or "the connection is not open") for index in range(len(wires))}
        return await self._outlet.send(exchange, key, wires, extra)

    async def send(
        self, exchange: str, key: str, wire: Wire, extra: Mapping[str, str | int]
    ) -> "Lost | Refused | None":
        """Publish one wire and wait for its confirmation; return why it failed."""
        return (await self.publish(exchange, key, (wire,), extra)).get(0)

    async def _suspect(self, outlet: Outlet) -> None:
        """End this life if a confirmation stays away, unless RabbitMQ has said that it blocks who publishes."""
        why = f"{self.address.shown} did not confirm within {self.address.timeout:g} s"
        ready = self.spawn(link_of(self._connections[1]).ready())
        await asyncio.sleep(0.05)  # also for what has arrived while the event loop was blocked
        if ready.done() and outlet.is_late():
            self.lose(why)
        else:
            ready.cancel()
            outlet.expire(why)

    async def postpone(
        self, queue: str, wire: Wire, after: float, extra: dict[str, str | int]
    ) -> "Lost | Refused | None":
        """Send a wire to a queue by way of the levels of delay; return why it failed."""
        level, key = self.topology.delay(queue, after)
        try:
            async with self._building:
                if self._levels < level:
                    async with self.channel() as channel:
                        await self.topology.levels(channel, level)
                    self._levels = level
        except (Lost, Refused) as error:
            return error
        return await self.send(self.topology.level(level), key, wire, extra)

    async def _probe(self) -> None:
        """Ask whether the other end is there; a network that swallows everything says nothing by itself."""
        channel = await self.inlet()
        while True:
            await asyncio.sleep(PROBE)
            asking = self.spawn(_ask(channel))
            for _ in range(5):  # in steps, so that a blocked event loop does not pass for a dead broker
                await asyncio.wait((asking,), timeout=self.address.timeout / 10)
                if asking.done():
                    break
            if not asking.done():
                self.lose(f"{self.address.shown} does not answer any more")


async def _ask(channel: "Channel") -> None:
    await channel.basic_qos(prefetch_count=1)


async def _close(connection: "AbstractConnection") -> None:
    await connection.close()


def _is_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
