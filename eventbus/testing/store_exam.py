"""Examine a store: plain functions over the port, on a clock that the exam moves.

>>> from eventbus.stores.memory import MemoryStore
>>> make = lambda: MemoryStore(limits=LIMITS)
>>> anyio.run(examine, CHECKS[0], make)

A test of a store is then one function: ``await examine(check, make)`` for every check, where ``make`` returns a store
that is not open, keeps nothing yet, and was made with ``limits=LIMITS``.
"""

from collections.abc import Callable

import anyio

from eventbus.store import Store
from eventbus.testing import store_exam_claiming, store_exam_dead, store_exam_ordering, store_exam_writing
from eventbus.testing.store_desk import ANNOUNCED, LIMITS, Check, Desk, HandClock

__all__ = ("CHECKS", "LIMITS", "Check", "HandClock", "examine")

CHECKS: tuple[Check, ...] = (
    *store_exam_writing.CHECKS,
    *store_exam_claiming.CHECKS,
    *store_exam_ordering.CHECKS,
    *store_exam_dead.CHECKS,
)
"""All checks."""


async def examine(check: Check, make: Callable[[], Store], *, patience: float = 30.0) -> None:
    """Ask one question. Raises ``AssertionError`` if a promise is not kept, ``TimeoutError`` if the store hangs."""
    clock = HandClock()
    store = make()
    store.bind(clock)
    with anyio.fail_after(patience):
        async with store:
            await store.announce(ANNOUNCED)
            await check.run(Desk(store, clock))
