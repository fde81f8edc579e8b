"""Be a worker on a broker, until somebody kills this process.

``started.txt`` gets the number of every event whose handler starts; with a store its effect is a row, without one a
line in ``effects.txt``.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio

from eventbus import Event, EventBus, Limits, Module, Transaction
from tests.crash.fate import append
from tests.crash.site import run

SLOTS = 4
LIMITS = Limits(lease=6.0, sweep=0.2, drain=5.0)
"""Kafka knows no shorter lease."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Say where a worker works."""

    directory: Path
    broker: str
    name: str
    """Of the bus; its event is called so too, and has a topic that nobody else uses."""
    store: str | None = None


def made_by(name: str) -> type[Event]:
    """Return the event of one test."""

    class Made(Event, name=f"{name}.made", key="number"):
        number: int

    return Made


def bus_of(work: Work) -> EventBus:
    """Return the bus of a worker."""
    module, made = Module("made"), made_by(work.name)

    async def note(number: int) -> None:
        append(work.directory / "started.txt", str(number))
        await anyio.sleep(0.005)

    async def effect(event: made, tx: Transaction[Any]) -> None:
        await note(event.number)
        await run(tx.session, "INSERT INTO effects (number) VALUES (:number)", number=event.number)

    async def trace(event: made) -> None:
        await note(event.number)
        append(work.directory / "effects.txt", str(event.number))

    module.on(made, name="effect", concurrency=SLOTS)(effect if work.store else trace)
    return EventBus(
        module, name=work.name, store=work.store, transports={"events": work.broker}, routes={made: "events"},
        limits=LIMITS,
    )  # fmt: skip


async def play(work: Work) -> None:
    """Work for ever."""
    async with bus_of(work).running():
        append(work.directory / "ready.txt", "ready")
        await anyio.sleep_forever()
