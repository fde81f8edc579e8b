"""Do with bare sqlite3 the least that is as safe: what the SQLite store is measured against."""

import queue
import sqlite3
from asyncio import Future, get_running_loop, to_thread
from pathlib import Path
from threading import Thread
from time import perf_counter
from typing import Self

from benchmarks.measure import quiet_gc

__all__ = ("GroupCommit", "lease_and_delete")

BODY = b'{"specversion":"1.0","type":"bench.told","data":{"number":1,"customer":"customer-1","sku":"bolt"}}' * 3
LEAN = "CREATE TABLE entry (id INTEGER PRIMARY KEY, due INTEGER NOT NULL, claims INTEGER NOT NULL, body BLOB NOT NULL)"
FULL = """
CREATE TABLE entry (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, message_id TEXT NOT NULL, recipient TEXT NOT NULL, type TEXT NOT NULL,
    lane TEXT, state INTEGER NOT NULL, due_at INTEGER NOT NULL, claims INTEGER NOT NULL DEFAULT 0,
    failures INTEGER NOT NULL DEFAULT 0, heard INTEGER NOT NULL DEFAULT 0, owner TEXT, error TEXT, body BLOB);
CREATE UNIQUE INDEX once ON entry (message_id, recipient);
CREATE INDEX due ON entry (recipient, due_at) WHERE state = 0 AND lane IS NULL;
CREATE INDEX lane ON entry (recipient, lane, seq, state, due_at) WHERE lane IS NOT NULL;
CREATE INDEX owned ON entry (due_at) WHERE state = 0 AND owner IS NOT NULL;
CREATE INDEX dead ON entry (recipient, due_at) WHERE state = 2;
CREATE INDEX over ON entry (due_at) WHERE state IN (1, 3);
"""
INSERT_LEAN = "INSERT INTO entry (due, claims, body) VALUES (0, 0, ?)"
INSERT_FULL = "INSERT INTO entry (message_id, recipient, type, state, due_at, body) VALUES (?, ?, ?, 0, 0, ?)"
LEASE = """UPDATE entry SET due = 1, claims = claims + 1
    WHERE id IN (SELECT id FROM entry WHERE due = 0 ORDER BY id LIMIT ?) RETURNING id, body"""


def connect(path: Path, synchronous: str) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute(f"PRAGMA synchronous = {synchronous}")
    return connection


class GroupCommit:
    """Write rows in one thread, those that wait at the same moment in one transaction."""

    def __init__(self, path: Path, synchronous: str, *, indexes: bool) -> None:
        self._path = path
        self._synchronous = synchronous
        self._indexes = indexes
        self._queue: queue.SimpleQueue[tuple[int, Future[None]] | None] = queue.SimpleQueue()
        self._loop = get_running_loop()
        self._thread = Thread(target=self._run)
        self._last = 0

    async def __aenter__(self) -> Self:
        self._thread.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._queue.put(None)
        await to_thread(self._thread.join)

    async def add(self, _: int) -> None:
        """Return when one more row is committed."""
        self._last += 1
        answer = self._loop.create_future()
        self._queue.put((self._last, answer))
        await answer

    def _run(self) -> None:
        connection = connect(self._path, self._synchronous)
        connection.executescript(FULL if self._indexes else LEAN)
        while (first := self._queue.get()) is not None:
            waiting = [first]
            while not self._queue.empty() and (one := self._queue.get()) is not None:
                waiting.append(one)
            connection.execute("BEGIN IMMEDIATE")
            for number, _ in waiting:
                if self._indexes:
                    connection.execute(INSERT_FULL, (f"{number:036}", "bench/bench.take", "bench.told", BODY))
                else:
                    connection.execute(INSERT_LEAN, (BODY,))
            connection.execute("COMMIT")
            self._loop.call_soon_threadsafe(_answer, [answer for _, answer in waiting])
        connection.close()


def _answer(waiting: list[Future[None]]) -> None:
    for answer in waiting:
        answer.set_result(None)


async def lease_and_delete(path: Path, synchronous: str, count: int, batch: int) -> float:
    """Return the seconds of one row: leased with others, given to a function that does nothing, and deleted."""
    connection = connect(path, synchronous)
    connection.executescript(f"{LEAN}; CREATE INDEX due ON entry (due, id);")
    connection.execute("BEGIN")
    connection.executemany(INSERT_LEAN, [(BODY,)] * count)
    connection.execute("COMMIT")
    with quiet_gc():
        start = perf_counter()
        while leased := connection.execute(LEASE, (batch,)).fetchall():
            for _, body in leased:
                await _take(body)
            connection.execute("BEGIN IMMEDIATE")
            connection.executemany("DELETE FROM entry WHERE id = ?", [(row[0],) for row in leased])
            connection.execute("COMMIT")
        taken = perf_counter() - start
    connection.close()
    return taken / count


async def _take(_: bytes) -> None:
    pass
