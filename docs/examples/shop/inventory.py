"""Reserve stock for every order."""

from eventbus import Module
from shop.database import Tx
from shop.messages import OrderPlaced, StockReserved
from shop.pace import taking

inventory = Module("inventory", messages=[StockReserved], middleware=[taking(0.1)])


@inventory.on(OrderPlaced)
async def reserve_stock(event: OrderPlaced, tx: Tx) -> StockReserved:
    """Reserve, be done and tell it in one commit: once per order, however often it is tried."""
    await tx.session.execute("INSERT INTO stock VALUES (?, ?, ?)", [str(event.order_id), event.sku, event.quantity])
    return StockReserved(order_id=event.order_id)
