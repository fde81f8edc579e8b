"""Keep house in the user's database: prune, and mend what a clock has done; never wait for a row that is locked."""

from sqlalchemy import Connection

from eventbus.clock import farthest
from eventbus.stores._sqlalchemy_rows import Rows

__all__ = ("hasten", "look", "sweep")

OLD = "SELECT seq FROM eventbus_entry WHERE state IN (1, 3) AND due_at < {now} - :age ORDER BY due_at LIMIT :limit"
PRUNE = "DELETE FROM eventbus_entry WHERE seq IN :seqs AND state IN (1, 3)"
FAR = "state = 0 AND owner IS NOT NULL AND due_at > {now} + :ahead"
NEAR = "state = 0 AND owner IS NULL AND due_at > {now} AND due_at <= {now} + :ahead"
WAITING = ("lane IS NULL", "lane IS NOT NULL")
"""Two statements, because no index has both."""
FOUND = "SELECT seq FROM eventbus_entry WHERE {} LIMIT :limit"
DUE = "UPDATE eventbus_entry SET due_at = {now} WHERE seq IN :seqs AND "
SEEN = "SELECT {now}, COALESCE(MAX(last_seen), 0) FROM eventbus_subscription"
UNSEEN = "UPDATE eventbus_subscription SET last_seen = {now} WHERE last_seen > {now}"


def sweep(rows: Rows, connection: Connection, *, retention: float, lease: float, batch: int) -> int:
    """Prune what is over, and free leases from a clock that jumped; return how many rows."""
    old = rows.some(connection, OLD, batch, age=round(retention * 1000))
    pruned = rows.run(connection, PRUNE, seqs=sorted(old)).rowcount if old else 0
    return pruned + _make_due(rows, connection, FAR, farthest(lease), batch)


def look(rows: Rows, connection: Connection) -> tuple[int, int]:
    """Return the time, and when somebody was announced last."""
    now, seen = rows.run(connection, SEEN).one()
    return int(now), int(seen)


def hasten(rows: Rows, connection: Connection, *, back: int, lease: int, batch: int) -> int:
    """Make due what would freeze, since the clock was set ``back``: milliseconds; return how many rows."""
    found = _make_due(rows, connection, FAR, 2 * lease, batch)
    for lane in WAITING:
        found += _make_due(rows, connection, f"{lane} AND {NEAR}", back + lease, batch - found)
    if found < batch:
        rows.run(connection, UNSEEN)
    return found


def _make_due(rows: Rows, connection: Connection, those: str, ahead: int, limit: int) -> int:
    found = rows.some(connection, FOUND.replace("{}", those), limit, ahead=ahead)
    return rows.run(connection, DUE + those, seqs=sorted(found), ahead=ahead).rowcount if found else 0
