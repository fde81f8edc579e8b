"""Create streams and consumers, and never change or delete what somebody else made."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from eventbus.clock import new_id
from eventbus.errors import Lost, Refused
from eventbus.transports import _nats_address as names
from eventbus.transports._nats_line import Line
from eventbus.transports._nats_pin import GROUP, KEEP
from eventbus.transports._nats_pull import Source

__all__ = ("Topology",)

NANO = 1_000_000_000
DEPARTED = 60.0
"""Seconds after which the server forgets a broadcast subscriber that crashed."""
WINDOW = 120.0
"""Seconds for which a stream knows the ids that it has stored."""
EXISTS = 10148
"""JetStream's code for a consumer that is there already, and different."""
PASSING = (404, 408, 429)
"""Statuses that are over some time, as those from 500 are."""


class Topology:
    """Know the streams of one connection."""

    def __init__(self, line: Line, lease: float) -> None:
        self._line = line
        self._address = line.address
        self._lease = lease
        self._streams: dict[str, str] = {}

    def forget(self, topic: str) -> None:
        """Look for the stream of a topic again when it is needed next."""
        self._streams.pop(names.subject_of(topic), None)

    async def declare(self, topic: str, groups: Sequence[str]) -> str:
        """Return the stream of a topic; create it, and the consumers of groups, if missing."""
        self._streams.pop(names.dead_subject_of(topic, "*"), None)
        self.forget(topic)
        stream = await self._stream(topic)
        if groups and self._address.declare:
            await self._find(names.dead_stream_of(topic), names.dead_subject_of(topic, "*"))
            for group in groups:
                config = _config(names.subject_of(topic), self._lease, durable_name=names.consumer_of(group))
                await self._create(stream, names.consumer_of(group), config, only_new=True)
        return stream

    async def source(self, topic: str, prefetch: int, lease: float) -> Source:
        """Return a consumer for one subscriber, who gets what is published from now on."""
        stream, consumer = await self._stream(topic), new_id()
        config = _config(
            names.subject_of(topic), lease, deliver_policy="new", inactive_threshold=int(DEPARTED * NANO),
            mem_storage=True, num_replicas=1,
        )  # fmt: skip
        await self._create(stream, consumer, config)
        return Source(stream=stream, consumer=consumer, prefetch=prefetch, lease=lease, ephemeral=True)

    async def shared(self, topic: str, group: str, prefetch: int, lease: float, *, ordered: bool) -> Source:
        """Return the consumer of a group, with this lease and this order."""
        stream, consumer = await self.declare(topic, (group,)), names.consumer_of(group)
        source = Source(
            stream=stream, consumer=consumer, prefetch=prefetch, lease=lease, pinned=ordered,
            dead=names.dead_subject_of(topic, group),
        )  # fmt: skip
        if not self._address.declare:
            return await self._check(source)
        config = _config(names.subject_of(topic), lease, durable_name=consumer)
        if ordered:
            timeout = int((lease + 2 * KEEP) * NANO)
            config |= {"priority_groups": [GROUP], "priority_policy": "pinned_client", "priority_timeout": timeout}
        await self._create(stream, consumer, config)
        return source

    async def _stream(self, topic: str) -> str:
        return await self._find(names.stream_of(topic), names.subject_of(topic))

    async def _find(self, name: str, subject: str) -> str:
        """Return the stream that keeps a subject: whoever made it, or a new one."""
        if subject not in self._streams:
            found = await self._line.api("STREAM.NAMES", {"subject": subject})
            if not found.get("streams"):
                await self._make(name, subject)
                found = {"streams": [name]}
            self._streams[subject] = found["streams"][0]
        return self._streams[subject]

    async def _make(self, name: str, subject: str) -> None:
        address = self._address
        if not address.declare:
            raise Refused(f"no stream keeps {subject!r}, and declare=false: create one, or leave it to eventbus")
        config = {
            "name": name, "subjects": [subject], "retention": "limits", "discard": "new", "storage": "file",
            "num_replicas": address.replicas, "max_age": int(address.max_age * NANO), "max_bytes": address.max_bytes,
            "duplicate_window": int(min(WINDOW, address.max_age or WINDOW) * NANO),
        }  # fmt: skip
        _raise(await self._line.api(f"STREAM.CREATE.{name}", config), f"creating stream {name!r} for {subject!r}")

    async def _create(
        self, stream: str, consumer: str, config: Mapping[str, object], *, only_new: bool = False
    ) -> None:
        """Create a consumer, or unless it is to be new bring its lease and order up to date."""
        body: dict[str, object] = {"stream_name": stream, "config": {**config, "name": consumer}}
        if only_new:
            body["action"] = "create"
        answer = await self._line.api(f"CONSUMER.CREATE.{stream}.{consumer}.{config['filter_subject']}", body)
        if not only_new or _code(answer) != EXISTS:
            _raise(answer, f"creating consumer {consumer!r} of stream {stream!r}")

    async def _check(self, source: Source) -> Source:
        """Return how a consumer that somebody else made is taken from."""
        answer = await self._line.api(f"CONSUMER.INFO.{source.stream}.{source.consumer}")
        _raise(answer, f"looking for {source.name}, which declare=false leaves to you")
        config = answer["config"]
        pinned = config.get("priority_policy") == "pinned_client"
        if source.pinned and not pinned and config.get("max_ack_pending") != 1:
            raise Refused(f"{source.name} keeps no order: it needs priority_policy=pinned_client or max_ack_pending=1")
        return replace(source, pinned=pinned, lease=min(source.lease, config["ack_wait"] / NANO))


def _config(subject: str, lease: float, **more: object) -> dict[str, object]:
    return {
        "ack_policy": "explicit", "ack_wait": int(lease * NANO), "deliver_policy": "all", "max_deliver": -1,
        "max_ack_pending": -1, "filter_subject": subject, "replay_policy": "instant", **more,
    }  # fmt: skip


def _code(answer: Mapping[str, Any]) -> int:
    return int(answer["error"].get("err_code", 0)) if "error" in answer else 0


def _raise(answer: Mapping[str, Any], doing: str) -> None:
    """Raise what an answer of JetStream says: later for its own troubles, never for what it will not do."""
    if "error" in answer:
        error = answer["error"]
        words = f"{doing}: {error.get('description', 'error')} ({_code(answer)})"
        raise Lost(words) if error["code"] in PASSING or error["code"] >= 500 else Refused(words)
