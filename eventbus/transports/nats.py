"""Carry wires through NATS: JetStream keeps them (``nats://``), core NATS only broadcasts (``nats+core://``)."""

import asyncio
import json
import math
import re
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, Self

import anyio
from anyio.abc import TaskGroup

from eventbus._extras import require
from eventbus.clock import new_id
from eventbus.errors import Lost, PublishError, Refused, TransportError
from eventbus.limits import Limits
from eventbus.transport import Capabilities, Subscription, Wire
from eventbus.transports import _nats_address as names
from eventbus.transports._nats_address import LINK, TOPOLOGY, Address
from eventbus.transports._nats_line import Answer, Line, Message, is_unheard
from eventbus.transports._nats_pull import GROUP, KEEP, Puller, Source, from_wire

__all__ = ("NatsTransport",)

DEFAULTS = Limits()
NANO = 1_000_000_000
FRAME = 4_096
"""Bytes that the headers of ours and of the protocol may add to a body."""
DEPARTED = 60.0
"""Seconds after which the server forgets a broadcast subscriber that crashed."""
TOO_LARGE = 10054
TAKEN = 10058
OVERLAPS = 10065
EXISTS = 10148
NO_STREAM = 10059
"""Error codes of JetStream: a message, a name, a subject, a consumer, a stream."""
HEADER = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")


class Hull:
    """Open and close one line after another for a transport."""

    def __init__(self, address: Address) -> None:
        require("nats", extra="nats", what="nats://")
        self.address = address
        self._line: Line | None = None
        self._tasks: TaskGroup | None = None

    async def open(self) -> Line:
        """Connect. Raises ``Lost`` or ``Refused``."""
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            raise TransportError("nats:// runs on asyncio only, and this event loop is another") from None
        if self._line is not None:
            raise TransportError("the NATS transport is open already")
        tasks = anyio.create_task_group()
        await tasks.__aenter__()
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


class NatsTransport:
    """Carry wires through JetStream: a stream per topic, a durable pull consumer per group.

    >>> NatsTransport.from_url("nats://user:secret@localhost")
    NatsTransport('nats://localhost:4222')
    """

    def __init__(self, address: Address, *, limits: Limits | None = None) -> None:
        self._hull = Hull(address)
        self._address = address
        self._limits = limits or Limits()
        self._streams: dict[str, str] = {}
        self.capabilities = Capabilities(
            confirm="stored", unheard="kept", groups=True, broadcast=True, returns="lease", settle="each",
            attempts=True, retry=math.inf, grain=0.001, dead=True, order="exclusive", headers=True,
            max_bytes=1_048_576 - FRAME,
        )  # fmt: skip

    def __repr__(self) -> str:
        return f"NatsTransport('{self._address}')"

    @classmethod
    def from_url(cls, url: str, *, limits: Limits = DEFAULTS) -> Self:
        """Return the transport of ``nats://user:password@host:4222``. Raises ``ValueError`` for what it does not know.

        Options: ``tls``, ``tls_first``, ``declare`` (true or false), ``tls_ca``, ``tls_cert``, ``tls_key``,
        ``credentials``, ``nkey`` (files), ``name``, ``domain``, and of new streams ``replicas``, ``max_age`` (seconds)
        and ``max_bytes``.
        """
        return cls(Address.parse(url, (*LINK, *TOPOLOGY)), limits=limits)

    async def __aenter__(self) -> Self:
        """Connect. Raises ``Lost`` if nobody answers, and ``Refused`` if the server does not let us in."""
        line = await self._hull.open()
        self._streams.clear()
        self.capabilities = replace(self.capabilities, max_bytes=line.max_payload - FRAME)
        return self

    async def __aexit__(self, *exc: object) -> None:
        """Fail every waiter with ``Lost``, then close."""
        await self._hull.close()

    async def declare(self, topic: str, groups: Sequence[str]) -> None:
        """Create the streams and consumers that are missing; with ``declare=false`` only look for the stream."""
        line = self._hull.line()
        await line.run(lambda: self._declare(line, topic, groups))

    async def publish(self, topic: str, wires: Sequence[Wire]) -> None:
        """Return when the stream has stored all wires; one with the id of the last two minutes is stored once.

        Raises ``PublishError`` with ``Refused`` for what is too large or has impossible headers, and ``Lost`` for
        everything else.
        """
        failed: dict[int, Lost | Refused] = {}
        fit: list[int] = []
        for index, wire in enumerate(wires):
            why = self._unfit(wire)
            if why:
                failed[index] = Refused(why)
            else:
                fit.append(index)
        if fit:
            failed |= await self._publish(topic, wires, fit)
        if failed:
            raise PublishError(failed)

    @asynccontextmanager
    async def subscribe(
        self, topic: str, *, group: str | None, prefetch: int, lease: float, ordered: bool = False
    ) -> AsyncGenerator[Subscription]:
        """Subscribe to what a group gets, or with None to what is published from now on."""
        if prefetch < 1:
            raise ValueError(f"subscribe(prefetch=...) takes a whole number from 1, not {prefetch!r}")
        line = self._hull.line()
        pullers: list[Puller] = []

        async def begin() -> None:
            source = await self._source(line, topic, group, prefetch, lease, ordered)
            pullers.append(Puller(line, source))
            await pullers[0].open()

        async def end() -> None:
            await begun
            for puller in pullers:
                await puller.close()

        begun = line.start(begin)
        try:
            outcome = await asyncio.shield(begun)
            if isinstance(outcome, TransportError):
                raise outcome
            yield pullers[0]
        finally:
            await line.start(end)

    async def _publish(self, topic: str, wires: Sequence[Wire], fit: Sequence[int]) -> dict[int, Lost | Refused]:
        try:
            line = self._hull.line()
        except Lost as error:
            return dict.fromkeys(fit, error)
        subject = names.subject_of(topic)
        failed: dict[int, Lost | Refused] = {}
        homeless: list[int] = []
        for turn in range(2):
            answers = [line.request(subject, wires[index].body, from_wire(wires[index])) for index in fit]
            for index, answer in zip(fit, [await answer for answer in answers], strict=True):
                if not isinstance(answer, Lost) and is_unheard(answer):
                    homeless.append(index)
                elif (failure := _failure(answer)) is not None:
                    failed[index] = failure
            if not homeless or turn:
                break
            self._streams.pop(topic, None)
            try:
                await line.run(lambda: self._declare(line, topic, ()))
            except Lost as error:
                return failed | dict.fromkeys(homeless, error)
            except TransportError as error:
                return failed | dict.fromkeys(homeless, Lost(str(error)))
            fit, homeless = homeless, []
        return failed | dict.fromkeys(homeless, Lost(f"no stream keeps {subject!r}"))

    def _unfit(self, wire: Wire) -> str:
        """Return why a wire can never be published, or nothing."""
        size, largest = len(wire.body), self.capabilities.max_bytes
        if size > largest:
            return f"its body of {size} bytes is larger than the {largest} that the server takes"
        if size + sum(len(name) + len(value.encode()) + 4 for name, value in from_wire(wire).items()) > largest + FRAME:
            return "its headers and its body together are larger than the server takes"
        if wire.id != wire.id.strip() or not wire.id.isprintable() or not wire.id:
            return f"NATS cannot carry the id {wire.id!r}"
        for name, value in wire.headers.items():
            if not HEADER.fullmatch(name) or name.lower().startswith("nats-"):
                return f"NATS takes no header {name!r}"
            if value != value.strip() or "\n" in value or "\r" in value:
                return f"NATS cannot carry the value of header {name!r}: it has blanks around it, or line breaks"
        return ""

    async def _declare(self, line: Line, topic: str, groups: Sequence[str]) -> str:
        """Return the stream of a topic, created like its consumers if it is missing."""
        subject, address = names.subject_of(topic), self._address
        stream = await self._stream(line, names.stream_of(topic), subject)
        if groups and address.declare:
            await self._stream(line, names.dead_stream_of(topic), names.dead_subject_of(topic, "*"))
            for group in groups:
                consumer = names.consumer_of(group)
                config = self._config(subject, self._limits.lease, durable=consumer)
                await _create(line, stream, consumer, config, only_new=True)
        return stream

    async def _stream(self, line: Line, name: str, subject: str) -> str:
        """Return the stream that keeps a subject: whoever made it, or a new one."""
        if subject in self._streams:
            return self._streams[subject]
        found = await line.api("STREAM.NAMES", {"subject": subject})
        if not found.get("streams"):
            if not self._address.declare:
                raise Refused(f"no stream keeps {subject!r}, and declare=false: create it, or let eventbus do it")
            address = self._address
            config = {
                "name": name, "subjects": [subject], "retention": "limits", "discard": "new", "storage": "file",
                "num_replicas": address.replicas, "max_age": int(address.max_age * NANO),
                "max_bytes": address.max_bytes, "duplicate_window": int(min(120, address.max_age or 120) * NANO),
            }  # fmt: skip
            answer = await line.api(f"STREAM.CREATE.{name}", config)
            _raise(answer, f"creating stream {name!r} for {subject!r}")
            found = {"streams": [name]}
        return found["streams"][0]

    def _config(self, subject: str, lease: float, **more: object) -> dict[str, object]:
        return {
            "ack_policy": "explicit", "ack_wait": int(lease * NANO), "deliver_policy": "all", "max_deliver": -1,
            "max_ack_pending": -1, "filter_subject": subject, "replay_policy": "instant", **more,
        }  # fmt: skip

    async def _source(
        self, line: Line, topic: str, group: str | None, prefetch: int, lease: float, ordered: bool
    ) -> Source:
        """Prepare the consumer of a subscription, and say how it is taken from."""
        subject = names.subject_of(topic)
        if group is None:
            stream, consumer = await self._declare(line, topic, ()), new_id()
            config = self._config(
                subject, lease, deliver_policy="new", inactive_threshold=int(DEPARTED * NANO), mem_storage=True,
                num_replicas=1,
            )  # fmt: skip
            await _create(line, stream, consumer, config)
            return Source(stream=stream, consumer=consumer, prefetch=prefetch, lease=lease, ephemeral=True)
        stream, consumer = await self._declare(line, topic, (group,)), names.consumer_of(group)
        dead = names.dead_subject_of(topic, group)
        pinned = ordered and line.version >= (2, 11)
        source = Source(
            stream=stream, consumer=consumer, prefetch=prefetch, lease=lease, pinned=pinned, dead=dead,
        )  # fmt: skip
        if not self._address.declare:
            return await _check(line, source)
        config = self._config(subject, lease, durable=consumer)
        if pinned:
            timeout = int((lease + 2 * KEEP) * NANO)
            config |= {"priority_groups": [GROUP], "priority_policy": "pinned_client", "priority_timeout": timeout}
        elif ordered:
            config["max_ack_pending"] = 1
        await _create(line, stream, consumer, config)
        return source


async def _create(
    line: Line, stream: str, consumer: str, config: Mapping[str, object], *, only_new: bool = False
) -> None:
    """Create a consumer, or unless it is to be new bring its lease and order up to date."""
    config = {**config, "name": consumer}
    if config.pop("durable", None):
        config["durable_name"] = consumer
    body: dict[str, object] = {"stream_name": stream, "config": config}
    if only_new:
        body["action"] = "create"
    answer = await line.api(f"CONSUMER.CREATE.{stream}.{consumer}.{config['filter_subject']}", body)
    if _code(answer) != EXISTS or not only_new:
        _raise(answer, f"creating consumer {consumer!r} of stream {stream!r}")


async def _check(line: Line, source: Source) -> Source:
    """Return how a consumer that somebody else made is taken from."""
    answer = await line.api(f"CONSUMER.INFO.{source.stream}.{source.consumer}")
    _raise(answer, f"looking for {source.name}, which declare=false leaves to you")
    config = answer["config"]
    pinned = config.get("priority_policy") == "pinned_client"
    if source.pinned and not pinned and config.get("max_ack_pending") != 1:
        raise Refused(f"{source.name} keeps no order: it needs priority_policy=pinned_client or max_ack_pending=1")
    return replace(source, pinned=pinned, lease=min(source.lease, config["ack_wait"] / NANO))


def _code(answer: Mapping[str, Any]) -> int:
    return answer["error"].get("err_code", answer["error"]["code"]) if "error" in answer else 0


def _raise(answer: Mapping[str, Any], doing: str) -> None:
    """Raise what an answer of JetStream says: later for its own troubles, never for what it will not do."""
    if "error" in answer:
        error = answer["error"]
        words = f"{doing}: {error.get('description', 'error')} ({_code(answer)})"
        raise Lost(words) if error["code"] in (404, 408, 429, 503) or error["code"] >= 500 else Refused(words)


def _failure(answer: Answer) -> Lost | Refused | None:
    """Return why a message is not stored, or None."""
    if isinstance(answer, Lost):
        return answer
    if b'"error"' not in answer.data:
        return None
    return _refusal(answer)


def _refusal(answer: Message) -> Lost | Refused:
    told = json.loads(answer.data)
    words = f"{told['error'].get('description', 'error')} ({_code(told)})"
    return Refused(words) if _code(told) == TOO_LARGE else Lost(words)
