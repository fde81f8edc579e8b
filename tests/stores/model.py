"""Be a store in the simplest way there is: one list of rows, looked through from the beginning every time."""

from collections.abc import Iterator
from dataclasses import dataclass

from eventbus.store import Recipient

LEASE = 30.0
RETENTION = 100.0


@dataclass
class Row:
    """Be one entry."""

    id: str
    recipient: str
    lane: str | None
    due: float
    state: str = "ready"
    claims: int = 0
    failures: int = 0
    heard: int = 0
    owned: bool = False
    error: str = ""


class Model:
    """Predict what a store answers."""

    def __init__(self) -> None:
        self.now = 0.0
        self.rows: list[Row] = []
        self.wanted: dict[str, Recipient] = {}

    def add(self, id: str, key: str | None, delay: float) -> set[str]:
        """Write a message; return the recipients written to."""
        written: set[str] = set()
        for recipient in self.wanted.values():
            if not any(row.id == id and row.recipient == recipient.name for row in self.rows):
                lane = key if recipient.ordered and not delay else None
                self.rows.append(Row(id, recipient.name, lane, self.now + delay))
                written.add(recipient.name)
        return written

    def claimable(self, recipient: Recipient) -> Iterator[Row]:
        """Yield the rows that a claim may bring whenever they are due."""
        lanes: set[str] = set()
        for row in self.rows:
            if row.recipient != recipient.name:
                continue
            first = row.lane is None or row.lane not in lanes
            if row.lane is not None and recipient.ordered:
                lanes.add(row.lane)
            if row.state == "ready" and first:
                yield row

    def due(self, recipient: Recipient) -> list[Row]:
        """Return the rows that a claim may bring now."""
        return [row for row in self.claimable(recipient) if row.due <= self.now]

    def row(self, id: str, recipient: str) -> Row:
        """Return a row."""
        (row,) = (row for row in self.rows if (row.id, row.recipient) == (id, recipient))
        return row

    def claim(self, row: Row) -> int:
        """Lease a row; return how many crashes it has behind it."""
        row.claims += 1
        row.due = self.now + LEASE
        row.owned = True
        return row.claims - row.heard - 1

    def held(self, id: str, recipient: str, claims: int) -> Row | None:
        """Return the row of a claim, if it still holds."""
        for row in self.rows:
            if (row.id, row.recipient, row.claims) == (id, recipient, claims):
                return row if row.state == "ready" and row.owned else None
        return None

    def settle(self, row: Row, outcome: str, after: float, blocks: bool) -> None:
        """Write a settlement of a claim that holds."""
        row.owned = False
        row.heard = row.claims
        row.due = self.now + (after if outcome in {"again", "release"} else 0.0)
        row.failures += outcome in {"again", "dead"}
        if outcome == "done" or (outcome == "dead" and not blocks):
            row.lane = None
        if outcome in {"done", "dead"}:
            row.state = outcome
            row.error = "boom" if outcome == "dead" else ""

    def replay(self, row: Row) -> None:
        """Make a dead row due."""
        row.state, row.due, row.failures = "ready", self.now, 0
        row.claims += 1
        row.heard = row.claims

    def discard(self, row: Row) -> None:
        """Forget a dead row but for its id."""
        row.state, row.due, row.lane = "discarded", self.now, None

    def forget(self, recipient: str) -> int:
        """Drop a recipient and let die what it has."""
        self.wanted.pop(recipient, None)
        waiting = [row for row in self.rows if row.recipient == recipient and row.state == "ready"]
        for row in waiting:
            row.state, row.due, row.lane, row.owned, row.error = "dead", self.now, None, False, "no handler"
            row.claims += 1
            row.heard = row.claims
        return len(waiting)

    def sweep(self) -> int:
        """Prune what has been over for longer than the retention."""
        before = len(self.rows)
        over = {"done", "discarded"}
        self.rows = [row for row in self.rows if row.state not in over or row.due >= self.now - RETENTION]
        return before - len(self.rows)

    def of(self, state: str) -> list[Row]:
        """Return the rows in a state."""
        return [row for row in self.rows if row.state == state]
