"""Say what a test can do to a server of ours, as the exam wants to know it."""

from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio

from eventbus.testing.transport_exam import Broker, Network
from eventbus.transport import connect
from tests.servers.proxy import Fault, Proxy
from tests.servers.server import Server


def broker_at(server: Server, url: str, *, proxy: Callable[[], Proxy], **more: Any) -> Broker:
    """Return what can be done to a server; ``url`` has ``{port}``, and ``proxy`` makes what stands before it."""

    @asynccontextmanager
    async def network() -> AsyncGenerator[Network]:
        async with proxy().running() as between:

            def delay(seconds: float) -> None:
                if seconds:
                    between.inject(Fault(does="delay", seconds=seconds))
                else:
                    between.heal()

            yield Network(
                make=lambda: connect(url.format(port=between.port)),
                swallow=lambda: between.inject(Fault(does="black-hole")),
                delay=delay,
                pieces=lambda: between.strikes,
                connections=lambda: between.connections,
            )

    return Broker(
        start=lambda: anyio.to_thread.run_sync(server.start),
        stop=lambda: anyio.to_thread.run_sync(server.stop),
        kill=lambda: anyio.to_thread.run_sync(server.kill),
        network=network,
        **more,
    )
