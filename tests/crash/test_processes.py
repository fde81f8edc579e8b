"""Prove that one SQLite file bears several processes and many events."""

import subprocess
import sys
import tracemalloc
from pathlib import Path

import anyio
import pytest

from eventbus import Event, EventBus, Limits, Module
from eventbus.stores.sqlite import SQLiteStore

pytestmark = pytest.mark.timeout(600)


class Grown(Event, name="memory.grown"):
    """State something of which there is very much."""

    number: int
    text: str


def test_locks_never_reach_a_user(tmp_path: Path) -> None:
    """While another process holds the file for a second, publishing waits and succeeds."""
    path = tmp_path / "locked.db"
    hold = (
        "import sqlite3, sys; c = sqlite3.connect(sys.argv[1], isolation_level=None); c.execute('BEGIN IMMEDIATE');"
        "print('held', flush=True); sys.stdin.readline(); c.execute('COMMIT')"
    )

    async def main() -> None:
        module = Module("memory", messages=[Grown])
        bus = EventBus(module, name="memory", store=SQLiteStore(path), routes={"memory.*": "store"})
        async with bus.running(consume=False):
            other = subprocess.Popen(  # noqa: ASYNC220 - it starts at once
                [sys.executable, "-c", hold, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            with other:
                if other.stdout is None or other.stdin is None:
                    raise RuntimeError("no pipes")
                other.stdout.readline()
                async with anyio.create_task_group() as group:
                    group.start_soon(_publish_one, bus)
                    await anyio.sleep(1.0)  # how long the other process holds the file: the fact under test
                    other.stdin.close()

    anyio.run(main)


async def _publish_one(bus: EventBus) -> None:
    async with bus.transaction():
        await bus.publish(Grown(number=1, text="x"))


def test_memory_does_not_grow_with_the_events(tmp_path: Path) -> None:
    """From event 2,000 to event 20,000, published by 64 tasks and handled, peak memory grows by 20 MB at most."""
    module, handled, total, early = Module("memory"), 0, 20_032, 2_000
    peaks: list[int] = []
    finished = anyio.Event()

    @module.on(Grown, concurrency=64)
    async def note(event: Grown) -> None:
        nonlocal handled
        handled += 1
        if handled == early:
            peaks.append(tracemalloc.get_traced_memory()[1])
        if handled == total:
            finished.set()

    async def publish(bus: EventBus) -> None:
        for number in range(total // 64):
            async with bus.transaction():
                await bus.publish(Grown(number=number, text="x" * 200))

    async def main() -> None:
        store = SQLiteStore(tmp_path / "memory.db", synchronous="normal")
        bus = EventBus(module, name="memory", store=store, routes={"memory.*": "store"}, limits=Limits(sweep=0.5))
        async with bus.running():
            async with anyio.create_task_group() as group:
                for _ in range(64):
                    group.start_soon(publish, bus)
            with anyio.fail_after(400):
                await finished.wait()

    tracemalloc.start()
    try:
        anyio.run(main)
        peaks.append(tracemalloc.get_traced_memory()[1])
    finally:
        tracemalloc.stop()
    assert handled == total
    print(f"\npeak at {early} events {peaks[0] / 2**20:.1f} MB, at {total} {peaks[1] / 2**20:.1f} MB")
    assert peaks[1] - peaks[0] <= 20 * 2**20
