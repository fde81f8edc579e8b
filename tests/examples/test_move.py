"""Moving an event to a broker and back, as the guide says: two kinds of processes on one store, and nothing is lost."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from uuid import uuid4

import anyio
import pytest

from eventbus import Event, EventBus, Limits, Module
from tests.servers.server import Server


class Rang(Event, name="door.rang"):
    times: int


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    """Run on asyncio, which is what the broker's client needs."""
    return "asyncio"


async def test_there_and_back(valkey: Server, tmp_path: Path) -> None:
    """Whoever is deployed first, what was published is handled once, by the worker or by the next one."""
    rung, heard = anyio.create_memory_object_stream[int](10)
    door, name = Module("door"), f"door-{uuid4()}"

    @door.on(Rang)
    async def listen(event: Rang) -> None:
        rung.send_nowait(event.times)

    @asynccontextmanager
    async def process(route: str, *, works: bool) -> AsyncIterator[EventBus]:
        transports, limits = {"events": valkey.url}, Limits(sweep=0.1)
        store = f"sqlite:///{tmp_path}/door.db"
        bus = EventBus(door, name=name, store=store, transports=transports, routes={Rang: route}, limits=limits)
        async with bus.running(consume=works):
            yield bus

    async def handled(*times: int) -> None:
        with anyio.fail_after(20):
            assert {await heard.receive() for _ in times} == {*times}

    async def waits_to_go_out(bus: EventBus) -> int:
        store = bus.wiring.store
        assert store is not None
        return sum(one.waiting for one in await store.backlog() if one.recipient == f"{name}>events")

    async with rung, heard, process("store", works=False) as before, process("events", works=False) as after:
        async with process("events", works=True):
            await before.publish(Rang(times=1), atomic=False)
            await after.publish(Rang(times=2), atomic=False)
            await handled(1, 2)
        async with process("store", works=True):
            await after.publish(Rang(times=3), atomic=False)
            await before.publish(Rang(times=4), atomic=False)
            await handled(4)
            assert await waits_to_go_out(after) == 1
        async with process("events", works=True):
            await handled(3)
            assert await waits_to_go_out(after) == 0
            await before.publish(Rang(times=5), atomic=False)
            await handled(5)
        async with process("store", works=True):
            await before.publish(Rang(times=6), atomic=False)
            await handled(6)
        assert heard.statistics().current_buffer_used == 0
