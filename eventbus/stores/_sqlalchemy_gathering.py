"""Write what many tasks add at the same moment in one statement, which is one commit."""

import contextlib
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

import anyio
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError

from eventbus.store import NewEntry
from eventbus.stores._sqlalchemy_link import Link

__all__ = ("Gathering",)

FLIGHTS = 2
"""Statements at once, so that the next is on its way while one is committed."""
SLOW = 0.05
MOST = 8
"""Statements at once when nothing has come back for so many seconds: those may wait for somebody's lock."""
ENTRIES = 256
BYTES = 1 << 20
"""What one statement carries; a single addition may be more."""


class _Ticket:
    """Be one addition on its way."""

    __slots__ = ("alone", "entries", "error", "over", "written")

    def __init__(self, entries: Sequence[NewEntry]) -> None:
        self.entries = entries
        self.alone = False
        """Whether it was in a statement that failed, and is not to spoil another."""
        self.over = anyio.Event()
        self.written: frozenset[str] = frozenset()
        self.error: BaseException | None = None

    @property
    def size(self) -> int:
        """Return how many bytes its bodies have."""
        return sum(len(entry.body) for entry in self.entries)


class Gathering:
    """Add entries; what comes while statements are on their way goes with the next."""

    def __init__(self, link: Link, add: Callable[..., frozenset[str]]) -> None:
        self._link = link
        self._add = add
        self._waiting: deque[_Ticket] = deque()
        self._flights = 0
        self._moved = time.monotonic()
        """When a statement was sent or came back last."""

    async def add(self, entries: Sequence[NewEntry]) -> frozenset[str]:
        """Return when entries are committed, with the recipients of all that were written together.

        One whose caller is cancelled is not written if it still waits, and written to its end otherwise.
        """
        ticket = _Ticket(entries)
        self._waiting.append(ticket)
        self._next()
        try:
            await ticket.over.wait()
        finally:
            with contextlib.suppress(ValueError):
                self._waiting.remove(ticket)
        if ticket.error is not None:
            raise ticket.error
        return ticket.written

    def _next(self) -> None:
        while self._waiting and self._flights < (FLIGHTS if time.monotonic() - self._moved < SLOW else MOST):
            taken = self._take()
            self._moved = time.monotonic()
            entries = [entry for ticket in taken for entry in ticket.entries]
            self._flights += 1
            try:
                self._link.launch(partial(self._add, entries=entries), partial(self._landed, taken))
            except Exception as error:
                self._landed(taken, None, error)

    def _take(self) -> list[_Ticket]:
        taken = [self._waiting.popleft()]
        count, size = len(taken[0].entries), taken[0].size
        while self._waiting and not (taken[0].alone or self._waiting[0].alone):
            count, size = count + len(self._waiting[0].entries), size + self._waiting[0].size
            if count > ENTRIES or size > BYTES:
                break
            taken.append(self._waiting.popleft())
        return taken

    def _landed(self, taken: Sequence[_Ticket], written: frozenset[str] | None, error: BaseException | None) -> None:
        self._flights -= 1
        self._moved = time.monotonic()
        if error is not None and len(taken) > 1 and _is_about_data(error):
            for ticket in reversed(taken):
                ticket.alone = True
                self._waiting.appendleft(ticket)
        else:
            for ticket in taken:
                ticket.written, ticket.error = written or frozenset(), error
                ticket.over.set()
        self._next()


def _is_about_data(error: BaseException) -> bool:
    """Tell whether a statement may have failed because of what one addition had in it, and not because of the link."""
    cause = error.__cause__ or error
    if isinstance(cause, DBAPIError):
        return not (cause.connection_invalidated or isinstance(cause, (OperationalError, InterfaceError)))
    return not isinstance(cause, (OSError, TimeoutError))
