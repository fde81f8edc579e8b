"""Charge every order; what concerns one order happens in its order of publishing."""

from functools import cache
from typing import Annotated
from uuid import UUID

import anyio
from fastapi import Depends

from eventbus import Module
from shop.messages import OrderCharged, OrderPlaced

payments = Module("payments", messages=[OrderCharged])


class Till:
    """Keep which order was charged, as a payment provider would: charging twice changes nothing."""

    def __init__(self) -> None:
        self._charged: dict[UUID, str] = {}

    async def charge(self, order_id: UUID, customer: str) -> None:
        await anyio.sleep(0.2)
        self._charged[order_id] = customer

    async def count(self) -> int:
        return len(self._charged)


@cache
def get_till() -> Till:
    return Till()


@payments.on(OrderPlaced, ordered=True)
async def charge_payment(event: OrderPlaced, till: Annotated[Till, Depends(get_till)]) -> OrderCharged:
    await till.charge(event.order_id, event.customer)
    return OrderCharged(order_id=event.order_id)
