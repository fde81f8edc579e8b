"""Say the verbs of the store in SQLite, and have an engine begin its transactions for real."""

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

from sqlalchemy import Connection, Engine, event

from eventbus.store import DAY, Claimed, Interest, NewEntry, Recipient, Settlement
from eventbus.stores._sqlalchemy_lanes import Seen, go_round
from eventbus.stores._sqlalchemy_rows import CLAIMED, HEADS, SCAN, SETTLED, Rows, entries, milliseconds, words

__all__ = ("SQLiteRows", "really_begin")

ROWS = 64
"""Messages in one statement."""

MESSAGE = "(:n{n}, :id{n}, :type{n}, :lane{n}, :wait{n}, :body{n}, :subscribers{n})"
NAMED = "(:of{n}, :name{n}, :ordered{n})"
INSERT = """WITH m(n, id, type, lane, wait, body, subscribers) AS (VALUES MESSAGES), RECIPIENTS
new(n, id, name, type, lane, wait, body, late) AS (SELECT m.n, m.id, s.name, m.type,
        CASE WHEN s.ordered = 1 THEN m.lane END, m.wait, m.body,
        s.last_seen < {now} - :day AND s.name IN (SELECT value FROM json_each(:full))
    FROM m JOIN eventbus_subscription s ON s.type = m.type WHERE m.subscribers = 1 NAMED)
INSERT INTO eventbus_entry (message_id, recipient, type, lane, state, due_at, error, body)
    SELECT id, name, type, CASE WHEN NOT late THEN lane END, CASE WHEN late THEN 2 ELSE 0 END,
        {now} + CASE WHEN late THEN 0 ELSE wait END, CASE WHEN late THEN 'silent handler' END, body
    FROM new WHERE true ORDER BY n ON CONFLICT DO NOTHING RETURNING recipient, state"""
TO_NAMED = """UNION ALL SELECT m.n, m.id, r.name, m.type, CASE WHEN r.ordered = 1 THEN m.lane END, m.wait, m.body, 0
    FROM m JOIN r ON r.n = m.n"""

# no join with the row itself: with statistics the planner builds a filter over the whole table for it
HEADED = """WITH RECURSIVE h(lane, i) AS (
    SELECT (SELECT lane FROM eventbus_entry WHERE recipient = :name AND lane > :lane AND lane <= :last
        ORDER BY lane LIMIT 1), 1
    UNION ALL SELECT (SELECT e.lane FROM eventbus_entry e WHERE e.recipient = :name AND e.lane > h.lane
        AND e.lane <= :last ORDER BY e.lane LIMIT 1), i + 1 FROM h WHERE h.lane IS NOT NULL AND i < :scan)
    SELECT lane,
        (SELECT f.seq FROM eventbus_entry f WHERE f.recipient = :name AND f.lane = h.lane ORDER BY f.seq LIMIT 1),
        (SELECT CASE f.state WHEN 0 THEN f.due_at - {now} END FROM eventbus_entry f
            WHERE f.recipient = :name AND f.lane = h.lane ORDER BY f.seq LIMIT 1)
    FROM h WHERE lane IS NOT NULL"""
HEADED_TO_THE_END = HEADED.replace(" AND lane <= :last", "").replace("AND e.lane <= :last", "")
LANED = """SELECT seq FROM eventbus_entry
    WHERE state = 0 AND recipient = :name AND lane IS NOT NULL AND due_at <= {now} LIMIT :limit"""
LOOSE = """SELECT seq FROM eventbus_entry
    WHERE state = 0 AND recipient = :name AND lane IS NULL AND due_at <= {now} ORDER BY due_at LIMIT :limit"""
LEASE = f"""UPDATE eventbus_entry SET due_at = {{now}} + :lease, claims = claims + 1, owner = :owner
    WHERE seq IN :seqs RETURNING {CLAIMED}"""
TOLD = """FROM (SELECT json_extract(value, '$[0]') AS seq, json_extract(value, '$[1]') AS claims,
        json_extract(value, '$[2]') AS outcome, json_extract(value, '$[3]') AS wait,
        json_extract(value, '$[4]') AS reason, json_extract(value, '$[5]') AS blocks FROM json_each(:told)) v
    WHERE e.seq = v.seq AND e.claims = v.claims AND +e.state = 0 AND e.owner IS NOT NULL RETURNING seq"""
SETTLE = f"UPDATE eventbus_entry AS e SET {SETTLED} {TOLD}"
EXTEND = f"UPDATE eventbus_entry AS e SET due_at = {{now}} + v.wait {TOLD}"
ANNOUNCE = """INSERT INTO eventbus_subscription (name, type, ordered, last_seen)
    SELECT json_extract(value, '$[0]'), json_extract(value, '$[1]'), json_extract(value, '$[2]'), {now}
    FROM json_each(:told) WHERE true
    ON CONFLICT (name, type) DO UPDATE SET ordered = excluded.ordered, last_seen = max(last_seen, excluded.last_seen)"""


class SQLiteRows(Rows):
    """Keep entries in SQLite."""

    clock_sql: ClassVar[str] = "CAST((julianday('now') - 2440587.5) * 86400000 AS INTEGER)"
    skip_sql: ClassVar[str] = ""
    lock_sql: ClassVar[str] = ""
    settle_sql: ClassVar[str] = SETTLE
    extend_sql: ClassVar[str] = EXTEND

    def add(self, connection: Connection, entries: Sequence[NewEntry]) -> frozenset[str]:
        """Write entries; return the recipients that got something to do."""
        written: set[str] = set()
        if not entries:
            return frozenset()
        full = json.dumps(self.full(connection))
        for start in range(0, len(entries), ROWS):
            sql, values = _insertion(entries[start : start + ROWS])
            for name, state in self.run(connection, sql, full=full, day=DAY, **values):
                if state == 0:
                    self.count(name, 1)
                    written.add(name)
        return frozenset(written)

    def claim(
        self, connection: Connection, recipient: Recipient, *, owner: str, limit: int, lease: float, cursor: str = ""
    ) -> Claimed:
        """Lease due entries."""
        if limit <= 0:
            return Claimed((), cursor)
        name = recipient.name

        def look(lane: str, last: str | None, free: int) -> Seen:
            scan = max(SCAN, free)
            heads = self._heads(connection, name, lane, last, scan)
            taken: list[int] = []
            for reached, seq, wait in heads:
                lane = reached
                if wait is not None and wait <= 0:
                    taken.append(seq)
                    if len(taken) == free:
                        return Seen(taken, reached, reached, ended=False)
            return Seen(taken, None, lane, len(heads) < scan)

        if recipient.ordered:
            chosen, cursor = go_round(look, limit, cursor)
        else:
            chosen, cursor = self.seqs(connection, LANED, name=name, limit=limit), ""
        if len(chosen) < limit:
            chosen += self.seqs(connection, LOOSE, name=name, limit=limit - len(chosen))
        if not chosen:
            return Claimed((), cursor)
        found = self.run(connection, LEASE, seqs=chosen, lease=milliseconds(lease), owner=owner)
        return Claimed(entries(found), cursor)

    def _heads(self, connection: Connection, name: str, lane: str, last: str | None, scan: int) -> Sequence[Any]:
        """Return the next lanes, each with its first row and in how many milliseconds that is due."""
        sql = HEADED_TO_THE_END if last is None else HEADED
        return self.run(connection, sql, name=name, lane=lane, last=last, scan=scan).all()

    def tell(self, connection: Connection, template: str, settlements: Sequence[Settlement]) -> Iterable[int]:
        """Write what becomes of claims by a statement; return the seqs of those that hold."""
        told = [(one.seq, one.claims, *words(one)) for one in settlements]
        return self.seqs(connection, template, told=json.dumps(told))

    def write_interests(self, connection: Connection, interests: Sequence[Interest]) -> None:
        """Write interests with the time."""
        told = [(one.name, one.type, int(one.ordered)) for one in interests]
        self.run(connection, ANNOUNCE, told=json.dumps(told))

    def first_heads(self, connection: Connection, name: str) -> int | None:
        """Return in how many milliseconds the first of a recipient's lane heads is due."""
        first: int | None = None
        lane = ""
        for _ in range(0, HEADS, SCAN):
            heads = self._heads(connection, name, lane, None, SCAN)
            waits = [wait for _, _, wait in heads if wait is not None]
            first = min(waits if first is None else [first, *waits], default=None)
            if len(heads) < SCAN or (first is not None and first <= 0):
                break
            lane = heads[-1][0]
        return first


def _insertion(entries: Sequence[NewEntry]) -> tuple[str, dict[str, Any]]:
    """Return the statement that writes entries, and its values."""
    values: dict[str, Any] = {}
    named = [(n, one) for n, entry in enumerate(entries) for one in entry.recipients]
    for n, entry in enumerate(entries):
        wait = max(milliseconds(entry.delay), 0)
        values |= {f"n{n}": n, f"id{n}": entry.message_id, f"type{n}": entry.type, f"body{n}": entry.body}
        values |= {f"wait{n}": wait, f"lane{n}": None if wait else entry.key or None}
        values[f"subscribers{n}"] = int(entry.subscribers)
    messages = ", ".join(MESSAGE.format(n=n) for n in range(len(entries)))
    recipients = ""
    if named:
        for at, (n, one) in enumerate(named):
            values |= {f"of{at}": n, f"name{at}": one.name, f"ordered{at}": int(one.ordered)}
        recipients = f"r(n, name, ordered) AS (VALUES {', '.join(NAMED.format(n=at) for at in range(len(named)))}),"
    sql = INSERT.replace("MESSAGES", messages).replace("RECIPIENTS", recipients)
    return sql.replace(" NAMED)", f" {TO_NAMED})" if named else ")"), values


def really_begin(engine: Engine) -> None:
    """Have an engine emit a real BEGIN, which its driver otherwise leaves out before a SELECT or a SAVEPOINT.

    Who writes takes the writer at once, ``execution_options(deferred=True)`` makes a transaction that only reads.
    """
    if not event.contains(engine, "begin", _begin):
        event.listen(engine, "begin", _begin)
    if engine.dialect.is_async and not event.contains(engine, "connect", _stop_once):
        event.listen(engine, "connect", _stop_once, insert=True)  # it may be cancelled in the others


def _stop_once(connection: Any, _: object) -> None:
    """Have aiosqlite's connection stop once only.

    When SQLAlchemy is cancelled while it closes one, it stops it at once; then the closing, whose task goes on, stops
    it again, and would wait for ever for a thread that is over.
    """
    driver = connection.driver_connection
    if not hasattr(driver, "stop"):  # before aiosqlite 0.22.1, where SQLAlchemy does not call it either
        return
    stop: Callable[[], object] = driver.stop

    def once() -> object:
        driver.stop = lambda: None
        return stop()

    driver.stop = once


def _begin(connection: Connection) -> None:
    options = connection.get_execution_options()
    if options.get("isolation_level") == "AUTOCOMMIT":
        return
    driver: Any = connection.connection.dbapi_connection
    if driver.isolation_level is not None:
        driver.isolation_level = None
    connection.exec_driver_sql("BEGIN" if options.get("deferred") else "BEGIN IMMEDIATE")
