"""Say what type checkers must infer, and refuse, of the public API; never executed."""

from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Generic, TypeVar, assert_type
from uuid import UUID

from pydantic import BaseModel

from eventbus import (
    Command,
    Context,
    Event,
    EventBus,
    Gap,
    Limits,
    Module,
    Receipt,
    Reject,
    Retry,
    RetryLater,
    Transaction,
    message,
)
from eventbus.middleware import CallNext

T = TypeVar("T")


class Order:
    """Stand for a class mapped by an ORM, of which pydantic knows nothing."""

    id: UUID


class Session:
    """Stand for a database session."""

    def add(self, row: object) -> None:
        """Add a row."""


class PlaceOrder(Command[UUID], name="shop.place_order", version=2, key="customer"):
    customer: str
    quantity: int = 1


class ListOrders(Command[list[UUID]]):
    limit: int


class LoadOrder(Command[Order]):
    id: UUID


class FindLater(Command["Later | None"]):
    id: UUID


class Later:
    """Be defined after the command that names it."""


class Forget(Command):
    id: UUID


class Purge(Command[None]):
    days: int


class Get(Command[T], Generic[T]):
    id: UUID


class GetName(Get[str]):
    pass


class OrderPlaced(Event, name="shop.order_placed", version=1, key="order_id"):
    order_id: UUID


class OrderPaid(Event):
    order_id: UUID


class OrderShipped(Event):
    order_id: UUID


@message(name="billing.invoiced", key="invoice_id")
@dataclass(frozen=True)
class Invoiced:
    invoice_id: str


@message
class Foreign(BaseModel):
    size: int


assert_type(Invoiced(invoice_id="7"), Invoiced)
assert_type(Foreign(size=7), Foreign)
Invoiced(number="7")  # E: both
PlaceOrder(customer="a", quantity="many", colour="red")  # E: both

orders = Module("orders", messages=[OrderPlaced, Invoiced], imports=["shop.handlers"])
bus = EventBus(orders, name="shop", routes={"shop.*": "store", OrderShipped: ["events"]}, limits=Limits(lease=10))
names: dict[str, str] = {"shop.*": "store"}
EventBus(orders, routes=names)


# What send() gives is the command's result, and only once it is awaited.


async def sending(id: UUID) -> None:
    """Infer results."""
    assert_type(await bus.send(PlaceOrder(customer="a")), UUID)
    assert_type(await bus.send(ListOrders(limit=3)), list[UUID])
    assert_type(await bus.send(LoadOrder(id=id)), Order)
    assert_type(await bus.send(FindLater(id=id)), Later | None)
    await bus.send(Forget(id=id))
    await bus.send(Purge(days=1))
    nothing: Coroutine[Any, Any, None] = bus.send(Forget(id=id))
    await nothing
    assert_type(await bus.send(GetName(id=id)), str)
    assert_type(await bus.send(Get[int](id=id)), int)
    later: Coroutine[Any, Any, UUID] = bus.send(PlaceOrder(customer="a"))
    assert_type(await later, UUID)


async def sending_wrongly() -> None:
    """Refuse what cannot be sent, and what nobody awaits."""
    bus.send(PlaceOrder(customer="a"))  # E: both
    number: int = await bus.send(PlaceOrder(customer="a"))  # E: both
    forgotten: UUID = bus.send(PlaceOrder(customer="a"))  # E: both
    await bus.send(OrderPlaced(order_id=UUID(int=0)))  # E: both
    await bus.send(Invoiced(invoice_id="7"))  # E: both
    await bus.send(PlaceOrder)  # E: both


# publish() and enqueue() give receipts.


async def publishing(id: UUID, anything: object) -> None:
    """Infer receipts."""
    assert_type(await bus.publish(OrderPlaced(order_id=id)), Receipt)
    assert_type(await bus.publish(Invoiced(invoice_id="7"), key="7", delay=3.5, headers={"a": "b"}), Receipt)
    assert_type(await bus.publish(anything, atomic=False), Receipt)
    assert_type(await bus.publish_many([OrderPlaced(order_id=id), Invoiced(invoice_id="7")]), list[Receipt])
    receipt = await bus.enqueue(PlaceOrder(customer="a"), delay=60)
    assert_type(receipt, Receipt)
    assert_type(receipt.id, str)


async def publishing_wrongly(id: UUID) -> None:
    """Refuse what cannot be published, and what nobody awaits."""
    await bus.publish(PlaceOrder(customer="a"))  # E: both
    await bus.publish(Forget(id=id), key="7")  # E: both
    bus.publish(OrderPlaced(order_id=id))  # E: both
    await bus.publish(OrderPlaced(order_id=id), OrderPaid(order_id=id))  # E: both
    await bus.publish(OrderPlaced(order_id=id), delay="soon")  # E: both
    await bus.enqueue(OrderPlaced(order_id=id))  # E: both
    number: UUID = await bus.enqueue(PlaceOrder(customer="a"))  # E: both


# A handler takes its command first and returns its result; it stays callable with its own parameters.


@orders.handles(PlaceOrder, retry=Retry(attempts=3), timeout=10.0, concurrency=4, ordered=True, on_dead="block")
async def place_order(cmd: PlaceOrder, tx: Transaction[Session], bus: EventBus, ctx: Context | None = None) -> UUID:
    """Take what the bus injects."""
    tx.session.add(cmd)
    await bus.publish(OrderPlaced(order_id=UUID(int=0)))
    return UUID(int=0)


@orders.handles(ListOrders)
def list_orders(cmd: ListOrders) -> list[UUID]:
    """Be a plain function."""
    return []


@orders.handles(LoadOrder)
async def load_order(cmd: LoadOrder, *, cache: Annotated[dict[UUID, Order], "a marker"]) -> Order:
    """Return what an ORM maps."""
    return cache[cmd.id]


@orders.handles(FindLater)
async def find_later(cmd: FindLater) -> Later | None:
    """Return what was named by a forward reference."""
    return None


@orders.handles(FindLater)
async def find_surely(cmd: FindLater) -> Later:
    """Return less than may be returned."""
    return Later()


@orders.handles(Forget)
async def forget(cmd: Forget) -> None:
    """Return nothing."""


@orders.handles(Purge, name="clear", aliases=["purge"])
def purge(cmd: Purge) -> None:
    """Return nothing."""


@orders.handles(GetName)
async def get_name(cmd: GetName) -> str:
    """Return what the base class says."""
    return ""


@orders.handles(PlaceOrder)
async def place_any(cmd: Command[UUID]) -> UUID:
    """Take a base class of the command."""
    return UUID(int=0)


class Shop:
    async def place(self, cmd: PlaceOrder) -> UUID:
        """Be a bound method."""
        return UUID(int=0)

    async def __call__(self, cmd: PlaceOrder) -> UUID:
        """Be an instance that can be called."""
        return UUID(int=0)


async def place_in(shop: str, cmd: PlaceOrder) -> UUID:
    """Be completed by a partial."""
    return UUID(int=0)


orders.handles(PlaceOrder)(Shop().place)
orders.handles(PlaceOrder, name="shop")(Shop())
orders.handles(PlaceOrder, name="main_shop")(partial(place_in, "main"))


async def calling(tx: Transaction[Session]) -> None:
    """Keep a handler's own signature."""
    assert_type(await place_order(PlaceOrder(customer="a"), tx, bus), UUID)
    assert_type(await place_order(PlaceOrder(customer="a"), tx=tx, bus=bus, ctx=None), UUID)
    assert_type(list_orders(ListOrders(limit=3)), list[UUID])
    assert_type(await load_order(LoadOrder(id=UUID(int=0)), cache={}), Order)
    await place_order(PlaceOrder(customer="a"))  # E: both
    await place_order(Forget(id=UUID(int=0)), tx, bus)  # E: both
    assert_type(tx.session, Session)


@orders.handles(PlaceOrder)  # E: both
async def place_nothing() -> UUID:
    """Take no message."""
    return UUID(int=0)


@orders.handles(PlaceOrder)  # E: both
async def place_other(cmd: Forget) -> UUID:
    """Take another message."""
    return UUID(int=0)


@orders.handles(PlaceOrder)  # E: both
async def place_for_nothing(cmd: PlaceOrder) -> int:
    """Return another result."""
    return 0


@orders.handles(PlaceOrder)  # E: both
def place_for_nothing_at_once(cmd: PlaceOrder) -> str:
    """Return another result."""
    return ""


@orders.handles(Forget)  # E: both
async def forget_loudly(cmd: Forget) -> UUID:
    """Return something where nothing is promised."""
    return UUID(int=0)


@orders.handles(OrderPlaced)  # E: both
async def handle_event(event: OrderPlaced) -> None:
    """Handle an event as a command."""


orders.handles(PlaceOrder, on_dead="wait")  # E: both
orders.handles(PlaceOrder, inline=True)  # E: both
orders.handles(PlaceOrder, name="x", retries=3)  # E: both


# A listener takes one of its events first.


@orders.on(OrderPlaced, inline=True)
async def audit(event: OrderPlaced, ctx: Context) -> None:
    """Take one event."""
    assert_type(ctx.attempt, int)
    if ctx.attempt > 3:
        raise Reject("too often")
    raise RetryLater(5)


@orders.on(OrderPlaced, OrderPaid)
async def two(event: OrderPlaced | OrderPaid, ctx: Context) -> None:
    """Take two events."""


@orders.on(OrderPlaced, OrderPaid, Invoiced, timeout=5)
def three(event: OrderPlaced | OrderPaid | Invoiced) -> None:
    """Take three events, one of them a dataclass, in a plain function."""


@orders.on(OrderPlaced, OrderPaid, OrderShipped, Invoiced)
async def four(event: OrderPlaced | OrderPaid | OrderShipped | Invoiced) -> None:
    """Take four events."""


@orders.on(Event)
async def everything(event: Event) -> None:
    """Take a base class."""


@orders.on(OrderPlaced)
async def wider(event: Event) -> None:
    """Take more than it is registered for."""


@orders.on(OrderPaid)
async def ship(event: OrderPaid) -> list[OrderShipped | Invoiced]:
    """Return what is published."""
    return [OrderShipped(order_id=event.order_id)]


async def listening(id: UUID, ctx: Context) -> None:
    """Keep a listener's own signature."""
    assert_type(await ship(OrderPaid(order_id=id)), list[OrderShipped | Invoiced])
    await two(OrderPaid(order_id=id), ctx=ctx)
    three(Invoiced(invoice_id="7"))
    await audit(OrderPlaced(order_id=id))  # E: both
    await two(OrderShipped(order_id=id), ctx)  # E: both


@orders.on(OrderPlaced)  # E: both
async def wrong_event(event: OrderPaid) -> None:
    """Take another event."""


@orders.on(OrderPlaced, OrderPaid)  # E: both
async def half(event: OrderPlaced) -> None:
    """Take one of two events."""


@orders.on(OrderPlaced, OrderPaid, Invoiced)  # E: both
async def two_of_three(event: OrderPlaced | OrderPaid) -> None:
    """Take two of three events."""


orders.on()  # E: both
orders.on(OrderPlaced(order_id=UUID(int=0)))  # E: both
orders.on(OrderPlaced, ordered="yes")  # E: both


# A stream yields its events, and gaps where the slow reader is told of them.


async def streaming() -> None:
    """Infer what a stream yields."""
    async with bus.stream(OrderPlaced) as events:
        async for event in events:
            assert_type(event, OrderPlaced | Gap)
            if isinstance(event, Gap):
                assert_type(event.missed, int)
            else:
                assert_type(event.order_id, UUID)
    async with bus.stream(OrderPlaced, buffer=10, slow="drop") as dropping:
        async for event in dropping:
            assert_type(event, OrderPlaced | Gap)
    async with bus.stream(OrderPlaced, slow="disconnect") as ending:
        async for placed in ending:
            assert_type(placed, OrderPlaced)
    bus.stream(OrderPlaced, slow="wait")  # E: both
    bus.stream(OrderPlaced, buffer="ten")  # E: both


# Whoever opens a transaction commits it.


async def transacting(session: object) -> None:
    """Infer the lifetime's objects."""
    async with bus.running(consume=False) as running, bus.transaction(session) as tx:
        assert_type(running, EventBus)
        inner: Transaction[Session] = tx
        assert_type(inner.session, Session)
        inner.session = Session()  # E: both
    with bus.transaction():  # E: both
        pass


async def middleware(ctx: Context, call_next: CallNext) -> object:
    """Go around handlers."""
    return await call_next(ctx)


async def no_middleware(ctx: Context) -> object:
    """Know of nothing to go on with."""


EventBus(orders, middleware=[middleware])
Module("billing", middleware=[middleware])
EventBus(orders, middleware=[no_middleware])  # E: both
EventBus(orders, "billing")  # E: both
Module("billing", messages=[Order()])  # E: both


@asynccontextmanager
async def lifetime(bus: EventBus) -> AsyncGenerator[Sequence[str]]:
    """Use the bus inside another lifetime."""
    async with bus.running():
        yield [str(bus.explain(OrderPlaced)), str(bus.explain("shop.order_placed"))]
