"""Be one entry in memory, and all that wait for one recipient."""

import heapq
import math
from bisect import insort
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime

from eventbus.store import END, DeadEntry, DeadFilter, Entry, NewEntry, place_of

__all__ = ("Box", "Row", "choose")


@dataclass(slots=True, eq=False)
class Row:
    """Be one entry."""

    seq: int
    new: NewEntry
    recipient: str
    lane: str | None
    due: int
    state: str = "ready"
    claims: int = 0
    failures: int = 0
    heard: int = 0
    owner: str | None = None
    error: str | None = None
    locked: bool = False

    @property
    def id(self) -> str:
        """Return its id among the dead: when it died, and which it is."""
        return f"{self.due}-{self.seq}"

    def as_entry(self) -> Entry:
        """Return what its claimer gets."""
        new, crashes = self.new, self.claims - self.heard - 1
        who = (new.message_id, self.recipient, new.type, self.lane)
        return Entry(self.seq, self.claims, self.failures, *who, crashes, new.body)

    def as_dead(self) -> DeadEntry:
        """Return what is shown of it among the dead."""
        new, died = self.new, datetime.fromtimestamp(self.due / 1000, UTC)
        who = (new.message_id, new.type, self.recipient)
        return DeadEntry(self.id, *who, self.failures, self.error or "", died, new.body)


def choose(dead: Iterable[Row], chosen: DeadFilter) -> list[Row]:
    """Return the chosen among the dead, those first that died first."""
    since = -math.inf if chosen.since is None else round(chosen.since.timestamp() * 1000)
    ids = None if chosen.ids is None else set(chosen.ids)
    after = (-math.inf, 0) if chosen.after is None else place_of(chosen.after) or (END, 0)
    found = [
        row
        for row in sorted(dead, key=lambda row: (row.due, row.seq))
        if chosen.message in (None, row.new.type)
        and chosen.handler in (None, row.recipient)
        and row.due >= since
        and (chosen.error is None or chosen.error in (row.error or ""))
        and (ids is None or row.id in ids)
        and (row.due, row.seq) > after
    ]
    return found[: chosen.limit]


class Box:
    """Hold the rows of one recipient that wait, and the heap of those that may be claimed once they are due."""

    def __init__(self) -> None:
        self.rows: dict[int, Row] = {}
        self.lanes: dict[str, list[int]] = {}
        self._heap: list[tuple[int, int]] = []

    def put(self, row: Row) -> None:
        """Take a row in, or note that its due time has changed."""
        if row.seq not in self.rows:
            self.line_up(row)
            self.rows[row.seq] = row
        if self._is_next(row.due, row.seq):
            heapq.heappush(self._heap, (row.due, row.seq))
        if len(self._heap) > 2 * len(self.rows) + 64:
            self._heap = sorted({one for one in self._heap if self._is_next(*one)})

    def line_up(self, row: Row) -> None:
        """Give a row its place in its lane."""
        if row.lane is not None:
            lane = self.lanes.setdefault(row.lane, [])
            if not lane or lane[-1] < row.seq:
                lane.append(row.seq)
            elif row.seq not in lane:
                insort(lane, row.seq)

    def drop(self, row: Row, *, blocks: bool = False) -> None:
        """Let a row go; unless it ``blocks`` its lane, the next one comes to the head."""
        self.rows.pop(row.seq, None)
        if row.lane is None or blocks:
            return
        lane = self.lanes.get(row.lane, [])
        if row.seq in lane:
            lane.remove(row.seq)
        if not lane:
            self.lanes.pop(row.lane, None)
        elif lane[0] in self.rows:
            self.put(self.rows[lane[0]])
        row.lane = None

    def unlane(self) -> None:
        """Make every row one without lane, because the recipient is not ordered (any more)."""
        self.lanes = {}
        for row in self.rows.values():
            row.lane = None
            self.put(row)

    def first(self) -> Row | None:
        """Return what can be claimed first."""
        while self._heap and not self._is_next(*self._heap[0]):
            heapq.heappop(self._heap)
        return self.rows[self._heap[0][1]] if self._heap else None

    def take(self, now: int, limit: int) -> list[Row]:
        """Take what is due and not locked."""
        taken: dict[int, Row] = {}
        locked: list[Row] = []
        while len(taken) < limit and (row := self.first()) is not None and row.due <= now:
            heapq.heappop(self._heap)
            if row.locked:
                locked.append(row)
            else:
                taken[row.seq] = row
        for row in locked:
            heapq.heappush(self._heap, (row.due, row.seq))
        return list(taken.values())

    def _is_next(self, due: int, seq: int) -> bool:
        row = self.rows.get(seq)
        return row is not None and row.due == due and (row.lane is None or self.lanes[row.lane][0] == seq)
