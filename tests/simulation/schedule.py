"""Run trio so that a seed decides everything: virtual time, and the order in which its tasks take turns."""

import logging
import random
from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager
from typing import TypeVar

import trio
from trio._core import _run as scheduler
from trio.testing import MockClock

__all__ = ("run",)

T = TypeVar("T")


@contextmanager
def _scheduled(seed: int) -> Generator[None]:
    """Let a seed order trio's tasks.

    trio shuffles the tasks of each turn so that nobody relies on their order. The chance it uses can be held still by
    Hypothesis only, through an entry point that sets these two names; what it sets is set here without it, because a
    seed must mean the same whether or not Hypothesis is loaded.
    """
    before = scheduler._ALLOW_DETERMINISTIC_SCHEDULING, scheduler._r.getstate()
    scheduler._ALLOW_DETERMINISTIC_SCHEDULING = True
    scheduler._r.seed(seed)
    try:
        yield
    finally:
        scheduler._ALLOW_DETERMINISTIC_SCHEDULING = before[0]
        scheduler._r.setstate(before[1])


@contextmanager
def _silent() -> Generator[None]:
    """Keep the warnings of a thousand injected faults out of the output; the run's own log tells more."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


def run(seed: int, play: Callable[[random.Random], Awaitable[T]]) -> T:
    """Run ``play`` to its end in virtual time; the same seed gives the same run."""
    with _scheduled(seed), _silent():
        return trio.run(play, random.Random(seed), clock=MockClock(autojump_threshold=0.0))
