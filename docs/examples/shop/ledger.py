"""Count, in the database alone, what kills have cost: an auditor's view, entries of the bus included."""

from pydantic import BaseModel

from eventbus.stores.sqlite import SQLiteSession

MISSING = """(SELECT message_id, 'shop/inventory.reserve_stock' AS handler FROM orders
            WHERE order_id NOT IN (SELECT order_id FROM stock)
        UNION ALL SELECT message_id, 'shop/payments.charge_payment' FROM orders
            WHERE order_id NOT IN (SELECT order_id FROM payments)
        UNION ALL SELECT message_id, 'shop/notifications.send_email' FROM orders
            WHERE order_id NOT IN (SELECT order_id FROM emails)) AS missing
    LEFT JOIN eventbus_entry AS here ON here.message_id = missing.message_id AND here.recipient = handler
    LEFT JOIN eventbus_entry AS out ON out.message_id = missing.message_id AND out.recipient = 'shop>events'"""
"""Effects that an order lacks, with the entry of the handler, and the one that was sent to a broker."""

TRAVELLING = "here.seq IS NULL AND out.state = 1"
"""The broker has it, and has not given it back yet."""

WORKING = f"""SELECT (SELECT count(*) FROM eventbus_entry WHERE state = 0)
    + (SELECT count(*) FROM {MISSING} WHERE {TRAVELLING})"""

LOST = f"""SELECT count(DISTINCT missing.message_id) FROM {MISSING}
    WHERE here.state = 1 OR (here.seq IS NULL AND out.seq IS NULL)"""
"""Orders that lack an effect which nobody will bring about any more: its entry neither waits nor is among the dead."""

REDELIVERED = "SELECT count(*) FROM redelivered"

DOUBLED = """SELECT (SELECT count(*) - count(DISTINCT order_id) FROM stock)
    + (SELECT count(*) - count(DISTINCT order_id) FROM payments)"""

REPEATED = "SELECT count(*) - count(DISTINCT order_id) FROM emails"


class Ledger(BaseModel):
    working: bool
    """Whether anything still waits, runs, or is on its way through a broker."""
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
