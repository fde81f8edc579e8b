"""Stand between a client and a server, and do to their connection what networks do."""

import contextlib
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Literal

import anyio

HOST = "127.0.0.1"
BREAK = struct.pack("ii", 1, 0)
"""Linger for no time: closing then breaks the connection, instead of ending it in order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """Say what happens to a connection, and when.

    ``drop`` closes it in order, ``reset`` breaks it, ``black-hole`` lets it stand and carries nothing any more, and
    ``delay`` holds bytes back for ``seconds``. It strikes at once if neither ``at`` nor ``after`` is given.
    """

    does: Literal["delay", "drop", "reset", "black-hole"]
    at: bytes = b""
    """Strike where these bytes begin, in either case of letters."""
    behind: bytes = b""
    """Strike only a connection that has carried these before, in the same direction."""
    after: int = 0
    """Strike behind so many bytes of a connection."""
    by: Literal["client", "server"] = "client"
    """Whose bytes ``at`` and ``after`` look at."""
    passed: bool = False
    """Whether the bytes that bring it about still arrive, so that only the answer is lost."""
    seconds: float = 0.0
    times: int | None = None
    """How often it strikes; None: always."""

    @property
    def immediate(self) -> bool:
        """Tell whether it waits for no bytes."""
        return self.does != "delay" and not self.at and not self.after

    def place(self, data: bytes, before: bytes, count: int) -> int | None:
        """Return where in ``data`` it strikes, ``count`` bytes having passed before and ``before`` the last of them."""
        if self.at:
            return first(self.at, data, before)
        return max(self.after - count, 0) if count + len(data) > self.after else None


def first(word: bytes, data: bytes, before: bytes) -> int | None:
    """Return where in ``data``, which follows ``before``, a word begins (0: earlier) that was not whole before."""
    tail = before[max(len(before) - len(word) + 1, 0) :]
    found = (tail + data).lower().find(word.lower())
    return None if found < 0 else max(found - len(tail), 0)


class Link:
    """Be one connection through the proxy."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.client = client
        self.server = server
        self.scope = anyio.CancelScope()
        self.black = False

    def cut(self, *, reset: bool) -> None:
        """End both sides; whoever carries the bytes closes them."""
        for side in (self.client, self.server):
            if reset:
                side.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, BREAK)
            else:
                with contextlib.suppress(OSError):
                    side.shutdown(socket.SHUT_WR)
        self.scope.cancel()


class Proxy:
    """Carry bytes between ``port`` of this proxy and a server, until a fault is injected.

    >>> async def main(server):
    ...     async with Proxy(server.port).running() as proxy:
    ...         proxy.inject(Fault(does="reset", at=b"COMMIT", passed=True, times=1))
    ...         ...  # a client of proxy.port
    ...         await proxy.struck()
    """

    def __init__(self, target: int, port: int = 0) -> None:
        self.target = target
        self.port = port
        self.fault: Fault | None = None
        self.strikes = 0
        self._links: set[Link] = set()
        self._struck = anyio.Event()

    @property
    def connections(self) -> int:
        """Return how many connections there are."""
        return len(self._links)

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Proxy"]:
        """Listen; all connections end behind the block."""
        with socket.create_server((HOST, self.port)) as listener:
            listener.setblocking(False)
            self.port = listener.getsockname()[1]
            async with anyio.create_task_group() as group:
                group.start_soon(self._listen, listener)
                yield self
                group.cancel_scope.cancel()

    def inject(self, fault: Fault) -> None:
        """Let a fault happen from now on, instead of any other; an immediate one strikes all connections that are."""
        self.fault, self.strikes, self._struck = fault, 0, anyio.Event()
        if fault.immediate:
            for link in list(self._links):
                self._strike(link, fault)

    def heal(self) -> None:
        """Carry bytes again; connections that carried nothing are closed, since bytes of theirs are lost."""
        self.fault = None
        for link in self._links:
            if link.black:
                link.cut(reset=False)

    async def struck(self) -> None:
        """Wait until the fault has struck."""
        await self._struck.wait()

    async def _listen(self, listener: socket.socket) -> None:
        async with anyio.create_task_group() as group:
            while True:
                await anyio.wait_readable(listener)
                client, _ = listener.accept()
                client.setblocking(False)
                group.start_soon(self._serve, client)

    async def _serve(self, client: socket.socket) -> None:
        with client, socket.socket() as server:
            if server.connect_ex((HOST, self.target)):  # at once on this machine, and so is the refusal
                return
            server.setblocking(False)
            link = Link(client, server)
            self._links.add(link)
            try:
                with link.scope:
                    if self.fault is not None and self.fault.immediate:
                        self._strike(link, self.fault)
                    async with anyio.create_task_group() as group:
                        group.start_soon(self._carry, link, "client")
                        group.start_soon(self._carry, link, "server")
            finally:
                self._links.discard(link)

    async def _carry(self, link: Link, by: str) -> None:
        source, sink = (link.client, link.server) if by == "client" else (link.server, link.client)
        before, count, armed = b"", 0, b""
        with contextlib.suppress(ConnectionError):
            while data := await receive(source):
                fault = self.fault
                where = None
                if fault is not None and fault.by == by and armed == fault.behind:
                    where = fault.place(data, before, count)
                if link.black:
                    pass
                elif fault is None or where is None:
                    await send(sink, data)
                elif fault.does == "delay":
                    self._strike(link, fault)
                    await anyio.sleep(fault.seconds)
                    await send(sink, data)
                else:
                    await send(sink, data if fault.passed else data[:where])
                    self._strike(link, fault)
                if fault is not None and fault.behind and first(fault.behind, data, before) is not None:
                    armed = fault.behind
                before, count = (before + data)[-100:], count + len(data)
        if not link.black:
            link.cut(reset=False)

    def _strike(self, link: Link, fault: Fault) -> None:
        self.strikes += 1
        self._struck.set()
        if fault.times is not None and self.strikes >= fault.times:
            self.fault = None
        if fault.does == "black-hole":
            link.black = True
        elif fault.does != "delay":
            link.cut(reset=fault.does == "reset")


async def receive(link: socket.socket) -> bytes:
    """Return the next bytes, none at the end."""
    while True:
        try:
            return link.recv(65_536)
        except BlockingIOError:
            await anyio.wait_readable(link)


async def send(link: socket.socket, data: bytes) -> None:
    """Send all of them."""
    while data:
        try:
            data = data[link.send(data) :]
        except BlockingIOError:
            await anyio.wait_writable(link)
