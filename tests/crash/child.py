"""Publish and handle on one SQLite file until somebody, or the chosen point itself, kills this process.

    python -m tests.crash.child DIRECTORY SECONDS LEASE [POINT NUMBER]

SECONDS of 0 publishes nothing and ends when nothing waits any more. A POINT kills the process with SIGKILL at its
NUMBER-th passing. ``acked.txt`` gets the number of every publish whose commit was confirmed, ``mail.txt`` a line for
every start of the handler that has no transaction.
"""

import functools
import os
import signal
import sys
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import anyio

from eventbus import Context, Event, EventBus, Limits, Module, Retry, Transaction
from eventbus.stores.sqlite import SQLiteSession, SQLiteStore

POINTS = (
    "in_transaction", "before_commit", "after_commit", "after_claim", "in_handler", "after_effect", "before_settle",
    "after_settle", "in_mail",
)  # fmt: skip
PUBLISHERS = 4
SLOTS = 4


class Made(Event, name="crash.made", key="lane"):
    """State that something was made."""

    number: int
    lane: str


class Fate:
    """Kill this process at the chosen passing of the chosen point."""

    def __init__(self, point: str = "", number: int = 0) -> None:
        self.point = point
        self.left = number

    def passes(self, point: str) -> None:
        """Note that a point is passed."""
        if point == self.point:
            self.left -= 1
            if self.left <= 0:
                os.kill(os.getpid(), signal.SIGKILL)


class Doomed(SQLiteStore):
    """Pass the points around the verbs of a store."""

    fate = Fate()

    def begin(self, session: object | None = None) -> AbstractAsyncContextManager[Any]:
        """Pass the points around a commit."""
        return _around_commit(super().begin(session), self.fate)

    async def claim(self, *args: Any, **options: Any) -> Any:
        """Pass the point after a claim."""
        claimed = await super().claim(*args, **options)
        if claimed.entries:
            self.fate.passes("after_claim")
        return claimed

    async def settle(self, *args: Any, **options: Any) -> Any:
        """Pass the points around a settlement."""
        self.fate.passes("before_settle")
        lost = await super().settle(*args, **options)
        self.fate.passes("after_settle")
        return lost


class _around_commit(AbstractAsyncContextManager[Any]):  # noqa: N801 - used as a function
    def __init__(self, inner: AbstractAsyncContextManager[Any], fate: Fate) -> None:
        self.inner = inner
        self.fate = fate

    async def __aenter__(self) -> Any:
        return await self.inner.__aenter__()

    async def __aexit__(self, *exc: object) -> bool | None:
        self.fate.passes("before_commit")
        answer = await self.inner.__aexit__(*exc)  # type: ignore[arg-type]
        self.fate.passes("after_commit")
        return answer


def append(path: Path, line: str) -> None:
    """Append a line in one write, so that a kill leaves whole lines or none."""
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(handle, f"{line}\n".encode())
    finally:
        os.close(handle)


def module(directory: Path, fate: Fate) -> Module:
    """Return the handlers: one whose effect is in its transaction, one that only leaves a trace."""
    made = Module("made")
    patient = Retry(attempts=1_000, initial=0.01, maximum=0.1)

    @made.on(Made, retry=patient, ordered=True, concurrency=SLOTS)
    async def effect(event: Made, ctx: Context, tx: Transaction[SQLiteSession]) -> None:
        fate.passes("in_handler")
        await tx.session.execute("INSERT INTO effects VALUES (?, ?)", (event.number, ctx.message_id))
        fate.passes("after_effect")

    @made.on(Made, retry=patient, concurrency=SLOTS)
    async def mail(event: Made, ctx: Context) -> None:
        append(directory / "mail.txt", f"{event.number} {ctx.message_id} {os.getpid()}")
        fate.passes("in_mail")

    return made


async def publish(bus: EventBus, directory: Path, fate: Fate, lane: str) -> None:
    """Publish for ever, each time with a row of its own in the same transaction."""
    number = 0
    while True:
        number += 1
        unique = int(lane) + PUBLISHERS * (os.getpid() * 1_000_000 + number)
        async with bus.transaction() as tx:
            await tx.session.execute("INSERT INTO made VALUES (?)", (unique,))
            await bus.publish(Made(number=unique, lane=lane))
            fate.passes("in_transaction")
        append(directory / "acked.txt", str(unique))


async def main(directory: Path, seconds: float, lease: float, fate: Fate) -> None:
    """Run the bus; with ``seconds`` publish for so long, without wait until nothing is left."""
    store = Doomed(directory / "crash.db")
    store.fate = fate
    bus = EventBus(
        module(directory, fate),
        name="crash",
        store=store,
        routes={"crash.*": "store"},
        limits=Limits(lease=lease, sweep=0.2, drain=5.0),
    )
    async with bus.running():
        async with bus.transaction() as tx:
            await tx.session.execute("CREATE TABLE IF NOT EXISTS made (number INTEGER PRIMARY KEY)")
            await tx.session.execute("CREATE TABLE IF NOT EXISTS effects (number INTEGER, message_id TEXT)")
        append(directory / "ready.txt", str(os.getpid()))
        if seconds:
            await _publish_all(bus, directory, seconds, fate)
        else:
            await _wait_for_nothing(bus, store)


async def _publish_all(bus: EventBus, directory: Path, seconds: float, fate: Fate) -> None:
    with anyio.move_on_after(seconds):
        async with anyio.create_task_group() as group:
            for lane in range(PUBLISHERS):
                group.start_soon(publish, bus, directory, fate, str(lane))


async def _wait_for_nothing(bus: EventBus, store: SQLiteStore) -> None:
    worker = bus.engine.worker
    while any(one.waiting for one in await store.backlog()):
        if worker is not None:
            await worker.changed.wait()


if __name__ == "__main__":
    where, for_seconds, with_lease, *chosen = sys.argv[1:]
    doom = Fate(chosen[0], int(chosen[1])) if chosen else Fate()
    anyio.run(functools.partial(main, Path(where), float(for_seconds), float(with_lease), doom))
