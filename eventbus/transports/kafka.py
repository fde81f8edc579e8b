"""Carry wires through Apache Kafka: ``kafka://host:port`` and ``kafka+ssl://``.

A topic is a Kafka topic and a group a consumer group. Settling is cumulative there: an acknowledged message is
committed as soon as everything before it in its partition is, so that a crash repeats what lies beyond a gap. Keys
choose partitions as every Kafka client does, and a partition has one reader per group, which keeps a key's order.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Self

from eventbus._loop import check_opening
from eventbus.errors import Lost, PublishError
from eventbus.limits import Limits
from eventbus.transport import Capabilities, Subscription, Wire, check_prefetch, shut_out
from eventbus.transports._kafka_cluster import (
    Cluster,
    Discretion,
    aiokafka,
    dead_topic,
    failure,
    group_id,
    is_shut,
    topic_name,
)
from eventbus.transports._kafka_connections import Connections
from eventbus.transports._kafka_reader import Reader
from eventbus.transports._kafka_records import REASON
from eventbus.transports._kafka_sender import Sender
from eventbus.transports._kafka_tasks import Tasks

__all__ = ("KafkaTransport",)

CLIENT_LOG = logging.getLogger("aiokafka.conn")

REQUEST = 5.0
"""Seconds for one answer of the cluster."""
OPENING = 8.0
"""Seconds for the first contact."""
CLOSING = 1.0
"""Seconds for closing in good order; what has not ended by then is cut."""
HEARTBEAT = 1.0
"""Seconds between two heartbeats, which is also how soon a consumer hears that partitions must move."""
SESSIONS = (6.0, 1_800.0)
"""The shortest and the longest session in seconds that brokers allow unless told otherwise."""
BATCH = 65_536
"""Bytes per partition and request."""
JOINING = 3.0
"""Seconds to wait at most for the first partitions; whoever has them now may need longer to give some up."""
NEVER = 2**31 - 1

DEFAULTS = Limits()


class KafkaTransport:
    """Carry wires through a Kafka cluster.

    It opens with a producer that is idempotent and waits for all replicas; each subscription has a consumer of its
    own. Topics that ``declare`` creates get ``?partitions=12&replication=-1`` (-1: what the broker prefers).

    >>> KafkaTransport.from_url("kafka://shop:secret@localhost:9092?partitions=3").cluster
    Cluster(servers=('localhost:9092',), sasl='PLAIN', tls=False, cafile=None, certfile=None, \
keyfile=None, partitions=3, replication=-1, declare=True, max_bytes=983040)
    """

    def __init__(self, cluster: Cluster) -> None:
        aiokafka()
        self.cluster = cluster
        self.capabilities = Capabilities(
            confirm="stored", unheard="kept", groups=True, broadcast=True, returns="rebalance", settle="prefix",
            attempts=False, retry=0.0, grain=0.0, dead=True, order="key", headers=True, max_bytes=cluster.max_bytes,
        )  # fmt: skip
        self._closed = "the kafka transport is not open"
        self._tasks = Tasks()
        self._sender: Sender | None = None
        self._admin: Any = None
        self._connections: Connections
        self._readers: dict[Reader, None] = {}
        self._discretion = Discretion()

    @classmethod
    def from_url(cls, url: str, *, limits: Limits = DEFAULTS) -> Self:
        """Return the transport of ``kafka://user:password@host:port,host:port?option=value``.

        Raises ``ValueError`` for what it does not know, and ``MissingExtraError`` without aiokafka.
        """
        return cls(Cluster.from_url(url))

    async def __aenter__(self) -> Self:
        """Make the first contact. Raises ``Lost`` if the cluster is away, ``Refused`` if it does not let us in."""
        check_opening("the kafka transport", is_open=not self._closed)
        CLIENT_LOG.addFilter(self._discretion)
        opening = self._tasks.start(self._open(), "opening")
        try:
            await self._tasks.outcome(opening)
        except BaseException:
            await self._tasks.finish(self._close(opening), "closing")
            raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        """End every subscription, fail every waiting publisher with ``Lost``, and close within 2 s."""
        await self._tasks.finish(self._close(), "closing")

    async def declare(self, topic: str, groups: Sequence[str], *, ordered: Collection[str] = ()) -> None:
        """Create the topics that are missing: that of the messages, and those of the dead."""
        sender = self._require_open()
        if sender.broken:
            raise Lost(sender.broken)
        names = [topic_name(topic), *(dead_topic(topic, group) for group in groups)]
        await self._tasks.run(self._declare(names), f"declaring {topic}")

    async def publish(self, topic: str, wires: Sequence[Wire]) -> None:
        """Return when all replicas that are in sync have all wires.

        Raises ``PublishError`` with ``Refused`` for what is too large, and ``Lost`` where no confirmation came.
        """
        if self._sender is None or self._closed:
            raise PublishError(dict.fromkeys(range(len(wires)), Lost(self._closed)))
        if wires:
            await self._sender.send(topic, wires, self._make)

    @asynccontextmanager
    async def subscribe(
        self, topic: str, *, group: str | None, prefetch: int, lease: float, ordered: bool = False
    ) -> AsyncGenerator[Subscription]:
        """Subscribe to what a group gets, or with None to what is published from now on.

        A process that was killed loses its partitions after ``lease`` seconds; before partitions move, a third of it
        is left to running handlers. ``ordered`` changes nothing: one key is always in one process.
        """
        check_prefetch(prefetch)
        await self.declare(topic, () if group is None else (group,))
        name, options = topic_name(topic), self.cluster.client(REQUEST)
        consumer = self._consumer(topic, group, lease, options)
        reader = Reader(
            consumer, Connections(consumer._client, options), name,
            prefetch=prefetch, grace=lease / 3, grouped=group is not None, bury=partial(self._bury, topic, group),
        )  # fmt: skip
        self._readers[reader] = None
        jobs = [self._tasks.start(reader.start(OPENING), f"subscribing to {name}")]
        try:
            await self._tasks.outcome(jobs[0])
            jobs.append(self._tasks.start(reader.run(), f"reading {name}"))
            await reader.joined(min(JOINING, lease / 6))
            yield reader
        finally:
            del self._readers[reader]
            await self._tasks.finish(self._leave(reader, *jobs), f"leaving {name}")

    async def _leave(self, reader: Reader, starting: "asyncio.Task[None]", *running: "asyncio.Task[None]") -> None:
        await asyncio.wait([starting])
        await reader.leave(CLOSING)
        for task in running:
            task.cancel()

    async def _bury(self, topic: str, group: str | None, wire: Wire, reason: str) -> None:
        if group is not None:
            copy = replace(wire, headers={**wire.headers, REASON: reason})
            await self._require_open().send(dead_topic(topic, group), [copy])

    def _require_open(self) -> Sender:
        if self._sender is None or self._closed:
            raise Lost(self._closed)
        return self._sender

    async def _open(self) -> None:
        library, options = aiokafka(), self.cluster.client(REQUEST)
        producer = library.AIOKafkaProducer(enable_idempotence=True, acks="all", max_batch_size=BATCH, **options)
        self._sender = Sender(producer, Connections(producer.client, options), self.cluster.max_bytes, self._tasks)
        self._admin = library.admin.AIOKafkaAdminClient(**options)
        self._connections = Connections(self._admin._client, options)
        try:
            async with asyncio.timeout(OPENING):
                await self._admin.start()
                await producer.start()
                self._sender.watch()
        except (library.errors.KafkaError, OSError) as error:
            at, why = f"kafka://{','.join(self.cluster.servers)}", f"{type(error).__name__}: {error}"
            raise (shut_out(at, why) if is_shut(error) else Lost(f"{at}: {why}")) from None
        self._closed = ""

    async def _close(self, *before: "asyncio.Task[None]") -> None:
        """Close in good order as far as time allows, then cut."""
        if before:
            await asyncio.wait(before)
        self._closed = "the kafka transport was closed"
        for reader in self._readers:
            reader.lose(self._closed)
        sender, admin, self._sender, self._admin = self._sender, self._admin, None, None
        jobs = [] if sender is None else [sender.close(self._closed, CLOSING)]
        jobs += [] if admin is None else [self._connections.end(admin.close(), CLOSING)]
        for job in jobs:
            _ = self._tasks.start(job, "closing")
        await self._tasks.end(1.5 * CLOSING)
        CLIENT_LOG.removeFilter(self._discretion)

    async def _declare(self, names: Sequence[str]) -> None:
        library = aiokafka()
        try:
            async with asyncio.timeout(REQUEST):
                if self.cluster.declare:
                    await self._create(names)
                else:
                    await self._look(names)
        except (library.errors.KafkaError, TimeoutError) as error:
            raise failure(error, f"declaring {names[0]}") from error

    async def _make(self, name: str) -> None:
        """Create a topic that nobody declared; who may not do that may publish all the same."""
        try:
            if self.cluster.declare:
                await self._declare([name])
        except Lost as error:
            if error.__cause__ is None or not is_shut(error.__cause__):
                raise

    async def _create(self, names: Sequence[str]) -> None:
        library, cluster = aiokafka(), self.cluster
        sizes = [cluster.partitions, *(1 for _ in names[1:])]  # the dead are few
        topics = [
            library.admin.NewTopic(name, size, cluster.replication, replica_assignments={})
            for name, size in zip(names, sizes, strict=True)
        ]
        answer = await self._admin.create_topics(topics)
        for name, code, *text in answer.topic_errors:
            if code not in (0, library.errors.TopicAlreadyExistsError.errno):
                error = library.errors.for_code(code)
                raise error(f"{name}: {text[0] if text and text[0] else error.description}")

    async def _look(self, names: Sequence[str]) -> None:
        for found in await self._admin.describe_topics([*names]):
            if found["error_code"]:
                error = aiokafka().errors.for_code(found["error_code"])
                raise error(f"{found['topic']}: {error.description}; create it, or leave out declare=false")

    def _consumer(self, topic: str, group: str | None, lease: float, options: dict[str, Any]) -> Any:
        session = min(max(lease, SESSIONS[0]), SESSIONS[1])
        return aiokafka().AIOKafkaConsumer(
            group_id=None if group is None else group_id(topic, group),
            enable_auto_commit=False,
            auto_offset_reset="latest" if group is None else "earliest",
            session_timeout_ms=int(session * 1_000),
            heartbeat_interval_ms=int(HEARTBEAT * 1_000),
            rebalance_timeout_ms=int((lease / 3 + SESSIONS[0]) * 1_000),
            max_poll_interval_ms=NEVER,
            **options,
        )
