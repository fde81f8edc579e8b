"""What the modules of the shop say to each other."""

from uuid import UUID, uuid4

from pydantic import Field

from eventbus import Command, Event


class PlaceOrder(Command[UUID], name="shop.place_order"):
    """Ask for an order; the answer is its id. Who gets none may ask again with the same id."""

    order_id: UUID = Field(default_factory=uuid4)
    customer: str = Field(min_length=3)
    sku: str = Field(min_length=1)
    quantity: int = Field(1, ge=1, le=10)


class SwitchEmail(Command, name="shop.switch_email"):
    """Break the e-mail server, or repair it."""

    works: bool


class OrderPlaced(Event, name="shop.order_placed", key="order_id"):
    """Tell everybody who has work to do on a new order."""

    order_id: UUID
    customer: str
    sku: str
    quantity: int


class StockReserved(Event, name="shop.stock_reserved", key="order_id"):
    order_id: UUID


class OrderCharged(Event, name="shop.order_charged", key="order_id"):
    order_id: UUID


class EmailSent(Event, name="shop.email_sent", key="order_id"):
    order_id: UUID


class HandlingFailed(Event, name="shop.handling_failed"):
    """Tell the page that one attempt of one handler failed."""

    handler: str
    attempt: int
    reason: str


class ShopClosed(Event, name="shop.closed"):
    """Tell every open page that the server ends."""
