"""Reserve stock for every order."""

from functools import cache
from typing import Annotated
from uuid import UUID

import anyio
from fastapi import Depends

from eventbus import Module
from shop.messages import OrderPlaced, StockReserved

inventory = Module("inventory", messages=[StockReserved])


class Stock:
    """Keep what is reserved for which order, as a table would: reserving twice changes nothing."""

    def __init__(self) -> None:
        self._reserved: dict[UUID, tuple[str, int]] = {}

    async def reserve(self, order_id: UUID, sku: str, quantity: int) -> None:
        await anyio.sleep(0.1)
        self._reserved[order_id] = sku, quantity

    async def count(self) -> int:
        return len(self._reserved)


@cache
def get_stock() -> Stock:
    return Stock()


@inventory.on(OrderPlaced)
async def reserve_stock(event: OrderPlaced, stock: Annotated[Stock, Depends(get_stock)]) -> StockReserved:
    await stock.reserve(event.order_id, event.sku, event.quantity)
    return StockReserved(order_id=event.order_id)
