"""The shop: four modules on one bus, a small HTTP interface, and a page that shows what happens."""

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any
from uuid import UUID

from fastapi import Depends, FastAPI
from fastapi.responses import FileResponse, PlainTextResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent
from pydantic import BaseModel

from eventbus import Context, EventBus, Gap
from eventbus.fastapi import BusDep, install
from shop.inventory import Stock, get_stock, inventory
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
from shop.notifications import Mail, notifications
from shop.orders import Orders, get_orders, orders
from shop.payments import Till, get_till, payments

PAGE = Path(__file__).with_name("page.html")
SHOWN = 3
"""Dead messages that the page lists."""


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
    name="shop",
    routes={OrderPlaced: "memory"},
    middleware=[tell_failures],
)
app = FastAPI(title="The eventbus shop")
install(app, bus, health="/health/bus")


class Dead(BaseModel):
    id: str
    handler: str
    failures: int
    reason: str


class State(BaseModel):
    placed: int
    reserved: int
    charged: int
    emailed: int
    failed: int
    email_works: bool
    dead: int
    latest: list[Dead]


@app.get("/", include_in_schema=False)
async def page() -> FileResponse:
    return FileResponse(PAGE)


@app.post("/orders", status_code=201)
async def create_order(body: PlaceOrder, bus: BusDep) -> UUID:
    """Place an order: answered before anything slow has happened."""
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


@app.get("/state")
async def state(
    bus: BusDep,
    orders: Annotated[Orders, Depends(get_orders)],
    stock: Annotated[Stock, Depends(get_stock)],
    till: Annotated[Till, Depends(get_till)],
    mail: Mail,
) -> State:
    """Return how many orders came how far, and the latest dead."""
    dead = await bus.dead.find(limit=10_000)
    return State(
        placed=await orders.count(),
        reserved=await stock.count(),
        charged=await till.count(),
        emailed=await mail.count(),
        failed=mail.refused,
        email_works=mail.works,
        dead=len(dead),
        latest=[
            Dead(id=entry.id, handler=entry.handler, failures=entry.failures, reason=entry.error)
            for entry in dead[: -SHOWN - 1 : -1]
        ],
    )


@app.get("/events", response_class=EventSourceResponse)
async def events(bus: BusDep) -> AsyncIterator[ServerSentEvent]:
    """Stream what happens; a reader that is too slow is told how much it missed."""
    async with bus.stream(OrderPlaced, StockReserved, OrderCharged, EmailSent, HandlingFailed, ShopClosed) as stream:
        async for event in stream:
            if isinstance(event, ShopClosed):
                return
            data = {"missed": event.missed} if isinstance(event, Gap) else event
            yield ServerSentEvent(event=type(event).__name__, data=data)


@app.get("/wiring", response_class=PlainTextResponse)
async def wiring(bus: BusDep) -> str:
    """Say who handles what, and where it goes."""
    return str(bus.explain())
