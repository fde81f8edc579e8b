"""Time contenders in turns, so that whatever slows the machine down slows all of them."""

import gc
from collections.abc import Awaitable, Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from types import FunctionType
from typing import Any, Literal

__all__ = ("FULL", "QUICK", "Effort", "Goal", "Loop", "Row", "Sample", "calls", "quiet_gc", "race", "timed", "turns")

Loop = Callable[[int], Awaitable[object]]
"""Do a thing so many times."""
Unit = Literal["s", "/s", "B"]


@dataclass(frozen=True, slots=True)
class Effort:
    """Say how long to measure: rounds, the least seconds of one slice, and the part of what is to be queued or kept."""

    rounds: int
    slice: float
    scale: float

    def of(self, count: int) -> int:
        return max(round(count * self.scale), 100)

    def some(self, rounds: int) -> int:
        """Return a number of rounds for something slow."""
        return min(self.rounds, rounds)


FULL = Effort(rounds=25, slice=0.02, scale=1.0)
QUICK = Effort(rounds=1, slice=0.001, scale=0.01)


@dataclass(frozen=True, slots=True)
class Sample:
    """Hold the least and the median of several rounds: seconds, or bytes, for one pass."""

    best: float
    median: float

    @classmethod
    def of(cls, values: list[float]) -> "Sample":
        return cls(min(values), median(values))

    def __sub__(self, other: "Sample") -> "Sample":
        return Sample(self.best - other.best, self.median - other.median)

    def __truediv__(self, parts: float) -> "Sample":
        return Sample(self.best / parts, self.median / parts)


@dataclass(frozen=True, slots=True)
class Goal:
    """Hold the ratio to reach: at most, or with ``least`` at least, so much."""

    ratio: float
    least: bool = False
    slack: float = 0.0
    """What may be noise."""
    peer: str = ""
    """The best peer, and what it reaches against the same baseline."""

    def reached(self, ratio: float) -> bool:
        return ratio >= self.ratio - self.slack if self.least else ratio <= self.ratio + self.slack

    def __str__(self) -> str:
        return f"{'≥' if self.least else '≤'} {self.ratio:g}"


@dataclass(frozen=True, slots=True)
class Row:
    """Hold one comparison: what it takes us, and what it takes the baseline.

    With the unit ``/s`` the numbers are shown as rates, and the ratio is rate by rate: more is better.
    """

    what: str
    ours: Sample
    baseline: str
    floor: Sample
    goal: Goal | None = None
    unit: Unit = "s"

    @property
    def ratio(self) -> Sample:
        ours, floor = self.ours, self.floor
        if self.unit == "/s":
            ours, floor = floor, ours
        return Sample(ours.best / floor.best, ours.median / floor.median)


def calls(call: Callable[..., Awaitable[object]], *arguments: Any) -> Loop:
    """Return the loop that awaits a call; each loop has code of its own, which Python then specialises for it alone."""

    async def run(passes: int) -> None:
        for _ in range(passes):
            await call(*arguments)

    async def run_one(passes: int) -> None:
        (argument,) = arguments
        for _ in range(passes):
            await call(argument)

    chosen: Any = run_one if len(arguments) == 1 else run
    return FunctionType(chosen.__code__.replace(), globals(), closure=chosen.__closure__)


@contextmanager
def quiet_gc() -> Generator[None]:
    """Collect now, and not again until the block is left."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


async def timed(loop: Loop, passes: int) -> float:
    """Return the seconds of one pass."""
    with quiet_gc():
        start = perf_counter()
        await loop(passes)
        return (perf_counter() - start) / passes


async def race(effort: Effort, loops: Mapping[str, Loop]) -> dict[str, Sample]:
    """Return what one pass of each loop takes: several rounds, in each of which every loop has a slice of time."""
    passes = {name: await _passes(loop, effort.slice) for name, loop in loops.items()}
    return await turns(effort.rounds, {name: _slice(loop, passes[name]) for name, loop in loops.items()})


async def turns(rounds: int, takes: Mapping[str, Callable[[], Awaitable[float]]]) -> dict[str, Sample]:
    """Have every contender measure itself once a round, the first of one round being the last of the next."""
    values: dict[str, list[float]] = {name: [] for name in takes}
    names = list(takes)
    for _ in range(rounds):
        for name in names:
            values[name].append(await takes[name]())
        names.append(names.pop(0))
    return {name: Sample.of(values[name]) for name in takes}


def _slice(loop: Loop, passes: int) -> Callable[[], Awaitable[float]]:
    return lambda: timed(loop, passes)


async def _passes(loop: Loop, seconds: float) -> int:
    """Warm a loop up, and return how many passes take so many seconds."""
    await loop(1)
    passes = 1
    while (taken := await timed(loop, passes) * passes) < seconds:
        passes = round(passes * min(max(1.2 * seconds / max(taken, 1e-9), 2.0), 10.0))
    return passes
