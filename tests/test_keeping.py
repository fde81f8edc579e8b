"""The house is kept: sweeps go on while there is something left, and end when there is not."""

from itertools import chain, repeat

import pytest

from eventbus import Event, EventBus, Limits, Module
from eventbus.keeping import ROUNDS
from eventbus.stores.memory import MemoryStore
from eventbus.testing import harness


class Kept(Event, name="keeping.kept"):
    """Need a store."""


class Sweeping(MemoryStore):
    """Say of each sweep that it found as much as it is told to."""

    def __init__(self, *found: int) -> None:
        super().__init__()
        self.found = chain(found, repeat(0)) if found else repeat(2)
        self.batches: list[int] = []

    async def sweep(self, *, retention: float, lease: float, batch: int) -> int:
        self.batches.append(batch)
        return next(self.found)


@pytest.mark.parametrize(("found", "first"), [((2, 3, 1, 2), 3), ((0,), 1), ((1, 2), 1), ((), ROUNDS)])
async def test_sweeps_go_on_until_one_finds_less_than_a_batch(found: tuple[int, ...], first: int) -> None:
    """A round that begins with the bus sweeps batch after batch until there is no more; the next comes in its time."""
    store = Sweeping(*found)
    bus = EventBus(Module("m", messages=[Kept]), name="shop", store=store, limits=Limits(batch=2))
    async with harness(bus) as t:
        await t.settled()
        assert store.batches == [2] * first
        await t.advance(bus.engine.registry.wiring.limits.sweep - 0.1)
        assert len(store.batches) == first
        await t.advance(0.1)
        assert len(store.batches) > first
