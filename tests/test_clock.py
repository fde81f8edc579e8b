"""Ids: unique, ordered by time, and never made twice by two processes; and clocks that were set back."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from time import time_ns
from uuid import RFC_4122, UUID

import pytest

from eventbus import EventBus
from eventbus.clock import FETCHED, Ids, Setback, new_id
from eventbus.testing.store_exam import HandClock


@pytest.mark.parametrize("make", [new_id, Ids()], ids=["one by one", "fetched"])
def test_ids_are_uuids_of_version_7(make: Callable[[], str]) -> None:
    """An id is a UUID of version 7 in its canonical text, and begins with the millisecond of its making."""
    before = time_ns() // 1_000_000
    made = [UUID(one) for one in (make() for _ in range(3 * FETCHED))]
    after = time_ns() // 1_000_000
    assert {(7, RFC_4122)} == {(one.version, one.variant) for one in made}
    assert all(before <= one.int >> 80 <= after for one in made)
    assert len(made) == len(set(made))
    assert str(made[0]) == str(made[0]).lower()


def test_ids_of_many_threads_differ() -> None:
    """Threads that make ids at the same time get different ones."""
    make = Ids()
    with ThreadPoolExecutor(8) as pool:
        made = [one for many in pool.map(lambda _: [make() for _ in range(500)], range(8)) for one in many]
    assert len(made) == len(set(made)) == 4_000


def tails(make: Ids) -> set[str]:
    """Return the random ends of the ids that are in stock."""
    return {make()[-12:] for _ in range(FETCHED - 2)}


async def test_ids_fetched_before_a_fork_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bus that starts makes no id from chance fetched before, which a forked process would have in stock too."""
    bus = EventBus()
    make = bus.engine.runtime.ids
    assert isinstance(make, Ids)
    fetched = list[bytes]()
    fetch = os.urandom

    def remembered(size: int) -> bytes:
        fetched.append(fetch(size))
        return fetched[-1]

    monkeypatch.setattr(os, "urandom", remembered)
    make()
    stock = fetched[0].hex()
    async with bus.running():
        made = tails(make)
    assert all(tail not in stock for tail in made)


class Mending:
    """Be a store whose clock is a hand clock, and note by how much its rows are hastened."""

    def __init__(self, *, seen: int = 0, slow: float = 0.0) -> None:
        self.clock = HandClock(1_000.0)
        self.backs: list[int] = []
        self.seen = seen
        self.slow = slow
        self.setback = Setback(self.clock)

    async def look(self) -> tuple[int, int]:
        now = round(self.clock.now() * 1000)
        self.clock.advance(self.slow)
        return now, self.seen

    async def hasten(self, back: int) -> int:
        self.backs.append(back)
        return 2 if len(self.backs) < 3 else 1

    async def mend(self) -> int:
        """Sweep with batches of two."""
        return await self.setback.mend(self.look, self.hasten, 2)


async def test_clock_set_back_is_noticed_until_less_than_a_batch_is_found() -> None:
    """Rows are hastened by what the clock was set back, batch after batch, and once."""
    store = Mending()
    await store.mend()
    store.clock.advance(5.0)
    store.clock.jump(-3600.0)
    assert [2, 2, 1, 0] == [await store.mend() for _ in range(4)]
    assert store.backs == [3_600_000] * 3


async def test_clock_that_goes_on_or_jumps_ahead_is_left_alone() -> None:
    """Neither a clock that lags by a second, nor one set forward, nor a slow answer is one that was set back."""
    store = Mending(slow=30.0)
    for seconds in (0.0, -1.0, 3600.0, -0.5):
        store.clock.jump(seconds)
        store.clock.advance(5.0)
        assert await store.mend() == 0
    assert store.backs == []


async def test_first_mark_is_when_somebody_was_seen() -> None:
    """What was set back before this process began shows in what others have written, once."""
    store = Mending(seen=1_060_000)
    assert [2, 2, 1, 0] == [await store.mend() for _ in range(4)]
    assert store.backs == [60_000] * 3
