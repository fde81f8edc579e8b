"""Charge every order; what concerns one order happens in its order of publishing."""

from eventbus import Module
from shop.database import Tx
from shop.messages import OrderCharged, OrderPlaced
from shop.pace import taking

payments = Module("payments", messages=[OrderCharged], middleware=[taking(0.2)])


@payments.on(OrderPlaced, ordered=True)
async def charge_payment(event: OrderPlaced, tx: Tx) -> OrderCharged:
    """Charge, be done and tell it in one commit: once per order, however often it is tried."""
    await tx.session.execute("INSERT INTO payments VALUES (?, ?)", [str(event.order_id), event.customer])
    return OrderCharged(order_id=event.order_id)
