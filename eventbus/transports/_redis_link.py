"""Reach one Redis server: the address in a URL, one connection, and a line on which many callers share one."""

import asyncio
import logging
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, unquote

from eventbus._extras import require
from eventbus._urls import split_url
from eventbus.errors import Lost, TransportError
from eventbus.transport import shut_out

__all__ = ("Address", "Command", "Line", "Session", "read_url", "refusal")

log = logging.getLogger("eventbus")

Command = tuple[str | bytes | int, ...]

COMMANDS = 1_000
"""Commands in one write."""

WEIGHT = 4 * 1024 * 1024
"""Bytes of bodies after which one write takes no more callers in."""

LINK_OPTIONS = ("timeout", "cafile", "certfile", "keyfile")


@dataclass(frozen=True, slots=True)
class Address:
    """Say where a server is and how to get in; its text holds no secret."""

    host: str
    port: int
    db: int
    username: str | None = field(default=None, repr=False)
    password: str | None = field(default=None, repr=False)
    tls: bool = False
    timeout: float = 5.0
    """Seconds without an answer after which the server counts as lost."""
    cafile: str | None = None
    certfile: str | None = None
    keyfile: str | None = None

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'rediss' if self.tls else 'redis'}://{host}:{self.port}/{self.db}"


def read_url(url: str, scheme: str, options: Sequence[str]) -> tuple[Address, dict[str, str]]:
    """Return the address in a URL, and its other options. Raises ``ValueError``, which never quotes the URL."""
    known = (*LINK_OPTIONS, *options)
    try:
        parts = split_url(url)
        port = parts.port
        pairs = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
        found = dict(pairs)
        db = parts.path.removeprefix("/") or "0"
        fine = len(found) == len(pairs) and found.keys() <= set(known) and not parts.fragment and db.isdecimal()
        timeout = float(found.pop("timeout", "5"))
        fine = fine and 0 < timeout < float("inf")
    except ValueError:
        fine, parts, port, db, timeout, found = False, split_url(""), None, "0", 5.0, dict[str, str]()
    if not fine:
        raise ValueError(
            f"{scheme}:// takes user:password@host:port/number of the database and the options {', '.join(known)}, "
            "each once; a password is percent-encoded, and timeout is in seconds"
        )
    address = Address(
        host=unquote(parts.hostname or "localhost"),
        port=port or 6379,
        db=int(db),
        username=unquote(parts.username) if parts.username else None,
        password=unquote(parts.password) if parts.password else None,
        tls=parts.scheme.startswith("rediss"),
        timeout=timeout,
        cafile=found.pop("cafile", None),
        certfile=found.pop("certfile", None),
        keyfile=found.pop("keyfile", None),
    )
    return address, found


def client(library: str) -> Any:
    """Return a part of the client library. Raises ``MissingExtraError`` with the line that installs it."""
    return require(library, extra="redis", what="eventbus.transports.redis")


def refusal(reply: object) -> str | None:
    """Return what the server says against a command, or None if it did it."""
    return str(reply) if isinstance(reply, Exception) else None


class Session:
    """Hold one connection, used by one task: what that task asks is answered in time, or the connection is lost."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self._redis = client("redis.asyncio")
        self._errors = client("redis.exceptions")
        self._pack = client("hiredis").pack_command
        self._connection: Any = None

    async def open(self) -> None:
        """Connect and log in. Raises ``Lost``, and ``Refused`` if the server does not let us in."""
        at, errors = self.address, self._errors
        secure: dict[str, Any] = {
            f"ssl_{name}": value
            for name, value in (("ca_certs", at.cafile), ("certfile", at.certfile), ("keyfile", at.keyfile))
            if value is not None
        }
        kind = self._redis.SSLConnection if at.tls else self._redis.Connection
        self._connection = kind(
            host=at.host, port=at.port, db=at.db, username=at.username, password=at.password, protocol=2,
            socket_timeout=None, socket_connect_timeout=at.timeout, **(secure if at.tls else {}),
        )  # fmt: skip
        try:
            async with asyncio.timeout(at.timeout):
                await self._connection.connect()
                await self._connection.send_command("PING", check_health=False)
                await self._connection.read_response(disable_decoding=True)
        except (errors.AuthenticationError, errors.NoPermissionError) as error:
            raise shut_out(at, error) from error
        except errors.ResponseError as error:
            if "index" in str(error):  # of the database; what else it says, that it is busy for example, will pass
                raise shut_out(at, error) from error
            raise Lost(f"{at} is not ready: {error}") from error
        except TimeoutError as error:
            raise Lost(f"{at} did not answer within {at.timeout:g} s") from error
        except (errors.RedisError, OSError) as error:
            raise Lost(f"{at} cannot be reached: {error}") from error

    async def ask(self, commands: Sequence[Command], wait: float = 0.0, most: float = math.inf) -> list[Any]:
        """Return the answers, in which an error is an object; they may take ``wait`` seconds more, ``most`` in all.

        Raises ``Lost``.
        """
        at, errors = self.address, self._errors
        limit = max(min(at.timeout + wait, most), 0.0)
        read, replies = self._connection.read_response, list[Any]()
        try:
            async with asyncio.timeout(limit):
                packed = b"".join(map(self._pack, commands))  # the client's own packing takes ten times as long
                await self._connection.send_packed_command(packed, check_health=False)
                for _ in commands:
                    try:
                        replies.append(await read(disable_decoding=True))
                    except errors.ResponseError as error:
                        replies.append(error)
        except TimeoutError as error:
            raise Lost(f"{at} did not answer within {limit:.3g} s") from error
        except (errors.RedisError, OSError) as error:
            raise Lost(f"{at} is lost: {error}") from error
        return replies

    async def listen(self, seconds: float) -> Any:
        """Return the next message that nobody asked for, or None after so many seconds. Raises ``Lost``."""
        errors = self._errors
        try:
            return await self._connection.read_response(disable_decoding=True, timeout=seconds)
        except (errors.RedisError, OSError) as error:
            raise Lost(f"{self.address} is lost: {error}") from error

    async def tell(self, *command: str | bytes | int) -> None:
        """Send a command whose answer comes by ``listen``. Raises ``Lost``."""
        errors = self._errors
        try:
            async with asyncio.timeout(self.address.timeout):
                await self._connection.send_command(*command, check_health=False)
        except (errors.RedisError, OSError, TimeoutError) as error:
            raise Lost(f"{self.address} is lost: {error}") from error

    async def close(self) -> None:
        """Close the connection, without waiting for anything."""
        if self._connection is not None:
            await self._connection.disconnect(nowait=True)


@dataclass(slots=True, eq=False)
class Job:
    """Be what one caller wants: the commands are asked for when they are sent, not before."""

    commands: Callable[[], Sequence[Command]]
    weight: int
    future: "asyncio.Future[list[Any]]"


class Line:
    """Share one connection: what its callers want within one turn of the event loop goes out in one write."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self.writes = 0
        """Writes so far."""
        self.error: str | None = None
        """Why it is lost."""
        self.opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._jobs: deque[Job] = deque()
        self._flying: list[Job] = []
        self._news = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._closing = False

    def put(self, commands: Callable[[], Sequence[Command]], weight: int = 0) -> "asyncio.Future[list[Any]]":
        """Return where the answers to some commands will be; ``weight`` is their size in bytes. Raises ``Lost``."""
        if self.error is not None or self._closing:
            raise Lost(self.error or f"the transport to {self.address} was closed")
        return self._add(commands, weight)

    async def call(self, commands: Sequence[Command], weight: int = 0) -> list[Any]:
        """Return the answers to some commands. Raises ``Lost``."""
        return await self.put(lambda: commands, weight)

    def leave(self, commands: Sequence[Command]) -> None:
        """Send last words, also while the line closes; nobody waits for the answers."""
        if self.error is None:
            self._add(lambda: commands, 0).add_done_callback(lambda future: future.exception())

    def _add(self, commands: Callable[[], Sequence[Command]], weight: int) -> "asyncio.Future[list[Any]]":
        job = Job(commands, weight, asyncio.get_running_loop().create_future())
        self._jobs.append(job)
        self._idle.clear()
        self._news.set()
        return job.future

    async def run(self) -> None:
        """Open the connection and serve all callers, until it is lost or the task is cancelled."""
        session, why = Session(self.address), f"the transport to {self.address} was closed"
        try:
            await session.open()
            if not self.opened.done():
                self.opened.set_result(None)
            while True:
                await self._wait(session)
                while self._jobs:
                    await self._flush(session)
                self._idle.set()
        except TransportError as error:
            why = str(error)
            if not self.opened.done():
                self.opened.set_exception(error)
        except Exception as error:
            log.exception("the line to %s failed", self.address)
            why = f"the line to {self.address} failed: {error}"
        finally:
            self._lose(why)
            await session.close()

    async def settle(self) -> None:
        """Take nothing more in but last words, and return when nothing is left to do."""
        self._closing = True
        await self._idle.wait()

    async def _wait(self, session: Session) -> None:
        """Wait for work; in a long silence, find out whether the server is still there."""
        while not self._news.is_set():
            try:
                async with asyncio.timeout(self.address.timeout):
                    await self._news.wait()
            except TimeoutError:
                await session.ask([("PING",)])
        self._news.clear()

    def _lose(self, why: str) -> None:
        """Fail every waiter with ``Lost``, now and from now on."""
        self.error = why
        jobs = [*self._flying, *self._jobs]
        self._flying, self._jobs = [], deque()
        for job in jobs:
            if not job.future.done():
                job.future.set_exception(Lost(why))
        if not self.opened.done():
            self.opened.set_exception(Lost(why))
            self.opened.exception()  # nobody may wait for it any more
        self._idle.set()

    async def _flush(self, session: Session) -> None:
        commands: list[Command] = []
        ends: list[int] = []
        for job in self._due():
            commands += job.commands()
            ends.append(len(commands))
        replies = await session.ask(commands)
        self.writes += 1
        jobs, self._flying = self._flying, []
        start = 0
        for job, end in zip(jobs, ends, strict=True):
            if not job.future.done():
                job.future.set_result(replies[start:end])
            start = end

    def _due(self) -> Iterator[Job]:
        """Yield the jobs of one write, at least one."""
        weight = 0
        while self._jobs and len(self._flying) < COMMANDS and weight < WEIGHT:
            job = self._jobs.popleft()
            self._flying.append(job)
            weight += job.weight
            yield job
