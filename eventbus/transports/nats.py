"""Carry wires through NATS: JetStream keeps them (``nats://``), core NATS only broadcasts (``nats+core://``)."""

import asyncio
import json
import math
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Protocol, Self, TypeVar

import anyio
from anyio.abc import TaskGroup

from eventbus._extras import require
from eventbus._loop import check_opening
from eventbus.errors import Lost, PublishError, Refused, TransportError
from eventbus.limits import Limits
from eventbus.transport import Capabilities, Subscription, Wire, check_prefetch
from eventbus.transports import _nats_address as names
from eventbus.transports._nats_address import LINK, TOPOLOGY, Address
from eventbus.transports._nats_core import Listener
from eventbus.transports._nats_line import Answer, Line, is_unheard
from eventbus.transports._nats_pull import Puller
from eventbus.transports._nats_topology import Topology
from eventbus.transports._nats_wire import FRAME, head_of

__all__ = ("NatsCoreTransport", "NatsTransport")

DEFAULTS = Limits()
PAYLOAD = 1_048_576
"""Bytes of a message that a server takes unless it is told otherwise; what it does take it says when it is asked."""
OLDEST = (2, 11)
"""The oldest server whose consumers can be pinned to one client, and created without being changed."""
TOO_LARGE = 10054
"""JetStream's code for a message larger than its stream takes."""


class Reader(Subscription, Protocol):
    """Be a subscription that can be left."""

    async def close(self) -> None:
        """Leave it."""
        ...


T = TypeVar("T", bound=Reader)
Failures = dict[int, Lost | Refused]
"""Place of a wire -> why it is not stored."""


class Hull:
    """Open and close one line after another."""

    def __init__(self, address: Address) -> None:
        require("nats", extra="nats", what="nats://")
        self.address = address
        self._line: Line | None = None
        self._tasks: TaskGroup | None = None

    async def open(self) -> Line:
        """Connect. Raises ``Lost`` or ``Refused``."""
        check_opening("the NATS transport", is_open=self._line is not None)
        tasks = await anyio.create_task_group().__aenter__()
        line = Line(self.address, tasks)
        try:
            await line.open()
        except BaseException:
            tasks.cancel_scope.cancel()
            await tasks.__aexit__(None, None, None)
            raise
        self._tasks, self._line = tasks, line
        return line

    async def close(self) -> None:
        """Fail all who wait, and hang up."""
        tasks, line, self._tasks, self._line = self._tasks, self._line, None, None
        if tasks is not None and line is not None:
            await line.close()
            tasks.cancel_scope.cancel()
            await tasks.__aexit__(None, None, None)

    def line(self) -> Line:
        """Return the open line. Raises ``Lost``."""
        if self._line is None:
            raise Lost("the NATS transport is not open")
        self._line.check()
        return self._line

    @asynccontextmanager
    async def reading(self, begin: Callable[[Line], Awaitable[T]]) -> AsyncGenerator[T]:
        """Open a reader in a task of the line and close it there, wherever the caller is cut."""
        line = self.line()
        readers: list[T] = []
        ready = asyncio.Event()

        async def open_() -> None:
            try:
                readers.append(await begin(line))
            finally:
                ready.set()

        async def close() -> None:
            await ready.wait()
            for reader in readers:
                await reader.close()

        try:
            await line.run(open_)
            yield readers[0]
        finally:
            await line.start(close)


class NatsTransport:
    """Carry wires through JetStream: a stream per topic, a durable consumer per group.

    >>> NatsTransport.from_url("nats://user:secret@localhost")
    NatsTransport('nats://localhost:4222')
    """

    def __init__(self, address: Address, *, limits: Limits | None = None) -> None:
        self._hull = Hull(address)
        self._limits = limits or Limits()
        self._topology: Topology | None = None
        self.capabilities = Capabilities(
            confirm="stored", unheard="kept", groups=True, broadcast=True, returns="lease", settle="each",
            attempts=True, retry=math.inf, grain=0.001, dead=True, order="exclusive", headers=True,
            max_bytes=PAYLOAD - FRAME,
        )  # fmt: skip

    def __repr__(self) -> str:
        return f"NatsTransport('{self._hull.address}')"

    @classmethod
    def from_url(cls, url: str, *, limits: Limits = DEFAULTS) -> Self:
        """Return the transport of ``nats://user:password@host:4222,other:4222``, or ``nats://token@host``.

        Options: ``tls``, ``tls_first`` and ``declare`` (true or false), ``tls_ca``, ``tls_cert``, ``tls_key``,
        ``credentials`` and ``nkey`` (files), ``name``, ``domain``, and for new streams ``replicas``, ``max_age``
        (seconds) and ``max_bytes``. Raises ``ValueError`` for what it does not know.
        """
        return cls(Address.parse(url, (*LINK, *TOPOLOGY)), limits=limits)

    async def __aenter__(self) -> Self:
        """Connect. Raises ``Lost`` if nobody answers, and ``Refused`` if the server does not let us in."""
        line = await self._hull.open()
        if line.version < OLDEST:
            await self._hull.close()
            raise Refused(
                f"{self._hull.address} runs nats-server {'.'.join(map(str, line.version))}: JetStream needs "
                f"{'.'.join(map(str, OLDEST))} or later here, so upgrade it"
            )
        self._topology = Topology(line, self._limits.lease)
        self.capabilities = replace(self.capabilities, max_bytes=line.max_payload - FRAME)
        return self

    async def __aexit__(self, *exc: object) -> None:
        """Fail every waiter with ``Lost``, then close."""
        await self._hull.close()

    async def declare(self, topic: str, groups: Sequence[str], *, ordered: Collection[str] = ()) -> None:
        """Create the streams and consumers that are missing; with ``declare=false`` only look for the stream."""
        line, topology = self._life()
        await line.run(lambda: topology.declare(topic, groups))

    async def publish(self, topic: str, wires: Sequence[Wire]) -> None:
        """Return when all wires are stored; an id that was stored within two minutes is not stored again.

        Raises ``PublishError`` with ``Refused`` for what is too large or has impossible headers, and with ``Lost`` for
        everything else.
        """
        waiting, failed = _heads(wires, self.capabilities.max_bytes)
        subject, why = names.subject_of(topic), None
        try:
            line, topology = self._life()
            waiting = await _send(line, subject, wires, waiting, failed)
            if waiting:  # their stream was deleted
                await line.run(lambda: topology.declare(topic, ()))
                waiting = await _send(line, subject, wires, waiting, failed)
        except TransportError as error:
            why = error if isinstance(error, Lost) else Lost(str(error))
        if waiting:
            failed |= dict.fromkeys(waiting, why or Lost(f"no stream keeps {subject!r}"))
        if failed:
            raise PublishError(failed)

    @asynccontextmanager
    async def subscribe(
        self, topic: str, *, group: str | None, prefetch: int, lease: float, ordered: bool = False
    ) -> AsyncGenerator[Subscription]:
        """Subscribe to what a group gets, or with None to what is published from now on."""
        check_prefetch(prefetch)
        _, topology = self._life()

        async def begin(line: Line) -> Puller:
            if group is None:
                source = await topology.source(topic, prefetch, lease)
            else:
                source = await topology.shared(topic, group, prefetch, lease, ordered=ordered)
            puller = Puller(line, source)
            await puller.open()
            return puller

        async with self._hull.reading(begin) as puller:
            yield puller

    def _life(self) -> tuple[Line, Topology]:
        line = self._hull.line()
        if self._topology is None:
            raise Lost("the NATS transport is not open")
        return line, self._topology


async def _send(
    line: Line, subject: str, wires: Sequence[Wire], heads: dict[int, bytes], failed: Failures
) -> dict[int, bytes]:
    """Send wires and wait for all answers; note what failed, and return the heads of what no stream has taken."""
    coming = {index: line.request(subject, wires[index].body, head) for index, head in heads.items()}
    homeless: dict[int, bytes] = {}
    for index, future in coming.items():
        answer = await future
        if not isinstance(answer, Lost) and is_unheard(answer):
            homeless[index] = heads[index]
        elif (failure := _failure(answer)) is not None:
            failed[index] = failure
    return homeless


def _failure(answer: Answer) -> Lost | Refused | None:
    """Return why a message is not stored, or None."""
    if isinstance(answer, Lost):
        return answer
    if b'"error"' not in answer.data:
        return None
    error = json.loads(answer.data)["error"]
    words = f"{error.get('description', 'error')} ({error.get('err_code', error.get('code'))})"
    return Refused(words) if error.get("err_code") == TOO_LARGE else Lost(words)


def _heads(wires: Sequence[Wire], largest: int) -> tuple[dict[int, bytes], Failures]:
    """Return what the headers of each wire are as they travel, and which wires never can."""
    heads: dict[int, bytes] = {}
    failed: Failures = {}
    for index, wire in enumerate(wires):
        try:
            heads[index] = head_of(wire, largest)
        except Refused as error:
            failed[index] = error
    return heads, failed


class NatsCoreTransport:
    """Broadcast wires to whoever listens now, at most once: for live streams, not for handlers.

    >>> NatsCoreTransport.from_url("nats+core://localhost").capabilities.groups
    False
    """

    def __init__(self, address: Address, *, limits: Limits | None = None) -> None:
        self._hull = Hull(address)
        self._limits = limits or Limits()
        self.capabilities = Capabilities(
            confirm="none", unheard="lost", groups=False, broadcast=True, returns="none", settle="none",
            attempts=False, retry=0, grain=0, dead=False, order="none", headers=True, max_bytes=PAYLOAD - FRAME,
        )  # fmt: skip

    def __repr__(self) -> str:
        return f"NatsCoreTransport('{self._hull.address}')"

    @classmethod
    def from_url(cls, url: str, *, limits: Limits = DEFAULTS) -> Self:
        """Return the transport of ``nats+core://host:4222``, with the options of ``nats://`` that are of the link."""
        return cls(Address.parse(url, LINK), limits=limits)

    async def __aenter__(self) -> Self:
        """Connect. Raises ``Lost`` if nobody answers, and ``Refused`` if the server does not let us in."""
        line = await self._hull.open()
        self.capabilities = replace(self.capabilities, max_bytes=line.max_payload - FRAME)
        return self

    async def __aexit__(self, *exc: object) -> None:
        """Fail every waiter with ``Lost``, then close."""
        await self._hull.close()

    async def declare(self, topic: str, groups: Sequence[str], *, ordered: Collection[str] = ()) -> None:
        """Do nothing but look whether the connection stands: there is nothing to create."""
        self._hull.line()

    async def publish(self, topic: str, wires: Sequence[Wire]) -> None:
        """Return when all wires are written to the connection; who listens, and whether anybody does, is not known."""
        heads, failed = _heads(wires, self.capabilities.max_bytes)
        if heads:
            try:
                line = self._hull.line()
            except Lost as error:
                raise PublishError(failed | dict.fromkeys(heads, error)) from None
            subject = names.subject_of(topic)
            for index, head in heads.items():
                line.send(subject, wires[index].body, head)
            lost = await line.fence()
            if lost is not None:
                failed |= dict.fromkeys(heads, lost)
        if failed:
            raise PublishError(failed)

    @asynccontextmanager
    async def subscribe(
        self, topic: str, *, group: str | None, prefetch: int, lease: float, ordered: bool = False
    ) -> AsyncGenerator[Subscription]:
        """Subscribe to what is published from now on; one who falls ``Limits.queue`` messages behind is lost."""
        if group is not None:
            raise Refused(f"nats+core:// has no groups, so {group!r} cannot subscribe: use nats://, which is JetStream")

        async def begin(line: Line) -> Listener:
            listener = Listener(line, names.subject_of(topic), self._limits.queue)
            await listener.open()
            return listener

        async with self._hull.reading(begin) as listener:
            yield listener
