"""Broadcast wires through PostgreSQL's NOTIFY, at most once: for live streams where a database is all there is."""

import asyncio
from collections import defaultdict, deque
from collections.abc import AsyncGenerator, Collection, Sequence
from contextlib import asynccontextmanager
from itertools import chain
from typing import Any, Self
from urllib.parse import unquote

import anyio
from anyio.abc import TaskGroup

from eventbus._extras import require
from eventbus._loop import check_opening
from eventbus._mailbox import Presettled
from eventbus._urls import options_of, split_url
from eventbus.errors import Lost, PublishError, Refused
from eventbus.limits import Limits
from eventbus.transport import Capabilities, Subscription, Wire, check_prefetch, shut_out
from eventbus.transports._postgres_ear import Ear, frame, short, unframe

__all__ = ("PostgreSQLNotifyTransport",)

DEFAULTS = Limits()
OPTIONS = ("host", "sslmode", "sslrootcert", "sslcert", "sslkey")
PAYLOAD, MAX_BYTES = 7_999, 7_700
"""Bytes that NOTIFY takes, and those of a body, which leaves room for its id and key."""
PATIENCE, PING, PULSE = 5.0, 5.0, 0.1
"""Seconds that the server has for an answer, between two looks whether it is there, and that a new listener waits."""
NOTIFY = "SELECT pg_notify(%s, one) FROM unnest(%s::text[]) AS one"
REFUSALS = ("password", "pg_hba.conf", "does not exist")
"""What a server says that does not let us in, as far as its words are English."""


class PostgreSQLNotifyTransport:
    """Broadcast wires to whoever listens now, over one connection to publish and one to listen.

    >>> PostgreSQLNotifyTransport.from_url("postgresql+notify://user:secret@db/shop")  # doctest: +SKIP
    PostgreSQLNotifyTransport('postgresql://db:5432/shop')
    """

    def __init__(self, address: dict[str, str], *, limits: Limits = DEFAULTS) -> None:
        self._psycopg = require("psycopg", extra="postgres", what="postgresql+notify://")
        self._address, self._most = address, limits.queue
        self._lost = f"the transport to {self} is not open"
        self._tasks: TaskGroup | None = None
        self._connections: list[Any] = []
        self._ears: defaultdict[str, set[Ear]] = defaultdict(set)
        self._orders: deque[tuple[str, Ear | None]] = deque()
        self.capabilities = Capabilities(
            confirm="none", unheard="lost", groups=False, broadcast=True, returns="none", settle="none",
            attempts=False, retry=0, grain=0, dead=False, order="none", headers=False, max_bytes=MAX_BYTES,
        )  # fmt: skip

    def __str__(self) -> str:
        at = self._address
        return f"postgresql://{at.get('host', '')}:{at.get('port', '5432')}/{at.get('dbname', '')}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}('{self}')"

    @classmethod
    def from_url(cls, url: str, *, limits: Limits = DEFAULTS) -> Self:
        """Return the transport of ``postgresql+notify://user:password@host:port/database``.

        Options are those of libpq: ``host`` (a socket's folder) and ``sslmode``, ``sslrootcert``, ``sslcert``,
        ``sslkey``; what is left out libpq takes from its environment. Raises ``ValueError`` for what it does not know.
        """
        parts = split_url(url)
        try:
            port = parts.port
        except ValueError:
            port = 0
        if port == 0 or "@" in parts.path or parts.fragment or parts.path[:1] not in ("", "/"):
            raise ValueError(f"{parts.scheme}:// takes user:password@host:port/database, each percent-encoded")
        given = {
            "host": parts.hostname, "port": str(port or ""), "user": parts.username, "password": parts.password,
            "dbname": parts.path[1:],
        }  # fmt: skip
        address = {name: unquote(text) for name, text in given.items() if text}
        return cls(address | options_of(parts, OPTIONS), limits=limits)

    async def __aenter__(self) -> Self:
        """Connect. Raises ``Lost`` if nobody answers, and ``Refused`` if the server does not let us in."""
        check_opening(f"the transport to {self}", is_open=self._tasks is not None)
        self._ears, self._orders = defaultdict(set), deque()
        self._tasks = await anyio.create_task_group().__aenter__()
        try:
            for _ in range(2):  # one to publish, one to listen
                await self._connect()
        except BaseException:
            await self.__aexit__()
            raise
        self._lost = ""
        self._tasks.start_soon(self._listen, self._connections[1], name=f"eventbus listener at {self}")
        return self

    async def __aexit__(self, *exc: object) -> None:
        """Fail every waiter with ``Lost``, then close."""
        self._lose(f"the transport to {self} was closed")
        tasks, self._tasks = self._tasks, None
        try:
            if tasks is not None:
                tasks.cancel_scope.cancel()
                await tasks.__aexit__(None, None, None)
        finally:
            while self._connections:
                await self._connections.pop().close()

    async def declare(self, topic: str, groups: Sequence[str], *, ordered: Collection[str] = ()) -> None:
        """Do nothing but look whether the connections stand: there is nothing to create."""
        self._life()

    async def publish(self, topic: str, wires: Sequence[Wire]) -> None:
        """Return when the server has all wires; who listens, and whether anybody does, is not known."""
        failed: dict[int, Lost | Refused] = {}
        payloads = {index: frame(wire) for index, wire in enumerate(wires)}
        for index, wire in enumerate(wires):
            size = len(payloads[index].encode())
            if size > PAYLOAD or len(wire.body) > MAX_BYTES:
                del payloads[index]
                failed[index] = Refused(
                    f"a payload of {size} bytes with a body of {len(wire.body)} is more than NOTIFY carries, {PAYLOAD} "
                    f"and {MAX_BYTES}: publish less, such as an id to read the rest by, or take redis+pubsub:// or "
                    "nats+core:// instead"
                )
        if payloads:
            outcome: asyncio.Future[Lost | Refused | None] = asyncio.get_running_loop().create_future()
            try:
                self._life().start_soon(self._notify, short(topic), [*payloads.values()], outcome)
                failure = await outcome
            except Lost as error:
                failure = error
            if failure is not None:
                failed |= dict.fromkeys(payloads, failure)
        if failed:
            raise PublishError(failed)

    @asynccontextmanager
    async def subscribe(
        self, topic: str, *, group: str | None, prefetch: int, lease: float, ordered: bool = False
    ) -> AsyncGenerator[Subscription]:
        """Subscribe to what is published from now on; one who falls ``Limits.queue`` messages behind is lost."""
        check_prefetch(prefetch)
        if group is not None:
            raise Refused(f"postgresql+notify:// has no groups, so {group!r} cannot subscribe: use a store or a broker")
        self._life()
        channel, ear, ears, orders = short(topic), Ear(self._most), self._ears, self._orders
        orders.append((channel, ear))
        try:
            await ear.opened.wait()
            self._life()
            yield ear
        finally:
            ear.stopped = True
            ears[channel].discard(ear)
            orders.append((channel, None))

    def _life(self) -> TaskGroup:
        """Return where tasks run. Raises ``Lost``."""
        if self._tasks is None or self._lost:
            raise Lost(self._lost)
        return self._tasks

    def _lose(self, why: str) -> None:
        """End this life: whoever waits is told, the first reason stays."""
        self._lost = self._lost or why
        for ear in [*chain(*self._ears.values()), *(ear for _, ear in self._orders if ear is not None)]:
            ear.lose(self._lost)

    def _why(self, error: Exception) -> str:
        """Return what an error of the client says, in one line."""
        text = f"no answer within {PATIENCE:g} s" if isinstance(error, TimeoutError) else " ".join(str(error).split())
        return f"{self}: {text or type(error).__name__}"

    async def _connect(self) -> Any:
        try:
            with anyio.fail_after(PATIENCE):
                connection = await self._psycopg.AsyncConnection.connect(
                    **self._address, autocommit=True, prepare_threshold=None, client_encoding="utf8"
                )
        except (self._psycopg.Error, OSError) as error:
            why = self._why(error)
            if any(word in why for word in REFUSALS):
                raise shut_out(self, why.partition(": ")[2]) from None
            raise Lost(why) from None
        self._connections.append(connection)
        return connection

    async def _notify(
        self, channel: str, payloads: list[str], outcome: "asyncio.Future[Lost | Refused | None]"
    ) -> None:
        """Publish, whether or not somebody still waits to hear what became of it."""
        failure: Lost | Refused | None = Lost(f"the transport to {self} was closed")
        try:
            with anyio.fail_after(PATIENCE):
                await self._connections[0].execute(NOTIFY, (channel, payloads))
            failure = None
        except self._psycopg.DataError as error:
            failure = Refused(self._why(error))
        except Exception as error:
            failure = Lost(self._why(error))
            if self._connections[0].broken or isinstance(error, TimeoutError):
                self._lose(self._why(error))
        finally:
            if not outcome.done():
                outcome.set_result(failure)

    async def _listen(self, connection: Any) -> None:
        """Hand out what arrives, and between two waits begin or cease to listen: all this connection does."""
        due = 0.0
        try:
            while not self._lost:
                channel, ear = self._orders[0] if self._orders else ("", None)
                verb = "LISTEN" if ear is not None else "UNLISTEN" if channel and not self._ears[channel] else ""
                if verb or anyio.current_time() >= due:
                    quoted = channel.replace('"', '""')
                    with anyio.fail_after(PATIENCE):
                        await connection.execute(f'{verb} "{quoted}"' if verb else "SELECT 1")
                    due = anyio.current_time() + PING
                async for note in connection.notifies(timeout=0 if channel else PULSE, stop_after=1):
                    for each in self._ears.get(note.channel, ()):
                        each.put(Presettled(unframe(note.payload)))
                if ear is not None and not ear.stopped:  # only now: what has come so far was there before it
                    self._ears[channel].add(ear)
                    ear.opened.set()
                elif verb == "UNLISTEN" and not self._ears[channel]:
                    del self._ears[channel]
                if channel:
                    self._orders.popleft()
        except Exception as error:
            self._lose(self._why(error))
