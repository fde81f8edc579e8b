"""Say in SQL what every dialect says alike, on one connection, inside a transaction that somebody else began.

``{now}`` in a statement is the database's own clock in milliseconds, or the bind ``:now`` when a clock is bound.
"""

import re
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, ClassVar

from sqlalchemy import (
    ARRAY,
    BigInteger,
    Connection,
    CursorResult,
    Integer,
    LargeBinary,
    String,
    TextClause,
    bindparam,
    text,
)
from sqlalchemy.types import TypeEngine

from eventbus.clock import Clock
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

__all__ = ("HELD", "LISTS", "SCAN", "Rows")

SCAN = 256
"""Lanes that one statement looks at."""
HEADS = 10_000
"""Lanes that ``due`` looks at; what lies behind them is found by the next sweep."""
RECOUNT = 60.0
"""Seconds for which the count of a silent recipient's waiting entries is trusted."""

BATCH = 1_000
"""Rows that one statement names."""

HELD = "claims = :claims AND state = 0 AND owner IS NOT NULL"
"""The fence of every write of a claimer; a claim is settled once, so a row without owner is nobody's to settle."""
CLAIMED = "seq, claims, failures, message_id, recipient, type, lane, claims - heard - 1, body"
"""The columns of an ``Entry``."""

SETTLED = """state = CASE v.outcome WHEN 'done' THEN 1 WHEN 'dead' THEN 2 ELSE 0 END,
    due_at = {now} + v.wait,
    lane = CASE WHEN v.outcome = 'done' OR (v.outcome = 'dead' AND v.blocks = 0) THEN NULL ELSE e.lane END,
    body = CASE WHEN v.outcome = 'done' THEN NULL ELSE e.body END,
    error = CASE v.outcome WHEN 'done' THEN NULL WHEN 'release' THEN COALESCE(v.reason, e.error) ELSE v.reason END,
    failures = e.failures + CASE WHEN v.outcome IN ('again', 'dead') THEN 1 ELSE 0 END,
    heard = e.claims, owner = NULL"""
"""What a settlement ``v`` makes of a row ``e``."""

SILENT = "SELECT name FROM eventbus_subscription GROUP BY name HAVING MAX(last_seen) < {now} - :day"
WAITING = "SELECT COUNT(*) FROM (SELECT 1 FROM eventbus_entry WHERE recipient = :name AND state = 0 LIMIT :ceiling) w"
LOCK = f"SELECT 1 FROM eventbus_entry WHERE seq = :seq AND {HELD}"
LEAVE = "DELETE FROM eventbus_subscription WHERE name = :name"
OF = "SELECT seq FROM eventbus_entry WHERE recipient = :name AND state IN (0, 2) LIMIT :limit"
OF_WAITING = "SELECT seq FROM eventbus_entry WHERE recipient = :name AND state = 0 LIMIT :limit"
TWICE = """SELECT o.seq FROM eventbus_entry o JOIN eventbus_entry n ON n.message_id = o.message_id
    WHERE n.recipient = :new AND o.seq IN :seqs"""
MOVE = "UPDATE eventbus_entry SET recipient = :new WHERE seq IN :seqs AND recipient = :name"
DROP = """UPDATE eventbus_entry SET state = 3, due_at = {now}, lane = NULL, body = NULL, owner = NULL
    WHERE seq IN :seqs AND recipient = :name"""
ORPHAN = """UPDATE eventbus_entry SET state = 2, due_at = {now}, heard = claims + 1, claims = claims + 1, lane = NULL,
    owner = NULL, error = 'no handler' WHERE seq IN :seqs AND state = 0"""
FIRST = "SELECT MIN(due_at) - {now} FROM eventbus_entry WHERE state = 0 AND recipient = :name AND lane IS NULL"
FIRST_LANED = (
    "SELECT MIN(due_at) - {now} FROM eventbus_entry WHERE state = 0 AND recipient = :name AND lane IS NOT NULL"
)
ORDERED = "SELECT MAX(ordered) FROM eventbus_subscription WHERE name = :name"
SEEN = "SELECT name, {now} - MAX(last_seen) FROM eventbus_subscription GROUP BY name"
DIED = "SELECT recipient, COUNT(*) FROM eventbus_entry WHERE state = 2 GROUP BY recipient"
COUNTS = "SELECT recipient, COUNT(*), {now} - MIN(due_at) FROM eventbus_entry WHERE state = 0 GROUP BY recipient"
SHOWN = "due_at, seq, message_id, type, recipient, failures, error, body"
DEAD = "SELECT seq, recipient FROM eventbus_entry WHERE seq IN :seqs AND state = 2 ORDER BY seq"
REPLAY = """UPDATE eventbus_entry SET state = 0, due_at = {now}, failures = 0, heard = claims + 1, claims = claims + 1,
    owner = NULL, error = NULL WHERE seq IN :seqs AND state = 2"""
DISCARD = """UPDATE eventbus_entry SET state = 3, due_at = {now}, lane = NULL, body = NULL
    WHERE seq IN :seqs AND state = 2"""


WIDE = ("now", "seq", "n", "of", "lease", "age", "ahead", "day", "wait", "since", "died", "after")
NARROW = ("claims", "state", "subscribers", "limit", "scan", "ceiling", "ordered")
TYPES: dict[str, TypeEngine[Any]] = {
    **dict.fromkeys(WIDE, BigInteger()),
    **dict.fromkeys(NARROW, Integer()),
    **dict.fromkeys(("a_seq", "a_wait"), ARRAY(BigInteger())),
    **dict.fromkeys(("a_claims", "a_of", "a_blocks", "a_ordered"), ARRAY(Integer())),
    **dict.fromkeys(("a_id", "a_type", "a_lane", "a_name", "a_full", "a_outcome", "a_error"), ARRAY(String())),
    "a_body": ARRAY(LargeBinary()),
    "body": LargeBinary(),
    "seqs": BigInteger(),
}
"""The types of binds, which are not left to what a driver guesses from the first value; the others are texts."""
LISTS = frozenset({"seqs", "ids", "types"})
"""Binds that stand for a list behind ``IN``."""
DIGITS = "0123456789"
BIND = re.compile(r"(?<![:\w]):([a-z]\w*)")


class Rows(ABC):
    """Keep entries through any connection of one database."""

    clock_sql: ClassVar[str]
    """The database's clock, in milliseconds since the epoch; the same throughout a statement."""
    find_sql: ClassVar[str] = "INSTR(error, :error) > 0"
    skip_sql: ClassVar[str] = " FOR UPDATE SKIP LOCKED"
    lock_sql: ClassVar[str] = " FOR UPDATE"
    settle_sql: ClassVar[str]
    extend_sql: ClassVar[str]
    heads_sql: ClassVar[str]
    """How ``first_heads`` asks, where one statement can."""
    single: ClassVar[frozenset[str]] = frozenset()
    """The writing verbs that are one statement, and need no transaction around it."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.clock: Clock | None = None
        self._statements: dict[tuple[str, bool], TextClause] = {}
        self._counts: dict[str, int] = {}
        """How much waits for each silent recipient, as it was when somebody last looked."""
        self._wanted: dict[str, frozenset[str]] = {}
        """Type -> the recipients announced through this object."""
        self._looked = float("-inf")

    def run(self, connection: Connection, template: str, **values: Any) -> "CursorResult[*tuple[Any, ...]]":
        """Run one statement at the time of the clock."""
        clock = self.clock
        key = (template, clock is None)
        found = self._statements.get(key)
        if found is None:
            found = self._statements[key] = _typed(
                template.replace("{now}", self.clock_sql if clock is None else ":now")
            )
        if clock is not None:
            values["now"] = round(clock.now() * 1000)
        return self.execute(connection, found, values)

    def execute(
        self, connection: Connection, statement: TextClause, values: dict[str, Any]
    ) -> "CursorResult[*tuple[Any, ...]]":
        """Run a statement."""
        return connection.execute(statement, values)

    def recipients(self, entries: Sequence[NewEntry]) -> frozenset[str]:
        """Return which recipients of this process, and others that are named, may get something to do by entries."""
        named = frozenset(recipient.name for entry in entries for recipient in entry.recipients)
        return named.union(*(self._wanted.get(entry.type, ()) for entry in entries if entry.subscribers))

    @abstractmethod
    def add(self, connection: Connection, entries: Sequence[NewEntry]) -> frozenset[str]:
        """Write entries; return the recipients that got something to do."""

    @abstractmethod
    def claim(
        self, connection: Connection, recipient: Recipient, *, owner: str, limit: int, lease: float, cursor: str = ""
    ) -> Claimed:
        """Lease due entries."""

    @abstractmethod
    def tell(self, connection: Connection, template: str, settlements: Sequence[Settlement]) -> Iterable[int]:
        """Write what becomes of claims by a statement; return the seqs of those that hold."""

    @abstractmethod
    def write_interests(self, connection: Connection, interests: Sequence[Interest]) -> None:
        """Write interests with the time."""

    def first_heads(self, connection: Connection, name: str) -> int | None:
        """Return in how many milliseconds the first of a recipient's lane heads is due."""
        first: int | None = self.run(connection, self.heads_sql, name=name, scan=HEADS).scalar()
        return first

    def full(self, connection: Connection) -> list[str]:
        """Return the silent recipients whose ceiling is reached."""
        at = time.monotonic() if self.clock is None else self.clock.monotonic()
        ceiling = self.limits.waiting
        if at - self._looked >= RECOUNT:
            silent = [name for (name,) in self.run(connection, SILENT, day=DAY)]
            self._counts = {
                name: self.run(connection, WAITING, name=name, ceiling=ceiling).scalar_one() for name in silent
            }
            self._looked = at
        return [name for name, count in self._counts.items() if count >= ceiling]

    def count(self, name: str, written: int) -> None:
        """Note that so many rows were written for a recipient."""
        if name in self._counts:
            self._counts[name] += written

    def highest(self, connection: Connection) -> int | None:
        """Return the number of the newest row."""
        seq: int | None = self.run(connection, "SELECT MAX(seq) FROM eventbus_entry").scalar()
        return seq

    def lock(self, connection: Connection, seq: int, claims: int) -> bool:
        """Take the row lock of a claimed entry; False if the lease is lost."""
        return self.run(connection, LOCK + self.lock_sql, seq=seq, claims=claims).first() is not None

    def settle(self, connection: Connection, settlements: Sequence[Settlement]) -> frozenset[int]:
        """Write settlements; return the seqs whose lease was lost."""
        return self._lost(connection, self.settle_sql, settlements)

    def extend(self, connection: Connection, held: Sequence[tuple[int, int]], lease: float) -> frozenset[int]:
        """Renew leases; return the seqs whose lease was lost."""
        return self._lost(
            connection, self.extend_sql, [Settlement(seq, claims, "release", lease) for seq, claims in held]
        )

    def _lost(self, connection: Connection, template: str, settlements: Sequence[Settlement]) -> frozenset[int]:
        kept = self.tell(connection, template, settlements) if settlements else ()
        return frozenset(one.seq for one in settlements).difference(kept)

    def announce(self, connection: Connection, interests: Sequence[Interest]) -> None:
        """Write interests with the time."""
        if interests:
            self.write_interests(connection, interests)
        for one in interests:
            self._wanted[one.type] = self._wanted.get(one.type, frozenset()) | {one.name}
        self._looked = float("-inf")

    def rename(self, connection: Connection, old: str, new: str, batch: int) -> bool:
        """Move a batch of waiting and dead entries to a recipient's new name; True if there may be more."""
        self._leave(connection, old)
        seqs = self.seqs(connection, OF, name=old, limit=batch)
        if seqs:
            twice = self.seqs(connection, TWICE, new=new, seqs=seqs)
            others = sorted(set(seqs).difference(twice))
            if others:
                self.run(connection, MOVE, name=old, new=new, seqs=others)
            if twice:
                self.run(connection, DROP, name=old, seqs=sorted(twice))
        return bool(seqs)

    def forget(self, connection: Connection, name: str, batch: int) -> int:
        """Drop a recipient's interests and make a batch of its waiting entries dead; return how many."""
        self._leave(connection, name)
        seqs = self.seqs(connection, OF_WAITING, name=name, limit=batch)
        return self.run(connection, ORPHAN, seqs=sorted(seqs)).rowcount if seqs else 0

    def _leave(self, connection: Connection, name: str) -> None:
        self.run(connection, LEAVE, name=name)
        self._looked = float("-inf")

    def some(self, connection: Connection, template: str, limit: int, **values: Any) -> list[int]:
        """Return rows that a statement finds across all recipients, but for those that somebody has locked."""
        return self.seqs(connection, template + self.skip_sql, limit=limit, **values)

    def due(self, connection: Connection, recipients: Iterable[str]) -> dict[str, float]:
        """Return for each recipient with waiting entries the seconds until its first can be claimed."""
        found = {name: self._first(connection, name) for name in recipients}
        return {name: wait / 1000 for name, wait in found.items() if wait is not None}

    def _first(self, connection: Connection, name: str) -> int | None:
        first: int | None = self.run(connection, FIRST, name=name).scalar()
        if first is not None and first <= 0:
            return first
        if self.run(connection, ORDERED, name=name).scalar() == 0:
            laned: int | None = self.run(connection, FIRST_LANED, name=name).scalar()
        else:
            laned = self.first_heads(connection, name)
        return min((wait for wait in (first, laned) if wait is not None), default=None)

    def backlog(self, connection: Connection) -> list[Backlog]:
        """Count what waits, leased entries included, and what is dead, per recipient."""
        seen: dict[str, int] = {row[0]: row[1] for row in self.run(connection, SEEN)}
        dead: dict[str, int] = {row[0]: row[1] for row in self.run(connection, DIED)}
        waiting: dict[str, tuple[int, int]] = {name: (count, age) for name, count, age in self.run(connection, COUNTS)}
        found: list[Backlog] = []
        for name in sorted({*seen, *dead, *waiting}):
            count, age = waiting.get(name, (0, -1))
            oldest = age / 1000 if age >= 0 else None
            found.append(Backlog(name, count, dead.get(name, 0), oldest, seen.get(name, DAY + 1) <= DAY))
        return found

    def dead(self, connection: Connection, chosen: DeadFilter) -> list[DeadEntry]:
        """Return chosen dead entries, those first that died first."""
        return [
            DeadEntry(f"{died}-{seq}", id_, type_, name, failures, error or "", _time(died), bytes(body or b""))
            for died, seq, id_, type_, name, failures, error, body in self._chosen(connection, SHOWN, chosen)
        ]

    def replay(self, connection: Connection, chosen: DeadFilter) -> Mapping[str, int]:
        """Make chosen dead entries due; return how many per recipient."""
        return self._raise(connection, REPLAY, chosen)

    def discard(self, connection: Connection, chosen: DeadFilter) -> int:
        """Forget chosen dead entries but for their ids; return how many."""
        return self._raise(connection, DISCARD, chosen).total()

    def _raise(self, connection: Connection, template: str, chosen: DeadFilter) -> Counter[str]:
        seqs = sorted(seq for _, seq in self._chosen(connection, "due_at, seq", chosen))
        raised: Counter[str] = Counter()
        for start in range(0, len(seqs), BATCH):
            batch = seqs[start : start + BATCH]
            dead = self.run(connection, DEAD + self.lock_sql, seqs=batch).all()
            if dead:
                self.run(connection, template, seqs=[seq for seq, _ in dead])
                raised.update(name for _, name in dead)
        return raised

    def _chosen(self, connection: Connection, columns: str, chosen: DeadFilter) -> Sequence[Any]:
        terms, values = ["state = 2"], dict[str, Any]()
        plain: dict[str, tuple[str, Any]] = {
            "handler": ("recipient = :handler", chosen.handler),
            "message": ("type = :message", chosen.message),
            "since": ("due_at >= :since", None if chosen.since is None else round(chosen.since.timestamp() * 1000)),
            "error": (self.find_sql, chosen.error),
        }
        for name, (term, value) in plain.items():
            if value is not None:
                terms.append(term)
                values[name] = value
        places: set[tuple[int, int]] | None = None
        if chosen.ids is not None:
            places = {place for place in map(place_of, chosen.ids) if place}
            terms.append("seq IN :seqs")
            values["seqs"] = [seq for _, seq in places]
        if chosen.after is not None:
            terms.append("(due_at > :died OR (due_at = :died AND seq > :after))")
            values["died"], values["after"] = place_of(chosen.after) or (END, 0)
        sql = f"SELECT {columns} FROM eventbus_entry WHERE {' AND '.join(terms)} ORDER BY due_at, seq"
        if places is None and chosen.limit is not None:
            sql += " LIMIT :limit"
            values["limit"] = chosen.limit
        rows = self.run(connection, sql, **values).all()
        if places is not None:
            rows = [row for row in rows if (row.due_at, row.seq) in places][: chosen.limit]
        return rows

    def seqs(self, connection: Connection, template: str, **values: Any) -> list[int]:
        """Return the first column of what a statement finds."""
        return list(self.run(connection, template, **values).scalars())


def _typed(sql: str) -> TextClause:
    """Return a statement with the types of its binds."""
    names = dict.fromkeys(BIND.findall(sql))
    return text(sql).bindparams(
        *(bindparam(name, type_=TYPES.get(name.rstrip(DIGITS), String()), expanding=name in LISTS) for name in names)
    )


def entries(rows: Iterable[Sequence[Any]]) -> list[Entry]:
    """Return rows of the columns ``CLAIMED`` as entries, in the order of their writing."""
    found: list[Entry] = []
    for row in rows:
        seq, claims, failures, id_, name, type_, lane, crashes, body = row[:9]
        found.append(Entry(seq, claims, failures, id_, name, type_, lane, crashes, bytes(body or b"")))
    return sorted(found, key=lambda entry: entry.seq)


def milliseconds(seconds: float) -> int:
    """Return seconds as the database counts them."""
    return round(seconds * 1000)


def words(one: Settlement) -> tuple[str, int, str | None, int]:
    """Return what a settlement says, as ``SETTLED`` wants it: outcome, wait, reason, blocks."""
    wait = milliseconds(one.after) if one.outcome in ("again", "release") else 0
    return one.outcome, wait, _clean(one.error), int(one.blocks)


def _clean(error: str | None) -> str | None:
    """Return a text as every database can keep it."""
    return error and error.encode(errors="backslashreplace").decode().replace("\0", "\\x00")


def _time(milliseconds: int) -> datetime:
    return datetime.fromtimestamp(milliseconds / 1000, UTC)
