"""The unstarted deliveries of one source: ready, parked until due, or behind another of their key. Pure."""

import heapq
from collections import deque
from collections.abc import Iterator
from itertools import count

from eventbus.transport import Delivery

__all__ = ("Held", "Lanes")


class Held:
    """Be a delivery that waited here and not in its transport, so that its attempts are counted here."""

    __slots__ = ("ack", "attempt", "extend", "reject", "retry", "wire")

    def __init__(self, delivery: Delivery, attempt: int) -> None:
        self.wire, self.attempt = delivery.wire, attempt
        self.ack, self.retry = delivery.ack, delivery.retry
        self.reject, self.extend = delivery.reject, delivery.extend


class Lanes:
    """Hand out deliveries, of an ordered source one per key at a time."""

    def __init__(self, ordered: bool) -> None:
        self._ordered = ordered
        self._ready: deque[Delivery] = deque()
        self._behind: dict[str, deque[Delivery]] = {}
        self._parked: list[tuple[float, int, Delivery]] = []
        self._away: dict[str, str] = {}
        self._count = count()

    def admit(self, delivery: Delivery) -> bool:
        """Take a delivery in; False if it has to wait behind another of its key."""
        key = delivery.wire.key if self._ordered else None
        if key is not None:
            lane = self._behind.get(key)
            if lane is None:
                self._behind[key] = deque()
            elif self._away.get(key) == delivery.wire.id:
                del self._away[key]
            else:
                lane.append(delivery)
                return False
        self._ready.append(delivery)
        return True

    @property
    def ready(self) -> bool:
        """Tell whether there is one to start now."""
        return bool(self._ready)

    def take(self) -> Delivery | None:
        """Return a delivery to start now, or None."""
        return self._ready.popleft() if self._ready else None

    def leave(self, delivery: Delivery) -> bool:
        """Let the next of its key come, now that a delivery is settled; True if one became ready."""
        key = delivery.wire.key if self._ordered else None
        if key is None or (lane := self._behind.get(key)) is None:
            return False
        if not lane:
            del self._behind[key]
            return False
        self._ready.append(lane.popleft())
        return True

    def send_away(self, delivery: Delivery) -> None:
        """Keep its key waiting for a delivery that the transport will deliver again; said before it is asked to."""
        if self._ordered and delivery.wire.key is not None:
            self._away[delivery.wire.key] = delivery.wire.id

    def give_up(self, delivery: Delivery) -> bool:
        """Let the next of its key come after all, unless it is back by now; True if one became ready."""
        key = delivery.wire.key
        if key is None or self._away.get(key) != delivery.wire.id:
            return False
        del self._away[key]
        return self.leave(delivery)

    def park(self, delivery: Delivery, due: float) -> None:
        """Keep a delivery, and its key, until ``due``."""
        heapq.heappush(self._parked, (due, next(self._count), delivery))

    def ripen(self, now: float) -> int:
        """Make what was parked and is due ready; return how many."""
        ripe = 0
        while self._parked and self._parked[0][0] <= now:
            self._ready.append(heapq.heappop(self._parked)[2])
            ripe += 1
        return ripe

    def next_due(self) -> float | None:
        """Return when the first parked delivery is due."""
        return self._parked[0][0] if self._parked else None

    def later(self, now: float) -> int:
        """Count what waits until later: parked, or behind a key whose first is parked or away."""
        count = sum(len(self._behind[key]) for key in self._away)
        for due, _, delivery in self._parked:
            if due > now:
                count += 1 + len(self._behind.get(delivery.wire.key or "", ()) if self._ordered else ())
        return count

    def __iter__(self) -> Iterator[Delivery]:
        yield from self._ready
        yield from (delivery for _, _, delivery in sorted(self._parked, key=lambda one: one[:2]))
        for lane in self._behind.values():
            yield from lane

    def clear(self) -> list[Delivery]:
        """Give everything up, in an order that keeps each key's; return it."""
        everything = list(self)
        self._ready.clear()
        self._parked.clear()
        self._behind.clear()
        self._away.clear()
        return everything
