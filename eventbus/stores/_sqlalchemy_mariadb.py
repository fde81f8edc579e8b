"""Say the verbs of the store in MariaDB 10.6: rows are locked first, in one order, and then written by primary key."""

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar

from sqlalchemy import Connection

from eventbus.store import DAY, Claimed, Interest, NewEntry, Recipient, Settlement
from eventbus.stores._sqlalchemy_lanes import Seen, go_round
from eventbus.stores._sqlalchemy_rows import (
    CLAIMED,
    SCAN,
    SETTLED,
    Rows,
    entries,
    milliseconds,
    words,
)

__all__ = ("MariaDBRows",)

ROOM = 4_194_304
"""Bytes of bodies in one statement, well below the smallest ``max_allowed_packet`` in use."""
ROWS = 128
"""Rows in one statement."""

# INSERT ... SELECT would lock the counter of the whole table until the statement ends, so who wants a type is read
# first; and what of it is there already, which the count of written rows does not tell
KNOWN = """SELECT 0, name, type, ordered, last_seen < {now} - :day FROM eventbus_subscription WHERE type IN :types
    UNION ALL SELECT 1, recipient, message_id, 0, 0 FROM eventbus_entry WHERE message_id IN :ids"""
INSERT = "INSERT INTO eventbus_entry (message_id, recipient, type, lane, state, due_at, error, body) VALUES "
VALUES = "(:id{n}, :name{n}, :type{n}, :lane{n}, :state{n}, {{now}} + :wait{n}, :error{n}, :body{n})"
TWICE = " ON DUPLICATE KEY UPDATE seq = eventbus_entry.seq"

HEADED = """BEGIN NOT ATOMIC
    DECLARE l VARCHAR(200) CHARACTER SET utf8mb4 COLLATE utf8mb4_nopad_bin DEFAULT :lane;
    DECLARE f VARCHAR(200) CHARACTER SET utf8mb4 COLLATE utf8mb4_nopad_bin DEFAULT NULL;
    DECLARE s, d BIGINT; DECLARE st, n, i, fin INT DEFAULT 0; DECLARE r LONGTEXT DEFAULT '';
    DECLARE t BIGINT DEFAULT {now};
    DECLARE CONTINUE HANDLER FOR NOT FOUND SET fin = 1;
    w: WHILE n < :limit AND i < :scan DO
        SELECT lane, seq, state, due_at INTO l, s, st, d FROM eventbus_entry FORCE INDEX (eventbus_entry_lane)
            WHERE recipient = :name AND lane > l AND lane <= :last ORDER BY lane, seq LIMIT 1;
        IF fin THEN LEAVE w; END IF;
        SET i = i + 1;
        IF st = 0 AND d <= t THEN SET n = n + 1, r = CONCAT(r, ',', s), f = l; END IF;
    END WHILE;
    SELECT r, f, l, fin;
END"""
HEADED_TO_THE_END = HEADED.replace(" AND lane <= :last", "")
FIRST_HEADS = """BEGIN NOT ATOMIC
    DECLARE l VARCHAR(200) CHARACTER SET utf8mb4 COLLATE utf8mb4_nopad_bin DEFAULT '';
    DECLARE s, d, m BIGINT; DECLARE st, i, fin INT DEFAULT 0; DECLARE t BIGINT DEFAULT {now};
    DECLARE CONTINUE HANDLER FOR NOT FOUND SET fin = 1;
    w: WHILE i < :scan AND (m IS NULL OR m > t) DO
        SELECT lane, seq, state, due_at INTO l, s, st, d FROM eventbus_entry FORCE INDEX (eventbus_entry_lane)
            WHERE recipient = :name AND lane > l ORDER BY lane, seq LIMIT 1;
        IF fin THEN LEAVE w; END IF;
        SET i = i + 1;
        IF st = 0 AND (m IS NULL OR d < m) THEN SET m = d; END IF;
    END WHILE;
    SELECT m - t;
END"""
FREE = f"""SELECT {CLAIMED.replace("claims - heard - 1", "claims - heard")} FROM eventbus_entry
    FORCE INDEX (INDEX_OF) WHERE state = 0 AND due_at <= {{now}} AND """
LEASE = "UPDATE eventbus_entry SET due_at = {now} + :lease, claims = claims + 1, owner = :owner WHERE seq IN :seqs"
TAKE_HEADS = FREE.replace("INDEX_OF", "PRIMARY") + """ seq IN :seqs AND lane IS NOT NULL FOR UPDATE SKIP LOCKED"""
TAKE = FREE.replace("INDEX_OF", "eventbus_entry_ready")
TAKE_LANED = f"{TAKE} recipient = :name AND lane IS NOT NULL LIMIT :limit FOR UPDATE SKIP LOCKED"
TAKE_LOOSE = f"{TAKE} recipient = :name AND lane IS NULL ORDER BY due_at LIMIT :limit FOR UPDATE SKIP LOCKED"

HOLD = """SELECT seq, claims FROM eventbus_entry
    WHERE seq IN :seqs AND state = 0 AND owner IS NOT NULL ORDER BY seq FOR UPDATE"""
TOLD = """UPDATE JSON_TABLE(:told, '$[*]' COLUMNS (seq BIGINT PATH '$[0]', outcome VARCHAR(10) PATH '$[1]',
        wait BIGINT PATH '$[2]', reason LONGTEXT CHARACTER SET utf8mb4 PATH '$[3]', blocks INT PATH '$[4]')) v
    STRAIGHT_JOIN eventbus_entry e ON e.seq = v.seq SET """
SETTLE = TOLD + SETTLED
EXTEND = TOLD + "e.due_at = {now} + v.wait"
ANNOUNCE = "INSERT INTO eventbus_subscription (name, type, ordered, last_seen) VALUES "
INTEREST = "(:name{n}, :type{n}, :ordered{n}, {{now}})"
SEEN_AGAIN = " ON DUPLICATE KEY UPDATE ordered = VALUES(ordered), last_seen = GREATEST(last_seen, VALUES(last_seen))"
NAMES = "SELECT DISTINCT recipient FROM eventbus_entry FORCE INDEX (eventbus_entry_ready) WHERE state = :state"


class MariaDBRows(Rows):
    """Keep entries in MariaDB."""

    clock_sql: ClassVar[str] = "(TIMESTAMPDIFF(MICROSECOND, '1970-01-01', UTC_TIMESTAMP(6)) DIV 1000)"
    settle_sql: ClassVar[str] = SETTLE
    extend_sql: ClassVar[str] = EXTEND
    heads_sql: ClassVar[str] = FIRST_HEADS

    def add(self, connection: Connection, entries: Sequence[NewEntry]) -> frozenset[str]:
        """Write entries; return the recipients that got something to do."""
        if not entries:
            return frozenset()
        types = sorted({entry.type for entry in entries if entry.subscribers}) or [""]
        ids = [entry.message_id for entry in entries]
        full = set(self.full(connection))
        wanted: dict[str, list[tuple[str, bool, bool]]] = {}
        there: set[tuple[str, str]] = set()
        for kind, name, other, ordered, silent in self.run(connection, KNOWN, types=types, ids=ids, day=DAY):
            if kind:
                there.add((other, name))
            else:
                wanted.setdefault(other, []).append((name, bool(ordered), bool(silent) and name in full))
        rows: list[dict[str, Any]] = []
        for entry in entries:
            wait = max(milliseconds(entry.delay), 0)
            named = [(one.name, one.ordered, False) for one in entry.recipients]
            for name, ordered, late in [*named, *(wanted.get(entry.type, ()) if entry.subscribers else ())]:
                if (entry.message_id, name) in there:
                    continue
                there.add((entry.message_id, name))
                rows.append(
                    {
                        "id": entry.message_id,
                        "name": name,
                        "type": entry.type,
                        "lane": entry.key or None if ordered and not wait and not late else None,
                        "state": 2 if late else 0,
                        "wait": 0 if late else wait,
                        "error": "silent handler" if late else None,
                        "body": entry.body,
                    }
                )
        for batch in _batches(rows):
            sql = INSERT + ", ".join(VALUES.format(n=n) for n in range(len(batch))) + TWICE
            self.run(
                connection, sql, **{f"{key}{n}": value for n, row in enumerate(batch) for key, value in row.items()}
            )
        for row in rows:
            self.count(row["name"], row["state"] == 0)
        return frozenset(row["name"] for row in rows if row["state"] == 0)

    def claim(
        self, connection: Connection, recipient: Recipient, *, owner: str, limit: int, lease: float, cursor: str = ""
    ) -> Claimed:
        """Lease due entries."""
        if limit <= 0:
            return Claimed((), cursor)
        name = recipient.name

        def look(lane: str, last: str | None, free: int) -> Seen:
            sql = HEADED_TO_THE_END if last is None else HEADED
            values = {"name": name, "lane": lane, "last": last, "limit": free, "scan": max(SCAN, free)}
            seqs, furthest, reached, ended = self.run(connection, sql, **values).one()
            heads = [int(seq) for seq in seqs.split(",")[1:]]
            taken: Sequence[Any] = self.run(connection, TAKE_HEADS, seqs=heads).all() if heads else ()
            return Seen(taken, furthest, reached, bool(ended))

        if recipient.ordered:
            taken, cursor = go_round(look, limit, cursor)
        else:
            taken, cursor = list[Any](self.run(connection, TAKE_LANED, name=name, limit=limit)), ""
        if len(taken) < limit:
            taken += self.run(connection, TAKE_LOOSE, name=name, limit=limit - len(taken))
        if taken:
            seqs = sorted(row[0] for row in taken)
            self.run(connection, LEASE, seqs=seqs, lease=milliseconds(lease), owner=owner)
        return Claimed(entries((row[0], row[1] + 1, *row[2:]) for row in taken), cursor)

    def tell(self, connection: Connection, template: str, settlements: Sequence[Settlement]) -> Iterable[int]:
        """Write what becomes of claims by a statement; return the seqs of those that hold."""
        seqs = sorted(one.seq for one in settlements)
        held = {(seq, claims) for seq, claims in self.run(connection, HOLD, seqs=seqs)}
        kept = [one for one in settlements if (one.seq, one.claims) in held]
        if kept:
            self.run(connection, template, told=json.dumps([(one.seq, *words(one)) for one in kept]))
        return [one.seq for one in kept]

    def write_interests(self, connection: Connection, interests: Sequence[Interest]) -> None:
        """Write interests with the time."""
        once = {(one.name, one.type): one for one in interests}
        values: dict[str, Any] = {}
        for n, (key, one) in enumerate(sorted(once.items())):
            values |= {f"name{n}": key[0], f"type{n}": key[1], f"ordered{n}": int(one.ordered)}
        self.run(
            connection, ANNOUNCE + ", ".join(INTEREST.format(n=n) for n in range(len(once))) + SEEN_AGAIN, **values
        )

    # there is an index by state, recipient, lane and time only: across recipients every row would be sorted

    def some(self, connection: Connection, template: str, limit: int, **values: Any) -> list[int]:
        """Return rows that a statement finds across all recipients, but for those that somebody has locked."""
        over = "state IN (1, 3)"
        found: list[int] = []
        for state in (1, 3) if over in template else (0,):
            sql = template.replace(over, "lane IS NULL AND state = :state").replace(
                "WHERE ", "FORCE INDEX (eventbus_entry_ready) WHERE recipient = :name AND "
            )
            for name in self.run(connection, NAMES, state=state).scalars().all():
                if len(found) < limit:
                    free = limit - len(found)
                    found += self.seqs(connection, sql + self.skip_sql, name=name, state=state, limit=free, **values)
        return found


def _batches(rows: Sequence[dict[str, Any]]) -> Iterator[Sequence[dict[str, Any]]]:
    """Yield rows as many at a time as a statement should hold."""
    batch: list[dict[str, Any]] = []
    size = 0
    for row in rows:
        if batch and (len(batch) == ROWS or size + len(row["body"]) > ROOM):
            yield batch
            batch, size = [], 0
        batch.append(row)
        size += len(row["body"])
    if batch:
        yield batch
