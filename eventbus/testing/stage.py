"""Let one handling make one step at a time, and draw from a seed which: a schedule that can be played again.

A step is what a coroutine does between two suspensions. Whoever could make one waits here until everybody else waits
too, here or for something; then one of them is drawn. So it makes no difference how the event loop orders its tasks.
"""

import time
from collections.abc import Callable, Collection, Coroutine, Generator
from dataclasses import dataclass
from random import Random
from types import coroutine
from typing import Any

import anyio
from anyio.lowlevel import checkpoint

from eventbus._signal import Signal

resource: Any
try:
    import resource
except ImportError:  # not on every system: then only the time tells
    resource = None

__all__ = ("BLOCKED", "Player", "Stage")

QUIET = 12
"""Turns of the event loop without any change, after which everybody waits."""
SOON = 0.0005
"""Real seconds between two looks at what happens outside of the event loop."""
OUTSIDE = 20
"""Looks for a handling that waits for something unknown."""
CALLS = 4_000
"""Looks for calls that are known to come back."""
BLOCKED = 0.1
"""Real seconds of doing nothing within one step, after which it has blocked the event loop."""


@dataclass(slots=True, eq=False)
class Player:
    """Be one run of one handler on the stage."""

    name: str
    """What it is called in the schedule: the same in every run from the same seed."""
    slow: bool = False
    """Whether it starts only when nobody else can make a step."""
    fault: str = ""
    """What is to go wrong in it."""
    fired: bool = False
    """Whether that has happened."""
    steps: int = 0


class Stage:
    """Decide who makes the next step."""

    def __init__(self, random: Random) -> None:
        self.schedule: list[str] = []
        """What was drawn, in order."""
        self.blocked: dict[str, float] = {}
        """Who blocked the event loop in one step, and for how many real seconds."""
        self.over = False
        """Whether everybody may go on as they like: the test has ended."""
        self.calls: Callable[[], int] = lambda: 0
        """Counts calls in flight that will come back by themselves."""
        self.callers: Callable[[], Collection[object]] = lambda: ()
        """Returns players that wait for a call which will come back, unless they wait for another player."""
        self.waiters: Callable[[], Collection[object]] = lambda: ()
        """Returns players that wait for another one for sure."""
        self._random = random
        self._players: set[Player] = set()
        self._ready: dict[Player, None] = {}
        self._stuck: set[Player] = set()
        self._leads: Player | None = None
        self._changes = 0
        self._last: Player | None = None
        self._news = Signal()

    def note(self, what: str) -> None:
        """Write into the schedule."""
        self.schedule.append(what)
        self._last = None

    async def play(self, player: Player, running: Coroutine[Any, Any, Any]) -> Any:
        """Await a coroutine, each step of it in its turn."""
        self._players.add(player)
        try:
            return await self._steps(player, running)
        finally:
            self._players.discard(player)
            self._stuck.discard(player)
            self._changes += 1

    @coroutine
    def _steps(self, player: Player, running: Coroutine[Any, Any, Any]) -> Generator[Any, Any, Any]:
        step: Callable[[Any], Any] = running.send
        value: Any = None
        try:
            while True:
                try:
                    yield from self._turn(player).__await__()
                except GeneratorExit:
                    raise
                except BaseException as error:  # cancelled in a way that no scope can hold off
                    step, value = running.throw, error
                before = time.monotonic(), time.thread_time(), _switches()
                try:
                    yielded = step(value)
                finally:
                    self._measure(player, before)
                try:
                    step, value = running.send, (yield yielded)
                except GeneratorExit:
                    raise
                except BaseException as error:
                    step, value = running.throw, error
        except StopIteration as stop:
            return stop.value
        finally:
            running.close()

    def _measure(self, player: Player, before: tuple[float, float, int]) -> None:
        began, worked, switches = before
        idle = (time.monotonic() - began) - (time.thread_time() - worked)
        if idle >= BLOCKED and (_THREAD is None or _switches() > switches):
            self.blocked[player.name] = max(idle, self.blocked.get(player.name, 0.0))

    async def _turn(self, player: Player) -> None:
        """Return when it is the player's turn; nothing is lost to a cancellation meanwhile, which comes afterwards."""
        if self.over:
            return
        self._ready[player] = None
        self._stuck.discard(player)
        self._changes += 1
        try:
            with anyio.CancelScope(shield=True):
                while player in self._ready and not self.over:
                    if self._leads is not None:
                        await self._news.wait()
                        continue
                    self._leads = player
                    try:
                        await self._quiet()
                        self._draw()
                    finally:
                        self._leads = None
                        self._news.fire()
        finally:
            self._ready.pop(player, None)

    async def _quiet(self) -> None:
        """Return when everybody waits."""
        seen, turns, looks = self._changes, 0, 0
        while turns < QUIET and not self.over:
            await checkpoint()
            turns += 1
            if seen != self._changes:
                seen, turns, looks = self._changes, 0, 0
            elif turns == QUIET and looks < self._patience():
                turns, looks = QUIET - 1, looks + 1
                await anyio.sleep(SOON)
        self._stuck |= self._outside()

    def _patience(self) -> int:
        outside = self._outside()
        return CALLS if self.calls() > 0 or outside.intersection(self.callers()) else OUTSIDE if outside else 0

    def _outside(self) -> set[Player]:
        """Return who waits for something that may be outside of the event loop, and has not been waited for yet."""
        return self._players.difference(self._ready, self._stuck, self.waiters())

    def _draw(self) -> None:
        if not self._ready:
            return
        ready = sorted(self._ready, key=lambda one: one.name)
        quick = [one for one in ready if one.steps or not one.slow]
        chosen = self._random.choice(quick or ready)
        del self._ready[chosen]
        if chosen.steps == 0 or chosen is not self._last:
            how = "goes on" if chosen.steps else "starts, late" if chosen.slow else "starts"
            self.schedule.append(f"{chosen.name} {how}")
        chosen.steps += 1
        self._last = chosen


_THREAD: int | None = getattr(resource, "RUSAGE_THREAD", None)


def _switches() -> int:
    """Count how often this thread has given up its processor to wait, where the system says."""
    return 0 if _THREAD is None else int(resource.getrusage(_THREAD).ru_nvcsw)
