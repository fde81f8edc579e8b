"""Go round the lanes of a recipient, some at a time, so that no lane waits for ever behind the others."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ("Seen", "go_round")


@dataclass(frozen=True, slots=True)
class Seen:
    """Hold what one look at the next lanes has found."""

    taken: Sequence[Any]
    furthest: str | None
    """The last lane that something was taken of."""
    reached: str
    """The last lane that was looked at."""
    ended: bool
    """Whether there was no further lane."""


Look = Callable[[str, str | None, int], Seen]
"""Look at the lanes behind one, up to another (None: to the end), and take so many at most."""


def go_round(look: Look, limit: int, cursor: str) -> tuple[list[Any], str]:
    """Return what was taken and where to go on, ``""`` when the lap has met nothing (more) to take.

    A lap starts where the last lane was taken and may need several claims; only its end proves that nothing is due.
    """
    start, lane, wrapped = _lap(cursor)
    taken: list[Any] = []
    while True:
        seen = look(lane, start if wrapped and start else None, limit - len(taken))
        taken += seen.taken
        if len(taken) >= limit and seen.furthest:
            return taken, _onwards(seen.furthest, seen.furthest, wrapped=False)
        if not seen.ended:
            return taken, _onwards(start, seen.reached, wrapped=wrapped)
        if wrapped:
            return taken, ""
        lane, wrapped = "", True
        if len(taken) >= limit:
            return taken, _onwards(start, lane, wrapped=wrapped)


def _lap(cursor: str) -> tuple[str, str, bool]:
    """Return where a lap of lanes started, how far it came, and whether it passed the end of the alphabet."""
    if not cursor:
        return "", "", True
    length, _, lanes = cursor[1:].partition(":")
    return lanes[: int(length)], lanes[int(length) :], cursor[0] == "1"


def _onwards(start: str, lane: str, *, wrapped: bool) -> str:
    return f"{wrapped:d}{len(start)}:{start}{lane}"
