"""Look at the dead, and replay or discard them: one door to every place that keeps some."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Protocol, TypedDict, runtime_checkable

from typing_extensions import Unpack

from eventbus.cloudevents import from_structured
from eventbus.errors import DecodeError
from eventbus.limits import Limits
from eventbus.message import spec_of
from eventbus.store import DeadEntry, DeadFilter

__all__ = ("Chosen", "DeadLetters", "Graveyard", "Named")


@runtime_checkable
class Graveyard(Protocol):
    """Keep dead entries: a store does, and the memory transport."""

    async def dead(self, chosen: DeadFilter) -> Sequence[DeadEntry]:
        """Return chosen dead entries, oldest first."""
        ...

    async def replay(self, chosen: DeadFilter) -> Mapping[str, int]:
        """Make chosen dead entries due now; return how many per recipient."""
        ...

    async def discard(self, chosen: DeadFilter) -> int:
        """Forget chosen dead entries; return how many."""
        ...


class Named:
    """Be a place of the dead beside the store: its name stands before each id, since all count alike."""

    def __init__(self, name: str, place: Graveyard) -> None:
        self._name = f"{name}:"
        self._place = place

    def owns(self, id: str) -> bool:
        """Tell whether an id is from here."""
        return id.startswith(self._name)

    async def dead(self, chosen: DeadFilter) -> Sequence[DeadEntry]:
        """Return chosen dead entries, oldest first."""
        return [replace(entry, id=self._name + entry.id) for entry in await self._place.dead(self._inner(chosen))]

    async def replay(self, chosen: DeadFilter) -> Mapping[str, int]:
        """Make chosen dead entries due now; return how many per recipient."""
        return await self._place.replay(self._inner(chosen))

    async def discard(self, chosen: DeadFilter) -> int:
        """Forget chosen dead entries; return how many."""
        return await self._place.discard(self._inner(chosen))

    def _inner(self, chosen: DeadFilter) -> DeadFilter:
        after = None if chosen.after is None else chosen.after.removeprefix(self._name)
        if chosen.ids is None:
            return replace(chosen, after=after)
        ours = (id.removeprefix(self._name) for id in chosen.ids if self.owns(id))
        return replace(chosen, ids=tuple(ours), after=after)


class Keeper(Protocol):
    """Know the places of the dead."""

    @property
    def owner(self) -> str:
        """Return what stands before a handler's name in stores and queues."""
        ...

    @property
    def limits(self) -> Limits:
        """Return the ceilings under which bodies are read."""
        ...

    def graveyards(self, change: str | None = None) -> Sequence[Graveyard]:
        """Return every place that keeps dead entries; raise ``TransactionOpenError`` if a ``change`` could not end."""
        ...

    def wake(self, recipients: frozenset[str] | None) -> None:
        """Let the worker look for what was replayed for some recipients; None: for anybody."""
        ...


class Chosen(TypedDict, total=False):
    """Name the filters that choose dead entries."""

    message: type | str | None
    handler: str | None
    since: datetime | None
    error: str | None


class DeadLetters:
    """Be ``bus.dead``: idempotent, and safe for two operators at once."""

    def __init__(self, keeper: Callable[[], Keeper]) -> None:
        self._keeper = keeper

    async def find(self, *, limit: int = 100, after: str | None = None, **filters: Unpack[Chosen]) -> list[DeadEntry]:
        """Return dead entries: those in the store, then those in memory, oldest first in each.

        Args:
            message: the message type or its wire name.
            handler: the handler's stable name, with or without the bus name before it.
            since: only what died at or after this time.
            error: a part of the error text.
            limit: how many at most.
            after: the id of the last entry of the page before.
        """
        if isinstance(limit, bool) or limit < 1:
            raise ValueError(f"find(limit=...) takes a whole number from 1, not {limit!r}")
        chosen = self._filter(None, filters, limit, after)
        found: list[DeadEntry] = []
        places = self._keeper().graveyards()
        if after is not None:
            first = next((place for place in places if isinstance(place, Named) and place.owns(after)), None)
            if first is None and (not places or isinstance(places[0], Named)):
                raise ValueError(f"find(after=...) takes the id of a dead entry, not {after!r}")
            places = places if first is None else places[places.index(first) :]
        for place in places:
            page = await place.dead(replace(chosen, limit=limit - len(found)))
            found.extend(self._shown(entry) for entry in page)
            if len(found) == limit:
                break
            chosen = replace(chosen, after=None)
        return found

    async def get(self, id: str) -> DeadEntry | None:
        """Return the dead entry of this id, or None if there is none (any more)."""
        for place in self._keeper().graveyards():
            for entry in await place.dead(DeadFilter(ids=(id,), limit=1)):
                return self._shown(entry)
        return None

    async def replay(self, *ids: str, **filters: Unpack[Chosen]) -> int:
        """Make dead messages due again with their failures forgotten; return how many.

        Raises ``ValueError`` when neither ids nor filters say which, and ``TransactionOpenError`` in a transaction of a
        store that has one writer at a time, such as SQLite.
        """
        chosen = self._filter(self._some(ids, filters, "replay"), filters, None, None)
        replayed: dict[str, int] = {}
        for place in self._keeper().graveyards("replay"):
            for recipient, number in (await place.replay(chosen)).items():
                replayed[recipient] = replayed.get(recipient, 0) + number
        self._keeper().wake(frozenset(replayed))
        return sum(replayed.values())

    async def discard(self, *ids: str, **filters: Unpack[Chosen]) -> int:
        """Forget dead messages for good; return how many.

        Raises as ``replay`` does.
        """
        chosen = self._filter(self._some(ids, filters, "discard"), filters, None, None)
        discarded = sum([await place.discard(chosen) for place in self._keeper().graveyards("discard")])
        if discarded:
            self._keeper().wake(None)  # what stood behind them, or below their ceiling, may come now
        return discarded

    def _some(self, ids: tuple[str, ...], filters: Chosen, verb: str) -> tuple[str, ...] | None:
        if not ids and not any(value is not None for value in filters.values()):
            raise ValueError(f"{verb}() needs ids or filters: say which, for all of a handler handler='orders.place'")
        return ids or None

    def _filter(self, ids: tuple[str, ...] | None, filters: Chosen, limit: int | None, after: str | None) -> DeadFilter:
        unknown = set(filters) - set(Chosen.__annotations__)
        if unknown:
            raise TypeError(f"dead entries are chosen by {', '.join(Chosen.__annotations__)}; not {sorted(unknown)}")
        message, handler, since = filters.get("message"), filters.get("handler"), filters.get("since")
        if since is not None and since.tzinfo is None:
            raise ValueError(f"since= takes a time with a zone, such as datetime.now(UTC), not {since!r}")
        return DeadFilter(
            ids=ids,
            message=spec_of(message).name if isinstance(message, type) else message,
            handler=handler
            if handler is None or "/" in handler or ">" in handler
            else f"{self._keeper().owner}/{handler}",
            since=since,
            error=filters.get("error"),
            limit=limit,
            after=after,
        )

    def _shown(self, entry: DeadEntry) -> DeadEntry:
        """Return an entry with the body of its message, where a store keeps the whole envelope."""
        if not entry.body.startswith(b'{"specversion"'):
            return entry
        try:
            return replace(entry, body=from_structured(entry.body, self._keeper().limits).body)
        except DecodeError:
            return entry  # what is no envelope is shown as it is: that is why it is dead
