"""Be an application under load, for servers and workers that are started, ended and killed: ``SERVED_*`` says how."""

import os
from pathlib import Path
from typing import Any

import anyio
from fastapi import FastAPI

from eventbus import Context, Event, EventBus, Limits, Module, Retry, Transaction
from eventbus.fastapi import BusDep, install
from tests.crash.fate import append
from tests.crash.site import run

DIRECTORY = Path(os.environ.get("SERVED_DIRECTORY", "."))
LINGERING = 100
"""Every so many messages one is handled for longer than a drain takes."""
SLOTS = 8


class Made(Event, name="served.made", key="lane"):
    """State that something was made."""

    number: int
    lane: str


served = Module("served")
patient = Retry(attempts=1_000, initial=0.01, maximum=0.1)


@served.on(Made, retry=patient, ordered=True, concurrency=SLOTS)
async def effect(event: Made, ctx: Context, tx: Transaction[Any]) -> None:
    """Leave a trace in the transaction."""
    await run(
        tx.session, "INSERT INTO effects (number, lane, who) VALUES (:number, :lane, :who)",
        number=event.number, lane=event.lane, who=ctx.message_id,
    )  # fmt: skip


@served.on(Made, retry=patient, concurrency=SLOTS)
async def mail(event: Made, ctx: Context) -> None:
    """Leave a trace at the end of something that takes its time."""
    lingers = event.number % LINGERING == 0
    await anyio.sleep(float(os.environ.get("SERVED_LINGER" if lingers else "SERVED_PACE", "0.01")))
    append(DIRECTORY / "mail.txt", f"{event.number} {ctx.message_id} {os.getpid()}")


bus = EventBus(
    served,
    name="served",
    store=os.environ.get("SERVED_STORE", "sqlite:///served.db"),
    routes={Made: "store"},
    limits=Limits(
        lease=float(os.environ.get("SERVED_LEASE", "600")), sweep=0.5, drain=float(os.environ.get("SERVED_DRAIN", "1"))
    ),
)
app = FastAPI()
install(app, bus)


async def make(bus: EventBus, number: int) -> None:
    """Make something, in one transaction with its message."""
    async with bus.transaction() as tx:
        await run(tx.session, "INSERT INTO made VALUES (:number)", number=number)
        await bus.publish(Made(number=number, lane=str(number % 8)))


@app.post("/made/{number}", status_code=201)
async def post(number: int, bus: BusDep) -> int:
    """Make something; say which process did."""
    await make(bus, number)
    return os.getpid()
