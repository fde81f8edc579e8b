"""Say the verbs of the store in PostgreSQL: each is one statement, and so needs no transaction around it."""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple

from sqlalchemy import Connection, CursorResult, TextClause

from eventbus.limits import Limits
from eventbus.store import DAY, Claimed, Interest, NewEntry, Recipient, Settlement
from eventbus.stores._sqlalchemy_lanes import Seen, go_round
from eventbus.stores._sqlalchemy_link import CHANNEL
from eventbus.stores._sqlalchemy_rows import (
    CLAIMED,
    LISTS,
    SCAN,
    SETTLED,
    Rows,
    entries,
    milliseconds,
    words,
)

__all__ = ("PostgreSQLRows",)

MESSAGES = """WITH m AS MATERIALIZED (
    SELECT * FROM unnest(:a_id, :a_type, :a_lane, :a_wait, :a_body) WITH ORDINALITY
        AS m(id, type, lane, wait, body, n)),
"""
SUBSCRIBED = """SELECT m.n, m.id, s.name, m.type, CASE WHEN s.ordered = 1 THEN m.lane END AS lane, m.wait, m.body,
        s.name = ANY(:a_full) AND s.last_seen < {now} - :day AS refused
    FROM m JOIN eventbus_subscription s ON s.type = m.type"""
NAMED = """SELECT m.n, m.id, r.name, m.type, CASE WHEN r.ordered = 1 THEN m.lane END AS lane, m.wait, m.body, false
    FROM m JOIN unnest(:a_of, :a_name, :a_ordered) AS r(n, name, ordered) ON r.n = m.n"""
INSERT = """,
ins AS (INSERT INTO eventbus_entry (message_id, recipient, type, lane, state, due_at, error, body)
    SELECT id, name, type, CASE WHEN NOT refused THEN lane END, CASE WHEN refused THEN 2 ELSE 0 END,
        {now} + CASE WHEN refused THEN 0 ELSE wait END, CASE WHEN refused THEN 'silent handler' END, body
    FROM new ORDER BY n ON CONFLICT DO NOTHING RETURNING recipient, state)
SELECT recipient, COUNT(*) FROM ins WHERE state = 0 GROUP BY recipient"""
NOTIFIED = INSERT.replace("COUNT(*)", f"COUNT(*), (SELECT pg_notify('{CHANNEL}', '')::text)")

HEADED = """h(lane, seq, i) AS (
    (SELECT lane, seq, 1 FROM eventbus_entry WHERE recipient = :name AND lane > :lane AND lane <= :last
        ORDER BY lane, seq LIMIT 1)
    UNION ALL SELECT x.lane, x.seq, h.i + 1 FROM h CROSS JOIN LATERAL (
        SELECT lane, seq FROM eventbus_entry e WHERE e.recipient = :name AND e.lane > h.lane AND e.lane <= :last
        ORDER BY e.lane, e.seq LIMIT 1) x WHERE h.i < :scan)"""
HEADS_DUE = """SELECT e.seq FROM h JOIN eventbus_entry e ON e.seq = h.seq
        WHERE e.state = 0 AND e.lane IS NOT NULL AND e.due_at <= {now} ORDER BY h.i LIMIT :limit
        FOR UPDATE OF e SKIP LOCKED"""
LANED_DUE = """SELECT seq FROM eventbus_entry
        WHERE state = 0 AND recipient = :name AND lane IS NOT NULL AND due_at <= {now}
        ORDER BY lane, seq LIMIT :limit FOR UPDATE SKIP LOCKED"""
# by arrays, and not by a join: a plan for any limit would expect a tenth of the table and read all of it
LEASED = f"""b AS MATERIALIZED (SELECT seq FROM eventbus_entry
        WHERE state = 0 AND recipient = :name AND lane IS NULL AND due_at <= {{now}}
        ORDER BY due_at LIMIT :limit - (SELECT COUNT(*) FROM a) FOR UPDATE SKIP LOCKED),
    u AS (UPDATE eventbus_entry SET due_at = {{now}} + :lease, claims = claims + 1, owner = :owner
        WHERE seq = ANY(ARRAY(SELECT seq FROM a) || ARRAY(SELECT seq FROM b)) RETURNING {CLAIMED})"""
CLAIM = f"WITH a AS MATERIALIZED ({LANED_DUE}), {LEASED} SELECT * FROM u"
CLAIM_HEADS = f"""WITH RECURSIVE {HEADED}, a AS MATERIALIZED ({HEADS_DUE}), {LEASED},
    seen AS (SELECT MAX(i) AS looked FROM h)
    SELECT u.*, seen.looked, (SELECT h.lane FROM h WHERE h.i = seen.looked) FROM seen LEFT JOIN u ON true"""
CLAIM_TO_THE_END = CLAIM_HEADS.replace(" AND lane <= :last", "").replace(" AND e.lane <= :last", "")

TOLD = """WITH v AS (SELECT e.seq, u.outcome, u.wait, u.reason, u.blocks
    FROM unnest(:a_seq, :a_claims, :a_outcome, :a_wait, :a_error, :a_blocks)
        AS u(seq, claims, outcome, wait, reason, blocks)
    JOIN eventbus_entry e ON e.seq = u.seq
    WHERE e.claims = u.claims AND e.state = 0 AND e.owner IS NOT NULL ORDER BY e.seq FOR UPDATE OF e)
"""
SETTLE = f"{TOLD} UPDATE eventbus_entry e SET {SETTLED} FROM v WHERE e.seq = v.seq RETURNING e.seq"
EXTEND = f"{TOLD} UPDATE eventbus_entry e SET due_at = {{now}} + v.wait FROM v WHERE e.seq = v.seq RETURNING e.seq"
ANNOUNCE = """INSERT INTO eventbus_subscription (name, type, ordered, last_seen)
    SELECT name, type, ordered, {now} FROM unnest(:a_name, :a_type, :a_ordered) AS i(name, type, ordered)
    ORDER BY name, type
    ON CONFLICT (name, type) DO UPDATE SET ordered = excluded.ordered,
        last_seen = GREATEST(eventbus_subscription.last_seen, excluded.last_seen)"""
FIRST_HEADS = """WITH RECURSIVE h(lane, state, due_at, i) AS (
    (SELECT lane, state, due_at, 1 FROM eventbus_entry WHERE recipient = :name AND lane > '' ORDER BY lane, seq LIMIT 1)
    UNION ALL SELECT x.lane, x.state, x.due_at, h.i + 1 FROM h CROSS JOIN LATERAL (
        SELECT e.lane, e.state, e.due_at FROM eventbus_entry e WHERE e.recipient = :name AND e.lane > h.lane
        ORDER BY e.lane, e.seq LIMIT 1) x WHERE h.i < :scan AND (h.state <> 0 OR h.due_at > {now}))
    SELECT MIN(due_at) - {now} FROM h WHERE state = 0"""


class _Compiled(NamedTuple):
    """Hold a statement as the driver takes it."""

    sql: str
    names: tuple[str, ...] | None
    """Which values it takes, where they stand for themselves by their place."""


class PostgreSQLRows(Rows):
    """Keep entries in PostgreSQL, and notify who listens if asked to."""

    # not clock_timestamp(), which would be asked anew for every row and so could not be looked up in an index; not
    # now(), which stands still in a transaction
    clock_sql: ClassVar[str] = "(extract(epoch FROM statement_timestamp()) * 1000)::bigint"
    find_sql: ClassVar[str] = "strpos(error, :error) > 0"
    settle_sql: ClassVar[str] = SETTLE
    extend_sql: ClassVar[str] = EXTEND
    heads_sql: ClassVar[str] = FIRST_HEADS
    single: ClassVar[frozenset[str]] = frozenset({"add", "claim", "settle", "extend", "announce"})

    def __init__(self, limits: Limits, *, notify: bool) -> None:
        super().__init__(limits)
        self._insert = NOTIFIED if notify else INSERT
        self._compiled: dict[TextClause, _Compiled] = {}

    def execute(
        self, connection: Connection, statement: TextClause, values: dict[str, Any]
    ) -> "CursorResult[*tuple[Any, ...]]":
        """Run a statement in the words of the driver, which takes all of our values as they are."""
        if not LISTS.isdisjoint(values):
            return super().execute(connection, statement, values)
        found = self._compiled.get(statement)
        if found is None:
            compiled: Any = statement.compile(dialect=connection.dialect)
            names = tuple(compiled.positiontup) if compiled.positional else None
            found = self._compiled[statement] = _Compiled(str(compiled), names)
        if found.names is None:
            return connection.exec_driver_sql(found.sql, values)
        return connection.exec_driver_sql(found.sql, tuple(values[name] for name in found.names))

    def add(self, connection: Connection, entries: Sequence[NewEntry]) -> frozenset[str]:
        """Write entries; return the recipients that got something to do."""
        if not entries:
            return frozenset()
        full = self.full(connection) if any(entry.subscribers for entry in entries) else []
        written: set[str] = set()
        for batch in _alike(entries):
            waits = [max(milliseconds(entry.delay), 0) for entry in batch]
            values: dict[str, Any] = {
                "a_id": [entry.message_id for entry in batch],
                "a_type": [entry.type for entry in batch],
                "a_lane": [None if wait else entry.key or None for entry, wait in zip(batch, waits, strict=True)],
                "a_wait": waits,
                "a_body": [entry.body for entry in batch],
            }
            parts: list[str] = []
            if batch[0].subscribers:
                parts.append(SUBSCRIBED)
                values |= {"a_full": full, "day": DAY}
            if any(entry.recipients for entry in batch):
                named = [(n, one) for n, entry in enumerate(batch, 1) for one in entry.recipients]
                parts.append(NAMED)
                values["a_of"] = [n for n, _ in named]
                values["a_name"] = [one.name for _, one in named]
                values["a_ordered"] = [int(one.ordered) for _, one in named]
            if parts:
                sql = f"{MESSAGES} new(n, id, name, type, lane, wait, body, refused) AS ({' UNION ALL '.join(parts)})"
                for row in self.run(connection, sql + self._insert, **values):
                    self.count(row[0], row[1])
                    written.add(row[0])
        return frozenset(written)

    def claim(
        self, connection: Connection, recipient: Recipient, *, owner: str, limit: int, lease: float, cursor: str = ""
    ) -> Claimed:
        """Lease due entries."""
        if limit <= 0:
            return Claimed((), cursor)
        values: dict[str, Any] = {"name": recipient.name, "owner": owner, "lease": milliseconds(lease)}
        if not recipient.ordered:
            return Claimed(entries(self.run(connection, CLAIM, limit=limit, **values)))

        def look(lane: str, last: str | None, free: int) -> Seen:
            scan = max(SCAN, free)
            sql = CLAIM_TO_THE_END if last is None else CLAIM_HEADS
            rows = self.run(connection, sql, limit=free, scan=scan, lane=lane, last=last, **values).all()
            taken: list[Any] = [row for row in rows if row[0] is not None]
            lanes: list[str] = [row[6] for row in taken if row[6] is not None]
            return Seen(taken, max(lanes, default=None), rows[0][-1] or "", rows[0][-2] != scan)

        found, cursor = go_round(look, limit, cursor)
        return Claimed(entries(found), cursor)

    def tell(self, connection: Connection, template: str, settlements: Sequence[Settlement]) -> Iterable[int]:
        """Write what becomes of claims by a statement; return the seqs of those that hold."""
        told = [(one.seq, one.claims, *words(one)) for one in settlements]
        names = ("a_seq", "a_claims", "a_outcome", "a_wait", "a_error", "a_blocks")
        values: dict[str, Any] = dict(zip(names, map(list, zip(*told, strict=True)), strict=True))
        return self.seqs(connection, template, **values)

    def write_interests(self, connection: Connection, interests: Sequence[Interest]) -> None:
        """Write interests with the time."""
        once = list({(one.name, one.type): one for one in interests}.values())
        self.run(
            connection,
            ANNOUNCE,
            a_name=[one.name for one in once],
            a_type=[one.type for one in once],
            a_ordered=[int(one.ordered) for one in once],
        )


def _alike(new: Sequence[NewEntry]) -> list[Sequence[NewEntry]]:
    """Return entries in runs, in their order, that go to subscribers all or not at all."""
    edges = [n for n in range(1, len(new)) if new[n].subscribers != new[n - 1].subscribers]
    return [new[start:end] for start, end in pairwise([0, *edges, len(new)])]
