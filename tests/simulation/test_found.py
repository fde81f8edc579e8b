"""What the simulation has found stays mended: one test per bug, by its seed or by the shortest way to it."""

from collections.abc import Sequence

import anyio
import pytest

from eventbus import Event, EventBus, Limits, Module
from eventbus.clock import Runtime
from eventbus.errors import StoreError
from eventbus.ledger import Answer, Ledger
from eventbus.store import Claimed, Recipient, Settlement
from eventbus.stores.memory import MemoryStore
from eventbus.testing.clock import VirtualClock
from tests.simulation.play import play
from tests.simulation.shop import quiet


@pytest.mark.parametrize("seed", [22, 63, 74, 87])
def test_what_was_hoarded_before_a_stall_is_not_started_after_it(seed: int) -> None:
    """A process that stood still beyond its lease starts nothing that others have claimed meanwhile."""
    story = play(seed, traits=quiet(0, faults=("stall",), burst=20, pause=0.3, length=3.0))
    assert story.violation is None, story


@pytest.mark.parametrize("seed", [23, 38, 52, 61])
def test_ordered_intake_goes_on_after_the_store_was_away(seed: int) -> None:
    """A message that waits to be ingested again leaves no prefetch full of its followers."""
    story = play(seed, traits=quiet(3, faults=("outage",), keys=1, burst=8, slots=1, requests=3, length=3.0))
    assert story.violation is None, story


def test_clock_set_forward_excuses_a_claim_whose_answer_is_on_its_way() -> None:
    """What is leased when the clock jumps may run twice, though it is in no slot yet."""
    story = play(101321)
    assert story.violation is None, story


class Ping(Event, name="found.ping"):
    """Be handled."""

    number: int


class Tripping(MemoryStore):
    """Fail at one claim."""

    def __init__(self, trip: int) -> None:
        super().__init__()
        self.trip = trip
        self.calls = 0

    async def claim(self, recipient: Recipient, *, owner: str, limit: int, lease: float, cursor: str = "") -> Claimed:
        self.calls += 1
        if self.calls == self.trip:
            raise StoreError("the claim failed")
        return await super().claim(recipient, owner=owner, limit=limit, lease=lease, cursor=cursor)


async def test_failed_claim_leaves_no_entry_to_its_lease() -> None:
    """What was claimed before a claim that fails is handled soon, not when its lease is over."""
    module, handled, over = Module("found"), set[int](), anyio.Event()

    @module.on(Ping, concurrency=2)
    async def pong(event: Ping) -> None:
        handled.add(event.number)
        if len(handled) == 100:
            over.set()

    calls = trip = 1
    while trip <= calls:
        store, over = Tripping(trip), anyio.Event()
        handled.clear()
        bus = EventBus(module, name="found", store=store, routes={Ping: "store"}, limits=Limits(batch=16))
        async with bus.running():
            await bus.publish_many([Ping(number=number) for number in range(100)], atomic=False)
            with anyio.fail_after(10.0):
                await over.wait()
        calls, trip = store.calls, trip + 1
    assert calls > 4


class Noting(MemoryStore):
    """Note what is written, and say that claim 1 of every row is lost."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[tuple[int, int]] = []

    async def settle(self, settlements: Sequence[Settlement]) -> frozenset[int]:
        return await self.extend([(one.seq, one.claims) for one in settlements], 0.0)

    async def extend(self, held: Sequence[tuple[int, int]], lease: float) -> frozenset[int]:
        self.noted += held
        return frozenset(seq for seq, claims in held if claims == 1)


async def test_newer_claim_of_a_row_is_not_lost_with_the_older() -> None:
    """A process that has claimed a row twice, because a clock jumped, loses the first claim and keeps the second."""
    store = Noting()
    ledger = Ledger(store, Runtime(VirtualClock()), Limits())
    kept: dict[tuple[str, int], bool] = {}

    async def settle(claims: int) -> None:
        answer = Answer()
        ledger.settle(Settlement(7, claims, "done"), answer)
        kept["settle", claims] = await answer.wait()

    async def extend(claims: int) -> None:
        kept["extend", claims] = await ledger.extend(7, claims)

    async with anyio.create_task_group() as group:
        group.start_soon(ledger.run)
        async with anyio.create_task_group() as writers:
            for claims in (1, 2):
                writers.start_soon(settle, claims)
                writers.start_soon(extend, claims)
        group.cancel_scope.cancel()
    assert kept == {("settle", 1): False, ("settle", 2): True, ("extend", 1): False, ("extend", 2): True}
    assert sorted(store.noted) == [(7, 2), (7, 2)]
