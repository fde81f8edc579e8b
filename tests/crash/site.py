"""Where a crash happens: a store, the tables of its user beside it, and the oracle that counts what is left."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
from sqlalchemy import text
from sqlalchemy.orm import Session

from eventbus.stores.sqlite import SQLiteSession
from tests.servers.databases import execute, fetch
from tests.servers.server import Server

NUMBERED = {
    "sqlite": "INTEGER PRIMARY KEY AUTOINCREMENT",
    "postgresql": "BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY",
    "mariadb": "BIGINT AUTO_INCREMENT PRIMARY KEY",
}


@dataclass(frozen=True, slots=True)
class Site:
    """Say which store is used, and how its database is looked at from outside."""

    directory: Path
    store: str
    database: str
    """For SQLAlchemy's asynchronous engine."""
    server: Server | None = None

    @property
    def exclusive(self) -> bool:
        """Tell whether one writer keeps all others out."""
        return self.server is None

    def prepare(self) -> None:
        """Make the tables of the user."""
        numbered = NUMBERED[self.database.partition("+")[0]]
        execute(
            self.database,
            "CREATE TABLE made (number BIGINT PRIMARY KEY)",
            f"CREATE TABLE effects (id {numbered}, number BIGINT NOT NULL, lane VARCHAR(40), who VARCHAR(80))",
        )

    def rows(self, statement: str) -> list[tuple[Any, ...]]:
        """Return what a query finds."""
        return fetch(self.database, statement)

    def lines(self, name: str) -> list[list[str]]:
        """Return the words of every line of a file that the children wrote."""
        path = self.directory / name
        return [line.split() for line in path.read_text().splitlines()] if path.exists() else []

    def audit(self) -> "Ledger":
        """Read the database and the files, and count."""
        made = {number for (number,) in self.rows("SELECT number FROM made")}
        effects = Counter(number for (number,) in self.rows("SELECT number FROM effects"))
        states = self.rows("SELECT state FROM eventbus_entry")
        acked = {int(line[0]) for line in self.lines("acked.txt")}
        mails = Counter(int(line[0]) for line in self.lines("mail.txt"))
        return Ledger(
            made=len(made),
            lost=len(acked - made) + len(made - set(effects)),
            phantom=len(set(effects) - made) + len(set(mails) - made),
            torn=abs(len(states) - 2 * len(made)),
            doubled=sum(count - 1 for count in effects.values()),
            unmailed=len(made - set(mails)),
            repeated=sum(count - 1 for count in mails.values()),
            dead=sum(state == 2 for (state,) in states),
            unfenced=unfenced(self.lines("diary.txt")),
            inverted=inverted(self.rows("SELECT lane, number FROM effects ORDER BY id")),
            refused=len(self.lines("refused.txt")),
        )


@dataclass(frozen=True, slots=True)
class Ledger:
    """Count what is left after all kills."""

    made: int
    lost: int = 0
    phantom: int = 0
    torn: int = 0
    doubled: int = 0
    unmailed: int = 0
    repeated: int = 0
    dead: int = 0
    unfenced: int = 0
    """Rights that two were given, or that were given, or used, when it was all over."""
    inverted: int = 0
    refused: int = 0
    """Publishes that the store refused; their outcome may be unknown, but not torn."""


def unfenced(diary: Iterable[list[str]]) -> int:
    """Count rights that were not fenced; what a killed process could not write down is in nobody's favour."""
    claimed: Counter[tuple[int, int]] = Counter()
    done: dict[int, list[int]] = defaultdict(list)
    for word, seq, claims in diary:
        if word == "claimed":
            claimed[int(seq), int(claims)] += 1
        elif word == "done":
            done[int(seq)].append(int(claims))
    twice = sum(count - 1 for count in claimed.values())
    settled = sum(len(claims) - 1 for claims in done.values())
    late = sum(claims > min(done[seq]) for seq, claims in claimed if seq in done)
    return twice + settled + late


def inverted(effects: Iterable[tuple[str, int]]) -> int:
    """Count effects that came behind a later one of their lane."""
    last: dict[str, int] = {}
    count = 0
    for lane, number in effects:
        count += number < last.get(lane, number)
        last[lane] = max(number, last.get(lane, number))
    return count


async def run(session: Any, statement: str, **values: Any) -> None:
    """Run a statement on the session of either kind of store."""
    if isinstance(session, SQLiteSession):
        await session.execute(statement, values)
    elif isinstance(session, Session):
        await anyio.to_thread.run_sync(session.execute, text(statement), values)
    else:
        await session.execute(text(statement), values)


async def until(true: Callable[[], bool], seconds: float) -> None:
    """Ask the database until it is so."""
    with anyio.fail_after(seconds):
        while not await anyio.to_thread.run_sync(true):  # noqa: ASYNC110 - it is another process that changes
            await anyio.sleep(0.1)
