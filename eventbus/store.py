"""What the engine asks of a database that keeps entries.

One entry is one row per (message, recipient): waiting with a due time, leased, done, dead or discarded. ``claims``
grows by one with every claim and replay and is the fencing token: every write of a claimer names the ``claims`` it
was given, and hits no row once somebody else has claimed. Times are seconds here, integer milliseconds by the
store's own clock inside.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Generic, Literal, NamedTuple, Protocol, Self, TypeVar, runtime_checkable

from eventbus._extras import build
from eventbus._urls import split_url
from eventbus.clock import Clock
from eventbus.errors import StoreError, StoreFullError, TransactionClosedError
from eventbus.limits import Limits

__all__ = (
    "Backlog",
    "Claimed",
    "DeadEntry",
    "DeadFilter",
    "Entry",
    "Interest",
    "NewEntry",
    "Recipient",
    "Settlement",
    "Store",
    "StoreError",
    "StoreFullError",
    "Transaction",
    "Unit",
    "connect",
)

S = TypeVar("S")

SCHEMES: dict[str, str] = {
    "mariadb": "eventbus.stores.sqlalchemy:SQLAlchemyStore",
    "memory": "eventbus.stores.memory:MemoryStore",
    "mysql": "eventbus.stores.sqlalchemy:SQLAlchemyStore",
    "postgresql": "eventbus.stores.sqlalchemy:SQLAlchemyStore",
    "sqlite": "eventbus.stores.sqlite:SQLiteStore",
    "sqlite+aiosqlite": "eventbus.stores.sqlalchemy:SQLAlchemyStore",
    "sqlite+pysqlite": "eventbus.stores.sqlalchemy:SQLAlchemyStore",
}
"""URL scheme, or the part before its ``+driver`` -> "module:class"; the class is built by ``from_url``."""

GROUP = "eventbus.stores"
"""The entry-point group in which other packages offer schemes."""

DAY = 86_400_000
"""Milliseconds after which a recipient that nobody announced is silent."""
END = 1 << 62
"""Milliseconds that no clock shows, and the number of no entry."""


class Recipient(NamedTuple):
    """Name who gets an entry; an ``ordered`` one gets equal keys one after another."""

    name: str
    ordered: bool = False


class Interest(NamedTuple):
    """Announce that the handler ``name`` wants messages of ``type``."""

    name: str
    type: str
    ordered: bool = False


class NewEntry(NamedTuple):
    """Hold one message to be written: a row for every announced interest in ``type`` and for every recipient."""

    message_id: str
    type: str
    body: bytes
    key: str | None = None
    """Becomes the lane of ordered recipients, unless the message is delayed."""
    delay: float = 0.0
    """Seconds until it is due."""
    subscribers: bool = True
    """Whether announced interests get it (an ingested message goes to ``recipients`` only)."""
    recipients: tuple[Recipient, ...] = ()


class Entry(NamedTuple):
    """Hold one claimed row; ``(seq, claims)`` is the right to settle it."""

    seq: int
    claims: int
    failures: int
    message_id: str
    recipient: str
    type: str
    lane: str | None
    crashes: int
    """Earlier claims in a row that ended without a word (no settlement): the crash-loop guard looks at it."""
    body: bytes


class Claimed(NamedTuple):
    """Hold what a claim brought, and where the next scan of lanes goes on (``""``: from the beginning)."""

    entries: Sequence[Entry] = ()
    cursor: str = ""


class Settlement(NamedTuple):
    """Say what becomes of one claimed entry.

    ``done`` leaves it as the memory of a duplicate; ``again`` counts a failure and makes it due after ``after``
    seconds; ``release`` does the same without counting; ``dead`` keeps it among the dead with its error, and with
    ``blocks`` it stays at the head of its lane.
    """

    seq: int
    claims: int
    outcome: Literal["done", "again", "release", "dead"]
    after: float = 0.0
    error: str | None = None
    blocks: bool = False


@dataclass(frozen=True, slots=True)
class DeadEntry:
    """Show one dead message: which one, for which handler, after how many failures and why; frozen."""

    id: str
    message_id: str
    message: str
    handler: str
    failures: int
    error: str
    time: datetime
    body: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadFilter:
    """Choose dead entries; what is None does not choose."""

    ids: tuple[str, ...] | None = None
    message: str | None = None
    """The message's wire name."""
    handler: str | None = None
    """The recipient, ``<bus name>/<handler name>``."""
    since: datetime | None = None
    error: str | None = None
    """A part of the error text."""
    limit: int | None = 100
    after: str | None = None
    """The id of the last entry of the page before."""


class Backlog(NamedTuple):
    """Count what waits for one recipient."""

    recipient: str
    waiting: int
    dead: int
    oldest: float | None
    """Age in seconds of the oldest waiting entry that is due."""
    announced: bool
    """Whether anybody has announced this recipient within the last day."""


class Unit(Protocol):
    """Be one database transaction as the engine uses it."""

    @property
    def session(self) -> Any:
        """Return what a handler works with; making it may begin the transaction, looking at it costs nothing."""
        ...

    async def lock(self, seq: int, claims: int) -> bool:
        """Take the row lock of a claimed entry first of all; False if the lease is lost."""
        ...

    async def add(self, entries: Sequence[NewEntry]) -> frozenset[str]:
        """Write entries in this transaction; duplicates are ignored. Return the recipients written to."""
        ...

    def stands(self) -> Callable[[], bool]:
        """Return what tells later whether work done now has not been undone by a savepoint of the session's owner."""
        ...

    def watch(self, committed: Callable[[], object]) -> bool:
        """Call ``committed`` once the session's owner has committed; False if the end of this unit is the commit."""
        ...

    async def settle(self, settlement: Settlement) -> bool:
        """Write a settlement in this transaction; False if the lease is lost."""
        ...

    def savepoint(self) -> AbstractAsyncContextManager[None]:
        """Return a savepoint: rolled back on an exception, released otherwise."""
        ...


@runtime_checkable
class Store(Protocol):
    """Keep entries. Every verb but ``begin`` is a transaction of its own and is durable when it returns."""

    @property
    def shared(self) -> bool:
        """Tell whether other processes see this store."""
        ...

    @property
    def exclusive(self) -> bool:
        """Tell whether an open transaction keeps every other writer out, so that it must end well within a lease."""
        ...

    @property
    def sessions(self) -> tuple[type, ...]:
        """Return the types that ``Transaction[S]`` may name with this store."""
        ...

    def bind(self, clock: Clock | None) -> None:
        """Take times from ``clock`` instead of the store's own (tests); None goes back."""
        ...

    async def __aenter__(self) -> Self:
        """Open, and create or upgrade what is missing."""
        ...

    async def __aexit__(self, *exc: object) -> None:
        """Close; safe to repeat, and opening again works."""
        ...

    def begin(self, session: object | None = None) -> AbstractAsyncContextManager[Unit]:
        """Return a transaction: committed at the end, rolled back on an exception; ``session`` joins the caller's."""
        ...

    async def add(self, entries: Sequence[NewEntry]) -> frozenset[str]:
        """Write entries in a transaction of their own; duplicates are ignored. Return the recipients written to."""
        ...

    async def claim(self, recipient: Recipient, *, owner: str, limit: int, lease: float, cursor: str = "") -> Claimed:
        """Lease up to ``limit`` due entries; for an ordered recipient lane heads first, then rows without lane."""
        ...

    async def settle(self, settlements: Sequence[Settlement]) -> frozenset[int]:
        """Write many settlements; return the seqs whose lease was lost, which are left alone."""
        ...

    async def extend(self, held: Sequence[tuple[int, int]], lease: float) -> frozenset[int]:
        """Renew the lease of ``(seq, claims)`` pairs; return the seqs whose lease was lost."""
        ...

    async def announce(self, interests: Sequence[Interest], *, aliases: Sequence[tuple[str, str]] = ()) -> None:
        """Write interests with the time; move waiting and dead entries of ``(old, new)`` names to the new one."""
        ...

    async def forget(self, recipient: str) -> int:
        """Drop a recipient's interests and make its waiting entries dead ("no handler"); return how many."""
        ...

    async def due(self, recipients: Sequence[str]) -> dict[str, float]:
        """Return for each recipient with waiting entries the seconds until its first is due (0 or less: now)."""
        ...

    async def sweep(self, *, retention: float, lease: float, batch: int) -> int:
        """Prune what is older than ``retention``, and mend what a clock that jumped has done; return how many rows.

        Leases that end later than two from now, and than an hour, are freed: other processes may have longer ones.
        When the clock was set back (``eventbus.clock.Setback`` notices), all later than two from now are, and what was
        due before, or within a lease of it, is due now.
        """
        ...

    async def backlog(self) -> Sequence[Backlog]:
        """Count what waits and what is dead, per recipient."""
        ...

    async def dead(self, chosen: DeadFilter) -> Sequence[DeadEntry]:
        """Return chosen dead entries, oldest first."""
        ...

    async def replay(self, chosen: DeadFilter) -> Mapping[str, int]:
        """Make chosen dead entries due now, failures forgotten; return how many per recipient."""
        ...

    async def discard(self, chosen: DeadFilter) -> int:
        """Forget chosen dead entries but for their ids; return how many."""
        ...

    async def listen(self, wake: Callable[[], None]) -> None:
        """Call ``wake`` when another process may have written, until cancelled; a store that cannot just waits."""
        ...


class Transaction(Generic[S]):
    """Be the open transaction, injected into handlers and dependencies that ask for ``Transaction[S]``.

    ``session`` is the store's session: what is done on it, what is published meanwhile and the handler's own "done"
    are committed together by whoever opened the transaction.
    """

    __slots__ = ("_unit", "closed", "committed", "touched")

    def __init__(self, unit: Unit) -> None:
        self._unit = unit
        self.closed = False
        self.committed = False
        self.touched: set[str] = set()

    @property
    def session(self) -> S:
        """Return the store's session. Raises ``TransactionClosedError`` once the transaction is over."""
        if self.closed:
            raise TransactionClosedError("using its session")
        session: S = self._unit.session
        return session


def place_of(id: str) -> tuple[int, int] | None:
    """Return when in milliseconds, and which row, died by an id ``when-seq``; None for the id of something else."""
    died, dash, seq = id.partition("-")
    if dash and died.isascii() and died.isdigit() and seq.isascii() and seq.isdigit() and len(id) < 38:
        place = int(died), int(seq)
        return place if max(place) < END else None
    return None


def connect(url: str, limits: Limits | None = None) -> Store:
    """Return the store that a URL names, not opened yet.

    The scheme chooses the adapter, ours first, then the entry-point group ``eventbus.stores``; it is built by
    ``from_url(url, limits=limits)``. Raises ``ValueError`` for a scheme that nobody offers.

    >>> connect("memory://").shared
    False
    """
    named = split_url(url).scheme
    scheme = named if named in SCHEMES else named.partition("+")[0]
    built: Store = build("store", scheme, url, SCHEMES, GROUP, limits or Limits())
    return built
