"""Be one transaction of the SQLite store, and the session that a handler works with in it."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, Self

from eventbus.errors import TransactionClosedError
from eventbus.store import NewEntry, Settlement
from eventbus.stores._sqlite_line import Hold, Job, Line, Verb
from eventbus.stores._sqlite_rows import Rows

__all__ = ("SQLiteSession", "SQLiteUnit")

Parameters = Sequence[Any] | Mapping[str, Any]
Step = Callable[[Rows, int], object]

OURS = frozenset({"ATTACH", "BEGIN", "COMMIT", "DETACH", "END", "PRAGMA", "RELEASE", "ROLLBACK", "SAVEPOINT", "VACUUM"})
"""Statements that would take the transaction, or the file, out of the store's hands."""
FIRST_WORD = re.compile(r"(?:\s|\ufeff|;|--[^\n]*(?:\n|\Z)|/\*.*?(?:\*/|\Z))*([a-z]*)", re.IGNORECASE | re.DOTALL)


class SQLiteSession:
    """Work in the open transaction of an ``SQLiteStore``: what ``Transaction[SQLiteSession]`` gives a handler.

    The transaction begins with the first statement, and nobody else writes to the file until it ends. Statements that
    would end it raise ``ValueError``, every statement after its end raises ``TransactionClosedError``, and what SQLite
    has against a statement arrives unchanged (``sqlite3.IntegrityError``).

    >>> await tx.session.execute("INSERT INTO stock VALUES (?, ?)", ("bolt", 7))  # doctest: +SKIP
    1
    """

    __slots__ = ("_run",)

    def __init__(self, run: Callable[[Verb[Any]], Any]) -> None:
        self._run = run

    async def execute(self, sql: str, params: Parameters = ()) -> int:
        """Run one statement; return how many rows it changed (-1: it was no change)."""
        _check(sql)
        changed: int = await self._run(lambda rows, now: rows.connection.execute(sql, params).rowcount)
        return changed

    async def executemany(self, sql: str, many: Iterable[Parameters]) -> int:
        """Run one statement for each set of parameters; return how many rows they changed."""
        _check(sql)
        listed = list(many)
        changed: int = await self._run(lambda rows, now: rows.connection.executemany(sql, listed).rowcount)
        return changed

    async def fetchall(self, sql: str, params: Parameters = ()) -> list[tuple[Any, ...]]:
        """Return all rows that a statement gives."""
        _check(sql)
        rows: list[tuple[Any, ...]] = await self._run(lambda rows, now: rows.connection.execute(sql, params).fetchall())
        return rows

    async def fetchone(self, sql: str, params: Parameters = ()) -> tuple[Any, ...] | None:
        """Return the first row that a statement gives, or None."""
        found = await self.fetchall(sql, params)
        return found[0] if found else None


def _check(sql: str) -> None:
    found = FIRST_WORD.match(sql)
    word = found[1].upper() if found else ""
    if word in OURS:
        raise ValueError(f"{word} is not for a session: the transaction is ended by whoever opened it")


class Savepoint:
    """Be one savepoint of a unit; what is to be done for it waits for the unit's next statement."""

    __slots__ = ("_unit", "made", "mark", "name")

    def __init__(self, unit: "SQLiteUnit") -> None:
        self._unit = unit
        self.name = ""
        self.mark = 0
        self.made = False

    async def __aenter__(self) -> None:
        self._unit.enter(self)

    async def __aexit__(self, kind: object, error: object, trace: object) -> None:
        self._unit.leave(self, failed=kind is not None)

    def step(self, sql: str) -> Step:
        """Return what runs a statement about it."""
        return lambda rows, now: rows.connection.execute(f"{sql} {self.name}")

    def back(self, rows: Rows, now: int) -> None:
        """Undo all that was done since it was made."""
        rows.connection.execute(f"ROLLBACK TO {self.name}")
        rows.connection.execute(f"RELEASE {self.name}")
        rows.undone()


class SQLiteUnit:
    """Be one transaction: what is published in it waits here for its next statement, or for its end."""

    __slots__ = ("_closed", "_hold", "_line", "_now", "_savepoints", "_session", "_steps")

    def __init__(self, line: Line, now: Callable[[], int | None]) -> None:
        self._line = line
        self._now = now
        self._hold: Hold | None = None
        self._closed = False
        self._steps: list[Step] = []
        """What is to be done before the next statement."""
        self._savepoints: list[Savepoint] = []
        self._session: SQLiteSession | None = None

    @property
    def session(self) -> SQLiteSession:
        """Return what a handler works with."""
        if self._session is None:
            self._session = SQLiteSession(self._run)
        return self._session

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: object, error: object, trace: object) -> None:
        self._closed = True
        if self._hold is None:
            if kind is None and self._steps:
                await self._line.call(_one(self._steps), self._now())
            return
        try:
            if kind is None:
                end = Job(_one(self._steps), self._now(), part="end")
                self._hold.put(end)
                await end.wait()
        finally:
            self._line.let_go(self._hold)

    async def lock(self, seq: int, claims: int) -> bool:
        """Begin, and tell whether a claim still holds; it does until the end."""
        holds: bool = await self._run(partial(Rows.lock, seq=seq, claims=claims), "vital")
        return holds

    async def add(self, entries: Sequence[NewEntry]) -> frozenset[str]:
        """Write entries at the latest with the commit; return the recipients that may get something to do."""
        self._check_open("publishing")
        if entries:
            self._steps.append(partial(Rows.add, entries=tuple(entries)))
        return self._line.rows.recipients(entries)

    def stands(self) -> Callable[[], bool]:
        """Return yes: nobody but the unit makes savepoints here."""
        return lambda: True

    def watch(self, committed: Callable[[], object]) -> bool:
        """Return no: the end of this unit is the commit."""
        return False

    async def settle(self, settlement: Settlement) -> bool:
        """Write a settlement; False if the lease is lost."""
        lost: frozenset[int] = await self._run(partial(Rows.settle, settlements=(settlement,)), "vital")
        return not lost

    def savepoint(self) -> Savepoint:
        """Return a savepoint: rolled back on an exception, released otherwise."""
        return Savepoint(self)

    def enter(self, savepoint: Savepoint) -> None:
        """Begin a savepoint."""
        self._check_open("a savepoint")
        savepoint.name, savepoint.mark = f"unit{len(self._savepoints)}", len(self._steps)
        self._savepoints.append(savepoint)
        self._steps.append(savepoint.step("SAVEPOINT"))

    def leave(self, savepoint: Savepoint, *, failed: bool) -> None:
        """End a savepoint, and with it all that were begun in it."""
        if self._closed:
            return
        del self._savepoints[self._savepoints.index(savepoint) :]
        if not savepoint.made:
            del self._steps[savepoint.mark : None if failed else savepoint.mark + 1]
        elif failed:
            self._steps = [savepoint.back]
        else:
            self._steps.append(savepoint.step("RELEASE"))

    async def _run(self, verb: Verb[Any], part: Literal["own", "vital"] = "own") -> Any:
        self._check_open("using its session")
        self._line.check()
        if self._hold is None:
            self._hold = self._line.hold()
        self._put_steps(self._hold)
        job = Job(verb, self._now(), part=part)
        self._hold.put(job)
        return await job.wait()

    def _put_steps(self, hold: Hold) -> None:
        if self._steps:
            hold.put(Job(_one(self._steps), self._now()))
            self._steps = []
            for savepoint in self._savepoints:
                savepoint.made = True

    def _check_open(self, operation: str) -> None:
        if self._closed:
            raise TransactionClosedError(operation)


def _one(steps: Sequence[Step]) -> Step:
    """Return steps as one."""
    if len(steps) == 1:
        return steps[0]

    def run(rows: Rows, now: int) -> None:
        for step in steps:
            step(rows, now)

    return run
