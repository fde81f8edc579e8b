"""Be the one member of an ordered group that gets everything: stay it, and take over in order."""

from collections.abc import Iterable

from eventbus.transports._nats_wire import Message, header

__all__ = ("GROUP", "KEEP", "Pin")

GROUP = "eventbus"
"""The one priority group of an ordered consumer; who is pinned in it gets everything."""
KEEP = 0.5
"""Seconds between two words of a pinned client, without which another would be pinned."""
CALM = 0.2
"""Seconds without a message after which nothing is left that comes again."""


class Pin:
    """Know whether we are pinned, when to say that we are still here, and what may be received."""

    __slots__ = ("_heard", "_kept", "_lease", "gathering", "id")

    def __init__(self, lease: float) -> None:
        self.id = ""
        """What the server calls our being pinned; empty: another is, or nobody yet."""
        self.gathering = True
        """Whether what our predecessor left behind is still coming: all of it before anything new, in any order."""
        self._lease = lease
        self._kept = self._heard = 0.0

    def hear(self, message: Message, attempt: int, now: float) -> None:
        """Note a message, which says who is pinned."""
        self.id = header(message, "Nats-Pin-Id") or self.id
        self._heard = now
        self.gathering = self.gathering and attempt > 1

    def calm(self, now: float) -> bool:
        """Tell whether all has come that our predecessor left; True once."""
        if not (self.gathering and self.id) or now - self._heard < CALM:
            return False
        self.gathering = False
        return True

    def lapsed(self, ends: Iterable[float], now: float) -> bool:
        """Tell whether a lease has run out: what comes again now may do so behind what follows it."""
        return bool(self.id) and min(ends, default=now + 1.0) <= now

    def due(self, ends: Iterable[float], now: float) -> bool:
        """Tell whether to say that we are here; not where a lease runs out, since that mixes up what comes again."""
        if not self.id or now - self._kept < min(KEEP, self._lease / 4):
            return False
        if min(ends, default=now + self._lease) - now <= self._lease / 4:
            return False
        self._kept = now
        return True

    def terms(self) -> dict[str, object]:
        """Return what a pull request says of it."""
        return {"group": GROUP, "id": self.id} if self.id else {"group": GROUP}
