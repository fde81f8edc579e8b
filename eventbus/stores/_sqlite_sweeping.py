"""Keep house in the SQLite file, in a transaction that the writer began: prune, and mend what a clock has done."""

from eventbus.clock import farthest
from eventbus.stores._sqlite_rows import Rows

__all__ = ("hasten", "look", "sweep")

PRUNE = """DELETE FROM eventbus_entry WHERE seq IN (SELECT seq FROM eventbus_entry
    WHERE state IN (1, 3) AND due_at < ? ORDER BY due_at LIMIT ?)"""
CLAMP = """UPDATE eventbus_entry SET due_at = ? WHERE seq IN (SELECT seq FROM eventbus_entry
    WHERE state = 0 AND owner IS NOT NULL AND due_at > ? LIMIT ?)"""
HASTEN = """UPDATE eventbus_entry SET due_at = ? WHERE seq IN (SELECT seq FROM eventbus_entry
    WHERE lane {} AND state = 0 AND owner IS NULL AND due_at > ? AND due_at <= ? LIMIT ?)"""
WAITING = (HASTEN.format("IS NULL"), HASTEN.format("IS NOT NULL"))
"""Two statements, because no index has both."""


def sweep(rows: Rows, now: int, *, retention: float, lease: float, batch: int) -> int:
    """Prune what is over, and free leases from a clock that jumped; return how many rows."""
    pruned = rows.connection.execute(PRUNE, (now - round(retention * 1000), batch)).rowcount
    return pruned + rows.connection.execute(CLAMP, (now, now + farthest(lease), batch)).rowcount


def look(rows: Rows, now: int) -> tuple[int, int]:
    """Return the time, and when somebody was announced last."""
    seen: int = rows.connection.execute("SELECT coalesce(max(last_seen), 0) FROM eventbus_subscription").fetchone()[0]
    return now, seen


def hasten(rows: Rows, now: int, *, back: int, lease: int, batch: int) -> int:
    """Make due what would freeze, since the clock was set ``back``: milliseconds; return how many rows."""
    found = rows.connection.execute(CLAMP, (now, now + 2 * lease, batch)).rowcount
    for sql in WAITING:
        found += rows.connection.execute(sql, (now, now, now + back + lease, batch - found)).rowcount
    if found < batch:
        rows.connection.execute("UPDATE eventbus_subscription SET last_seen = ? WHERE last_seen > ?", (now, now))
        rows.undone()
    return found
