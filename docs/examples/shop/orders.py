"""Take orders, and tell the others."""

from uuid import UUID

from eventbus import EventBus, Module
from shop.database import Tx
from shop.messages import OrderPlaced, PlaceOrder

orders = Module("orders")


@orders.handles(PlaceOrder)
async def place_order(cmd: PlaceOrder, tx: Tx, bus: EventBus) -> UUID:
    """Write the order down and return: everything slow waits for the event, which is committed with the order."""
    if await tx.session.fetchone("SELECT 1 FROM orders WHERE order_id = ?", [str(cmd.order_id)]):
        return cmd.order_id  # placed before, and the answer got lost
    receipt = await bus.publish(OrderPlaced(**cmd.model_dump()))
    await tx.session.execute(
        "INSERT INTO orders VALUES (?, ?, ?, ?, ?)",
        [str(cmd.order_id), receipt.id, cmd.customer, cmd.sku, cmd.quantity],
    )
    return cmd.order_id
