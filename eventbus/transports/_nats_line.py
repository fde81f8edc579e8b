"""Hold one connection to NATS, from opening to loss: what is sent, who waits for which answer, and when it is over.

Callers only wait for futures. One task of ours writes, so that a caller who is cancelled never cuts the client in the
middle, and everything that callers send in one turn of the event loop goes out in one write.
"""

import asyncio
import json
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any, NamedTuple, Protocol, TypeVar

import anyio
from anyio.abc import TaskGroup

from eventbus._extras import require
from eventbus.errors import Lost, Refused, TransportError
from eventbus.transport import shut_out
from eventbus.transports._nats_address import Address
from eventbus.transports._nats_wire import Message, frame_of, status

__all__ = ("Answer", "Line", "Pump", "is_unheard")

log = logging.getLogger("eventbus")

PATIENCE = 5.0
"""Seconds that the server has for an answer, or for letting us in."""
PULSE = 0.1
"""Seconds between two looks at whether the connection still stands."""
PING = 2
"""Seconds between two pings; the connection is lost when the third stays unanswered."""
WINDOW = 2_000
"""Requests that wait for an answer at once; beyond it the others wait in line."""
CHUNK = 65_536
"""Bytes that are handed to the client at once, if no message is larger."""
FAREWELL = 1.5
"""Seconds for closing in good order."""

R = TypeVar("R")


class Pump(Protocol):
    """Be a subscription on the line: told of its loss, and looked after at every pulse."""

    def lose(self, why: str) -> None:
        """End it."""
        ...

    def pulse(self, now: float) -> None:
        """Do what is due."""
        ...


Answer = Message | Lost
"""What a future of ``request`` holds: never an exception, so that nobody has to wait for it."""


class Item(NamedTuple):
    """Be something to send, as it travels; ``answer`` is waited for until ``due``."""

    frame: bytes
    number: int = 0
    answer: "asyncio.Future[Any] | None" = None
    due: float = 0.0


def is_unheard(answer: Message) -> bool:
    """Tell whether an answer says that nobody takes the subject."""
    return not answer.data and status(answer)[0] == "503"


class Line:
    """Be one life of a connection; ``lost`` says why it is over."""

    def __init__(self, address: Address, tasks: TaskGroup) -> None:
        self.address = address
        self.lost = ""
        self.max_payload = 1_048_576
        self.version: tuple[int, int] = (0, 0)
        self.pumps: set[Pump] = set()
        self.loop = asyncio.get_running_loop()
        self._tasks = tasks
        self._client: Any = None
        self._complaint = ""
        self._inbox = ""
        self._outbox: deque[Item] = deque()
        self._answers: dict[int, Item] = {}
        self._arrivals: dict[int, Callable[[Message], None]] = {}
        self._running: set[asyncio.Future[Any]] = set()
        self._number = 0
        self._news = asyncio.Event()
        self._room = asyncio.Event()

    async def open(self) -> None:
        """Connect. Raises ``Lost`` if nobody answers, and ``Refused`` if we are not let in."""
        self._client = require("nats.aio.client", extra="nats", what="nats://").Client()
        try:
            with anyio.fail_after(PATIENCE):
                await self._connect()
        except TimeoutError:
            await self._hang_up()
            raise Lost(f"{self.address} did not answer in time{self._because()}") from None
        except BaseException:
            await self._hang_up()
            raise
        if self.address.encrypted and not self.is_encrypted():
            await self._hang_up()
            raise Refused(f"{self.address} offers no TLS, and the URL asks for it")
        self.max_payload = self._client.max_payload
        version = self._client.connected_server_version
        self.version = (int(version.major), int(version.minor))
        # What arrives is taken as bytes where the client's parser hands it to its queues: no task for each listener,
        # and no look at each letter of each header, which is most of what the client does with a message.
        self._client._process_msg = self._arrive
        self._inbox = self.inbox()
        await self.listen(f"{self._inbox}.*", self._answered)
        self._tasks.start_soon(self._write, name="eventbus nats writer")
        self._tasks.start_soon(self._watch, name="eventbus nats watch")

    async def close(self) -> None:
        """Fail all who wait, and hang up."""
        self.lose(f"the connection to {self.address} was closed")
        with anyio.CancelScope(shield=True):
            await self._hang_up()

    def lose(self, why: str) -> None:
        """End this life: whoever waits is told, the first reason stays."""
        if self.lost:
            return
        self.lost = why
        for item in [*self._answers.values(), *self._outbox]:
            self._settle(item, Lost(why))
        self._answers.clear()
        self._outbox.clear()
        for outcome in self._running:
            if not outcome.done():
                outcome.set_result(Lost(why))
        for pump in [*self.pumps]:
            pump.lose(why)
        self.pumps.clear()

    def check(self) -> None:
        """Raise ``Lost`` if this life is over."""
        if self.lost:
            raise Lost(self.lost)

    def request(self, subject: str, payload: bytes, head: bytes = b"") -> "asyncio.Future[Answer]":
        """Send something that is answered; return the answer to come."""
        answer: asyncio.Future[Answer] = self.loop.create_future()
        size = len(head) + len(payload)
        if self.lost:
            answer.set_result(Lost(self.lost))
        elif size > self._client.max_payload:  # for which the server would hang up
            answer.set_result(Lost(f"{size} bytes are more than {self.address} takes"))
        else:
            self._number += 1
            frame = frame_of(subject, f"{self._inbox}.{self._number}", head, payload)
            self._put(Item(frame, self._number, answer, self.loop.time() + PATIENCE))
        return answer

    def send(self, subject: str, payload: bytes, head: bytes = b"", reply: str = "") -> None:
        """Send something in its turn."""
        if not self.lost:
            self._put(Item(frame_of(subject, reply, head, payload)))

    def fence(self) -> "asyncio.Future[Lost | None]":
        """Return what is done when all that was sent before is written."""
        answer: asyncio.Future[Lost | None] = self.loop.create_future()
        if self.lost:
            answer.set_result(Lost(self.lost))
        else:
            self._put(Item(b"", 0, answer, self.loop.time() + PATIENCE))
        return answer

    async def api(self, verb: str, body: Mapping[str, object] | None = None) -> dict[str, Any]:
        """Ask JetStream; return its answer, which may hold ``error``. Raises ``Lost``."""
        prefix = f"$JS.{self.address.domain}.API" if self.address.domain else "$JS.API"
        answer = await self.request(f"{prefix}.{verb}", b"" if body is None else json.dumps(body).encode())
        if isinstance(answer, Lost):
            raise answer
        if is_unheard(answer):
            raise Lost(f"{self.address} answers no JetStream requests: is it started with JetStream (-js)?")
        found: dict[str, Any] = json.loads(answer.data)
        return found

    async def listen(self, subject: str, arrive: Callable[[Message], None]) -> Any:
        """Subscribe to a subject; call it through ``run``."""
        self.check()
        listener = await self._client.subscribe(subject)
        self._arrivals[listener._id] = arrive
        return listener

    async def hush(self, listener: Any, *, drain: bool = False) -> None:
        """Listen no more, at once or when all has arrived that is on its way; call it through ``run``."""
        await listener.unsubscribe()
        if drain:
            await self._client._flush_pending(force_flush=True)  # for a ping overtakes what is not written yet
            await self._client.flush()
        del self._arrivals[listener._id]

    def inbox(self) -> str:
        """Return a subject that nobody else has."""
        return str(self._client.new_inbox())

    def start(self, operation: Callable[[], Awaitable[R]]) -> "asyncio.Future[R | TransportError]":
        """Run an operation in a task of this line, whoever waits for it; its future never raises."""
        outcome: asyncio.Future[R | TransportError] = self.loop.create_future()

        async def run() -> None:
            result: R | TransportError = Lost(self.lost or "cut off")
            try:
                result = await operation()
            except TransportError as error:
                result = error
            except Exception as error:
                result = Lost(self.lost or f"{type(error).__name__}: {error}")
                if not self._client.is_closed:
                    log.exception("nats %s: an operation failed", self.address)
            finally:
                self._running.discard(outcome)
                if not outcome.done():
                    outcome.set_result(result)

        if self.lost:
            outcome.set_result(Lost(self.lost))
        else:
            self._running.add(outcome)
            self._tasks.start_soon(run)
        return outcome

    def spawn(self, operation: Callable[[], Awaitable[None]]) -> None:
        """Run an operation for which nobody waits."""
        _ = self.start(operation)

    async def run(self, operation: Callable[[], Awaitable[R]]) -> R:
        """Run an operation in a task of this line, and wait for it."""
        outcome = await self.start(operation)
        if isinstance(outcome, TransportError):
            raise outcome
        return outcome

    def is_encrypted(self) -> bool:
        """Tell whether the connection is under TLS now."""
        socket = self._socket()
        return socket is not None and socket.get_extra_info("ssl_object") is not None

    async def _connect(self) -> None:
        address, errors = self.address, require("nats.errors", extra="nats", what="nats://")
        options: dict[str, Any] = {}
        if address.user is not None:
            options |= {"user": lambda: self._secret(address.user), "password": lambda: self._secret(address.password)}
        if address.token is not None:
            options |= {"token": lambda: self._secret(address.token)}
        if address.credentials is not None or address.nkey is not None:
            require("nkeys", extra="nats-nkeys", what="nats:// with credentials= or nkey=")
            options |= {"user_credentials": address.credentials, "nkeys_seed": address.nkey}
        try:
            await self._client.connect(
                [*address.servers], name=address.name, allow_reconnect=False, max_reconnect_attempts=1,
                reconnect_time_wait=0, connect_timeout=PATIENCE / 2, ping_interval=PING, max_outstanding_pings=2,
                tls=address.context(), tls_handshake_first=address.tls_first, skip_subject_validation=True,
                error_cb=self._complain, closed_cb=self._closed, disconnected_cb=self._closed, **options,
            )  # fmt: skip
        except errors.NoServersError:
            raise Lost(f"nobody answers at {address}{self._because()}") from None
        except TimeoutError:
            raise
        except (OSError, errors.Error) as error:
            if "authorization" in str(error).lower() or isinstance(error, FileNotFoundError):
                raise shut_out(address, error) from None
            raise Lost(f"{address}: {type(error).__name__}: {error}") from None

    def _secret(self, secret: str | None) -> str:
        """Return a secret, but never to a server that was to be encrypted and is not."""
        if self.address.encrypted and not self.is_encrypted():
            raise Refused(f"{self.address} offers no TLS, and the URL asks for it: nothing secret was sent")
        return secret or ""

    def _because(self) -> str:
        return f": {self._complaint}" if self._complaint else ""

    async def _complain(self, error: Exception) -> None:
        self._complaint = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        log.debug("nats %s: %s", self.address, self._complaint)

    async def _closed(self) -> None:
        self.lose(f"the connection to {self.address} is lost{self._because()}")

    def _socket(self) -> Any:
        """Return asyncio's transport: the client offers no other way to see TLS, or to end a frozen connection."""
        writer = getattr(getattr(self._client, "_transport", None), "_io_writer", None)
        return None if writer is None else writer.transport

    async def _hang_up(self) -> None:
        """Close in good order, and where that takes too long in any: at a frozen peer the client's own end sticks."""
        socket = self._socket()
        with anyio.move_on_after(FAREWELL), suppress(AssertionError):  # which it raises where it never began to connect
            await self._client.close()
        if socket is not None:
            socket.abort()

    def _put(self, item: Item) -> None:
        self._outbox.append(item)
        self._news.set()

    async def _write(self) -> None:
        """Write what callers send, for ever."""
        while True:
            while self._outbox:
                while len(self._answers) >= WINDOW:
                    self._room.clear()
                    await self._room.wait()
                # What the client's ``publish`` does at each message, once for all of this turn. These two are private,
                # as ``_process_msg`` and ``_id`` are: for them the version of the client has an upper bound.
                try:
                    await self._client._send_command(b"".join(self._next()))
                    await self._client._flush_pending()
                except Exception as error:
                    await self._complain(error)
                    await self._closed()
                if self._client.is_closed:
                    await self._closed()
            self._news.clear()
            await self._news.wait()

    def _next(self) -> Iterator[bytes]:
        """Yield what is to be written at once, and wait for its answers; a fence waits for what stands before it."""
        size = 0
        while self._outbox and size < CHUNK and len(self._answers) < WINDOW and (self._outbox[0].frame or not size):
            item = self._outbox.popleft()
            if not item.frame:
                self._settle(item, None)
            elif item.answer is None or not item.answer.done():
                if item.answer is not None:
                    self._answers[item.number] = item
                size += len(item.frame)
                yield item.frame

    async def _arrive(self, sid: int, subject: bytes, reply: bytes, data: bytes, head: bytes | None) -> None:
        arrive = self._arrivals.get(sid)
        if arrive is not None:
            try:
                arrive(Message(subject.decode(), reply.decode(), data, head or b""))
            except Exception as error:
                await self._complain(error)

    def _answered(self, message: Message) -> None:
        item = self._answers.pop(int(message.subject.rpartition(".")[2]), None)
        if item is not None:
            self._settle(item, message)
            self._room.set()

    async def _watch(self) -> None:
        """Tell who waited too long, and notice an end that nobody announces, until it comes."""
        while not self.lost:
            await asyncio.sleep(PULSE)
            now = self.loop.time()
            if self._client.is_closed:
                await self._closed()
            for item in [*self._answers.values()]:
                if item.due > now:
                    break
                self._answers.pop(item.number, None)
                self._settle(item, Lost(f"{self.address} gave no answer within {PATIENCE:g} s{self._because()}"))
                self._room.set()
            for item in self._outbox:
                if item.due <= now:
                    self._settle(item, Lost(f"{self.address} takes nothing more at the moment"))
            for pump in [*self.pumps]:
                pump.pulse(now)

    @staticmethod
    def _settle(item: Item, answer: object) -> None:
        if item.answer is not None and not item.answer.done():
            item.answer.set_result(answer)
