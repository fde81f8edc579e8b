"""Be a child that publishes, or handles in order, many keys of which some fail."""

from dataclasses import dataclass
from typing import Any

import anyio

from eventbus import Context, Event, EventBus, Limits, Module, Reject, Retry, Transaction
from tests.crash.child import wait_for_nothing
from tests.crash.fate import kept
from tests.crash.site import run

LEASE = 2.0


class Stepped(Event, name="lanes.stepped", key="lane"):
    """State that a key came so far."""

    lane: str
    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Lanes:
    """Say how many keys there are, how many steps each takes, and which keys have a dead one in their middle."""

    store: str
    publishes: bool = False
    keys: int
    each: int
    poisoned: frozenset[int]


def module(part: Lanes) -> Module:
    """Return a handler that fails at first with every third step, and kills the middle one of a poisoned key."""
    steps = Module("steps")

    @steps.on(Stepped, ordered=True, concurrency=8, retry=Retry(attempts=1_000, initial=0.01, maximum=0.05))
    async def step(event: Stepped, ctx: Context, tx: Transaction[Any]) -> None:
        key = int(event.lane.removeprefix("key-"))
        await run(
            tx.session, "INSERT INTO effects (number, lane, who) VALUES (:number, :lane, :who)",
            number=event.step, lane=event.lane, who=ctx.message_id,
        )  # fmt: skip
        if key in part.poisoned and event.step == part.each // 2:
            raise Reject("poisoned")
        if (key + event.step) % 3 == 0 and ctx.attempt <= 2:
            raise RuntimeError("not yet")

    return steps


async def play(part: Lanes) -> None:
    """Publish every step of every key, one after another, or handle until nothing waits."""
    async with kept(part.store) as store:
        limits = Limits(lease=LEASE, sweep=max(0.2, part.keys * part.each / 50_000), drain=5.0)
        bus = EventBus(module(part), name="lanes", store=store, routes={"lanes.*": "store"}, limits=limits)
        async with bus.running(consume=not part.publishes):
            if not part.publishes:
                await wait_for_nothing(store)
                return
            async with anyio.create_task_group() as group:
                for first in range(4):
                    group.start_soon(publish, bus, range(first, part.keys, 4), part.each)


async def publish(bus: EventBus, keys: range, each: int) -> None:
    """Publish the steps of some keys, each step in a transaction of its own."""
    for step in range(each):
        for start in range(0, len(keys), 50):
            async with bus.transaction():
                for key in keys[start : start + 50]:
                    await bus.publish(Stepped(lane=f"key-{key}", step=step))
