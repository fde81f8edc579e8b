"""Be a child that publishes and handles on one store, until somebody, or its own fate, ends it.

``acked.txt`` gets the number of every publish whose commit was confirmed, ``refused.txt`` those that the store refused
(a deadlock, say), ``mail.txt`` a line for every start of the handler that has no transaction, ``diary.txt`` every
right that a store gave or took, ``<pid>.err`` what went wrong.
"""

import os
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio

from eventbus import Context, Event, EventBus, Limits, Module, Retry, Transaction
from eventbus.errors import StoreError
from eventbus.store import Store
from tests.crash.fate import Fate, append, doomed
from tests.crash.site import run

PUBLISHERS = 4
SLOTS = 4


class Made(Event, name="crash.made", key="lane"):
    """State that something was made."""

    number: int
    lane: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Say what a child does."""

    directory: Path
    store: str
    lease: float = 1.0
    seconds: float = 0.0
    """How long it publishes; 0: not at all, and it ends when nothing waits any more."""
    consume: bool = True
    """Whether it also handles."""
    fate: Fate = field(default_factory=Fate)


def module(directory: Path, fate: Fate) -> Module:
    """Return the handlers: one whose effect is in its transaction, one that only leaves a trace."""
    made = Module("made")
    patient = Retry(attempts=1_000, initial=0.01, maximum=0.1)

    @made.on(Made, retry=patient, ordered=True, concurrency=SLOTS)
    async def effect(event: Made, ctx: Context, tx: Transaction[Any]) -> None:
        fate.passes("in_handler")
        await run(
            tx.session, "INSERT INTO effects (number, lane, who) VALUES (:number, :lane, :who)",
            number=event.number, lane=f"{event.lane}/{event.number // PUBLISHERS // 1_000_000}", who=ctx.message_id,
        )  # fmt: skip
        fate.passes("after_effect")

    @made.on(Made, retry=patient, concurrency=SLOTS)
    async def mail(event: Made, ctx: Context) -> None:
        append(directory / "mail.txt", f"{event.number} {ctx.message_id} {os.getpid()}")
        fate.passes("in_mail")

    return made


async def publish(bus: EventBus, part: Part, lane: int) -> None:
    """Publish for a while, each time with a row of its own in the same transaction."""
    number, until = 0, anyio.current_time() + part.seconds
    chance = int.from_bytes(os.urandom(5))  # not the process id: after a thousand kills that comes again
    while anyio.current_time() < until:
        number += 1
        unique = lane + PUBLISHERS * (chance * 1_000_000 + number)
        try:
            async with bus.transaction() as tx:
                await run(tx.session, "INSERT INTO made VALUES (:number)", number=unique)
                await bus.publish(Made(number=unique, lane=str(lane)))
                part.fate.passes("in_transaction")
        except StoreError as error:
            append(part.directory / "refused.txt", f"{unique} {error}")
        else:
            append(part.directory / "acked.txt", str(unique))


async def play(part: Part) -> None:
    """Run the bus for as long as the part says."""
    store = doomed(part.store, part.fate, part.directory / "diary.txt")
    bus = EventBus(
        module(part.directory, part.fate),
        name="crash",
        store=store,
        routes={"crash.*": "store"},
        limits=Limits(lease=part.lease, sweep=0.2, drain=5.0),
    )
    async with bus.running(consume=part.consume):
        append(part.directory / "ready.txt", str(os.getpid()))
        if part.seconds:
            async with anyio.create_task_group() as group:
                for lane in range(PUBLISHERS):
                    group.start_soon(publish, bus, part, lane)
        else:
            await wait_for_nothing(store)


async def wait_for_nothing(store: Store) -> None:
    """Wait until no entry waits any more, whichever process handles it; looking takes a tenth of the time at most."""
    while True:
        began = anyio.current_time()
        if not any(one.waiting for one in await store.backlog()):
            return
        await anyio.sleep(9 * (anyio.current_time() - began))


def main(play: Callable[[Any], Awaitable[None]], directory: Path, part: Any) -> None:
    """Be the child."""
    errors = os.open(directory / f"{os.getpid()}.err", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.dup2(errors, sys.stderr.fileno())
    anyio.run(play, part)
