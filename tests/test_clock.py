"""Ids: unique, ordered by time, and never made twice by two processes."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from time import time_ns
from uuid import RFC_4122, UUID

import pytest

from eventbus import EventBus
from eventbus.clock import FETCHED, Ids, new_id


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
