"""Take orders, and tell the others."""

from functools import cache
from typing import Annotated
from uuid import UUID, uuid4

from fastapi import Depends

from eventbus import EventBus, Module
from shop.messages import OrderPlaced, PlaceOrder

orders = Module("orders")


class Orders:
    """Keep the orders, as a table would."""

    def __init__(self) -> None:
        self._placed: dict[UUID, PlaceOrder] = {}

    async def add(self, order_id: UUID, order: PlaceOrder) -> None:
        self._placed[order_id] = order

    async def count(self) -> int:
        return len(self._placed)


@cache
def get_orders() -> Orders:
    return Orders()


@orders.handles(PlaceOrder)
async def place_order(cmd: PlaceOrder, table: Annotated[Orders, Depends(get_orders)], bus: EventBus) -> UUID:
    """Write the order down and return at once: everything slow waits for the event."""
    order_id = uuid4()
    await table.add(order_id, cmd)
    event = OrderPlaced(order_id=order_id, customer=cmd.customer, sku=cmd.sku, quantity=cmd.quantity)
    await bus.publish(event, atomic=False)  # no database transaction to be part of, yet
    return order_id
