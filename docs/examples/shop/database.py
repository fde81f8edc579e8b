"""The shop's own tables, in the file in which the bus keeps its entries."""

from eventbus import EventBus, Transaction
from eventbus.stores.sqlite import SQLiteSession

Tx = Transaction[SQLiteSession]

TABLES = (
    """CREATE TABLE IF NOT EXISTS orders (
        order_id TEXT PRIMARY KEY, message_id TEXT NOT NULL, customer TEXT NOT NULL, sku TEXT NOT NULL,
        quantity INTEGER NOT NULL)""",
    # nothing is unique in these three: what happened twice would be there twice, and be counted
    "CREATE TABLE IF NOT EXISTS stock (order_id TEXT NOT NULL, sku TEXT NOT NULL, quantity INTEGER NOT NULL)",
    "CREATE TABLE IF NOT EXISTS payments (order_id TEXT NOT NULL, customer TEXT NOT NULL)",
    "CREATE TABLE IF NOT EXISTS emails (order_id TEXT NOT NULL, customer TEXT NOT NULL)",
    "CREATE TABLE IF NOT EXISTS mail_server (works INTEGER NOT NULL, refused INTEGER NOT NULL)",
    "INSERT INTO mail_server SELECT 1, 0 WHERE NOT EXISTS (SELECT 1 FROM mail_server)",
    "CREATE TABLE IF NOT EXISTS redelivered (message_id TEXT NOT NULL, handler TEXT NOT NULL)",
    """CREATE TRIGGER IF NOT EXISTS claimed_again AFTER UPDATE OF claims ON eventbus_entry
        WHEN OLD.owner IS NOT NULL AND NEW.owner IS NOT NULL AND NEW.claims > OLD.claims
        BEGIN INSERT INTO redelivered VALUES (NEW.message_id, NEW.recipient); END""",
)
"""What is missing is made; the last of them counts claims whose claim before ended without a word."""


async def make_tables(bus: EventBus) -> None:
    """Make what is not there yet."""
    async with bus.transaction() as tx:
        for statement in TABLES:
            await tx.session.execute(statement)
