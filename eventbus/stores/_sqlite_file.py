"""Know one SQLite file: make it, open it, keep its schema, notice that it is gone, and name its errors."""

import contextlib
import os
import random
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

from eventbus.errors import StoreError, StoreFullError
from eventbus.limits import Limits

__all__ = ("File", "is_busy")

OWN_FAULT = {1, 18, 19, 20, 25}
"""SQLITE_ERROR, TOOBIG, CONSTRAINT, MISMATCH, RANGE: the statement is wrong, not the store."""
BUSY = {5, 6}
"""SQLITE_BUSY, SQLITE_LOCKED."""

MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """CREATE TABLE eventbus_entry (
            seq INTEGER PRIMARY KEY AUTOINCREMENT,
            message_id TEXT NOT NULL,
            recipient TEXT NOT NULL,
            type TEXT NOT NULL,
            lane TEXT,
            state INTEGER NOT NULL,
            due_at INTEGER NOT NULL,
            claims INTEGER NOT NULL DEFAULT 0,
            failures INTEGER NOT NULL DEFAULT 0,
            heard INTEGER NOT NULL DEFAULT 0,
            owner TEXT,
            error TEXT,
            body BLOB)""",
        "CREATE UNIQUE INDEX eventbus_entry_once ON eventbus_entry (message_id, recipient)",
        "CREATE INDEX eventbus_entry_due ON eventbus_entry (recipient, due_at) WHERE state = 0 AND lane IS NULL",
        """CREATE INDEX eventbus_entry_lane ON eventbus_entry (recipient, lane, seq, state, due_at)
            WHERE lane IS NOT NULL""",
        "CREATE INDEX eventbus_entry_owned ON eventbus_entry (due_at) WHERE state = 0 AND owner IS NOT NULL",
        "CREATE INDEX eventbus_entry_dead ON eventbus_entry (recipient, due_at) WHERE state = 2",
        "CREATE INDEX eventbus_entry_over ON eventbus_entry (due_at) WHERE state IN (1, 3)",
        """CREATE TABLE eventbus_subscription (
            name TEXT NOT NULL,
            type TEXT NOT NULL,
            ordered INTEGER NOT NULL,
            last_seen INTEGER NOT NULL,
            PRIMARY KEY (name, type)) WITHOUT ROWID""",
    ),
)
"""The statements of each version of the schema after the one before; states: 0 ready, 1 done, 2 dead, 3 discarded."""


class File:
    """Know one database file: make it, open it, notice that it is gone, and name its errors."""

    def __init__(self, path: Path, synchronous: str, limits: Limits) -> None:
        self.path = path
        self.limits = limits
        self._synchronous = synchronous
        self._identity: tuple[int, int] | None = None

    def make(self) -> None:
        """Create the file for its owner only, unless it is there. Raises ``StoreError`` for a symbolic link."""
        for suffix in ("", "-wal", "-shm"):
            if Path(f"{self.path}{suffix}").is_symlink():
                raise StoreError(f"{self.path}{suffix} is a symbolic link: name the file itself")
        # a file that is there is not opened here: closing it would drop the locks of this process's connections to it
        if not self.path.exists():
            with contextlib.suppress(FileExistsError):
                os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))

    def open(self) -> sqlite3.Connection:
        """Open a connection for this thread and bring the schema up to date."""
        self.make()
        if sqlite3.sqlite_version_info < (3, 35):
            raise StoreError(f"SQLite {sqlite3.sqlite_version} is too old: this store needs 3.35")
        source = f"{self.path.as_uri()}?mode=rw"
        connection = sqlite3.connect(source, uri=True, timeout=0.05, isolation_level=None, cached_statements=256)
        try:
            self.patiently(lambda: connection.execute("PRAGMA journal_mode = WAL"))
            connection.execute(f"PRAGMA synchronous = {self._synchronous}")
            connection.execute("PRAGMA journal_size_limit = 67108864")
            self.patiently(lambda: upgrade(connection, str(self.path)))
        except BaseException:
            connection.close()
            raise
        found = self.path.stat()
        self._identity = (found.st_dev, found.st_ino)
        return connection

    def check(self) -> None:
        """Raise ``StoreError`` if the file was deleted or replaced under the running store."""
        try:
            found = os.stat(self.path)  # noqa: PTH116 - asked at every commit, and a Path is slower
        except OSError as error:
            raise StoreError(f"{self.path} is gone under the running store ({error.strerror}): put it back") from error
        if (found.st_dev, found.st_ino) != self._identity:
            raise StoreError(f"{self.path} was replaced under the running store: put it back, or start again")

    def patiently(self, step: Callable[[], object], stopping: Callable[[], bool] = lambda: False) -> None:
        """Repeat a step while another process has the file locked, for as long as a lease."""
        until = time.monotonic() + self.limits.lease
        while True:
            try:
                step()
            except sqlite3.OperationalError as error:
                if not is_busy(error) or stopping() or time.monotonic() > until:
                    raise
                time.sleep(random.uniform(0.001, 0.01))
            else:
                return

    def name(self, error: BaseException, *, own: bool = False) -> BaseException:
        """Return what an error is called outside; ``own``: it may be about a statement of the user's own."""
        if isinstance(error, OSError):
            named = StoreError(f"{self.path}: {error.strerror}")
        elif not isinstance(error, sqlite3.Error) or (own and _code(error) in OWN_FAULT):
            return error
        elif _code(error) == sqlite3.SQLITE_FULL:
            named = StoreFullError(f"{self.path}: {error}: make room; nothing that was confirmed is lost")
        elif is_busy(error):
            named = StoreError(f"{self.path}: another process has had it locked for {self.limits.lease:g} s")
        else:
            named = StoreError(f"{self.path}: {error}")
        named.__cause__ = error
        return named


def is_busy(error: BaseException) -> bool:
    """Tell whether another process is in the way."""
    return isinstance(error, sqlite3.Error) and _code(error) in BUSY


def _code(error: sqlite3.Error) -> int:
    """Return SQLite's primary code; errors that the module itself raises have none and are the caller's fault."""
    code: int = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR)
    return code & 0xFF


def upgrade(connection: sqlite3.Connection, path: str) -> None:
    """Bring the schema to this version. Raises ``StoreError`` for the schema of a newer eventbus."""
    if _version(connection, path) == len(MIGRATIONS):
        return
    connection.execute("BEGIN IMMEDIATE")
    try:
        for statements in MIGRATIONS[_version(connection, path) :]:
            for statement in statements:
                connection.execute(statement)
        connection.execute("CREATE TABLE IF NOT EXISTS eventbus_schema (version INTEGER NOT NULL)")
        connection.execute("DELETE FROM eventbus_schema")
        connection.execute("INSERT INTO eventbus_schema VALUES (?)", (len(MIGRATIONS),))
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _version(connection: sqlite3.Connection, path: str) -> int:
    if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'eventbus_schema'").fetchone():
        return 0
    version: int = connection.execute("SELECT version FROM eventbus_schema").fetchone()[0]
    if version > len(MIGRATIONS):
        raise StoreError(
            f"{path} has schema version {version}, and this eventbus knows versions up to {len(MIGRATIONS)}: "
            "install the eventbus that wrote it, or a newer one"
        )
    return version
