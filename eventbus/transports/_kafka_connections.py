"""Own the connections of one client, which leaves some open where it is cut, and makes new ones behind its end.

What aiokafka 0.14 leaves behind where a broker is away, comes back or says nothing: the first connection of a start
that is cut (its issue 715); whatever ``stop`` has still to end where it raises half-way, as it does while a fetch waits
before it tries again (647) or a producer for an answer, or where it has to be cut (1013); what is connected later.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import anyio

from eventbus.transports._kafka_cluster import aiokafka, is_shut

__all__ = ("Connections",)

log = logging.getLogger("eventbus")

CONTACT = 5.0
"""Seconds for the first answer of one server."""


class Connections:
    """Be who makes and closes what a client connects; ``options`` is what every client of this cluster takes."""

    def __init__(self, client: Any, options: dict[str, Any]) -> None:
        self._client = client
        self._options = {name: value for name, value in options.items() if name != "bootstrap_servers"}
        self._connect = client._get_conn
        self._transports: dict[tuple[Any, Any], asyncio.Transport] = {}
        self._attempts: set[anyio.CancelScope] = set()
        self._cut = False
        client.bootstrap, client._get_conn = self._bootstrap, self._connection

    def cut(self) -> None:
        """Close every connection now, and allow no other: whatever waits for the cluster fails, and can end."""
        self._cut = True
        for attempt in self._attempts:
            attempt.cancel()
        for key in [*self._client._conns]:
            self._hang_up(key)

    async def end(
        self, stop: Coroutine[Any, Any, None], seconds: float, *parts: Any, give_up: Callable[[], None] | None = None
    ) -> None:
        """Let the client stop in order while there is time; then cut it, and wait half as long again.

        Whatever became of that, afterwards no task runs any more that the client or one of its ``parts`` holds.
        """
        stopping = asyncio.ensure_future(stop)
        try:
            await asyncio.wait([stopping], timeout=seconds)
            if give_up is not None:
                give_up()
            self.cut()
            await asyncio.wait([stopping], timeout=seconds / 2)
            if stopping.done() and not stopping.cancelled() and (error := stopping.exception()) is not None:
                log.info("closing a kafka client: %s: %s", type(error).__name__, error)
        finally:
            self.cut()
            rest = [stopping, *_tasks_of(self._client, *parts)]
            for task in rest:
                task.cancel()
                task.add_done_callback(_forget)
        await asyncio.wait(rest, timeout=seconds / 2)

    async def _bootstrap(self) -> None:
        """Learn from one server where the others are. Raises why none says so, which the client would only log."""
        client, library, found = self._client, aiokafka(), None
        for host, port, _ in client.hosts:
            try:
                async with asyncio.timeout(CONTACT):
                    connection = await library.conn.create_conn(host, port, **self._options)
                    try:
                        known = await connection.send(library.protocol.metadata.MetadataRequest([]))
                    finally:
                        connection.close()
            except (library.errors.KafkaError, OSError) as error:
                found = found if found is not None and not is_shut(error) else error
                continue
            if known.brokers:
                client.cluster.update_metadata(known)
                client._sync_task = asyncio.ensure_future(client._md_synchronizer())
                return
        raise found or library.errors.MetadataEmptyBrokerList

    async def _connection(self, node: Any, *, group: Any = 0, **hints: Any) -> Any:
        key = node, group
        found = self._client._conns.get(key)
        if found is not None:
            if found.connected():
                return found
            self._hang_up(key)  # the client forgets it, and gave it up perhaps before all was written
        if self._cut:
            return None
        with anyio.CancelScope() as attempt:
            self._attempts.add(attempt)
            try:
                found = await self._connect(node, group=group, **hints)
            finally:
                self._attempts.discard(attempt)
            if found is not None and found.connected():
                self._transports[key] = found._writer.transport
            if self._cut:
                self._hang_up(key)
                found = None
            return found
        return None

    def _hang_up(self, key: tuple[Any, Any]) -> None:
        """Close a connection at once: in order it would wait for the other side to take what is still unsaid."""
        if (connection := self._client._conns.get(key)) is not None:
            connection.close()
        if (transport := self._transports.pop(key, None)) is not None:
            transport.abort()


def _tasks_of(*parts: object) -> Iterator["asyncio.Task[Any]"]:
    held: list[Any] = [value for part in parts if part is not None for value in vars(part).values()]
    for value in held:
        several: list[Any] = [*value] if type(value) is set else [value]
        yield from (one for one in several if isinstance(one, asyncio.Task) and not one.done())


def _forget(task: "asyncio.Task[Any]") -> None:
    if not task.cancelled():
        task.exception()  # nobody else looks at it
