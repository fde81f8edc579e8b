"""Say every verb of the SQLite store in SQL, on one connection, inside a transaction that the writer began."""

import json
import sqlite3
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from eventbus.limits import Limits
from eventbus.store import (
    DAY,
    END,
    Backlog,
    Claimed,
    DeadEntry,
    DeadFilter,
    Entry,
    Interest,
    NewEntry,
    Recipient,
    Settlement,
    place_of,
)

__all__ = ("Rows",)

SCAN = 256
"""Lanes that one claim looks at."""
HEADS = 10_000
"""Lanes that ``due`` looks at; what lies behind them is found by the next sweep."""
RECOUNT = 60.0
"""Seconds for which the count of a silent recipient's waiting entries is trusted."""

INSERT = """INSERT INTO eventbus_entry (message_id, recipient, type, lane, state, due_at, error, body)
    VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING"""

HEAD = """SELECT lane, seq, state, due_at FROM eventbus_entry
    WHERE recipient = ? AND lane > ? ORDER BY lane, seq LIMIT 1"""
LOOSE = """SELECT seq FROM eventbus_entry
    WHERE state = 0 AND recipient = ? AND lane IS NULL AND due_at <= ? ORDER BY due_at LIMIT ?"""
LANED = """SELECT seq FROM eventbus_entry
    WHERE state = 0 AND recipient = ? AND lane IS NOT NULL AND due_at <= ? LIMIT ?"""
LEASE = """UPDATE eventbus_entry SET due_at = ?, claims = claims + 1, owner = ?
    WHERE seq IN (SELECT value FROM json_each(?))
    RETURNING seq, claims, failures, message_id, recipient, type, lane, claims - heard - 1, body"""

FIRST_LOOSE = "SELECT min(due_at) FROM eventbus_entry WHERE state = 0 AND recipient = ? AND lane IS NULL"
FIRST_LANED = "SELECT min(due_at) FROM eventbus_entry WHERE state = 0 AND recipient = ? AND lane IS NOT NULL"

HELD = "WHERE seq = ? AND claims = ? AND state = 0 AND owner IS NOT NULL"
"""The fence of every write of a claimer; a claim is settled once, so a row without owner is nobody's to settle."""
LOCK = f"SELECT 1 FROM eventbus_entry {HELD}"
EXTEND = f"UPDATE eventbus_entry SET due_at = ? {HELD}"
DONE = f"""UPDATE eventbus_entry SET state = 1, due_at = ?, lane = NULL, body = NULL, owner = NULL, error = NULL,
    heard = claims {HELD}"""
AGAIN = f"UPDATE eventbus_entry SET due_at = ?, failures = failures + 1, error = ?, owner = NULL, heard = claims {HELD}"
RELEASE = f"UPDATE eventbus_entry SET due_at = ?, error = coalesce(?, error), owner = NULL, heard = claims {HELD}"
DEAD = f"""UPDATE eventbus_entry SET state = 2, due_at = ?, failures = failures + 1, error = ?, owner = NULL,
    heard = claims, lane = CASE WHEN ? THEN lane END {HELD}"""

ANNOUNCE = """INSERT INTO eventbus_subscription (name, type, ordered, last_seen) VALUES (?, ?, ?, ?)
    ON CONFLICT (name, type) DO UPDATE SET ordered = excluded.ordered, last_seen = max(last_seen, excluded.last_seen)"""
ORPHAN = """UPDATE eventbus_entry SET state = 2, due_at = ?, claims = claims + 1, heard = claims + 1, lane = NULL,
    owner = NULL, error = 'no handler' WHERE seq = ? AND state = 0"""
WAITING = (
    "SELECT seq FROM eventbus_entry WHERE recipient = ? AND state = 0 AND lane IS NULL LIMIT ?",
    "SELECT seq FROM eventbus_entry WHERE recipient = ? AND state = 0 AND lane IS NOT NULL LIMIT ?",
)
DROP = "UPDATE eventbus_entry SET state = 3, due_at = ?, lane = NULL, body = NULL, owner = NULL WHERE seq = ?"
BURIED = "SELECT seq FROM eventbus_entry WHERE recipient = ? AND state = 2 LIMIT ?"

COUNTS = (
    "SELECT recipient, count(*), min(due_at) FROM eventbus_entry WHERE state = 0 AND lane IS NULL GROUP BY recipient",
    """SELECT recipient, count(*), min(due_at) FROM eventbus_entry WHERE state = 0 AND lane IS NOT NULL
    GROUP BY recipient""",
)
REPLAY = """UPDATE eventbus_entry SET state = 0, due_at = ?, failures = 0, claims = claims + 1, heard = claims + 1,
    owner = NULL, error = NULL WHERE state = 2 AND seq IN (SELECT value FROM json_each(?)) RETURNING recipient"""
PLACES = "SELECT json_extract(value, '$[0]'), json_extract(value, '$[1]') FROM json_each(?)"
DISCARD = """UPDATE eventbus_entry SET state = 3, due_at = ?, lane = NULL, body = NULL
    WHERE state = 2 AND seq IN (SELECT value FROM json_each(?))"""


class Rows:
    """Keep the entries of one file through one connection; ``now`` is in milliseconds everywhere."""

    def __init__(self, connection: sqlite3.Connection, limits: Limits) -> None:
        self.connection = connection
        self._interests: Mapping[str, tuple[Recipient, ...]] = {}
        """Type -> who wants it, as it was when somebody last looked."""
        self._names: Mapping[str, frozenset[str]] = {}
        self._limits = limits
        self._seen: dict[str, int] = {}
        self._version: int | None = None
        self._checked = False
        self._counted: dict[str, tuple[int, float]] = {}

    def begun(self) -> None:
        """Note that a transaction has begun: others may have announced something since the last one."""
        self._checked = False

    def undone(self) -> None:
        """Note that something was rolled back, so what was remembered of it is void."""
        self._version = None
        self._checked = False
        self._counted.clear()

    def refresh(self) -> None:
        """Read who wants what, if it may have changed; at most once per transaction."""
        if self._checked:
            return
        self._checked = True
        version = self.connection.execute("PRAGMA data_version").fetchone()[0]
        if version == self._version:
            return
        interests: dict[str, list[Recipient]] = {}
        self._seen = {}
        for name, type_, ordered, seen in self.connection.execute("SELECT * FROM eventbus_subscription"):
            interests.setdefault(type_, []).append(Recipient(name, bool(ordered)))
            self._seen[name] = max(seen, self._seen.get(name, 0))
        self._interests = {type_: tuple(wanted) for type_, wanted in interests.items()}
        self._names = {type_: frozenset(one.name for one in wanted) for type_, wanted in interests.items()}
        self._version = version

    def recipients(self, entries: Sequence[NewEntry]) -> frozenset[str]:
        """Return who may get something to do by these entries; the only method for the event loop."""
        wanted: frozenset[str] = frozenset()
        for entry in entries:
            if entry.subscribers:
                wanted |= self._names.get(entry.type, wanted)
            if entry.recipients:
                wanted |= {recipient.name for recipient in entry.recipients}
        return wanted

    def add(self, now: int, entries: Sequence[NewEntry]) -> frozenset[str]:
        """Write entries; return the recipients that got something to do."""
        self.refresh()
        execute, silent = self.connection.execute, now - DAY
        written: set[str] = set()
        for entry in entries:
            due = now + round(entry.delay * 1000) if entry.delay > 0 else now
            lane = entry.key or None if due == now else None
            recipients = self._interests.get(entry.type, ()) if entry.subscribers else ()
            for recipient in entry.recipients + recipients if entry.recipients else recipients:
                name = recipient.name
                if self._seen.get(name, now) < silent and self._is_full(name):
                    execute(INSERT, (entry.message_id, name, entry.type, None, 2, now, "silent handler", entry.body))
                    continue
                mine = lane if recipient.ordered else None
                if execute(INSERT, (entry.message_id, name, entry.type, mine, 0, due, None, entry.body)).rowcount:
                    written.add(name)
        return frozenset(written)

    def _is_full(self, name: str) -> bool:
        ceiling = self._limits.waiting
        count, at = self._counted.get(name, (ceiling, float("-inf")))
        if time.monotonic() - at > RECOUNT:
            at = time.monotonic()
            each = [f"SELECT count(*) FROM ({waiting})" for waiting in WAITING]
            count = sum(self.connection.execute(sql, (name, ceiling)).fetchone()[0] for sql in each)
        if count < ceiling:
            self._counted[name] = (count + 1, at)
            return False
        self._counted[name] = (count, at)
        return True

    def claim(
        self, now: int, recipient: Recipient, *, owner: str, limit: int, lease: float, cursor: str = ""
    ) -> Claimed:
        """Lease due entries."""
        name = recipient.name
        chosen: list[int] = []
        if limit <= 0:
            return Claimed((), cursor)
        if recipient.ordered:
            cursor = self._heads(now, name, limit, cursor, chosen)
        else:
            cursor = ""
            chosen += (seq for (seq,) in self.connection.execute(LANED, (name, now, limit)))
        if len(chosen) < limit:
            chosen += (seq for (seq,) in self.connection.execute(LOOSE, (name, now, limit - len(chosen))))
        if not chosen:
            return Claimed((), cursor)
        found = self.connection.execute(LEASE, (now + round(lease * 1000), owner, json.dumps(chosen))).fetchall()
        return Claimed([Entry(*row) for row in sorted(found)], cursor)

    def _heads(self, now: int, name: str, limit: int, cursor: str, chosen: list[int]) -> str:
        """Look round the circle of lanes; return where to go on, ``""`` when the lap has met nothing (more) to take.

        A lap starts where the last lane was taken and may need several claims; only its end proves that nothing is
        due.
        """
        start, lane, wrapped = _lap(cursor)
        for _ in range(max(SCAN, limit)):
            head = self.connection.execute(HEAD, (name, lane)).fetchone()
            if head is None and not wrapped:
                wrapped = True
                head = self.connection.execute(HEAD, (name, "")).fetchone()
            if head is None or (wrapped and start and head[0] > start):
                return ""
            lane, seq, state, due = head
            if state == 0 and due <= now:
                chosen.append(seq)
                if len(chosen) == limit:
                    return f"0{len(lane)}:{lane}{lane}"
        return f"{wrapped:d}{len(start)}:{start}{lane}"

    def lock(self, now: int, seq: int, claims: int) -> bool:
        """Tell whether a claim still holds; the open transaction keeps it so."""
        return self.connection.execute(LOCK, (seq, claims)).fetchone() is not None

    def settle(self, now: int, settlements: Sequence[Settlement]) -> frozenset[int]:
        """Write settlements; return the seqs whose lease was lost."""
        execute = self.connection.execute
        lost: set[int] = set()
        for one in settlements:
            held = (one.seq, one.claims)
            error = one.error and one.error.encode(errors="backslashreplace").decode()
            match one.outcome:
                case "done":
                    cursor = execute(DONE, (now, *held))
                case "again":
                    cursor = execute(AGAIN, (now + round(one.after * 1000), error, *held))
                case "release":
                    cursor = execute(RELEASE, (now + round(one.after * 1000), error, *held))
                case "dead":
                    cursor = execute(DEAD, (now, error, one.blocks, *held))
            if not cursor.rowcount:
                lost.add(one.seq)
        return frozenset(lost)

    def extend(self, now: int, held: Iterable[tuple[int, int]], lease: float) -> frozenset[int]:
        """Renew leases; return the seqs whose lease was lost."""
        due, execute = now + round(lease * 1000), self.connection.execute
        return frozenset(seq for seq, claims in held if not execute(EXTEND, (due, seq, claims)).rowcount)

    def announce(self, now: int, interests: Iterable[Interest]) -> None:
        """Write interests with the time."""
        for one in interests:
            self.connection.execute(ANNOUNCE, (one.name, one.type, one.ordered, now))
        self.undone()
        self.refresh()

    def rename(self, now: int, old: str, new: str, batch: int) -> bool:
        """Move a batch of waiting and dead entries to a recipient's new name; True if there may be more."""
        self._leave(old)
        seqs = self._of(old, (*WAITING, BURIED), batch)
        for seq in seqs:
            moved = self.connection.execute(
                "UPDATE OR IGNORE eventbus_entry SET recipient = ? WHERE seq = ?", (new, seq)
            )
            if not moved.rowcount:
                self.connection.execute(DROP, (now, seq))
        return bool(seqs)

    def forget(self, now: int, name: str, batch: int) -> int:
        """Drop a recipient's interests and make a batch of its waiting entries dead; return how many."""
        self._leave(name)
        seqs = self._of(name, WAITING, batch)
        self.connection.executemany(ORPHAN, [(now, seq) for seq in seqs])
        return len(seqs)

    def _leave(self, name: str) -> None:
        self.connection.execute("DELETE FROM eventbus_subscription WHERE name = ?", (name,))
        self.undone()
        self.refresh()

    def _of(self, name: str, queries: Sequence[str], batch: int) -> list[int]:
        seqs: list[int] = []
        for query in queries:
            seqs += (seq for (seq,) in self.connection.execute(query, (name, batch - len(seqs))))
        return seqs

    def due(self, now: int, recipients: Iterable[str]) -> dict[str, float]:
        """Return for each recipient with waiting entries the seconds until its first is due."""
        found = {name: self._first(now, name) for name in recipients}
        return {name: (due - now) / 1000 for name, due in found.items() if due is not None}

    def _first(self, now: int, name: str) -> int | None:
        execute = self.connection.execute
        first: int | None = execute(FIRST_LOOSE, (name,)).fetchone()[0]
        ordered = execute("SELECT max(ordered) FROM eventbus_subscription WHERE name = ?", (name,)).fetchone()[0]
        if ordered == 0:
            due: int | None = execute(FIRST_LANED, (name,)).fetchone()[0]
            return due if first is None else first if due is None else min(first, due)
        lane = ""
        for _ in range(HEADS):
            head = None if first is not None and first <= now else execute(HEAD, (name, lane)).fetchone()
            if head is None:
                break
            lane, _, state, at = head
            if state == 0:
                first = at if first is None else min(first, at)
        return first

    def backlog(self, now: int) -> list[Backlog]:
        """Count what waits, leased entries included, and what is dead, per recipient."""
        execute = self.connection.execute
        announced = dict(execute("SELECT name, max(last_seen) FROM eventbus_subscription GROUP BY name").fetchall())
        dead = dict(
            execute("SELECT recipient, count(*) FROM eventbus_entry WHERE state = 2 GROUP BY recipient").fetchall()
        )
        waiting: dict[str, int] = {}
        oldest: dict[str, int] = {}
        for query in COUNTS:
            for name, count, due in execute(query):
                waiting[name] = waiting.get(name, 0) + count
                oldest[name] = min(due, oldest.get(name, due))
        return [
            Backlog(
                name,
                waiting.get(name, 0),
                dead.get(name, 0),
                (now - oldest[name]) / 1000 if oldest.get(name, now + 1) <= now else None,
                announced.get(name, now - DAY - 1) >= now - DAY,
            )
            for name in sorted({*announced, *waiting, *dead})
        ]

    def dead(self, now: int, chosen: DeadFilter) -> list[DeadEntry]:
        """Return chosen dead entries, those first that died first."""
        columns = "due_at, seq, message_id, type, recipient, failures, error, body"
        return [
            DeadEntry(f"{died}-{seq}", id_, type_, name, failures, error or "", _time(died), body or b"")
            for died, seq, id_, type_, name, failures, error, body in self._chosen(columns, chosen)
        ]

    def replay(self, now: int, chosen: DeadFilter) -> dict[str, int]:
        """Make chosen dead entries due; return how many per recipient."""
        replayed: dict[str, int] = {}
        for (name,) in self.connection.execute(REPLAY, (now, self._seqs(chosen))).fetchall():
            replayed[name] = replayed.get(name, 0) + 1
        return replayed

    def discard(self, now: int, chosen: DeadFilter) -> int:
        """Forget chosen dead entries but for their ids; return how many."""
        return self.connection.execute(DISCARD, (now, self._seqs(chosen))).rowcount

    def _seqs(self, chosen: DeadFilter) -> str:
        return json.dumps([seq for (seq,) in self._chosen("seq", chosen)])

    def _chosen(self, columns: str, chosen: DeadFilter) -> list[tuple[Any, ...]]:
        terms = ["state = 2"]
        values: list[Any] = []
        plain = {
            "recipient = ?": chosen.handler,
            "type = ?": chosen.message,
            "due_at >= ?": None if chosen.since is None else round(chosen.since.timestamp() * 1000),
            "instr(error, ?) > 0": chosen.error,
        }
        for term, value in plain.items():
            if value is not None:
                terms.append(term)
                values.append(value)
        if chosen.ids is not None:
            terms.append(f"(due_at, seq) IN ({PLACES})")
            values.append(json.dumps([place for place in map(place_of, chosen.ids) if place]))
        if chosen.after is not None:
            terms.append("(due_at, seq) > (?, ?)")
            values += place_of(chosen.after) or (END, 0)
        values.append(-1 if chosen.limit is None else chosen.limit)
        sql = f"SELECT {columns} FROM eventbus_entry WHERE {' AND '.join(terms)} ORDER BY due_at, seq LIMIT ?"
        return self.connection.execute(sql, values).fetchall()


def _time(milliseconds: int) -> datetime:
    return datetime.fromtimestamp(milliseconds / 1000, UTC)


def _lap(cursor: str) -> tuple[str, str, bool]:
    """Return where a lap of lanes started, how far it came, and whether it passed the end of the alphabet."""
    if not cursor:
        return "", "", True
    length, _, lanes = cursor[1:].partition(":")
    return lanes[: int(length)], lanes[int(length) :], cursor[0] == "1"
