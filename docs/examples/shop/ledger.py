"""Count, in the database alone, what kills have cost: an auditor's view, entries of the bus included."""

from pydantic import BaseModel

from eventbus.stores.sqlite import SQLiteSession

WORKING = "SELECT count(*) FROM eventbus_entry WHERE state = 0"

LOST = """WITH missing AS (
        SELECT message_id, 'shop/inventory.reserve_stock' AS handler FROM orders
            WHERE order_id NOT IN (SELECT order_id FROM stock)
        UNION ALL SELECT message_id, 'shop/payments.charge_payment' FROM orders
            WHERE order_id NOT IN (SELECT order_id FROM payments)
        UNION ALL SELECT message_id, 'shop/notifications.send_email' FROM orders
            WHERE order_id NOT IN (SELECT order_id FROM emails))
    SELECT count(DISTINCT message_id) FROM missing WHERE NOT EXISTS (
        SELECT 1 FROM eventbus_entry WHERE eventbus_entry.message_id = missing.message_id
            AND recipient = handler AND state IN (0, 2))"""
"""Orders that lack an effect which nobody will bring about any more: its entry neither waits nor is among the dead."""

REDELIVERED = "SELECT count(*) FROM redelivered"

DOUBLED = """SELECT (SELECT count(*) - count(DISTINCT order_id) FROM stock)
    + (SELECT count(*) - count(DISTINCT order_id) FROM payments)"""

REPEATED = "SELECT count(*) - count(DISTINCT order_id) FROM emails"


class Ledger(BaseModel):
    working: bool
    """Whether anything still waits or runs."""
    lost: int
    redelivered: int
    """Entries that were claimed once more because whoever had claimed them was gone."""
    doubled: int
    """Effects that an order has twice."""
    repeated: int
    """E-mails that went out once more."""


async def audit(session: SQLiteSession) -> Ledger:
    """Return the ledger of this moment."""
    counts = f"SELECT ({WORKING}), ({LOST}), ({REDELIVERED}), ({DOUBLED}), ({REPEATED})"
    working, lost, redelivered, doubled, repeated = await session.fetchone(counts) or (0,) * 5
    return Ledger(working=working > 0, lost=lost, redelivered=redelivered, doubled=doubled, repeated=repeated)
