"""The shop: four modules on one bus, a small HTTP interface, and a page that shows what happens."""

import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

from fastapi import APIRouter, BackgroundTasks, FastAPI
from fastapi.responses import FileResponse, PlainTextResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent
from pydantic import BaseModel

from eventbus import Context, EventBus, Gap, Limits, Module
from eventbus.fastapi import BusDep, TransactionDep, install
from eventbus.stores.sqlite import SQLiteSession
from shop.database import make_tables
from shop.inventory import inventory
from shop.ledger import Ledger, audit
from shop.messages import (
    EmailSent,
    HandlingFailed,
    OrderCharged,
    OrderPlaced,
    PlaceOrder,
    ShopClosed,
    StockReserved,
    SwitchEmail,
)
from shop.notifications import notifications
from shop.orders import orders
from shop.payments import payments

PAGE = Path(__file__).with_name("page.html")
SHOWN = 3
"""Dead messages that the page lists."""
RECONNECT = 300
"""Milliseconds after which a page whose stream broke asks for another."""
LEASE = float(os.environ.get("SHOP_LEASE", "2"))
"""Seconds after which what a killed process had in hand is another's: few, so that it can be watched. A handler has a
third of it to get its turn to write and be done, for which a machine that is busy with other things may need more."""


async def tell_failures(ctx: Context, call_next: Callable[[Context], Awaitable[Any]]) -> Any:
    """Publish every attempt that fails, for the page."""
    try:
        return await call_next(ctx)
    except Exception as error:
        await bus.publish(HandlingFailed(handler=ctx.handler, attempt=ctx.attempt, reason=str(error)))
        raise


bus = EventBus(
    orders,
    inventory,
    payments,
    notifications,
    Module("pages", messages=[HandlingFailed, ShopClosed]),
    name="shop",
    store=os.environ.get("SHOP_STORE", "sqlite:///shop.db"),
    transports={"push": "memory://"},  # to the pages of one process; rabbitmq.toml has what reaches several
    live="push",
    routes={OrderPlaced: "store"},
    middleware=[tell_failures],
    limits=Limits(lease=LEASE, sweep=0.5),  # together the time until a killed process is taken over
)


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    """Make the tables of the shop, once the bus has opened the file."""
    await make_tables(bus)
    yield


app = FastAPI(title="The eventbus shop")
install(app, bus, consume="SHOP_WORKER" not in os.environ, health="/health/bus")
app.include_router(APIRouter(lifespan=lifespan))


class Dead(BaseModel):
    id: str
    handler: str
    failures: int
    reason: str


class State(BaseModel):
    process: int
    placed: int
    reserved: int
    charged: int
    emailed: int
    failed: int
    email_works: bool
    dead: int
    latest: list[Dead]
    ledger: Ledger


COUNTS = """SELECT (SELECT count(*) FROM orders), (SELECT count(DISTINCT order_id) FROM stock),
    (SELECT count(DISTINCT order_id) FROM payments), (SELECT count(DISTINCT order_id) FROM emails), refused, works
    FROM mail_server"""


@app.get("/", include_in_schema=False)
async def page() -> FileResponse:
    return FileResponse(PAGE)


@app.post("/orders", status_code=201)
async def create_order(body: PlaceOrder, bus: BusDep) -> UUID:
    """Place an order: answered once it is committed, and before anything slow has happened."""
    return await bus.send(body)


@app.put("/email", status_code=204)
async def switch_email(body: SwitchEmail, bus: BusDep) -> None:
    """Break the e-mail server, or repair it."""
    await bus.send(body)


@app.post("/replay")
async def replay(bus: BusDep) -> int:
    """Repair the e-mail server and handle what died of it once more; return how many that are."""
    await bus.send(SwitchEmail(works=True))
    return await bus.dead.replay(handler="notifications.send_email")


@app.post("/kill", status_code=202)
async def kill(tasks: BackgroundTasks) -> int:
    """Kill this process with -9 as soon as the answer, its number, is out: nothing is finished, nothing cleaned up."""
    tasks.add_task(os.kill, os.getpid(), signal.SIGKILL)
    return os.getpid()


@app.get("/state")
async def state(bus: BusDep, tx: TransactionDep[SQLiteSession]) -> State:
    """Return how many orders came how far, the latest dead, and what the kills have cost."""
    dead = await bus.dead.find(limit=10_000)
    counts = await tx.session.fetchone(COUNTS) or (0,) * 6
    placed, reserved, charged, emailed, failed, works = counts
    return State(
        process=os.getpid(),
        placed=placed,
        reserved=reserved,
        charged=charged,
        emailed=emailed,
        failed=failed,
        email_works=bool(works),
        dead=len(dead),
        latest=[
            Dead(id=entry.id, handler=entry.handler, failures=entry.failures, reason=entry.error)
            for entry in dead[: -SHOWN - 1 : -1]
        ],
        ledger=await audit(tx.session),
    )


@app.get("/events", response_class=EventSourceResponse)
async def events(bus: BusDep) -> AsyncIterator[ServerSentEvent]:
    """Stream what happens; a reader that is too slow is told how much it missed."""
    async with bus.stream(OrderPlaced, StockReserved, OrderCharged, EmailSent, HandlingFailed, ShopClosed) as stream:
        yield ServerSentEvent(comment="open", retry=RECONNECT)
        async for event in stream:
            if isinstance(event, ShopClosed):
                return
            data = {"missed": event.missed} if isinstance(event, Gap) else event
            yield ServerSentEvent(event=type(event).__name__, data=data)


@app.get("/wiring", response_class=PlainTextResponse)
async def wiring(bus: BusDep) -> str:
    """Say who handles what, and where it goes."""
    return str(bus.explain())
