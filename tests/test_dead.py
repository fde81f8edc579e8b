"""The dead: found, looked at, replayed, discarded, by several operators, in every place that keeps some."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import anyio
import pytest

from eventbus import (
    Context,
    DeadEntry,
    Event,
    EventBus,
    Limits,
    Module,
    NotRunningError,
    Reject,
    Retry,
    TransactionOpenError,
)
from eventbus.stores.memory import MemoryStore
from eventbus.stores.sqlite import SQLiteStore
from eventbus.testing.harness import Harness, harness


class Paid(Event, name="x.paid", key="account"):
    """State that something was paid."""

    number: int = 0
    account: str = "a"


class Sent(Event, name="x.sent"):
    """State that something was sent."""

    number: int = 0


class Ward:
    """Hold a bus whose handlers fail until they are healed."""

    def __init__(self, *, routes: Any = None, **options: Any) -> None:
        self.sick = True
        self.seen: list[tuple[str, int, int]] = []
        module = Module("m")

        @module.on(Paid, Sent, retry=Retry(attempts=2, initial=1, jitter=False))
        async def first(event: Paid | Sent, ctx: Context) -> None:
            self.fail("first", ctx)

        @module.on(Paid, retry=Retry(attempts=1))
        async def second(event: Paid, ctx: Context) -> None:
            self.fail("second", ctx)

        self.bus = EventBus(module, routes=routes or {"x.*": "memory"}, name="shop", **options)

    def fail(self, handler: str, ctx: Context) -> None:
        """Note a handling; fail while sick."""
        self.seen.append((handler, ctx.message.number, ctx.attempt))
        if self.sick:
            raise ValueError(f"{handler} cannot take {ctx.message.number}")


async def fill(t: Harness, *events: object) -> list[DeadEntry]:
    """Publish, let all die, return the dead."""
    for event in events:
        await t.publish(event)
        await t.advance(2)
    return t.dead


async def test_dead_entry_tells_everything() -> None:
    """A dead entry says which message died for which handler, when, after how many failures, of what, and its body."""
    ward = Ward()
    async with harness(ward.bus) as t:
        before = t.clock.now()
        receipt = await t.publish(Sent(number=7))
        await t.advance(10)
        (entry,) = await t.bus.dead.find()
        assert (receipt.id, "x.sent", "shop/m.first") == (entry.message_id, entry.message, entry.handler)
        assert (2, "failed 2 times; last: ValueError: first cannot take 7") == (entry.failures, entry.error)
        assert entry.time == datetime.fromtimestamp(before + 1, UTC)
        assert entry.body == b'{"number":7}'
        assert await t.bus.dead.get(entry.id) == entry
        assert await t.bus.dead.get("nobody") is None
        with pytest.raises(AttributeError):
            entry.error = "fine"  # type: ignore[misc]
        assert len(t.dead) == 1


async def test_filters() -> None:
    """The dead are found by type or name, handler with or without the bus, time, and a part of the error, combined."""
    ward = Ward()
    async with harness(ward.bus) as t:
        await fill(t, Paid(number=1), Sent(number=2), Paid(number=3))
        find = t.bus.dead.find

        async def found(**filters: Any) -> list[str]:
            return [entry.error.partition(": ")[2].partition(": ")[2] or entry.error for entry in await find(**filters)]

        assert len(await find()) == 5
        assert len(await find(message=Paid)) == 4
        assert len(await find(message="x.sent")) == 1
        assert len(await find(handler="m.first")) == 3
        assert len(await find(handler="shop/m.second")) == 2
        assert len(await find(handler="m.third")) == 0
        assert len(await find(error="take 3")) == 2
        assert len(await find(error="take 3", handler="m.second")) == 1
        assert len(await find(since=datetime.fromtimestamp(t.clock.now() - 1.5, UTC))) == 1
        assert len(await find(since=datetime.fromtimestamp(t.clock.now() - 4.5, UTC))) == 3
        assert await found(message=Sent) == ["first cannot take 2"]


async def test_pages() -> None:
    """Pages of any size, one after another, give every dead entry once and the oldest first."""
    ward = Ward()
    async with harness(ward.bus) as t:
        await fill(t, *(Paid(number=number) for number in range(5)))
        everything = [entry.id for entry in await t.bus.dead.find()]
        assert len(everything) == 10
        for size in (1, 3, 10, 11):
            paged, after = list[str](), None
            while page := await t.bus.dead.find(limit=size, after=after):
                assert len(page) <= size
                paged.extend(entry.id for entry in page)
                after = page[-1].id
            assert everything == paged


@pytest.mark.parametrize("limit", [0, -1, True])
async def test_limit_that_cannot_be(limit: Any) -> None:
    """A page has at least one entry."""
    async with harness(Ward().bus) as t:
        with pytest.raises(ValueError, match="limit="):
            await t.bus.dead.find(limit=limit)


async def test_filters_that_cannot_be() -> None:
    """A time without a zone, a filter nobody knows, and the id of nothing are refused."""
    async with harness(Ward().bus) as t:
        with pytest.raises(ValueError, match="time with a zone"):
            await t.bus.dead.find(since=datetime.now())  # noqa: DTZ005
        with pytest.raises(TypeError, match="message, handler, since, error"):
            await t.bus.dead.find(colour="red")  # type: ignore[call-arg]
        with pytest.raises(TypeError):
            await t.bus.dead.replay(colour="red")  # type: ignore[call-arg]
        with pytest.raises(ValueError, match="after="):
            await t.bus.dead.find(after="nothing that was ever dead")


async def test_replay_and_discard_want_to_know_which() -> None:
    """Without ids and filters nothing is replayed or discarded, by accident or otherwise."""
    async with harness(Ward().bus) as t:
        for verb in (t.bus.dead.replay, t.bus.dead.discard):
            with pytest.raises(ValueError, match="ids or filters"):
                await verb()
            with pytest.raises(ValueError, match="ids or filters"):
                await verb(message=None, handler=None)


async def test_replay_starts_anew() -> None:
    """A replayed message comes again as at first: all attempts, the same id, and gone from the dead."""
    ward = Ward()
    async with harness(ward.bus) as t:
        (entry,) = await fill(t, Sent(number=1))
        ward.seen.clear()
        assert await t.bus.dead.replay(entry.id) == 1
        await t.advance(10)
        assert [("first", 1, 1), ("first", 1, 2)] == ward.seen
        (again,) = t.dead
        assert again.message_id == entry.message_id
        ward.sick = False
        assert await t.bus.dead.replay(again.id) == 1
        await t.settled()
        assert [] == t.dead
        assert ward.seen[-1] == ("first", 1, 1)
        assert await t.bus.dead.replay(again.id) == 0


async def test_replay_of_one_handler_does_not_run_the_others() -> None:
    """What died for one handler is replayed for that handler only."""
    ward = Ward()
    async with harness(ward.bus) as t:
        await fill(t, Paid(number=1), Paid(number=2))
        ward.sick = False
        ward.seen.clear()
        assert await t.bus.dead.replay(handler="m.second") == 2
        await t.settled()
        assert [("second", 1, 1), ("second", 2, 1)] == ward.seen
        assert {"shop/m.first"} == {entry.handler for entry in t.dead}


async def test_replay_by_ids_and_filters_needs_both() -> None:
    """Ids and filters together choose what both choose."""
    ward = Ward()
    async with harness(ward.bus) as t:
        dead = await fill(t, Paid(number=1))
        ids = [entry.id for entry in dead]
        ward.sick = False
        assert await t.bus.dead.replay(*ids, handler="m.first") == 1
        await t.settled()
        assert ["shop/m.second"] == [entry.handler for entry in t.dead]


async def test_discard_forgets() -> None:
    """What is discarded is gone, never handled, and gone only once."""
    ward = Ward()
    async with harness(ward.bus) as t:
        await fill(t, Paid(number=1), Sent(number=2))
        ward.seen.clear()
        assert await t.bus.dead.discard(message=Paid) == 2
        assert await t.bus.dead.discard(message=Paid) == 0
        await t.advance(100)
        assert [] == ward.seen
        assert ["x.sent"] == [entry.message for entry in t.dead]


@pytest.mark.parametrize("verb", ["replay", "discard"])
async def test_two_operators_at_once(verb: str) -> None:
    """Two who press the button at once do it once, between them."""
    ward, counts = Ward(), list[int]()
    async with harness(ward.bus) as t:
        await fill(t, *(Paid(number=number) for number in range(10)))
        ward.sick = False
        ward.seen.clear()

        async def operator() -> None:
            counts.append(await getattr(t.bus.dead, verb)(message=Paid))

        async with anyio.create_task_group() as group:
            for _ in range(3):
                group.start_soon(operator)
        await t.settled()
        assert sum(counts) == 20
        assert [] == t.dead
        assert len(ward.seen) == (20 if verb == "replay" else 0)


async def test_replay_while_it_still_fails() -> None:
    """Whoever is replayed while the cause lasts is dead again, once, and nothing is lost."""
    ward = Ward()
    async with harness(ward.bus) as t:
        await fill(t, Paid(number=1))
        for _ in range(3):
            assert await t.bus.dead.replay(message=Paid) == 2
            await t.advance(10)
            assert len(t.dead) == 2


async def test_ordered_key_goes_on_past_its_dead_and_takes_them_back() -> None:
    """A replayed message of an ordered handler joins its key again."""
    module, seen, sick = Module("m"), list[int](), [True]

    @module.on(Paid, ordered=True)
    async def paid(event: Paid) -> None:
        seen.append(event.number)
        if event.number == 1 and sick[0]:
            raise Reject

    async with harness(EventBus(module, routes={"x.*": "memory"})) as t:
        for number in (1, 2, 3):
            await t.publish(Paid(number=number))
        await t.settled()
        assert [1, 2, 3] == seen
        sick.clear()
        sick.append(False)
        assert await t.bus.dead.replay(message=Paid) == 1
        await t.settled()
        assert [1, 2, 3, 1] == seen
        assert [] == t.dead


async def test_handler_pauses_at_the_ceiling_of_its_dead() -> None:
    """At Limits.dead a handler takes nothing more, so that none is dropped; clearing up lets it go on."""
    ward = Ward(limits=Limits(dead=2))
    async with harness(ward.bus) as t:
        for number in range(5):
            await t.publish(Sent(number=number))
        await t.advance(100)
        assert len(t.dead) == 2
        ward.sick = False
        assert await t.bus.dead.discard(message=Sent) == 2
        await t.advance(100)
        assert [] == t.dead
        assert len(t.handled("m.first")) == 3
        assert t.failed("m.first")


async def test_dead_need_a_running_bus() -> None:
    """Before the start nobody is dead yet, and nobody can say."""
    bus = Ward().bus
    for call in (bus.dead.find(), bus.dead.get("1"), bus.dead.replay("1"), bus.dead.discard("1")):
        with pytest.raises(NotRunningError, match=r"bus\.dead"):
            await call


@pytest.mark.parametrize("verb", ["replay", "discard"])
async def test_change_in_an_open_transaction_is_refused_where_it_would_wait_for_itself(
    verb: str, tmp_path: Path
) -> None:
    """SQLite has one writer: a change inside its transaction is refused at once, and done after it."""
    ward = Ward(routes={"x.*": "store"}, store=SQLiteStore(tmp_path / "x.db"))
    async with harness(ward.bus) as t:
        dead = await fill(t, Sent(number=1))
        with anyio.fail_after(10.0):
            async with t.bus.transaction() as tx:
                await tx.session.execute("CREATE TABLE mine (x)")
                for target in ({"handler": "m.first"}, {"message": Sent}):
                    with pytest.raises(TransactionOpenError, match=rf"bus\.dead\.{verb}\(\).*after it"):
                        await getattr(t.bus.dead, verb)(**target)
                assert dead == await t.bus.dead.find()
            assert await getattr(t.bus.dead, verb)(message=Sent) == len(dead)
        ward.sick = False
        await t.settled()
        assert [] == t.dead


async def test_dead_of_every_place_in_one_list() -> None:
    """Store, memory and another transport keep dead of their own; ids tell them apart, pages go through all."""
    routes = {"x.paid": "memory", "x.sent": "events"}
    ward = Ward(routes=routes, transports={"events": "memory://"})
    async with harness(ward.bus) as t:
        dead = await fill(t, Paid(number=1), Sent(number=2), Sent(number=3))
        assert len({entry.id for entry in dead}) == 4
        assert ["x.paid", "x.paid", "x.sent", "x.sent"] == [entry.message for entry in dead]
        ids, after = list[str](), None
        while page := await t.bus.dead.find(limit=1, after=after):
            ids.append(page[0].id)
            after = page[0].id
        assert [entry.id for entry in dead] == ids
        for entry in dead:
            assert await t.bus.dead.get(entry.id) == entry
        ward.sick = False
        ward.seen.clear()
        assert await t.bus.dead.replay(ids[-1]) == 1
        assert await t.bus.dead.discard(ids[0]) == 1
        await t.settled()
        assert [("first", 3, 1)] == ward.seen
        assert ids[1:3] == [entry.id for entry in t.dead]
        assert await t.bus.dead.replay(message=Sent) == 1
        await t.settled()
        assert ids[1:2] == [entry.id for entry in t.dead]


async def test_dead_of_store_and_memory() -> None:
    """Entries of the store come first, then those in memory; both can be replayed at once."""
    ward = Ward(routes={"x.paid": "store", "x.sent": "memory"}, store=MemoryStore())
    async with harness(ward.bus) as t:
        dead = await fill(t, Sent(number=1), Paid(number=2))
        assert ["x.paid", "x.paid", "x.sent"] == [entry.message for entry in dead]
        assert {b'{"number":1}', b'{"number":2,"account":"a"}'} == {entry.body for entry in dead}
        ids, after = list[str](), None
        while page := await t.bus.dead.find(limit=2, after=after):
            ids.extend(entry.id for entry in page)
            after = page[-1].id
        assert [entry.id for entry in dead] == ids
        ward.sick = False
        since = datetime.now(UTC) - timedelta(days=1)
        assert await t.bus.dead.replay(since=since) == 3
        await t.settled()
        assert [] == t.dead
